"""Graders: read the answer out of an output and score it from 0 to 1.

A grader takes the part of an output after thinking and the accepted answers. It returns a `Grade`: the score and what
it read as the answer. `extracted` is None where no answer could be read: such outputs are counted apart.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reasonkv.tasks.base import UNREAD, Grade, TaskError
from reasonkv.tasks.code import grade_code, grade_livecodebench
from reasonkv.tasks.longbench import RULES
from reasonkv.tasks.options import THINK, THINK_END

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w])|[-+]?\.\d+")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")
_CHOICES = (
    re.compile(r"(?i:answer)\s*(?i:is)?\s*[:：]?\s*\**\s*\(?([A-J])\)?\b(?!')"),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?m)^\s*\**([A-J])(?:[.:)]|\**\s*$)"),
)


Grader = Callable[[str, Sequence[str], Mapping[str, Any]], Grade]
"""Called as `grader(answer_part, accepted_answers, row_of_data)`."""


def after_thinking(output: str, end: str = THINK_END, *, required: bool = False) -> str | None:
    """Return what follows the last end-of-thinking marker; None where thinking never ends.

    Args:
        output: a decoded generation.
        end: the marker.
        required: an output without any marker counts as unfinished thinking (the prompt opened it).

    """
    _, found, answer = output.rpartition(end)
    if found:
        return answer
    return None if required or THINK in output else output


def boxes(text: str) -> list[str]:
    r"""Return the contents of all closed `\boxed{...}` with balanced braces, in the order they open."""
    found, opened = list[tuple[int, int]](), list[int]()  # one pass: a model in a loop writes thousands of open boxes
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened and (start := opened.pop()) >= 0:
            found.append((start, match.start()))
    return [text[start:end].strip() for start, end in sorted(found)]


def last_box(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{...}`, or None."""
    return next(reversed(boxes(text)), None)


def last_number(text: str) -> str | None:
    """Return the last number of a text without thousands separators, or None."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else None


def final_line(text: str) -> str | None:
    """Return what an output gives as its answer: `<answer>` tags, the last box, or what follows the last "Answer:"."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return str(tagged[-1]).strip()
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    named = re.findall(r"(?im)\banswer\s*(?:is)?\s*[:：]\s*\**\s*(\S[^\n]*)", text)
    return str(named[-1]).strip(" \t*.") if named else None


def grade_math(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Compare the last box, or else the last number, with the answer as mathematics (math-verify, 5 s each)."""
    from math_verify import parse, verify

    extracted = last_box(output) or last_number(output)
    if extracted is None:
        return UNREAD
    # the library's limits are signals, which only the main thread receives
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    found, *wanted = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=limit)
        for text in (extracted, *(last_box(answer) or answer for answer in answers))
    )
    return Grade(float(any(verify(one, found, timeout_seconds=limit) for one in wanted)), extracted)


def grade_number(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Compare the last number of the answer line, or else of the output, with the answer's to six digits."""
    extracted = last_number(final_line(output) or "") or last_number(output)
    if extracted is None:
        return UNREAD
    value = float(extracted)
    wanted = [float(number) for number in map(last_number, answers) if number is not None]
    return Grade(float(any(abs(value - one) <= 1e-6 * max(1.0, abs(one)) for one in wanted)), extracted)


def grade_exact(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Compare the answer line, or else the whole output, with the answer; case and spaces do not count."""
    extracted = final_line(output) or output.strip()
    if not extracted:
        return UNREAD
    return Grade(float(any(_folded(extracted) == _folded(answer) for answer in answers)), extracted)


def grade_choice(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Compare the letter chosen last (A to J) with the answer's letter."""
    for text in filter(None, (final_line(output), output)):
        for pattern in _CHOICES:
            found = pattern.findall(text)
            if found:
                return Grade(float(found[-1] in {answer.strip().strip("()") for answer in answers}), str(found[-1]))
    return UNREAD


def grade_contains(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Return the share of the answers that the output contains (RULER's measure); case does not count."""
    if not output.strip():
        return UNREAD
    text = output.casefold()
    return Grade(sum(answer.casefold() in text for answer in answers) / len(answers), output.strip())


def grade_rouge(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Return the best ROUGE-L F-measure over the answers."""
    if not output.strip():
        return UNREAD
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return Grade(max(scorer.score(answer, output)["rougeL"].fmeasure for answer in answers), output.strip())


GRADERS: dict[str, Grader] = {
    "math": grade_math,
    "number": grade_number,
    "exact": grade_exact,
    "choice": grade_choice,
    "contains": grade_contains,
    "rouge": grade_rouge,
    "code": grade_code,
    "livecodebench": grade_livecodebench,
    **RULES,
}
_NEEDS = {"math": "math_verify", "rouge": "rouge_score"}


def get_grader(name: str) -> Grader:
    """Return a grader by name, or a function of a file: `FILE.py:function`.

    The function is called as `function(output, answers, row)` in a process of its own, for 20 s at most. It returns a
    score from 0 to 1, or a pair of the score and the answer it read.

    Raises:
        TaskError: there is no such grader or file.

    """
    if name in GRADERS:
        package = _NEEDS.get(name)
        if package and find_spec(package) is None:
            raise TaskError(
                f'The grader {name!r} needs the package {package.replace("_", "-")}; run pip install "reasonkv[tasks]".'
            )
        return GRADERS[name]
    path, _, function = name.rpartition(":")
    if path.endswith(".py") and function.isidentifier():
        if not Path(path).expanduser().is_file():
            raise TaskError(f"There is no file {path} to take the grader {function} from.")
        return partial(_grade_by_file, str(Path(path).expanduser().resolve()), function)
    raise TaskError(f"There is no grader {name!r}; the graders are {', '.join(GRADERS)} and FILE.py:function.")


def _grade_by_file(path: str, function: str, output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    from reasonkv.tasks.sandbox import call_function

    try:
        returned = call_function(path, function, [output, list(answers), dict(row)])
    except TaskError as error:  # one output's failure must not end a run
        return Grade(0.0, None, str(error))
    score, extracted = returned if isinstance(returned, list) and len(returned) == 2 else (returned, output.strip())
    if isinstance(score, (bool, int, float)) and 0 <= score <= 1:
        return Grade(float(score), None if extracted is None else str(extracted))
    return Grade(0.0, None, f"The grader {path}:{function} must return a score from 0 to 1, not {score!r}.")


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
