"""What a cache checks and looks up before its first forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from reasonkv.budget import Budget, BudgetError, ExplicitEventsWindow, PeriodicWindow, Window
from reasonkv.calibration import Calibration
from reasonkv.methods import Method
from reasonkv.rotary import Rotary


def fitted(method: Method, budget: Budget | int | None) -> tuple[Method, Budget | None]:
    """A method as it runs under a budget, and the budget, None exactly for methods that keep everything.

    Raises:
        BudgetError: a budget that is missing, not wanted, or too small for what is protected.

    """
    made = validate_budget(method, budget)
    return (method if made is None else method.for_budget(made)), made


def check_window(budget: Budget | None, *, reopen_prompt: bool, listed: bool) -> None:
    """Check what only some kinds of budget can do.

    Raises:
        BudgetError: listed events for a budget that decides for itself, or a prompt in the middle of the windows.

    """
    if isinstance(budget, (ExplicitEventsWindow, PeriodicWindow)):
        raise BudgetError("A cache lists its rows' events itself; give it a Window and window_events.")
    if listed and not isinstance(budget, Window):
        raise BudgetError("window_events are for a Window; a Budget decides by itself when its events fall.")
    if reopen_prompt and isinstance(budget, Window):
        raise BudgetError("The prompt of a Window ends before its first window; leave reopen_prompt out.")


def listed_budgets(
    budget: Budget | None, events: Sequence[tuple[int, int]] | None, batch: int
) -> Sequence[Budget | None]:
    """Every row's budget: the same for all, unless (row, logical length) of every event is given.

    Raises:
        BudgetError: an event of a row that is not in the batch, or two events of a row too close.

    """
    if events is None or budget is None:
        return [budget] * batch
    rows: list[list[int]] = [[] for _ in range(batch)]
    for row, length in events:
        if not 0 <= row < batch:
            raise BudgetError(f"window_events names row {row} of a batch of {batch} rows.")
        rows[row].append(length)
    assert isinstance(budget, Window)
    return [
        ExplicitEventsWindow(budget.size, budget.buffer, budget.retention, events=tuple(sorted(own))) for own in rows
    ]


def validate_budget(method: Method, budget: Budget | int | None) -> Budget | None:
    """The budget of a cache; None exactly for methods that keep everything.

    Raises:
        BudgetError: a budget that is missing, not wanted, or too small for what is protected.

    """
    if not method.bounded:
        if budget is not None:
            raise BudgetError(f"{method.name} keeps everything and takes no budget; leave it out or choose a method.")
        return None
    if budget is None:
        raise BudgetError(f"{method.name} needs a budget, such as Budget(tokens=512).")
    made = Budget(tokens=budget, prompt="count") if isinstance(budget, int) else budget
    made.check_protected(recent=method.needs.recent)
    return made


def spread(values: list[int] | None, batch: int, name: str) -> list[int] | None:
    """One value per row; a value per prompt is repeated when `generate` expands prompts to several rows each.

    Raises:
        BudgetError: values that do not divide the batch.

    """
    if values is None:
        return None
    if not values or batch % len(values):
        raise BudgetError(f"{name} has {len(values)} entries for a batch of {batch} rows.")
    return [value for value in values for _ in range(batch // len(values))]


def load_statistics(model: PreTrainedModel, given: Calibration | str | Path | None) -> Calibration:
    """The statistics a method scores with, checked against the model and on its device.

    Raises:
        CalibrationError: none to be found, or another model's.

    """
    from reasonkv.calibration import find_calibration  # which runs models, so it stands on this package

    found = given if isinstance(given, Calibration) else find_calibration(model, given)
    found.check(model.config)
    return found.to(model.device)


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The rotary embedding of the model's full-attention layers."""
    return Rotary.from_config(model.config, "full_attention").to(model.device)
