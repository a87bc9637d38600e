"""The terminal tables of a frontier: usable budgets, crossings, and how many records are of which regime."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from reasonkv.evaluate.bisection import Search
from reasonkv.evaluate.crossings import Comparison
from reasonkv.evaluate.frontier import Axis, Point, Target, UsableBudget
from reasonkv.report.regimes import DECODE_ACTIVE, MEANING, SELECTING

UNITS = {
    "tokens": "budget, slots per KV head after a compaction",
    "physical_mean": "mean slots per output token",
    "bytes_held": "bytes held at the end",
}
NO_RECORD = "no decode-active record"
SELECTS = "holds everything: its budget is what it reads"
_SCALE = {"top1": 100.0, "accuracy": 100.0}
SHOWN = 12
"""Crossings shown to people; JSON has all."""


def amount(value: float, axis: Axis) -> str:
    """A place on an axis as text: whole slots, or bytes with a binary unit."""
    if axis != "bytes_held":
        return f"{value:,.0f}"
    unit, name = byte_unit(value)
    return f"{value / unit:,.{2 if unit > 1024 else 0}f} {name}"


def byte_unit(value: float) -> tuple[int, str]:
    """The largest binary unit that is at most a number of bytes, and its name."""
    place = min(3, max(0, int(math.log2(max(value, 1)) // 10)))
    return 1024**place, ("B", "KiB", "MiB", "GiB")[place]


def usable_text(found: UsableBudget | None, axis: Axis) -> tuple[str, str, str]:
    """A usable budget, its interval and its status, as text; None is a method without decode-active records."""
    if found is None:
        return "-", "-", NO_RECORD
    smallest, largest = (amount(one, axis) for one in (found.smallest, found.largest))
    beyond = f"> {largest}"

    def text(value: float | None) -> str:
        if value is None:
            return beyond
        return f"≤ {smallest}" if value <= found.smallest else amount(value, axis)

    status = {"reached": "reached", "at most": "kept already by the smallest", "not reached": "not reached"}
    words = status[found.status]
    if found.fails_above:
        words += "; missed again at " + ", ".join(amount(one, axis) for one in found.fails_above)
    low, high = text(found.low), text(found.high)
    return text(found.tokens), low if low == high and low[0] in "≤>" else f"[{low}, {high}]", words


def rule_words(rules: Sequence[str]) -> dict[str, str]:
    """What tells budget rules apart, by rule; nothing where there is one."""
    parsed = {rule: json.loads(rule) for rule in dict.fromkeys(rules)}
    names = sorted({name for one in parsed.values() for name in one})
    varying = [name for name in names if len({json.dumps(one.get(name)) for one in parsed.values()}) > 1]
    return {rule: ", ".join(f"{name}={one.get(name)}" for name in varying) for rule, one in parsed.items()}


def usable_tables(
    usable: Mapping[tuple[str, str, str], UsableBudget | str], points: Sequence[Point], target: Target, axis: Axis
) -> list[Table]:
    """One table per task: every method's usable budget.

    Args:
        usable: by (task, method, rule), from decode-active records; a reason where there is none.
        points: the decode-active ones, for how many examples each has.
        target: what has to be kept.
        axis: what the budget is measured in.
    """
    words = rule_words([rule for _, _, rule in usable])
    tables = []
    for task in dict.fromkeys(task for task, _, _ in usable):
        table = _table(f"{task}: usable budget for {target}" + _in(axis))
        table.add_column("method", no_wrap=True)
        if any(words.values()):
            table.add_column("rule")
        for heading in ("measured", "n", "usable", "95 % interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("status")
        for (own, method, rule), found in usable.items():
            if own != task:
                continue
            counts = [len(one.values) for one in points if (one.task, one.method, one.rule) == (task, method, rule)]
            cells = ["-", "-", "-", "-", found] if isinstance(found, str) else _usable_cells(found, counts, axis)
            table.add_row(method, *([words[rule]] if any(words.values()) else []), *cells)
        tables.append(table)
    return tables


def _usable_cells(found: UsableBudget, counts: Sequence[int], axis: Axis) -> list[str]:
    measured = _span(amount(found.smallest, axis), amount(found.largest, axis))
    value, interval, status = usable_text(found, axis)
    return [measured, _span(f"{min(counts)}", f"{max(counts)}"), value, interval, status]


def crossings_table(
    found: Sequence[Comparison], metric: str, axis: Axis, between: tuple[str, str] | None = None
) -> Table | None:
    """The surest crossings, at most `SHOWN` of them; None where nothing does better with less.

    Args:
        found: from `crossings`, or from `between`: then all of them.
        metric: theirs.
        axis: what "smaller" means.
        between: the two methods of `between`.
    """
    if not found:
        return None
    title = "Crossings: the smaller does better"
    if between is not None:
        title = f"{between[0]} at the same budget as {between[1]} and at smaller ones"
    scale, digits = _SCALE.get(metric, 1.0), 2 if metric in _SCALE else 3
    unit = ", points" if metric in _SCALE else ", nats"
    table = _table(title + _in(axis))
    table.add_column("task")
    table.add_column("smaller > larger", no_wrap=True)
    for heading in (metric, f"better by{unit}", "95 % interval", "n", "p (Holm)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("holds")
    for one in found if between is not None else found[:SHOWN]:
        gain = one.advantage
        table.add_row(
            one.ours.task,
            one.label,
            f"{one.ours.mean * scale:.{digits}f} : {one.theirs.mean * scale:.{digits}f}",
            _signed(gain.mean * scale, digits),
            f"[{_signed(gain.low * scale, digits)}, {_signed(gain.high * scale, digits)}]",
            str(gain.pairs),
            f"{one.p:.2g}",
            "yes" if one.holds else "no",
        )
    return table


def crossings_sentence(found: Sequence[Comparison], between: tuple[str, str] | None = None) -> str:
    """How many there are, how many hold, and how many are not shown."""
    if between is not None:
        parts = []
        for words, less in (("at the same budget", False), ("at a smaller one", True)):
            own = [one for one in found if (one.ours.tokens != one.theirs.tokens) == less]
            parts.append(f"{sum(one.holds for one in own)} of {len(own)} pairs {words}")
        return f"{between[0]} is surely better than {between[1]} in {', and in '.join(parts)}."
    if not found:
        return "Crossings: at no pair of methods and budgets does the smaller budget do better."
    held = sum(one.holds for one in found)
    text = f"{len(found)} pair{'s' * (len(found) != 1)} where the smaller does better, {held} of them surely."
    return text + (f" The surest {SHOWN} are shown; --json has all." if len(found) > SHOWN else "")


def search_tables(searches: Sequence[Search], window: int | None = None) -> list[Table]:
    """One table per task: what a search by bisection found.

    Args:
        searches: from `search_budgets`.
        window: size of the windows whose kept slots were searched, if any.
    """
    found = []
    for task in dict.fromkeys(one.task for one in searches):
        own = [one for one in searches if one.task == task]
        of = "" if window is None else f", in slots kept of every {window:,}"
        table = _table(f"{task}: usable budget for {own[0].target}{of}")
        table.add_column("method", no_wrap=True)
        for heading in ("missed", "kept", "usable", "95 % interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in ("status", "larger is better", "runs at"):
            table.add_column(heading)
        for one in own:
            usable, interval, _ = usable_text(one.usable, "tokens")
            counts = {probe.tokens: probe.examples for probe in one.probes}
            low, high = one.bracket
            kept = one.tokens
            misses = one.status == "reached" or (one.status == "not reached" and low != high)
            table.add_row(
                one.method,
                f"{low:,} (n={counts[low]})" if misses else "-",
                "-" if kept is None else f"{kept:,} (n={counts[kept]})",
                usable,
                interval,
                one.status,
                _order_words(one),
                ", ".join(f"{probe.tokens:,}" for probe in sorted(one.probes, key=lambda probe: probe.tokens)),
            )
        found.append(table)
    return found


def search_sentences(left_out: str) -> list[str]:
    """What the tables of a search mean.

    Args:
        left_out: which records were left out, of the whole folder.
    """
    return [
        "missed, kept: the final bracket, both run; n: decode-active examples there. usable: interpolated in "
        "log(budget) over all runs; the interval is a bootstrap over examples, and doubts the budget as much as the "
        "examples do, whatever the bracket's width. larger is better: whether the metric never fell as the budget "
        "grew.",
        left_out,
    ]


def _order_words(search: Search) -> str:
    """Whether larger budgets were better throughout."""
    fails = search.usable.fails_above if search.usable else ()
    if fails:
        return "no: missed again at " + ", ".join(f"{one:,.0f}" for one in fails)
    sure = [fall for fall in search.falls if fall.sure]
    if sure:
        return "no: " + ", ".join(f"{fall.smaller:,} beats {fall.larger:,}" for fall in sure)
    return "up to noise" if search.falls else "yes"


def regime_table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    """Bounded records by task and regime.

    Args:
        counts: by task, then by regime.
    """
    table = _table("Bounded records by regime")
    table.add_column("task")
    names = [name for name in MEANING if name != SELECTING or any(name in own for own in counts.values())]
    for name in names:
        table.add_column(name, justify="right")
    for task, own in counts.items():
        table.add_row(task, *(f"{own.get(name, 0):,}" for name in names))
    return table


def left_out(counts: Mapping[str, Mapping[str, int]]) -> str:
    """One sentence: which records no mean and no figure of the frontier holds."""
    total = sum(sum(own.values()) for own in counts.values())
    others = {name: sum(own.get(name, 0) for own in counts.values()) for name in MEANING if name != DECODE_ACTIVE}
    others = {name: count for name, count in others.items() if count}
    if not others:
        return f"All {total:,} bounded records are {DECODE_ACTIVE}."
    words = " and ".join(f"{count:,} {name}" for name, count in others.items())
    return f"Only {DECODE_ACTIVE} records count; left out: {words} of {total:,} bounded records."


def point_dict(point: Point, se: float | None) -> dict[str, object]:
    """A cell for JSON: its mean and not its single examples."""
    return {
        "task": point.task,
        "method": point.method,
        "rule": json.loads(point.rule),
        "regime": point.regime,
        "tokens": point.tokens,
        "n": len(point.values),
        "mean": point.mean,
        "se": se,
        "physical_mean": point.physical_mean,
        "bytes_held": point.bytes_held,
    }


def _in(axis: Axis) -> str:
    return "" if axis == "tokens" else f", in {UNITS[axis]}"


def _signed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"  # never -0.0


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
