"""Tasks: problems with a grader, from generators, files, hub datasets and packages: `get_task("program:lines=48")`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from .base import Draft, Draw, GeneratedTask, Grade, Kind, Problem, Task, TaskError, split_of
from .longdoc import LongDoc
from .options import TaskOptions
from .programs import Arithmetic, Program, Recall
from .search import Search

__all__ = [
    "Draft", "Draw", "GeneratedTask", "Grade", "Kind", "Problem", "Task", "TaskError", "TaskOptions", "get_task",
    "split_of", "task_catalogue", "task_names",
]  # fmt: skip

_FAMILIES: dict[str, type[GeneratedTask]] = {
    family.name: family for family in (Program, Search, Arithmetic, Recall, LongDoc)
}
_GROUP = "reasonkv.tasks"
_FORMS = {
    "FILE.jsonl": "rows of a .jsonl, .json, .csv or .parquet file (--prompt, --answer, --grade)",
    "FILE.yaml": "a file that names dataset, prompt, answer, grader and more, as the benchmarks below do",
    "hub:OWNER/NAME": "a dataset of the hub: config=..., split=test, revision=...",
    "gym:NAME": "a generator of reasoning-gym: per_prompt=4 puts several problems into one prompt",
    "niah": "one fact in a long text: length=4096, depth=50",
    "ruler:KIND": "RULER's tasks: length=4096, needles=4",
}


def task_names() -> list[str]:
    """Return the names of the bundled families, in the order they are shown."""
    return list(_FAMILIES)


def task_catalogue() -> dict[str, str]:
    """Return every form and name that `get_task` accepts with one line about it."""
    from .declaration import standard_tasks

    families = {name: str(one.__doc__).splitlines()[0].partition(": ")[2] for name, one in _FAMILIES.items()}
    named = {
        f"{name}:SET" if one.subsets else name: ": ".join(filter(None, (one.title, ", ".join(one.subsets))))
        for name, one in standard_tasks().items()
    }
    return families | _FORMS | named | {point.name: point.value for point in entry_points(group=_GROUP)}


def get_task(spec: str, options: TaskOptions | None = None) -> Task:
    """Return the task for `NAME` or `NAME:key=value,key=value`.

    Args:
        spec: a bundled family (`program:lines=48`), a file (`questions.jsonl`, `mine.yaml`), `hub:OWNER/NAME`,
            `gym:NAME`, `niah`, `ruler:KIND`, a named benchmark (`gsm8k`, `longbench:qasper,length=8000`), or a name of
            the entry-point group `reasonkv.tasks`.
        options: how data becomes prompts and how outputs are graded; the bundled families have none.

    Raises:
        TaskError: one sentence.
    """
    options = options or TaskOptions()
    name, _, rest = spec.partition(":")
    if name in _FAMILIES:
        return _family(name, rest)
    from . import data, declaration, given, gym, hub, needle, rows

    if name == "traces":
        return given.given_traces(rest, options)
    if spec.endswith((".yaml", ".yml")):
        return hub.yaml_task(Path(spec).expanduser(), options)
    if spec.endswith(rows.SUFFIXES):
        found, skipped = rows.read_rows(Path(spec).expanduser())
        return data.data_task(spec, found, options, skipped)
    benchmarks, installed = declaration.standard_tasks(), {one.name: one for one in entry_points(group=_GROUP)}
    parts = [part.strip() for part in rest.split(",")]
    has_subsets = name in {"hub", "gym", "ruler"} or name in benchmarks
    subset = parts.pop(0) if has_subsets and "=" not in parts[0] else ""
    chosen: dict[str, str] = {}
    for option in filter(None, parts):
        key, equals, value = option.partition("=")
        if not equals:
            raise TaskError(f"Write options of the task {name} as key=value, not {option!r}.")
        chosen[key] = value
    needles = partial(needle.needle_task, spec, chosen, options.think_end)
    makers: dict[str, Callable[[], Task]] = {
        "hub": partial(hub.hub_task, spec, options, chosen),
        "gym": partial(gym.gym_task, spec, chosen, options.think_end),
        "niah": needles,
        "ruler": needles,
        **{one: partial(hub.standard_task, one, options, subset, chosen) for one in benchmarks},
        **{one: partial(_installed, point, options, chosen) for one, point in installed.items()},
    }
    if name in makers:
        return makers[name]()
    near = difflib.get_close_matches(name, [*_FAMILIES, *makers], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = f"{', '.join(_FAMILIES)}, a file such as questions.jsonl, and those of `reasonkv tasks`"
    raise TaskError(f"There is no task {name!r}{hint}; the tasks are {listed}.")


def _installed(point: Any, options: TaskOptions, given: dict[str, str]) -> Task:
    made = point.load()(options, **given)
    if not isinstance(made, Task):
        raise TaskError(f"The entry point {point.name!r} does not make a reasonkv Task.")
    return made


def _family(name: str, options: str) -> GeneratedTask:
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
