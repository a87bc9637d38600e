"""What follows from the schedule alone: which budget gives a wanted mean length, and what a budget did to its tokens.

Methods and prompt policies differ in what they count, so equal `tokens` is not equal memory. Two cells are compared
when their mean physical length differs by under 2 %. Methods that keep everything and select have no such length to
match: what they read comes in whole pages, which no budget brings within 2 % of a wanted mean.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.methods import Method, layer_budgets
from reasonkv.schedule import attended_slots, walk


def sized(rule: Budget, tokens: int) -> Budget:
    """Return the budget of a rule at a size: its `tokens`, or the slots kept of each of a `Window`'s windows."""
    return replace(rule, retention=tokens / rule.size) if isinstance(rule, Window) else replace(rule, tokens=tokens)


def smallest(rule: Budget, method: Method | None, longest_prompt: int) -> int:
    """Return the smallest size that holds what may never be evicted, a method's own window included."""
    if isinstance(rule, Window):
        return 1
    recent = rule.recent if method is None else max(rule.recent, method.needs.recent)
    return max(1, rule.sinks + recent, longest_prompt + recent + 1 if rule.prompt == "keep" else 0)


def selecting_method(methods: Iterable[Method]) -> str | None:
    """Return the name of the first method that keeps everything and selects what to read, if any does."""
    return next((method.name for method in methods if method.needs.selects), None)


def check_matchable(methods: Iterable[Method]) -> None:
    """Check that equal mean slots mean something for every method.

    Raises:
        BudgetError: a method that keeps everything and selects.
    """
    if (selecting := selecting_method(methods)) is not None:
        raise BudgetError(
            f"Mean slots are matched by what is held, and {selecting} holds everything and reads whole pages of it; "
            f"run {selecting} with --budgets, which is what it reads, and compare by slots read."
        )


def mean_physical(
    budget: Budget | None,
    prompts: Sequence[int],
    lengths: Sequence[int],
    method: Method | None = None,
    layers: int = 1,
) -> float:
    """Return the mean over rows, and over layers whose budgets differ, of the slots held per token after the prompt.

    Args:
        budget: None for full KV.
        lengths: tokens fed of each row, prompt included; more than its prompt.
        method: one whose layers have budgets of their own; None for all others.

    Raises:
        BudgetError: a layer's share cannot hold what is protected.
        ValueError: no rows, or one without a token after its prompt.
    """
    rows = list(zip(prompts, lengths, strict=True))
    if not rows or any(length <= prompt for prompt, length in rows):
        raise ValueError("A mean physical length needs rows with tokens after their prompt.")
    total = 0.0
    for prompt, length in rows:
        shares = Counter(layer_budgets(method, budget, layers, prompt))
        slots = sum(count * attended_slots(own, prompt, length) for own, count in shares.items())
        total += slots / layers / (length - prompt)
    return total / len(rows)


def budget_for_mean(
    budget: Budget,
    target: float,
    prompts: Sequence[int],
    lengths: Sequence[int],
    method: Method | None = None,
    layers: int = 1,
) -> Budget:
    """Return the budget whose mean physical length is nearest to a target; the smaller of two equally near.

    Where budgets are divided among layers, their rounding may leave it a token beside the nearest.

    Args:
        budget: everything but its `tokens` (of a `Window`, its retention), which are solved.

    Raises:
        BudgetError: the target lies outside what this budget can reach on these rows.
    """

    @functools.cache
    def mean(size: int) -> float:
        return mean_physical(sized(budget, size), prompts, lengths, method, layers)

    low = smallest(budget, method, max(prompts))
    high = budget.size - 1 if isinstance(budget, Window) else max(low, *lengths)
    while method is not None and mean(high) < mean_physical(
        None, prompts, lengths
    ):  # until the smallest share holds everything
        high *= 2
    if not mean(low) <= target <= mean(high):
        raise BudgetError(
            f"A mean of {target:g} slots cannot be reached: with this rule it lies between {mean(low):.1f} "
            f"({low} slots stay) and {mean(high):.1f} ({high} stay); choose a target in between."
        )
    enough = low + bisect_left(range(low, high), target, key=mean)  # a larger budget never attends to fewer slots
    return sized(budget, min((max(low, enough - 1), enough), key=lambda size: abs(mean(size) - target)))


# -- regimes ----------------------------------------------------------------------------------------------------------

Regime = Literal["compressed", "prompt_fills_budget", "uncompressed", "selecting"]
PREFIX_GUARD = "prefix_budget_exhausted"


def regime_of(budget: Budget | None, prompt: int, events: int, exhausted: bool, selects: bool) -> Regime:
    """Return what a record says anything about, from the fields of it that decide that.

    - "uncompressed": no compaction ran; the numbers are full KV's, whatever the method.
    - "prompt_fills_budget": compactions ran, but the method had no decode tokens to choose from. Either it says so
      itself (the fallback `prefix_budget_exhausted`), or the prompt is kept inside the budget and fills it together
      with the sinks and the recent window, or every compaction cut the prompt and decoding never met another one.
    - "compressed": decoding went on compressing, with tokens of its own to choose from.
    - "selecting": the method kept everything, and every decoded token read a part of it.

    With `prompt="count"` a prompt larger than the budget does not by itself fill it: its tokens may be dropped, so from
    the first compaction of decoding on the method chooses among both.
    """
    if selects:
        return "selecting"
    if events == 0 or budget is None:
        return "uncompressed"
    if exhausted or (
        budget.tokens and budget.prompt == "keep" and max(prompt, budget.sinks) + budget.recent >= budget.tokens
    ):
        return "prompt_fills_budget"
    return "compressed" if events > _prompt_events(budget, prompt, events) else "prompt_fills_budget"


@functools.lru_cache(maxsize=4096)
def _prompt_events(budget: Budget, prompt: int, most: int) -> int:
    """Compactions while the prompt is fed, counted up to `most`; the schedule alone decides."""
    compactions = (compacted for _, _, _, compacted in walk(budget, prompt, prompt) if compacted)
    return sum(islice(compactions, most))
