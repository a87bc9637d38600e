"""docs/results/cask: what holds of CASK's and TriAttention's claims, and the prompt's share of a budget."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import altair as alt
import pandas as pd
import yaml
from tables import (
    EXPERIMENTS,
    METRICS,
    Gains,
    by_budget,
    count_verdicts,
    load,
    markdown,
    means,
    plus_minus,
    points,
    sizes,
    text,
    verdict,
    words,
)

from reasonkv.report.charts import facets
from reasonkv.report.metrics import DIAGNOSTICS

_FIDELITY = ("kl", "top1", "answer_top1")
_PAGE = yaml.safe_load((EXPERIMENTS / "cask.yaml").read_text())["page"]
_PARTS, _PAPER, _PINNED = _PAGE["parts"], _PAGE["paper"], _PAGE["pinned"]


def build(source: Path, to: Path) -> None:
    """Write the tables and figures of `source` into `to`."""
    # an earlier default, another share of the budget for the prompt, was ablated, too: without it
    records = {kind: one[one["method"].eq("cask:prompt_share=0.5") | ~one["method"].str.contains("prompt_share=0.5")]
               for kind, one in load(source).items()}  # fmt: skip
    replay, answers = records["replay"], records["answers"]
    fidelity, right = means(replay, *_FIDELITY, "physical_mean"), means(answers, "correct")
    gains = {metric: Gains(replay, metric) for metric in _FIDELITY}
    slots, examples = text(fidelity["physical_mean", "mean"]), replay.groupby("group")["example"].nunique()
    values = (
        plus_minus(fidelity, "kl") + " / " + text(fidelity["top1", "mean"], 1, 100) + " / "
        + plus_minus(fidelity, "answer_top1", 1, 100)
    )  # fmt: skip
    fidelities = by_budget(
        values, lambda group: f"**{group}**, n = {examples[group]}",
        lambda group, size: f"{size} slots (mean {slots[group, 'random', size]})", _label,
    )  # fmt: skip
    share = plus_minus(right, "correct", 1, 100)
    gained = Gains(answers, "correct").over("random").map(lambda one: words(one, 0))
    gained = gained.reindex(share.index, fill_value="+0 [+0, +0]")  # random's to itself
    accuracy = by_budget(
        share + " (" + gained + ")", lambda group: f"**{group}**: full KV {share[group, 'full', '']}", name=_label
    )
    (to / "tables.md").write_text(f"""\
Made by `python benchmarks/results.py cask`; see README.md for what the words mean.

## The paper's claims under replay

Paired differences at equal slots and equal protection; an interval is 95 %, by bootstrap over traces. Cells
are family x prompt policy x budget; a cell counts as decided when its interval excludes 0.

{"".join(_verdicts(gains[metric], METRICS[metric][2]) for metric in _FIDELITY)}\
**Crossing**: the next smaller budget against triattention, KL (positive: more is kept with fewer slots)

{"".join(_crossings(gains["kl"], ours) for ours in ("cask", _PAPER))}\
## What each part contributes (replay, KL: cask minus the variant, positive when the part helps)

{_ablations(gains["kl"])}

## Whole answers right in real generation, % (paired difference to random in points)

{accuracy}
## What was lost (replay at half the length; means with standard errors)

{_lost(records["lost"])}
## Replay: KL / top-1 % / answer tokens right %, means with standard errors

{fidelities}
## Regimes and guards (records)

{_regimes(replay)}

""")
    note = "Bands and bars: one standard error."
    log = alt.Y("y:Q", title="KL from full KV, nats", scale=alt.Scale(type="log"),
                axis=alt.Axis(values=[0.01, 0.1, 1], format="~g"))  # fmt: skip
    _figure(points(fidelity.drop("full", level="method"), "kl"), log, to / "replay.png", f"Full KV is at 0. {note}")
    percent = alt.Y("y:Q", title="whole answers right, %")
    _figure(points(right, "correct", 100), percent, to / "answers.png", f"Dashed: full KV. {note}")


def _label(method: str) -> str:
    return _PARTS.get(method, method)


def _verdicts(gains: Gains, title: str) -> str:
    """How often each of our methods wins against each rival at equal slots."""
    rows = [
        [one, *(count_verdicts(gains.over(rival, [one]).dropna()) for rival in _PAGE["rivals"])]
        for one in _PAGE["ours"]
    ]
    table = markdown(["ours", *(f"against {rival}" for rival in _PAGE["rivals"])], rows)
    return f"**{title}**: cells in which ours is better / undecided / worse\n\n{table}\n\n"


def _crossings(gains: Gains, ours: str) -> str:
    """The paper's crossing: fewer slots, and still better."""
    rows = []
    for group, own in gains.frame.groupby("group", sort=False):
        budgets = sizes(own)
        for less, more in pairwise(budgets):
            for theirs in ("triattention", "triattention:mode=global"):
                found = gains.between((str(group), ours, less), (str(group), theirs, more))
                if found is not None:
                    rows.append([theirs, group, f"{less} > {more}", words(found), verdict(found)])
    return markdown([f"{ours} against", "family", "slots", "gain in KL", "verdict"], rows) + "\n\n"


def _ablations(gains: Gains) -> str:
    """What every part of CASK adds: the whole against the whole without it."""
    variants = [*_PARTS, _PAPER]
    found = {(group, size): None for group, own in gains.frame.groupby("group", sort=False) for size in sizes(own)}
    rows = [
        [group, size, *(words(gains.between((group, "cask", size), (group, one, size))) for one in variants)]
        for group, size in found
    ]
    return markdown(["family", "slots", *map(_label, variants)], rows)


def _lost(frame: pd.DataFrame) -> str:
    """What full KV attends to and the method had given up, and CASK's own measures."""
    found, text = means(frame, *(one.key for one in DIAGNOSTICS)), ""
    columns = [plus_minus(found, one.key, one.digits, one.scale) for one in DIAGNOSTICS]
    for group, own in frame.groupby("group", sort=False):
        (size,) = sizes(own)
        methods = [one for one in own["method"].unique() if one != "full"]
        rows = [[_label(one), *(texts[group, one, size] for texts in columns)] for one in methods]
        text += f"**{group}**, {size} slots, n = {own['example'].nunique()}\n\n"
        text += markdown(["method", *(one.label for one in DIAGNOSTICS)], rows) + "\n\n"
    return text + "; ".join(f"{one.label.removesuffix(' %')}: {one.meaning}" for one in DIAGNOSTICS) + ".\n"


def _regimes(replay: pd.DataFrame) -> str:
    """How many records were decided by compactions of decoded tokens, and in how many a fallback was used."""
    rows = []
    for group, here in replay.groupby("group", sort=False):
        for method in ("cask", _PAPER, _PINNED):
            own = here[here["method"].eq(method)]
            guards = Counter(name for text in own["guards"] for name, count in json.loads(text).items() if count)
            if len(own):
                rows.append([group, method, _counted(Counter(own["regime"])), _counted(guards) or "-"])
    return markdown(["family", "method", "regimes", "guards"], rows)


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in found.most_common())


def _figure(data: pd.DataFrame, y: alt.Y, path: Path, note: str) -> None:
    """A panel per family and policy, a line per method, with a band of one standard error."""
    data = data[data["method"].isin(_PAGE["figure"])].rename(columns={"group": "panel"})
    facets(data, "budget, slots per KV head", y, path, column="panel", columns=3, names=_PAGE["figure"], note=note)


def build_prompt_share(source: Path, to: Path) -> None:
    """Write KL by the share of the budget that CASK's first stage leaves to the prompt."""
    frame = load(source)["replay"]
    texts = plus_minus(means(frame, "kl"), "kl")
    (to / "tables.md").write_text(f"""\
Made by `python benchmarks/results.py prompt_share`: KL in nats with standard errors, prompt compressible,
seed 1, n = 32. Columns: budget in slots, at 1/8, 1/4 and 1/2 of the mean length.

{by_budget(texts, lambda group: f"**{group.partition(',')[0]}**", lambda _, size: size)}""")
