"""Tables, figures and compact records from the folders that `families.py run` leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cells import Cells, load_cells
from experiment import POLICIES, Line, by_example
from kept_records import result_paths
from matplotlib.figure import Figure

from reasonkv.evaluate.statistics import Estimate, estimate, rank_correlation
from reasonkv.report.style import FULL_COLOUR, styles


@dataclass(frozen=True)
class Cell:
    """A method at a budget on a family under a prompt policy."""

    task: str
    policy: str
    method: str
    tokens: int | None


def summarize(folders: Sequence[Path], to: Path) -> None:
    """Write everything into `to`."""
    to.mkdir(parents=True, exist_ok=True)
    found = load_cells(result_paths(folders), to / "records", by_folder=False)
    replays, answers = _flat(found.replays), _flat(found.answers)
    text = [
        "Made by `python benchmarks/families.py summarize`; see README.md for what the words mean.",
        *_separation(replays),
        *_accuracy(replays, answers),
        *_prediction(replays, answers, to / "fidelity_and_accuracy.png"),
        *_distance(replays, answers, to / "recall_distance.png"),
    ]
    _frontier(replays, answers, to / "families.png")
    (to / "tables.md").write_text("\n".join(text) + "\n")


def _flat(cells_of: Cells) -> dict[Cell, dict[int, Line]]:
    """Every cell with its group's name and the words of this page for its method."""
    cells = [(group, lines) for group, cells in cells_of.items() for lines in cells.values()]
    return {_cell(next(iter(lines.values())), group.policy): lines for group, lines in cells}


def _cell(line: Line, policy: str) -> Cell:
    # the variants this benchmark runs; other options are the same for all
    variants = {("random", "redraw", False): ":redraw=false", ("oracle", "reduce", "max"): ":reduce=max"}
    name = line.method + "".join(variants.get((line.method, key, one), "") for key, one in line.options.items())
    return Cell(line.task, policy, name, line.budget["tokens"] if line.budget else None)


def _default(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if ":" not in cell.task]


def _budgets(cells: Sequence[Cell], task: str, policy: str) -> list[int]:
    return sorted({c.tokens for c in cells if c.task == task and c.policy == policy and c.tokens is not None})


def _separation(replays: dict[Cell, dict[int, Line]]) -> list[str]:
    """Paired differences to random at the middle budget, in standard errors."""
    out = ["", "## Does a family separate methods? (replay, middle budget)", ""]
    out += ["Gain over `random` at equal slots, paired by trace: mean, and how many standard errors it is.", ""]
    for metric, sign, words in (("kl", -1, "KL, nats less"), ("answer_top1", 100, "answer tokens right, points more")):
        tasks = list(dict.fromkeys((c.task, c.policy) for c in _default(list(replays))))
        methods = [m for m in dict.fromkeys(c.method for c in replays) if m not in ("full", "random")]
        out += [f"**{words}**", "", "| family | prompt | slots | n | " + " | ".join(methods) + " |"]
        out += ["|---" * (4 + len(methods)) + "|"]
        for task, policy in tasks:
            budgets = _budgets(list(replays), task, policy)
            tokens = budgets[len(budgets) // 2]
            theirs = by_example(replays[Cell(task, policy, "random", tokens)], metric)
            row = []
            for method in methods:
                ours = by_example(replays.get(Cell(task, policy, method, tokens), {}), metric)
                gain = estimate([sign * (ours[one] - theirs[one]) for one in sorted(ours.keys() & theirs.keys())])
                row.append(f"{gain.mean:+.3f} ({gain.mean / gain.se:+.1f})" if gain.se else "-")
            out.append(f"| {task} | {POLICIES[policy]} | {tokens} | {len(theirs)} | " + " | ".join(row) + " |")
        out.append("")
    return out


def _accuracy(replays: dict[Cell, dict[int, Line]], answers: dict[Cell, dict[int, Line]]) -> list[str]:
    """Whole answers right and top-1, every cell."""
    out = ["## Accuracy of real generation, and fidelity of replay", ""]
    cells = _default(list(answers))
    for task, policy in dict.fromkeys((c.task, c.policy) for c in cells):
        budgets = _budgets(cells, task, policy)
        full = answers[Cell(task, policy, "full", None)]
        random_full = estimate(list(by_example(full, "correct").values()))
        out += [
            f"**{task}, {POLICIES[policy]}**: full KV {_percent(random_full)} of {len(full)} right",
            "",
            "| method | " + " | ".join(f"{n} slots: right, % | top-1, % | KL | mean slots" for n in budgets) + " |",
            "|---" * (1 + 4 * len(budgets)) + "|",
        ]
        names = [c.method for c in replays if c.task == task and c.policy == policy and c.tokens is not None]
        for method in dict.fromkeys(names):
            row = []
            for tokens in budgets:
                cell = Cell(task, policy, method, tokens)
                right = (
                    _percent(estimate(list(by_example(answers[cell], "correct").values()))) if cell in answers else "-"
                )
                top1 = estimate(list(by_example(replays[cell], "top1").values()))
                kl = estimate(list(by_example(replays[cell], "kl").values()))
                held = estimate(list(by_example(replays[cell], "physical_mean").values()))
                row += [right, _percent(top1), f"{kl.mean:.3f} +- {kl.se or 0:.3f}", f"{held.mean:.0f}"]
            out.append(f"| {method} | " + " | ".join(row) + " |")
        out.append("")
    return out


def _prediction(
    replays: dict[Cell, dict[int, Line]], answers: dict[Cell, dict[int, Line]], figure_path: Path
) -> list[str]:
    """How well fidelity under replay orders cells by the accuracy of real generation."""
    shared = [c for c in _default(list(answers)) if c in replays and c.tokens is not None]
    points = {}
    for cell in shared:
        fidelity = {
            m: estimate(list(by_example(replays[cell], m).values())).mean for m in ("kl", "top1", "answer_top1")
        }
        points[cell] = (fidelity, estimate(list(by_example(answers[cell], "correct").values())).mean)
    out = ["## Does fidelity predict accuracy?", ""]
    out += ["Spearman's rank correlation over cells (method x budget) of a family, both prompt policies.", ""]
    out += ["| family | cells | -KL | top-1 | answer top-1 |", "|---|---|---|---|---|"]
    tasks = list(dict.fromkeys(cell.task for cell in points))
    for task in [*tasks, "all"]:
        own = [point for cell, point in points.items() if task in (cell.task, "all")]
        right = [accuracy for _, accuracy in own]
        row = []
        for metric, sign in (("kl", -1), ("top1", 1), ("answer_top1", 1)):
            rho = rank_correlation([sign * fidelity[metric] for fidelity, _ in own], right)
            row.append("-" if math.isnan(rho) else f"{rho:+.2f}")
        out.append(f"| {task} | {len(own)} | " + " | ".join(row) + " |")
    figure = Figure(figsize=(4.2 * len(tasks), 4), layout="constrained")
    handles = {}
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        methods = list(dict.fromkeys(cell.method for cell in points))
        for method, style in styles(methods).items():
            own = [(f["kl"], a) for c, (f, a) in points.items() if c.task == task and c.method == method]
            if own:
                handles[method] = axes.scatter(*zip(*own, strict=True), color=style.colour, marker=style.marker, s=36)
        axes.set(title=task, xscale="log", xlabel="KL from full KV under replay, nats")
        axes.grid(True, lw=0.5, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("whole answers right")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(figure_path, dpi=130)
    return [*out, ""]


def _distance(
    replays: dict[Cell, dict[int, Line]], answers: dict[Cell, dict[int, Line]], figure_path: Path
) -> list[str]:
    """`recall` against distance: whole answers right, and answer tokens right under replay."""
    cells = [c for c in replays if c.task.startswith("recall:distance")]
    if not cells:
        return []
    tasks = sorted({c.task for c in cells}, key=lambda task: int(task.split("=")[1]))
    methods = list(dict.fromkeys(c.method for c in cells))
    tokens = max(c.tokens for c in cells if c.tokens is not None)
    out = [f"## `recall` against distance ({tokens} slots, prompt kept)", ""]
    out += ["Whole answers right in real generation, % / answer tokens right under replay, %.", ""]
    out += ["| method | " + " | ".join(task.split("=")[1] for task in tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, style in styles(methods).items():
        row, at, accuracy, fidelity = [], [], [], []
        for task in tasks:
            cell = Cell(task, "on_top", method, None if method == "full" else tokens)
            one = estimate(list(by_example(answers[cell], "correct").values())) if cell in answers else None
            two = estimate(list(by_example(replays[cell], "answer_top1").values()))
            row.append(f"{_percent(one) if one else '-'} / {_percent(two)}")
            at.append(int(task.split("=")[1]))
            accuracy.append(np.nan if one is None else 100 * one.mean)
            fidelity.append(100 * two.mean)
        out.append(f"| {method} | " + " | ".join(row) + " |")
        colour = FULL_COLOUR if method == "full" else style.colour
        for axes, values in ((left, accuracy), (right, fidelity)):
            axes.plot(at, values, color=colour, marker=style.marker, ls="--" if method == "full" else "-", label=method)
    left.set(ylabel="whole answers right, %", title="real generation")
    right.set(ylabel="answer tokens right, %", title="replay of full KV's trace")
    for axes in (left, right):
        axes.set(xlabel="tokens of work between facts and questions", xscale="log", xticks=at, xticklabels=map(str, at))
        axes.minorticks_off()
        axes.grid(True, lw=0.5, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(figure_path, dpi=130)
    return [*out, ""]


def _frontier(replays: dict[Cell, dict[int, Line]], answers: dict[Cell, dict[int, Line]], path: Path) -> None:
    """Accuracy (generation) and top-1 (replay) against slots, a column per family and policy."""
    columns = list(dict.fromkeys((c.task, c.policy) for c in _default(list(replays))))
    rows = ["correct", "kl"]
    figure = Figure(figsize=(3.4 * len(columns) + 1.8, 6.4), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    handles = {}
    methods = list(dict.fromkeys(c.method for c in replays))
    for metric, line in zip(rows, grid, strict=True):
        source = answers if metric == "correct" else replays
        for axes, (task, policy) in zip(line, columns, strict=True):
            own = [c for c in source if c.task == task and c.policy == policy]
            if not own:
                axes.axis("off")
                continue
            scale = 100 if metric == "correct" else 1
            full = source.get(Cell(task, policy, "full", None))
            if full and metric == "correct":
                mean = estimate(list(by_example(full, metric).values())).mean
                handles["full"] = axes.axhline(scale * mean, color=FULL_COLOUR, ls="--", lw=1.2)
            for method, style in styles(methods).items():
                points = sorted(
                    (c for c in own if c.method == method and c.tokens is not None), key=lambda c: c.tokens or 0
                )
                if not points:
                    continue
                at = [c.tokens for c in points]
                values = [estimate(list(by_example(source[c], metric).values())) for c in points]
                mean = np.array([scale * v.mean for v in values])
                se = np.array([scale * (v.se or 0) for v in values])
                (handles[method],) = axes.plot(at, mean, color=style.colour, marker=style.marker, ms=5, lw=1.5)
                axes.fill_between(at, mean - se, mean + se, color=style.colour, alpha=0.12, lw=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(at, map(str, at))
            axes.minorticks_off()
            axes.grid(True, lw=0.5, color="#dddddd")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(f"{task}: {POLICIES[policy]}", fontsize=10)
            if metric == "kl":
                axes.set_yscale("log")
        line[0].set_ylabel("whole answers right, %" if metric == "correct" else "KL from full KV, nats")
    for axes in grid[-1]:
        axes.set_xlabel("budget, slots per KV head")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def _percent(one: Estimate) -> str:
    return f"{100 * one.mean:.1f} +- {100 * (one.se or 0):.1f}"
