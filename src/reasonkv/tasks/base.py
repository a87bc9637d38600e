"""What all tasks share: problems, grades, and the draws, dials and splits of generated families.

A family is a frozen dataclass whose fields are its *dials* (difficulty settings). Its method `draft(draw)` turns a
stream of random numbers into a prompt and a reference trace.

* **Splits never share a problem.** The SHA-256 of a prompt decides its split. A draw that lands in the other split is
  thrown away, so this holds for all dials and seeds.
* **Problems are the same on every machine.** All randomness comes from `random.Random(int).random()`, whose sequence
  Python promises to keep. The seed is a SHA-256; `hash()` is never used.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import reprlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from types import MappingProxyType
from typing import Any, TypeVar

from reasonkv.errors import ReasonKVError
from reasonkv.tasks.options import THINK, THINK_END, TaskOptions

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
LABELS = tuple(f"n{number:02d}" for number in range(96))

_TEST_SHARE = 64  # of 256
_T = TypeVar("_T")


class TaskError(ReasonKVError, ValueError):
    """A task, dial or split that does not exist, or a dial out of range."""


class Kind(IntEnum):
    """What a trace token asks of the model; training logs the accuracy of each kind."""

    COPY = 0  # restated from the prompt, or punctuation
    RETRIEVAL = 1  # the current value of a name
    ARITHMETIC = 2  # the result of a calculation
    ANSWER = 3  # everything after `</think>`


_MARKED = {"r:": Kind.RETRIEVAL, "a:": Kind.ARITHMETIC}


@dataclass(frozen=True)
class Problem:
    """One problem as text.

    `tokenizer(prompt, add_special_tokens=False)` gives the prompt ids. `trace` is the reference output up to and
    including the answer, without an end-of-sequence token. `answer` is the part of it that `Task.check` compares.
    """

    task: str
    example: int
    seed: int
    split: str
    prompt: str
    trace: str
    answer: str


class Draw:
    """A stream of random choices, seeded with a text."""

    def __init__(self, text: str) -> None:
        digest = hashlib.sha256(text.encode()).digest()
        self.unit = random.Random(int.from_bytes(digest[:8], "big")).random  # a float in [0, 1)

    def below(self, bound: int) -> int:
        """Draw an integer in [0, bound)."""
        return int(self.unit() * bound)

    def between(self, low: int, high: int) -> int:
        """Draw an integer in [low, high]."""
        return low + self.below(high - low + 1)

    def choice(self, items: Sequence[_T]) -> _T:
        """Draw one item; all are equally likely."""
        return items[self.below(len(items))]

    def run(self, items: Sequence[_T], count: int) -> Sequence[_T]:
        """Draw `count` neighbours, in their order."""
        first = self.below(len(items) - count + 1)
        return items[first : first + count]

    def sample(self, items: Sequence[_T], count: int) -> list[_T]:
        """Draw `count` different items in random order."""
        pool = list(items)
        for index in range(count):
            other = index + self.below(len(pool) - index)
            pool[index], pool[other] = pool[other], pool[index]
        return pool[:count]

    def weighted(self, cumulative: Sequence[float]) -> int:
        """Draw an index with probability proportional to the steps of the cumulative weights."""
        return min(bisect_right(cumulative, self.unit() * cumulative[-1]), len(cumulative) - 1)


@dataclass
class Draft:
    """A problem in words: the prompt, the trace, and the kind of each trace word."""

    prompt: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    kinds: list[Kind] = field(default_factory=list)

    def ask(self, words: str) -> None:
        """Append words to the prompt."""
        self.prompt += words.split()

    def write(self, words: str, kind: Kind = Kind.COPY) -> None:
        """Append words of one kind to the trace; `r:3` is a retrieved 3 and `a:3` a calculated one."""
        for word in words.split():
            marked = _MARKED.get(word[:2])
            self.trace.append(word if marked is None else word[2:])
            self.kinds.append(kind if marked is None else marked)


@dataclass(frozen=True)
class Grade:
    """How right an output is: a score from 0 to 1, the answer that was read, and why the grader failed, if it did."""

    score: float
    extracted: str | None
    error: str | None = None


UNREAD = Grade(0.0, None)
"""An output in which no answer can be read."""


class Task(ABC):
    """Problems with a grader; every runner takes them from `problem` and hands outputs to `grade`."""

    name: str
    """The task as results name it."""
    chat: bool = False
    """Whether prompts are messages, for which the tokenizer's chat template is used where there is one."""
    size: int | None = None
    """Number of problems, or None where there is no last one."""
    skipped: Sequence[str] = ()
    """Parts of the data that could not be read, a sentence each."""
    sampling: Mapping[str, float] = MappingProxyType({})
    """What the task's authors draw with, by fields of `reasonkv.evaluate.job.Sampling`."""
    stop: Sequence[str] = ()
    """Texts that end an output."""
    max_new_tokens: int | None = None
    """The authors' limit, or None where they name none."""
    think_end: str = THINK_END
    """Text that ends thinking."""

    @abstractmethod
    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example`; the same arguments give the same problem.

        Raises:
            TaskError: there is no such problem.
        """

    def grade(self, problem: Problem, output: str) -> Grade:
        """Score a decoded generation; thinking is not graded, and thinking that never ends is no answer."""
        answer = after_thinking(output, self.think_end)
        return UNREAD if answer is None else self.grade_answer(problem, answer)

    def grade_answer(self, problem: Problem, answer: str) -> Grade:
        """Score what follows the thinking; here 0, as of a task without answers."""
        return UNREAD

    def check(self, problem: Problem, output: str) -> bool:
        """Return whether an output scores 1."""
        return self.grade(problem, output).score == 1

    def for_tokenizer(self, tokenizer: Any) -> Task:
        """Return the task with lengths that are counted in tokens filled in."""
        return self

    def prompt_options(self, options: TaskOptions) -> TaskOptions:
        """Return the options under which the task's prompts are rendered."""
        return options


def after_thinking(output: str, end: str = THINK_END) -> str | None:
    """Return what follows the last end-of-thinking marker of a decoded generation; None where thinking never ends."""
    _, found, answer = output.rpartition(end)
    return answer if found else None if THINK in output else output


def check_example(example: int) -> None:
    """Raise a TaskError for a negative number of a problem."""
    if example < 0:
        raise TaskError(f"Examples are counted from 0, so there is no example {example}.")


def dial(default: Any, help: str, **values: tuple[Any, ...]) -> Any:
    """Declare a dial with one line of help; it takes a whole number in `range` or one of the words in `choices`."""
    return field(default=default, metadata={"help": help, **values})


@dataclass(frozen=True)
class GeneratedTask(Task):
    """Base of the families: a frozen dataclass of dials plus `draft`."""

    def draft(self, draw: Draw) -> Draft:
        """Turn random numbers into one problem in words."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        for one in fields(self):
            value, choices = getattr(self, one.name), one.metadata.get("choices")
            if choices:
                allowed, fits = f"one of {', '.join(choices)}", value in choices
            else:
                low, high = one.metadata["range"]
                allowed = f"a whole number from {low} to {high}"
                fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
            if not fits:
                shown = reprlib.repr(value)
                raise TaskError(f"Dial {one.name!r} of task {self.name!r} must be {allowed}, not {shown}.")

    @property
    def spec(self) -> str:
        """The task with all its dials, e.g. `program:lines=88,...`; `get_task` reads it back."""
        return f"{self.name}:{','.join(f'{one.name}={getattr(self, one.name)}' for one in fields(self))}"

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example` (0, 1, ...) of split "test" or "train"; others raise a TaskError."""
        draft = self.draft_of(example, seed=seed, split=split)
        texts = (draft.prompt, draft.trace, draft.trace[draft.trace.index(THINK_END) + 1 :])
        return Problem(self.name, example, seed, split, *map(" ".join, texts))

    def draft_of(self, example: int, *, seed: int, split: str) -> Draft:
        """Return the draft behind `problem(example)`: the first draw whose prompt is in the split."""
        if split not in ("test", "train"):
            raise TaskError(f"There is no split {split!r}; the splits are test and train.")
        check_example(example)
        drafts = (self.draft(Draw(f"{self.spec}/{split}/{seed}/{example}/{attempt}")) for attempt in itertools.count())
        return next(draft for draft in drafts if split_of(" ".join(draft.prompt)) == split)

    def grade(self, problem: Problem, output: str) -> Grade:
        """Score 1 if an output, with or without special tokens, ends its thinking and then gives the answer's words."""
        words = final_answer(output)
        return Grade(float(words == problem.answer.split()), None if words is None else " ".join(words))


def split_of(prompt: str) -> str:
    """Return the split of a prompt: a quarter of all prompts, by their SHA-256, is "test"."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] < _TEST_SHARE else "train"


def final_answer(output: str) -> list[str] | None:
    """Return the words after `</think>` up to the end of the sequence, or None if thinking never ends."""
    words = list(itertools.takewhile(lambda word: word not in ("<eos>", "<pad>"), output.split()))
    return words[words.index(THINK_END) + 1 :] if THINK_END in words else None
