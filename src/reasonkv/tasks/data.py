"""Tasks from data: rows of a file or a hub dataset, a template for prompts, a field with answers, and a grader."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reasonkv.files import finite
from reasonkv.tasks.base import UNREAD, Grade, Problem, Task, TaskError
from reasonkv.tasks.declaration import Declaration
from reasonkv.tasks.grade import Grader, get_grader
from reasonkv.tasks.options import THINK_END, TaskOptions
from reasonkv.tasks.rows import Row, read_rows

_PROMPTS = ("prompt", "question", "problem", "input", "instruction")
_ANSWERS = ("answer", "answers", "target", "output", "solution")
_FIELD = re.compile(r"\{(\w+)\}")
_NUMBER = re.compile(r"\s*\$?[-+]?[\d,]*\.?\d+%?\s*")


@dataclass(frozen=True)
class DataTask(Task):
    """Problems whose prompts and answers come from rows of data."""

    name: str  # the task as the user wrote it
    # the data; problem i of seed s is row i of an order shuffled by s (seed 0: the order of the data)
    rows: Sequence[Row]
    declared: Declaration  # the task, with prompt, answer and grader
    think_end: str = THINK_END  # what ends thinking
    skipped: Sequence[str] = ()  # lines and rows that cannot be used, in words
    examples: Sequence[Row] = ()  # rows of worked examples
    tokenizer: Any = None  # counts tokens where prompts are cut; `for_tokenizer` sets it

    _render: Callable[[Row], str] = field(init=False, repr=False, compare=False)
    _answers: Callable[[Row], list[str]] = field(init=False, repr=False, compare=False)
    _grader: Grader = field(init=False, repr=False, compare=False)

    chat = True

    def __post_init__(self) -> None:
        own = self.declared
        derived = {
            "size": len(self.rows), "sampling": {str(name): value for name, value in own.sampling.items()},
            "stop": tuple(own.stop), "max_new_tokens": own.max_new_tokens,
            "_render": compile_template(own.prompt or ""), "_answers": _answers_by(own.answer or ""),
            "_grader": get_grader(own.grade or "exact"),
        }  # fmt: skip
        for name, value in derived.items():
            object.__setattr__(self, name, value)

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
            raise TaskError(f"{self.name} has {len(self.rows)} problems, so there is no problem {example}.")
        row = self._row(example, seed, split)
        prompt = self._cut(self._shots(row) + self._render(row))
        return Problem(self.name, example, seed, split, prompt, "", "\n".join(self._answers(row)))

    def grade_answer(self, problem: Problem, answer: str) -> Grade:
        """Score what follows the thinking; what a grader raises is a note in the grade: it must not end a run."""
        found = answer if self.declared.extract is None else _last_match(self.declared.extract, answer)
        if found is None:
            return UNREAD
        row = self._row(problem.example, problem.seed, problem.split)
        output, *answers = (self._without_ignored(one) for one in (found, *self._answers(row)))
        try:
            return self._grader(output, answers, row)
        except Exception as error:
            return Grade(0.0, None, f"{type(error).__name__}: {error}"[:300])

    def _row(self, example: int, seed: int, split: str) -> Row:
        order = list(range(len(self.rows)))
        if seed:
            random.Random(seed).shuffle(order)
        return self.rows[order[-1 - example if split == "train" else example]]

    def _shots(self, row: Row) -> str:
        answers = self._answers if self.declared.shot is None else _answers_by(self.declared.shot)
        chosen = [one for one in self.examples if one != row][: self.declared.shots]
        return "".join(f"{self._render(one)} {answers(one)[0]}\n\n" for one in chosen)

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
    template = declared.prompt
    if template is None:
        template = "{{ " + _guess(spec, first, _PROMPTS, "prompt") + " }}"
    elif template.startswith("@"):
        try:
            template = finite(Path(template[1:]).expanduser()).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"The template {template[1:]} cannot be read ({error}).") from None
    answer = declared.answer or _guess(spec, first, _ANSWERS, "answer")
    usual = "exact" if first.get(answer) is None or not _NUMBER.fullmatch(_texts(first[answer])[0]) else "number"
    declared = replace(declared, prompt=template, answer=answer, grade=declared.grade or usual)
    task = DataTask(spec, rows, declared, options.think_end)
    if declared.shots and not examples:
        if options.shots_from is None:
            raise TaskError(f"{spec} names no file of worked examples; give one with --shots-from.")
        examples, _ = read_rows(options.shots_from.expanduser())
    usable: list[Row] = []
    unusable: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
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
    left_out = [f"row {numbers[0]}{more[reason]}: {reason}" for reason, numbers in unusable.items()]
    return replace(task, rows=usable, skipped=(*skipped, *left_out), examples=examples)


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


def _answers_by(answer: str) -> Callable[[Row], list[str]]:
    """Return what reads the accepted answers of a row, from a field or by a Jinja template."""
    if "{{" not in answer and "{%" not in answer:
        return lambda row: _texts(_field(row, answer))
    render = compile_template(answer)
    return lambda row: [render(row).strip()]


def _last_match(pattern: str, text: str) -> str | None:
    """Return the first group that matched in the last match of a pattern, or the match where it has no groups."""
    found = next(reversed(list(re.finditer(pattern, text))), None)
    return None if found is None else next(filter(None, found.groups() or (found[0],)), "").strip() or None


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
