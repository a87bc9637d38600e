"""The report's first table: the main metric of every method on every task, one budget at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reasonkv.evaluate.table import FULL_KV
from reasonkv.report.cohorts import Cohort
from reasonkv.report.metrics import MAIN, Metric
from reasonkv.report.wording import ends, span

NAMES = {"replay": "top-1 agreement", "evaluate": "accuracy"}
"""The main metric in words, by kind."""
_UNCUT = {"uncompressed": "never compacted", "prompt_fills_budget": "prompt fills the budget"}


def glance(cohort: Cohort) -> list[dict[str, Any]]:
    """Return the main metric of every method on every task, a table per budget.

    A method that did not compress at a budget keeps its place, with a note. Budgets that were solved for a mean differ
    by task, so tables go by rank: each task's smallest budget first. `apart` is how far methods lie apart, a mean over
    tasks in the metric's unit; the page opens at the budget where that is largest.
    """
    kind, main = cohort.kind, MAIN[cohort.kind].key
    rows = cohort.summary.to_dict("records")
    order = ["compressed", "selecting", *_UNCUT, "mixed"]
    bounded = sorted((row for row in rows if row["regime"] != FULL_KV), key=lambda row: -order.index(row["regime"]))
    full = {row["task"]: row for row in rows if row["regime"] == FULL_KV}
    tasks, methods = list(cohort.summary["task"].unique()), [one for one in cohort.summary["method"].unique()]
    budgets = {task: sorted({row["tokens"] for row in bounded if row["task"] == task}) for task in tasks}
    tabs = []
    for rank in range(max(1, *map(len, budgets.values()))):
        tokens = {task: own[rank] for task, own in budgets.items() if rank < len(own)}
        here = {(row["method"], row["task"]): row for row in bounded if tokens.get(row["task"]) == row["tokens"]}
        title = _span(list(tokens.values()), "{:,}") + " slots" if tokens else ""
        evicting = [row for row in here.values() if row["regime"] == "compressed"]
        lines = [("full KV", [full.get(task) for task in tasks])]
        lines += [(name, [here.get((name, task)) for task in tasks]) for name in methods]
        lines = [lines[0], *((name, cells) for name, cells in lines[1:] if any(cells))]
        scales = [_Scale.of([row for _, cells in lines if (row := cells[at])], kind) for at in range(len(tasks))]
        means = [[row[main] for row in evicting if row["task"] == task] for task in tasks]
        saved = [_span([row["saved_bytes"] for row in evicting if row["task"] == task], "{:.0%}") for task in tasks]
        interval = "its 95 % interval" if "correct_low" in cohort.summary else "one standard error"
        tabs.append({
            "title": title, "caption": f"{NAMES[kind]}, % and {interval}" + (f", at {title}" if title else ""),
            "scales": [one.words for one in scales], "saved": saved if evicting else [],
            "rows": [_glance_row(name, cells, lines[0][1], scales, kind) for name, cells in lines],
            "apart": sum(max(own) - min(own) for own in means if own) / len(tasks),
        })  # fmt: skip
    return tabs


class _Scale:
    """One task's scale, from the lowest end of an interval to the highest; where bars from 0 would all look alike."""

    def __init__(self, low: float, high: float, metric: Metric) -> None:
        spare = max(0.0, 2 / metric.scale - (high - low)) / 2 + 0.04 * (high - low)
        self.low, self.high = max(0.0, low - spare), min(1.0, high + spare)
        words = [f"{end * metric.scale:.{metric.digits}f}".removesuffix(".0") for end in (self.low, self.high)]
        self.words = f"scale {words[0]} to {words[1]}"

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]], kind: str) -> _Scale:
        values = [end for row in rows for end in ends(row, MAIN[kind].key)]
        return _Scale(min(values, default=0.0), max(values, default=1.0), MAIN[kind])

    def at(self, value: float) -> float:
        return round(100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low), 1)


def _glance_row(
    label: str, rows: Sequence[Any], full: Sequence[Any], scales: Sequence[_Scale], kind: str
) -> dict[str, Any]:
    main, cells = MAIN[kind], list[dict[str, Any] | None]()
    for row, reference, scale in zip(rows, full, scales, strict=True):
        if row is None:
            cells.append(None)
            continue
        mean, _, error = main.text(row).partition(" ")
        low, high = (scale.at(end) for end in ends(row, main.key))
        fewer = [f"n = {row['n']}"] if reference is not None and row["n"] < reference["n"] else []
        cells.append({
            "mean": mean, "error": error, "low": low, "width": round(high - low, 1), "at": scale.at(row[main.key]),
            "full": None if reference is None else scale.at(reference[main.key]),
            "note": ", ".join([*filter(None, [_UNCUT.get(row["regime"])]), *fewer]),
        })  # fmt: skip
    read = [row["slots_read_mean"] for row in rows if row and row["regime"] == "selecting"]
    aside = f"keeps all, reads {_span(read, '{:,.0f}')} slots" if read else ""
    return {"label": label, "full": label == "full KV", "aside": aside, "cells": cells}


def _span(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    return span(form.format(min(values)), form.format(max(values)))
