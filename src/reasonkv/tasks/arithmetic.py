"""`arithmetic`: multiply or add two long numbers in columns, as on paper.

    <arithmetic> i 0 j 0 k 0 l 0 a 7 b 3 n31 4 , b i ; n32 2 , b j ; end n32 ? i j k l <think>
    n31 4 , b i carry 0 : b 3 * 4 = 2 1 + i 0 = 2 1 + carry 0 = 2 1 : i 2 carry 1 ;
    a 7 * 4 = 8 2 + j 0 = 8 2 + carry 1 = 9 2 : j 9 carry 2 ; sum n31 k 2 ;
    n32 2 , b j carry 0 : b 3 * 2 = 6 0 + j 9 = 5 1 + ... sum n32 l 0 ; </think> i 2 j 5 k 7 l 1

`a b` are the digits of the first number, the most significant first. Each line `n31 4 , b i` is a digit of the second
number, the least significant first, with the columns where its row starts. `i j k l` are the columns of the result, the
least significant first. Rows are added into them one by one. A result up to 99 is written ones first (`= 2 1` is 12).

Only the running row is active at a time. A row reads each digit of the first number and its columns of the result once.
The first columns are not read again until the answer.

With `operation=add`, a line of the prompt is a column, and the answer reads every column back:

    <arithmetic> n31 3 + 5 ; n32 9 + 9 ; end n32 ? all <think>
    carry 0 ; n31 3 + 5 = 8 0 + carry 0 = 8 0 : n31 8 carry 0 ; n32 9 + 9 = 8 1 + carry 0 = 8 1 :
    n32 8 carry 1 ; sum n33 1 ; </think> n31 8 n32 8 n33 1
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, Kind, TaskError, dial
from .steps import ask_names

_FACTOR_LETTERS = LETTERS[:8]
_RESULT_LETTERS = LETTERS[8:]


@dataclass(frozen=True)
class Arithmetic(GeneratedTask):
    """The dials of `arithmetic`; the default trace is about 710 tokens."""

    name = "arithmetic"

    operation: str = dial("multiply", "what is done with the numbers", choices=("multiply", "add"))
    digits: int = dial(5, "digits of each number (of both; `multiply` takes up to 8)", range=(2, 80))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.operation == "multiply" and self.digits > len(_FACTOR_LETTERS):
            raise TaskError(
                f"arithmetic:operation=multiply takes at most {len(_FACTOR_LETTERS)} digits, "
                f"not {self.digits}; operation=add takes up to 80."
            )

    def draft(self, draw: Draw) -> Draft:
        """Draw one product or sum and work it out."""
        return self._product(draw) if self.operation == "multiply" else self._sum(draw)

    def _product(self, draw: Draw) -> Draft:
        count = self.digits
        factor = {letter: draw.below(10) for letter in _FACTOR_LETTERS[:count]}
        offset = draw.below(len(_RESULT_LETTERS) - 2 * count + 1)
        columns = list(_RESULT_LETTERS[offset : offset + 2 * count])
        first = draw.below(len(LABELS) - count + 1)
        rows = [(label, draw.below(10)) for label in LABELS[first : first + count]]
        last = _FACTOR_LETTERS[count - 1]
        result = dict.fromkeys(columns, 0)
        draft = Draft(prompt=["<arithmetic>"])
        for name, digit in (result | factor).items():
            draft.prompt += [name, str(digit)]
        for number, (label, right) in enumerate(rows):
            draft.prompt += [label, str(right), ",", last, columns[number], ";"]
            draft.write(f"{label} {right} , {last} {columns[number]} carry 0 :")
            carry = 0
            for column, (name, left) in zip(columns[number:], reversed(factor.items()), strict=False):
                old = result[column]
                product, total = left * right, left * right + old + carry
                draft.write(
                    f"{name} r:{left} * {right} = {_calculated(product)} + {column} r:{old} "
                    f"= {_calculated(product + old)} + carry {carry} = {_calculated(total)} "
                    f": {column} {total % 10} carry {total // 10} ;"
                )
                result[column], carry = total % 10, total // 10
            top = columns[number + count]
            result[top] = carry
            draft.write(f"sum {label} {top} {carry} ;")
        ask_names(draft, rows[-1][0], columns, result)
        return draft

    def _sum(self, draw: Draw) -> Draft:
        first = draw.below(len(LABELS) - self.digits)
        *labels, top = LABELS[first : first + self.digits + 1]
        draft = Draft(prompt=["<arithmetic>"])
        draft.write("carry 0 ;")
        answer, carry = "", 0
        for label in labels:
            left, right = draw.below(10), draw.below(10)
            total = left + right + carry
            draft.prompt += [label, str(left), "+", str(right), ";"]
            draft.write(
                f"{label} {left} + {right} = {_calculated(left + right)} + carry {carry} = {_calculated(total)} "
                f": {label} a:{total % 10} carry {total // 10} ;"
            )
            answer += f"{label} {total % 10} "
            carry = total // 10
        draft.prompt += ["end", labels[-1], "?", "all", "<think>"]
        draft.write(f"sum {top} {carry} ; </think>")
        draft.write(f"{answer} {top} {carry}", Kind.ANSWER)
        return draft


def _calculated(number: int) -> str:
    """Write a number below 100 as two calculated digits, ones first: 12 is `2 1`."""
    return f"a:{number % 10} a:{number // 10}"
