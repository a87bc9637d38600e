"""The league table: every method on every family under replay and in real generation, at equal slots.

    python benchmarks/league.py run --out results/league              # resumes where it was stopped
    python benchmarks/league.py summarize results/league results/cask --to docs/results/league
    python benchmarks/league.py summarize docs/results/{league,cask}/records/* --to docs/results/league

Folders are those of `cask_claims.py` (same traces, problems, budgets and seeds), so that the methods which that
experiment ran are not run again: `summarize` joins both. Two columns: the prompt compressible and inside the budget,
or protected and on top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import experiment
from experiment import Part, part_of
from league_summary import summarize

REPLAY_SHARES: dict[str, tuple[float, ...]] = {
    "on_top": (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2),
    "count": (1 / 8, 1 / 4, 1 / 2),
}
ANSWER_SHARES = (1 / 3, 1 / 2)  # below, almost nothing answers (docs/results/cask)
METHODS = (
    "knorm",
    "keydiff",
    "h2o",
    "tova",
    "curdkv",
    "chunkkv:base=snapkv:window=16",
    "lagkv",
    "defensivekv:window=16",
    "beaconkv:recent=16",
    "vase-attnv:window=16",
    "vase-dkv:window=16",
    "kara",
    "pyramidkv:window=16",
    "adakv:base=snapkv:window=16",
    "quest",
    "seer",
    "oracle",
)
"""All that `cask_claims.py` does not run. Windows are cut to the recent tokens that every budget here protects."""
PROMPT_KEPT = "random-attention:recent=16"
"""Random with the prompt kept inside the budget: what the compressible column is compared with."""


def parts(tasks: list[str]) -> Iterator[Part]:
    """Every folder, those that tell most first."""
    for policy, kind in product(("on_top", "count"), ("replay", "answers")):
        shares = REPLAY_SHARES[policy] if kind == "replay" else ANSWER_SHARES
        for task in tasks:
            part = part_of(kind, task, policy, shares)  # type: ignore[arg-type]
            if part is not None:
                yield part


def methods_of(part: Part) -> tuple[str, ...]:
    """The methods a folder holds."""
    methods = METHODS if part.kind == "replay" else tuple(one for one in METHODS if one != "oracle")
    return (*methods, PROMPT_KEPT) if part.policy == "count" else methods


if __name__ == "__main__":
    experiment.main(__doc__, parts, methods_of, summarize)
