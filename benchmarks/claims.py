"""docs/results/claims: the verdict on every claim of the papers, with its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import altair as alt
import pandas as pd
import yaml
from tables import EXPERIMENTS, METRICS, Gains, by_budget, load, markdown, means, plus_minus, sizes, verdict, words

from reasonkv.report.charts import save_png


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, as two variants of a method of which the first should be better.

    Args:
        words: the claim.
        better: the method that should win.
        worse: the one that should lose.
        metrics: what to look at: "kl" and "answer_top1" in replay; "correct" and "repetition" in real generation.
        at_least: equal is enough.
        families: those it speaks of; all if empty.
    """

    words: str
    better: str
    worse: str
    metrics: Sequence[str] = ("kl", "correct")
    at_least: bool = False
    families: Sequence[str] = ()

    @property
    def paper(self) -> str:
        """What its words begin with, if that is a method."""
        first = re.split(r"[:, ]", self.words, maxsplit=1)[0]
        return first if first in _PAPERS else ""


_PAPERS = ("VaSE", "Random", "CASK", "TriAttention", "Kara")
_KIND = {"kl": "replay", "answer_top1": "replay", "correct": "answers", "repetition": "answers"}
_ENOUGH = 2 / 3  # of the decided cells on one side, and at least a third of all decided: the claim is judged


def build(source: Path, to: Path) -> None:
    """Write the tables of `source` into `to`."""
    records = load(source)
    values = "\n".join(_values(records[kind], metric) for metric, kind in _KIND.items())
    judged, details = judge(records, "claims")
    draw(records, "claims", to / "claims.png")
    (to / "tables.md").write_text(f"""\
Made by `python benchmarks/results.py claims`; see README.md for what the words mean.

## Verdicts

{judged}
## Every cell

{details}{values}
""")


def judge(records: Mapping[str, pd.DataFrame], experiment: str) -> tuple[str, str]:
    """Return the table of verdicts on the claims of an experiment's file, and the tables of their cells."""
    judged, details = [], ""
    for claim, metric, found in _cells(records, experiment):
        verdicts = [verdict(one) for one in found]
        counts = [verdicts.count(name) for name in ("better", "undecided", "worse")]
        _, digits, title = METRICS[metric]
        average = sum(one.mean for one in found) / len(found)
        verdicts_text = " / ".join(map(str, counts))
        judged.append(
            [claim.words, title, verdicts_text, f"{average:+.{digits}f}", _word(*counts, at_least=claim.at_least)]
        )
        rows = [[group, size, words(one, digits), verdict(one)] for (group, _, size), one in found.items()]
        details += f"**{claim.words}** (`{claim.better}` against `{claim.worse}`, {title})\n\n"
        details += markdown(["family", "budget", "difference", "verdict"], rows) + "\n\n"
    head = ["claim", "measure", "cells better / undecided / worse", "mean difference", "verdict"]
    return (
        f"""{markdown(head, judged)}

A claim holds, or does not, where at least a third of its cells are decided and two thirds of those \n\
agree, or, of `at least as good`, where no more than a sixth are worse; positive differences speak for it.
""",
        details,
    )


def draw(records: Mapping[str, pd.DataFrame], experiment: str, path: Path) -> None:
    """Draw the cells of every claim about KL, a panel a paper: right of 0 they speak for it."""
    rows = [
        {"paper": claim.paper, "claim": claim.words.removeprefix(f"{claim.paper}: "), "mean": one.mean, "low": one.low,
         "high": one.high, "verdict": {"better": "for", "worse": "against"}.get(verdict(one), "undecided")}
        for claim, metric, found in _cells(records, experiment) if metric == "kl" for one in found
    ]  # fmt: skip
    frame, panels = pd.DataFrame(rows), []
    span = alt.Scale(domain=[frame["low"].min(), frame["high"].max()])
    colors = alt.Scale(domain=["for", "undecided", "against"], range=["#1b9e77", "#999999", "#d95f02"])
    for paper, own in frame.groupby("paper", sort=False):
        is_last = paper == frame["paper"].iloc[-1]
        x = alt.X("low:Q", scale=span, title="KL saved by the first variant, nats a token" if is_last else None)
        base = alt.Chart(own).encode(
            y=alt.Y("claim:N", sort=None, title=None, axis=alt.Axis(labelLimit=520, grid=True)),
            color=alt.Color("verdict:N", title="The cell speaks", scale=colors),
        )
        zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color="#444444", strokeDash=[3, 3]).encode(x="x:Q")
        bars = base.mark_rule(strokeWidth=2).encode(x=x, x2="high:Q")
        dots = base.mark_point(filled=True, size=50, opacity=1).encode(x="mean:Q")
        panels.append((zero + bars + dots).properties(title=str(paper), width=300, height=alt.Step(17)))
    save_png(alt.vconcat(*panels), path, "Every cell, with its 95 % interval over traces.", scale=1.4)


def _cells(records: Mapping[str, pd.DataFrame], experiment: str) -> Iterator[tuple[Claim, str, pd.Series]]:
    """Yield every claim of an experiment's file with a metric and its differences, where both variants ran."""
    for one in yaml.safe_load((EXPERIMENTS / f"{experiment}.yaml").read_text())["claims"]:
        claim = Claim(**one)
        for metric in claim.metrics:
            found = _differences(records[_KIND[metric]], claim, metric)
            if len(found):
                yield claim, metric, found


def _differences(frame: pd.DataFrame, claim: Claim, metric: str) -> pd.Series:
    """Return the paired difference of both variants wherever both ran, groups in order and budgets ascending."""
    if claim.families:
        frame = frame[frame["task"].str.partition(":")[0].isin(claim.families)]
    gains, order = Gains(frame, metric), sizes(frame)
    found = gains.over(claim.worse, [claim.better]).dropna()
    groups = list(frame["group"].unique())
    return found[sorted(found.index, key=lambda cell: (groups.index(cell[0]), order.index(cell[2])))]


def _word(better: int, undecided: int, worse: int, *, at_least: bool) -> str:
    decided = better + worse
    if at_least and worse <= (better + undecided + worse) / 6:
        return "holds"
    if decided * 3 < better + undecided + worse:
        return "cannot be told"
    if better >= _ENOUGH * decided:
        return "holds"
    return "does not hold here" if worse >= _ENOUGH * decided else "depends on the family"


def _values(frame: pd.DataFrame, metric: str) -> str:
    scale, digits, title = METRICS[metric]
    texts = plus_minus(means(frame, metric), metric, digits, abs(scale))
    return f"## {title.split(',')[0].capitalize()}: means and standard errors\n\n" + by_budget(
        texts, head=lambda _, size: size
    )
