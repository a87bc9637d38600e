"""docs/results/league: every method on every family in replay and generation at equal slots; reads CASK's, too."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import numpy as np
import pandas as pd
from tables import (
    POLICIES,
    Gains,
    by_budget,
    count_verdicts,
    load,
    markdown,
    means,
    plus_minus,
    sizes,
    text,
    verdict,
    words,
)

from reasonkv.report.charts import save_png

RIVAL = {"on_top": "random", "count": "random-attention:recent=16"}
"""Random with the prompt kept: on top of the budget, or inside it by the method's own doing."""
CEILING = "oracle"
"""Knows the future: shown, not ranked."""
_ALIKE = 0.02  # two cells are alike when their mean physical lengths differ by less


def build(source: Path, to: Path) -> None:
    """Write the tables and figures of `source` into `to`."""
    # of CASK's variants, the paper's alone: the parts left out are the matter of another table
    records = {kind: one[~one["method"].str.startswith("cask:") | one["method"].eq("cask:profile=paper")]
               for kind, one in load(source, source.parent / "cask").items()}  # fmt: skip
    replay, answers = records["replay"], records["answers"]
    kl, right = means(replay, "kl"), means(answers, "correct")
    gains = {
        metric: Gains(frame, metric).over(_rivals(frame)) for metric, frame in (("kl", replay), ("correct", answers))
    }
    full, share = text(right["correct", "mean"], 0, 100), plus_minus(right, "correct", 0, 100)
    asked, replayed = (frame.groupby("group")["example"].nunique() for frame in (answers, replay))
    beyond = gains["correct"].map(lambda one: words(one, 0)).reindex(right.index, fill_value="-")
    accuracy = by_budget(
        share + " (" + beyond + ")", lambda group: f"**{group}**, n = {asked[group]}: full KV {full[group, 'full', '']}"
    )
    decided = gains["kl"].map(verdict).reindex(kl.index, fill_value="-")
    divergence = by_budget(plus_minus(kl, "kl") + " " + decided, lambda group: f"**{group}**, n = {replayed[group]}")
    leagues = "\n".join(_league(policy, replay, answers, gains) for policy in RIVAL)
    (to / "tables.md").write_text(f"""\
Made by `python benchmarks/results.py league`; see README.md for what the words mean.

{leagues}
## Whole answers right in real generation, %

In brackets the paired difference to random with the prompt kept, in points, and its 95 % interval.

{accuracy}
## Replay: KL in nats, mean and standard error, and its verdict against random with the prompt kept

{divergence}
## Slots and bytes held and read (mean over traces, largest budget)

{_read(replay)}

## Cells not at equal slots

{_unlike(replay)}

""")
    for policy in RIVAL:
        _heat(_whole(replay, policy), gains["kl"], policy, to / f"league-{policy.replace('_', '-')}.png")


def _rivals(frame: pd.DataFrame) -> dict[str, str]:
    """Return what every group is compared with."""
    groups = frame.groupby("group")[["policy", "method"]].agg(set)
    rivals = {group: RIVAL[next(iter(own["policy"]))] for group, own in groups.iterrows()}
    return {group: one if one in groups.loc[group, "method"] else "random" for group, one in rivals.items()}


def _whole(frame: pd.DataFrame, policy: str) -> pd.DataFrame:
    """Return a policy's records without the budgets that some methods of a family did not run at."""
    frame = frame[frame["policy"].eq(policy)]
    entrants = frame.groupby(["group", "size"])["method"].transform("nunique").where(frame["size"].ne(""))
    return frame[entrants.isna() | entrants.eq(entrants.groupby(frame["group"]).transform("max"))]


def _ranks(table: pd.DataFrame, metric: str, ascending: bool) -> pd.Series:
    """Return a method's mean rank over cells of family and budget; 1 is best, ties share their mean."""
    values = table[metric, "mean"].drop([CEILING, "full"], level="method", errors="ignore")
    return values.groupby(["group", "size"]).rank(ascending=ascending).groupby("method").mean()


def _log_ratios(kl: pd.DataFrame, rivals: dict[str, str]) -> pd.Series:
    """Return log2 of every cell's mean KL over its rival's."""
    values = kl["kl", "mean"].drop("full", level="method", errors="ignore")
    theirs = [values[group, rivals[group], size] for group, _, size in values.index]
    return np.log2(values / theirs)


def _order(table: pd.DataFrame, ranks: pd.Series) -> list[str]:
    """Return the methods, best mean rank first, and the ceiling before all."""
    methods = [one for one in table.index.unique("method") if one != "full"]
    return sorted(methods, key=lambda one: (one != CEILING, ranks.get(one, 0.0)))


def _league(policy: str, replay: pd.DataFrame, answers: pd.DataFrame, gains: dict[str, pd.Series]) -> str:
    """One row a method, best mean rank in KL first."""
    replay, answers = _whole(replay, policy), _whole(answers, policy)
    kl, right = means(replay, "kl"), means(answers, "correct")
    ranks, answered = _ranks(kl, "kl", True), _ranks(right, "correct", False)
    ratios = 2 ** _log_ratios(kl, _rivals(replay)).groupby("method").mean()
    verdicts = {
        name: own[own.index.isin(table.index)].groupby("method").apply(count_verdicts)
        for (name, own), table in zip(gains.items(), (kl, right), strict=True)
    }
    families = answers.groupby("group", sort=False)["task"].first()
    percent = right["correct", "mean"].groupby(["group", "method"]).mean()
    rows = []
    for method in sorted(_order(kl, ranks), key=CEILING.__eq__):
        rows.append([
            method, f"{ranks[method]:.1f}" if method != CEILING else "-", f"{ratios[method]:.2f}",
            verdicts["kl"].get(method, "-"), f"{answered[method]:.1f}" if method in answered else "-",
            verdicts["correct"].get(method, "-"),
            *(f"{100 * percent[group, method]:.0f}" if (group, method) in percent else "-" for group in families.index),
        ])  # fmt: skip
    full = (f"{100 * percent[group, 'full']:.0f}" for group in families.index)
    rows.append(["full KV", "-", "0", "-", "-", "-", *full])
    head = [
        "method", "mean rank in KL", "KL over random's", f"cells against {RIVAL[policy]} in KL", "mean rank in answers",
        f"cells against {RIVAL[policy]} in answers", *(f"right on {family}, %" for family in families),
    ]  # fmt: skip
    cells = len(kl.drop("full", level="method").index.droplevel("method").unique())
    return f"""## The league, {POLICIES[policy]}

{", ".join(replay["task"].unique())}; {cells} cells of family and budget in replay. Ranks are over methods of a cell; \
the ratio is a geometric mean over cells; cells are better / undecided / worse by a 95 % interval of paired \
differences; answers are means over budgets.

{markdown(head, rows)}
"""


def _read(replay: pd.DataFrame) -> str:
    """Methods that keep everything and choose what to read: what they read and what they hold."""
    found = means(replay, "physical_mean", "slots_read_mean", "bytes_held", "bytes_read_mean").xs(
        "mean", axis=1, level=1
    )
    slots, megabytes = found.iloc[:, :2].apply(text), found.iloc[:, 2:].apply(text, digits=2, scale=1e-6)
    largest = {group: sizes(own)[-1] for group, own in replay.groupby("group")}
    texts = pd.concat([slots, megabytes], axis=1)[found["slots_read_mean"].notna()]
    rows = [[*cell[:2], *own] for cell, own in texts.T.items() if cell[2] == largest[cell[0]]]
    head = ["family", "method", "slots held", "slots read", "MB held at the end", "MB read a token"]
    return markdown(head, rows)


def _unlike(replay: pd.DataFrame) -> str:
    """Cells that do not hold as many slots as random does: their comparison is not at equal slots."""
    held, rivals, rows = means(replay, "physical_mean")["physical_mean", "mean"], _rivals(replay), []
    for group, own in replay.groupby("group", sort=False):
        for size in sizes(own):
            here = held.xs((group, size), level=["group", "size"])
            theirs = here.get("random", here.get(rivals[str(group)]))
            for method, ours in here[(here / theirs - 1).abs() > _ALIKE].items():
                rows.append([group, method, size, f"{ours:.0f}", f"{theirs:.0f}"])
    if not rows:
        return "None: mean physical lengths agree within 2 % in every cell."
    return markdown(["family", "method", "budget", "mean slots held", "random's"], rows)


def _heat(replay: pd.DataFrame, gains: pd.Series, policy: str, path: Path) -> None:
    """Methods by mean rank, cells by family and budget: how much lower or higher the KL is than random's."""
    kl = means(replay, "kl")
    order = _order(kl, _ranks(kl, "kl", True))
    data = _log_ratios(kl, _rivals(replay)).clip(-2, 2).rename("ratio").to_frame()
    data["mark"] = gains.map(verdict).eq("undecided").reindex(data.index, fill_value=False).map({True: "·", False: ""})
    data = data.reset_index()
    data["slots"], data["rank"] = data["size"].astype(int), data["method"].map(order.index)
    data = data[data["method"].ne(data["group"].map(_rivals(replay))) & data["method"].ne(RIVAL[policy])]
    ratio = alt.Color("ratio:Q", legend=alt.Legend(
        title=["KL over that of", RIVAL[policy]], titleLimit=300,
        values=[-2, -1, 0, 1, 2], labelExpr="{'-2': '1/4', '-1': '1/2', '0': '1', '1': '2', '2': '4'}[datum.value]",
    ), scale=alt.Scale(scheme="redblue", reverse=True, domain=[-2, 2]))  # fmt: skip
    charts = []
    for group, part in data.groupby("group", sort=False):
        base = alt.Chart(part.sort_values(["slots", "rank"])[["size", "method", "ratio", "mark"]]).encode(
            x=alt.X("size:N", title=None, sort=sizes(part), axis=alt.Axis(labelAngle=-90, ticks=False)),
            y=alt.Y("method:N", title=None, sort=order, axis=None if charts else alt.Axis(ticks=False, labelLimit=260)),
        )
        chart = base.mark_rect().encode(color=ratio) + base.mark_text(fontSize=16).encode(text="mark:N")
        title = str(group).partition(",")[0]
        charts.append(chart.properties(title=title, width=alt.Step(24), height=alt.Step(17)))
    note = f"Columns: budget, slots per KV head; {POLICIES[policy]}. A dot: undecided, the 95 % interval holds 0."
    save_png(alt.hconcat(*charts, spacing=4), path, note, scale=1.4)
