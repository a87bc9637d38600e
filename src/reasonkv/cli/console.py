"""What commands print: progress and notes on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any


def print_json(data: Any) -> None:
    """Print one JSON document; dataclasses become objects."""
    print(
        json.dumps(asdict(data) if is_dataclass(data) and not isinstance(data, type) else data, indent=2, default=str)
    )


def note(text: str) -> None:
    """Print one line for people on stderr."""
    print(text, file=sys.stderr)


def print_tables(tables: Iterable[Any], *under: str) -> None:
    """Print rich tables and sentences under them; without a terminal, wide enough for every column of ours."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables:
        console.print(table)
    for text in under:
        console.print(text, style="dim", highlight=False)


def show(path: Path) -> str:
    """Return a path as a person would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)


@contextmanager
def progress_bars(total: int) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr: bars on a terminal, one line per finished step elsewhere.

    Args:
        total: steps in all.

    Yields:
        A function of (what, done, of how many), called as a step advances.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, began = Console(stderr=True), time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        overall, current = bars.add_task("all steps", total=total), bars.add_task("", total=None)

        def advance(what: str, done: int, of: int) -> None:
            nonlocal began
            bars.update(current, description=what, completed=done, total=of)
            if done < of:
                return
            bars.advance(overall)
            if not console.is_terminal:
                note(f"{what}: {of} in {time.perf_counter() - began:.1f} s")
                began = time.perf_counter()

        yield advance


def quiet_libraries() -> None:
    """Keep the libraries that load models from writing over progress and errors."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
