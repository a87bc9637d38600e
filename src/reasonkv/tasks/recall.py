"""`recall`: facts stated once, then unrelated work, then questions about the facts.

With `where=trace` the value of a fact stands only in the trace: the prompt gives a chain of
updates of an accumulator (here `u`), and each fact is a reading of it, so that no single forward
can recompute a fact that was lost. The work is a loop whose passes are counted down. The last two
questions are about results of the work: whoever loses count and skips passes, and so brings the
question closer to the facts, does not get away with it.

    <recall> n10 7 : n10 u ; n11 u * 3 : n11 u ; n12 u + 5 : n12 k ; ... n30 2 : n30 a ; ...
    left n02 ; n40 a + b : n40 c ; n41 ... ; end n47 ? k m c b <think>
    n10 7 : n10 u 7 ; n11 u 7 * 3 = 1 : n11 u 1 ; n12 u 1 + 5 = 6 : n12 k 6 ; ...
    n30 2 : n30 a 2 ; ... left n02 ; n40 a 2 + b 4 = 6 : n40 c 6 ; n41 ... ;
    left n01 ; n40 ... ; left n00 ; </think> k 6 m 3 c 1 b 4

With `where=prompt` the facts stand in the prompt as `k 6 ;` and are not restated.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, choice_dial, dial
from .steps import Line, ask_names, execute_line, random_operator, state_line

_WORK_NAMES = 5
_WORK_ASKED = 2
_LOOP_LINES = range(5, 13)
_LINE_TOKENS = 13


@dataclass(frozen=True)
class Recall(GeneratedTask):
    """The dials of `recall`; the default trace is about 650 tokens."""

    name = "recall"

    where: str = choice_dial("trace", ("trace", "prompt", "mixed"), "where the facts are stated")
    distance: int = dial(400, 60, 3000, "tokens of unrelated work between facts and questions")
    facts: int = dial(8, 2, 12, "facts stated")
    ask: int = dial(4, 1, 12, "facts asked for")

    def draft(self, draw: Draw) -> Draft:
        """One set of facts, its unrelated work, and the questions."""
        where = self.where if self.where != "mixed" else draw.choice(("trace", "prompt"))
        names = draw.sample(LETTERS, 1 + _WORK_NAMES + self.facts)
        accumulator, work, keys = names[0], names[1 : 1 + _WORK_NAMES], names[1 + _WORK_NAMES :]
        loop_lines, passes = _loop_shape(draw, self.distance)
        chain = 1 + 2 * self.facts if where == "trace" else 0
        first = draw.below(len(LABELS) - (chain + _WORK_NAMES + loop_lines) + 1)
        labels = list(LABELS[first : first + chain + _WORK_NAMES + loop_lines])
        draft = Draft(prompt=["<recall>"])
        values: dict[str, int] = {}
        if where == "prompt":
            for key in keys:
                values[key] = draw.below(10)
                draft.prompt += [key, str(values[key]), ";"]
        before = self._chain(draw, labels[:chain], accumulator, keys)
        for label, name in zip(labels[chain : chain + _WORK_NAMES], work, strict=True):
            before.append(Line(label, str(draw.below(10)), "", "", name))
        for line in before:
            state_line(draft, line)
            execute_line(draft, line, values)
        loop = []
        for label in labels[chain + _WORK_NAMES :]:
            left, right = draw.sample(work, 2)
            operator = random_operator(draw, values[left], values[right])
            loop.append(Line(label, left, operator, right, draw.choice(work)))
        draft.prompt += ["left", LABELS[passes], ";"]
        for line in loop:
            state_line(draft, line)
        for remaining in range(passes, 0, -1):
            draft.write(f"left {LABELS[remaining]} ;", "ccc" if remaining == passes else "cac")
            for line in loop:
                execute_line(draft, line, values)
        draft.write(f"left {LABELS[0]} ;", "cac")
        asked = draw.sample(keys, min(self.ask, len(keys))) + draw.sample(work, _WORK_ASKED)
        ask_names(draft, labels[-1], asked, values)
        return draft

    def _chain(self, draw: Draw, labels: list[str], accumulator: str, keys: list[str]) -> list[Line]:
        """Lines that update the accumulator and read one fact off it, in turn."""
        if not labels:
            return []
        lines = [Line(labels[0], str(draw.below(10)), "", "", accumulator)]
        for number, label in enumerate(labels[1:]):
            target = accumulator if number % 2 == 0 else keys[number // 2]
            # `* 1, 3, 7` are the one-to-one products after which the chain is still any digit
            operator = random_operator(draw, 1, 2)
            operand = draw.choice((1, 3, 7)) if operator == "*" else draw.between(1, 9)
            lines.append(Line(label, accumulator, operator, str(operand), target))
        return lines


def _loop_shape(draw: Draw, distance: int) -> tuple[int, int]:
    """(lines in the loop, passes) whose work is as close to `distance` tokens as 4 % allows."""
    shapes = []
    for lines in _LOOP_LINES:
        size = _LINE_TOKENS * lines + 3
        passes = max(1, min(len(LABELS) - 1, round(distance / size)))
        shapes.append((abs(passes * size - distance), lines, passes))
    shapes.sort()
    close = [shape for shape in shapes if shape[0] <= 0.04 * distance] or shapes[:1]
    _, lines, passes = draw.choice(close)
    return lines, passes
