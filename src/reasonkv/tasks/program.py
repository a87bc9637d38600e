"""`program`: execute a straight-line program, then report some variables.

    <program> n04 7 = q ; n05 3 = b ; n06 b + q = k ; ... ? q k <think>
    n04 7 = 7 q 7 ; n05 3 = 3 b 3 ; n06 b 3 + q 7 = 0 k 0 ; ... </think> q 7 k 0

Use of variables is skewed on purpose: `constants` are written once, early, and read rarely; the
other variables are read and rewritten with Zipf weights, so that the last few of them are touched
once in hundreds of tokens. Half of what is reported are the variables not mentioned for longest.
A cache that keeps only recent tokens therefore loses values that are still needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, dial
from .steps import Line, ask_names, execute_line, random_operator, state_line

_INITIAL = 2  # working variables that get a starting value right after the constants


@dataclass(frozen=True)
class Program(GeneratedTask):
    """The dials of `program`; the default trace is about 1,000 tokens."""

    name = "program"

    lines: int = dial(88, 4, 96, "program lines; each is 7 prompt and 11 trace tokens")
    variables: int = dial(12, 3, 16, "variables that are rewritten")
    constants: int = dial(6, 1, 8, "variables written once, at the start")
    rarity: int = dial(8, 0, 100, "percent of operands that are constants")
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
                operands = []
                for _ in range(2):
                    if draw.below(100) < self.rarity:
                        operands.append(draw.choice(constants))
                        continue
                    name = working[draw.weighted(edges)]
                    while name not in values:
                        name = working[draw.weighted(edges)]
                    operands.append(name)
                target = working[draw.weighted(edges)]
                line = Line(label, operands[0], random_operator(draw), operands[1], target)
            state_line(draft, line)
            execute_line(draft, line, values)
            for name in (line.left, line.right, line.target):
                mentioned[name] = number
        known = sorted(values, key=lambda name: mentioned[name])
        report = min(self.report, len(known))
        oldest = known[: (report + 1) // 2]
        asked = oldest + draw.sample(known[len(oldest) :], report - len(oldest))
        ask_names(draft, draw.sample(asked, report), values)
        return draft


def _zipf(count: int) -> list[float]:
    """Cumulative weights 1, 1 + 1/2, 1 + 1/2 + 1/3, ..."""
    edges, total = [], 0.0
    for rank in range(count):
        total += 1 / (rank + 1)
        edges.append(total)
    return edges
