"""What holds of CASK's and TriAttention's claims on the testbed: replay and generation, every family, five budgets.

    python benchmarks/cask_claims.py run --out results/cask            # resumes where it was stopped
    python benchmarks/cask_claims.py summarize results/cask --to docs/results/cask

`run` leaves one results folder per family, prompt policy and kind. All methods get one and the same budget, so they
hold equally many slots and protect the same ones. `summarize` needs nothing but the folders, or the records kept of
them (`docs/results/cask/records/*`).
"""

from __future__ import annotations

from collections.abc import Iterator

import experiment
from cask_claims_summary import summarize
from cask_methods import ABLATIONS, BASELINES, CASK, DEGENERATE, GENERATED, TRIATTENTION
from experiment import Part, part_of

REPLAY_SHARES, ANSWER_SHARES, LOW_SHARES = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2), (1 / 3, 1 / 2), (1 / 8, 1 / 6, 1 / 4)


def parts(tasks: list[str]) -> Iterator[Part]:
    """Every folder, those that tell most first."""
    for kind, policy, shares in (
        ("answers", "on_top", ANSWER_SHARES),
        ("replay", "on_top", REPLAY_SHARES),
        ("replay", "count", REPLAY_SHARES),
        ("low", "on_top", LOW_SHARES),
        ("answers", "count", ANSWER_SHARES),
        ("lost", "on_top", (1 / 2,)),
        ("lost", "count", (1 / 2,)),
    ):
        for task in tasks:
            part = part_of(kind, task, policy, shares)
            if part is not None:
                yield part


def methods_of(part: Part) -> tuple[str, ...]:
    """The methods a folder holds."""
    methods = GENERATED if part.generates else (*BASELINES, *TRIATTENTION, *CASK, *ABLATIONS)
    return (*methods, DEGENERATE) if part.policy == "count" else methods


if __name__ == "__main__":
    experiment.main(__doc__, parts, methods_of, summarize)
