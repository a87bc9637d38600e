"""What commands print: progress and notes on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonkv.evaluate.progress import Progress


def print_json(data: Any) -> None:
    """Print one JSON document; dataclasses become objects, and numbers that are not finite null."""
    from pydantic_core import to_jsonable_python

    print(json.dumps(to_jsonable_python(data, inf_nan_mode="null", fallback=str), indent=2))


def note(text: str) -> None:
    """Print one line for people on stderr."""
    print(text, file=sys.stderr)


def print_tables(tables: Iterable[Any], *under: str, warnings: Iterable[str] = ()) -> None:
    """Print rich tables and sentences under them; without a terminal, wide enough for every column of ours."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150)
    for table in tables:
        console.print(table)
    for text in under:
        console.print(text, style="dim", highlight=False)
    for sentence in warnings:
        print(f"Warning: {sentence}")


def print_list(
    headings: Sequence[str], rows: Iterable[Sequence[str]], right: bool = False, width: int | None = None
) -> None:
    """Print a light table: its first column does not wrap; numbers stand on the `right`; `width` without a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    for place, heading in enumerate(headings):
        is_left = not right or place in (0, 2)
        table.add_column(
            heading, no_wrap=not right and not place, overflow="ellipsis" if right or not place else "fold",
            justify="left" if is_left else "right",
        )  # fmt: skip
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else width).print(table)


def show(path: Path) -> str:
    """Return a path as a person would type it from here."""
    own = os.path.relpath(os.path.realpath(path), os.path.realpath(os.curdir))
    return str(path) if own.startswith(os.pardir) else own


LINE_SECONDS = 30.0
"""Time between two lines of progress where there is no terminal."""


@contextmanager
def progress_bars(total: int, clock: Callable[[], float] = time.perf_counter) -> Iterator[Progress]:
    """Show progress on stderr: bars on a terminal; elsewhere a line per finished step, and one every 30 seconds.

    Args:
        total: steps in all.
        clock: returns seconds.

    Yields:
        What is called as a step advances.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bars

    console, finished, step, ended, told = Console(stderr=True), 0, "", "", clock()
    began = step_began = told
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        overall = bars.add_task("all steps", total=total, facts="")
        current = bars.add_task("", total=None, facts="")

        def advance(what: str, done: int, of: int, *, tokens: int = 0, right: float | None = None) -> None:
            nonlocal finished, step, step_began, ended, told
            if done >= of and what == ended:
                return  # a step may report its end twice: with its last record, and with its last batch
            now = clock()
            if what != step:
                step, step_began = what, now
            facts = [f"{tokens / (now - step_began):,.0f} tokens/s"] if tokens and now > step_began else []
            facts += [] if right is None else [f"{right:.0%} right"]
            whole, share = done >= of, (finished + done / max(1, of)) / max(1, total)
            left = f"{_span((now - began) * (1 - share) / share)} left" if 0 < share < 1 else ""
            bars.update(current, description=what, completed=done, total=of, facts=", ".join(facts))
            bars.update(overall, completed=finished + whole, facts=left)
            if not console.is_terminal and (whole or now - told >= LINE_SECONDS):
                amount = f"{of} in {now - step_began:.1f} s" if whole else f"{done} of {of}"
                note(f"{what}: {', '.join(filter(None, [amount, *facts, left]))}")
                told = now
            if whole:
                finished, step, ended = finished + 1, "", what

        yield advance


def _span(seconds: float) -> str:
    """Return a time in words, as in 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def quiet_libraries() -> None:
    """Keep the libraries that load models from writing over progress and errors."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
