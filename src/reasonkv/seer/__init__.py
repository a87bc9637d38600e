"""The gate of SeerAttention-R: its file, where it is found, and its training."""

from __future__ import annotations

from .gate import FILE, Gate, GateError, find_gate, load_gate, random_gate, save_gate
from .training import GateRecipe, TrainingRow, kept_attention, task_rows, text_rows, train_gate

__all__ = [
    "FILE",
    "Gate",
    "GateError",
    "GateRecipe",
    "TrainingRow",
    "find_gate",
    "kept_attention",
    "load_gate",
    "random_gate",
    "save_gate",
    "task_rows",
    "text_rows",
    "train_gate",
]
