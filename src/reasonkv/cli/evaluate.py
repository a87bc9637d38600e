"""`reasonkv evaluate`."""

from __future__ import annotations

import typer


def evaluate() -> None:
    """Not there yet."""
    raise typer.Exit(1)
