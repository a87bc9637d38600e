"""Named benchmarks and hub datasets: each benchmark is a small YAML file beside this one (`standard/NAME.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from reasonkv.tasks.base import Draw, TaskError
from reasonkv.tasks.data import SUFFIXES, DataTask, Row, data_task, read_rows
from reasonkv.tasks.options import TaskOptions

_FOLDER = Path(__file__).parent / "standard"


@cache
def standard_tasks() -> dict[str, dict[str, Any]]:
    """Return the declarations of all named benchmarks by name."""
    import yaml

    return {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))}


def standard_task(name: str, options: TaskOptions) -> DataTask:
    """Make a named benchmark; what `options` set replaces what its file says.

    Raises:
        TaskError: its data cannot be had.

    """
    declared = standard_tasks()[name]
    rows, skipped = dataset_rows(
        declared["dataset"], declared.get("config"), declared["split"], declared.get("revision"), options.data_dir, name
    )
    if "shuffle_choices" in declared:
        rows = [_with_choices(row, declared["shuffle_choices"], number) for number, row in enumerate(rows)]
    given = {key: getattr(options, key) or declared[key] for key in ("prompt", "answer", "grade")}
    return data_task(name, rows, replace(options, **given), skipped)


def dataset_rows(
    dataset: str, config: str | None, split: str, revision: str | None, data_dir: Path | None, name: str
) -> tuple[Sequence[Row], list[str]]:
    """Return the rows of a hub dataset, from `data_dir` if it holds a file for it.

    Args:
        dataset: its name on the hub.
        config: its configuration, or None.
        split: its split.
        revision: of the repository, or None for the newest.
        data_dir: folder that may hold NAME.jsonl, .json, .csv or .parquet.
        name: NAME; the last part of the dataset's name is looked for, too.

    Raises:
        TaskError: neither the folder nor the hub has it.

    """
    if data_dir is not None:
        folder = data_dir.expanduser()
        for stem in (name, dataset.rpartition("/")[2]):
            for suffix in SUFFIXES:
                if (folder / f"{stem}{suffix}").is_file():
                    return read_rows(folder / f"{stem}{suffix}")
        raise TaskError(f"{folder} has no file {name}{SUFFIXES[0]}, {', '.join(SUFFIXES[1:-1])} or {SUFFIXES[-1]}.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            f'{name} is read from the hub by the package datasets; run pip install "reasonkv[tasks]", or give '
            f"--data-dir with a file {name}.jsonl."
        ) from None
    try:
        return list(load_dataset(dataset, config, split=split, revision=revision)), []
    except Exception as error:  # the library raises whatever the network or the repository's files bring about
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TaskError(
            f"The dataset {dataset} cannot be had from the hub ({first[:160]}); for work offline give --data-dir with "
            f"a file {name}.jsonl."
        ) from None


def hub_task(spec: str, options: TaskOptions, given: Mapping[str, str]) -> DataTask:
    """Make the task of `hub:OWNER/NAME,config=...,split=test,revision=...`.

    Raises:
        TaskError: an unknown option, or its data cannot be had.

    """
    unknown = sorted(set(given) - {"config", "split", "revision"})
    if unknown:
        raise TaskError(f"A hub dataset takes config, split and revision, not {unknown[0]}.")
    dataset = spec.partition(":")[2].partition(",")[0].strip()
    name = dataset.rpartition("/")[2]
    rows, skipped = dataset_rows(
        dataset, given.get("config"), given.get("split", "test"), given.get("revision"), options.data_dir, name
    )
    return data_task(spec, rows, options, skipped)


def _with_choices(row: Row, fields: Mapping[str, Any], number: int) -> Row:
    """Return the row with `choices` in an order drawn from its number, and `choice`, the right one's letter."""
    texts = [row[fields["right"]], *(row[name] for name in fields["wrong"])]
    order = Draw(f"choices/{number}").sample(range(len(texts)), len(texts))
    return {**row, "choices": [str(texts[at]).strip() for at in order], "choice": "ABCDEFGHIJ"[order.index(0)]}
