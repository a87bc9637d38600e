"""docs/results/league: every method on every family in replay and generation at equal slots; reads CASK's, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from cells import (
    POLICIES,
    Cell,
    Cells,
    Group,
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

from reasonkv.report.charts import save_png

RIVAL = {"on_top": "random", "count": "random-attention:recent=16"}
"""Random with the prompt kept: on top of the budget, or inside it by the method's own doing."""
CEILINGS = ("oracle",)
"""Knows the future: shown, not ranked."""
VARIANTS_OF_CASK = "cask:"
"""Parts of CASK left out are the matter of another table."""
_ALIKE = 0.02  # two cells are alike when their mean physical lengths differ by less


def build(source: Path, to: Path) -> None:
    """Write the tables and figures of `source` into `to`."""
    found = load_cells(source, source.parent / "cask")
    replays, answers = _entrants(found.replays), _entrants(found.answers)
    text = ["Made by `python benchmarks/results.py league`; see README.md for what the words mean.", ""]
    for policy in ("on_top", "count"):
        text += _league(policy, _complete(_column(replays, policy)), _complete(_column(answers, policy)))
    text += [*_accuracy(answers), *_divergence(replays), *_read(replays), *_unlike(replays)]
    (to / "tables.md").write_text("\n".join(text) + "\n")
    for policy in ("on_top", "count"):
        _heat(_complete(_column(replays, policy)), policy, to / f"league-{policy.replace('_', '-')}.png")


def _entrants(cells_of: Cells) -> Cells:
    """Every method once: of CASK's variants, the paper's profile alone."""
    kept = {}
    for group, cells in cells_of.items():
        kept[group] = {
            cell: lines
            for cell, lines in cells.items()
            if not cell[0].startswith(VARIANTS_OF_CASK) or cell[0] == "cask:profile=paper"
        }
    return kept


def _column(cells_of: Cells, policy: str) -> Cells:
    return {group: cells for group, cells in cells_of.items() if group.policy == policy}


def _complete(cells_of: Cells) -> Cells:
    """Without the budgets that some of a family's methods did not run at: ranks are over equal fields."""
    found = {}
    for group, cells in cells_of.items():
        field = {label: sum(other == label for _, other in cells) for label in budgets(cells)}
        whole = {"", *(label for label, count in field.items() if count == max(field.values()))}
        found[group] = {cell: lines for cell, lines in cells.items() if cell[1] in whole}
    return found


def _rival(group: Group, cells: Mapping[tuple[str, str], object]) -> str:
    wanted = RIVAL[group.policy]
    return wanted if any(method == wanted for method, _ in cells) else "random"


def _names(cells_of: Cells) -> list[str]:
    return list(dict.fromkeys(method for cells in cells_of.values() for method in methods(cells)))


def _ranks(cells_of: Cells, metric: str, sign: float) -> dict[str, list[float]]:
    """Ranks of every method over the cells that hold all of a family's methods; 1 is best, ties share their mean."""
    found: dict[str, list[float]] = {}
    for cells in cells_of.values():
        entrants = [one for one in methods(cells) if one not in CEILINGS]
        for label in budgets(cells):
            here = [one for one in entrants if (one, label) in cells]
            values = np.array([-sign * mean(cells[one, label], metric).mean for one in here])
            for one, value in zip(here, values, strict=True):
                found.setdefault(one, []).append(1 + float((values < value).sum()) + ((values == value).sum() - 1) / 2)
    return found


def _log_ratio(cells: Mapping[tuple[str, str], Cell], method: str, rival: str, label: str) -> float:
    """log2 of a method's mean KL over the rival's."""
    return math.log2(mean(cells[method, label], "kl").mean / mean(cells[rival, label], "kl").mean)


def _league(policy: str, replays: Cells, answers: Cells) -> list[str]:
    """One row a method, best mean rank in KL first."""
    if not replays:
        return []
    rival = RIVAL[policy]
    families = [group.task for group in replays]
    ranks, answered = _ranks(replays, "kl", -1.0), _ranks(answers, "correct", 100.0)
    columns = [
        "method", "mean rank in KL", "KL over random's", f"cells against {rival} in KL", "mean rank in answers",
        f"cells against {rival} in answers", *(f"right on {group.task}, %" for group in answers),
    ]  # fmt: skip
    out = [f"## The league, {POLICIES[policy]}", ""]
    out += [
        f"{', '.join(families)}; {sum(len(budgets(cells)) for cells in replays.values())} cells of family and budget "
        "in replay. Ranks are over methods of a cell; the ratio is a geometric mean over cells; cells are better / "
        "undecided / worse by a 95 % interval of paired differences; answers are means over budgets.",
        "",
    ]
    rows = []
    order = sorted(_names(replays), key=lambda one: (one in CEILINGS, float(np.mean(ranks.get(one, [0.0])))))
    for method in order:
        ratios, kl, right = [], [], []
        for group, cells in replays.items():
            for label in budgets(cells):
                if (method, label) in cells:
                    against = _rival(group, cells)
                    ratios.append(_log_ratio(cells, method, against, label))
                    if method != against:
                        kl.append(gain(cells[method, label], cells[against, label], "kl", -1.0))
        for group, cells in answers.items():
            against = _rival(group, cells)
            right += [
                gain(cells[method, label], cells[against, label], "correct", 100.0)
                for label in budgets(cells)
                if (method, label) in cells and method != against
            ]
        row = [
            "-" if method in CEILINGS else f"{np.mean(ranks[method]):.1f}",
            f"{2 ** np.mean(ratios):.2f}",
            count_verdicts(kl),
            f"{np.mean(answered[method]):.1f}" if method in answered else "-",
            count_verdicts(right),
            *(_right(cells, method) for cells in answers.values()),
        ]
        rows.append([method, *row])
    full = [f"{100 * mean(cells['full', ''], 'correct').mean:.0f}" for cells in answers.values()]
    return [*out, *table(columns, [*rows, ["full KV", "-", "0", "-", "-", "-", *full]]), ""]


def _right(cells: Mapping[tuple[str, str], Cell], method: str) -> str:
    """Mean over budgets."""
    found = [mean(cells[method, label], "correct").mean for label in budgets(cells) if (method, label) in cells]
    return f"{100 * np.mean(found):.0f}" if found else "-"


def _accuracy(answers: Cells) -> list[str]:
    out = ["## Whole answers right in real generation, %", ""]
    out += ["In brackets the paired difference to random with the prompt kept, in points, and its 95 % interval.", ""]
    for group, cells in answers.items():
        full, rival = mean(cells["full", ""], "correct"), _rival(group, cells)
        out += [f"**{group}**, n = {len(cells['full', ''])}: full KV {100 * full.mean:.0f}", ""]

        def text(method: str, label: str, cells: Any = cells, rival: str = rival) -> str:
            one, theirs = mean(cells[method, label], "correct"), cells.get((rival, label))
            beyond = gain(cells[method, label], theirs, "correct", 100.0) if method != rival else None
            return f"{100 * one.mean:.0f} +- {100 * one.se:.0f} ({words(beyond, 0)})"

        out += by_budget(cells, text)
    return out


def _divergence(replays: Cells) -> list[str]:
    out = ["## Replay: KL in nats, mean and standard error, and its verdict against random with the prompt kept", ""]
    for group, cells in replays.items():
        rival = _rival(group, cells)
        out += [f"**{group}**, n = {len(cells.get(('full', ''), cells[rival, budgets(cells)[0]]))}", ""]

        def text(method: str, label: str, cells: Any = cells, rival: str = rival) -> str:
            one, theirs = mean(cells[method, label], "kl"), cells.get((rival, label))
            judged = verdict(gain(cells[method, label], theirs, "kl", -1.0)) if method != rival else "-"
            return f"{one.mean:.3f} +- {one.se:.3f} {judged}"

        out += by_budget(cells, text)
    return out


def _read(replays: Cells) -> list[str]:
    """Methods that keep everything and choose what to read: what they read and what they hold."""
    rows = []
    for group, cells in replays.items():
        label = budgets(cells)[-1]
        for method in methods(cells):
            cell = cells.get((method, label))
            if cell is not None and cell["slots_read_mean"].notna().any():
                slots = [f"{mean(cell, one).mean:.0f}" for one in ("physical_mean", "slots_read_mean")]
                megabytes = [f"{mean(cell, one).mean / 1e6:.2f}" for one in ("bytes_held", "bytes_read_mean")]
                rows.append([str(group), method, *slots, *megabytes])
    head = ["family", "method", "slots held", "slots read", "MB held at the end", "MB read a token"]
    return ["## Slots and bytes held and read (mean over traces, largest budget)", "", *table(head, rows), ""]


def _unlike(replays: Cells) -> list[str]:
    """Cells that do not hold as many slots as random does: their comparison is not at equal slots."""
    found = []
    for group, cells in replays.items():
        for label in budgets(cells):
            rival = "random" if ("random", label) in cells else _rival(group, cells)
            theirs = mean(cells[rival, label], "physical_mean").mean
            for method in methods(cells):
                lines = cells.get((method, label))
                ours = mean(lines, "physical_mean").mean
                if lines is not None and abs(ours / theirs - 1) > _ALIKE:
                    found.append([str(group), method, label, f"{ours:.0f}", f"{theirs:.0f}"])
    out = ["## Cells not at equal slots", ""]
    if not found:
        return [*out, "None: mean physical lengths agree within 2 % in every cell.", ""]
    return [*out, *table(["family", "method", "budget", "mean slots held", "random's"], found), ""]


def _heat(replays: Cells, policy: str, path: Path) -> None:
    """Methods by mean rank, cells by family and budget: how much lower or higher the KL is than random's."""
    if not replays:
        return
    ranks = _ranks(replays, "kl", -1.0)
    order = sorted(_names(replays), key=lambda one: (one not in CEILINGS, float(np.mean(ranks.get(one, [0.0])))))
    order = [one for one in order if one != RIVAL[policy]]
    points = []
    for group, cells in replays.items():
        rival = _rival(group, cells)
        for label in budgets(cells):
            for method in (one for one in order if (one, label) in cells and one != rival):
                judged = verdict(gain(cells[method, label], cells[rival, label], "kl", -1.0))
                ratio = _log_ratio(cells, method, rival, label)
                points.append({"family": group.task, "size": label, "method": method, "ratio": min(2, max(-2, ratio)),
                               "mark": "·" if judged == "undecided" else ""})  # fmt: skip
    data = pd.DataFrame(points)
    ratio = alt.Color("ratio:Q", legend=alt.Legend(
        title=["KL over that of", RIVAL[policy]], titleLimit=300,
        values=[-2, -1, 0, 1, 2], labelExpr="{'-2': '1/4', '-1': '1/2', '0': '1', '1': '2', '2': '4'}[datum.value]",
    ), scale=alt.Scale(scheme="redblue", reverse=True, domain=[-2, 2]))  # fmt: skip
    panels = []
    for family, part in data.groupby("family", sort=False):
        base = alt.Chart(part).encode(
            x=alt.X("size:N", title=None, sort=list(part["size"].unique()), axis=alt.Axis(labelAngle=-90, ticks=False)),
            y=alt.Y("method:N", title=None, sort=order, axis=None if panels else alt.Axis(ticks=False, labelLimit=260)),
        )
        chart = base.mark_rect().encode(color=ratio) + base.mark_text(fontSize=16).encode(text="mark:N")
        panels.append(chart.properties(title=family, width=alt.Step(24), height=alt.Step(17)))
    note = f"Columns: budget, slots per KV head; {POLICIES[policy]}. A dot: undecided, the 95 % interval holds 0."
    save_png(alt.hconcat(*panels, spacing=4), path, note, scale=1.4)
