"""`reasonkv inspect`."""

from __future__ import annotations

import typer


def inspect() -> None:
    """Not there yet."""
    raise typer.Exit(1)
