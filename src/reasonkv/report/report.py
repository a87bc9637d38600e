"""The report: one HTML file that says what ran, what came out, and how to run it again."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from reasonkv.evaluate.frontier import Axis, UsableBudget, measured_points, pairs_to_test
from reasonkv.evaluate.sanity import sanity_warnings
from reasonkv.evaluate.target import FrontierError, Target
from reasonkv.files import write_atomically
from reasonkv.report.charts import chart_script, report_chart
from reasonkv.report.cohorts import Cohort, Folder, cohorts, job_words, model_name, read_folders, same_problems
from reasonkv.report.columns import record_columns, summary_columns
from reasonkv.report.command import command
from reasonkv.report.frontier import Frontier, summarize_frontier, usable_text
from reasonkv.report.glance import NAMES, glance
from reasonkv.report.html import INSPECTOR_SCRIPTS, INSPECTOR_STYLES, render
from reasonkv.report.inspector import load_inspections
from reasonkv.report.metrics import REGIMES, UNITS
from reasonkv.report.wording import (
    budget_sentence,
    difference_text,
    listed,
    plural,
    seeds_sentence,
    selecting,
)  # fmt: skip

TITLE = "What the cache kept, and what that did"
_CROSSINGS = 112
"""Crossings in the page; all but the first 12 fold out."""
_MOST_PAIRS = 10_000
"""Above this many pairs of cells crossings are left to `reasonkv frontier`, so that a report is written in seconds."""
_TARGET = {"replay": ("0.99", "top1"), "evaluate": ("0.95x", "accuracy")}
_UNIT = {"replay": "trace", "evaluate": "problem"}


def write_report(folders: Sequence[Path], path: Path, *, title: str = TITLE) -> Path:
    """Write the report of one or more results folders, and return its path.

    Args:
        path: HTML file to write, whole or not at all.

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
            {"label": one.name, "rows": len(one.summary), "columns": columns, "kind": one.kind}
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
        warnings=list(dict.fromkeys(text for one in read for text in sanity_warnings(one.frame))),
        cohorts=[_cohort_view(one) for one in groups],
        bounded=bounded,
        inspections=list(inspections),
        folders=list(zip(read, facts, strict=True)),
        command=command,
        pretty=partial(json.dumps, indent=2),
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
    frame = folder.frame
    problems = len(frame[["task", "example"]].drop_duplicates())
    bounded = frame[frame["tokens"] > 0]
    did = f"replayed {plural(problems, 'trace')} of full KV"
    if "correct" in frame:
        samples = frame["sample"].nunique()
        did = f"answered {plural(problems, 'problem')} ({'greedy' if samples == 1 else f'{samples} samples each'})"
    budgets = sorted(bounded["tokens"].unique())
    cells = f"full KV and {plural(bounded['label'].nunique(), 'method')}"
    if budgets:
        few = len(budgets) < 6
        cells += f" at {listed([f'{one:,}' for one in budgets])} slots" if few else f" at {len(budgets)} budgets"
        cells += " per KV head" if few else f" from {budgets[0]:,} to {budgets[-1]:,} slots"
    tasks = listed(list(frame["task"].unique()))
    ran = f"{model_name(folder.manifest)} {did}, of {tasks}: {cells}, {plural(len(frame), 'record')}."
    return f"{ran} {seeds_sentence(frame)}"


def _cohort_view(cohort: Cohort) -> dict[str, Any]:
    tabs = glance(cohort)
    return {
        "name": cohort.name,
        "budget": budget_sentence(cohort.frame),
        "tasks": list(cohort.summary["task"].unique()),
        "tabs": tabs,
        "open": max(range(len(tabs)), key=lambda at: tabs[at]["apart"]),
        "usable": usable(cohort) if cohort.prompt else None,
    }


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model": f"{model_name(manifest)}, weights {manifest.get('model', {}).get('hash', '?')}",
        "arithmetic": str(manifest.get("arguments", {}).get("dtype", "?")),
        "device": str(manifest.get("device", "?")),
        **{name: str(text) for name, text in manifest.get("versions", {}).items()},
    }


# -- usable budgets and crossings -------------------------------------------------------------------------------------


def usable(cohort: Cohort) -> dict[str, Any]:
    """Return usable budgets and crossings of one cohort from its compressed records, or notes on why there are none."""
    chosen, target = selecting(cohort.frame), Target.parse(*_TARGET[cohort.kind])
    frame = cohort.frame[~cohort.frame["label"].isin(chosen)]
    # budgets that were solved for a mean length are compared by that length
    axis: Axis = "physical_mean" if cohort.folder.manifest.get("arguments", {}).get("mean_slots") else "tokens"
    notes = [f"Left out: {listed(chosen)}, whose budget is what is read and not kept."] if chosen else []
    active = [one for one in measured_points(frame, target.metric) if one.regime == "compressed"] if len(frame) else []
    if not active:
        return {"notes": [*notes, "No record is compressed, so there is nothing to compare."], "table": None}
    tested = len(pairs_to_test(active, axis))
    try:
        found = summarize_frontier(frame, target, axis, compare=tested <= _MOST_PAIRS)
    except FrontierError as error:
        return {"notes": [*notes, f"Usable budgets are missing. {error}"], "table": None}
    return (
        {"notes": notes, "metric": NAMES[cohort.kind], "target": str(target)}
        | _usable_table(found, list(cohort.summary["task"].unique()))
        | _crossings(found, tested, _UNIT[cohort.kind])
    )


def _usable_table(found: Frontier, tasks: Sequence[str]) -> dict[str, Any]:
    budgets = {key: one for key, one in found.usable.items() if isinstance(one, UsableBudget)}
    low = min((one.smallest for one in budgets.values()), default=1.0)
    high = max((one.largest for one in budgets.values()), default=1.0)
    span = math.log(high / low)

    def place(value: float | None) -> float:
        return 50.0 if not span else round(100 * math.log((high if value is None else value) / low) / span, 1)

    def cell(one: UsableBudget | str | None) -> dict[str, Any]:
        if not isinstance(one, UsableBudget):
            return {"value": "", "status": one or "not run"}
        value, interval, status = usable_text(one, found.axis)
        at = None if one.tokens is None else place(one.tokens)
        return {"value": value, "interval": interval, "status": status, "low": place(one.low), "at": at,
                "width": round(place(one.high) - place(one.low), 1)}  # fmt: skip

    table: dict[str, list[Any]] = {}
    for task, method, rule in found.usable:
        table.setdefault(method, [cell(None)] * len(tasks))[tasks.index(task)] = cell(found.usable[task, method, rule])
    scale = f"; lines run from {low:,.0f} to {high:,.0f}, logarithmic" if span else ""
    return {"table": table, "caption": f"{UNITS[found.axis]} [95 % interval]{scale}"}


def _crossings(found: Frontier, tested: int, unit: str) -> dict[str, Any]:
    if not tested:
        words = "No method was measured at a smaller budget than another, so nothing can cross."
        return {"tested": words, "crossings": []}
    if tested > _MOST_PAIRS:
        words = f"{tested:,} pairs are more than the {_MOST_PAIRS:,} a report compares; "
        return {"tested": words + "reasonkv frontier compares them all.", "crossings": []}
    held = [one for one in found.crossings if one.holds]
    words = f"{plural(tested, 'pair')} tested, {f'{len(held):,} hold' if held else 'none holds'}."
    most = max(len(one.values) for one in found.points)
    # a test that flips signs cannot go below this, and Holm multiplies the least of all by their number
    if not held and tested * 2.0 ** (1 - most) >= 0.05:
        words += f" None could: {plural(most, unit)} a cell {'is' if most == 1 else 'are'} too few."
    rows = []
    for one in held[:_CROSSINGS]:
        gain, _, interval = difference_text(one.advantage, 1, 100).partition(" ")
        sides = [{"method": side.method, "at": f"{side.x(found.axis):,.0f}", "mean": f"{100 * side.mean:.1f}"}
                 for side in (one.ours, one.theirs)]  # fmt: skip
        rows.append({"task": one.ours.task, "sides": sides, "gain": gain, "interval": interval,
                     "n": one.advantage.pairs, "p": f"{one.p:.2g}"})  # fmt: skip
    return {"tested": words, "crossings": rows}


# -- regimes ----------------------------------------------------------------------------------------------------------


def _regimes(folders: Sequence[Folder]) -> dict[str, Any]:
    """Bounded records by job, task and regime, and how often methods used fallbacks."""
    frame = pd.concat([one.frame for one in folders])
    fallbacks: Counter[str] = Counter()
    for text, count in frame["guards"].value_counts().items():
        fallbacks.update({name: int(count) * times for name, times in json.loads(text).items()})
    frame = frame[frame["tokens"] > 0]
    names = [name for name in REGIMES if name != "selecting" or (frame["regime"] == name).any()]
    rows = [
        {
            "job": job_words(kind, prompt),
            "task": task,
            "counts": [int((part["regime"] == name).sum()) for name in names],
        }
        for (kind, prompt, task), part in frame.groupby(["kind", "prompt", "task"], sort=False)
    ]
    return {
        "regime_words": {name: REGIMES[name] for name in names},
        "fallbacks": ", ".join(f"{name} {count:,}" for name, count in fallbacks.items()),
        "regime_rows": rows,
    }
