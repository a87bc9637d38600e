"""From answer records to what a table shows: accuracy, differences to full KV and to random, loops, lengths, memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.statistics import Difference, Estimate, clustered_mean, clustered_paired_difference
from reasonkv.evaluate.summary import method_labels

ANSWER_METRICS = (
    "correct", "truncated", "output_tokens", "repetition", "diverged", "physical_mean", "physical_peak", "saved_bytes",
    "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class AccuracyRow:
    """One cell on one task.

    Args:
        task: the task.
        method: the method, with the options that are not its defaults.
        budget: every field of the budget, None for full KV.
        n: problems.
        answers: answers, several for each problem if there were several samples.
        estimates: by name, one of `ANSWER_METRICS`; standard errors are clustered by problem.
        median_divergence: median index of the first token that differs from full KV's output, over the answers that
            differ; None where none does.
        versus_full: paired difference of accuracy to full KV on the same problems and samples; None for full KV.
        versus_random: the same to `random` at the same budget, where it ran; None for full KV and `random`.
    """

    task: str
    method: str
    budget: dict[str, Any] | None
    n: int
    answers: int
    estimates: dict[str, Estimate]
    median_divergence: float | None
    versus_full: Difference | None
    versus_random: Difference | None

    @property
    def tokens(self) -> int | None:
        """The budget's tokens, None for full KV."""
        return self.budget["tokens"] if self.budget else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON output."""
        return {
            "task": self.task,
            "method": self.method,
            "tokens": self.tokens,
            "budget": self.budget,
            "n": self.n,
            "answers": self.answers,
            **{name: {"mean": one.mean, "se": one.se} for name, one in self.estimates.items()},
            "median_divergence": self.median_divergence,
            "versus_full": vars(self.versus_full) if self.versus_full else None,
            "versus_random": vars(self.versus_random) if self.versus_random else None,
        }


def answer_value(record: AnswerRecord, metric: str) -> float:
    """One of `ANSWER_METRICS` of a record.

    "diverged" is 1 where the output differs from full KV's, "saved_bytes" the share of full KV's bytes that is not
    held at the end.
    """
    if metric == "saved_bytes":
        return 1 - record.bytes_held / record.bytes_full
    if metric == "diverged":
        return float(record.first_divergence is not None)
    return float(getattr(record, metric))


def summarize_answers(answers: Sequence[AnswerRecord], *, seed: int = 0) -> list[AccuracyRow]:
    """One row per task and cell, in the order tasks and methods first occur, budgets ascending.

    Args:
        answers: records of one results folder.
        seed: of the bootstrap.
    """
    cells: dict[tuple[str, str, str], list[AnswerRecord]] = {}
    for record in answers:
        method = json.dumps([record.method, record.options], sort_keys=True)
        cells.setdefault((record.task, method, _budget_key(record)), []).append(record)
    tasks = list(dict.fromkeys(task for task, _, _ in cells))
    methods = list(dict.fromkeys(method for _, method, _ in cells))

    def order(key: tuple[str, str, str]) -> tuple[int, int, int, str]:
        task, method, budget = key
        return tasks.index(task), methods.index(method), (json.loads(budget) or {}).get("tokens", 0), budget

    baselines = {
        (task, members[0].method, budget): members
        for (task, _, budget), members in cells.items()
        if members[0].method in {"full", "random"}
    }
    rows = []
    for key in sorted(cells, key=order):
        task, _, budget = key
        members = cells[key]
        first = members[0]
        (label,) = method_labels(members[:1]).values()
        places = [one.first_divergence for one in members if one.first_divergence is not None]
        examples = [one.example for one in members]
        full = baselines.get((task, "full", "null"), [])
        random = baselines.get((task, "random", budget), [])
        rows.append(
            AccuracyRow(
                task=task,
                method=label,
                budget=first.budget,
                n=len(set(examples)),
                answers=len(members),
                estimates={
                    name: clustered_mean([answer_value(one, name) for one in members], examples)
                    for name in ANSWER_METRICS
                },
                median_divergence=float(median(places)) if places else None,
                versus_full=None if first.method == "full" else _difference(members, full, seed),
                versus_random=None if first.method in {"full", "random"} else _difference(members, random, seed),
            )
        )
    return rows


def _budget_key(record: AnswerRecord) -> str:
    return json.dumps(record.budget, sort_keys=True)


def _difference(ours: Sequence[AnswerRecord], theirs: Sequence[AnswerRecord], seed: int) -> Difference | None:
    """Paired difference of accuracy over the answers both have."""
    mine, others = ({(one.example, one.sample): float(one.correct) for one in records} for records in (ours, theirs))
    return clustered_paired_difference(mine, others, seed=seed)
