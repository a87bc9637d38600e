"""What a cache checks and looks up before its first forward."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from reasonkv.budget import Budget, BudgetError
from reasonkv.calibration import Calibration
from reasonkv.methods import Method
from reasonkv.rotary import Rotary


def checked_budget(method: Method, budget: Budget | int | None) -> Budget | None:
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
    made = Budget(tokens=budget) if isinstance(budget, int) else budget
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
