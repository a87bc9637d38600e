"""Rows of data: from files, from hub datasets, or from a folder that stands in for the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from reasonkv.tasks.base import TaskError

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of a .jsonl, .json, .csv or .parquet file, and a sentence for each line that cannot be read.

    Raises:
        TaskError: the file cannot be read at all.
    """
    if not path.is_file():
        raise TaskError(f"There is no file {path}.")
    try:
        if path.suffix == ".jsonl":
            return _read_lines(path)
        if path.suffix == ".json":
            found = from_json(path.read_bytes())
            lists = [found, *(found.values() if isinstance(found, dict) else ())]
            rows = next((one for one in lists if isinstance(one, list)), [])
            return [row for row in rows if isinstance(row, dict)], []
        import pandas

        frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        return [{str(key): _plain(value) for key, value in row.items()} for row in rows], []
    except ImportError:
        raise TaskError(f'Reading {path.suffix} files needs pandas; run pip install "reasonkv[eval]".') from None
    except Exception as error:  # pandas and pyarrow raise what they like
        raise TaskError(f"{path} cannot be read as {path.suffix} ({' '.join(str(error).split())[:200]}).") from None


def hub_rows(
    dataset: str, config: str | None, split: str, revision: str | None, data_dir: Path | None, names: Sequence[str]
) -> tuple[Sequence[Row], list[str]]:
    """Return the rows of a hub dataset; from `data_dir`, if given, which holds NAME.jsonl, .json, .csv or .parquet.

    `names` are what NAME may be, the best first.

    Raises:
        TaskError: neither the folder nor the hub has it.
    """
    if data_dir is not None:
        folder = data_dir.expanduser()
        files = [folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            return read_rows(found)
        suffixes = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise TaskError(f"{folder} has no file {names[0]}{suffixes} with rows of {dataset}.")
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            f'{names[0]} is read from the hub by the package datasets; run pip install "reasonkv[tasks]", or give '
            f"--data-dir with a file {names[0]}.jsonl."
        ) from None
    try:
        return list(load_dataset(dataset, config, split=split, revision=revision)), []
    except Exception as error:  # the library raises whatever the network or the repository's files bring about
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise TaskError(
            f"The dataset {dataset} cannot be had from the hub ({first[:160]}); for work offline give --data-dir with "
            f"a file {names[0]}.jsonl."
        ) from None


def _read_lines(path: Path) -> tuple[list[Row], list[str]]:
    rows, skipped = list[Row](), list[str]()
    for number, line in enumerate(path.open("rb"), 1):
        if not line.strip():
            continue
        try:
            row = from_json(line.decode(errors="replace"))
        except ValueError as error:
            skipped.append(f"line {number} is no JSON ({error})")
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            skipped.append(f"line {number} is no JSON object")
    return rows, skipped


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
