"""Equal physical lengths: which `tokens` gives a wanted mean, from the schedule alone.

Methods and prompt policies differ in what they count, so equal `tokens` is not equal memory. Two cells are compared
when their mean physical length differs by under 2 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reasonkv.budget import Budget, BudgetError, Window
from reasonkv.schedule import State, next_event, step


def attended_slots(budget: Budget | None, prompt: int, length: int) -> int:
    """Slots attended, summed over the tokens fed after the prompt, of a row fed one token at a time.

    Args:
        budget: None for full KV.
        prompt: tokens of the prompt, fed in pieces that end at its boundaries.
        length: tokens fed in all, prompt included.
    """
    state, total = State(prompt=prompt), 0
    while state.length < length:
        end = prompt if state.length < prompt else length
        event = next_event(budget, state)
        fed = min(end, event if event is not None else end) - state.length
        if state.length >= prompt:
            # token i of the piece (from 1) attends to what was held and to the i newest
            total += fed * state.held + fed * (fed + 1) // 2
        state, _ = step(budget, state, fed)
    return total


def mean_physical(budget: Budget | None, prompts: Sequence[int], lengths: Sequence[int]) -> float:
    """Mean over rows of the mean slots attended per token fed after the prompt.

    Args:
        budget: None for full KV.
        prompts: tokens of each row's prompt.
        lengths: tokens fed of each row, prompt included; more than its prompt.

    Raises:
        ValueError: no rows, or one without a token after its prompt.
    """
    rows = list(zip(prompts, lengths, strict=True))
    if not rows or any(length <= prompt for prompt, length in rows):
        raise ValueError("A mean physical length needs rows with tokens after their prompt.")
    return sum(attended_slots(budget, prompt, length) / (length - prompt) for prompt, length in rows) / len(rows)


def budget_for_mean(budget: Budget, target: float, prompts: Sequence[int], lengths: Sequence[int]) -> Budget:
    """The budget whose mean is nearest to a target: its `tokens` are solved, or the retention of a `Window`.

    Args:
        budget: everything else.
        target: mean slots attended per token fed after the prompt.
        prompts: tokens of each row's prompt.
        lengths: tokens fed of each row, prompt included.

    Raises:
        BudgetError: the target lies outside what this budget can reach on these rows.
    """
    if not isinstance(budget, Window):
        return replace(budget, tokens=tokens_for_mean(budget, target, prompts, lengths))

    def window(kept: int) -> Window:
        return replace(budget, retention=kept / budget.size)

    def mean(kept: int) -> float:
        return mean_physical(window(kept), prompts, lengths)

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
    return window(low if target - mean(low) <= mean(high) - target else high)


def tokens_for_mean(budget: Budget, target: float, prompts: Sequence[int], lengths: Sequence[int]) -> int:
    """The `tokens` whose mean physical length is nearest to a target; the smaller of two equally near.

    Args:
        budget: everything but `tokens`, which is ignored.
        target: mean slots attended per token fed after the prompt.
        prompts: tokens of each row's prompt.
        lengths: tokens fed of each row, prompt included.

    Raises:
        BudgetError: the target lies outside what this budget can reach on these rows.
    """
    low = max(1, budget.sinks + budget.recent)
    if budget.prompt == "keep":
        low = max(low, max(prompts) + budget.recent + 1)
    high = max(low, max(lengths))  # holds every token of every row, so the mean is full KV's

    def mean(tokens: int) -> float:
        return mean_physical(replace(budget, tokens=tokens), prompts, lengths)

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
