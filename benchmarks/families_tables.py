"""docs/results/families: which family of the testbed separates which methods."""

from __future__ import annotations

import math
from pathlib import Path

import altair as alt
import pandas as pd
from cells import POLICIES, Cells, Group, by_example, load_cells, mean, table
from scipy.stats import spearmanr

from reasonkv.evaluate.table import Estimate, clustered_mean
from reasonkv.report.charts import facets, looks, save_png

Flat = dict[Group, dict[tuple[str, int], pd.DataFrame]]
"""By group, then by this page's word for a method and its budget; 0 is full KV's."""


def build(source: Path, to: Path) -> None:
    """Write the tables and figures of `source` into `to`."""
    found = load_cells(source)
    replays, answers = _flat(found.replays), _flat(found.answers)
    text = [
        "Made by `python benchmarks/results.py families`; see README.md for what the words mean.",
        *_separation(replays),
        *_accuracy(replays, answers),
        *_prediction(replays, answers, to / "fidelity_and_accuracy.png"),
        *_distance(replays, answers, to / "recall_distance.png"),
    ]
    (to / "tables.md").write_text("\n".join(text) + "\n")
    _frontier(replays, answers, to / "families.png")


def _flat(cells_of: Cells) -> Flat:
    return {
        group: {(_name(method), int(size or 0)): cell for (method, size), cell in cells.items()}
        for group, cells in cells_of.items()
    }


def _name(method: str) -> str:
    # the variants this experiment runs; other options are the same for all
    return method.partition(":")[0] + (
        ":redraw=false" if "redraw=False" in method else ":reduce=max" if "reduce=max" in method else ""
    )


def _default(cells_of: Flat) -> Flat:
    return {group: cells for group, cells in cells_of.items() if ":" not in group.task}


def _sizes(cells: dict[tuple[str, int], pd.DataFrame]) -> list[int]:
    return sorted({size for _, size in cells if size})


def _names(cells_of: Flat, bounded: bool = False) -> list[str]:
    return list(dict.fromkeys(name for cells in cells_of.values() for name, size in cells if size or not bounded))


def _percent(one: Estimate) -> str:
    return f"{100 * one.mean:.1f} +- {100 * one.se:.1f}"


def _separation(replays: Flat) -> list[str]:
    """Paired differences to random at the middle budget, in standard errors."""
    out = ["", "## Does a family separate methods? (replay, middle budget)", ""]
    out += ["Gain over `random` at equal slots, paired by trace: mean, and how many standard errors it is.", ""]
    names = [one for one in _names(replays) if one not in ("full", "random")]
    for metric, sign, words in (("kl", -1, "KL, nats less"), ("answer_top1", 100, "answer tokens right, points more")):
        rows = []
        for group, cells in _default(replays).items():
            size = _sizes(cells)[len(_sizes(cells)) // 2]
            theirs = by_example(cells["random", size], metric)
            row = [group.task, POLICIES[group.policy], str(size), str(len(theirs))]
            for name in names:
                ours = by_example(cells.get((name, size)), metric)
                shared = sorted(ours.keys() & theirs.keys())
                one = clustered_mean([sign * (ours[key] - theirs[key]) for key in shared], shared)
                row.append(f"{one.mean:+.3f} ({one.mean / one.se:+.1f})" if one.se > 0 else "-")
            rows.append(row)
        out += [f"**{words}**", "", *table(["family", "prompt", "slots", "n", *names], rows), ""]
    return out


def _accuracy(replays: Flat, answers: Flat) -> list[str]:
    """Whole answers right and top-1, every cell."""
    out = ["## Accuracy of real generation, and fidelity of replay", ""]
    for group, cells in _default(answers).items():
        sizes, other = _sizes(cells), replays[group]
        full = cells["full", 0]
        out += [f"**{group}**: full KV {_percent(mean(full, 'correct'))} of {len(full)} right", ""]
        rows = []
        for name in dict.fromkeys(name for name, size in other if size):
            row = [name]
            for size in sizes:
                top1, kl, held = (mean(other[name, size], one) for one in ("top1", "kl", "physical_mean"))
                right = _percent(mean(cells[name, size], "correct")) if (name, size) in cells else "-"
                row += [right, _percent(top1), f"{kl.mean:.3f} +- {kl.se:.3f}", f"{held.mean:.0f}"]
            rows.append(row)
        out += [*table(["method", *(f"{n} slots: right, % | top-1, % | KL | mean slots" for n in sizes)], rows), ""]
    return out


def _prediction(replays: Flat, answers: Flat, path: Path) -> list[str]:
    """How well fidelity under replay orders cells by the accuracy of real generation."""
    points = []
    for group, cells in _default(answers).items():
        for (name, size), cell in cells.items():
            if size and (name, size) in replays.get(group, {}):
                replay = replays[group][name, size]
                fidelity = {metric: mean(replay, metric).mean for metric in ("kl", "top1", "answer_top1")}
                points.append({"task": group.task, "method": name, "right": mean(cell, "correct").mean, **fidelity})
    out = ["## Does fidelity predict accuracy?", ""]
    out += ["Spearman's rank correlation over cells (method x budget) of a family, both prompt policies.", ""]
    data, rows = pd.DataFrame(points), []
    for task in [*data["task"].unique(), "all"]:
        own = data[data["task"].eq(task) | (task == "all")]
        row = []
        for metric, sign in (("kl", -1), ("top1", 1), ("answer_top1", 1)):
            known = own[metric].nunique() > 1 and own["right"].nunique() > 1
            rho = spearmanr(sign * own[metric], own["right"]).statistic if known else math.nan
            row.append("-" if math.isnan(rho) else f"{rho:+.2f}")
        rows.append([task, str(len(own)), *row])
    look = looks(list(data["method"].unique()), columns=6)
    x = alt.X("kl:Q", title="KL under replay, nats", scale=alt.Scale(type="log"),
              axis=alt.Axis(values=[0.01, 0.1, 1], format="~g", grid=False))  # fmt: skip
    y = alt.Y("right:Q", title="whole answers right", axis=alt.Axis(format="%"))
    base = alt.Chart(data).mark_point(filled=True, size=60, opacity=1)
    base = base.encode(x=x, y=y, color=look["color"], shape=look["shape"]).properties(width=135, height=170)
    save_png(base.facet(column=alt.Column("task:N", title=None, sort=list(data["task"].unique()))), path, scale=1.5)
    return [*out, *table(["family", "cells", "-KL", "top-1", "answer top-1"], rows), ""]


def _distance(replays: Flat, answers: Flat, path: Path) -> list[str]:
    """`recall` against distance: whole answers right, and answer tokens right under replay."""
    own = {group: cells for group, cells in replays.items() if group.task.startswith("recall:distance")}
    if not own:
        return []
    groups = sorted(own, key=lambda group: int(group.task.split("=")[1]))
    tokens = max(size for cells in own.values() for _, size in cells)
    out = [f"## `recall` against distance ({tokens} slots, prompt kept)", ""]
    out += ["Whole answers right in real generation, % / answer tokens right under replay, %.", ""]
    rows, points = [], []
    for name in _names(own):
        row = [name]
        for group in groups:
            cell = (name, 0 if name == "full" else tokens)
            right = mean(answers[group][cell], "correct") if cell in answers.get(group, {}) else None
            fidelity = mean(replays[group][cell], "answer_top1")
            row.append(f"{_percent(right) if right else '-'} / {_percent(fidelity)}")
            for panel, one in (
                ("real generation: whole answers right", right),
                ("replay: answer tokens right", fidelity),
            ):
                if one:
                    points.append(
                        {"panel": panel, "method": name, "x": int(group.task.split("=")[1]), "y": 100 * one.mean}
                    )
        rows.append(row)
    facets(pd.DataFrame(points), "tokens of work between facts and questions", alt.Y("y:Q", title="%"), path,
           column="panel", columns=2, width=360, band=False)  # fmt: skip
    return [*out, *table(["method", *(group.task.split("=")[1] for group in groups)], rows), ""]


def _frontier(replays: Flat, answers: Flat, path: Path) -> None:
    """Accuracy (generation) and KL (replay) against slots: a column per family, two rows per prompt policy."""
    points = []
    for policy in ("on_top", "count"):
        for title, key, scale, source in (
            ("answers right, %", "correct", 100, answers), ("KL, nats", "kl", 1, replays)
        ):  # fmt: skip
            for group, cells in _default(source).items():
                for (name, size), cell in cells.items():
                    if group.policy == policy and (size or key == "correct"):
                        one, row = mean(cell, key), f"{title}\n{POLICIES[policy]}"
                        y, low, high = (scale * value for value in (one.mean, one.mean - one.se, one.mean + one.se))
                        points.append({"row": row, "family": group.task, "method": name, "x": size, "y": y,
                                       "low": low, "high": high})  # fmt: skip
    facets(pd.DataFrame(points), "budget, slots per KV head", alt.Y("y:Q"), path, column="family", columns=5, row="row",
           width=128, height=105, names=_names(replays, bounded=True),
           note="Dashed: full KV. Band: one standard error.")  # fmt: skip
