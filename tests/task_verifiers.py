"""Each family checked from its prompt alone, and outputs that are almost right.

Nothing here calls a generator: the verifiers parse the prompt's text, work the problem out in their own way, and
compare. So a generator that is wrong twice in the same way is still found out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

from reasonkv.tasks import Problem

_MODULO = 10


def _calculate(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % _MODULO


def _run_line(words: list[str], values: dict[str, int]) -> str:
    """Execute `n07 b + c : n07 a` (without `;`) and return the text that the trace must have."""
    label, *operation = words[: words.index(":")]
    again, target = words[words.index(":") + 1 :]
    assert again == label

    def read(word: str) -> tuple[int, str]:
        return (int(word), word) if word.isdigit() else (values[word], f"{word} {values[word]}")

    if len(operation) == 1:
        values[target], shown = read(operation[0])
        return f"{label} {shown} : {label} {target} {values[target]} ;"
    (left, left_shown), (right, right_shown) = read(operation[0]), read(operation[2])
    values[target] = _calculate(left, operation[1], right)
    shown = f"{left_shown} {operation[1]} {right_shown} = {values[target]}"
    return f"{label} {shown} : {label} {target} {values[target]} ;"


def verify_program(problem: Problem) -> None:
    """Interpret the program and compare every line of the trace and the report."""
    body, asked = problem.prompt.removeprefix("<program> ").removesuffix(" <think>").split(" ? ")
    *lines, end = (part.split() for part in body.split(" ; "))
    values: dict[str, int] = {}
    expected = [_run_line(line, values) for line in lines]
    assert end == ["end", lines[-1][0]]
    answer = " ".join(f"{name} {values[name]}" for name in asked.split())
    assert problem.trace == f"{' '.join(expected)} </think> {answer}"


def verify_recall(problem: Problem) -> None:
    """Interpret facts, chain and counted loop; a fact asked for is stated once and never rewritten.

    The last two names asked for are no facts but results of the work: they count the passes that were really done.
    """
    body, asked = problem.prompt.removeprefix("<recall> ").removesuffix(" <think>").split(" ? ")
    *lines, end = (part.split() for part in body.split(" ; "))
    values: dict[str, int] = {}
    expected: list[str] = []
    targets: list[str] = []
    while len(lines[0]) == 2:  # facts that stand in the prompt
        name, digit = lines.pop(0)
        values[name] = int(digit)
        targets.append(name)
    mark = next(index for index, line in enumerate(lines) if line[0] == "left")
    before, loop, passes = lines[:mark], lines[mark + 1 :], int(lines[mark][1][1:])
    assert end == ["end", loop[-1][0]]
    expected += [_run_line(line, values) for line in before]
    targets += [line[-1] for line in before]
    for remaining in range(passes, 0, -1):
        expected.append(f"left n{remaining:02d} ;")
        expected += [_run_line(line, values) for line in loop]
    expected.append("left n00 ;")
    work = {line[-1] for line in before[-5:]}
    assert {name for line in loop for name in (line[1], line[3], line[-1])} <= work
    *facts, one, other = asked.split()
    assert len({*facts, one, other}) == len(facts) + 2
    assert all(targets.count(name) == 1 and name not in work for name in facts)
    assert {one, other} <= work
    answer = " ".join(f"{name} {values[name]}" for name in asked.split())
    assert problem.trace == f"{' '.join(expected)} </think> {answer}"


def verify_longdoc(problem: Problem) -> None:
    """Look every question up in the document."""
    body, question = problem.prompt.removeprefix("<longdoc> ").removesuffix(" <think>").split(" ? ")
    facts = re.findall(r"(n\d\d) ([a-z]) (\d) (\d) ;", body)
    keys = [fact[:2] for fact in facts]
    assert " ".join(f"{' '.join(fact)} ;" for fact in facts) == body
    assert len(set(keys)) == len(keys)
    words = question.split()
    asked = list(zip(*[iter(word for word in words if word != "to")] * 2, strict=True))
    if "to" in words:
        asked = keys[keys.index(asked[0]) : keys.index(asked[1]) + 1] if len(asked) == 2 else asked
    answer = " ".join(f"{' '.join(facts[keys.index(key)])} ;" for key in asked)
    assert problem.trace == f"</think> {answer}"


def _graph(problem: Problem) -> tuple[dict[str, list[str]], str, str]:
    """Edges in the order of their letters, the start and the goal."""
    body, question = problem.prompt.removeprefix("<search> ").removesuffix(" <think>").split(" ? ")
    edges: dict[str, list[str]] = {}
    closed: set[str] = set()
    statements = body.split(" ; ")
    for node, letter, other in (statement.split() for statement in statements[:-1]):
        assert node not in closed
        assert letter == "abcdefghij"[len(edges.setdefault(node, []))]
        if other == "none":
            closed.add(node)
        else:
            edges[node].append(other)
    assert closed == set(edges)
    assert all(len(set(some)) == len(some) for some in edges.values())
    states = statements[-1].split()
    start, to, goal = question.split()
    assert to == "to"
    assert dict(zip(states[::2], states[1::2], strict=True)) == {n: "2" if n == goal else "0" for n in edges}
    return edges, start, goal


def verify_search(problem: Problem) -> None:
    """Follow the trace step by step: only what a depth-first search may do next is allowed."""
    edges, start, goal = _graph(problem)
    thinking, answer = problem.trace.split(" </think> ")
    way: list[str] = []  # from the start to where the search is
    seen: set[str] = set()
    entering: str | None = start
    tried = 0  # edges of the last node of `way`, since it was entered or come back to
    *steps, last = (step.split() for step in thinking.split(" ; "))
    for words in steps:
        if entering is not None:
            assert entering not in seen and entering != goal
            way.append(entering)
            seen.add(entering)
            assert words == [_place(way), entering, "go", entering, "1"]
            tried, entering = 0, None
        elif "back" in words:
            assert tried > len(edges[way.pop()])
            assert words == [_place(way), way[-1], "back", way[-1], "1"]
            tried = 0
        else:
            assert words[:2] == [way[-1], "abcde"[tried]]
            if tried == len(edges[way[-1]]):
                assert words[2:] == ["none"]
            else:
                child = edges[way[-1]][tried]
                state = "2" if child == goal else "1" if child in seen else "0"
                assert words[2:] == [child, state]
                entering = child if state != "1" else None
            tried += 1
    assert entering == goal
    way.append(goal)
    assert last == [_place(way), goal, "end"]
    assert way[0] == start and all(child in edges[parent] for parent, child in pairwise(way))
    assert answer == " ".join(f"{_place(way[: i + 1])} {way[i]}" for i in reversed(range(len(way))))


def _place(way: list[str]) -> str:
    """The letter of the stack's uppermost place: f for the start alone, z for a way of 21 nodes."""
    return "fghijklmnopqrstuvwxyz"[len(way) - 1]


_COLUMN = re.compile(
    r"([a-h]) (\d) \* (\d) = (\d) (\d) \+ ([i-z]) (\d) = (\d) (\d) \+ carry (\d) = (\d) (\d) : ([i-z]) (\d) carry (\d) ;"
)


def _product(problem: Problem) -> None:
    body = problem.prompt.split(" ? ")[0]
    digits = re.split(r" n\d\d ", body)[0]
    columns = re.findall(r"\b([i-z]) 0\b", digits)
    factor = re.findall(r"\b([a-h]) (\d)\b", digits)
    rows = re.findall(r"(n\d\d) (\d) , ([a-h]) ([i-z]) ;", body)
    one = int("".join(digit for _, digit in factor))
    two = int("".join(digit for _, digit, _, _ in reversed(rows)))
    result = dict.fromkeys(columns, 0)
    thinking, answer = problem.trace.split(" </think> ")
    blocks = re.findall(r"(n\d\d) (\d) , ([a-h]) ([i-z]) carry 0 : (.*?) sum (n\d\d) ([i-z]) (\d) ;", thinking)
    assert [block[:4] for block in blocks] == rows
    for place, (label, multiplier, last, start, work, again, top, top_digit) in enumerate(blocks):
        assert (last, start, again) == (factor[-1][0], columns[place], label)
        steps = _COLUMN.findall(work)
        assert not _COLUMN.sub("", work).strip()
        assert [step[:2] for step in steps] == list(reversed(factor))
        carry = 0
        for offset, step in enumerate(steps):
            digit, by, p0, p1, column, old, s0, s1, carried, t0, t1, to, new, out = map(_number, step[1:])
            assert by == int(multiplier) and column == to == columns[place + offset]
            assert digit * by == p0 + 10 * p1
            assert old == result[column]
            assert digit * by + old == s0 + 10 * s1
            assert carried == carry
            assert digit * by + old + carry == t0 + 10 * t1
            assert (new, out) == (t0, t1)
            result[column], carry = new, out
        assert top == columns[place + len(factor)]
        result[top] = int(top_digit)
        assert result[top] == carry
        done = two % 10 ** (place + 1)
        assert sum(result[column] * 10**power for power, column in enumerate(columns)) == one * done
    assert answer == " ".join(f"{name} {str(one * two).zfill(len(columns))[-1 - i]}" for i, name in enumerate(columns))
    assert problem.prompt.endswith(f" end {rows[-1][0]} ? {' '.join(columns)} <think>")


def _number(word: str) -> int | str:
    return int(word) if word.isdigit() else word


_SUM = re.compile(
    r"(n\d\d) (\d) \+ (\d) = (\d) (\d) \+ carry (\d) = (\d) (\d) : (n\d\d) (\d) carry (\d) ;",
)


def _total(problem: Problem) -> None:
    lines = re.findall(r"(n\d\d) (\d) \+ (\d) ;", problem.prompt)
    one, two = (int("".join(line[which] for line in reversed(lines))) for which in (1, 2))
    thinking, answer = problem.trace.split(" </think> ")
    steps = _SUM.findall(thinking)
    assert [step[:3] for step in steps] == lines
    assert thinking.startswith("carry 0 ; ")
    carry, low_one, low_two, done = 0, 0, 0, 0
    for power, step in enumerate(steps):
        left, right, p0, p1, carried, t0, t1 = map(int, step[1:8])
        assert left + right == p0 + 10 * p1
        assert carried == carry
        assert left + right + carry == t0 + 10 * t1
        assert step[8:] == (step[0], step[6], step[7])
        low_one, low_two, done = (x + d * 10**power for x, d in ((low_one, left), (low_two, right), (done, t0)))
        carry = t1
        assert done + carry * 10 ** (power + 1) == low_one + low_two
    words = answer.split()
    assert thinking.endswith(f"sum {words[-2]} {carry} ;")
    assert int(words[-2][1:]) == int(lines[-1][0][1:]) + 1
    assert words[:-2:2] == [line[0] for line in lines]
    assert int("".join(reversed(words[1::2]))) == one + two


def verify_arithmetic(problem: Problem) -> None:
    """Redo every column with Python integers; after every row the columns hold the product so far."""
    (_product if "*" in problem.trace else _total)(problem)


VERIFIERS: dict[str, Callable[[Problem], None]] = {
    "program": verify_program,
    "search": verify_search,
    "arithmetic": verify_arithmetic,
    "recall": verify_recall,
    "longdoc": verify_longdoc,
}


def items_of(problem: Problem) -> list[list[str]]:
    """The answer in its items: name and value, one fact, or one place of the way and its node."""
    words = problem.answer.split()
    size = 5 if problem.task == "longdoc" else 2
    return [words[i : i + size] for i in range(0, len(words), size)]


def near_misses(problem: Problem, other: Problem) -> dict[str, str]:
    """Outputs that are almost right, by name; those that chance made right are left out."""
    thinking = problem.trace.split("</think>")[0].strip()
    words, items = problem.answer.split(), items_of(problem)
    digits = [i for i, word in enumerate(words) if word.isdigit()]
    labels = [i for i, word in enumerate(words) if re.fullmatch(r"n\d\d", word)]
    names = [i for i, word in enumerate(words) if re.fullmatch(r"[a-z]|n\d\d", word)]
    middle = len(words) // 2

    def put(replacements: dict[int, str]) -> list[str]:
        return [replacements.get(i, word) for i, word in enumerate(words)]

    def swapped(places: list[int]) -> list[str]:
        one = places[0] if places else 0
        return next((put({one: words[o], o: words[one]}) for o in places if words[o] != words[one]), words)

    def up(index: int) -> str:
        word = words[index]
        return f"n{(int(word[1:]) + 1) % 96:02d}" if word[0] == "n" else str((int(word) + 1) % 10)

    def joined(parts: list[list[str]]) -> list[str]:
        return [word for part in parts for word in part]

    answers = {
        "one digit off": put({digits[-1]: up(digits[-1])}) if digits else words,
        "every digit off": put({i: up(i) for i in digits}),
        "two values swapped": swapped(digits),
        "two names swapped": swapped(names),
        "off-by-one label": put({labels[0]: up(labels[0])}) if labels else words,
        "a digit written twice": put({digits[0]: words[digits[0]] * 2}) if digits else words,
        "first item missing": joined(items[1:]),
        "a middle item missing": joined(items[: len(items) // 2] + items[len(items) // 2 + 1 :]),
        "last item missing": joined(items[:-1]),
        "an extra item": joined([*items, *items_of(other)[-1:]]),
        "an item repeated": joined([items[0], *items]),
        "wrong order": joined([items[-1], *items[1:-1], items[0]]) if len(items) > 1 else words,
        "words reversed": words[::-1],
        "values without names": [words[i] for i in digits],
        "separators lost": [word for word in words if word != ";"],
        "truncated by one token": words[:-1],
        "empty answer": [],
        "answer of another problem": other.answer.split(),
        "answer twice": words + words,
        "text after the answer": [*words, "all", "go"],
        "full stop after the answer": [*words, "."],
        "prompt echoed": [*problem.prompt.split(), *words],
        "pad inside": [*words[:middle], "<pad>", *words[middle:]],
        "end of sequence inside": [*words[:middle], "<eos>", *words[middle:]],
        "end of sequence first": ["<eos>", *words],
        "unknown word inside": put({middle: "<unk>"}),
        "second </think>": [*words, "</think>", *words],
        "</think> inside": [*words[:middle], "</think>", *words[middle:]],
        "uppercase": [word.upper() for word in words],
        "glued tokens": [words[0] + words[1], *words[2:]],
        "comma between items": joined([[*item, ","] for item in items[:-1]] + items[-1:]),
    }
    outputs = {name: f"{thinking} </think> {' '.join(some)}" for name, some in answers.items() if some != words}
    return outputs | {
        "no </think>": f"{thinking} {problem.answer}",
        "answer inside the thinking only": f"{thinking} {problem.answer} </think>",
        "answer before the thinking": f"{problem.answer} </think> {thinking}".strip(),
        "nothing at all": "",
        "only the prompt": problem.prompt,
    }
