"""Claims of the papers on VaSE, Kara and random eviction, each with the smallest experiment that can refute it.

    python benchmarks/method_claims.py run --out results/claims        # resumes where it was stopped
    python benchmarks/method_claims.py summarize results/claims --to docs/results/claims

Every claim compares two forms of one method at equal slots. Kara's run under its own schedule, where windows are cut
once and then frozen; all others as in the league table, with the prompt on top. `summarize` reads kept records
(`docs/results/claims/records/*`), too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import experiment
from experiment import Part, part_of
from method_claims_summary import summarize

from reasonkv.budget import Budget, Window

SHARES = (1 / 4, 1 / 3, 1 / 2)
RETENTIONS = (0.25, 0.5)
VASE = (
    "full",
    "random",
    "vase-attnv:window=16",
    "vase-attnv:window=16,sample=false",
    "vase-attnv:window=16,n_large=4",
    "vase-attnv:window=16,evict_large=true",
    "vase-attnv:window=16,magnitude=random",
    "vase-dkv:window=16",
    "vase-dkv:window=16,redraw=false",
    "vase-dkv:window=16,projection=0",
)
KARA = (
    "full",
    "random",
    "kara",
    "kara:causal=true",
    "kara:token2chunk=false",
    "kara:causal=true,token2chunk=false",
)


@dataclass(frozen=True)
class Windowed(Part):
    """A folder under the sliding-window schedule."""

    @property
    def folder(self) -> str:
        """Its name says so."""
        return "window-" + super().folder

    def budgets(self) -> list[Budget]:
        """Windows of 64 tokens, the newest 16 raw: as many slots an event as the league's interval and recent."""
        return [Window(size=64, buffer=16, retention=share) for share in RETENTIONS]


def parts(tasks: list[str]) -> Iterator[Part]:
    """Every folder."""
    for kind in ("answers", "replay"):
        for task in tasks:
            part = part_of(kind, task, "on_top", SHARES)  # type: ignore[arg-type]
            if part is not None:
                yield part
                yield Windowed(part.kind, part.task, part.policy, part.tokens)


def methods_of(part: Part) -> tuple[str, ...]:
    """The methods a folder holds."""
    return KARA if isinstance(part, Windowed) else VASE


if __name__ == "__main__":
    experiment.main(__doc__, parts, methods_of, summarize)
