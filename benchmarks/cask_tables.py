"""docs/results/cask: what holds of CASK's and TriAttention's claims, and the prompt's share of a budget."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from cells import (
    METRICS,
    Cell,
    Cells,
    budgets,
    by_budget,
    count_verdicts,
    gain,
    load_cells,
    mean,
    methods,
    table,
    verdict,
    words,
)

from reasonkv.report.charts import facets
from reasonkv.report.metrics import DIAGNOSTICS, Metric

_FIGURE = (
    "full",
    "random",
    "snapkv:window=16",
    "rkv",
    "expected",
    "triattention",
    "triattention:mode=global",
    "cask",
    "cask:profile=paper",
)
_PARTS = {
    "cask:core_ratio=0.0,core_least=0,fold=none": "stage 1 only",
    "cask:fold=none": "no folding",
    "cask:fold=neighbours": "folding whatever is adjacent",
    "cask:fold=neighbours,mass=none": "the same without log mass",
    "cask:core_ratio=0.0,core_least=0": "no core",
    "cask:per_layer=True": "a plan per layer",
    "cask:prompt_share=0.5": "half to the prompt",
}
"""Variants of CASK under the names they were recorded by."""
PAPER = "cask:profile=paper"
DEGENERATE = "triattention:profile=paper"
"""The reference's baseline on long prompts: it pins the prompt, or what fits of its beginning."""


def build(source: Path, to: Path) -> None:
    """Write the tables and figures of `source` into `to`."""
    found = load_cells(source)
    replays, answers, diagnosed = (_chosen(one) for one in (found.replays, found.answers, found.diagnosed))
    text = [
        "Made by `python benchmarks/results.py cask`; see README.md for what the words mean.",
        *_claims(replays),
        *_ablations(replays),
        *_accuracy(answers),
        *_lost(diagnosed),
        *_values_table(replays),
        *_regimes(replays),
    ]
    (to / "tables.md").write_text("\n".join(text) + "\n")
    _figure(replays, "kl", to / "replay.png")
    _figure(answers, "correct", to / "answers.png")


def _chosen(cells_of: Cells) -> Cells:
    """Without the ablations of an earlier default, another share of the budget for the prompt."""
    other = "prompt_share=0.5"
    return {
        group: {cell: lines for cell, lines in cells.items() if other not in cell[0] or cell[0] == f"cask:{other}"}
        for group, cells in cells_of.items()
    }


def _label(spec: str) -> str:
    return _PARTS.get(spec, spec)


def _claims(replays: Cells) -> list[str]:
    """Against TriAttention and random at equal slots, and the paper's crossing: fewer slots, and still better."""
    out = ["", "## The paper's claims under replay", ""]
    out += [
        "Paired differences at equal slots and equal protection; an interval is 95 %, by bootstrap over traces. Cells",
        "are family x prompt policy x budget; a cell counts as decided when its interval excludes 0.",
        "",
    ]
    rivals = ("triattention", "triattention:mode=global", "triattention:mode=per_layer_per_head", "expected", "rkv",
              "random")  # fmt: skip
    for metric, (title, scale) in METRICS.items():
        rows = [
            [_label(ours), *(_verdicts(replays, ours, theirs, metric, scale) for theirs in rivals)]
            for ours in ("cask", PAPER, "triattention", "triattention:mode=per_layer_per_head")
        ]
        out += [f"**{title}**: cells in which ours is better / undecided / worse", ""]
        out += [*table(["ours", *(f"against {_label(one)}" for one in rivals)], rows), ""]
    out += [
        "**Crossing**: the next smaller budget against triattention, KL (positive: more is kept with fewer slots)",
        "",
    ]
    for ours in ("cask", PAPER):
        rows = []
        for group, cells in replays.items():
            for less, more in pairwise(budgets(cells)):
                for theirs in ("triattention", "triattention:mode=global"):
                    if (ours, less) in cells and (theirs, more) in cells:
                        found = gain(cells[ours, less], cells[theirs, more], "kl", -1.0)
                        rows.append([theirs, str(group), f"{less} > {more}", words(found), verdict(found)])
        out += [*table([f"{ours} against", "family", "slots", "gain in KL", "verdict"], rows), ""]
    return out


def _verdicts(replays: Cells, ours: str, theirs: str, metric: str, scale: float) -> str:
    return count_verdicts(
        gain(cells[ours, tokens], cells[theirs, tokens], metric, scale)
        for cells in replays.values()
        for tokens in budgets(cells)
        if ours != theirs and (ours, tokens) in cells and (theirs, tokens) in cells
    )


def _ablations(replays: Cells) -> list[str]:
    """What every part of CASK adds: the whole against the whole without it."""
    out = ["## What each part contributes (replay, KL: cask minus the variant, positive when the part helps)", ""]
    variants = [*_PARTS, PAPER]
    rows = [
        [
            str(group),
            tokens,
            *(words(gain(cells["cask", tokens], cells.get((one, tokens)), "kl", -1.0)) for one in variants),
        ]
        for group, cells in replays.items()
        for tokens in budgets(cells)
    ]
    return [*out, *table(["family", "slots", *map(_label, variants)], rows), ""]


def _accuracy(answers: Cells) -> list[str]:
    out = ["## Whole answers right in real generation, % (paired difference to random in points)", ""]
    for group, cells in answers.items():
        full = mean(cells["full", ""], "correct")
        out += [f"**{group}**: full KV {100 * full.mean:.1f} +- {100 * full.se:.1f}", ""]

        def text(method: str, tokens: str, cells: Any = cells) -> str:
            one = mean(cells[method, tokens], "correct")
            beyond = gain(cells[method, tokens], cells.get(("random", tokens)), "correct", 100.0)
            return f"{100 * one.mean:.1f} +- {100 * one.se:.1f} ({words(beyond, 0)})"

        out += by_budget(cells, text, name=_label)
    return out


def _lost(diagnosed: Cells) -> list[str]:
    """What full KV attends to and the method had given up, and CASK's own measures."""
    out = ["## What was lost (replay at half the length; means with standard errors)", ""]
    for group, cells in diagnosed.items():
        (tokens,) = budgets(cells)
        out += [f"**{group}**, {tokens} slots, n = {len(cells['full', ''])}", ""]
        rows = [
            [_label(method), *(_measured(one, cells[method, tokens]) for one in DIAGNOSTICS)]
            for method in methods(cells)
        ]
        out += [*table(["method", *(one.label for one in DIAGNOSTICS)], rows), ""]
    meanings = "; ".join(f"{one.label.removesuffix(' %')}: {one.meaning}" for one in DIAGNOSTICS)
    return [*out, meanings + ".", ""] if diagnosed else []


def _measured(metric: Metric, cell: Cell) -> str:
    one = mean(cell, metric.key)
    if math.isnan(one.mean):
        return "-"
    return f"{metric.scale * one.mean:.{metric.digits}f} +- {metric.scale * one.se:.{metric.digits}f}"


def _values_table(replays: Cells) -> list[str]:
    out = ["## Replay: KL / top-1 % / answer tokens right %, means with standard errors", ""]
    for group, cells in replays.items():
        sizes = budgets(cells)
        out += [f"**{group}**, n = {len(cells['full', ''])}", ""]
        heads = [f"{n} slots (mean {mean(cells['random', n], 'physical_mean').mean:.0f})" for n in sizes]

        def text(method: str, tokens: str, cells: Any = cells) -> str:
            kl, top1, answer = (mean(cells[method, tokens], metric) for metric in METRICS)
            rest = f"{100 * answer.mean:.1f} +- {100 * answer.se:.1f}"
            return f"{kl.mean:.3f} +- {kl.se:.3f} / {100 * top1.mean:.1f} / {rest}"

        out += by_budget(cells, text, heads, _label)
    return out


def _regimes(replays: Cells) -> list[str]:
    """How many records were decided by decode events, and in how many a guard spoke."""
    rows = []
    for group, cells in replays.items():
        for method in ("cask", PAPER, DEGENERATE):
            lines = [own for (name, _), own in cells.items() if name == method]
            if lines:
                frame = pd.concat(lines)
                guards = Counter(name for text in frame["guards"] for name, count in json.loads(text).items() if count)
                rows.append([str(group), method, _counted(Counter(frame["regime"])), _counted(guards) or "-"])
    return ["## Regimes and guards (records)", "", *table(["family", "method", "regimes", "guards"], rows), ""]


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.most_common())


def _figure(cells_of: Cells, metric: str, path: Path) -> None:
    """A panel per family and policy, a line per method, with a band of one standard error."""
    scale, title = (100, "whole answers right, %") if metric == "correct" else (1, "KL from full KV, nats")
    points = []
    for group, cells in cells_of.items():
        for (method, size), cell in cells.items():
            if method in _FIGURE and (size or metric == "correct"):
                one = mean(cell, metric)
                points.append({"panel": str(group), "method": method, "x": int(size or 0), "y": scale * one.mean,
                               "low": scale * (one.mean - one.se), "high": scale * (one.mean + one.se)})  # fmt: skip
    y = alt.Y("y:Q", title=title, scale=alt.Scale(type="log"), axis=alt.Axis(values=[0.01, 0.1, 1], format="~g"))
    if metric == "correct":
        y = alt.Y("y:Q", title=title)
    facets(pd.DataFrame(points), "budget, slots per KV head", y, path, column="panel", columns=3, names=_FIGURE,
           note=f"{'Full KV is at 0' if metric == 'kl' else 'Dashed: full KV'}. Band: one standard error.")  # fmt: skip


def build_prompt_share(source: Path, to: Path) -> None:
    """Write KL by the share of the budget that CASK's first stage leaves to the prompt."""
    out = [
        "Made by `python benchmarks/results.py prompt_share`: KL in nats with standard errors, prompt compressible,",
        "seed 1, n = 32. Columns: budget in slots, at 1/8, 1/4 and 1/2 of the mean length.",
        "",
    ]
    for group, cells in load_cells(source).replays.items():

        def text(method: str, tokens: str, cells: Any = cells) -> str:
            one = mean(cells[method, tokens], "kl")
            return f"{one.mean:.3f} +- {one.se:.3f}"

        out += [f"**{group.task}**", "", *by_budget(cells, text, budgets(cells))]
    (to / "tables.md").write_text("\n".join(out))
