"""docs/results/claims: the verdict on every claim of the papers, with its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cells, Group, budgets, by_budget, gain, load_cells, mean, table, verdict, words

from reasonkv.evaluate.table import Difference


@dataclass(frozen=True)
class Claim:
    """A claim of a paper, as two forms of a method of which the first should be better.

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
    metrics: tuple[str, ...] = ("kl", "correct")
    at_least: bool = False
    families: tuple[str, ...] = ()


_ATTNV, _DKV = "vase-attnv:window=16", "vase-dkv:window=16"
CLAIMS = (
    Claim(
        "Evicting tokens with large value ranges is far worse than evicting at random, and makes traces loop",
        "random",
        f"{_ATTNV},evict_large=True",
        ("kl", "correct", "repetition"),
    ),
    Claim("Sampling beats taking the best by the same scores", _ATTNV, f"{_ATTNV},sample=False"),
    Claim("The reserve of large value ranges adds to sampling", _ATTNV, f"{_ATTNV},n_large=4"),
    Claim("The value range is a better reserve than a random one", _ATTNV, f"{_ATTNV},magnitude=random"),
    Claim("A fresh projection at every event beats a fixed one", _DKV, f"{_DKV},redraw=False"),
    Claim("The random projection beats the plain product of norms", _DKV, f"{_DKV},projection=0"),
    Claim("Attention in both directions beats causal scoring", "kara", "kara:causal=True"),
    Claim(
        "Attention in both directions beats causal scoring, both without chunks",
        "kara:token2chunk=False",
        "kara:token2chunk=False,causal=True",
    ),
    Claim("Token2Chunk adds to it", "kara", "kara:token2chunk=False"),
    Claim("Random with the prompt kept is at least as good as VaSE-AttnV", "random", _ATTNV, at_least=True),
    Claim("Random with the prompt kept is at least as good as VaSE-DKV", "random", _DKV, at_least=True),
    Claim(
        "Random with the prompt kept fails facts stated once, which VaSE-AttnV keeps",
        _ATTNV,
        "random",
        ("kl", "answer_top1", "correct"),
        families=("recall",),
    ),
    Claim(
        "Random with the prompt kept fails facts stated once, which VaSE-DKV keeps",
        _DKV,
        "random",
        ("kl", "answer_top1", "correct"),
        families=("recall",),
    ),
)
_SCALE = {
    "kl": (-1.0, 3, "KL, nats"),
    "correct": (100.0, 0, "right, points"),
    "answer_top1": (100.0, 0, "answer tokens right, points"),
    "repetition": (-100.0, 0, "in loops, points"),
}
_REPLAYED = ("kl", "answer_top1")
_ENOUGH = 2 / 3  # of the decided cells on one side, and at least a third of all decided: the claim is judged


def build(source: Path, to: Path) -> None:
    """Write the tables of `source` into `to`."""
    found, verdicts, details = load_cells(source), [], []
    for claim in CLAIMS:
        for metric in claim.metrics:
            rows = list(_rows(found.replays if metric in _REPLAYED else found.answers, claim, metric))
            if not rows:
                continue
            counts = [sum(verdict(one) == name for *_, one in rows) for name in ("better", "undecided", "worse")]
            average = sum(one.mean for *_, one in rows) / len(rows)
            _, digits, title = _SCALE[metric]
            judged = _judged(*counts, at_least=claim.at_least)
            verdicts.append([claim.words, title, " / ".join(map(str, counts)), f"{average:+.{digits}f}", judged])
            own = [[str(group), label, words(one, digits), verdict(one)] for group, label, one in rows]
            details += [f"**{claim.words}** (`{claim.better}` against `{claim.worse}`, {title})", ""]
            details += [*table(["family", "budget", "difference", "verdict"], own), ""]
    head = ["claim", "measure", "cells better / undecided / worse", "mean difference", "verdict"]
    out = [
        "Made by `python benchmarks/results.py claims`; see README.md for what the words mean.",
        "",
        "## Verdicts",
        "",
        *table(head, verdicts),
        "",
        "A claim holds, or does not, where at least a third of its cells are decided and two thirds of those ",
        "agree, or, of `at least as good`, where no more than a sixth are worse; positive differences speak for it.",
        "",
        "## Every cell",
        "",
        *details,
        *_values(found.replays, "kl"),
        *_values(found.replays, "answer_top1"),
        *_values(found.answers, "correct"),
        *_values(found.answers, "repetition"),
    ]
    (to / "tables.md").write_text("\n".join(out) + "\n")


def _rows(cells_of: Cells, claim: Claim, metric: str) -> Iterator[tuple[Group, str, Difference]]:
    """Yield (group, budget, paired difference) wherever both forms ran."""
    for group, cells in cells_of.items():
        if claim.families and group.task.partition(":")[0] not in claim.families:
            continue
        for label in budgets(cells):
            ours, theirs = cells.get((claim.better, label)), cells.get((claim.worse, label))
            found = None if ours is None or theirs is None else gain(ours, theirs, metric, _SCALE[metric][0])
            if found is not None:
                yield group, label, found


def _judged(better: int, undecided: int, worse: int, *, at_least: bool) -> str:
    decided = better + worse
    if at_least and worse <= (better + undecided + worse) / 6:
        return "holds"
    if decided * 3 < better + undecided + worse:
        return "cannot be told"
    if better >= _ENOUGH * decided:
        return "holds"
    return "does not hold here" if worse >= _ENOUGH * decided else "depends on the family"


def _values(cells_of: Cells, metric: str) -> list[str]:
    scale, digits, title = _SCALE[metric]
    out = [f"## {title.split(',')[0].capitalize()}: means and standard errors", ""]
    for group, cells in cells_of.items():

        def text(method: str, label: str, cells: Any = cells) -> str:
            return " +- ".join(f"{abs(scale) * part:.{digits}f}" for part in mean(cells[method, label], metric))

        out += [f"**{group}**", "", *by_budget(cells, text, budgets(cells))]
    return out
