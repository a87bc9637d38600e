"""Result records: one JSON line per (method, budget, task, example), appended so that a kill loses at most one line.

A line is written with one `write` to a file opened for appending, then flushed to the disk. What a kill can leave
behind is a last line without its newline; `repair` cuts it off, and the rerun writes that record again. Any other line
that does not parse is damage, and is reported with its number rather than skipped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from reasonkv.errors import ReasonKVError

RECORDS = "records.jsonl"
D = TypeVar("D")
L = TypeVar("L", bound="Line")


class RecordError(ReasonKVError, ValueError):
    """A line of a record file that cannot be read; the message names the file and the line."""


class Line(Protocol):
    """What the file handling here needs of a record."""

    @property
    def key(self) -> str:
        """What no two records of a folder share."""
        ...

    def to_json(self) -> str:
        """One line, without its newline."""
        ...

    @classmethod
    def from_json(cls: type[L], line: str) -> L:
        """The inverse of `to_json`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What records of every kind say: what ran on which problem, and what its cache held and read.

    Token counts are tokens, physical lengths are slots per KV head (mean over full-attention layers and heads), sizes
    are bytes of this row alone.

    Args:
        run: identifier of the command and arguments that wrote it (`Manifest.run`).
        method: the method's name.
        options: every option of the method.
        budget: every field of the budget, or None for full KV.
        task: the task, with the dials that were given.
        example: number of the problem; also the row seed of methods that draw random numbers.
        seed: the run's seed.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens that were predicted or written, the end-of-sequence token included.
        physical_mean: slots attended per token fed after the prompt (0 when the output is one token).
        physical_peak: most slots held at once, prompt included.
        physical_terminal: slots held at the end.
        saved_ratio_terminal: 1 - physical_terminal / tokens fed.
        bytes_held: bytes held at the end, method state included.
        bytes_peak: most bytes held at once.
        bytes_full: bytes full KV would hold at the end.
        events: compactions.
        tokens_dropped: tokens whose slots were given up.
        guards: how often a method fell back on a rule of its own, by name.
        seconds: wall-clock seconds of the batch divided by its rows.
        slots_read_mean: slots attended per token fed after the prompt, of methods that keep all and select, or that
            hold padding which nothing attends to; else None.
        bytes_read_mean: bytes of their keys and values, and of the page summaries read to choose; None as above.
    """

    run: str
    method: str
    options: dict[str, Any]
    budget: dict[str, Any] | None
    task: str
    example: int
    seed: int
    prompt_tokens: int
    output_tokens: int
    physical_mean: float
    physical_peak: float
    physical_terminal: float
    saved_ratio_terminal: float
    bytes_held: int
    bytes_peak: int
    bytes_full: int
    events: int
    tokens_dropped: int
    guards: dict[str, int] = field(default_factory=dict)
    seconds: float
    slots_read_mean: float | None = None
    bytes_read_mean: float | None = None

    @property
    def selects(self) -> bool:
        """The method held everything and read a part of it. What holds padding has dropped something first."""
        return self.slots_read_mean is not None and self.events == 0

    def to_json(self) -> str:
        """One line, without its newline.

        Raises:
            ValueError: a metric is not a finite number.
        """
        return json.dumps(asdict(self), allow_nan=False)


@dataclass(frozen=True, kw_only=True)
class Record(Measured):
    """What replaying one trace through one bounded cache gave. All means run over the trace's output tokens.

    Args:
        trace_correct: whether the trace, as full KV wrote it, gives the right answer.
        top1: share of output tokens where the most likely token is the full-KV model's.
        top5: share where the full-KV model's most likely token is among the five most likely.
        nll: mean negative log-likelihood of the trace's token, nats.
        kl: mean KL divergence from the full-KV model's top-k tokens (and one bucket for the rest), nats.
        first_mismatch: index of the first output token that counts against `top1`, or None.
        answer_top1: `top1` of the answer's tokens alone, those after `</think>`; None where a trace has no such part.
        diagnostics: measures of what was lost, by name (`reasonkv.evaluate.diagnostics`); empty unless asked for.
    """

    trace_correct: bool
    top1: float
    top5: float
    nll: float
    kl: float
    first_mismatch: int | None
    answer_top1: float | None = None
    diagnostics: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes a record the one it is; no two records of a folder share it."""
        return record_key(self.method, self.options, self.budget, self.task, self.example, self.seed)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The inverse of `to_json`; fields this version does not know are ignored.

        Raises:
            ValueError: not JSON, not an object, or a field is missing or of the wrong kind.
        """
        return parse_line(
            cls,
            line,
            whole=("example", "seed", "prompt_tokens", "output_tokens"),
            numbers=("top1", "top5", "nll", "kl", "physical_mean", "bytes_held", "bytes_full"),
        )


def record_key(
    method: str, options: dict[str, Any], budget: dict[str, Any] | None, task: str, example: int, seed: int
) -> str:
    """The key of a record, as canonical JSON."""
    return json.dumps([method, options, budget, task, example, seed], sort_keys=True)


def parse_line(kind: type[D], line: str, *, whole: Sequence[str], numbers: Sequence[str]) -> D:
    """One line as a dataclass; fields it does not know are ignored, and those with a default may be missing.

    Args:
        kind: the dataclass.
        line: JSON.
        whole: fields that must be whole numbers.
        numbers: fields that must be numbers.

    Raises:
        ValueError: not JSON, not an object, or a field is missing or of the wrong kind.
    """
    data = json.loads(line)
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    known = {f.name for f in fields(cast(Any, kind))}
    optional = {f.name for f in fields(cast(Any, kind)) if f.default is not MISSING or f.default_factory is not MISSING}
    missing = sorted(known - optional - set(data))
    if missing:
        raise ValueError(f"it has no field {missing[0]!r}")
    for name in whole:
        if not isinstance(data[name], int):
            raise ValueError(f"field {name!r} is not a whole number")
    for name in numbers:
        if not isinstance(data[name], (int, float)):
            raise ValueError(f"field {name!r} is not a number")
    return kind(**{name: value for name, value in data.items() if name in known})


def append_records(path: Path, records: Iterable[Line]) -> None:
    """Append records of any kind, each with one write, and flush them to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        for record in records:
            line = (record.to_json() + "\n").encode()
            written = os.write(descriptor, line)
            if written != len(line):  # a full disk: the torn line is cut off by the next run
                raise OSError(f"only {written} of {len(line)} bytes could be written to {path}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def repair(path: Path) -> bool:
    """Cut off a last line that a kill left without its newline.

    Returns:
        Whether there was one.
    """
    if not path.exists():
        return False
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return False
    with path.open("r+b") as file:
        file.truncate(whole)
        os.fsync(file.fileno())
    return True


def read_records(path: Path) -> list[Record]:
    """Every record of a replay, in order; a torn last line is left out, and so is what a missing file would hold.

    Raises:
        RecordError: a line is damaged, or two lines are the same record.
    """
    return read_lines(path, Record)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a record file that end with a newline, without it; none where there is no file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]


def read_lines(path: Path, kind: type[L]) -> list[L]:
    """Every record of a file as one kind, in order, without a torn last line.

    Args:
        path: the file; a missing one holds nothing.
        kind: `Record`, `AnswerRecord`, or another class with `key` and `from_json`.

    Raises:
        RecordError: a line is damaged, or two lines are the same record.
    """
    records: list[L] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            record = kind.from_json(line.decode())
        except (ValueError, TypeError) as error:
            reason = "it is not JSON" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else str(error)
            raise RecordError(
                f"{path}, line {number}: the record cannot be read because {reason}; "
                f"delete that line and run the command again to write it anew."
            ) from None
        if record.key in seen:
            raise RecordError(
                f"{path}, line {number}: the record repeats line {seen[record.key]}; delete one of the two."
            )
        seen[record.key] = number
        records.append(record)
    return records
