"""Everything `reasonkv frontier` shows: usable budgets, crossings, regimes, and what a search found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table

from reasonkv.evaluate.frontier import (
    Axis,
    Comparison,
    Point,
    UsableBudget,
    between,
    crossings,
    measured_points,
    usable_budget,
)  # fmt: skip
from reasonkv.evaluate.statistics import LEAST
from reasonkv.evaluate.target import Target
from reasonkv.report.metrics import REGIMES, UNITS
from reasonkv.report.terminal import make_table
from reasonkv.report.wording import amount, interval_text, number, plural, rule_words, selecting, span

if TYPE_CHECKING:
    from reasonkv.evaluate.tune import Search

SHOWN = 12
"""Crossings shown to people; JSON has all."""
_STATUS = {"reached": "reached", "at most": "kept already by the smallest", "not reached": "not reached"}


@dataclass(frozen=True)
class Frontier:
    """A frontier, ready to be shown."""

    target: Target
    axis: Axis
    points: list[Point]  # every cell, by regime
    # by (task, method, rule), from compressed points alone; why not, where there is none
    usable: dict[tuple[str, str, str], UsableBudget | str]
    # between compressed points, the surest first; with `pair` all pairs of those two methods
    crossings: list[Comparison]
    regimes: pd.DataFrame  # bounded records by task (rows) and regime (columns)
    pair: tuple[str, str] | None = None  # the two methods that were named, if any

    @property
    def left_out(self) -> str:
        """One sentence: which records no mean and no figure of the frontier holds."""
        total, others = int(self.regimes.to_numpy().sum()), self.regimes.drop(columns="compressed").sum()
        if not others.any():
            return f"All {total:,} bounded records are compressed."
        words = " and ".join(f"{count:,} {name}" for name, count in others.items() if count)
        return f"Only compressed records count; left out: {words} of {total:,} bounded records."

    def tables(self) -> list[Table]:
        """Return the tables for the terminal."""
        found = [self._usable_table(task) for task in dict.fromkeys(task for task, _, _ in self.usable)]
        if self.crossings:
            found.append(self._crossings_table())
        shown = self.regimes[[name for name in self.regimes if name != "selecting" or self.regimes[name].any()]]
        rows = [[str(task), *(f"{count:,}" for count in own)] for task, own in shown.T.items()]
        return [*found, make_table("Bounded records by regime", ["task"], list(shown), rows)]

    def _usable_table(self, task: str) -> Table:
        words = rule_words([rule for _, _, rule in self.usable])
        several, rows = any(words.values()), []
        for (own, method, rule), found in self.usable.items():
            if own != task:
                continue
            cells = ["-", "-", "-", "-", str(found)]
            if isinstance(found, UsableBudget):
                key = (task, method, rule, "compressed")
                counts = [len(p.values) for p in self.points if (p.task, p.method, p.rule, p.regime) == key]
                measured = span(amount(found.smallest, self.axis), amount(found.largest, self.axis))
                cells = [measured, span(str(min(counts)), str(max(counts))), *usable_text(found, self.axis)]
            rows.append([method, *[words[rule]] * several, *cells])
        left = ["method", *["rule"] * several]
        title = f"{task}: usable budget for {self.target}{_in(self.axis)}"
        return make_table(title, left, ["measured", "n", "usable", "95 % interval"], rows, ["status"])

    def _crossings_table(self) -> Table:
        metric, rows = self.target.metric, []
        scale, digits, unit = (100, 2, "points") if metric in {"top1", "accuracy"} else (1, 3, "nats")
        for one in self.crossings if self.pair else self.crossings[:SHOWN]:
            means = " : ".join(f"{side.mean * scale:.{digits}f}" for side in (one.ours, one.theirs))
            gain = one.advantage
            interval = interval_text(gain.low, gain.high, digits, scale) or "-"
            rows.append([one.ours.task, one.label, means, number(gain.mean * scale, digits), interval, str(gain.pairs),
                         f"{one.p:.2g}", "yes" if one.holds else "no"])  # fmt: skip
        title = "Crossings: the smaller does better"
        if self.pair:
            title = f"{self.pair[0]} at the same budget as {self.pair[1]} and at smaller ones"
        right = [metric, f"better by, {unit}", "95 % interval", "n", "p (Holm)"]
        return make_table(title + _in(self.axis), ["task", "smaller > larger"], right, rows, ["holds"])

    def sentences(self) -> list[str]:
        """Return what the tables mean."""
        return [
            "usable: from there on every measured budget keeps the target; linear in log(budget) between two of them; "
            "the interval is a bootstrap over examples. holds: the interval lies above 0 and p, corrected by Holm over "
            "every pair of a smaller and a larger cell, is below 0.05. n: examples, fewer where rows are too "
            "short for the larger budgets; fewer than 8 have no interval.",
            *self._random_sentences(),
            self._crossings_sentence(),
            self.left_out,
        ]

    def _random_sentences(self) -> list[str]:
        """Say where a target is kept by random eviction, so that it separates no method from chance."""
        return [
            f"On {task} even random keeps {self.target} from {amount(found.tokens, self.axis)} on: above that the "
            f"target separates no method from chance. Give a stricter --target, or measure smaller budgets."
            for (task, method, _), found in self.usable.items()
            if method == "random" and isinstance(found, UsableBudget) and found.tokens is not None
        ]

    def _crossings_sentence(self) -> str:
        found = self.crossings
        if self.pair:
            parts = []
            for words, less in (("at the same budget", False), ("at a smaller one", True)):
                own = [one for one in found if (one.ours.tokens != one.theirs.tokens) == less]
                parts.append(f"{sum(one.holds for one in own)} of {len(own)} pairs {words}")
            return f"{self.pair[0]} is surely better than {self.pair[1]} in {', and in '.join(parts)}."
        if not found:
            return "Crossings: at no pair of methods and budgets does the smaller budget do better."
        held = sum(one.holds for one in found)
        text = f"{plural(len(found), 'pair')} where the smaller does better, {held} of them surely."
        return text + (f" The surest {SHOWN} are shown; --json has all." if len(found) > SHOWN else "")

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON output."""
        return {
            "metric": self.target.metric,
            "target": str(self.target),
            "axis": self.axis,
            "regimes": {task: {k: int(v) for k, v in own.items() if v} for task, own in self.regimes.T.items()},
            "usable": [
                {"task": task, "method": method, "rule": json.loads(rule)}
                | ({"status": found} if isinstance(found, str) else vars(found))
                for (task, method, rule), found in self.usable.items()
            ],
            "between": self.pair,
            "crossings": [_comparison_dict(one) for one in self.crossings],
            "points": [_point_dict(one) for one in self.points],
        }


def summarize_frontier(
    frame: pd.DataFrame,
    target: Target,
    axis: Axis = "tokens",
    *,
    pair: tuple[str, str] | None = None,
    compare: bool = True,
) -> Frontier:
    """Return usable budgets and crossings of records that may be compared (`frontier.read_comparable`).

    Args:
        pair: labels of two methods: then these are compared, at equal and smaller budgets of the first.
        compare: look for crossings; they take long where there are many cells.

    Raises:
        FrontierError: records without that metric, a relative target without full KV, or a pair without cells.
    """
    points = measured_points(frame, target.metric)
    active = [point for point in points if point.regime == "compressed"]
    chosen = selecting(frame)
    usable: dict[tuple[str, str, str], UsableBudget | str] = {}
    for key in dict.fromkeys((point.task, point.method, point.rule) for point in points):
        own = [one for one in active if (one.task, one.method, one.rule) == key]
        if key[1] in chosen:
            usable[key] = "keeps everything: its budget is what it reads"
        elif not own:
            usable[key] = "no compressed record"
        elif all(one.says_nothing(target) for one in own):
            usable[key] = f"full KV's {target.metric} is 0"
        else:
            usable[key] = usable_budget(own, target, axis=axis)
    bounded = frame[frame["tokens"] > 0]
    counts = pd.crosstab(bounded["task"], bounded["regime"]).reindex(
        index=list(bounded["task"].unique()), columns=list(REGIMES), fill_value=0
    )
    # every task's pairs stand in one family of tests, so that Holm's correction covers all that is shown
    if pair is None:
        found = crossings(active, target.metric, axis=axis) if compare else []
    else:
        found = between(active, *pair, target.metric, axis=axis)
    return Frontier(target, axis, points, usable, found, counts, pair)


def usable_text(found: UsableBudget, axis: Axis) -> tuple[str, str, str]:
    """Return a usable budget, its interval and its status, as text."""
    smallest, largest = (amount(one, axis) for one in (found.smallest, found.largest))

    def text(value: float | None) -> str:
        if value is None:
            return f"> {largest}"
        return f"≤ {smallest}" if value <= found.smallest else amount(value, axis)

    words = _STATUS[found.status]
    if found.fails_above:
        words += "; missed again at " + ", ".join(amount(one, axis) for one in found.fails_above)
    if found.examples < LEAST:
        return text(found.tokens), "-", words
    low, high = text(found.low), text(found.high)
    return text(found.tokens), low if low == high and low[0] in "≤>" else f"[{low}, {high}]", words


def search_tables(searches: Sequence[Search], window: int | None = None) -> list[Table]:
    """Return one table per task of what a search for the smallest usable budget found.

    Args:
        window: size of the windows whose kept slots were searched, if any.
    """
    tables = []
    for task in dict.fromkeys(one.task for one in searches):
        rows = []
        for one in (search for search in searches if search.task == task):
            counts, (low, _) = {probe.tokens: probe.examples for probe in one.probes}, one.bracket
            missed = one.status == "reached" or (one.status == "not reached" and len(set(one.bracket)) > 1)
            usable = usable_text(one.usable, "tokens")[:2] if one.usable else ("-", "-")
            rows.append([
                one.method,
                f"{low:,} (n={counts[low]})" if missed else "-",
                "-" if one.tokens is None else f"{one.tokens:,} (n={counts[one.tokens]})",
                *usable,
                one.status,
                _order_words(one),
                ", ".join(f"{tokens:,}" for tokens in sorted(counts)),
            ])  # fmt: skip
        title = f"{task}: usable budget for {searches[0].target}"
        title += "" if window is None else f", in slots kept of every {window:,}"
        right, last = ["missed", "kept", "usable", "95 % interval"], ["status", "larger is better", "runs at"]
        tables.append(make_table(title, ["method"], right, rows, last))
    return tables


SEARCH_SENTENCE = (
    "missed, kept: the final bracket, both run; n: compressed examples there. usable: interpolated in log(budget) over "
    "all runs; the interval is a bootstrap over examples, and doubts the budget as much as the examples do, whatever "
    "the bracket's width. larger is better: whether the metric never fell as the budget grew."
)


def _order_words(search: Search) -> str:
    """Whether larger budgets were better throughout."""
    fails = search.usable.fails_above if search.usable else ()
    if fails:
        return "no: missed again at " + ", ".join(f"{one:,.0f}" for one in fails)
    sure = [fall for fall in search.falls if fall.holds]
    if sure:
        return "no: " + ", ".join(f"{fall.ours.tokens:,} beats {fall.theirs.tokens:,}" for fall in sure)
    return "up to noise" if search.falls else "yes"


def _point_dict(point: Point) -> dict[str, object]:
    values = pd.Series(point.values)
    se = float(values.sem()) if len(values) > 1 else None
    names = ("task", "method", "regime", "tokens", "mean", "physical_mean", "bytes_held")
    return {name: getattr(point, name) for name in names} | {"rule": json.loads(point.rule), "n": len(values), "se": se}


def _comparison_dict(one: Comparison) -> dict[str, Any]:
    sides = {
        name: {"method": side.method, "tokens": side.tokens, "mean": side.mean}
        for name, side in (("smaller", one.ours), ("larger", one.theirs))
    }
    rest = {"difference": one.advantage, "p": one.p, "holds": one.holds}
    return {"task": one.ours.task, "label": one.label, "rule": json.loads(one.ours.rule)} | sides | rest


def _in(axis: Axis) -> str:
    return "" if axis == "tokens" else f", in {UNITS[axis]}"
