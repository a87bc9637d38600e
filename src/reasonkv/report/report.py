"""The report: one HTML file that says what ran, what came out, and how to run it again."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from reasonkv.evaluate.frontier import (
    Axis,
    FrontierError,
    Point,
    Target,
    UsableBudget,
    crossings,
    measured_points,
    pairs_to_test,
    usable_budget,
)
from reasonkv.evaluate.table import FULL_KV
from reasonkv.files import write_atomically
from reasonkv.report.charts import chart_script, report_chart
from reasonkv.report.cohorts import (
    Cohort,
    Folder,
    cohorts,
    job_words,
    read_folders,
    record_columns,
    same_problems,
    summary_columns,
)
from reasonkv.report.command import command
from reasonkv.report.frontier import usable_text
from reasonkv.report.html import INSPECTOR_SCRIPTS, INSPECTOR_STYLES, render
from reasonkv.report.inspector import load_inspections
from reasonkv.report.metrics import MAIN, REGIMES, UNITS
from reasonkv.report.wording import budget_sentence, difference_text, estimate_text, listed, seeds_sentence, selecting

TITLE = "What the cache kept, and what that did"
_TARGET = "0.95x"
_CROSSINGS = 112
"""Crossings in the page; all but the first 12 fold out."""
_MOST_PAIRS = 10_000
"""Above this many pairs of cells crossings are left to `reasonkv frontier`, so that a report is written in seconds."""
_METRIC = {"replay": "top1", "evaluate": "accuracy"}
_NAME = {"replay": "top-1 agreement", "evaluate": "accuracy"}
_UNIT = {"replay": "traces", "evaluate": "problems"}


def write_report(folders: Sequence[Path], path: Path, *, title: str = TITLE) -> Path:
    """Write the report of one or more results folders, and return its path.

    Args:
        folders: made by `reasonkv replay`, `evaluate` or `demo`.
        path: HTML file to write, whole or not at all.
        title: heading of the page.

    Raises:
        ResultsError: a folder holds no results, is named twice, or an inspection in it is damaged.
        RecordError: a record is damaged.
        OSError: the file cannot be written.
    """
    text = report_html(folders, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def report_html(folders: Sequence[Path], *, title: str = TITLE) -> str:
    """Return the report as one HTML document; arguments and errors as in `write_report`."""
    read = read_folders([Path(one) for one in folders])
    groups = cohorts(read)
    inspections = {
        name if len(read) == 1 else f"{one.name}: {name}": data
        for one in read
        for name, data in load_inspections(one.path).items()
    }
    summaries, records = [summary_columns(one) for one in groups], [record_columns(one.frame) for one in read]
    bounded = any(one.prompt for one in groups)
    report = {
        "cohorts": [
            {"label": one.name, "kind": one.kind, "rows": len(one.summary), "columns": columns}
            | {"chart": report_chart(one.summary, one.kind, _baseline(one, groups)) if one.prompt else None}
            for one, columns in zip(groups, summaries, strict=True)
        ],
        "folders": [one.name for one in read],
        "inspections": [{"id": f"inspection-{at}", "name": name} for at, name in enumerate(inspections)],
    }
    # each in an element of its own, so that the page parses only what somebody looks at
    data: dict[str, Any] = {"report": report}
    data |= {f"records-{at}": {"rows": len(one.frame), "columns": records[at]} for at, one in enumerate(read)}
    data |= {f"inspection-{at}": one for at, one in enumerate(inspections.values())}
    facts = [_facts(one.manifest) for one in read]
    words = {one["label"]: one["meaning"] for table in [*records[::-1], *summaries[::-1]] for one in table}
    return render(
        "report.html.j2",
        styles=["report.css", *(INSPECTOR_STYLES if inspections else ())],
        scripts=[*(INSPECTOR_SCRIPTS if inspections else ()), "report_table.js", "report.js"],
        code=[chart_script()] if bounded else [],
        data=data,
        title=title,
        ran=[_what_ran(one) for one in read],
        cohorts=[_cohort_view(one) for one in groups],
        bounded=bounded,
        inspections=list(inspections),
        folders=[_folder_view(one, own) for one, own in zip(read, facts, strict=True)],
        shared_facts=facts[0] if all(one == facts[0] for one in facts) else None,
        words=dict(sorted(words.items(), key=lambda one: one[0].startswith("Δ"))),
        **_regimes(read),
    )


def _baseline(cohort: Cohort, groups: Sequence[Cohort]) -> pd.DataFrame | None:
    """Where prompts may be evicted, random with the prompt kept is the one to beat: its rows of another folder."""
    if cohort.prompt != "count":
        return None
    other = next((one for one in groups if one.prompt in {"keep", "on_top"} and same_problems(one, cohort)), None)
    if other is None:
        return None
    rows = other.summary[other.summary["method"] == "random"].assign(method="random, prompt kept")
    return rows if other.prompt == "keep" else rows.assign(tokens=math.nan)  # its budgets count something else


def _what_ran(folder: Folder) -> str:
    """One sentence: model, job, tasks, problems, methods, budgets, seeds."""
    frame, model = folder.frame, folder.manifest.get("model", {}).get("name", "an unnamed model")
    problems = len(frame[["task", "example"]].drop_duplicates())
    bounded = frame[frame["tokens"] > 0]
    did = f"replayed {problems:,} traces that full KV had written"
    if "correct" in frame:
        samples = frame["sample"].nunique()
        did = f"wrote answers to {problems:,} problems ({'greedy' if samples == 1 else f'{samples} samples each'})"
    methods, budgets = bounded["label"].nunique(), sorted(bounded["tokens"].unique())
    cells = f"full KV and {methods} method{'s' if methods != 1 else ''}"
    if budgets:
        few = len(budgets) < 6
        cells += f" at {listed([f'{one:,}' for one in budgets])} slots" if few else f" at {len(budgets)} budgets"
        cells += " per KV head" if few else f" from {budgets[0]:,} to {budgets[-1]:,} slots"
    tasks = listed(list(frame["task"].unique()))
    return f"The model {model} {did}, of {tasks}: {cells}, {len(frame):,} records. {seeds_sentence(frame)}"


def _cohort_view(cohort: Cohort) -> dict[str, Any]:
    return {
        "name": cohort.name,
        "budget": budget_sentence(cohort.frame),
        "tasks": list(cohort.summary["task"].unique()),
        "tabs": glance(cohort),
        "usable": usable(cohort) if cohort.prompt else None,
    }


def _folder_view(folder: Folder, facts: Mapping[str, str]) -> dict[str, Any]:
    manifest = folder.manifest
    return {"name": folder.name, "command": command(manifest), "facts": facts,
            "date": manifest.get("date", "?"), "run": manifest.get("run", "?"),
            "manifest": json.dumps(manifest, indent=2)}  # fmt: skip


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    model = manifest.get("model", {})
    return {
        "model": f"{model.get('name', '?')}, weights {model.get('hash', '?')}",
        "arithmetic": str(manifest.get("arguments", {}).get("dtype", "?")),
        "device": str(manifest.get("device", "?")),
        **{name: str(text) for name, text in manifest.get("versions", {}).items()},
    }


# -- at a glance ------------------------------------------------------------------------------------------------------


def glance(cohort: Cohort) -> list[dict[str, Any]]:
    """Return the main metric of every method on every task, a table per budget.

    Of methods that evict, compressed records only, and below them those that keep everything and select. Budgets that
    were solved for a mean differ by task, so tables go by rank: each task's smallest budget first.
    """
    rows = cohort.summary.to_dict("records")
    full = {row["task"]: row for row in rows if row["regime"] == FULL_KV}
    tasks = list(cohort.summary["task"].unique())
    active = [row for regime in ("compressed", "selecting") for row in rows if row["regime"] == regime]
    budgets = {task: sorted({row["tokens"] for row in active if row["task"] == task}) for task in tasks}
    tabs = []
    for rank in range(max(1, *map(len, budgets.values()))):
        tokens = {task: own[rank] for task, own in budgets.items() if rank < len(own)}
        here = {(row["method"], row["task"]): row for row in active if tokens.get(row["task"]) == row["tokens"]}
        title = _span(list(tokens.values()), "{:,}") + " slots" if tokens else ""
        evicting = [row for row in here.values() if row["regime"] == "compressed"]
        lines = [_glance_row("full KV", [full.get(task) for task in tasks], full, cohort.kind)]
        for method in dict.fromkeys(method for method, _ in here):
            lines.append(_glance_row(method, [here.get((method, task)) for task in tasks], full, cohort.kind))
        saved = [_span([row["saved_bytes"] for row in evicting if row["task"] == task], "{:.0%}") for task in tasks]
        caption = f"{_NAME[cohort.kind]}, % ± one standard error" + (f", at {title}" if title else "")
        tabs.append({"title": title, "caption": caption, "rows": lines, "saved": saved if evicting else []})
    return tabs


def _glance_row(label: str, rows: Sequence[Any], full: Mapping[str, Any], kind: str) -> dict[str, Any]:
    main = MAIN[kind]
    cells: list[dict[str, str] | None] = []
    for row in rows:
        if row is None:
            cells.append(None)
            continue
        mean, _, error = estimate_text(row, main.key, main.digits, main.scale).partition(" ")
        top = full[row["task"]][main.key] if row["task"] in full else 1.0
        cells.append({"mean": mean, "error": error, "width": f"{100 * row[main.key]:.1f}", "full": f"{100 * top:.1f}"})
    read = [row["slots_read_mean"] for row in rows if row and row["regime"] == "selecting"]
    aside = f"keeps all, reads {_span(read, '{:,.0f}')} slots" if read else ""
    return {"label": label, "full": label == "full KV", "aside": aside, "cells": cells}


def _span(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


# -- usable budgets and crossings -------------------------------------------------------------------------------------


def usable(cohort: Cohort) -> dict[str, Any]:
    """Return usable budgets and crossings of one cohort from its compressed records, or notes on why there are none."""
    metric, chosen = _METRIC[cohort.kind], selecting(cohort.frame)
    # budgets that were solved for a mean length are compared by that length
    axis: Axis = "physical_mean" if cohort.folder.manifest.get("arguments", {}).get("mean_slots") else "tokens"
    points = [one for one in measured_points(cohort.frame, metric) if one.method not in chosen]
    active = [one for one in points if one.regime == "compressed"]
    notes = [f"Left out: {listed(chosen)}, whose budget is what is read and not kept."] if chosen else []
    if not active:
        return {"notes": [*notes, "No record is compressed, so there is nothing to compare."], "table": None}
    return {"notes": notes, "metric": _NAME[cohort.kind]} | _usable(cohort, points, active, axis, notes) | _crossings(
        active, metric, axis, _UNIT[cohort.kind]
    )  # fmt: skip


def _usable(
    cohort: Cohort, points: Sequence[Point], active: Sequence[Point], axis: Axis, notes: list[str]
) -> dict[str, Any]:
    target, found = Target.parse(_TARGET, _METRIC[cohort.kind]), dict[tuple[str, str], UsableBudget]()
    try:
        for key in dict.fromkeys((one.task, one.method) for one in active):
            found[key] = usable_budget([one for one in active if (one.task, one.method) == key], target, axis=axis)
    except FrontierError as error:
        notes.append(f"Usable budgets are missing. {error}")
        return {"table": None}
    low, high = min(one.smallest for one in found.values()), max(one.largest for one in found.values())
    span = math.log(high / low)

    def place(value: float | None) -> float:
        return 50.0 if not span else 100 * math.log((high if value is None else value) / low) / span

    def cell(one: UsableBudget | None) -> dict[str, Any]:
        if one is None:
            return {"value": ""}
        value, interval, status = usable_text(one, axis)
        left, width = round(place(one.low), 1), round(place(one.high) - place(one.low), 1)
        at = None if one.tokens is None else round(place(one.tokens), 1)
        return {"value": value, "interval": interval, "status": status, "low": left, "width": width, "at": at}

    tasks = cohort.summary["task"].unique()
    table = {
        method: [cell(found.get((task, method))) for task in tasks]
        for method in dict.fromkeys(one.method for one in points)
    }
    scale = f"; lines run from {low:,.0f} to {high:,.0f}, logarithmic" if span else ""
    return {"table": table, "caption": f"{UNITS[axis]} [95 % interval]{scale}"}


def _crossings(active: Sequence[Point], metric: str, axis: Axis, unit: str) -> dict[str, Any]:
    tested = len(pairs_to_test(active, axis))
    if not tested:
        words = "No method was measured at a smaller budget than another, so nothing can cross."
        return {"tested": words, "crossings": []}
    if tested > _MOST_PAIRS:
        words = f"{tested:,} pairs are more than the {_MOST_PAIRS:,} a report compares; "
        return {"tested": words + "reasonkv frontier compares them all.", "crossings": []}
    held = [one for one in crossings(active, metric, axis=axis) if one.holds]
    words = f"{tested:,} pair{'s' if tested > 1 else ''} tested, {f'{len(held):,} hold' if held else 'none holds'}."
    most = max(len(one.values) for one in active)
    # a test that flips signs cannot go below this, and Holm multiplies the least of all by their number
    if not held and tested * 2.0 ** (1 - most) >= 0.05:
        words += f" None could: {most} {unit} a cell are too few."
    rows = []
    for one in held[:_CROSSINGS]:
        gain, _, interval = difference_text(one.advantage, 1, 100).partition(" ")
        sides = [{"method": side.method, "at": f"{side.x(axis):,.0f}", "mean": f"{100 * side.mean:.1f}"}
                 for side in (one.ours, one.theirs)]  # fmt: skip
        rows.append({"task": one.ours.task, "sides": sides, "gain": gain, "interval": interval,
                     "n": one.advantage.pairs, "p": f"{one.p:.2g}"})  # fmt: skip
    return {"tested": words, "crossings": rows}


# -- regimes ----------------------------------------------------------------------------------------------------------


def _regimes(folders: Sequence[Folder]) -> dict[str, Any]:
    """Bounded records by job, task and regime; budgets that did the same are one row."""
    frame = pd.concat([one.frame for one in folders])
    fallbacks: Counter[str] = Counter()
    for text, count in frame["guards"].value_counts().items():
        fallbacks.update({name: int(count) * times for name, times in json.loads(text).items()})
    frame = frame[frame["tokens"] > 0]
    names = [name for name in REGIMES if name != "selecting" or (frame["regime"] == name).any()]
    rows: dict[tuple[Any, ...], list[Any]] = {}
    for (kind, prompt, task, tokens), part in frame.groupby(["kind", "prompt", "task", "tokens"], sort=False):
        counts = [int((part["regime"] == name).sum()) for name in names]
        sizes, sums = rows.setdefault((job_words(kind, prompt), task, *map(bool, counts)), [[], [0] * len(names)])
        sizes.append(tokens)
        sums[:] = [a + b for a, b in zip(sums, counts, strict=True)]
    return {
        "regime_words": {name: REGIMES[name] for name in names},
        "fallbacks": ", ".join(f"{name} {count:,}" for name, count in fallbacks.items()),
        "regime_rows": [
            {"job": key[0], "task": key[1], "budgets": ", ".join(f"{one:,}" for one in sorted(sizes)), "counts": sums}
            for key, (sizes, sums) in rows.items()
        ],
    }
