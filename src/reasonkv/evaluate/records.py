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
        tokens_dropped: tokens evicted or merged.
        guards: how often a method used a fallback rule, by the rule's name.
        seconds: wall-clock seconds of the batch divided by its sequences.
        slots_read_mean: slots attended per token fed after the prompt, of methods that keep all and select, or that
            hold padding which nothing attends to; else None.
        bytes_read_mean: bytes of their keys and values, and of the page summaries read to choose; None as above.
    """

    run: str
    method: str
    options: Options
    budget: Budgeted | None
    task: str
    example: Count
    seed: Whole
    prompt_tokens: Tokens
    output_tokens: Tokens
    physical_mean: Amount
    physical_peak: Amount
    physical_terminal: Amount
    saved_ratio_terminal: Number
    bytes_held: Count
    bytes_peak: Count
    bytes_full: Count
    events: Tokens
    tokens_dropped: Count
    guards: Counts = Field(default_factory=dict)
    seconds: Amount
    slots_read_mean: Amount | None = None
    bytes_read_mean: Amount | None = None

    @property
    def selects(self) -> bool:
        """Whether the method kept everything and read a part of it; what holds padding has evicted something first."""
        return self.slots_read_mean is not None and self.events == 0


class ReplayRecord(Measured):
    """What replaying one trace through one cache gave. All means run over the trace's output tokens.

    Args:
        trace_correct: whether the trace, as full KV wrote it, gives the right answer; None of traces from elsewhere.
        top1: share of output tokens where the most likely token is the full-KV model's.
        top5: share where the full-KV model's most likely token is among the five most likely.
        nll: mean negative log-likelihood of the trace's token, nats.
        kl: mean KL divergence from the full-KV model's top-k tokens (and one bucket for the rest), nats.
        first_mismatch: index of the first output token that counts against `top1`, or None.
        answer_top1: `top1` of the answer's tokens alone, those after `</think>`; None where a trace has no such part.
        diagnostics: measures of what was lost, by name (`reasonkv.evaluate.diagnostics`); empty unless asked for.
    """

    KEY = ("method", "options", "budget", "task", "example", "seed")
    trace_correct: bool | None
    top1: Share
    top5: Share
    nll: Number
    kl: Number
    first_mismatch: Count | None
    answer_top1: Share | None = None
    diagnostics: dict[str, Number] = Field(default_factory=dict)


class AnswerRecord(Measured):
    """What generating one answer through one cache gave; all up to the sequence's own end.

    Args:
        sample: number of the sample of that problem, from 0; greedy decoding has 0 only.
        correct: whether the task's checker accepts the output.
        truncated: whether the output met the limit on its length before it ended.
        repetition: share of output tokens that lie in a loop (`generate.repetition`), 0 to 1.
        first_divergence: index of the first output token that differs from full KV's output of the same example and
            sample (an output that stops earlier differs where it stops), or None if the two are equal.
        output: decoded, special tokens skipped.
        score: from 0 to 1; None in records that know right and wrong alone.
        extracted: the answer that was read, or None where none could be read.
        grader_error: why the grader failed, or None.
        thinking_tokens: tokens up to the end of thinking; all where it never ends, 0 where there is none.
    """

    KEY = ("method", "options", "budget", "task", "example", "sample", "seed")
    sample: Count
    correct: bool
    truncated: bool
    repetition: Share
    first_divergence: Count | None
    output: str
    score: Share | None = None
    extracted: str | None = None
    grader_error: str | None = None
    thinking_tokens: Count | None = None


class FullOutput(JsonlRecord):
    """Full KV's output for one sample of one example, which the other methods' outputs are compared with.

    Args:
        tokens: ids, the end-of-sequence token included.
    """

    KEY = ("example", "sample")
    example: Count
    sample: Count
    prompt_tokens: Tokens
    tokens: list[TokenId] = Field(min_length=1)


@dataclass(frozen=True)
class AnswerItem:
    """One answer to write.

    Args:
        problem: what is asked.
        prompt_P: token ids of the prompt; a server takes the fields of its request that hold it.
        opened: whether the prompt ends with thinking under way.
        sample: number of the sample.
    """

    problem: Problem
    prompt_P: Any
    opened: bool = False
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
