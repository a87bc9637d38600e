"""What a cache looks up before its first forward."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from reasonkv.calibration import Calibration
from reasonkv.rotary import Rotary


def load_statistics(model: PreTrainedModel, given: Calibration | str | Path | None) -> Calibration:
    """Return the statistics a method scores with, checked against the model and on its device.

    Raises:
        CalibrationError: none to be found, or another model's.

    """
    from reasonkv.calibration import find_calibration  # which runs models, so it stands on this package

    found = given if isinstance(given, Calibration) else find_calibration(model, given)
    found.check(model.config)
    return found.to(model.device)


def rotary_of(model: PreTrainedModel) -> Rotary:
    """Return the rotary embedding of the model's full-attention layers."""
    return Rotary.from_config(model.config, "full_attention").to(model.device)
