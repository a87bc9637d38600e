"""Full KV's outputs of an evaluation, token by token: what the other methods' outputs are compared with."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from reasonkv.evaluate.records import append_records, parse_line, read_lines, repair
from reasonkv.evaluate.traces import file_name


@dataclass(frozen=True)
class Output:
    """Full KV's output for one sample of one example.

    Args:
        example: number of the problem.
        sample: number of the sample.
        prompt_tokens: tokens of the prompt.
        tokens: ids, the end-of-sequence token included.
    """

    example: int
    sample: int
    prompt_tokens: int
    tokens: list[int]

    @property
    def key(self) -> str:
        """The example and the sample."""
        return json.dumps([self.example, self.sample])

    def to_json(self) -> str:
        """One line, without its newline."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Output:
        """The inverse of `to_json`; raises ValueError where there is none."""
        return parse_line(cls, line, whole=("example", "sample", "prompt_tokens"), numbers=())


class Outputs:
    """One task's outputs of full KV in a results folder, one line each, written before their records.

    Args:
        folder: the results folder.
        task: the task as the user wrote it.

    Raises:
        RecordError: a line of the file is damaged.
    """

    def __init__(self, folder: Path, task: str) -> None:
        self.path = folder / f"outputs-{file_name(task)}.jsonl"
        repair(self.path)
        self._found = {(one.example, one.sample): one for one in read_lines(self.path, Output)}

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._found

    def __getitem__(self, key: tuple[int, int]) -> Output:
        return self._found[key]

    def add(self, outputs: Iterable[Output]) -> None:
        """Write those that are not there yet."""
        new = [one for one in outputs if (one.example, one.sample) not in self._found]
        append_records(self.path, new)
        self._found.update({(one.example, one.sample): one for one in new})

    def all(self) -> list[Output]:
        """Every output, by example and sample."""
        return [self._found[key] for key in sorted(self._found)]
