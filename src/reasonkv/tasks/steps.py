"""Arithmetic in labelled lines, shared by `program` and `recall`.

A line `a = b + c` stands in the prompt as `n07 b + c : n07 a ;` and in the trace as `n07 b 3 + c 4 = 7 : n07 a 7 ;`.
A small model can learn this format for two reasons:

* A value follows its name wherever the name occurs, so a look-up is induction on the latest occurrence.
* Prompt and trace repeat the line's label, so a label at most three tokens back tells what comes next.

Values are single digits, modulo 10.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from .base import Draft, Draw, Kind

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_OPERATOR_EDGES = (0.45, 0.85, 1.0)  # products are rarer because most of them are even or 0


@dataclass(frozen=True)
class Line:
    """`target = left symbol right`, or a constant `target = left`. An operand is a name or a digit."""

    label: str
    left: str
    symbol: str
    right: str
    target: str


def random_operator(draw: Draw, left: int, right: int) -> str:
    """Draw +, - or *, a second time if the result is 0: otherwise most values would soon be 0."""
    symbol = tuple(_OPERATORS)[draw.weighted(_OPERATOR_EDGES)]
    if _OPERATORS[symbol](left, right) % 10 == 0:
        symbol = tuple(_OPERATORS)[draw.weighted(_OPERATOR_EDGES)]
    return symbol


def add_line(draft: Draft, line: Line) -> None:
    """Append the line to the prompt (8 words, or 6 for a constant)."""
    operation = [line.symbol, line.right] if line.symbol else []
    draft.prompt += [line.label, line.left, *operation, ":", line.label, line.target, ";"]


def execute_line(draft: Draft, line: Line, values: dict[str, int]) -> None:
    """Append the executed line to the trace (13 words, or 7 for a constant) and update `values`."""
    result, words = _operand(line.left, values)
    if line.symbol:
        right, more = _operand(line.right, values)
        result = _OPERATORS[line.symbol](result, right) % 10
        words = f"{words} {line.symbol} {more} = a:{result}"
    draft.write(f"{line.label} {words} : {line.label} {line.target} {result} ;")
    values[line.target] = result


def ask_names(draft: Draft, last: str, names: list[str], values: dict[str, int]) -> None:
    """Append `end n55 ? a b <think>` to the prompt and `</think> a 3 b 4` to the trace.

    The last line's label makes the end of the lines as easy to find as the next line.
    """
    draft.prompt += ["end", last, "?", *names, "<think>"]
    draft.write("</think>")
    for name in names:
        draft.write(f"{name} {values[name]}", Kind.ANSWER)


def _operand(name: str, values: dict[str, int]) -> tuple[int, str]:
    """Return an operand's value and its words in the trace."""
    if name.isdigit():
        return int(name), name
    return values[name], f"{name} r:{values[name]}"
