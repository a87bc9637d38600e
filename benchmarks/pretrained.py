"""docs/results/pretrained and lead: a pretrained model's own traces and answers, by method and budget."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
from tables import METRICS, Gains, load, manifests, markdown, means, plus_minus, points, sizes, text, words

from reasonkv.report.charts import facets

_WORDS = {"replay": "traces", "answers": "answers"}
_FIRST = ["full", "random", "oracle"]  # the ceiling, the floor, and what choosing by the future gives


def build(source: Path, to: Path, over: str = "random", by: str = "docs/your-model.md") -> None:
    """Write the table and the figure of `source` into `to`.

    Args:
        source: the kept records.
        to: a folder.
        over: the method that others are compared with, on the same traces.
        by: the page with the commands.
    """
    records = load(source)
    replay = means(records["replay"], "kl", "top1", "physical_mean")
    answers = means(records["answers"], "correct") if "answers" in records else None
    names = sorted(replay.index.unique("method"), key=lambda one: _FIRST.index(one) if one in _FIRST else len(_FIRST))
    about = next(iter(manifests(source).values()))
    parts = [
        f"Made by `python benchmarks/results.py {source.name}` from the records of {by}; see README.md.\n",
        f"Model {about['model']['name']}, {about['device']}, {about['arguments']['dtype']}.\n",
    ]
    for group in replay.index.unique("group"):
        parts.append(_table(group, names, replay, answers, records, over))
    (to / "tables.md").write_text("\n".join(parts))
    drawn = [points(replay.drop("full", level="method"), "kl").assign(row="KL from full KV, nats")]
    if answers is not None:
        drawn.append(points(answers, "correct", 100).assign(row="answers right, %"))
    data = pd.concat(drawn)
    data = data.assign(panel=data["row"], row="")
    facets(
        data, "budget, slots per KV head beside the prompt", alt.Y("y:Q", title=""), to / f"{source.name}.png",
        column="panel", columns=len(drawn), width=300, height=190, names=names,
        note="Dashed: full KV. Bars: one standard error.",
    )  # fmt: skip


def _table(
    group: str,
    names: list[str],
    replay: pd.DataFrame,
    answers: pd.DataFrame | None,
    records: dict[str, pd.DataFrame],
    over: str,
) -> str:
    """Return one row a method; of every budget KL, top-1, mean slots and answers right, if there are answers."""
    kl, right = plus_minus(replay, "kl"), None if answers is None else plus_minus(answers, "correct", 0, 100)
    budgets = sizes(kl)
    top1, slots = plus_minus(replay, "top1", 1, METRICS["top1"][0]), text(replay["physical_mean", "mean"])
    gain = Gains(records["replay"], "kl").over(over)
    rows = []
    for name in names:
        row = [name]
        for size in budgets if name != "full" else [""] * len(budgets):
            cell = (group, name, size)
            row += [series.get(cell, "-") for series in (kl, top1, slots)] + [words(gain.get(cell))]
            row += [] if right is None else [right.get(cell, "-")]
        rows.append(row)
    columns = ["KL", "top-1, %", "mean slots", f"KL less than {over}", *([] if right is None else ["right, %"])]
    kinds = [kind for kind in ("replay", "answers") if kind in records]
    n = " and ".join(f"{records[kind]['example'].nunique()} {_WORDS[kind]}" for kind in kinds)
    heads = [" | ".join(f"{size}: {one}" for one in columns) for size in budgets]
    counts = f"{n} a cell; +- is one standard error, brackets are 95 %."
    return f"**{group}**\n\n{markdown(['method', *heads], rows)}\n\n{counts}\n"
