"""Tables, figures and compact records from the folders that `cask_claims.py run` leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from cask_methods import ABLATIONS, DEGENERATE
from cells import (
    METRICS,
    Cells,
    budgets,
    count_verdicts,
    gain,
    load_cells,
    mean,
    methods,
    verdict,
    words,
)
from kept_records import result_paths
from matplotlib.figure import Figure

from reasonkv.evaluate.frontier import regime
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.statistics import estimate
from reasonkv.methods import get_method
from reasonkv.report.measures import DIAGNOSTICS, Metric
from reasonkv.report.style import FULL_COLOUR, styles

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
_PARTS = {get_method(spec).spec(): words for spec, words in ABLATIONS.items()}


def summarize(folders: Sequence[Path], to: Path) -> None:
    """Write everything into `to`."""
    to.mkdir(parents=True, exist_ok=True)
    found = load_cells(result_paths(folders), to / "records")
    replays, answers, diagnosed = (_chosen(one) for one in (found.replays, found.answers, found.diagnosed))
    text = [
        "Made by `python benchmarks/cask_claims.py summarize`; see README.md for what the words mean.",
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
    rivals = (
        "triattention",
        "triattention:mode=global",
        "triattention:mode=per_layer_per_head",
        "expected",
        "rkv",
        "random",
    )
    for metric, (title, scale) in METRICS.items():
        out += [f"**{title}**: cells in which ours is better / undecided / worse", ""]
        out += [
            "| ours | " + " | ".join(f"against {_label(one)}" for one in rivals) + " |",
            "|---" * (1 + len(rivals)) + "|",
        ]
        for ours in ("cask", "cask:profile=paper", "triattention", "triattention:mode=per_layer_per_head"):
            row = []
            for theirs in rivals:
                row.append(
                    count_verdicts(
                        gain(cells[ours, tokens], cells[theirs, tokens], metric, scale)
                        for cells in replays.values()
                        for tokens in budgets(cells)
                        if ours != theirs and (ours, tokens) in cells and (theirs, tokens) in cells
                    )
                )
            out.append(f"| {_label(ours)} | " + " | ".join(row) + " |")
        out.append("")
    out += [
        "**Crossing**: the next smaller budget against triattention, KL (positive: more is kept with fewer slots)",
        "",
    ]
    for ours in ("cask", "cask:profile=paper"):
        out += [f"| {ours} against | " + "family | slots | gain in KL | verdict |", "|---|---|---|---|---|"]
        for group, cells in replays.items():
            sizes = budgets(cells)
            for less, more in pairwise(sizes):
                for theirs in ("triattention", "triattention:mode=global"):
                    if (ours, less) in cells and (theirs, more) in cells:
                        found = gain(cells[ours, less], cells[theirs, more], "kl", -1.0)
                        out.append(f"| {theirs} | {group} | {less} > {more} | {words(found)} | {verdict(found)} |")
        out.append("")
    return out


def _ablations(replays: Cells) -> list[str]:
    """What every part of CASK adds: the whole against the whole without it."""
    out = ["## What each part contributes (replay, KL: cask minus the variant, positive when the part helps)", ""]
    variants = [*_PARTS, "cask:profile=paper"]
    out += [
        "| family | slots | " + " | ".join(_label(one) for one in variants) + " |",
        "|---" * (2 + len(variants)) + "|",
    ]
    for group, cells in replays.items():
        for tokens in budgets(cells):
            row = [
                words(gain(cells["cask", tokens], cells[one, tokens], "kl", -1.0)) if (one, tokens) in cells else "-"
                for one in variants
            ]
            out.append(f"| {group} | {tokens} | " + " | ".join(row) + " |")
    return [*out, ""]


def _accuracy(answers: Cells) -> list[str]:
    out = ["## Whole answers right in real generation, % (paired difference to random in points)", ""]
    for group, cells in answers.items():
        sizes = budgets(cells)
        full = mean(cells["full", ""], "correct")
        out += [f"**{group}**: full KV {100 * full.mean:.1f} +- {100 * (full.se or 0):.1f}", ""]
        out += ["| method | " + " | ".join(f"{n} slots" for n in sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
        for method in methods(cells):
            row = []
            for tokens in sizes:
                lines = cells.get((method, tokens), {})
                one = mean(lines, "correct")
                beyond = gain(lines, cells.get(("random", tokens), {}), "correct", 100.0)
                row.append(f"{100 * one.mean:.1f} +- {100 * (one.se or 0):.1f} ({words(beyond, 0)})" if lines else "-")
            out.append(f"| {_label(method)} | " + " | ".join(row) + " |")
        out.append("")
    return out


def _lost(diagnosed: Cells) -> list[str]:
    """What full KV attends to and the method had given up, and CASK's own measures."""
    out = ["## What was lost (replay at half the length; means with standard errors)", ""]
    for group, cells in diagnosed.items():
        (tokens,) = budgets(cells)
        out += [f"**{group}**, {tokens} slots, n = {len(cells['full', ''])}", ""]
        out += ["| method | " + " | ".join(one.label for one in DIAGNOSTICS) + " |"]
        out += ["|---" * (1 + len(DIAGNOSTICS)) + "|"]
        for method in methods(cells):
            records = [line for line in cells[method, tokens].values() if isinstance(line, Record)]
            row = [_measured(one, [record.diagnostics for record in records]) for one in DIAGNOSTICS]
            out.append(f"| {_label(method)} | " + " | ".join(row) + " |")
        out.append("")
    meanings = "; ".join(f"{one.label.removesuffix(' %')}: {one.meaning}" for one in DIAGNOSTICS)
    return [*out, meanings + ".", ""] if diagnosed else []


def _measured(metric: Metric, records: Sequence[Mapping[str, float]]) -> str:
    found = [one[metric.key] for one in records if metric.key in one]
    if not found:
        return "-"
    one = estimate(found)
    return f"{metric.scale * one.mean:.{metric.digits}f} +- {metric.scale * (one.se or 0):.{metric.digits}f}"


def _values_table(replays: Cells) -> list[str]:
    out = ["## Replay: KL / top-1 % / answer tokens right %, means with standard errors", ""]
    for group, cells in replays.items():
        sizes = budgets(cells)
        out += [f"**{group}**, n = {len(cells['full', ''])}", ""]
        held = [mean(cells["random", n], "physical_mean").mean for n in sizes]
        heads = [f"{n} slots (mean {slots:.0f})" for n, slots in zip(sizes, held, strict=True)]
        out += ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(sizes)) + "|"]
        for method in methods(cells):
            row = []
            for tokens in sizes:
                lines = cells.get((method, tokens), {})
                found = [mean(lines, metric) for metric in METRICS]
                row.append(
                    f"{found[0].mean:.3f} +- {found[0].se or 0:.3f} / {100 * found[1].mean:.1f} / "
                    f"{100 * found[2].mean:.1f} +- {100 * (found[2].se or 0):.1f}"
                    if lines
                    else "-"
                )
            out.append(f"| {_label(method)} | " + " | ".join(row) + " |")
        out.append("")
    return out


def _regimes(replays: Cells) -> list[str]:
    """How many records were decided by decode events, and in how many a guard spoke."""
    out = ["## Regimes and guards (records)", "", "| family | method | regimes | guards |", "|---|---|---|---|"]
    for group, cells in replays.items():
        for method in ("cask", "cask:profile=paper", DEGENERATE):
            lines = [line for (name, _), own in cells.items() if name == method for line in own.values()]
            if lines:
                regimes = Counter(str(regime(line)) for line in lines)
                guards = Counter(name for line in lines for name, count in line.guards.items() if count)
                out.append(f"| {group} | {method} | {_counted(regimes)} | {_counted(guards) or '-'} |")
    return [*out, ""]


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.most_common())


def _figure(cells_of: Cells, metric: str, path: Path) -> None:
    """A column per family and policy, a line per method, with a band of one standard error."""
    if not cells_of:
        return
    scale: Callable[[float], float] = (lambda x: 100 * x) if metric == "correct" else (lambda x: x)
    columns = min(3, len(cells_of))
    rows = -(-len(cells_of) // columns)
    figure = Figure(figsize=(3.3 * columns + 2.6, 3.1 * rows), layout="constrained")
    grid: Sequence[np.ndarray] = figure.subplots(rows, columns, squeeze=False)
    handles = {}
    for axes, (group, cells) in zip(np.ravel(grid), cells_of.items(), strict=False):
        for method, style in styles(list(_FIGURE)).items():
            if method == "full":
                if metric == "correct":
                    ceiling = scale(mean(cells["full", ""], metric).mean)
                    handles[method] = axes.axhline(ceiling, color=FULL_COLOUR, ls="--", lw=1.2)
                continue
            sizes = [n for n in budgets(cells) if (method, n) in cells]
            found = [mean(cells[method, n], metric) for n in sizes]
            if not found:
                continue
            mean_B = np.array([scale(one.mean) for one in found])
            se_B = np.array([scale(one.se or 0) for one in found])
            slots = [int(n) for n in sizes]
            (handles[method],) = axes.plot(slots, mean_B, ms=4.5, lw=1.4, **style.line)
            axes.fill_between(
                [int(n) for n in sizes], mean_B - se_B, mean_B + se_B, color=style.colour, alpha=0.12, lw=0
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks([int(n) for n in budgets(cells)], budgets(cells))
        axes.minorticks_off()
        axes.grid(True, lw=0.5, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(str(group), fontsize=9)
        if metric == "kl":
            axes.set_yscale("log")
    for axes in np.ravel(grid)[len(cells_of) :]:
        axes.axis("off")
    for line in grid:
        line[0].set_ylabel("whole answers right, %" if metric == "correct" else "KL from full KV, nats")
    figure.supxlabel("budget, slots per KV head", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
