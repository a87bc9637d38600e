"""The catalogue: built-in methods, and those of other packages through the entry points `reasonkv.methods`.

It imports no torch, so that listing and completing names is fast. `catalogue.csv` is the list.
"""

from __future__ import annotations

import csv
import difflib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple

from reasonkv.errors import ReasonKVError


class MethodError(ReasonKVError, ValueError):
    """An unknown method or option, or a value that an option does not allow."""


class Entry(NamedTuple):
    """One built-in method.

    Args:
        path: where its class is, "module:class".
        title: one line.
        paper: citation with its arXiv number, or "-" for a baseline without one.
        vllm: "yes", "no", or the option that lets vLLM run it, such as "mass=none".
    """

    path: str
    title: str
    paper: str
    vllm: str


_ROWS = csv.DictReader(Path(__file__).with_name("catalogue.csv").read_text(encoding="utf-8").splitlines())
CATALOGUE = {row.pop("name"): Entry(**row) for row in _ROWS}
"""The built-in methods by name."""


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of methods of other packages by name."""
    return {point.name: point for point in entry_points(group="reasonkv.methods") if point.name not in CATALOGUE}


def method_names() -> list[str]:
    """Return the names of the built-in methods, then of those that installed packages add."""
    return [*CATALOGUE, *sorted(installed())]


def known_name(name: str) -> str:
    """Return the name a method is registered under; "SnapKV", "snap_kv" and the class's name are understood.

    Raises:
        MethodError: no such method; the message names the nearest.
    """
    spellings = {_plain(entry.path.split(":")[1]): known for known, entry in CATALOGUE.items()}
    names = list(CATALOGUE)
    if _plain(name) not in spellings | {_plain(known): known for known in names}:
        names = method_names()  # looking for other packages takes a while
    found = (spellings | {_plain(known): known for known in names}).get(_plain(name))
    if found is None:
        raise MethodError(unknown("method", name, names))
    return found


def unknown(kind: str, name: str, known: list[str]) -> str:
    """Return the sentence for a name that does not exist, with the nearest one that does."""
    nearest = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    options = f"Known: {', '.join(known)}." if known else "It takes none."
    return f"Unknown {kind} {name!r}{hint} {options}"


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
