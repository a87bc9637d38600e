"""Tasks with a declaration: named benchmarks (`standard/NAME.yaml`), YAML files of users, and hub datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from reasonkv.tasks.base import Draw, TaskError
from reasonkv.tasks.data import DataTask, data_task
from reasonkv.tasks.declaration import Choices, Declaration, standard_tasks
from reasonkv.tasks.options import TaskOptions
from reasonkv.tasks.rows import SUFFIXES, Row, hub_rows, read_rows


def standard_task(
    name: str, options: TaskOptions, subset: str = "", given: Mapping[str, str] | None = None
) -> DataTask:
    """Make a named benchmark or one of its subsets; what `options` set replaces what its file says.

    `given` may hold `length`, the tokens that longer prompts are cut to, in the middle.

    Raises:
        TaskError: an unknown option, or its data cannot be had.
    """
    spec, text = ":".join(filter(None, (name, subset))), (given or {}).get("length")
    for key in given or ():
        if key != "length":
            raise TaskError(f"The benchmark {name} takes the option length=TOKENS, not {key}.")
    declared = standard_tasks()[name].subset(subset)
    if text is not None:
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise TaskError(f"length of {spec} must be a whole number of tokens, not {text!r}.")
        declared, spec = replace(declared, length=int(text)), f"{spec},length={text}"
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
    declared = replace(Declaration(dataset=dataset), **given)  # type: ignore[arg-type]
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
    """Return the rows of a split, and what of them cannot be read."""
    rows: Sequence[Row]
    dataset = str(declared.dataset)
    is_own = split == declared.split
    if beside is not None and dataset.endswith(SUFFIXES):
        rows, skipped = read_rows(beside / (dataset if is_own else split))  # examples come from a file of their own
    else:
        names = [name, dataset.rpartition("/")[2]] if is_own else [name]
        rows, skipped = hub_rows(dataset, declared.config, split, declared.revision, options.data_dir, names)
    new = declared.rename
    return [{new.get(key, key): value for key, value in row.items()} for row in rows] if new else rows, skipped


def _with_choices(row: Row, fields: Choices, number: int) -> Row:
    """Return the row with `choices` in an order drawn from its number, and `choice`, the right one's letter."""
    names = [fields["right"], *fields["wrong"]]
    for name in names:
        if name not in row:
            raise TaskError(f"A row of the data has no field {name!r}; its fields are {', '.join(map(str, row))}.")
    order = Draw(f"choices/{number}").sample(range(len(names)), len(names))
    texts = [str(row[names[at]]).strip() for at in order]
    return {**row, "choices": texts, "choice": "ABCDEFGHIJ"[order.index(0)]}
