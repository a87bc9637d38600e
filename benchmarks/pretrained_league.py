"""docs/results/pretrained_league: every method on a pretrained model's own traces, and where the testbed agrees."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import altair as alt
import pandas as pd
from claims import draw, judge
from pretrained import answers_table, model_of
from scipy.stats import spearmanr
from tables import Gains, load, manifests, markdown, means, plus_minus, shares_of_the_way, sizes, text, words

from reasonkv.evaluate.statistics import Difference, holm, paired_p_value
from reasonkv.report.charts import save_png

FORESIGHT = Path(__file__).parent / "results" / "foresight.json"
_JUDGED = (
    "Medians over heads, with quartiles of what models differ in. Of a method: Spearman's correlation of its scores "
    "with the attention that full KV's later queries pay, over the slots that may go; and how much of the attention "
    "that the best choice holds its own choice holds. All methods judge the same compactions of a cache that evicts "
    "at random (`foresight.py`, {slots} slots, {traces} traces each)."
)
VARIANTS = ("forecast:window=0",)
"""Methods with options that stand beside the defaults."""
_SHARED = "64"  # slots that all models have
_SHOWN = ("full", "oracle")  # the floor of KL, and what choosing by the future gives: shown, not ranked
_RIVALS = ("random", "expected")
_CHANCE = 0.05


def build(source: Path, to: Path) -> None:
    """Write the tables and the figure of `source` into `to`."""
    records = load(source)
    replay = of_league(records["replay"])
    kl = means(replay, "kl", "top1", "physical_mean")
    ran = {
        f"{one['model']['name']}, {one['device']}, {one['arguments']['dtype']}" for one in manifests(source).values()
    }
    parts = [f"Models: {'; '.join(sorted(ran))}. Made by `python benchmarks/results.py {source.name}`.\n"]
    for group, own in replay.groupby("group", sort=False):
        parts.append(_league(str(group), own, kl.xs(group, level="group", drop_level=False)))
    if "answers" in records:
        parts.append(answers_table(records["answers"]))
    parts.append(_agreement(kl, means(load(source.parent / "league", source.parent / "cask")["replay"], "kl")))
    parts.append(_foresight())
    judged, details = judge(records, "pretrained_claims")
    parts.append(f"## Claims of the papers\n\n{judged}\n{details}")
    (to / "tables.md").write_text("\n".join(parts))
    draw(records, "pretrained_claims", to / "claims.png")
    _draw(kl, to / f"{source.name}.png")
    _draw_models(kl.xs(_SHARED, level="size"), to / "models.png")


def of_league(replay: pd.DataFrame) -> pd.DataFrame:
    """Return the records of methods at their defaults, and of `VARIANTS`; parts left out belong to the claims."""
    return replay[~replay["method"].str.contains(":") | replay["method"].isin(VARIANTS)]


def _ranks(kl: pd.DataFrame) -> pd.Series:
    """Return every method's mean rank over the budgets, best first."""
    values = kl["kl", "mean"].drop(list(_SHOWN), level="method", errors="ignore")
    return values.groupby("size").rank().groupby("method").mean().sort_values(kind="stable")


def _decided(replay: pd.DataFrame, rival: str) -> pd.Series:
    """Return every cell's difference to a rival in words, in bold where it survives Holm's correction over them all."""
    gains = Gains(replay, "kl")
    found = gains.over(rival).drop(list(_SHOWN), level="method", errors="ignore").dropna()
    raw = []
    for group, method, size in found.index:
        theirs = gains.values[group, rival, size]
        raw.append(paired_p_value([one - theirs[at] for at, one in gains.values[group, method, size].items()]))
    kept = pd.Series(holm(raw), found.index) < _CHANCE
    return pd.Series([_bold(one, sure) for one, sure in zip(found, kept, strict=True)], found.index)


def _bold(found: Difference, sure: bool) -> str:
    return f"**{words(found)}**" if sure else words(found)


def _league(group: str, replay: pd.DataFrame, kl: pd.DataFrame) -> str:
    ranks, closed, texts = _ranks(kl), shares_of_the_way(kl["kl", "mean"]), plus_minus(kl, "kl", 4)
    top1, held = text(kl["top1", "mean"], 1, 100), text(kl["physical_mean", "mean"])
    against = {rival: _decided(replay, rival) for rival in _RIVALS}
    order = [*(one for one in _SHOWN if one in kl.index.unique("method")), *ranks.index]
    parts = [
        f"## {group}\n",
        f"{replay['example'].nunique()} traces a cell. Budgets are slots per KV head beside the prompt.\n",
    ]
    head = ["method", "mean rank", *(f"{size}: KL | {size}: way to the oracle, %" for size in sizes(kl["kl", "mean"]))]
    rows = []
    for method in order:
        row = [method, f"{ranks[method]:.1f}" if method in ranks else "-"]
        for size in sizes(kl["kl", "mean"]):
            cell = (group, method, "" if method == "full" else size)
            way = f"{100 * closed[cell]:.0f}" if cell in closed else "-"
            row += [texts.get(cell, "-"), way]
        rows.append(row)
    parts.append(markdown(head, rows) + "\n")
    for rival in _RIVALS:
        head = ["method", *(f"{size} slots" for size in sizes(kl["kl", "mean"]))]
        rows = [[one, *(against[rival].get((group, one, size), "-") for size in sizes(kl["kl", "mean"]))]
                for one in ranks.index if one != rival]  # fmt: skip
        parts.append(f"KL less than `{rival}`, paired by trace, with 95 % intervals. Bold: other than 0 by a paired t "
                     f"test after Holm's correction over this table.\n\n{markdown(head, rows)}\n")  # fmt: skip
    head = ["method", *(f"{size}: top-1, % | {size}: mean slots" for size in sizes(kl["kl", "mean"]))]
    rows = [[one, *(cell for size in sizes(kl["kl", "mean"])
                    for cell in (top1.get((group, one, size), "-"), held.get((group, one, size), "-")))]
            for one in order if one != "full"]  # fmt: skip
    parts.append(f"Tokens predicted as by full KV, and slots held:\n\n{markdown(head, rows)}\n")
    return "\n".join(parts)


def _agreement(kl: pd.DataFrame, testbed: pd.DataFrame) -> str:
    """Return Spearman's rank correlations of mean KL between pretrained models' cells and the testbed's."""
    values, rows = kl["kl", "mean"].drop(list(_SHOWN), level="method", errors="ignore"), []
    ours = {key: own.droplevel(["group", "size"]) for key, own in values.groupby(level=["group", "size"], sort=False)}
    columns = [
        (group, size) for group in values.index.unique("group") for size in sizes(values) if (group, size) in ours
    ]
    theirs = testbed["kl", "mean"].drop(list(_SHOWN), level="method", errors="ignore")
    theirs = theirs.rename(lambda name: name.partition(":")[0], level="method")
    theirs = theirs[~theirs.index.duplicated()]
    for group in theirs.index.unique("group"):
        if "kept" not in group:
            continue
        for size in sizes(theirs.xs(group, level="group")):
            one = theirs.xs((group, size), level=["group", "size"])
            row = [group.partition(",")[0], size]
            rows.append(row + [_correlation(one, ours[at]) for at in columns])
    head = ["testbed's family", "its slots", *(f"{model_of(group)}, {size} slots" for group, size in columns)]
    models = [[model_of(a), model_of(b), size, _correlation(ours[a, size], ours[b, size])]
              for (a, size), (b, other) in combinations(columns, 2) if size == other]  # fmt: skip
    among = f"The same between the pretrained models:\n\n{markdown(['', '', 'slots', 'correlation'], models)}\n\n"
    return ("## Do models rank methods alike?\n\nSpearman's correlation of mean KL over the methods that both "
            f"ran (their number in brackets), between the testbed and pretrained models.\n\n{markdown(head, rows)}\n\n"
            + (among if models else ""))  # fmt: skip


def _foresight() -> str:
    """Return what models differ in, and how well scores tell the attention to come (`foresight.py`)."""
    found = json.loads(FORESIGHT.read_text())
    titles = [f"{one['model'].rpartition('/')[2].removesuffix('-Instruct')}, {one['task']}" for one in found]
    rows = [[fact, *(f"{one[fact][1]:.2f} ({one[fact][0]:.2f} to {one[fact][2]:.2f})" for one in found)]
            for fact in ("R", "spread of value norms", "attention to the first four")]  # fmt: skip
    for spec in found[0]["methods"]:
        own = [one["methods"][spec] for one in found]
        rows.append([f"`{spec}`", *(f"{one['spearman'][1]:+.2f}; {100 * one['held'][1]:.0f} %" for one in own)])
    words = _JUDGED.format(slots=found[0]["budget"], traces=found[0]["traces"])
    return f"## Do scores tell the attention to come?\n\n{words}\n\n{markdown(['', *titles], rows)}\n"


def _correlation(one: pd.Series, other: pd.Series) -> str:
    """Return Spearman's correlation over the methods that both have, with their number; "-" for less than eight."""
    shared = [name for name in one.index if name in other.index]
    return f"{spearmanr(one[shared], other[shared]).statistic:+.2f} ({len(shared)})" if len(shared) > 7 else "-"


def _draw_models(kl: pd.DataFrame, path: Path) -> None:
    """Draw what ran on at least two models at one budget: a panel a model, the methods in one order."""
    found = kl["kl"].reset_index()
    found = found[found.groupby("method")["group"].transform("nunique") > 1]
    found = found.assign(low=found["mean"] - found["sem"], high=found["mean"] + found["sem"])
    found["model"] = found["group"].map(model_of)
    order = found.groupby("method")["mean"].mean().sort_values().index.tolist()
    base = alt.Chart(found).encode(y=alt.Y("method:N", sort=order, title=None, axis=alt.Axis(grid=True)))
    axis, scale = alt.Axis(values=[0.01, 0.02, 0.03, 0.05, 0.1]), alt.Scale(type="log", nice=False, padding=10)
    x = alt.X("mean:Q", scale=scale, title="KL from full KV, nats a token (log)", axis=axis)
    ours = alt.condition(alt.datum.method == "forecast", alt.value("#d95f02"), alt.value("#4c72b0"))
    layers = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q", color=ours) + base.mark_point(
        filled=True, size=46, opacity=1
    ).encode(x=x, color=ours)
    panels = layers.properties(width=220, height=alt.Step(16)).facet(
        column=alt.Column("model:N", title=None, header=alt.Header(labelFontSize=12, labelFontWeight="bold"))
    )
    save_png(panels, path, f"{_SHARED} slots beside the prompt. Mean over traces; bars: one standard error.", scale=1.4)


def _draw(kl: pd.DataFrame, path: Path) -> None:
    """Draw every method's KL over that of `random`, a column a group and a colour a budget."""
    values, charts = kl["kl", "mean"].drop("full", level="method", errors="ignore"), []
    errors = kl["kl", "sem"]
    for group, own in values.groupby("group", sort=False):
        order = ["oracle", *_ranks(kl.xs(group, level="group", drop_level=False)).index]
        rows = [{"method": method, "budget": f"{size} slots", "kl": value,
                 "low": value - errors[cell], "high": value + errors[cell]}
                for cell, value in own.items() for _, method, size in [cell]]  # fmt: skip
        budgets = [f"{size} slots" for size in sizes(own)]
        base = alt.Chart(pd.DataFrame(rows)).encode(
            y=alt.Y("method:N", sort=order, title=None, axis=alt.Axis(grid=True)),
            color=alt.Color("budget:N", sort=budgets, title=None, legend=alt.Legend(orient="top"),
                            scale=alt.Scale(domain=budgets, range=["#d95f02", "#1b9e77", "#7570b3"][: len(budgets)])),
        )  # fmt: skip
        dots = base.mark_point(filled=True, size=46, opacity=1).encode(
            x=alt.X("kl:Q", scale=alt.Scale(type="log"), title="KL from full KV, nats a token (log)")
        )
        bars = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
        charts.append((bars + dots).properties(title=model_of(str(group)), width=330, height=alt.Step(17)))
    save_png(
        alt.hconcat(*charts),
        path,
        "Mean over traces; bars: one standard error. The oracle knows the attention to come.",
        scale=1.4,
    )
