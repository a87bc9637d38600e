"""Answer records: one JSON line per (method, budget, task, example, sample) of `reasonkv evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reasonkv.evaluate.records import parse_line, read_lines


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """What generating one answer through one cache gave.

    Token counts are tokens, physical lengths are slots per KV head (mean over full-attention layers and heads), sizes
    are bytes of this row alone, all up to the row's own end of sequence.

    Args:
        run: identifier of the command and arguments that wrote it (`Manifest.run`).
        method: the method's name.
        options: every option of the method.
        budget: every field of the budget, or None for full KV.
        task: the task, with the dials that were given.
        example: number of the problem.
        sample: number of the sample of that problem, from 0; greedy decoding has 0 only.
        seed: the run's seed.
        prompt_tokens: tokens of the prompt.
        output_tokens: tokens written, the end-of-sequence token included.
        correct: whether the task's checker accepts the output.
        truncated: whether the output met the limit on its length before it ended.
        repetition: share of output tokens that lie in a loop (`text.repetition`), 0 to 1.
        first_divergence: index of the first output token that differs from full KV's output of the same example and
            sample (an output that stops earlier differs where it stops), or None if the two are equal.
        output: decoded, special tokens skipped.
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
    sample: int
    seed: int
    prompt_tokens: int
    output_tokens: int
    correct: bool
    truncated: bool
    repetition: float
    first_divergence: int | None
    output: str
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

    @property
    def key(self) -> str:
        """What makes a record the one it is; no two records of a folder share it."""
        return answer_key(self.method, self.options, self.budget, self.task, self.example, self.sample, self.seed)

    def to_json(self) -> str:
        """One line, without its newline.

        Raises:
            ValueError: a number is not finite.
        """
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> AnswerRecord:
        """The inverse of `to_json`; fields this version does not know are ignored.

        Raises:
            ValueError: not JSON, not an object, or a field is missing or of the wrong kind.
        """
        return parse_line(
            cls,
            line,
            whole=("example", "sample", "seed", "prompt_tokens", "output_tokens", "correct", "truncated"),
            numbers=("repetition", "physical_mean", "physical_peak", "bytes_held", "bytes_full"),
        )


def answer_key(
    method: str, options: dict[str, Any], budget: dict[str, Any] | None, task: str, example: int, sample: int, seed: int
) -> str:
    """The key of an answer record, as canonical JSON."""
    return json.dumps([method, options, budget, task, example, sample, seed], sort_keys=True)


def read_answers(path: Path) -> list[AnswerRecord]:
    """Every answer record of a file, in order; a torn last line is left out, and a missing file holds none.

    Raises:
        RecordError: a line is damaged, or two lines are the same record.
    """
    return read_lines(path, AnswerRecord)
