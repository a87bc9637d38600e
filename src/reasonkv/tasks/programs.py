"""Families in labelled lines: `program`, `recall` and `arithmetic`.

A line `a = b + c` stands in the prompt as `n07 b + c : n07 a ;` and in the trace as `n07 b 3 + c 4 = 7 : n07 a 7 ;`.
A small model can learn this format for two reasons:

* A value follows its name wherever the name occurs, so a look-up is induction on the latest occurrence.
* Prompt and trace repeat the line's label, so a label at most three tokens back tells what comes next.

Values are single digits, modulo 10.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field

from .base import LABELS, LETTERS, Draft, Draw, GeneratedTask, Kind, TaskError, dial

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_OPERATOR_EDGES = (0.45, 0.85, 1.0)  # products are rarer because most of them are even or 0


@dataclass(frozen=True)
class Line:
    """`target = left symbol right`, or a constant `target = left`. An operand is a name or a digit."""

    label: str
    target: str
    left: str
    symbol: str = ""
    right: str = ""


@dataclass
class Listing(Draft):
    """A draft of lines, with the values of names so far."""

    values: dict[str, int] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Append a line to the prompt (8 words, or 6 for a constant)."""
        self.ask(f"{line.label} {line.left} {line.symbol} {line.right} : {line.label} {line.target} ;")

    def execute(self, line: Line) -> None:
        """Append the executed line to the trace (13 words, or 7 for a constant), and keep its value."""
        result, words = self._operand(line.left)
        if line.symbol:
            right, more = self._operand(line.right)
            result = _OPERATORS[line.symbol](result, right) % 10
            words = f"{words} {line.symbol} {more} = a:{result}"
        self.write(f"{line.label} {words} : {line.label} {line.target} {result} ;")
        self.values[line.target] = result

    def ask_names(self, last: str, names: list[str]) -> None:
        """Append `end n55 ? a b <think>` to the prompt and `</think> a 3 b 4` to the trace.

        The last line's label makes the end of the lines as easy to find as the next line.
        """
        self.ask(f"end {last} ? {' '.join(names)} <think>")
        self.write("</think>")
        for name in names:
            self.write(f"{name} {self.values[name]}", Kind.ANSWER)

    def _operand(self, name: str) -> tuple[int, str]:
        """Return an operand's value and its words in the trace."""
        return (int(name), name) if name.isdigit() else (self.values[name], f"{name} r:{self.values[name]}")


def random_operator(draw: Draw, left: int, right: int) -> str:
    """Draw +, - or *, a second time if the result is 0: otherwise most values would soon be 0."""
    symbol = tuple(_OPERATORS)[draw.weighted(_OPERATOR_EDGES)]
    if _OPERATORS[symbol](left, right) % 10 == 0:
        symbol = tuple(_OPERATORS)[draw.weighted(_OPERATOR_EDGES)]
    return symbol


@dataclass(frozen=True)
class Program(GeneratedTask):
    """`program`: execute a straight-line program, then report some variables.

        <program> n04 7 : n04 q ; n05 3 : n05 b ; n06 b + q : n06 k ; ... end n91 ? q k <think>
        n04 7 : n04 q 7 ; n05 3 : n05 b 3 ; n06 b 3 + q 7 = 0 : n06 k 0 ; ... </think> q 7 k 0

    Variables are used unevenly on purpose. `constants` are written once, at the start, and read rarely. The others
    follow Zipf weights, so the last few are touched once in hundreds of tokens. Half of the reported variables are
    those not mentioned for longest. A cache that keeps only recent tokens therefore loses values that are still
    needed. The default trace is about 580 tokens.
    """

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
        draft, mentioned = Listing(["<program>"]), dict[str, int]()

        def operand() -> str:
            """Draw a variable that has a value: rarely a constant, else by the Zipf weights."""
            if draw.below(100) < self.rarity:
                return draw.choice(constants)
            name = working[draw.weighted(zipf)]
            while name not in draft.values:
                name = working[draw.weighted(zipf)]
            return name

        starts = constants[: max(1, self.lines - 3)] + working[:3]  # three working variables begin with a value
        for number, label in enumerate(draw.run(LABELS, self.lines)):
            if number < len(starts):
                line = Line(label, starts[number], str(draw.below(10)))
            else:
                left, right = operand(), operand()
                while right == left:
                    right = operand()
                symbol = random_operator(draw, draft.values[left], draft.values[right])
                line = Line(label, working[draw.weighted(zipf)], left, symbol, right)
            draft.add(line)
            draft.execute(line)
            mentioned |= dict.fromkeys((line.left, line.right, line.target), number)
        known = sorted(draft.values, key=lambda name: mentioned[name])
        count = min(self.report, len(known))
        oldest = known[: (count + 1) // 2]
        asked = oldest + draw.sample(known[len(oldest) :], count - len(oldest))
        draft.ask_names(label, draw.sample(asked, count))
        return draft


_WORK_NAMES, _WORK_ASKED = 5, 2
_LINE_TOKENS = 13


@dataclass(frozen=True)
class Recall(GeneratedTask):
    """`recall`: facts stated once, then unrelated work, then questions about the facts.

    The value of a fact stands only in the trace: the prompt gives a chain of updates of an accumulator (here `u`), and
    each fact is a reading of it. No single forward pass can recompute a lost fact. The work is a loop whose passes
    count down. The last two questions ask for results of the work, because a method that skips passes would come
    closer to the facts.

        <recall> n10 7 : n10 u ; n11 u * 3 : n11 u ; n12 u + 5 : n12 k ; ... n30 2 : n30 a ; ...
        left n02 ; n40 a + b : n40 c ; n41 ... ; end n47 ? k m c b <think>
        n10 7 : n10 u 7 ; n11 u 7 * 3 = 1 : n11 u 1 ; n12 u 1 + 5 = 6 : n12 k 6 ; ...
        n30 2 : n30 a 2 ; ... left n02 ; n40 a 2 + b 4 = 6 : n40 c 6 ; n41 ... ;
        left n01 ; n40 ... ; left n00 ; </think> k 6 m 3 c 1 b 4

    With `where=prompt` the facts stand in the prompt as `k 6 ;` and are not restated. The default trace is about 650
    tokens.
    """

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
        loop_lines, passes = self._loop_shape(draw)
        chain = 1 + 2 * self.facts if where == "trace" else 0
        labels = draw.run(LABELS, chain + _WORK_NAMES + loop_lines)
        draft = Listing(["<recall>"])
        if where == "prompt":
            for key in keys:
                draft.values[key] = draw.below(10)
                draft.ask(f"{key} {draft.values[key]} ;")
        before = [Line(label, accumulator, str(draw.below(10))) for label in labels[:chain][:1]]
        for number, label in enumerate(labels[1:chain]):  # in turn the accumulator is updated and a fact read from it
            symbol = random_operator(draw, 1, 2)
            # Multiplication by 1, 3 or 7 is one-to-one modulo 10, so the accumulator can still be any digit.
            operand = draw.choice((1, 3, 7)) if symbol == "*" else draw.between(1, 9)
            target = keys[number // 2] if number % 2 else accumulator
            before.append(Line(label, target, accumulator, symbol, str(operand)))
        before += [Line(*names, str(draw.below(10))) for names in zip(labels[chain:], work, strict=False)]
        for line in before:
            draft.add(line)
            draft.execute(line)
        loop = []
        for label in labels[chain + _WORK_NAMES :]:
            left, right = draw.sample(work, 2)
            symbol = random_operator(draw, draft.values[left], draft.values[right])
            loop.append(Line(label, draw.choice(work), left, symbol, right))
        draft.ask(f"left {LABELS[passes]} ;")
        for line in loop:
            draft.add(line)
        for remaining in range(passes, 0, -1):
            # The prompt states the first count; every later one is a subtraction.
            draft.write(f"left {'' if remaining == passes else 'a:'}{LABELS[remaining]} ;")
            for line in loop:
                draft.execute(line)
        draft.write(f"left a:{LABELS[0]} ;")
        asked = draw.sample(keys, min(self.ask, len(keys))) + draw.sample(work, _WORK_ASKED)
        draft.ask_names(labels[-1], asked)
        return draft

    def _loop_shape(self, draw: Draw) -> tuple[int, int]:
        """Return (lines, passes) of a loop of about `distance` tokens: one within 4 %, or the closest."""
        shapes = []
        for lines in range(5, 13):
            size = _LINE_TOKENS * lines + 3
            passes = max(1, min(len(LABELS) - 1, round(self.distance / size)))
            shapes.append((abs(passes * size - self.distance), lines, passes))
        shapes.sort()
        _, lines, passes = draw.choice([one for one in shapes if one[0] <= 0.04 * self.distance] or shapes[:1])
        return lines, passes


_FACTOR_LETTERS, _RESULT_LETTERS = LETTERS[:8], LETTERS[8:]


@dataclass(frozen=True)
class Arithmetic(GeneratedTask):
    """`arithmetic`: multiply or add two long numbers in columns, as on paper.

        <arithmetic> i 0 j 0 k 0 l 0 a 7 b 3 n31 4 , b i ; n32 2 , b j ; end n32 ? i j k l <think>
        n31 4 , b i carry 0 : b 3 * 4 = 2 1 + i 0 = 2 1 + carry 0 = 2 1 : i 2 carry 1 ;
        a 7 * 4 = 8 2 + j 0 = 8 2 + carry 1 = 9 2 : j 9 carry 2 ; sum n31 k 2 ;
        n32 2 , b j carry 0 : b 3 * 2 = 6 0 + j 9 = 5 1 + ... sum n32 l 0 ; </think> i 2 j 5 k 7 l 1

    `a b` are the digits of the first number, the most significant first. Each line `n31 4 , b i` is a digit of the
    second number, the least significant first, with the columns where its row starts. `i j k l` are the columns of the
    result, the least significant first. Rows are added into them one by one. A result up to 99 is written ones first
    (`= 2 1` is 12).

    Only the running row is active at a time. A row reads each digit of the first number and its columns of the result
    once. The first columns are not read again until the answer.

    With `operation=add`, a line of the prompt is a column, and the answer reads every column back:

        <arithmetic> n31 3 + 5 ; n32 9 + 9 ; end n32 ? all <think>
        carry 0 ; n31 3 + 5 = 8 0 + carry 0 = 8 0 : n31 8 carry 0 ; n32 9 + 9 = 8 1 + carry 0 = 8 1 :
        n32 8 carry 1 ; sum n33 1 ; </think> n31 8 n32 8 n33 1

    The default trace is about 710 tokens.
    """

    name = "arithmetic"

    operation: str = dial("multiply", "what is done with the numbers", choices=("multiply", "add"))
    digits: int = dial(5, "digits of each number (of both; `multiply` takes up to 8)", range=(2, 80))

    def __post_init__(self) -> None:
        super().__post_init__()
        most = len(_FACTOR_LETTERS)
        if self.operation == "multiply" and self.digits > most:
            raise TaskError(
                f"arithmetic:operation=multiply takes at most {most} digits, not {self.digits}; operation=add takes "
                "up to 80."
            )

    def draft(self, draw: Draw) -> Draft:
        """Draw one product or sum and work it out."""
        return self._product(draw) if self.operation == "multiply" else self._sum(draw)

    def _product(self, draw: Draw) -> Draft:
        count, draft = self.digits, Listing(["<arithmetic>"])
        factor = {letter: draw.below(10) for letter in _FACTOR_LETTERS[:count]}
        columns = list(draw.run(_RESULT_LETTERS, 2 * count))
        rows = [(label, draw.below(10)) for label in draw.run(LABELS, count)]
        last, result = _FACTOR_LETTERS[count - 1], draft.values
        result |= dict.fromkeys(columns, 0)
        for name, digit in (result | factor).items():
            draft.ask(f"{name} {digit}")
        for number, (label, right) in enumerate(rows):
            draft.ask(f"{label} {right} , {last} {columns[number]} ;")
            draft.write(f"{label} {right} , {last} {columns[number]} carry 0 :")
            carry = 0
            for column, (name, left) in zip(columns[number:], reversed(factor.items()), strict=False):
                old, product = result[column], left * right
                total = product + old + carry
                draft.write(
                    f"{name} r:{left} * {right} = {_calculated(product)} + {column} r:{old} "
                    f"= {_calculated(product + old)} + carry {carry} = {_calculated(total)} "
                    f": {column} {total % 10} carry {total // 10} ;"
                )
                result[column], carry = total % 10, total // 10
            result[columns[number + count]] = carry
            draft.write(f"sum {label} {columns[number + count]} {carry} ;")
        draft.ask_names(rows[-1][0], columns)
        return draft

    def _sum(self, draw: Draw) -> Draft:
        *labels, top = draw.run(LABELS, self.digits + 1)
        draft = Draft(["<arithmetic>"])
        draft.write("carry 0 ;")
        answer, carry = "", 0
        for label in labels:
            left, right = draw.below(10), draw.below(10)
            total = left + right + carry
            draft.ask(f"{label} {left} + {right} ;")
            draft.write(
                f"{label} {left} + {right} = {_calculated(left + right)} + carry {carry} = {_calculated(total)} "
                f": {label} a:{total % 10} carry {total // 10} ;"
            )
            answer += f"{label} {total % 10} "
            carry = total // 10
        draft.ask(f"end {labels[-1]} ? all <think>")
        draft.write(f"sum {top} {carry} ; </think>")
        draft.write(f"{answer} {top} {carry}", Kind.ANSWER)
        return draft


def _calculated(number: int) -> str:
    """Write a number below 100 as two calculated digits, ones first: 12 is `2 1`."""
    return f"a:{number % 10} a:{number // 10}"
