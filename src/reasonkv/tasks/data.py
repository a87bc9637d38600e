"""Tasks from data: rows of a file or a hub dataset, a template for prompts, a field with answers, and a grader."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reasonkv.tasks.base import Grade, Problem, Task, TaskError
from reasonkv.tasks.grade import UNREAD, Grader, after_thinking, get_grader
from reasonkv.tasks.options import THINK_END, TaskOptions

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_PROMPTS = ("prompt", "question", "problem", "input", "instruction")
_ANSWERS = ("answer", "answers", "target", "output", "solution")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class DataTask(Task):
    """Problems whose prompts and answers come from rows of data.

    Args:
        spec: the task as the user wrote it.
        rows: the data; problem i of seed s is row i of an order shuffled by s (seed 0: the order of the data).
        template: of the prompt.
        answer: field or Jinja template of the answer.
        grader: scores an output.
        think_end: what ends thinking.
        skipped: lines of the file that could not be read, in words.

    """

    spec: str
    rows: Sequence[Row]
    template: str
    answer: str
    grader: Grader
    think_end: str = THINK_END
    skipped: tuple[str, ...] = ()

    chat = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task as the user wrote it."""
        return self.spec

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of problems."""
        return len(self.rows)

    @cached_property
    def _render(self) -> Callable[[Row], str]:
        return compile_template(self.template)

    @cached_property
    def _answers(self) -> Callable[[Row], list[str]]:
        if "{{" not in self.answer and "{%" not in self.answer:
            return lambda row: _texts(_field(row, self.answer))
        render = compile_template(self.answer)
        return lambda row: [render(row).strip()]

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example`.

        Raises:
            TaskError: there are fewer rows, or a row lacks a field.

        """
        if not 0 <= example < len(self.rows):
            raise TaskError(f"{self.spec} has {len(self.rows)} problems, so there is no problem {example}.")
        row = self.rows[self._order(seed)[example]]
        return Problem(
            task=self.spec, example=example, seed=seed, split=split, prompt=self._render(row), trace="",
            answer="\n".join(self._answers(row)),
        )  # fmt: skip

    def grade(self, problem: Problem, output: str) -> Grade:
        """Score a decoded generation; thinking is not graded, and thinking that never ends is no answer."""
        part = after_thinking(output, self.think_end)
        if part is None:
            return UNREAD
        row = self.rows[self._order(problem.seed)[problem.example]]
        return self.grader(part, self._answers(row), row)

    def _order(self, seed: int) -> Sequence[int]:
        order = list(range(len(self.rows)))
        if seed:
            random.Random(seed).shuffle(order)
        return order


def data_task(spec: str, rows: Sequence[Row], options: TaskOptions, skipped: Sequence[str] = ()) -> DataTask:
    """Make a task of rows; prompt, answer and grader are guessed from the fields where `options` leave them open.

    Raises:
        TaskError: no rows, a template that names a field no row has, or nothing to guess from.

    """
    if not rows:
        raise TaskError(f"{spec} has no problems.")
    first = rows[0]
    template = _template_text(options.prompt) if options.prompt is not None else None
    if template is None:
        template = "{{ " + _guess(spec, first, _PROMPTS, "prompt") + " }}"
    answer = options.answer or _guess(spec, first, _ANSWERS, "answer")
    grader = get_grader(options.grade or ("number" if _is_number(_first_text(first, answer)) else "exact"))
    task = DataTask(spec, rows, template, answer, grader, options.think_end, tuple(skipped))
    task.problem(0)  # a template that does not fit is said before a model is loaded
    return task


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Read a .jsonl, .json, .csv or .parquet file.

    Returns:
        The rows, and one sentence for each line that could not be read.

    Raises:
        TaskError: the file cannot be read at all.

    """
    if not path.is_file():
        raise TaskError(f"There is no file {path}.")
    try:
        if path.suffix == ".jsonl":
            return _read_lines(path)
        if path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = found if isinstance(found, list) else next((v for v in found.values() if isinstance(v, list)), [])
            return [row for row in rows if isinstance(row, dict)], []
        import pandas

        frame = pandas.read_csv(path) if path.suffix == ".csv" else pandas.read_parquet(path)
        rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
        found = [{str(key): _plain(value) for key, value in row.items()} for row in rows]
        return list(found), []
    except ImportError:
        raise TaskError(f'Reading {path.suffix} files needs pandas; run pip install "reasonkv[eval]".') from None
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} cannot be read as {path.suffix} ({str(error).splitlines()[0][:200]}).") from None


def compile_template(template: str) -> Callable[[Row], str]:
    """Return a function that fills a row into a template: `{field}`, or Jinja where `{{` or `{%` occurs.

    Raises:
        TaskError: a template that is no Jinja; the function raises it for a field that a row lacks.

    """
    if "{{" not in template and "{%" not in template:
        return lambda row: _FIELD.sub(lambda found: str(_field(row, found[1])), template)
    try:
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import SandboxedEnvironment
    except ImportError:
        raise TaskError('Jinja templates need jinja2; run pip install "reasonkv[eval]".') from None
    try:
        compiled = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    except TemplateError as error:
        raise TaskError(f"The template is no Jinja ({error}).") from None

    def fill(row: Row) -> str:
        try:
            return str(compiled.render(row))
        except (TemplateError, TypeError, ValueError) as error:
            raise TaskError(f"The template does not fit the data ({error}); the fields are {', '.join(row)}.") from None

    return fill


def _read_lines(path: Path) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    skipped: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                skipped.append(f"line {number} is no JSON ({error})")
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                skipped.append(f"line {number} is no JSON object")
    return rows, skipped


def _template_text(prompt: str) -> str:
    if not prompt.startswith("@"):
        return prompt
    try:
        return Path(prompt[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"The template {prompt[1:]} cannot be read ({error}).") from None


def _field(row: Row, name: str) -> Any:
    if name not in row or row[name] is None:
        raise TaskError(f"A row of the data has no field {name!r}; its fields are {', '.join(map(str, row))}.")
    return row[name]


def _guess(spec: str, row: Row, names: Sequence[str], flag: str) -> str:
    for name in names:
        if name in row:
            return name
    raise TaskError(f"{spec} has the fields {', '.join(map(str, row))}; say with --{flag} which one is the {flag}.")


def _texts(value: Any) -> list[str]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise TaskError("A row of the data has an empty list of answers.")
    return [str(one) for one in values]


def _first_text(row: Row, answer: str) -> str:
    return _texts(row[answer])[0] if answer in row and row[answer] is not None else ""


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*\$?[-+]?[\d,]*\.?\d+%?\s*", text) is not None


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
