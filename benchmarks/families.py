"""docs/results/families: which family of the testbed separates which methods."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
from tables import POLICIES, load, markdown, means, plus_minus, points, sizes, text

from reasonkv.evaluate.table import clustered_mean
from reasonkv.report.charts import facets, looks, save_png

_DISTANCE = "recall:distance="


def build(source: Path, to: Path) -> None:
    """Write the tables and figures of `source` into `to`."""
    records = {kind: _named(frame) for kind, frame in load(source).items()}
    far = {kind: frame[frame["task"].str.startswith(_DISTANCE)] for kind, frame in records.items()}
    near = {kind: frame[~frame["task"].str.contains(":")] for kind, frame in records.items()}
    replay = means(near["replay"], "kl", "top1", "answer_top1", "physical_mean")
    answers = means(near["answers"], "correct")
    (to / "tables.md").write_text(f"""\
Made by `python benchmarks/results.py families`; see README.md for what the words mean.

## Does a family separate methods? (replay, middle budget)

Gain over `random` at equal slots, paired by trace: mean, and how many standard errors it is.

**KL, nats less**

{_separation(near["replay"], "kl", -1)}

**answer tokens right, points more**

{_separation(near["replay"], "answer_top1", 100)}

## Accuracy of real generation, and fidelity of replay

{_accuracy(near["answers"], answers, replay)}
## Does fidelity predict accuracy?

Spearman's rank correlation over cells (method x budget) of a family, both prompt policies.

{_prediction(answers, replay, to / "fidelity_and_accuracy.png")}

{_by_distance(far, to / "recall_distance.png")}

""")
    for policy, name in (("on_top", "families.png"), ("count", "families_compressible.png")):
        drawn = [
            points(answers, "correct", 100).assign(row="answers right, %"),
            points(replay.drop("full", level="method"), "kl").assign(row="KL, nats"),
        ]
        data = pd.concat(drawn)
        data = data[data["group"].str.endswith(POLICIES[policy])]
        data["panel"] = data["group"].str.partition(",")[0]
        facets(data, "budget, slots per KV head", alt.Y("y:Q"), to / name, column="panel", row="row",
               columns=data["panel"].nunique(), width=130, height=130, names=list(replay.index.unique("method")),
               note=f"{POLICIES[policy].capitalize()}. Dashed: full KV. Bands, bars: one standard error.")  # fmt: skip


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Leave out of methods the options that are the same for all."""
    short = frame["method"].str.partition(":")[0]
    short += frame["method"].str.contains("redraw=False").map({True: ":redraw=false", False: ""})
    return frame.assign(method=short + frame["method"].str.contains("reduce=max").map({True: ":reduce=max", False: ""}))


def _separation(frame: pd.DataFrame, metric: str, sign: float) -> str:
    """Paired differences to random at the middle budget, in standard errors."""
    names = [one for one in frame["method"].unique() if one not in ("full", "random")]
    rows = []
    for (task, policy), own in frame.groupby(["task", "policy"], sort=False):
        size = sizes(own)[len(sizes(own)) // 2]
        by_method = own[own["size"].eq(size)].pivot(index="example", columns="method", values=metric).astype(float)
        gain = sign * (by_method.reindex(columns=names).sub(by_method["random"], axis=0))
        found = (clustered_mean(gain[one].to_numpy(), gain.index) for one in names)
        texts = [f"{one.mean:+.3f} ({one.mean / one.se:+.1f})" if one.se > 0 else "-" for one in found]
        rows.append([task, POLICIES[policy], size, by_method["random"].count(), *texts])
    return markdown(["family", "prompt", "slots", "n", *names], rows)


def _accuracy(records: pd.DataFrame, answers: pd.DataFrame, replay: pd.DataFrame) -> str:
    """Whole answers right, and fidelity, every cell that ran in both."""
    right, parts = plus_minus(answers, "correct", 1, 100), []
    columns = [
        right.reindex(replay.index, fill_value="-"), plus_minus(replay, "top1", 1, 100), plus_minus(replay, "kl"),
        text(replay["physical_mean", "mean"]),
    ]  # fmt: skip
    cells = pd.concat(columns, axis=1).agg(" | ".join, axis=1)
    for group, own in right.groupby("group", sort=False):
        here, budgets = cells[group], sizes(own)
        examples = records.loc[records["group"].eq(group) & records["method"].eq("full"), "example"].nunique()
        rows = [[one, *here[one][budgets]] for one in here.index.unique("method") if one != "full"]
        head = [f"{size} slots: right, % | top-1, % | KL | mean slots" for size in budgets]
        parts.append(f"**{group}**: full KV {right[group, 'full', '']} of {examples} right\n")
        parts.append(markdown(["method", *head], rows) + "\n")
    return "\n".join(parts)


def _prediction(answers: pd.DataFrame, replay: pd.DataFrame, path: Path) -> str:
    """How well fidelity under replay orders cells by the accuracy of real generation."""
    fidelity = ["kl", "top1", "answer_top1"]
    data = answers["correct", "mean"].rename("right").to_frame().drop("full", level="method")
    data = data.join(replay.xs("mean", axis=1, level=1)[fidelity], how="inner").reset_index()
    data["task"] = data["group"].str.partition(",")[0]
    tasks, rows = list(data["task"].unique()), []
    for task in [*tasks, "all"]:
        own = data[data["task"].eq(task) | (task == "all")]
        rho = own[fidelity].corrwith(own["right"], method="spearman") * [-1, 1, 1]
        rows.append([task, len(own), *rho.map("{:+.2f}".format).where(rho.notna(), "-")])
    look = looks(list(data["method"].unique()), columns=6)
    x = alt.X("kl:Q", title="KL under replay, nats", scale=alt.Scale(type="log"),
              axis=alt.Axis(values=[0.01, 0.1, 1], format="~g", grid=False))  # fmt: skip
    y = alt.Y("right:Q", title="whole answers right", axis=alt.Axis(format="%"))
    base = alt.Chart(data).mark_point(filled=True, size=60, opacity=1)
    base = base.encode(x=x, y=y, color=look["color"], shape=look["shape"]).properties(width=135, height=170)
    save_png(base.facet(column=alt.Column("task:N", title=None, sort=tasks)), path, scale=1.5)
    return markdown(["family", "cells", "-KL", "top-1", "answer top-1"], rows)


def _by_distance(far: dict[str, pd.DataFrame], path: Path) -> str:
    """`recall` against distance: whole answers right, and answer tokens right under replay."""
    (size,) = sizes(far["replay"])
    replay, answers = means(far["replay"], "answer_top1"), means(far["answers"], "correct")
    texts = plus_minus(answers, "correct", 1, 100).reindex(replay.index, fill_value="-")
    texts = texts + " / " + plus_minus(replay, "answer_top1", 1, 100)
    distance = far["replay"].groupby("group")["task"].first().str.removeprefix(_DISTANCE).astype(int).sort_values()
    methods = texts.index.unique("method")
    rows = [[one, *(texts[group, one, "" if one == "full" else size] for group in distance.index)] for one in methods]
    drawn = {"real generation: whole answers right": (answers, "correct"),
             "replay: answer tokens right": (replay, "answer_top1")}  # fmt: skip
    data = pd.concat([points(table, metric, 100).assign(panel=panel) for panel, (table, metric) in drawn.items()])
    data = data.assign(x=data["group"].map(distance)).sort_values("x", kind="stable")
    facets(data, "tokens of work between facts and questions", alt.Y("y:Q", title="%"), path, column="panel", columns=2,
           width=360, band=False, names=list(methods))  # fmt: skip
    return f"""## `recall` against distance ({size} slots, prompt kept)

Whole answers right in real generation, % / answer tokens right under replay, %.

{markdown(["method", *distance], rows)}"""
