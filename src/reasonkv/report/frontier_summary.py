"""Everything `reasonkv frontier` says about finished results: usable budgets, crossings, regimes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from reasonkv.evaluate.answers import AnswerRecord
from reasonkv.evaluate.bisection import says_nothing
from reasonkv.evaluate.crossings import Comparison, between, crossings
from reasonkv.evaluate.frontier import (
    Axis,
    Point,
    Target,
    UsableBudget,
    measured_points,
    regime,
    usable_budget,
)
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.statistics import estimate
from reasonkv.report import frontier_tables as tables
from reasonkv.report.cohorts import selecting_labels
from reasonkv.report.regimes import DECODE_ACTIVE


@dataclass(frozen=True)
class FrontierSummary:
    """A frontier, ready to be shown.

    Args:
        target: what has to be kept.
        axis: what budgets are measured in.
        points: every cell, by regime.
        usable: by (task, method, rule), from decode-active points alone; why not, where there is none.
        crossings: between decode-active points, the surest first; with `between` all pairs of those two methods.
        between: the two methods that were named, if any.
        regimes: bounded records by task and regime.
    """

    target: Target
    axis: Axis
    points: list[Point]
    usable: dict[tuple[str, str, str], UsableBudget | str]
    crossings: list[Comparison]
    regimes: dict[str, dict[str, int]]
    between: tuple[str, str] | None = None

    @property
    def left_out(self) -> str:
        """One sentence: which records were left out."""
        return tables.left_out(self.regimes)

    def tables(self) -> list[Table]:
        """For the terminal."""
        crossed = tables.crossings_table(self.crossings, self.target.metric, self.axis, self.between)
        active = [point for point in self.points if point.regime == DECODE_ACTIVE]
        found = tables.usable_tables(self.usable, active, self.target, self.axis)
        return [*found, *([crossed] if crossed else []), tables.regime_table(self.regimes)]

    def sentences(self) -> list[str]:
        """What the tables mean."""
        return [
            "usable: from there on every measured budget keeps the target; linear in log(budget) between two of them; "
            "the interval is a bootstrap over examples. holds: the interval lies above 0 and p, corrected by Holm over "
            "every pair of a smaller and a larger cell, is below 0.05. n: examples, fewer where rows are too "
            "short for the larger budgets.",
            tables.crossings_sentence(self.crossings, self.between),
            self.left_out,
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON output."""
        usable = [
            {"task": task, "method": method, "rule": json.loads(rule)}
            | ({"status": found} if isinstance(found, str) else vars(found))
            for (task, method, rule), found in self.usable.items()
        ]
        return {
            "metric": self.target.metric,
            "target": str(self.target),
            "axis": self.axis,
            "regimes": self.regimes,
            "usable": usable,
            "between": self.between,
            "crossings": [_comparison(one) for one in self.crossings],
            "points": [tables.point_dict(one, estimate(list(one.values.values())).se) for one in self.points],
        }


def summarize_frontier(
    records: Sequence[Record | AnswerRecord],
    target: Target,
    axis: Axis = "tokens",
    *,
    pair: tuple[str, str] | None = None,
    seed: int = 0,
) -> FrontierSummary:
    """Usable budgets and crossings of records that may be compared (`frontier.joined`).

    Args:
        records: of one kind, full KV's among them for a relative target.
        target: what has to be kept; its metric is the one read.
        axis: what budgets are measured in.
        pair: labels of two methods: then these are compared, at equal and smaller budgets of the first.
        seed: of the bootstrap.

    Raises:
        FrontierError: records without that metric, a relative target without full KV, or a pair without cells.
    """
    points = measured_points(records, target.metric)
    active = [point for point in points if point.regime == DECODE_ACTIVE]
    usable: dict[tuple[str, str, str], UsableBudget | str] = {}
    selecting = selecting_labels(records)
    for point in points:
        key = (point.task, point.method, point.rule)
        if key not in usable:
            own = [one for one in active if (one.task, one.method, one.rule) == key]
            if point.method in selecting:
                usable[key] = tables.SELECTS
            elif not own:
                usable[key] = tables.NO_RECORD
            elif all(says_nothing(target, one) for one in own):
                usable[key] = f"full KV's {target.metric} is 0"
            else:
                usable[key] = usable_budget(own, target, axis=axis, seed=seed)
    counts: dict[str, Counter[str]] = {}
    for record in records:
        if record.budget is not None:
            counts.setdefault(record.task, Counter())[regime(record)] += 1
    # every task's pairs stand in one family of tests, so that Holm's correction covers all that is shown
    if pair is None:
        found = crossings(active, target.metric, axis=axis, seed=seed)
    else:
        found = between(active, *pair, target.metric, axis=axis, seed=seed)
    return FrontierSummary(target, axis, points, usable, found, {task: dict(own) for task, own in counts.items()}, pair)


def _comparison(one: Comparison) -> dict[str, Any]:
    return {
        "task": one.ours.task,
        "label": one.label,
        "rule": json.loads(one.ours.rule),
        "smaller": {"method": one.ours.method, "tokens": one.ours.tokens, "mean": one.ours.mean},
        "larger": {"method": one.theirs.method, "tokens": one.theirs.tokens, "mean": one.theirs.mean},
        "difference": vars(one.advantage),
        "p": one.p,
        "holds": one.holds,
    }
