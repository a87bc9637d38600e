"""`arithmetic`: multiply or add two long numbers in columns, as on paper.

    <arithmetic> i 0 j 0 k 0 l 0 a 7 b 3 n31 4 , b i ; n32 2 , b j ; end n32 ? i j k l <think>
    n31 4 , b i carry 0 : b 3 * 4 = 2 1 + i 0 = 2 1 + carry 0 = 2 1 : i 2 carry 1 ;
    a 7 * 4 = 8 2 + j 0 = 8 2 + carry 1 = 9 2 : j 9 carry 2 ; sum n31 k 2 ;
    n32 2 , b j carry 0 : b 3 * 2 = 6 0 + j 9 = 5 1 + ... sum n32 l 0 ; </think> i 2 j 5 k 7 l 1

`a b` are the digits of the first number, the most significant first; each line `n31 4 , b i` is a
digit of the second, the least significant first, with the columns where its row starts; `i j k l`
are the columns of the result, the least significant first, into which rows are added one by one. A
result of up to 99 is written ones first (`= 2 1` is 12).

Only the running row is at work at a time, but digits of the first number are read once a row, a
column of the result once a row, and the first columns not again until the answer.

With `operation=add`, a line of the prompt is a column, and the answer reads every column back:

    <arithmetic> n31 3 + 5 ; n32 9 + 9 ; end n32 ? all <think>
    carry 0 ; n31 3 + 5 = 8 0 + carry 0 = 8 0 : n31 8 carry 0 ; n32 9 + 9 = 8 1 + carry 0 = 8 1 :
    n32 8 carry 1 ; sum n33 1 ; </think> n31 8 n32 8 n33 1
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, TaskError, choice_dial, dial
from .steps import ask_names

_FACTOR_LETTERS = LETTERS[:8]
_RESULT_LETTERS = LETTERS[8:]


@dataclass(frozen=True)
class Arithmetic(GeneratedTask):
    """The dials of `arithmetic`; the default trace is about 710 tokens."""

    name = "arithmetic"

    operation: str = choice_dial("multiply", ("multiply", "add"), "what is done with the numbers")
    digits: int = dial(5, 2, 80, "digits of each number (of both; `multiply` takes up to 8)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.operation == "multiply" and self.digits > len(_FACTOR_LETTERS):
            raise TaskError(
                f"arithmetic:operation=multiply takes at most {len(_FACTOR_LETTERS)} digits, "
                f"not {self.digits}; operation=add takes up to 80."
            )

    def draft(self, draw: Draw) -> Draft:
        """One product or sum, worked out."""
        return self._product(draw) if self.operation == "multiply" else self._sum(draw)

    def _product(self, draw: Draw) -> Draft:
        count = self.digits
        factor = {letter: draw.below(10) for letter in _FACTOR_LETTERS[:count]}
        offset = draw.below(len(_RESULT_LETTERS) - 2 * count + 1)
        columns = list(_RESULT_LETTERS[offset : offset + 2 * count])
        first = draw.below(len(LABELS) - count + 1)
        rows = [(LABELS[first + number], draw.below(10)) for number in range(count)]
        last = _FACTOR_LETTERS[count - 1]
        result = dict.fromkeys(columns, 0)
        draft = Draft(prompt=["<arithmetic>"])
        for name in columns:
            draft.prompt += [name, "0"]
        for name, digit in factor.items():
            draft.prompt += [name, str(digit)]
        for number, (label, digit) in enumerate(rows):
            draft.prompt += [label, str(digit), ",", last, columns[number], ";"]
            draft.write(f"{label} {digit} , {last} {columns[number]} carry 0 :", "cccccccc")
            carry = 0
            for place, name in enumerate(reversed(factor)):
                column = columns[number + place]
                carry = _multiply_column(draft, name, factor[name], digit, column, result, carry)
            top = columns[number + count]
            result[top] = carry
            draft.write(f"sum {label} {top} {carry} ;", "ccccc")
        ask_names(draft, rows[-1][0], columns, result)
        return draft

    def _sum(self, draw: Draw) -> Draft:
        first = draw.below(len(LABELS) - self.digits)
        labels = LABELS[first : first + self.digits + 1]
        draft = Draft(prompt=["<arithmetic>"])
        draft.write("carry 0 ;", "ccc")
        answer: list[str] = []
        carry = 0
        for label in labels[:-1]:
            left, right = draw.below(10), draw.below(10)
            draft.prompt += [label, str(left), "+", str(right), ";"]
            total = left + right + carry
            draft.write(
                f"{label} {left} + {right} = {_ones_first(left + right)} + carry {carry} = {_ones_first(total)} "
                f": {label} {total % 10} carry {total // 10} ;",
                "cccccaacccc" + "aaccaccc",
            )
            answer += [label, str(total % 10)]
            carry = total // 10
        draft.write(f"sum {labels[-1]} {carry} ; </think>", "ccccc")
        answer += [labels[-1], str(carry)]
        draft.prompt += ["end", labels[-2], "?", "all", "<think>"]
        draft.write(" ".join(answer), "A" * len(answer))
        return draft


def _multiply_column(
    draft: Draft, name: str, left: int, right: int, column: str, result: dict[str, int], carry: int
) -> int:
    """Write one column of a row, add it into the result, and return the next carry."""
    old = result[column]
    product = left * right
    total = product + old + carry
    draft.write(
        f"{name} {left} * {right} = {_ones_first(product)} + {column} {old} = {_ones_first(product + old)} "
        f"+ carry {carry} = {_ones_first(total)} : {column} {total % 10} carry {total // 10} ;",
        "crcccaaccr" + "caacccc" + "aacccccc",
    )
    result[column] = total % 10
    return total // 10


def _ones_first(number: int) -> str:
    """A number below 100 as two digits, ones first: 12 is `2 1`."""
    return f"{number % 10} {number // 10}"
