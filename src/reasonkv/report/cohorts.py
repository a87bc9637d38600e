"""What one mean may be taken over: records of one folder, one budget rule and one regime, as rows for tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reasonkv.evaluate.accuracy import summarize_answers
from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.frontier import regime
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.results import Results
from reasonkv.evaluate.statistics import Difference, Estimate, clustered_mean
from reasonkv.evaluate.summary import READ, method_labels, summarize
from reasonkv.report.regimes import SELECTING
from reasonkv.report.wording import budget_sentence

Line = Record | AnswerRecord
Cell = tuple[str, str, int | None]
"""Task, label of the method, tokens of the budget."""
UNBOUNDED = "full KV"
"""What stands in the regime column of full KV's own rows."""


@dataclass(frozen=True)
class SummaryRow:
    """One cell of a replay or an evaluation on one task in one regime.

    Args:
        regime: the regime, or `UNBOUNDED` for full KV.
        task: the task.
        method: the method, with the options that are not its defaults.
        tokens: the budget's tokens, None for full KV.
        n: traces, or problems of an evaluation.
        estimates: by metric.
        versus_full: paired differences to full KV by metric.
        versus_random: the same to random at the same budget.
    """

    regime: str
    task: str
    method: str
    tokens: int | None
    n: int
    estimates: dict[str, Estimate]
    versus_full: dict[str, Difference]
    versus_random: dict[str, Difference]


@dataclass(frozen=True)
class Cohort:
    """Rows that may be compared with each other.

    Args:
        results: the folder they come from.
        rule: every field of the budget but `tokens`; empty where only full KV ran.
        rows: full KV's first. Regimes are never averaged together: a cell whose traces fall into two regimes has two
            rows.
    """

    results: Results
    rule: dict[str, Any]
    rows: list[SummaryRow]

    @property
    def kind(self) -> str:
        """`replay` or `evaluate`."""
        return "evaluate" if self.results.answers else "replay"

    @property
    def keeps_prompt(self) -> bool:
        """Whether no method may drop the prompt."""
        return self.rule.get("prompt") in {"keep", "on_top"}

    @property
    def selecting(self) -> list[str]:
        """Labels of the methods that hold everything and read a part of it."""
        return list(dict.fromkeys(row.method for row in self.rows if row.regime == SELECTING))

    @property
    def padded(self) -> list[str]:
        """Labels of the methods that drop slots and hold padding, which nothing attends to."""
        found = [row for row in self.rows if row.regime != SELECTING and "slots_read_mean" in row.estimates]
        return list(dict.fromkeys(row.method for row in found))

    @property
    def evicts(self) -> bool:
        """Whether any bounded method drops slots."""
        return any(row.regime not in {UNBOUNDED, SELECTING} for row in self.rows)

    def same_problems(self, other: Cohort) -> bool:
        """Whether the other ran the same kind of job on the same model and problems, so that rows may be shared."""
        mine, theirs = self.results.manifest, other.results.manifest
        return self.kind == other.kind and all(
            mine.get(part, {}).get(name) == theirs.get(part, {}).get(name)
            for part, names in (("model", ["hash"]), ("arguments", ["seed", "limit", "traces", "samples", "sampling"]))
            for name in names
        )


def cohorts(results: Sequence[Results]) -> list[Cohort]:
    """One cohort per folder and budget rule, in the order they first occur."""
    found: list[Cohort] = []
    for one in results:
        found += _of_folder(one, one.answers) if one.answers else _of_folder(one, one.records)
    return found


def budget_rule(record: Record | AnswerRecord) -> dict[str, Any]:
    """Every field of a record's budget but `tokens`."""
    return {name: value for name, value in (record.budget or {}).items() if name != "tokens"}


def labels_of(records: Sequence[Line]) -> list[str]:
    """The label of every record's method: its name, and the options that are not its defaults."""
    known = method_labels(records)
    return [known[json.dumps([one.method, one.options], sort_keys=True)] for one in records]


def selecting_labels(records: Sequence[Line]) -> list[str]:
    """Labels of the methods that hold everything and read a part of it, each once."""
    return list(dict.fromkeys(labels_of([one for one in records if one.selects])))


def padded_labels(records: Sequence[Line]) -> list[str]:
    """Labels of the methods that drop slots and hold padding, which nothing attends to, each once."""
    found = [one for one in records if one.slots_read_mean is not None and not one.selects]
    return list(dict.fromkeys(labels_of(found)))


def rule_sentence(records: Sequence[Line]) -> str:
    """What the budget of some records counts, those of one rule; nothing where only full KV ran."""
    bounded = [one for one in records if one.budget is not None]
    if not bounded or bounded[0].budget is None:
        return ""
    evicting = any(not one.selects for one in bounded)
    return budget_sentence(bounded[0].budget, selecting_labels(bounded), padded_labels(bounded), evicting=evicting)


def _of_folder(results: Results, records: Sequence[Line]) -> list[Cohort]:
    full = [record for record in records if record.budget is None]
    rules: dict[str, list[Line]] = {}
    for record in records:
        if record.budget is not None:
            rules.setdefault(json.dumps(budget_rule(record), sort_keys=True), []).append(record)
    if not rules:
        return [Cohort(results, {}, _rows(full, UNBOUNDED))]
    return [Cohort(results, json.loads(rule), _by_regime(full, members)) for rule, members in rules.items()]


def _by_regime(full: Sequence[Line], members: Sequence[Line]) -> list[SummaryRow]:
    split: dict[str, list[Line]] = {}
    for record in members:
        split.setdefault(regime(record), []).append(record)
    # full KV stands in every part, so that differences to it pair the very problems of that part
    rows = _rows(full, UNBOUNDED)
    for name, part in split.items():
        rows += [row for row in _rows([*full, *part], name) if row.tokens is not None]
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = list(dict.fromkeys(labels_of([*full, *members])))
    return sorted(rows, key=lambda row: (tasks.index(row.task), methods.index(row.method), row.tokens or 0))


def _rows(records: Sequence[Line], name: str) -> list[SummaryRow]:
    """One row per task, method and budget; what the summary leaves out stands beside its own estimates."""
    answers = [record for record in records if isinstance(record, AnswerRecord)]
    replayed = [record for record in records if isinstance(record, Record)]
    held = _means(records, lambda one: one.bytes_held)
    answer = _means(replayed, lambda one: one.answer_top1 if isinstance(one, Record) else None)
    rows = []
    read = what_was_read(answers)
    for row in summarize_answers(answers):
        cell = (row.task, row.method, row.tokens)
        rows.append(
            SummaryRow(
                name,
                row.task,
                row.method,
                row.tokens,
                row.n,
                {**row.estimates, "bytes_held": held[cell]} | read.get(cell, {}),
                {"correct": row.versus_full} if row.versus_full else {},
                {"correct": row.versus_random} if row.versus_random else {},
            )
        )
    for one in summarize(replayed):
        cell = (one.task, one.method, one.tokens)
        rows.append(
            SummaryRow(
                name,
                *cell,
                one.n,
                {**one.estimates, "bytes_held": held[cell]} | ({"answer_top1": answer[cell]} if cell in answer else {}),
                one.versus_full,
                one.versus_random,
            )
        )
    return rows


def what_was_read(records: Sequence[Line]) -> dict[Cell, dict[str, Estimate]]:
    """Slots and bytes read per decoded token by task, method and budget, where that is not all that is held."""
    found: dict[Cell, dict[str, Estimate]] = {}
    for name in READ:
        for cell, one in _means(records, lambda record, name=name: getattr(record, name)).items():  # type: ignore[misc]
            found.setdefault(cell, {})[name] = one
    return found


def _means(records: Sequence[Line], value: Callable[[Line], float | None]) -> dict[Cell, Estimate]:
    """The mean of a value by task, method and budget, over the records that have it."""
    cells: dict[Cell, list[tuple[float, int]]] = {}
    for record, label in zip(records, labels_of(records), strict=True):
        found = value(record)
        if found is not None:
            key = (record.task, label, record.budget["tokens"] if record.budget else None)
            cells.setdefault(key, []).append((found, record.example))
    return {key: clustered_mean(*zip(*members, strict=True)) for key, members in cells.items()}
