"""`program`: execute a straight-line program, then report some variables.

    <program> n04 7 : n04 q ; n05 3 : n05 b ; n06 b + q : n06 k ; ... end n91 ? q k <think>
    n04 7 : n04 q 7 ; n05 3 : n05 b 3 ; n06 b 3 + q 7 = 0 : n06 k 0 ; ... </think> q 7 k 0

Variables are used unevenly on purpose. `constants` are written once, at the start, and read rarely. The other variables
follow Zipf weights, so the last few are touched once in hundreds of tokens. Half of the reported variables are those
not mentioned for longest. A cache that keeps only recent tokens therefore loses values that are still needed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, dial
from .steps import Line, add_line, ask_names, execute_line, random_operator

_INITIAL = 3  # working variables that get a starting value right after the constants


@dataclass(frozen=True)
class Program(GeneratedTask):
    """The dials of `program`; the default trace is about 580 tokens."""

    name = "program"

    lines: int = dial(48, "program lines; each is 8 prompt and 13 trace tokens", range=(4, 96))
    variables: int = dial(12, "variables that are rewritten", range=(3, 16))
    constants: int = dial(6, "variables written once, at the start", range=(2, 8))
    rarity: int = dial(8, "percent of operands that are constants", range=(0, 90))
    report: int = dial(4, "variables to report at the end", range=(1, 8))

    def draft(self, draw: Draw) -> Draft:
        """Draw one program and execute it."""
        names = draw.sample(LETTERS, self.constants + self.variables)
        constants, working = names[: self.constants], names[self.constants :]
        zipf = list(itertools.accumulate(1 / rank for rank in range(1, len(working) + 1)))
        draft = Draft(prompt=["<program>"])
        values: dict[str, int] = {}
        mentioned: dict[str, int] = {}

        def operand() -> str:
            """Draw a variable that has a value: rarely a constant, else by the Zipf weights."""
            if draw.below(100) < self.rarity:
                return draw.choice(constants)
            name = working[draw.weighted(zipf)]
            while name not in values:
                name = working[draw.weighted(zipf)]
            return name

        first = draw.below(len(LABELS) - self.lines + 1)
        starts = constants[: max(1, self.lines - _INITIAL)] + working[:_INITIAL]
        for number, label in enumerate(LABELS[first : first + self.lines]):
            if number < len(starts):
                line = Line(label, str(draw.below(10)), "", "", starts[number])
            else:
                left, right = operand(), operand()
                while right == left:
                    right = operand()
                symbol = random_operator(draw, values[left], values[right])
                line = Line(label, left, symbol, right, working[draw.weighted(zipf)])
            add_line(draft, line)
            execute_line(draft, line, values)
            mentioned |= dict.fromkeys((line.left, line.right, line.target), number)
        known = sorted(values, key=lambda name: mentioned[name])
        count = min(self.report, len(known))
        oldest = known[: (count + 1) // 2]
        asked = oldest + draw.sample(known[len(oldest) :], count - len(oldest))
        ask_names(draft, label, draw.sample(asked, count), values)
        return draft
