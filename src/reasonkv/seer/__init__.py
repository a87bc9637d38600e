"""The gate of SeerAttention-R: its file, where it is found, and its training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonkv.calibration.corpus import Passage
    from reasonkv.seer.gate import FILE, Gate, GateError, find_gate, load_gate, random_gate, save_gate
    from reasonkv.seer.job import TrainGateJob
    from reasonkv.seer.recipe import GateRecipe
    from reasonkv.seer.training import kept_attention, train_gate

__all__ = [
    "FILE",
    "Gate",
    "GateError",
    "GateRecipe",
    "Passage",
    "TrainGateJob",
    "find_gate",
    "kept_attention",
    "load_gate",
    "random_gate",
    "save_gate",
    "train_gate",
]
_HOME = {
    "GateRecipe": "reasonkv.seer.recipe",
    "TrainGateJob": "reasonkv.seer.job",
    "Passage": "reasonkv.calibration.corpus",
    "kept_attention": "reasonkv.seer.training",
    "train_gate": "reasonkv.seer.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `TrainGateJob` needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "reasonkv.seer.gate")), name)
