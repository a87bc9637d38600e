"""Straight-line arithmetic, one labelled line at a time: shared by `program` and `recall`.

A line `a = b + c` stands in the prompt as `n07 b + c : n07 a ;` and in the trace, executed, as
`n07 b 3 + c 4 = 7 : n07 a 7 ;`. The format is chosen so that a small model can learn it:

* a value stands right after its name wherever the name occurs, so that looking up a value is plain
  induction on the latest occurrence;
* prompt and trace carry the same line labels, twice a line, so that whatever comes next is found by
  a label at most three tokens back.

Values are single digits, modulo 10.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Draft, Draw

OPERATORS = "+-*"
_OPERATOR_EDGES = (0.45, 0.85, 1.0)  # products are rarer: most of them are even or 0


@dataclass(frozen=True)
class Line:
    """`target = left operator right`; a constant is `target = left`. Operands: name or digit."""

    label: str
    left: str
    operator: str
    right: str
    target: str


def random_operator(draw: Draw, left: int, right: int) -> str:
    """+, - or *, drawn a second time if the result is 0: zeros would soon be most of all values."""
    operator = OPERATORS[draw.weighted(_OPERATOR_EDGES)]
    if calculate(operator, left, right) == 0:
        operator = OPERATORS[draw.weighted(_OPERATOR_EDGES)]
    return operator


def calculate(operator: str, left: int, right: int) -> int:
    """The result modulo 10."""
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    return (left * right) % 10


def state_line(draft: Draft, line: Line) -> None:
    """Write the line, unexecuted, into the prompt (8 words, or 6 for a constant)."""
    operation = [line.operator, line.right] if line.operator else []
    draft.prompt += [line.label, line.left, *operation, ":", line.label, line.target, ";"]


def execute_line(draft: Draft, line: Line, values: dict[str, int]) -> None:
    """Write the line, executed, into the trace and update `values` (13 words, or 7 for a constant)."""
    left, words, kinds = _operand(line.left, values)
    if not line.operator:
        result = left
        draft.write(f"{line.label} {words}", f"c{kinds}")
    else:
        right, more, more_kinds = _operand(line.right, values)
        result = calculate(line.operator, left, right)
        draft.write(
            f"{line.label} {words} {line.operator} {more} = {result}",
            f"c{kinds}c{more_kinds}ca",
        )
    draft.write(f": {line.label} {line.target} {result} ;", "ccccc")
    values[line.target] = result


def ask_names(draft: Draft, last: str, names: list[str], values: dict[str, int]) -> None:
    """Put `end n55 ? a b <think>` into the prompt and `</think> a 3 b 4` into the trace.

    Naming the last line's label makes the end of the lines as easy to find as the next line.
    """
    draft.prompt += ["end", last, "?", *names, "<think>"]
    draft.write("</think>", "c")
    for name in names:
        draft.write(f"{name} {values[name]}", "AA")


def _operand(name: str, values: dict[str, int]) -> tuple[int, str, str]:
    """An operand's value, its words in the trace, and their kinds."""
    if name.isdigit():
        return int(name), name, "c"
    return values[name], f"{name} {values[name]}", "cr"
