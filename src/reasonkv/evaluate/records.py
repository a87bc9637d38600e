"""Result records: JSON lines, appended so that a kill loses at most one line.

A line is written with one `write` to a file opened for appending, then flushed to the disk. What a kill can leave
behind is a last line without its newline; `RecordFile` cuts it off, and the rerun writes that record again. Any other
line that does not parse is damage, and is reported with its number rather than skipped.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from reasonkv.budget import Budget
from reasonkv.errors import ReasonKVError
from reasonkv.files import NO_LINKS, finite
from reasonkv.inputs import Amount, Count, Number, Share, Whole, reason

if TYPE_CHECKING:
    from reasonkv.tasks import Problem

RECORDS = "records.jsonl"
R = TypeVar("R", bound="JsonlRecord")
Options = dict[str, bool | Whole | Number | str | list[bool | Whole | Number | str] | None]
Budgeted = Annotated[dict[str, Any], AfterValidator(lambda fields: Budget.from_dict(fields).to_dict())]
"""Every field of a budget that can be carried out."""
Counts = dict[str, Count]
Tokens = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]  # of a server's words, their checksums


class RecordError(ReasonKVError, ValueError):
    """A line of a record file that cannot be read; the message names the file and the line."""


class JsonlRecord(BaseModel):
    """One line of a results file; unknown fields are ignored, so that later versions' files can be read."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)
    KEY: ClassVar[tuple[str, ...]]
    """Fields that together no two records of a file share."""

    @property
    def key(self) -> str:
        """What makes a record the one it is."""
        return record_key(*(getattr(self, name) for name in self.KEY))


class Measured(JsonlRecord):
    """What records of every kind say: what ran on which problem, and what its cache held and read.

    Token counts are tokens, physical lengths are slots per KV head (mean over full-attention layers and heads), sizes
    are bytes of this sequence alone.
    """

    run: str  # identifier of the command and arguments that wrote it (`Manifest.run`)
    method: str
    options: Options  # every option of the method
    budget: Budgeted | None  # every field of the budget, or None for full KV
    task: str  # the task, with the dials that were given
    example: Count  # number of the problem; also the row seed of methods that draw random numbers
    seed: Whole
    prompt_tokens: Tokens
    output_tokens: Tokens  # tokens that were predicted or written, the end-of-sequence token included
    physical_mean: Amount  # slots attended per token fed after the prompt (0 when the output is one token)
    physical_peak: Amount  # most slots held at once, prompt included
    physical_terminal: Amount  # slots held at the end
    saved_ratio_terminal: Number  # 1 - physical_terminal / tokens fed
    bytes_held: Count  # bytes held at the end, method state included
    bytes_peak: Count  # most bytes held at once
    bytes_full: Count  # bytes full KV would hold at the end
    events: Tokens  # compactions
    tokens_dropped: Count  # tokens evicted or merged
    guards: Counts = Field(default_factory=dict)  # how often a method used a fallback rule, by the rule's name
    seconds: Amount  # wall-clock seconds of the batch divided by its sequences
    # slots attended per token fed after the prompt, of methods that keep all and select, or that hold padding which
    # nothing attends to; else None
    slots_read_mean: Amount | None = None
    # bytes of their keys and values, and of the page summaries read to choose; None as above
    bytes_read_mean: Amount | None = None

    @property
    def selects(self) -> bool:
        """Whether the method kept everything and read a part of it; what holds padding has evicted something first."""
        return self.slots_read_mean is not None and self.events == 0


class ReplayRecord(Measured):
    """What replaying one trace through one cache gave. All means run over the trace's output tokens."""

    KEY = ("method", "options", "budget", "task", "example", "seed")
    # whether the trace, as full KV wrote it, gives the right answer; None of traces from elsewhere
    trace_correct: bool | None
    top1: Share  # share of output tokens where the most likely token is the full-KV model's
    top5: Share  # share where the full-KV model's most likely token is among the five most likely
    nll: Number  # mean negative log-likelihood of the trace's token, nats
    kl: Number  # mean KL divergence from the full-KV model's top-k tokens (and one bucket for the rest), nats
    first_mismatch: Count | None  # index of the first output token that counts against `top1`, or None
    # `top1` of the answer's tokens alone, those after `</think>`; None where a trace has no such part
    answer_top1: Share | None = None
    # measures of what was lost, by name (`reasonkv.evaluate.diagnostics`); empty unless asked for
    diagnostics: dict[str, Number] = Field(default_factory=dict)


class AnswerRecord(Measured):
    """What generating one answer through one cache gave; all up to the sequence's own end."""

    KEY = ("method", "options", "budget", "task", "example", "sample", "seed")
    sample: Count  # number of the sample of that problem, from 0; greedy decoding has 0 only
    correct: bool  # whether the task's checker accepts the output
    truncated: bool  # whether the output met the limit on its length before it ended
    repetition: Share  # share of output tokens that lie in a loop (`generate.repetition`), 0 to 1
    # index of the first output token that differs from full KV's output of the same example and sample (an output that
    # stops earlier differs where it stops), or None if the two are equal
    first_divergence: Count | None
    output: str  # decoded, special tokens skipped
    score: Share | None = None  # from 0 to 1; None in records that know right and wrong alone
    extracted: str | None = None  # the answer that was read, or None where none could be read
    grader_error: str | None = None  # why the grader failed, or None
    # tokens up to the end of thinking; all where it never ends, 0 where there is none
    thinking_tokens: Count | None = None


class FullOutput(JsonlRecord):
    """Full KV's output for one sample of one example, which the other methods' outputs are compared with."""

    KEY = ("example", "sample")
    example: Count
    sample: Count
    prompt_tokens: Tokens
    tokens: list[TokenId] = Field(min_length=1)  # ids, the end-of-sequence token included


@dataclass(frozen=True)
class AnswerItem:
    """One answer to write."""

    problem: Problem
    prompt_P: Any  # token ids of the prompt; a server takes the fields of its request that hold it
    opened: bool = False  # whether the prompt ends with thinking under way
    sample: int = 0

    @property
    def example(self) -> int:
        """Number of the problem."""
        return self.problem.example

    @property
    def output_key(self) -> str:
        """Key of full KV's output."""
        return record_key(self.example, self.sample)


class RecordFile(Generic[R]):
    """A record file that is being written; a last line that a kill tore is cut off first.

    Args:
        path: the file, which need not exist.

    Raises:
        RecordError: a line is damaged, or two lines are the same record.
    """

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path = path
        repair(path)
        self.records: dict[str, R] = {record.key: record for record in read_lines(path, kind)}

    def append(self, records: Iterable[R]) -> None:
        """Write the records that are not there yet."""
        new = {record.key: record for record in records if record.key not in self.records}
        append_records(self.path, new.values())
        self.records.update(new)


def record_key(*values: Any) -> str:
    """Return the key of a record from the values of its `KEY` fields, as canonical JSON."""
    return json.dumps(values, sort_keys=True)


def append_records(path: Path, records: Iterable[JsonlRecord]) -> None:
    """Append records of any kind, each with one write, and flush them to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINKS, 0o644)
    try:
        for record in records:
            line = (record.model_dump_json() + "\n").encode()
            written = os.write(descriptor, line)
            if written != len(line):  # a full disk: the torn line is cut off by the next run
                raise OSError(f"only {written} of {len(line)} bytes could be written to {path}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def repair(path: Path) -> bool:
    """Cut off a last line that a kill left without its newline; return whether there was one."""
    data = finite(path).read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return False
    descriptor = os.open(path, os.O_WRONLY | NO_LINKS)
    try:
        os.ftruncate(descriptor, whole)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a record file (or of a `.gz` of one) that end with a newline; none where there is no file."""
    data = finite(path).read_bytes() if path.exists() else b""
    try:
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error):
        raise RecordError(f"{path} cannot be unpacked; delete it and run its command again.") from None
    return data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]


def read_lines(path: Path, kind: type[R]) -> list[R]:
    """Return every record of a file as one kind, in order, without a torn last line.

    Raises:
        RecordError: a line is damaged, or two lines are the same record.
    """
    records: list[R] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            record = kind.model_validate_json(line)
        except ValidationError as error:
            raise RecordError(
                f"{path}, line {number}: the record cannot be read because {reason(error)}; "
                f"delete that line and run the command again to write it anew."
            ) from None
        if record.key in seen:
            raise RecordError(
                f"{path}, line {number}: the record repeats line {seen[record.key]}; delete one of the two."
            )
        seen[record.key] = number
        records.append(record)
    return records
