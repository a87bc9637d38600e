"""Calibration: per-head statistics of a model's queries before RoPE, collected, stored and looked up."""

from __future__ import annotations

from reasonkv.calibration.collect import collect, fitting_window, working_bytes
from reasonkv.calibration.files import export_pt, import_pt, load_calibration, save_calibration
from reasonkv.calibration.lookup import cached_calibration, find_calibration
from reasonkv.calibration.statistics import Calibration, CalibrationError
from reasonkv.view import LayerStatistics

__all__ = [
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
