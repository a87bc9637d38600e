"""`recall`: facts stated once, then unrelated work, then questions about the facts.

The value of a fact stands only in the trace: the prompt gives a chain of updates of an accumulator (here `u`), and each
fact is a reading of it. No single forward pass can recompute a lost fact. The work is a loop whose passes count down.
The last two questions ask for results of the work, because a method that skips passes would come closer to the facts.

    <recall> n10 7 : n10 u ; n11 u * 3 : n11 u ; n12 u + 5 : n12 k ; ... n30 2 : n30 a ; ...
    left n02 ; n40 a + b : n40 c ; n41 ... ; end n47 ? k m c b <think>
    n10 7 : n10 u 7 ; n11 u 7 * 3 = 1 : n11 u 1 ; n12 u 1 + 5 = 6 : n12 k 6 ; ...
    n30 2 : n30 a 2 ; ... left n02 ; n40 a 2 + b 4 = 6 : n40 c 6 ; n41 ... ;
    left n01 ; n40 ... ; left n00 ; </think> k 6 m 3 c 1 b 4

With `where=prompt` the facts stand in the prompt as `k 6 ;` and are not restated.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, dial
from .steps import Line, add_line, ask_names, execute_line, random_operator

_WORK_NAMES = 5
_WORK_ASKED = 2
_LOOP_LINES = range(5, 13)
_LINE_TOKENS = 13


@dataclass(frozen=True)
class Recall(GeneratedTask):
    """The dials of `recall`; the default trace is about 650 tokens."""

    name = "recall"

    where: str = dial("trace", "where the facts are stated", choices=("trace", "prompt", "mixed"))
    distance: int = dial(400, "tokens of unrelated work between facts and questions", range=(60, 3000))
    facts: int = dial(8, "facts stated", range=(2, 12))
    ask: int = dial(4, "facts asked for", range=(1, 12))

    def draft(self, draw: Draw) -> Draft:
        """Draw facts, unrelated work and questions."""
        where = self.where if self.where != "mixed" else draw.choice(("trace", "prompt"))
        accumulator, *names = draw.sample(LETTERS, 1 + _WORK_NAMES + self.facts)
        work, keys = names[:_WORK_NAMES], names[_WORK_NAMES:]
        loop_lines, passes = _loop_shape(draw, self.distance)
        chain = 1 + 2 * self.facts if where == "trace" else 0
        used = chain + _WORK_NAMES + loop_lines
        first = draw.below(len(LABELS) - used + 1)
        labels = list(LABELS[first : first + used])
        draft = Draft(prompt=["<recall>"])
        values: dict[str, int] = {}
        if where == "prompt":
            for key in keys:
                values[key] = draw.below(10)
                draft.prompt += [key, str(values[key]), ";"]
        before = _chain(draw, labels[:chain], accumulator, keys)
        for label, name in zip(labels[chain:], work, strict=False):
            before.append(Line(label, str(draw.below(10)), "", "", name))
        for line in before:
            add_line(draft, line)
            execute_line(draft, line, values)
        loop = []
        for label in labels[chain + _WORK_NAMES :]:
            left, right = draw.sample(work, 2)
            symbol = random_operator(draw, values[left], values[right])
            loop.append(Line(label, left, symbol, right, draw.choice(work)))
        draft.prompt += ["left", LABELS[passes], ";"]
        for line in loop:
            add_line(draft, line)
        for remaining in range(passes, 0, -1):
            # The prompt states the first count; every later one is a subtraction.
            draft.write(f"left {'' if remaining == passes else 'a:'}{LABELS[remaining]} ;")
            for line in loop:
                execute_line(draft, line, values)
        draft.write(f"left a:{LABELS[0]} ;")
        asked = draw.sample(keys, min(self.ask, len(keys))) + draw.sample(work, _WORK_ASKED)
        ask_names(draft, labels[-1], asked, values)
        return draft


def _chain(draw: Draw, labels: list[str], accumulator: str, keys: list[str]) -> list[Line]:
    """Return lines that in turn update the accumulator and read one fact from it."""
    lines = [Line(label, str(draw.below(10)), "", "", accumulator) for label in labels[:1]]
    for number, label in enumerate(labels[1:]):
        target = accumulator if number % 2 == 0 else keys[number // 2]
        symbol = random_operator(draw, 1, 2)
        # Multiplication by 1, 3 or 7 is one-to-one modulo 10, so the accumulator can still be any digit.
        operand = draw.choice((1, 3, 7)) if symbol == "*" else draw.between(1, 9)
        lines.append(Line(label, accumulator, symbol, str(operand), target))
    return lines


def _loop_shape(draw: Draw, distance: int) -> tuple[int, int]:
    """Return (lines in the loop, passes) whose work is within 4 % of `distance` tokens, or the closest one."""
    shapes = []
    for lines in _LOOP_LINES:
        size = _LINE_TOKENS * lines + 3
        passes = max(1, min(len(LABELS) - 1, round(distance / size)))
        shapes.append((abs(passes * size - distance), lines, passes))
    shapes.sort()
    _, lines, passes = draw.choice([shape for shape in shapes if shape[0] <= 0.04 * distance] or shapes[:1])
    return lines, passes
