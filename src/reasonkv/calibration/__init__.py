"""Statistics of a model's queries before RoPE, for the methods that score with them: collect, store, look up."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonkv.calibration.averages import collect as collect
    from reasonkv.calibration.averages import fitting_window as fitting_window
    from reasonkv.calibration.averages import working_bytes as working_bytes
    from reasonkv.calibration.files import export_pt as export_pt
    from reasonkv.calibration.files import import_pt as import_pt
    from reasonkv.calibration.files import load_calibration as load_calibration
    from reasonkv.calibration.files import save_calibration as save_calibration
    from reasonkv.calibration.job import CalibrateJob as CalibrateJob
    from reasonkv.calibration.lookup import cached_calibration as cached_calibration
    from reasonkv.calibration.lookup import find_calibration as find_calibration
    from reasonkv.calibration.statistics import Calibration as Calibration
    from reasonkv.calibration.statistics import CalibrationError as CalibrationError
    from reasonkv.view import LayerStatistics as LayerStatistics

_MODULES = {
    "averages": ("collect", "fitting_window", "working_bytes"),
    "files": ("export_pt", "import_pt", "load_calibration", "save_calibration"),
    "job": ("CalibrateJob",),
    "lookup": ("cached_calibration", "find_calibration"),
    "statistics": ("Calibration", "CalibrationError", "LayerStatistics"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `CalibrateJob` needs no torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
