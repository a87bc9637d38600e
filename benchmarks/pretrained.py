"""docs/results/pretrained, lead, breadth and layers: a pretrained model's traces and answers by method and budget."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
from tables import METRICS, SHARES, Gains, load, manifests, markdown, means, plus_minus, points, sizes, text, words

from reasonkv.evaluate.statistics import wilson
from reasonkv.report.charts import facets, save_png

_WORDS = {"replay": "traces", "answers": "answers"}
ALIKE = "all layers alike"
"""In place of a method that others are compared with: each method with shares, and itself without."""
_FIRST = ["full", "random", "oracle"]  # the ceiling, the floor, and what choosing by the future gives


def build(source: Path, to: Path, over: str = "random", by: str = "docs/your-model.md") -> None:
    """Write the table and the figure of `source` into `to`.

    Args:
        source: the kept records.
        to: a folder.
        over: the method that others are compared with, on the same traces; or `ALIKE`.
        by: the page with the commands.
    """
    records = load(source)
    replay = means(records["replay"], "kl", "top1", "physical_mean")
    answers = means(records["answers"], "correct") if "answers" in records else None
    groups = replay.index.unique("group")
    ran = {
        f"{one['model']['name']}, {one['device']}, {one['arguments']['dtype']}" for one in manifests(source).values()
    }
    parts = [
        f"Made by `python benchmarks/results.py {source.name}` from the records of {by}; see README.md.\n",
        f"Model {'; '.join(sorted(ran))}.\n",
    ]
    # answers at other budgets than replays have a table of their own
    parts += [_table(group, replay, answers if len(groups) == 1 else None, records, over) for group in groups]
    if answers is not None and len(groups) > 1:
        parts.append(answers_table(records["answers"]))
    (to / "tables.md").write_text("\n".join(parts))
    if len(groups) > 1:
        _draw_cells(replay["kl"], to / f"{source.name}.png")
        return
    drawn = [points(replay.drop("full", level="method"), "kl").assign(row="KL from full KV, nats")]
    if answers is not None:
        drawn.append(points(answers, "correct", 100).assign(row="answers right, %"))
    data = pd.concat(drawn)
    data = data.assign(panel=data["row"], row="")
    facets(
        data, "budget, slots per KV head beside the prompt", alt.Y("y:Q", title=""), to / f"{source.name}.png",
        column="panel", columns=len(drawn), width=300, height=190, names=_names(replay),
        note="Dashed: full KV. Bars: one standard error.",
    )  # fmt: skip


def _names(replay: pd.DataFrame) -> list[str]:
    """Return the methods in order."""
    rank = {name: number for number, name in enumerate(_FIRST)}
    return sorted(replay.index.unique("method"), key=lambda one: rank.get(one, len(rank)))


def _draw_cells(kl: pd.DataFrame, path: Path) -> None:
    """Draw the KL of every method, best first: a panel for each task, model and budget."""
    found = kl.drop("full", level="method").reset_index()
    found = found.assign(low=found["mean"] - found["sem"], high=found["mean"] + found["sem"])
    panels = []
    for (group, size), own in found.groupby(["group", "size"], sort=False):
        model, _, cell = group.partition(", ")
        title = [model.rpartition("/")[2].removesuffix("-Instruct"), f"{cell}, {size} slots"]
        base = alt.Chart(own).encode(
            y=alt.Y("method:N", sort=own.sort_values("mean")["method"].tolist(), title=None, axis=alt.Axis(grid=True)),
            color=alt.condition(
                "indexof(datum.method, 'forecast:window=0') == 0", alt.value("#d95f02"), alt.value("#4c72b0")
            ),
        )
        x = alt.X("mean:Q", scale=alt.Scale(type="log", nice=False, padding=10), title="KL from full KV, nats (log)")
        bars = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
        dots = base.mark_point(filled=True, size=46, opacity=1).encode(x=x)
        panels.append((bars + dots).properties(title=title, width=250, height=alt.Step(17)))
    note = "Mean over traces; bars: one standard error."
    save_png(alt.concat(*panels, columns=2), path, note, scale=1.4)


def _table(
    group: str,
    replay: pd.DataFrame,
    answers: pd.DataFrame | None,
    records: dict[str, pd.DataFrame],
    over: str,
) -> str:
    """Return one row a method; of every budget KL, top-1, mean slots and answers right, if there are answers."""
    replay = replay.xs(group, level="group", drop_level=False)
    has_answers = answers is not None and group in answers.index.unique("group")
    kl, right = plus_minus(replay, "kl", 4), plus_minus(answers, "correct", 0, 100) if has_answers else None
    records = {kind: own[own["group"] == group] for kind, own in records.items() if group in set(own["group"])}
    names, budgets = _names(replay), sizes(kl)
    top1, slots = plus_minus(replay, "top1", 1, METRICS["top1"][0]), text(replay["physical_mean", "mean"])
    gains = Gains(records["replay"], "kl")
    gain = gains.over(over) if over != ALIKE else {
        cell: gains.between(cell, (cell[0], cell[1].removesuffix(SHARES), cell[2]))
        for cell in kl.index if cell[1].endswith(SHARES)
    }  # fmt: skip
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


def answers_table(answers: pd.DataFrame) -> str:
    """Return how many answers are right, and paired differences to full KV and to `random`."""
    right, gains, rows = means(answers, "correct", "output_tokens", "physical_mean"), Gains(answers, "correct"), []
    for group, method, size in right.index:
        cell = right.loc[group, method, size]
        rivals = [(group, "full", ""), (group, "random", size)]
        against = [words(gains.between((group, method, size), one), 0) if one[1] != method else "-" for one in rivals]
        numbers = f"{cell['output_tokens', 'mean']:.0f}", f"{cell['physical_mean', 'mean']:.0f}"
        rows.append([model_of(group), method, size or "-", f"{100 * cell['correct', 'mean']:.0f}", *against, *numbers])
    head = ["model", "method", "slots", "right, %", "to full KV, points", "to `random`, points", "tokens", "mean slots"]
    n = answers["example"].nunique()
    return f"## Answers\n\n{n} problems, greedy; paired differences with 95 % intervals.\n\n{markdown(head, rows)}\n"


def build_answers(source: Path, to: Path) -> None:
    """Write the table and the figure of answers at one budget, where nothing was replayed; arguments as `build`'s."""
    answers = load(source)["answers"]
    about = f"Made by `python benchmarks/results.py {source.name}` from the records of its README.md.\n\n"
    (to / "tables.md").write_text(about + answers_table(answers))
    right = answers.groupby("method")["correct"].agg(["mean", "count"]).sort_values("mean", ascending=False)
    bounds = [wilson(mean, n) for mean, n in right.itertuples(index=False)]
    data = (100 * right.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])).reset_index()
    base = alt.Chart(data).encode(
        y=alt.Y("method:N", sort=data["method"].tolist(), title=None, axis=alt.Axis(grid=True)),
        color=alt.condition("datum.method == 'full'", alt.value("#333333"), alt.value("#4c72b0")),
    )
    bars = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    dots = base.mark_point(filled=True, size=46, opacity=1).encode(x=alt.X("mean:Q", title="answers right, %"))
    note = f"{answers['example'].nunique()} problems, the same for all; bars: 95 % of each by itself."
    save_png((bars + dots).properties(width=420, height=alt.Step(20)), to / f"{source.name}.png", note)


def model_of(group: str) -> str:
    """Return the short name of a group's model, or of its task where there is one model."""
    return group.partition(",")[0].rpartition("/")[2].removesuffix("-Instruct")
