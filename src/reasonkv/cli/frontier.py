"""`reasonkv frontier`."""

from __future__ import annotations

import typer


def frontier() -> None:
    """Not there yet."""
    raise typer.Exit(1)
