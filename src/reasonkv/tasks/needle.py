"""`niah` and `ruler:TASK`: long prompts with facts hidden in noise and a question at the end.

The kinds are those of RULER (Hsieh et al. 2024, arXiv 2404.06654): niah_single, niah_multikey, niah_multivalue,
niah_multiquery, vt (variable tracking), cwe (common words) and fwe (frequent words). Noise and names are made here. A
prompt fills `length` tokens of the model's own tokenizer. The score is the share of the answers in the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from reasonkv.tasks.base import UNREAD, Draw, Grade, Problem, Task, TaskError
from reasonkv.tasks.grade import after_thinking, grade_contains
from reasonkv.tasks.options import THINK_END

KINDS = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe")
_NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
)  # fmt: skip
_STARTS = (
    "bal",
    "cor",
    "den",
    "fir",
    "gom",
    "hul",
    "jin",
    "kel",
    "lor",
    "mad",
    "nim",
    "pol",
    "qua",
    "rif",
    "sor",
    "tun",
)
_ENDS = ("ado", "ben", "cus", "dal", "ery", "fin", "gor", "hal", "isk", "jam", "lek", "mor", "nix", "oth", "pel", "rin")
_CHARACTERS_PER_TOKEN = 4.0  # where no tokenizer is known


@dataclass(frozen=True)
class NeedleTask(Task):
    """Long prompts with hidden facts.

    Args:
        spec: the task as the user wrote it.
        kind: one of `KINDS`.
        length: tokens of the prompt, chat template not counted.
        depth: where the needle lies, in per cent of the prompt (`niah_single`); None draws it.
        needles: hidden facts, values or hops, by kind.
        count_tokens: tokens of a text; `for_tokenizer` sets it.
        think_end: what ends thinking.

    """

    spec: str
    kind: str
    length: int = 4096
    depth: int | None = None
    needles: int = 4
    count_tokens: Callable[[str], int] | None = None
    think_end: str = THINK_END

    chat = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(f"There is no RULER task {self.kind!r}; the tasks are {', '.join(KINDS)}.")
        for name, low, high in (("length", 128, 2_000_000), ("needles", 1, 64), ("depth", 0, 100)):
            value = getattr(self, name)
            if value is None and name == "depth":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise TaskError(f"{name} of {self.spec} must be a whole number from {low} to {high}, not {value!r}.")

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task as the user wrote it."""
        return self.spec

    def for_tokenizer(self, tokenizer: Any) -> NeedleTask:
        """Return the task with lengths counted by this tokenizer."""
        return replace(self, count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example`, made from its number and the seed."""
        if example < 0:
            raise TaskError(f"Examples are counted from 0, so there is no example {example}.")
        draw = Draw(f"{self.kind}/{self.needles}/{self.depth}/{split}/{seed}/{example}")
        make = {"vt": self._variables, "cwe": self._words, "fwe": self._words}.get(self.kind, self._facts)
        prompt, answers = make(draw)
        return Problem(self.spec, example, seed, split, prompt, "", "\n".join(answers))

    def grade(self, problem: Problem, output: str) -> Grade:
        """Return the share of the answers that the output contains."""
        part = after_thinking(output, self.think_end)
        return UNREAD if part is None else grade_contains(part, problem.answer.split("\n"), {})

    # -- the kinds ------------------------------------------------------------------------------------------------

    def _facts(self, draw: Draw) -> tuple[str, list[str]]:
        """Numbers of names hidden in noise; asked for one name, or for several (multiquery)."""
        single = self.kind == "niah_single"
        names = _names(draw, 1 if single or self.kind == "niah_multivalue" else self.needles)
        per_name = self.needles if self.kind == "niah_multivalue" else 1
        facts = [(name, str(draw.between(1_000_000, 9_999_999))) for name in names for _ in range(per_name)]
        asked = names if self.kind == "niah_multiquery" else names[:1]
        answers = [value for name, value in facts if name in asked]
        lines = [f"One of the special numbers of {name} is {value}." for name, value in facts]
        plural = "number" if len(answers) == 1 else "numbers"
        head = "Special numbers are hidden in the text below. Remember them; the question comes after the text.\n\n"
        tail = f"\n\nWhat {'is' if len(answers) == 1 else 'are'} the special {plural} of {_listed(asked)} in the text?"
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
        times = {"cwe": (30, 3), "fwe": (24, 2)}[self.kind]
        head = "Read this list of words and count how often each occurs.\n\n"
        tail = f"\n\nWhich {len(common)} words occur most often in the list? Name just them."

        def text(size: int) -> str:
            words = [word for word in common for _ in range(max(times[1] + 2, times[0] * size // 400))]
            words += [rare[at % len(rare)] for at in range(max(0, size - len(words)))]
            shuffled = Draw(f"{draw_seed}").sample(words, len(words))
            return head + " ".join(shuffled) + tail

        draw_seed = draw.below(2**31)
        return self._fill(text), common

    # -- filling ---------------------------------------------------------------------------------------------------

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
        low, high = 0, self.length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._tokens(text(middle)) <= self.length else (low, middle - 1)
        return text(low)

    def _tokens(self, text: str) -> int:
        return round(len(text) / _CHARACTERS_PER_TOKEN) if self.count_tokens is None else self.count_tokens(text)


def needle_task(spec: str, options: Mapping[str, str], think_end: str = THINK_END) -> NeedleTask:
    """Make the task of `niah:length=4096,depth=50` or `ruler:vt,length=8192`.

    Raises:
        TaskError: no such kind or option, or a number out of range.

    """
    name, _, rest = spec.partition(":")
    kind = "niah_single" if name == "niah" else rest.partition(",")[0].strip()
    known = ("length", "depth", "needles")
    numbers: dict[str, Any] = {}
    for key, text in options.items():
        if key not in known or not text.isdigit() or len(text) > 9:
            raise TaskError(f"{name} takes {', '.join(known)} with whole numbers, not {key}={text}.")
        numbers[key] = int(text)
    return NeedleTask(spec, kind, **numbers, think_end=think_end)


def _names(draw: Draw, count: int) -> list[str]:
    pairs = [(start, end) for start in _STARTS for end in _ENDS]
    return [start + end for start, end in draw.sample(pairs, count)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
