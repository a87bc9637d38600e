"""Straight-line arithmetic, one labelled line at a time: shared by `program` and `recall`.

A line stands in the prompt as `n07 b + c = a ;` and in the trace, executed, as
`n07 b 3 + c 4 = 7 a 7 ;`. Two things in this format make it learnable by a small model: a value
stands right after its name wherever the name occurs, so that looking up a value is plain induction
on the latest occurrence; and prompt and trace carry the same line labels, so that the next line is
found by its label. Values are single digits, modulo 10.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Draft, Draw

OPERATORS = "+-*"
_OPERATOR_EDGES = (0.4, 0.8, 1.0)  # products are rarer: they tend to collapse to 0


@dataclass(frozen=True)
class Line:
    """`left operator right = target`; a constant is `left = target`. Operands: name or digit."""

    label: str
    left: str
    operator: str
    right: str
    target: str


def random_operator(draw: Draw) -> str:
    """+, - or *."""
    return OPERATORS[draw.weighted(_OPERATOR_EDGES)]


def calculate(operator: str, left: int, right: int) -> int:
    """The result modulo 10."""
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    return (left * right) % 10


def state_line(draft: Draft, line: Line) -> None:
    """Write the line, unexecuted, into the prompt (7 words, or 5 for a constant)."""
    if line.operator:
        draft.prompt += [line.label, line.left, line.operator, line.right, "=", line.target, ";"]
    else:
        draft.prompt += [line.label, line.left, "=", line.target, ";"]


def execute_line(draft: Draft, line: Line, values: dict[str, int]) -> None:
    """Write the line, executed, into the trace and update `values` (at most 11 words)."""
    left, words, kinds = _operand(line.left, values)
    if not line.operator:
        result = left
        draft.write(f"{line.label} {words} = {result}", f"c{kinds}cc")
    else:
        right, more, more_kinds = _operand(line.right, values)
        result = calculate(line.operator, left, right)
        draft.write(
            f"{line.label} {words} {line.operator} {more} = {result}",
            f"c{kinds}c{more_kinds}ca",
        )
    draft.write(f"{line.target} {result} ;", "ccc")
    values[line.target] = result


def ask_names(draft: Draft, names: list[str], values: dict[str, int]) -> None:
    """Put the question `? a b <think>` into the prompt and `</think> a 3 b 4` into the trace."""
    draft.prompt += ["?", *names, "<think>"]
    draft.write("</think>", "c")
    for name in names:
        draft.write(f"{name} {values[name]}", "AA")


def _operand(name: str, values: dict[str, int]) -> tuple[int, str, str]:
    """An operand's value, its words in the trace, and their kinds."""
    if name.isdigit():
        return int(name), name, "c"
    return values[name], f"{name} {values[name]}", "cr"
