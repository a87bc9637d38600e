"""docs/results/claims: the verdict on every claim of the papers, with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from tables import EXPERIMENTS, METRICS, Gains, by_budget, load, markdown, means, plus_minus, sizes, verdict, words


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


_KIND = {"kl": "replay", "answer_top1": "replay", "correct": "answers", "repetition": "answers"}
_ENOUGH = 2 / 3  # of the decided cells on one side, and at least a third of all decided: the claim is judged


def build(source: Path, to: Path) -> None:
    """Write the tables of `source` into `to`."""
    records = load(source)
    values = "\n".join(_values(records[kind], metric) for metric, kind in _KIND.items())
    judged, details = judge(records, "claims")
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
    claims = yaml.safe_load((EXPERIMENTS / f"{experiment}.yaml").read_text())["claims"]
    for claim in [Claim(**one) for one in claims]:
        for metric in claim.metrics:
            found = _differences(records[_KIND[metric]], claim, metric)
            if not len(found):
                continue
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
