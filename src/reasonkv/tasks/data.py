"""Tasks from data: rows of a file or a hub dataset, a template for prompts, a field with answers, and a grader."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reasonkv.tasks.base import UNREAD, Grade, Problem, Task, TaskError
from reasonkv.tasks.declaration import Declaration
from reasonkv.tasks.grade import Grader, after_thinking, get_grader
from reasonkv.tasks.options import THINK_END, TaskOptions
from reasonkv.tasks.rows import SUFFIXES, Row, read_rows

__all__ = ["SUFFIXES", "DataTask", "Row", "compile_template", "data_task", "read_rows"]

_PROMPTS = ("prompt", "question", "problem", "input", "instruction")
_ANSWERS = ("answer", "answers", "target", "output", "solution")
_FIELD = re.compile(r"\{(\w+)\}")
_BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True)
class DataTask(Task):
    """Problems whose prompts and answers come from rows of data.

    Args:
        spec: the task as the user wrote it.
        rows: the data; problem i of seed s is row i of an order shuffled by s (seed 0: the order of the data).
        declared: the task, with prompt, answer and grader.
        think_end: what ends thinking.
        skipped: lines and rows that cannot be used, in words.
        examples: rows of worked examples.
        tokenizer: counts tokens where prompts are cut; `for_tokenizer` sets it.

    """

    spec: str
    rows: Sequence[Row]
    declared: Declaration
    think_end: str = THINK_END
    skipped: Sequence[str] = ()
    examples: Sequence[Row] = ()
    tokenizer: Any = None

    chat = True

    @property
    def name(self) -> str:  # type: ignore[override]
        """The task as the user wrote it."""
        return self.spec

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of problems."""
        return len(self.rows)

    @property
    def sampling(self) -> Mapping[str, float]:  # type: ignore[override]
        """What the task's authors draw with."""
        return {str(name): value for name, value in self.declared.sampling.items()}

    @property
    def stop(self) -> Sequence[str]:  # type: ignore[override]
        """Texts that end an output."""
        return tuple(self.declared.stop)

    @property
    def max_new_tokens(self) -> int | None:  # type: ignore[override]
        """The authors' limit."""
        return self.declared.max_new_tokens

    def for_tokenizer(self, tokenizer: Any) -> DataTask:
        """Return the task with a tokenizer that counts the tokens of prompts."""
        return replace(self, tokenizer=tokenizer)

    def prompt_options(self, options: TaskOptions) -> TaskOptions:
        """Return the options, without the chat template where the task is not meant for it."""
        return options if self.declared.chat or options.chat != "auto" else replace(options, chat="off")

    def problem(self, example: int, *, seed: int = 0, split: str = "test") -> Problem:
        """Return problem number `example`; of the split "train", counted from the end of the rows.

        Raises:
            TaskError: there are fewer rows.

        """
        if not 0 <= example < len(self.rows):
            raise TaskError(f"{self.spec} has {len(self.rows)} problems, so there is no problem {example}.")
        row = self._row(example, seed, split)
        prompt = self._cut(self._shots(row) + self._render(row))
        return Problem(self.spec, example, seed, split, prompt, "", "\n".join(self._answers(row)))

    def grade(self, problem: Problem, output: str) -> Grade:
        """Score a decoded generation; thinking is not graded, and thinking that never ends is no answer.

        What a grader raises is a note in the grade: one output must not end a run.
        """
        part = after_thinking(output, self.think_end)
        if part is None:
            return UNREAD
        if self.declared.extract is not None:
            part = _last_match(self.declared.extract, part)
            if part is None:
                return UNREAD
        row = self._row(problem.example, problem.seed, problem.split)
        answers = [self._without_ignored(answer) for answer in self._answers(row)]
        try:
            return self._grader(self._without_ignored(part), answers, row)
        except Exception as error:
            return Grade(0.0, None, f"{type(error).__name__}: {error}"[:300])

    def _row(self, example: int, seed: int, split: str) -> Row:
        return self.rows[self._order(seed)[-1 - example if split == "train" else example]]

    @cached_property
    def _grader(self) -> Grader:
        assert self.declared.grade is not None
        return get_grader(self.declared.grade)

    @cached_property
    def _render(self) -> Callable[[Row], str]:
        assert self.declared.prompt is not None
        return compile_template(self.declared.prompt)

    @cached_property
    def _answers(self) -> Callable[[Row], list[str]]:
        assert self.declared.answer is not None
        return _answers_by(self.declared.answer)

    def _shots(self, row: Row) -> str:
        if not self.declared.shots:
            return ""
        answers = self._answers if self.declared.shot is None else _answers_by(self.declared.shot)
        chosen = [one for one in self.examples if one != row][: self.declared.shots]
        return "".join(f"{self._render(one)} {answers(one)[0]}{_BETWEEN_SHOTS}" for one in chosen)

    def _cut(self, prompt: str) -> str:
        """Cut the middle out of a prompt of more than `length` tokens, as LongBench does."""
        length = self.declared.length
        if length is None or self.tokenizer is None:
            return prompt
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(ids) <= length:
            return prompt
        parts = (ids[: length // 2], ids[-(length // 2) :])
        return "".join(str(self.tokenizer.decode(part, skip_special_tokens=True)) for part in parts)

    def _without_ignored(self, text: str) -> str:
        for pattern in self.declared.ignore:
            text = re.sub(pattern, "", text)
        return text

    def _order(self, seed: int) -> Sequence[int]:
        order = list(range(len(self.rows)))
        if seed:
            random.Random(seed).shuffle(order)
        return order


def data_task(
    spec: str,
    rows: Sequence[Row],
    options: TaskOptions,
    skipped: Sequence[str] = (),
    declared: Declaration | None = None,
    examples: Sequence[Row] = (),
) -> DataTask:
    """Make a task of rows; prompt, answer and grader are guessed from the fields where nothing names them.

    Rows that lack a field of the prompt, or have no answer, are left out and named in `skipped`.

    Args:
        spec: the task as the user wrote it.
        rows: the data.
        options: of the run; they replace what is declared.
        skipped: lines of the data that cannot be read, in words.
        declared: the task; None leaves all to `options` and guesses.
        examples: rows of worked examples, unless `options` name a file with them.

    Raises:
        TaskError: no rows that fit, or nothing to guess from.

    """
    if not rows:
        raise TaskError(f"{spec} has no problems.")
    first, declared = rows[0], (declared or Declaration()).filled(options)
    template = _template_text(declared.prompt) if declared.prompt is not None else None
    if template is None:
        template = "{{ " + _guess(spec, first, _PROMPTS, "prompt") + " }}"
    answer = declared.answer or _guess(spec, first, _ANSWERS, "answer")
    grade = declared.grade or ("number" if _is_number(_first_text(first, answer)) else "exact")
    get_grader(grade)  # a grader that is missing is said before a model is loaded
    declared = replace(declared, prompt=template, answer=answer, grade=grade)
    if declared.shots and not examples:
        if options.shots_from is None:
            raise TaskError(f"{spec} names no file of worked examples; give one with --shots-from.")
        examples, _ = read_rows(options.shots_from.expanduser())
    task = DataTask(spec, rows, declared, options.think_end, (), examples)
    usable, unusable = _check_rows(task)
    return replace(task, rows=usable, skipped=(*skipped, *unusable))


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
    except (TemplateError, RecursionError, ValueError) as error:
        raise TaskError(f"The template is no Jinja ({error}).") from None

    def fill(row: Row) -> str:
        try:
            return str(compiled.render(row))
        except Exception as error:  # a template computes, so it raises what Python raises
            raise TaskError(f"The template does not fit the data ({error}); the fields are {', '.join(row)}.") from None

    return fill


def _check_rows(task: DataTask) -> tuple[list[Row], list[str]]:
    """Return the rows that give a prompt and an answer, and one sentence for each kind of row that does not."""
    usable: list[Row] = []
    unusable: dict[str, list[int]] = {}
    for number, row in enumerate(task.rows, 1):
        try:
            task._render(row)
            if not any(answer.strip() for answer in task._answers(row)):
                raise TaskError("A row of the data has an empty answer.")
        except TaskError as error:
            unusable.setdefault(str(error), []).append(number)
        else:
            usable.append(row)
    if not usable:
        raise TaskError(next(iter(unusable)))
    more = {reason: f" and {len(numbers) - 1} more" if len(numbers) > 1 else "" for reason, numbers in unusable.items()}
    return usable, [f"row {numbers[0]}{more[reason]}: {reason}" for reason, numbers in unusable.items()]


def _template_text(prompt: str) -> str:
    if not prompt.startswith("@"):
        return prompt
    try:
        return Path(prompt[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"The template {prompt[1:]} cannot be read ({error}).") from None


def _answers_by(answer: str) -> Callable[[Row], list[str]]:
    """Return what reads the accepted answers of a row, from a field or by a Jinja template."""
    if "{{" not in answer and "{%" not in answer:
        return lambda row: _texts(_field(row, answer))
    render = compile_template(answer)
    return lambda row: [render(row).strip()]


def _last_match(pattern: str, text: str) -> str | None:
    """Return the first group that matched in the last match of a pattern, or the match where it has no groups."""
    found: re.Match[str] | None = None
    for found in re.finditer(pattern, text):  # noqa: B007 - the last one is wanted
        pass
    if found is None:
        return None
    return next((group for group in found.groups() if group), found[0] if not found.groups() else "").strip() or None


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
