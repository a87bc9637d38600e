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
from operator import eq
from pathlib import Path
from typing import Any

from reasonkv.tasks import longbench
from reasonkv.tasks.base import UNREAD, Grade, TaskError
from reasonkv.tasks.code import grade_code, grade_livecodebench
from reasonkv.tasks.sandbox import call_function

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w])|[-+]?\.\d+")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")
_CHOICES = (
    re.compile(r"(?i:answer)\s*(?i:is)?\s*[:：]?\s*\**\s*\(?([A-J])\)?\b(?!')"),
    re.compile(r"\(([A-J])\)"),
    re.compile(r"(?m)^\s*\**([A-J])(?:[.:)]|\**\s*$)"),
)

Grader = Callable[[str, Sequence[str], Mapping[str, Any]], Grade]
"""Called as `grader(answer_part, accepted_answers, row_of_data)`."""


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


def grade_contains(output: str, answers: Sequence[str], row: Mapping[str, Any]) -> Grade:
    """Return the share of the answers that the output contains (RULER's measure); case does not count."""
    if not output.strip():
        return UNREAD
    text = output.casefold()
    return Grade(sum(answer.casefold() in text for answer in answers) / len(answers), output.strip())


def _best(
    read: Callable[[str], str | None], score: Callable[[str, str], float], output: str, answers: Sequence[str], row: Any
) -> Grade:
    """Grade what `read` finds in an output by its best score against an accepted answer."""
    found = read(output)
    if not found:
        return UNREAD
    return Grade(float(max(score(found, one) for one in answers)), found.strip() if read is _whole else found)


def _whole(output: str) -> str:
    return output if output.strip() else ""


def _number(output: str) -> str | None:
    return last_number(final_line(output) or "") or last_number(output)


def _same_number(found: str, answer: str) -> bool:
    wanted = last_number(answer)
    return wanted is not None and abs(float(found) - float(wanted)) <= 1e-6 * max(1.0, abs(float(wanted)))


def _same_words(found: str, answer: str) -> bool:
    return found.casefold().split() == answer.casefold().split()


def _same_mathematics(found: str, answer: str) -> bool:
    from math_verify import parse, verify

    # the library's limits are signals, which only the main thread receives
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    given, wanted = (parse(f"\\boxed{{{text}}}", parsing_timeout=limit) for text in (found, last_box(answer) or answer))
    return bool(verify(wanted, given, timeout_seconds=limit))


def _choice(output: str) -> str | None:
    texts = filter(None, (final_line(output), output))
    letters = (pattern.findall(text) for text in texts for pattern in _CHOICES)
    return next((str(found[-1]) for found in letters if found), None)


def _rouge(found: str, answer: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(answer, found)["rougeL"].fmeasure)


GRADERS: dict[str, Grader] = {
    "math": partial(_best, lambda text: last_box(text) or last_number(text), _same_mathematics),
    "number": partial(_best, _number, _same_number),  # of the answer line, or else of the output; to six digits
    "exact": partial(_best, lambda text: final_line(text) or text.strip(), _same_words),
    "choice": partial(_best, _choice, lambda found, answer: found == answer.strip().strip("()")),
    "contains": grade_contains,
    "rouge": partial(_best, _whole, _rouge),
    "code": grade_code,
    "livecodebench": grade_livecodebench,
    "f1": partial(_best, _whole, longbench.qa_f1),
    "edit": partial(_best, longbench.first_code, longbench.likeness),
    "longbench-f1-zh": partial(_best, _whole, longbench.qa_f1_characters),
    "longbench-rouge": partial(_best, _whole, longbench.rouge_l),
    "longbench-rouge-zh": partial(_best, _whole, longbench.rouge_l_characters),
    "longbench-count": partial(_best, _whole, longbench.number_share),
    "longbench-retrieval": partial(_best, _whole, longbench.number_share),
    "longbench-classification": longbench.grade_classification,
    "longbench-v2": partial(_best, longbench.chosen, eq),
}
"""By name; where the table has two functions, the first reads the answer and the second compares it."""
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
    try:
        returned = call_function(path, function, [output, list(answers), dict(row)])
    except TaskError as error:  # one output's failure must not end a run
        return Grade(0.0, None, str(error))
    score, extracted = returned if isinstance(returned, list) and len(returned) == 2 else (returned, output.strip())
    if isinstance(score, (bool, int, float)) and 0 <= score <= 1:
        return Grade(float(score), None if extracted is None else str(extracted))
    return Grade(0.0, None, f"The grader {path}:{function} must return a score from 0 to 1, not {score!r}.")
