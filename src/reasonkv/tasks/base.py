"""What every task family shares: problems, dials, splits that cannot meet, and answer checking.

A family is a frozen dataclass whose fields are its *dials* (difficulty settings). It implements one
method, `draft(draw)`, which turns a stream of random numbers into a prompt and a reference trace.
Everything else follows from that here.

Two properties are worth knowing:

* **Splits never share a problem.** A problem belongs to "test" or "train" by the SHA-256 of its
  prompt, and a draw that lands in the other split is thrown away. No bookkeeping of what was seen
  can therefore go wrong, whatever the dials and seeds.
* **The same numbers everywhere.** All randomness comes from `random.Random(int).random()`, whose
  sequence Python promises not to change, seeded with a SHA-256. `hash()` is never used.
"""

from __future__ import annotations

import hashlib
import random
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any, Protocol, TypeVar

from reasonkv.errors import ReasonKVError

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
LABELS = tuple(f"n{number:02d}" for number in range(96))
THINK, END_THINK = "<think>", "</think>"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

_SPLITS = ("test", "train")
_TEST_SHARE = 64  # of 256: a prompt whose hash starts below this is a test problem
_T = TypeVar("_T")


class TaskError(ReasonKVError, ValueError):
    """A task, dial or split that does not exist, or a dial out of range; the text is a sentence."""


class Kind(IntEnum):
    """What a trace token asks of the model; training logs accuracy for each kind apart."""

    COPY = 0  # restated from the prompt, or punctuation
    RETRIEVAL = 1  # the current value of a name
    ARITHMETIC = 2  # computed here and now
    ANSWER = 3  # everything after `</think>`


@dataclass(frozen=True)
class Problem:
    """One problem: texts only, so that it can be stored, sent and compared.

    `tokenizer(prompt, add_special_tokens=False)` gives the prompt ids. `trace` is the reference
    output up to and including the answer, without the end-of-sequence token; `answer` is the part
    of it that `Task.check` looks at.
    """

    task: str
    example: int
    seed: int
    split: str
    prompt: str
    trace: str
    answer: str


class Task(Protocol):
    """What the rest of the library needs from a task family."""

    @property
    def name(self) -> str:
        """The family's name, as in `get_task(name)`."""
        ...

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Problem number `example` of a split; the same arguments give the same problem."""
        ...

    def check(self, problem: Problem, output: str) -> bool:
        """Whether a decoded generation gives the whole answer."""
        ...


class Draw:
    """A stream of random choices that is the same on every machine and Python version."""

    def __init__(self, text: str) -> None:
        digest = hashlib.sha256(text.encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:8], "big")).random

    def unit(self) -> float:
        """A float in [0, 1)."""
        return self._random()

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[_T]) -> _T:
        """One of `items`, all equally likely."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[_T], count: int) -> list[_T]:
        """`count` different items in random order."""
        pool = list(items)
        for index in range(count):
            other = index + self.below(len(pool) - index)
            pool[index], pool[other] = pool[other], pool[index]
        return pool[:count]

    def weighted(self, cumulative: Sequence[float]) -> int:
        """An index, with probability proportional to the steps of the cumulative weights."""
        point = self._random() * cumulative[-1]
        for index, edge in enumerate(cumulative):
            if point < edge:
                return index
        return len(cumulative) - 1


@dataclass
class Draft:
    """A problem in words: the prompt, the trace, and what kind each word of the trace is."""

    prompt: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)

    def write(self, words: str, kinds: str) -> None:
        """Append words to the trace; `kinds` has one letter a word: c, r, a (arithmetic), or A."""
        parts = words.split()
        self.trace.extend(parts)
        self.kinds.extend(_KIND_OF[letter] for letter in kinds)
        if len(parts) != len(kinds):
            raise AssertionError(f"{len(parts)} words but {len(kinds)} kinds")


_KIND_OF = {"c": Kind.COPY, "r": Kind.RETRIEVAL, "a": Kind.ARITHMETIC, "A": Kind.ANSWER}


def dial(default: int, low: int, high: int, help: str) -> Any:
    """A whole-number dial with its inclusive range and one line of help."""
    return field(default=default, metadata={"range": (low, high), "help": help})


def choice_dial(default: str, choices: tuple[str, ...], help: str) -> Any:
    """A dial that takes one of a few words."""
    return field(default=default, metadata={"choices": choices, "help": help})


@dataclass(frozen=True)
class GeneratedTask:
    """Base of the generated families: a frozen dataclass of dials plus `draft`."""

    name = ""

    def draft(self, draw: Draw) -> Draft:
        """Turn random numbers into one problem in words (prompt, trace, kinds)."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if "choices" in one.metadata:
                if value not in one.metadata["choices"]:
                    allowed = ", ".join(one.metadata["choices"])
                    raise TaskError(f"Dial {one.name!r} of task {self.name!r} must be one of {allowed}, not {value!r}.")
                continue
            low, high = one.metadata["range"]
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise TaskError(
                    f"Dial {one.name!r} of task {self.name!r} must be a whole number from {low} "
                    f"to {high}, not {reprlib.repr(value)}."
                )

    @property
    def spec(self) -> str:
        """The task with all its dials, e.g. `program:lines=88,...`; `get_task` reads it back."""
        dials = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{self.name}:{dials}"

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Problem number `example` (0, 1, ...) of split "test" or "train".

        Raises `TaskError` for another split or a negative example.
        """
        draft = self.draft_of(example, seed=seed, split=split)
        return Problem(
            task=self.name,
            example=example,
            seed=seed,
            split=split,
            prompt=" ".join(draft.prompt),
            trace=" ".join(draft.trace),
            answer=" ".join(draft.trace[draft.trace.index(END_THINK) + 1 :]),
        )

    def draft_of(self, example: int, *, seed: int, split: str) -> Draft:
        """The draft behind `problem(example)`: the first draw whose prompt is in the split."""
        if split not in _SPLITS:
            raise TaskError(f"There is no split {split!r}; the splits are test and train.")
        if example < 0:
            raise TaskError(f"Examples are counted from 0, so there is no example {example}.")
        attempt = 0
        while True:
            draft = self.draft(Draw(f"{self.spec}/{split}/{seed}/{example}/{attempt}"))
            if split_of(" ".join(draft.prompt)) == split:
                return draft
            attempt += 1

    def check(self, problem: Problem, output: str) -> bool:
        """Whether `output` closes its thinking and then gives exactly the answer, word for word.

        `output` is the decoded generation with or without special tokens. Thinking is not graded.
        """
        return final_answer(output) == problem.answer.split()


def split_of(prompt: str) -> str:
    """The split a prompt belongs to: a quarter of all prompts, by their SHA-256, is "test"."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < _TEST_SHARE else "train"


def final_answer(output: str) -> list[str] | None:
    """The words after `</think>` up to the end of the sequence; None if thinking never ends."""
    words = output.split()
    for end, word in enumerate(words):
        if word in ("<eos>", "<pad>"):
            words = words[:end]
            break
    if END_THINK not in words:
        return None
    return words[words.index(END_THINK) + 1 :]
