"""Generated reasoning problems with answer checkers: `get_task("program:lines=48")`."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from .arithmetic import Arithmetic
from .base import Draft, Draw, Kind, Problem, Task, TaskError, split_of
from .longdoc import LongDoc
from .program import Program
from .recall import Recall
from .search import Search

__all__ = ["Draft", "Draw", "Kind", "Problem", "Task", "TaskError", "get_task", "split_of", "task_names"]

_FAMILIES: dict[str, type[Task]] = {family.name: family for family in (Program, Search, Arithmetic, Recall, LongDoc)}


def task_names() -> list[str]:
    """Return the names that `get_task` accepts, in the order they are shown."""
    return list(_FAMILIES)


def get_task(spec: str) -> Task:
    """Return the task for `name` or `name:dial=value,dial=value`.

    Raises `TaskError` (one sentence) for an unknown task or dial and for a value out of range.
    """
    name, _, options = spec.partition(":")
    if name not in _FAMILIES:
        near = difflib.get_close_matches(name, _FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TaskError(f"There is no task {name!r}{hint}; the tasks are {', '.join(_FAMILIES)}.")
    dials = {one.name: one for one in fields(_FAMILIES[name])}
    chosen: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key not in dials:
            raise TaskError(f"Task {name!r} has no dial {key!r}; its dials are {', '.join(dials)}.")
        if not equals:
            raise TaskError(f"Dial {key!r} of task {name!r} needs a value, as in {key}=VALUE.")
        if key in chosen:
            raise TaskError(f"Dial {key!r} of task {name!r} is given twice.")
        # No dial takes ten digits, and Python refuses to convert thousands of them.
        is_number = "range" in dials[key].metadata and value.isascii() and value.isdigit() and len(value) < 10
        chosen[key] = int(value) if is_number else value
    return _FAMILIES[name](**chosen)
