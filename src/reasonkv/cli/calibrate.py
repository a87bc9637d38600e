"""`reasonkv calibrate` and `reasonkv train-gate`."""

from __future__ import annotations


def calibrate() -> None:
    """Average a model's queries."""


def train_gate() -> None:
    """Train the gate."""
