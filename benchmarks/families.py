"""Which family of the testbed separates which methods: replay and generation of every method on every family.

    python benchmarks/families.py run --out results/families      # resumes where it was stopped
    python benchmarks/families.py summarize results/families --to docs/results/families

`run` leaves one results folder per family, prompt policy and kind (replay or answers), and those of `recall` against
distance. `summarize` needs nothing but them, or `docs/results/families/records`; it writes tables, figures and, of
results folders, the records without their texts.
"""

from __future__ import annotations

from collections.abc import Iterator

import experiment
from experiment import Part, part_of
from families_summary import summarize

METHODS = ("full", "random", "streaming", "knorm", "snapkv:window=16", "rkv", "keydiff")
REPLAY_ONLY = ("random:redraw=false", "oracle", "oracle:reduce=max")
REPLAY_SHARES, ANSWER_SHARES = (1 / 8, 1 / 4, 1 / 2), (1 / 4, 1 / 2)  # at 1/8 no answer survives
DISTANCES = (250, 500, 1000, 1500)
DISTANCE_TOKENS = 160


def parts(tasks: list[str]) -> Iterator[Part]:
    """Every folder, those that tell most first."""
    for kind, shares in (("replay", REPLAY_SHARES), ("answers", ANSWER_SHARES)):
        for policy in ("count", "on_top"):
            yield from filter(None, (part_of(kind, task, policy, shares) for task in tasks))
        if "recall" in tasks:
            for distance in DISTANCES:
                yield Part(kind, f"recall:distance={distance}", "on_top", (DISTANCE_TOKENS,))


def methods_of(part: Part) -> tuple[str, ...]:
    """The methods a folder holds."""
    return METHODS + (REPLAY_ONLY if part.kind == "replay" else ())


if __name__ == "__main__":
    experiment.main(__doc__, parts, methods_of, summarize)
