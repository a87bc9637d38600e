"""Statistics of a model's queries before RoPE, for the methods that score with them: collect, store, look up."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonkv.calibration.averages import collect, fitting_window, working_bytes
    from reasonkv.calibration.files import export_pt, import_pt, load_calibration, save_calibration
    from reasonkv.calibration.job import CalibrateJob
    from reasonkv.calibration.lookup import cached_calibration, find_calibration
    from reasonkv.calibration.statistics import Calibration, CalibrationError
    from reasonkv.view import LayerStatistics

_MODULES = {
    "averages": ("collect", "fitting_window", "working_bytes"),
    "files": ("export_pt", "import_pt", "load_calibration", "save_calibration"),
    "job": ("CalibrateJob",),
    "lookup": ("cached_calibration", "find_calibration"),
    "statistics": ("Calibration", "CalibrationError", "LayerStatistics"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CalibrateJob",
    "Calibration",
    "CalibrationError",
    "LayerStatistics",
    "cached_calibration",
    "collect",
    "export_pt",
    "find_calibration",
    "fitting_window",
    "import_pt",
    "load_calibration",
    "save_calibration",
    "working_bytes",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `CalibrateJob` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
