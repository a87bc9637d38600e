"""Graders that run code: the answer's own test code, or LiveCodeBench's test cases (arXiv 2403.07974)."""

from __future__ import annotations

import base64
import json
import pickletools
import re
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from reasonkv.tasks.base import UNREAD, Grade, TaskError
from reasonkv.tasks.sandbox import run_python

_BLOCK = re.compile(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)```", re.DOTALL)
_TEST_SECONDS = 6.0  # LiveCodeBench's limit for one test
_TEST_MEGABYTES = 4096
_STARRED = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
)  # fmt: skip
# what a solution may take for granted
_PREAMBLE = "\n".join([
    *(f"from {name} import *" for name in _STARRED), *(f"import {name}" for name in _STARRED[:-2]),
    "sys.setrecursionlimit(50000)\n",
])  # fmt: skip
_CALL = """
import json as _json, sys as _sys
_given = [_json.loads(_line) for _line in _sys.stdin.read().split("\\n")]
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else globals()[{name!r}]
_found = _function(*_given)
print("\\n" + _json.dumps(_found))
"""


def grade_code(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Score 1 if the last block of Python code and the answer's test code end without an error, in 20 s and 1 GiB."""
    blocks = _BLOCK.findall(output)
    if not blocks:
        return UNREAD
    runs = (run_python(f"{blocks[-1]}\n\n{test}\n") for test in answers)
    return Grade(float(all(run.ok for run in runs)), blocks[-1].strip())


def grade_livecodebench(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Run the text between the last two code fences on every test of the row; all must pass.

    A test gives standard input and compares lines of output (numbers as decimals), or calls a function and compares
    what it returns. It has 6 s, 4 GiB and no network.

    Raises:
        TaskError: the row has no readable tests.
    """
    lines = output.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    if len(fences) < 2:
        return UNREAD
    code = "\n".join(lines[fences[-2] + 1 : fences[-1]])
    given = row.get("metadata") or "{}"
    name = (json.loads(given) if isinstance(given, str) else given).get("func_name")
    program = f"{_PREAMBLE}\n{code}\n" + ("" if name is None else _CALL.format(name=name))
    for test in read_tests(row):
        done = run_python(program, test["input"], seconds=_TEST_SECONDS, megabytes=_TEST_MEGABYTES)
        same = _same_lines if name is None else _same_value
        if not done.ok or not same(done.output, test["output"]):
            return Grade(0.0, code)
    return Grade(1.0, code)


def read_tests(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the public and private tests of a row of LiveCodeBench: dictionaries with `input` and `output`.

    Private tests are JSON, or JSON in a pickled text. The pickle is read as data: nothing of it runs.

    Raises:
        TaskError: they cannot be read.
    """
    try:
        public, private = json.loads(row["public_test_cases"]), row["private_test_cases"]
        try:
            return [*public, *json.loads(private)]
        except ValueError:
            packed = zlib.decompress(base64.b64decode(private))
        text = next(value for code, value, _ in pickletools.genops(packed) if "UNICODE" in code.name)
        return [*public, *json.loads(str(text))]
    except (KeyError, ValueError, TypeError, StopIteration, zlib.error) as error:
        raise TaskError(f"The tests of a LiveCodeBench problem cannot be read ({error}).") from None


def _same_value(output: str, wanted: str) -> bool:
    try:
        return bool(json.loads(output.strip().split("\n")[-1]) == json.loads(wanted))
    except ValueError:
        return False


def _same_lines(output: str, wanted: str) -> bool:
    found, expected = ([line.strip() for line in text.strip().split("\n")] for text in (output, wanted))
    return len(found) == len(expected) and all(map(_same_words, found, expected))


def _same_words(one: str, other: str) -> bool:
    try:
        return one == other or [*map(Decimal, one.split())] == [*map(Decimal, other.split())]
    except InvalidOperation:
        return False
