"""Tables, figures and compact records from the folders that `cask_claims.py run` leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from cask_methods import ABLATIONS, DEGENERATE
from experiment import POLICIES, Line, by_example, keep_records, policy_of
from matplotlib.figure import Figure

from reasonkv.evaluate.frontier import regime
from reasonkv.evaluate.records import Record
from reasonkv.evaluate.results import load_results
from reasonkv.evaluate.statistics import Difference, estimate, paired_difference
from reasonkv.methods import get_method, method_class
from reasonkv.methods.base import Method
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
_METRICS = {
    "kl": ("KL, nats", -1.0),
    "top1": ("top-1, points", 100.0),
    "answer_top1": ("answer tokens right, points", 100.0),
}
_PARTS = {get_method(spec).spec(): words for spec, words in ABLATIONS.items()}


@dataclass(frozen=True)
class Group:
    """What may be compared with one another: a family under a prompt policy."""

    task: str
    policy: str

    def __str__(self) -> str:
        return f"{self.task}, {POLICIES[self.policy]}"


Cells = dict[Group, dict[tuple[str, int | None], dict[int, Line]]]
"""Lines by group, then by (method, tokens), then by example."""


def summarize(folder: Path, to: Path) -> None:
    """Write everything into `to`."""
    (to / "records").mkdir(parents=True, exist_ok=True)
    replays: Cells = {}
    answers: Cells = {}
    diagnosed: Cells = {}
    for path in sorted(folder.iterdir()):
        results = load_results(path)
        keep_records(results, to / "records")
        replayed = diagnosed if path.name.startswith("lost") else replays
        for kind, lines in ((replayed, results.records), (answers, results.answers)):
            for line in lines:
                group = Group(line.task, policy_of(path))
                cell = (_spec(line), line.budget["tokens"] if line.budget else None)
                kind.setdefault(group, {}).setdefault(cell, {})[line.example] = line
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


def _spec(line: Line) -> str:
    """The method's shortest spec, from the options a record holds."""
    made: Method = method_class(line.method)(**line.options)
    return made.spec()


def _label(spec: str) -> str:
    return _PARTS.get(spec, spec)


def _budgets(cells: Mapping[tuple[str, int | None], object]) -> list[int]:
    return sorted({tokens for _, tokens in cells if tokens is not None})


def _methods(cells: Mapping[tuple[str, int | None], object]) -> list[str]:
    return list(dict.fromkeys(method for method, tokens in cells if tokens is not None))


def _gain(ours: Mapping[int, Line], theirs: Mapping[int, Line], metric: str, scale: float) -> Difference | None:
    left, right = by_example(ours, metric), by_example(theirs, metric)
    return paired_difference({k: scale * v for k, v in left.items()}, {k: scale * v for k, v in right.items()})


def _verdict(found: Difference | None) -> str:
    if found is None:
        return "-"
    return "better" if found.low > 0 else "worse" if found.high < 0 else "undecided"


def _words(found: Difference | None, digits: int = 3) -> str:
    return "-" if found is None else f"{found.mean:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"


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
    for metric, (words, scale) in _METRICS.items():
        out += [f"**{words}**: cells in which ours is better / undecided / worse", ""]
        out += [
            "| ours | " + " | ".join(f"against {_label(one)}" for one in rivals) + " |",
            "|---" * (1 + len(rivals)) + "|",
        ]
        for ours in ("cask", "cask:profile=paper", "triattention", "triattention:mode=per_layer_per_head"):
            row = []
            for theirs in rivals:
                counts = Counter(
                    _verdict(_gain(cells[ours, tokens], cells[theirs, tokens], metric, scale))
                    for cells in replays.values()
                    for tokens in _budgets(cells)
                    if ours != theirs and (ours, tokens) in cells and (theirs, tokens) in cells
                )
                row.append(" / ".join(str(counts[v]) for v in ("better", "undecided", "worse")) if counts else "-")
            out.append(f"| {_label(ours)} | " + " | ".join(row) + " |")
        out.append("")
    out += [
        "**Crossing**: the next smaller budget against triattention, KL (positive: more is kept with fewer slots)",
        "",
    ]
    for ours in ("cask", "cask:profile=paper"):
        out += [f"| {ours} against | " + "family | slots | gain in KL | verdict |", "|---|---|---|---|---|"]
        for group, cells in replays.items():
            sizes = _budgets(cells)
            for less, more in pairwise(sizes):
                for theirs in ("triattention", "triattention:mode=global"):
                    if (ours, less) in cells and (theirs, more) in cells:
                        found = _gain(cells[ours, less], cells[theirs, more], "kl", -1.0)
                        out.append(f"| {theirs} | {group} | {less} > {more} | {_words(found)} | {_verdict(found)} |")
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
        for tokens in _budgets(cells):
            row = [
                _words(_gain(cells["cask", tokens], cells[one, tokens], "kl", -1.0)) if (one, tokens) in cells else "-"
                for one in variants
            ]
            out.append(f"| {group} | {tokens} | " + " | ".join(row) + " |")
    return [*out, ""]


def _accuracy(answers: Cells) -> list[str]:
    out = ["## Whole answers right in real generation, % (paired difference to random in points)", ""]
    for group, cells in answers.items():
        sizes = _budgets(cells)
        full = estimate(list(by_example(cells["full", None], "correct").values()))
        out += [f"**{group}**: full KV {100 * full.mean:.1f} +- {100 * (full.se or 0):.1f}", ""]
        out += ["| method | " + " | ".join(f"{n} slots" for n in sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
        for method in _methods(cells):
            row = []
            for tokens in sizes:
                lines = cells.get((method, tokens), {})
                one = estimate(list(by_example(lines, "correct").values()))
                gain = _gain(lines, cells.get(("random", tokens), {}), "correct", 100.0)
                row.append(f"{100 * one.mean:.1f} +- {100 * (one.se or 0):.1f} ({_words(gain, 0)})" if lines else "-")
            out.append(f"| {_label(method)} | " + " | ".join(row) + " |")
        out.append("")
    return out


def _lost(diagnosed: Cells) -> list[str]:
    """What full KV attends to and the method had given up, and CASK's own measures."""
    out = ["## What was lost (replay at half the length; means with standard errors)", ""]
    for group, cells in diagnosed.items():
        (tokens,) = _budgets(cells)
        out += [f"**{group}**, {tokens} slots, n = {len(cells['full', None])}", ""]
        out += ["| method | " + " | ".join(one.label for one in DIAGNOSTICS) + " |"]
        out += ["|---" * (1 + len(DIAGNOSTICS)) + "|"]
        for method in _methods(cells):
            records = [line for line in cells[method, tokens].values() if isinstance(line, Record)]
            row = [_measured(one, [record.diagnostics for record in records]) for one in DIAGNOSTICS]
            out.append(f"| {_label(method)} | " + " | ".join(row) + " |")
        out.append("")
    words = "; ".join(f"{one.label.removesuffix(' %')}: {one.meaning}" for one in DIAGNOSTICS)
    return [*out, words + ".", ""] if diagnosed else []


def _measured(metric: Metric, records: Sequence[Mapping[str, float]]) -> str:
    found = [one[metric.key] for one in records if metric.key in one]
    if not found:
        return "-"
    mean = estimate(found)
    return f"{metric.scale * mean.mean:.{metric.digits}f} +- {metric.scale * (mean.se or 0):.{metric.digits}f}"


def _values_table(replays: Cells) -> list[str]:
    out = ["## Replay: KL / top-1 % / answer tokens right %, means with standard errors", ""]
    for group, cells in replays.items():
        sizes = _budgets(cells)
        out += [f"**{group}**, n = {len(cells['full', None])}", ""]
        held = [estimate(list(by_example(cells["random", n], "physical_mean").values())).mean for n in sizes]
        heads = [f"{n} slots (mean {mean:.0f})" for n, mean in zip(sizes, held, strict=True)]
        out += ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(sizes)) + "|"]
        for method in _methods(cells):
            row = []
            for tokens in sizes:
                lines = cells.get((method, tokens), {})
                found = [estimate(list(by_example(lines, metric).values())) for metric in _METRICS]
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
                    mean = scale(estimate(list(by_example(cells["full", None], metric).values())).mean)
                    handles[method] = axes.axhline(mean, color=FULL_COLOUR, ls="--", lw=1.2)
                continue
            sizes = [n for n in _budgets(cells) if (method, n) in cells]
            found = [estimate(list(by_example(cells[method, n], metric).values())) for n in sizes]
            if not found:
                continue
            mean_B = np.array([scale(one.mean) for one in found])
            se_B = np.array([scale(one.se or 0) for one in found])
            (handles[method],) = axes.plot(sizes, mean_B, ms=4.5, lw=1.4, **style.line)
            axes.fill_between(sizes, mean_B - se_B, mean_B + se_B, color=style.colour, alpha=0.12, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(_budgets(cells), map(str, _budgets(cells)))
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
