"""The method that serves a model whose user names none."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from reasonkv.calibration.files import find_calibration
from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.methods import Method, get_method
from reasonkv.methods.forecast import Forecast
from reasonkv.resolve import check_model

UNFITTED = "expected"
"""What serves a model that nothing was fitted to: the best published method on Qwen2.5-Coder (docs/results)."""
_WITHOUT_QUERIES = "random"
"""What serves a model that shows no queries: the best there of the methods that read keys alone."""


def default_method(model: PreTrainedModel, calibration: Calibration | str | Path | None = None) -> Method:
    """Return `forecast` where its networks were fitted to the model, otherwise `expected`; `random` without queries.

    Args:
        calibration: statistics or their file, as in `CompressedCache`; looked up unless given.

    Raises:
        CalibrationError: the file that is given is damaged or another model's.
    """
    found: Calibration | None
    try:
        found = calibration if isinstance(calibration, Calibration) else find_calibration(model, calibration)
    except CalibrationError:
        if calibration is not None:
            raise
        found = None
    chosen = method_for(found)
    return get_method(_WITHOUT_QUERIES) if check_model(model, chosen) else chosen


def method_for(calibration: Calibration | None) -> Method:
    """Return `forecast` as the networks of a calibration read it; `expected` where there are none."""
    if calibration is None or calibration.forecast is None:
        return get_method(UNFITTED)
    return Forecast.fitted(calibration.forecast, calibration.head_dim)
