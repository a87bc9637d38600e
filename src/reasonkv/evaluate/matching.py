"""Equal physical lengths: which `tokens` gives a wanted mean, from the schedule alone.

Methods and prompt policies differ in what they count, so equal `tokens` is not equal memory. Two cells are compared
when their mean physical length differs by under 2 %. Methods that hold everything and select have no such length to
match: what they read comes in whole pages, which no budget brings within 2 % of a wanted mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.methods import Method, layer_budgets
from reasonkv.methods.sparse_read import SelectionMethod
from reasonkv.schedule import Lengths, next_event, step


def sized(rule: Budget, tokens: int) -> Budget:
    """The budget of a rule at a size: its `tokens`, or as many slots kept of each of a `Window`'s windows."""
    return replace(rule, retention=tokens / rule.size) if isinstance(rule, Window) else replace(rule, tokens=tokens)


def selecting_method(methods: Iterable[Method]) -> str | None:
    """The name of the first method that holds everything and selects what to read, if any does."""
    return next((method.name for method in methods if isinstance(method, SelectionMethod)), None)


def check_matchable(methods: Iterable[Method]) -> None:
    """Check that equal mean slots mean something for every method.

    Raises:
        BudgetError: a method that holds everything and selects.
    """
    if (selecting := selecting_method(methods)) is not None:
        raise BudgetError(
            f"Mean slots are matched by what is held, and {selecting} holds everything and reads whole pages of it; "
            f"run {selecting} with --budgets, which is what it reads, and compare by slots read."
        )


def attended_slots(budget: Budget | None, prompt: int, length: int) -> int:
    """Slots attended, summed over the tokens fed after the prompt, of a row fed one token at a time.

    Args:
        budget: None for full KV.
        prompt: tokens of the prompt, fed in pieces that end at its boundaries.
        length: tokens fed in all, prompt included.
    """
    state, total = Lengths(prompt=prompt), 0
    while state.logical < length:
        end = prompt if state.logical < prompt else length
        event = next_event(budget, state)
        fed = min(end, event if event is not None else end) - state.logical
        if state.logical >= prompt:
            # token i of the piece (from 1) attends to what was held and to the i newest
            total += fed * state.physical + fed * (fed + 1) // 2
        state, _ = step(budget, state, fed)
    return total


def mean_physical(
    budget: Budget | None,
    prompts: Sequence[int],
    lengths: Sequence[int],
    method: Method | None = None,
    layers: int = 1,
) -> float:
    """Mean over rows, and over layers whose budgets differ, of the mean slots held per token fed after the prompt.

    Args:
        budget: None for full KV.
        prompts: tokens of each row's prompt.
        lengths: tokens fed of each row, prompt included; more than its prompt.
        method: matters where it divides the budget among layers.
        layers: compressed layers.

    Raises:
        BudgetError: a layer's share cannot hold what is protected.
        ValueError: no rows, or one without a token after its prompt.
    """
    rows = list(zip(prompts, lengths, strict=True))
    if not rows or any(length <= prompt for prompt, length in rows):
        raise ValueError("A mean physical length needs rows with tokens after their prompt.")
    total = 0.0
    for prompt, length in rows:
        divides = method is not None and method.needs.layer_budgets
        shares = layer_budgets(method, budget, layers, prompt) if method and divides else [budget]
        slots = sum(attended_slots(own, prompt, length) for own in shares)
        total += slots / len(shares) / (length - prompt)
    return total / len(rows)


def budget_for_mean(
    budget: Budget,
    target: float,
    prompts: Sequence[int],
    lengths: Sequence[int],
    method: Method | None = None,
    layers: int = 1,
) -> Budget:
    """The budget whose mean is nearest to a target: its `tokens` are solved, or the retention of a `Window`.

    Args:
        budget: everything else.
        target: mean slots attended per token fed after the prompt.
        prompts: tokens of each row's prompt.
        lengths: tokens fed of each row, prompt included.
        method, layers: as in `mean_physical`.

    Raises:
        BudgetError: the target lies outside what this budget can reach on these rows.
    """
    if not isinstance(budget, Window):
        return replace(budget, tokens=tokens_for_mean(budget, target, prompts, lengths, method, layers))

    def mean(kept: int) -> float:
        return mean_physical(sized(budget, kept), prompts, lengths)

    low, high = 1, budget.size - 1
    least, most = mean(low), mean(high)
    if not least <= target <= most:
        raise BudgetError(
            f"A mean of {target:g} slots cannot be reached: with this window and buffer it lies between {least:.1f} "
            f"(1 slot of a window) and {most:.1f} (all but 1); choose a target in between."
        )
    while high - low > 1:  # a larger retention never attends to fewer slots
        middle = (low + high) // 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return sized(budget, low if target - mean(low) <= mean(high) - target else high)


def tokens_for_mean(
    budget: Budget,
    target: float,
    prompts: Sequence[int],
    lengths: Sequence[int],
    method: Method | None = None,
    layers: int = 1,
) -> int:
    """The `tokens` whose mean physical length is nearest to a target; the smaller of two equally near.

    Where budgets are divided among layers, their rounding may leave it a token beside the nearest.

    Args:
        budget: everything but `tokens`, which is ignored.
        target: mean slots attended per token fed after the prompt.
        prompts: tokens of each row's prompt.
        lengths: tokens fed of each row, prompt included.
        method, layers: as in `mean_physical`.

    Raises:
        BudgetError: the target lies outside what this budget can reach on these rows.
    """
    divides = method is not None and method.needs.layer_budgets
    recent = max(budget.recent, method.needs.recent) if method is not None and divides else budget.recent
    low = max(1, budget.sinks + recent)
    if budget.prompt == "keep":
        low = max(low, max(prompts) + recent + 1)
    high = max(low, max(lengths))  # holds every token of every row, so the mean is full KV's

    def mean(tokens: int) -> float:
        return mean_physical(replace(budget, tokens=tokens), prompts, lengths, method, layers)

    while divides and mean(high) < mean_physical(None, prompts, lengths):  # until the smallest share holds everything
        high *= 2
    least, most = mean(low), mean(high)
    if not least <= target <= most:
        raise BudgetError(
            f"A mean of {target:g} slots cannot be reached: with this interval, recent window and prompt policy it "
            f"lies between {least:.1f} (tokens={low}) and {most:.1f} (full KV); choose a target in between."
        )
    while high - low > 1:  # a larger budget never attends to fewer slots, so bisection is enough
        middle = (low + high) // 2
        low, high = (middle, high) if mean(middle) < target else (low, middle)
    return low if target - mean(low) <= mean(high) - target else high
