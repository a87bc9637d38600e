"""Reading a results folder back, whichever command wrote it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonkv.evaluate.answers import AnswerRecord, read_answers
from reasonkv.evaluate.manifest import MANIFEST, ResultsError
from reasonkv.evaluate.records import RECORDS, Record, read_records, whole_lines


@dataclass(frozen=True)
class Results:
    """A results folder's content.

    Args:
        folder: the folder.
        manifest: its manifest, as written.
        records: what a replay wrote.
        answers: what an evaluation wrote; one of the two lists is empty.
    """

    folder: Path
    manifest: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    answers: list[AnswerRecord] = field(default_factory=list)


def load_results(folder: Path) -> Results:
    """Read a results folder; one that is still being written gives what is there.

    Raises:
        ResultsError: the folder holds no results, or its manifest is damaged.
        RecordError: a record is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ResultsError(f"There is no results folder {folder}; make one with `reasonkv replay` or `evaluate`.")
    if not (folder / MANIFEST).is_file():
        raise ResultsError(f"{folder} holds no results: it has no {MANIFEST}.")
    manifest = _manifest(folder / MANIFEST)
    lines = whole_lines(folder / RECORDS)
    if not lines:
        raise ResultsError(f"{folder} holds no results yet; run the command that made it again.")
    if _holds_answers(lines[0], str(manifest["command"])):
        return Results(folder, manifest, answers=read_answers(folder / RECORDS))
    return Results(folder, manifest, records=read_records(folder / RECORDS))


def _manifest(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        data = None
    if not isinstance(data, dict) or "command" not in data:
        raise ResultsError(f"{path} cannot be read as a manifest; run the command in another --out folder.")
    return data


def _holds_answers(line: bytes, command: str) -> bool:
    """What the first line is; where it is damaged, what the command writes, so that the error names its line."""
    try:
        data = json.loads(line)
    except ValueError:
        return command == "evaluate"
    return isinstance(data, dict) and "correct" in data and "top1" not in data
