"""Answer records: one JSON line per (method, budget, task, example, sample) of `reasonkv evaluate`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonkv.evaluate.records import Measured, parse_line, read_lines


@dataclass(frozen=True, kw_only=True)
class AnswerRecord(Measured):
    """What generating one answer through one cache gave; all up to the row's own end of sequence.

    Args:
        sample: number of the sample of that problem, from 0; greedy decoding has 0 only.
        correct: whether the task's checker accepts the output.
        truncated: whether the output met the limit on its length before it ended.
        repetition: share of output tokens that lie in a loop (`text.repetition`), 0 to 1.
        first_divergence: index of the first output token that differs from full KV's output of the same example and
            sample (an output that stops earlier differs where it stops), or None if the two are equal.
        output: decoded, special tokens skipped.
    """

    sample: int
    correct: bool
    truncated: bool
    repetition: float
    first_divergence: int | None
    output: str

    @property
    def key(self) -> str:
        """What makes a record the one it is; no two records of a folder share it."""
        return answer_key(self.method, self.options, self.budget, self.task, self.example, self.sample, self.seed)

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
