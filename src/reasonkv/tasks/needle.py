"""`niah` and `ruler:TASK`: long prompts with facts hidden in noise and a question at the end.

The kinds are those of RULER (Hsieh et al. 2024, arXiv 2404.06654): niah_single, niah_multikey, niah_multivalue,
niah_multiquery, vt (variable tracking), cwe (common words) and fwe (frequent words). Noise and names are made here. A
prompt fills `length` tokens of the model's own tokenizer. The score is the share of the answers in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

from reasonkv.tasks.base import Draw, Grade, Problem, Task, TaskError, check_example
from reasonkv.tasks.grade import grade_contains
from reasonkv.tasks.options import THINK_END

KINDS = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
_RANGES = {"length": (128, 2_000_000), "needles": (1, 64), "depth": (0, 100)}
_NOISE = ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."]
_STARTS = (
    "bal", "cor", "den", "fir", "gom", "hul", "jin", "kel", "lor", "mad", "nim", "pol", "qua", "rif", "sor", "tun",
)  # fmt: skip
_ENDS = ("ado", "ben", "cus", "dal", "ery", "fin", "gor", "hal", "isk", "jam", "lek", "mor", "nix", "oth", "pel", "rin")
_CHARACTERS_PER_TOKEN = 4.0  # where no tokenizer is known


@dataclass(frozen=True)
class NeedleTask(Task):
    """Long prompts with hidden facts."""

    name: str  # the task as the user wrote it
    kind: str  # one of `KINDS`
    length: int = 4096  # tokens of the prompt, chat template not counted
    depth: int | None = None  # where the needle lies, in per cent of the prompt (`niah_single`); None draws it
    needles: int = 4  # hidden facts, values or hops, by kind
    count_tokens: Callable[[str], int] | None = None  # tokens of a text; `for_tokenizer` sets it
    think_end: str = THINK_END  # what ends thinking

    chat = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(f"There is no RULER task {self.kind!r}; the tasks are {', '.join(KINDS)}.")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            is_open = value is None and name == "depth"
            if not is_open and (not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high):
                raise TaskError(f"{name} of {self.name} must be a whole number from {low} to {high}, not {value!r}.")

    def for_tokenizer(self, tokenizer: Any) -> NeedleTask:
        """Return the task with lengths counted by this tokenizer."""
        return replace(self, count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example`, made from its number and the seed."""
        check_example(example)
        draw = Draw(f"{self.kind}/{self.needles}/{self.depth}/{split}/{seed}/{example}")
        make = {"vt": self._variables, "cwe": self._words, "fwe": self._words}.get(self.kind, self._facts)
        prompt, answers = make(draw)
        return Problem(self.name, example, seed, split, prompt, "", "\n".join(answers))

    def grade_answer(self, problem: Problem, answer: str) -> Grade:
        """Return the share of the answers that the output contains."""
        return grade_contains(answer, problem.answer.split("\n"), {})

    def _facts(self, draw: Draw) -> tuple[str, list[str]]:
        """Numbers of names hidden in noise; asked for one name, or for several (multiquery)."""
        single = self.kind == "niah_single"
        names = _names(draw, 1 if single or self.kind == "niah_multivalue" else self.needles)
        per_name = self.needles if self.kind == "niah_multivalue" else 1
        facts = [(name, str(draw.between(1_000_000, 9_999_999))) for name in names for _ in range(per_name)]
        asked = names if self.kind == "niah_multiquery" else names[:1]
        answers = [value for name, value in facts if name in asked]
        lines = [f"One of the special numbers of {name} is {value}." for name, value in facts]
        are, s = ("is", "") if len(answers) == 1 else ("are", "s")
        *before, last = asked
        listed = f"{', '.join(before)} and {last}" if before else last
        head = "Special numbers are hidden in the text below. Remember them; the question comes after the text.\n\n"
        tail = f"\n\nWhat {are} the special number{s} of {listed} in the text?"
        return self._hide(head, lines, tail, draw), answers

    def _variables(self, draw: Draw) -> tuple[str, list[str]]:
        """A chain of assignments hidden in noise; asked for every variable with the first one's value."""
        names = [name.upper() for name in _names(draw, 2 * (self.needles + 1))]
        chains = names[: self.needles + 1], names[self.needles + 1 :]
        values = [str(draw.between(10_000, 99_999)) for _ in chains]
        lines = []
        for chain, value in zip(chains, values, strict=True):
            lines += [f"VAR {chain[0]} = {value}."]
            lines += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(chain)]
        head = "Assignments are hidden in the text below. Follow them; the question comes after the text.\n\n"
        tail = f"\n\nWhich variables have the value {values[0]}? Name all {self.needles + 1} of them."
        return self._hide(head, lines, tail, draw, in_order=True), list(chains[0])

    def _words(self, draw: Draw) -> tuple[str, list[str]]:
        """A list of words; asked for those that occur most often."""
        common = _names(draw, self.needles if self.kind == "cwe" else 3)
        rare = [name for name in _names(draw, 200) if name not in common]
        often, least = (30, 5) if self.kind == "cwe" else (24, 4)
        head = "Read this list of words and count how often each occurs.\n\n"
        tail = f"\n\nWhich {len(common)} words occur most often in the list? Name just them."
        seed = draw.below(2**31)

        def text(size: int) -> str:
            words = [word for word in common for _ in range(max(least, often * size // 400))]
            words += [rare[at % len(rare)] for at in range(max(0, size - len(words)))]
            return head + " ".join(Draw(str(seed)).sample(words, len(words))) + tail

        return self._fill(text), common

    def _hide(self, head: str, facts: Sequence[str], tail: str, draw: Draw, *, in_order: bool = False) -> str:
        """Return noise of the wanted length with the facts in it, at drawn places or at `depth`."""
        places = [draw.unit() for _ in facts]
        if self.depth is not None and len(facts) == 1:
            places = [self.depth / 100]
        if in_order:
            places.sort()

        def text(size: int) -> str:
            noise = [_NOISE[at % len(_NOISE)] for at in range(size)]
            for place, fact in sorted(zip(places, facts, strict=True), reverse=True):
                noise.insert(round(place * size), fact)
            return head + " ".join(noise) + tail

        return self._fill(text)

    def _fill(self, text: Callable[[int], str]) -> str:
        """Return the longest text that has at most `length` tokens, by bisection over its size."""
        count = self.count_tokens or (lambda text: round(len(text) / _CHARACTERS_PER_TOKEN))
        low, high = 0, self.length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(text(middle)) <= self.length else (low, middle - 1)
        return text(low)


def needle_task(spec: str, options: Mapping[str, str], think_end: str = THINK_END) -> NeedleTask:
    """Make the task of `niah:length=4096,depth=50` or `ruler:vt,length=8192`.

    Raises:
        TaskError: no such kind or option, or a number out of range.
    """
    name, _, rest = spec.partition(":")
    kind = "niah_single" if name == "niah" else rest.partition(",")[0].strip()
    for key, text in options.items():
        if key not in _RANGES or not text.isdigit() or len(text) > 9:
            raise TaskError(f"{name} takes length, depth, needles with whole numbers, not {key}={text}.")
    numbers: dict[str, Any] = {key: int(text) for key, text in options.items()}
    return NeedleTask(spec, kind, **numbers, think_end=think_end)


def _names(draw: Draw, count: int) -> list[str]:
    return draw.sample(["".join(pair) for pair in product(_STARTS, _ENDS)], count)
