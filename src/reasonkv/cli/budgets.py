"""From the flags of a budget to budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reasonkv.cli.common import UsageError, whole_numbers

if TYPE_CHECKING:
    from reasonkv.budget import Budget
    from reasonkv.methods import Method


def make_budget(tokens: int, **fields: Any) -> Budget:
    """A budget from flags.

    Raises:
        BudgetError: one sentence.
    """
    from reasonkv.budget import Budget

    return Budget(tokens, **fields)


def make_windows(size: int, buffer: int, retention: str) -> list[Budget]:
    """The windows that `--window` and `--retention` ask for.

    Raises:
        UsageError, BudgetError: one sentence.
    """
    from reasonkv.budget import Window

    try:
        shares = [float(part) for part in retention.split(",") if part.strip()]
    except ValueError:
        shares = []
    if not shares:
        raise UsageError(f"--retention takes shares separated by commas, as in 0.2,0.3, not {retention!r}.")
    return [Window(size, buffer, share) for share in dict.fromkeys(shares)]


def make_window(size: int, buffer: int, retention: str) -> Budget:
    """The one window that `--window` and `--retention` ask for.

    Raises:
        UsageError, BudgetError: one sentence; several retentions are refused.
    """
    first, *others = make_windows(size, buffer, retention)
    if others:
        raise UsageError(f"This command runs one window; give one --retention, not {retention}.")
    return first


def make_budgets(
    budgets: str | None,
    mean_slots: str | None,
    *,
    window: int | None = None,
    window_buffer: int = 64,
    retention: str = "0.3",
    methods: Sequence[Method] = (),
    **fields: Any,
) -> tuple[list[Budget], list[int]]:
    """The budgets and the mean lengths that `--budgets`, `--mean-slots` or `--window` ask for.

    Args:
        budgets: tokens, separated by commas.
        mean_slots: mean slots instead; then one budget comes back, whose tokens (or retention) are still to be solved.
        window: size of a sliding window instead; one budget per retention comes back.
        window_buffer, retention: of the window.
        methods: those that will meet the budgets.
        fields: every other field of a budget.

    Raises:
        UsageError: both, neither, or something that is no number.
        BudgetError: fields that contradict each other, or a method whose mean slots cannot be matched.
    """
    if mean_slots is not None and methods:
        from reasonkv.evaluate.matching import check_matchable

        check_matchable(methods)
    if window is not None:
        if budgets is not None:
            raise UsageError("Give either --budgets or --window; with --window, --retention says how much stays.")
        means = [] if mean_slots is None else whole_numbers(mean_slots, "--mean-slots")
        return make_windows(window, window_buffer, retention)[: 1 if means else None], means
    if (budgets is None) == (mean_slots is None):
        raise UsageError("Give either --budgets or --mean-slots.")
    tokens = [max(1, fields["sinks"] + fields["recent"])] if budgets is None else whole_numbers(budgets, "--budgets")
    means = [] if mean_slots is None else whole_numbers(mean_slots, "--mean-slots")
    return [make_budget(one, **fields) for one in tokens], means
