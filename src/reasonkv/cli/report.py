"""`reasonkv report`."""

from __future__ import annotations

import typer


def report() -> None:
    """Not there yet."""
    raise typer.Exit(1)
