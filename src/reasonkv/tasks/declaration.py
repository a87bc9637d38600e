"""What a task of data is: the dataset, the prompt, the answer and the grader, as a YAML file declares them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MaxLen
from pydantic import ValidationError
from typing_extensions import TypedDict

from reasonkv.files import finite
from reasonkv.inputs import parse_json, parse_yaml, reason
from reasonkv.tasks.base import TaskError
from reasonkv.tasks.options import TaskOptions

DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Choices(TypedDict):
    """Fields of a row: of the right choice, and of the others."""

    right: str
    wrong: Annotated[list[str], MaxLen(9)]


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A task of data; of `TaskOptions`, those with a field here replace it."""

    title: str = ""  # one line about it
    dataset: str | None = None  # a hub dataset, or a file of rows beside the declaration
    config: str | None = None  # of the hub dataset, as are the next two
    split: str = "test"
    revision: str | None = None
    prompt: str | None = None  # template of the prompt; None guesses the field
    answer: str | None = None  # field or template of the answer; None guesses the field
    grade: str | None = None  # grader; None guesses it
    extract: str | None = None  # regular expression; the first group that matched in its last match is the answer
    # regular expressions whose matches are removed from the extracted and the accepted answers
    ignore: Sequence[str] = ()
    chat: bool = True  # the prompt is meant for the tokenizer's chat template
    shots: int = 0  # worked examples before the question
    shots_from: str | None = None  # split or file that the examples come from
    shot: str | None = None  # field or template of an example's answer; None is `answer`
    # what the authors draw with, by fields of `reasonkv.evaluate.job.Sampling`
    sampling: Mapping[str, Annotated[float, Ge(0)]] = field(default_factory=dict)
    stop: Sequence[str] = ()  # texts that end an output
    max_new_tokens: Annotated[int, Ge(1)] | None = None  # the authors' limit
    length: int | None = None  # tokens that longer prompts are cut to, in the middle; None cuts nothing
    rename: Mapping[str, str] = field(default_factory=dict)  # new names of fields by their names in the dataset
    # `right`, the field of the right choice, and `wrong`, the fields of the others
    shuffle_choices: Choices | None = None
    # fields that differ, by the subset's name, which is also the dataset's configuration
    subsets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pattern in filter(None, (self.extract, *self.ignore)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise TaskError(f"{pattern!r} is no regular expression ({error}).") from None
        if self.length is not None and self.length < 2:
            raise TaskError(f"length must be at least 2 tokens, not {self.length}.")
        for name in self.sampling:
            if name not in DRAWN:
                raise TaskError(f"sampling has {', '.join(DRAWN)}, not {name}.")
        if self.shots < 0:
            raise TaskError(f"shots must be at least 0, not {self.shots}.")

    @classmethod
    def from_file(cls, path: Path) -> Declaration:
        """Return the declaration of a YAML file.

        Raises:
            TaskError: no file, no YAML, or a key or value that no task has.
        """
        try:
            found = parse_yaml(finite(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TaskError(f"{path} cannot be read as YAML ({error}).") from None
        known = [one.name for one in fields(cls)]
        if not isinstance(found, dict):
            raise TaskError(f"{path} must hold keys and values, such as prompt: '{{question}}'.")
        for key in found:
            if key not in known:
                raise TaskError(f"{path} has the key {key!r}; a task has {', '.join(known)}.")
        try:
            declared = parse_json(json.dumps(found), cls)
            for own in declared.subsets.values():
                parse_json(json.dumps({**found, "subsets": {}, **own}), cls)
        except ValidationError as error:
            raise TaskError(f"{path} is no task: {reason(error)}.") from None
        return declared

    def subset(self, name: str) -> Declaration:
        """Return the declaration of one subset; the empty name is the whole where there are none.

        Raises:
            TaskError: there is no such subset.
        """
        if not self.subsets and not name:
            return self
        if name not in self.subsets:
            known = f"its subsets are {', '.join(self.subsets)}" if self.subsets else "it has no subsets"
            raise TaskError(f"The task has no subset {name!r}; {known}.")
        return replace(self, config=name, subsets={}, **self.subsets[name])

    def filled(self, options: TaskOptions) -> Declaration:
        """Return the declaration with what `options` set in its place."""
        names = ("prompt", "answer", "grade", "extract", "shots", "shots_from")
        given: dict[str, Any] = {name: one for name in names if (one := getattr(options, name)) is not None}
        if "shots_from" in given:
            given["shots_from"] = str(given["shots_from"])
        return replace(self, **given)


@cache
def standard_tasks() -> Mapping[str, Declaration]:
    """Return the declarations of all named benchmarks (`standard/NAME.yaml`) by name."""
    files = sorted((Path(__file__).parent / "standard").glob("*.yaml"))
    return {path.stem: Declaration.from_file(path) for path in files}


def declaration_of(spec: str) -> Declaration | None:
    """Return the declaration of a task by its name or YAML file; None for families, files of rows and generators.

    Raises:
        TaskError: the file cannot be read, or there is no such subset.
    """
    if spec.endswith((".yaml", ".yml")):
        return Declaration.from_file(Path(spec).expanduser())
    name, _, rest = spec.partition(":")
    subset = rest.partition(",")[0]
    return standard_tasks()[name].subset("" if "=" in subset else subset) if name in standard_tasks() else None
