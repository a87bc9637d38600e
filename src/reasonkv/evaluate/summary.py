"""From records to what a table or figure shows: means over traces, standard errors, paired differences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.statistics import Difference, Estimate, estimate, paired_difference
from reasonkv.methods import MethodError, method_class

__all__ = [
    "METRICS",
    "Difference",
    "Estimate",
    "Row",
    "estimate",
    "method_labels",
    "paired_difference",
    "summarize",
    "value",
]

METRICS = ("top1", "top5", "nll", "kl", "physical_mean", "physical_peak", "saved_bytes", "seconds")

READ = ("slots_read_mean", "bytes_read_mean")
"""Of methods that hold everything and choose what to read."""


@dataclass(frozen=True)
class Row:
    """One cell on one task.

    Args:
        task: the task.
        method: the method, with the options that are not its defaults.
        tokens: the budget's tokens, None for full KV.
        n: traces.
        estimates: by name: `METRICS`; of `READ` and the diagnostics what records have, over those that have it.
        versus_full: paired differences to full KV (top1, nll, kl), where full KV was replayed.
        versus_random: the same to `random` at the same budget.
    """

    task: str
    method: str
    tokens: int | None
    n: int
    estimates: dict[str, Estimate]
    versus_full: dict[str, Difference]
    versus_random: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """For JSON output."""
        return {
            "task": self.task,
            "method": self.method,
            "tokens": self.tokens,
            "n": self.n,
            **{name: {"mean": one.mean, "se": one.se} for name, one in self.estimates.items()},
            "versus_full": {name: vars(one) for name, one in self.versus_full.items()},
            "versus_random": {name: vars(one) for name, one in self.versus_random.items()},
        }


def value(record: Record, metric: str) -> float:
    """One of `METRICS` of a record; "saved_bytes" is the share of full KV's bytes no longer held at the end."""
    if metric == "saved_bytes":
        return 1 - record.bytes_held / record.bytes_full
    return float(getattr(record, metric))


def summarize(records: Sequence[Record], *, seed: int = 0) -> list[Row]:
    """One row per task and cell, in the order tasks and methods first occur, budgets ascending.

    Args:
        records: records of one results folder.
        seed: of the bootstrap.
    """
    labels = method_labels(records)
    cells: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        budget = json.dumps(record.budget, sort_keys=True)
        cells.setdefault((record.task, labels[_method_key(record)], budget), []).append(record)
    tasks, methods = list(dict.fromkeys(r.task for r in records)), list(dict.fromkeys(labels.values()))

    def order(key: tuple[str, str, str]) -> tuple[int, int, int, str]:
        task, method, budget = key
        return tasks.index(task), methods.index(method), (json.loads(budget) or {}).get("tokens", 0), budget

    rows = []
    for key in sorted(cells, key=order):
        task, method, budget = key
        full = [one for (t, _, _), members in cells.items() if t == task for one in members if one.method == "full"]
        random = [
            one
            for (t, _, b), members in cells.items()
            if t == task and b == budget
            for one in members
            if one.method == "random"
        ]
        members = cells[key]
        rows.append(
            Row(
                task=task,
                method=method,
                tokens=members[0].budget["tokens"] if members[0].budget else None,
                n=len(members),
                estimates={name: estimate([value(one, name) for one in members]) for name in METRICS}
                | _optional(members),
                versus_full={} if members[0].method == "full" else _differences(members, full, seed),
                versus_random={} if members[0].method in {"full", "random"} else _differences(members, random, seed),
            )
        )
    return rows


def _optional(records: Sequence[Record]) -> dict[str, Estimate]:
    """What only some records have: what was read where that is not all that is held, and diagnostics."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name in READ:
            found = getattr(record, name)
            if found is not None:
                values.setdefault(name, []).append(found)
        for name, measure in record.diagnostics.items():
            values.setdefault(name, []).append(measure)
    return {name: estimate(own) for name, own in values.items()}


def method_labels(records: Sequence[Record | AnswerRecord]) -> dict[str, str]:
    """A label for every (method, options): the name, and the options that are not the method's defaults."""
    labels = {}
    for record in records:
        key = _method_key(record)
        if key not in labels:
            labels[key] = _label(record.method, record.options)
    return labels


def _label(method: str, options: dict[str, Any]) -> str:
    try:
        return method_class(method)(**options).spec()
    except (MethodError, TypeError, ValueError):  # a method or option that is not installed here
        return method + (":" + ",".join(f"{name}={one}" for name, one in options.items()) if options else "")


def _method_key(record: Record | AnswerRecord) -> str:
    return json.dumps([record.method, record.options], sort_keys=True)


def _differences(ours: Sequence[Record], theirs: Sequence[Record], seed: int) -> dict[str, Difference]:
    found = {}
    for metric in ("top1", "nll", "kl"):
        one = paired_difference(
            {r.example: value(r, metric) for r in ours}, {r.example: value(r, metric) for r in theirs}, seed=seed
        )
        if one is not None:
            found[metric] = one
    return found
