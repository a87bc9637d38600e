"""Statistics of a model's queries before RoPE, for the methods that score with them: collect, store, look up."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonkv.calibration.chosen import default_method as default_method
    from reasonkv.calibration.files import cached_calibration as cached_calibration
    from reasonkv.calibration.files import find_calibration as find_calibration
    from reasonkv.calibration.files import load_calibration as load_calibration
    from reasonkv.calibration.files import save_calibration as save_calibration
    from reasonkv.calibration.public import export_pt as export_pt
    from reasonkv.calibration.public import import_pt as import_pt
    from reasonkv.calibration.queries import collect as collect
    from reasonkv.calibration.statistics import Calibration as Calibration
    from reasonkv.calibration.statistics import CalibrationError as CalibrationError
    from reasonkv.view import LayerStatistics as LayerStatistics

_MODULES = {
    "chosen": ("default_method",),
    "files": ("cached_calibration", "find_calibration", "load_calibration", "save_calibration"),
    "public": ("export_pt", "import_pt"),
    "queries": ("collect",),
    "statistics": ("Calibration", "CalibrationError", "LayerStatistics"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the jobs need no torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
