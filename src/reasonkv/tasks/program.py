"""`program`: execute a straight-line program, then report some variables.

    <program> n04 7 : n04 q ; n05 3 : n05 b ; n06 b + q : n06 k ; ... end n91 ? q k <think>
    n04 7 : n04 q 7 ; n05 3 : n05 b 3 ; n06 b 3 + q 7 = 0 : n06 k 0 ; ... </think> q 7 k 0

Use of variables is skewed on purpose: `constants` are written once, early, and read rarely; the
other variables are read and rewritten with Zipf weights, so that the last few of them are touched
once in hundreds of tokens. Half of what is reported are the variables not mentioned for longest.
A cache that keeps only recent tokens therefore loses values that are still needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, dial
from .steps import Line, ask_names, execute_line, random_operator, state_line

_INITIAL = 3  # working variables that get a starting value right after the constants


@dataclass(frozen=True)
class Program(GeneratedTask):
    """The dials of `program`; the default trace is about 580 tokens."""

    name = "program"

    lines: int = dial(48, 4, 96, "program lines; each is 8 prompt and 13 trace tokens")
    variables: int = dial(12, 3, 16, "variables that are rewritten")
    constants: int = dial(6, 2, 8, "variables written once, at the start")
    rarity: int = dial(8, 0, 90, "percent of operands that are constants")
    report: int = dial(4, 1, 8, "variables to report at the end")

    def draft(self, draw: Draw) -> Draft:
        """One program with its execution."""
        names = draw.sample(LETTERS, self.constants + self.variables)
        constants, working = names[: self.constants], names[self.constants :]
        edges = _zipf(len(working))
        first = draw.below(len(LABELS) - self.lines + 1)
        draft = Draft(prompt=["<program>"])
        values: dict[str, int] = {}
        mentioned: dict[str, int] = {}
        starts = constants[: max(1, self.lines - _INITIAL)] + working[:_INITIAL]
        starts = starts[: self.lines]
        for number in range(self.lines):
            label = LABELS[first + number]
            if number < len(starts):
                line = Line(label, str(draw.below(10)), "", "", starts[number])
            else:
                left = self._operand(draw, constants, working, edges, values)
                right = self._operand(draw, constants, working, edges, values)
                while right == left:
                    right = self._operand(draw, constants, working, edges, values)
                operator = random_operator(draw, values[left], values[right])
                target = working[draw.weighted(edges)]
                line = Line(label, left, operator, right, target)
            state_line(draft, line)
            execute_line(draft, line, values)
            for name in (line.left, line.right, line.target):
                mentioned[name] = number
        known = sorted(values, key=lambda name: mentioned[name])
        report = min(self.report, len(known))
        oldest = known[: (report + 1) // 2]
        asked = oldest + draw.sample(known[len(oldest) :], report - len(oldest))
        ask_names(draft, label, draw.sample(asked, report), values)
        return draft

    def _operand(
        self, draw: Draw, constants: list[str], working: list[str], edges: list[float], values: dict[str, int]
    ) -> str:
        """A variable that has a value: rarely a constant, else by the working variables' weights."""
        if draw.below(100) < self.rarity:
            return draw.choice(constants)
        name = working[draw.weighted(edges)]
        while name not in values:
            name = working[draw.weighted(edges)]
        return name


def _zipf(count: int) -> list[float]:
    """Cumulative weights 1, 1 + 1/2, 1 + 1/2 + 1/3, ..."""
    edges, total = [], 0.0
    for rank in range(count):
        total += 1 / (rank + 1)
        edges.append(total)
    return edges
