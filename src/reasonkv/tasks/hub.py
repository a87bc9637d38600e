"""Tasks with a declaration: named benchmarks (`standard/NAME.yaml`), YAML files of users, and hub datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from reasonkv.tasks.base import Draw, TaskError
from reasonkv.tasks.data import DataTask, data_task
from reasonkv.tasks.declaration import Choices, Declaration
from reasonkv.tasks.options import TaskOptions
from reasonkv.tasks.rows import SUFFIXES, Row, dataset_rows, read_rows

_FOLDER = Path(__file__).parent / "standard"


@cache
def standard_tasks() -> Mapping[str, Declaration]:
    """Return the declarations of all named benchmarks by name."""
    return {path.stem: Declaration.from_file(path) for path in sorted(_FOLDER.glob("*.yaml"))}


def declaration_of(spec: str) -> Declaration | None:
    """Return the declaration of a task by its name or YAML file; None for families, files of rows and generators.

    Raises:
        TaskError: the file cannot be read, or there is no such subset.

    """
    if spec.endswith((".yaml", ".yml")):
        return Declaration.from_file(Path(spec).expanduser())
    name, _, rest = spec.partition(":")
    subset = rest.partition(",")[0]
    return standard_tasks()[name].subset("" if "=" in subset else subset) if name in standard_tasks() else None


def standard_task(name: str, options: TaskOptions, subset: str = "", length: str | None = None) -> DataTask:
    """Make a named benchmark; what `options` set replaces what its file says.

    Args:
        name: the benchmark.
        options: of the run.
        subset: one of its subsets, where it has some.
        length: tokens that longer prompts are cut to, in the middle.

    Raises:
        TaskError: its data cannot be had.

    """
    spec = ":".join(filter(None, (name, subset)))
    declared = standard_tasks()[name].subset(subset)
    if length is not None:
        if not (length.isascii() and length.isdigit() and len(length) < 10):
            raise TaskError(f"length of {spec} must be a whole number of tokens, not {length!r}.")
        declared, spec = replace(declared, length=int(length)), f"{spec},length={length}"
    return _declared_task(spec, declared, options, subset or name)


def yaml_task(path: Path, options: TaskOptions) -> DataTask:
    """Make the task that a YAML file declares; a dataset that is a file of rows is looked for beside it.

    Raises:
        TaskError: the file or its data cannot be read.

    """
    declared = Declaration.from_file(path)
    if declared.dataset is None:
        raise TaskError(f"{path} names no dataset; give a hub dataset, or a file such as questions.jsonl.")
    return _declared_task(str(path), declared, options, path.stem, path.parent)


def hub_task(spec: str, options: TaskOptions, given: Mapping[str, str]) -> DataTask:
    """Make the task of `hub:OWNER/NAME,config=...,split=test,revision=...`.

    Raises:
        TaskError: an unknown option, or its data cannot be had.

    """
    unknown = sorted(set(given) - {"config", "split", "revision"})
    if unknown:
        raise TaskError(f"A hub dataset takes config, split and revision, not {unknown[0]}.")
    dataset = spec.partition(":")[2].partition(",")[0].strip()
    declared = Declaration(
        dataset=dataset, config=given.get("config"), split=given.get("split", "test"), revision=given.get("revision")
    )
    return _declared_task(spec, declared, options, dataset.rpartition("/")[2])


def _declared_task(
    spec: str, declared: Declaration, options: TaskOptions, name: str, beside: Path | None = None
) -> DataTask:
    declared = declared.filled(options)
    rows, skipped = _rows(declared, declared.split, options, name, beside)
    if declared.shuffle_choices is not None:
        rows = [_with_choices(row, declared.shuffle_choices, number) for number, row in enumerate(rows)]
    shots: Sequence[Row] = ()
    if declared.shots and options.shots_from is None and declared.shots_from is not None:
        shots, _ = _rows(declared, declared.shots_from, options, f"{name}_{declared.shots_from}", beside)
    return data_task(spec, rows, options, skipped, declared, shots)


def _rows(
    declared: Declaration, split: str, options: TaskOptions, name: str, beside: Path | None
) -> tuple[Sequence[Row], list[str]]:
    assert declared.dataset is not None
    rows: Sequence[Row]
    if beside is not None and declared.dataset.endswith(SUFFIXES):
        own = declared.dataset if split == declared.split else split  # examples come from a file of their own
        rows, skipped = read_rows(beside / own)
    else:
        names = [name] if split != declared.split else [name, declared.dataset.rpartition("/")[2]]
        rows, skipped = dataset_rows(
            declared.dataset, declared.config, split, declared.revision, options.data_dir, names
        )  # fmt: skip
    if not declared.rename:
        return rows, skipped
    return [{declared.rename.get(key, key): value for key, value in row.items()} for row in rows], skipped


def _with_choices(row: Row, fields: Choices, number: int) -> Row:
    """Return the row with `choices` in an order drawn from its number, and `choice`, the right one's letter."""
    names = [fields["right"], *fields["wrong"]]
    missing = next((name for name in names if name not in row), None)
    if missing is not None:
        raise TaskError(f"A row of the data has no field {missing!r}; its fields are {', '.join(map(str, row))}.")
    texts = [row[name] for name in names]
    order = Draw(f"choices/{number}").sample(range(len(texts)), len(texts))
    return {**row, "choices": [str(texts[at]).strip() for at in order], "choice": "ABCDEFGHIJ"[order.index(0)]}
