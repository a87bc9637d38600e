"""The report's section on usable budgets and crossings: what a method needs, and where a smaller budget does better."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from itertools import combinations

from reasonkv.evaluate.crossings import EQUAL, Comparison, crossings
from reasonkv.evaluate.frontier import (
    Axis,
    FrontierError,
    Point,
    Target,
    UsableBudget,
    measured_points,
    usable_budget,
)
from reasonkv.report.cohorts import Cohort
from reasonkv.report.frontier_tables import UNITS, usable_text
from reasonkv.report.regimes import DECODE_ACTIVE
from reasonkv.report.wording import difference_text, listed

KEPT = "0.95x"
"""The target: this share of full KV's mean on the same examples."""
SHOWN = 12
"""Crossings in the table; as many as `FOLDED` more fold out below it."""
FOLDED = 100
MOST_PAIRS = 10_000
"""Above this many pairs of cells crossings are left to `reasonkv frontier`, so that a report is written in seconds."""
_STATUS = {"reached": "reached", "at most": "kept by the smallest", "not reached": "not reached"}
_METRIC = {"replay": "top1", "evaluate": "accuracy"}
_NAME = {"replay": "top-1 agreement", "evaluate": "accuracy"}
_UNIT = {"replay": "traces", "evaluate": "problems"}


def usable_intro() -> str:
    """What the tables of this section mean, once for all of them; HTML."""
    share = 100 * float(KEPT.rstrip("x"))
    return (
        f'<p class="muted">A usable budget is the smallest from which on every measured budget keeps {share:.0f} % of '
        "full KV's accuracy (answers) or top-1 agreement (replay): interpolated between measured budgets on a "
        "logarithmic scale, with a 95 % bootstrap interval over problems.</p>"
        '<p class="muted">A crossing is a method that does better with a smaller budget than another with a larger '
        "one, on the same task: by a paired t test over problems, corrected by Holm for every pair tested.</p>"
    )


def usable_section(cohort: Cohort) -> str:
    """Usable budgets and crossings of one cohort as HTML, from its decode-active records; "" where only full KV ran."""
    if not cohort.rule:
        return ""
    metric, axis = _METRIC[cohort.kind], _axis(cohort)
    rule = json.dumps(cohort.rule, sort_keys=True)
    points = [
        one
        for one in measured_points(cohort.results.answers or cohort.results.records, metric)
        if one.rule == rule and one.method not in cohort.selecting
    ]
    active = [one for one in points if one.regime == DECODE_ACTIVE]
    left_out = ""
    if cohort.selecting:
        left_out = f"<p>Left out: {escape(listed(cohort.selecting))}, whose budget is what is read and not held.</p>"
    if not active:
        return "<p>No record is decode-active, so there is nothing to compare.</p>" + left_out
    return left_out + _usable(cohort, points, active, axis) + _crossings(cohort, active, metric, axis)


def _axis(cohort: Cohort) -> Axis:
    """Budgets that were solved for a mean length are compared by that length."""
    return "physical_mean" if cohort.results.manifest.get("arguments", {}).get("mean_slots") else "tokens"


def _usable(cohort: Cohort, points: Sequence[Point], active: Sequence[Point], axis: Axis) -> str:
    target = Target.parse(KEPT, _METRIC[cohort.kind])
    found: dict[tuple[str, str], UsableBudget | None] = {}
    try:
        for key in dict.fromkeys((one.task, one.method) for one in points):
            own = [one for one in active if (one.task, one.method) == key]
            found[key] = usable_budget(own, target, axis=axis) if own else None
    except FrontierError as error:
        return f"<p>Usable budgets are missing. {escape(str(error))}</p>"
    tasks, methods = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    measured = [one for one in found.values() if one]
    ends = min(one.smallest for one in measured), max(one.largest for one in measured)
    head = "".join(f'<th scope="col">{escape(task)}</th>' for task in tasks)
    body = "".join(
        f'<tr><th scope="row">{escape(method)}</th>'
        + "".join(_cell(found.get((task, method)), axis, ends) for task in tasks)
        + "</tr>"
        for method in methods
    )
    scale = f"; lines run from {ends[0]:,.0f} to {ends[1]:,.0f}, logarithmic" if ends[1] > ends[0] else ""
    caption = f"{UNITS[axis]} [95 % interval]{scale}"
    return (
        f'<div class="table-frame glance usable" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption>"
        f'<thead><tr><th scope="col">method</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(found: UsableBudget | None, axis: Axis, ends: tuple[float, float]) -> str:
    value, interval, told = usable_text(found, axis)
    if found is None:
        return '<td class="none">–<span class="status">nothing decode-active</span></td>'
    _, again, where = told.partition("; ")
    status = _STATUS[found.status] + again + where
    aside = "" if interval == value else f" <small>{escape(interval)}</small>"

    def place(value: float) -> float:
        span = math.log(ends[1] / ends[0])
        return 100 * math.log(value / ends[0]) / span if span > 0 else 50.0

    low, high = (place(end if end is not None else ends[1]) for end in (found.low, found.high))
    bar = f'<b style="left:{low:.1f}%;width:{high - low:.1f}%"></b>' if high > low else ""
    dot = f'<i style="left:{place(found.tokens):.1f}%"></i>' if found.tokens is not None else ""
    return (
        f'<td><span class="value">{escape(value)}{aside}</span>'
        f'<span class="range" aria-hidden="true">{bar}{dot}</span>'
        f'<span class="status">{escape(status)}</span></td>'
    )


def _crossings(cohort: Cohort, active: Sequence[Point], metric: str, axis: Axis) -> str:
    tested = pairs_tested(active, axis)
    if not tested:
        return "<h4>Crossings</h4><p>No method was measured at a smaller budget than another, so nothing can cross.</p>"
    if tested > MOST_PAIRS:
        return (
            f"<h4>Crossings</h4><p>{tested:,} pairs are more than the {MOST_PAIRS:,} a report compares; "
            f"<code>reasonkv frontier</code> compares them all.</p>"
        )
    held = [one for one in crossings(active, metric, axis=axis) if one.holds]
    words = f"{tested:,} pair{'s' if tested > 1 else ''} tested, "
    if not held:
        most = max(len(one.values) for one in active)
        # a test that flips signs cannot go below this, and Holm multiplies the least of all by their number
        hopeless = tested * 2.0 ** (1 - most) >= 0.05
        reason = f" None could: {most} {_UNIT[cohort.kind]} a cell are too few." if hopeless else ""
        return f"<h4>Crossings</h4><p>{words}none holds.{reason}</p>"
    verb = "holds" if len(held) == 1 else "hold"
    shown = f"; the {SHOWN} surest come first" if len(held) > SHOWN else ""
    found = f"<h4>Crossings</h4><p>{words}{len(held):,} {verb}{shown}.</p>{_table(held[:SHOWN], cohort.kind, axis)}"
    rest = held[SHOWN : SHOWN + FOLDED]
    if rest:
        beyond = len(held) - SHOWN
        name = f"The other {beyond:,}" if beyond <= FOLDED else f"The next {FOLDED} of {beyond:,} others"
        found += f"<details><summary>{name}</summary>{_table(rest, cohort.kind, axis)}</details>"
    return found


def pairs_tested(points: Sequence[Point], axis: Axis) -> int:
    """How many pairs `crossings` compares and corrects for.

    Args:
        points: of one rule and regime.
        axis: what "smaller" means.
    """
    slack = 1.0 if axis == "tokens" else 1 - EQUAL
    count = 0
    for task in dict.fromkeys(one.task for one in points):
        for one, other in combinations([point for point in points if point.task == task], 2):
            small, large = sorted((one.x(axis), other.x(axis)))
            count += one.method != other.method and small < slack * large and bool(one.values.keys() & other.values)
    return count


def _table(found: Sequence[Comparison], kind: str, axis: Axis) -> str:
    rows = []
    for one in found:
        sides = "".join(
            f"<td>{escape(side.method)} <small>at {side.x(axis):,.0f}</small></td>"
            f'<td class="number">{100 * side.mean:.1f}</td>'
            for side in (one.ours, one.theirs)
        )
        gain, _, interval = difference_text(one.advantage, 1, 100).partition(" ")
        rows.append(
            f'<tr><th scope="row">{escape(one.ours.task)}</th>{sides}'
            f'<td class="number">{gain} <small>{interval}</small></td>'
            f'<td class="number">{one.advantage.pairs}</td><td class="number">{one.p:.2g}</td></tr>'
        )
    name = f"{_NAME[kind]} %"
    heads = [
        ("task", ""), ("smaller budget", ""), (name, "number"), ("larger budget", ""), (name, "number"),
        ("better by, points", "number"), ("n", "number"), ("p (Holm)", "number"),
    ]  # fmt: skip
    head = "".join(f'<th scope="col" class="{style}">{escape(text)}</th>' for text, style in heads)
    return (
        '<div class="table-frame crossings" tabindex="0" role="region" aria-label="Crossings that hold"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
