"""What CASK's second stage works on: its rules, its candidates, and the groups they become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Representative = Literal["score_max_source", "weighted_latest"]
Operator = Literal["mean", "keepkv"]
Folding = Literal["similar", "neighbours", "none"]
LEAST_SUPPORT = 1e-4
"""Floor under a slot's support wherever it weighs something."""


@dataclass(frozen=True)
class Rules:
    """How candidates are consolidated; the fields are the options of `reasonkv.methods.cask.CASK` of these names.

    `promotion`, `value_gate` and `mass_gate` are off at 0.
    """

    core: Literal["vote", "score"] = "vote"
    core_ratio: float = 0.5
    core_least: int = 1
    promotion: float = 0.0
    fold: Folding = "neighbours"
    operator: Operator = "keepkv"
    representative: Representative = "score_max_source"
    local_window: int = 32
    similarity: float = 0.985
    value_gate: float = 0.0
    mass_gate: float = 0.0
    phases: bool = True


@dataclass(frozen=True)
class Candidates:
    """What is known of n candidates, oldest first.

    Args:
        scores: float64 [n], maximum over query heads.
        supports: float64 [n], weight of a source slot beside its count.
        counts: int [n], source tokens a slot stands for.
        starts: int [n], first original position of a slot's span.
        ends: int [n], last original position of it.
        phases: int [n], phase of a slot.
        vectors: float64 [n, D], what two slots are compared by.
        values: float64 [n, M], projected values for the value gate, or None.
        linked: bool [n], the candidate directly follows the one before it (nothing protected lies between).
    """

    scores: NDArray[np.float64]
    supports: NDArray[np.float64]
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    phases: NDArray[np.int64]
    vectors: NDArray[np.float64]
    values: NDArray[np.float64] | None = None
    linked: NDArray[np.bool_] | None = None

    @property
    def size(self) -> int:
        """n."""
        return len(self.scores)


@dataclass(slots=True)  # not frozen: an event makes hundreds, and frozen ones take three times as long
class Group:
    """Neighbouring candidates first..last that become one slot, continued by `anchor` (their best-scored source)."""

    first: int
    last: int
    anchor: int
    count: int
    support: float
    score_mass: float


@dataclass(frozen=True, eq=False)
class Grouping:
    """A sequence of groups as arrays, one entry each; a `Group` is made when it is asked for.

    Args:
        first, last, anchor, count, support, score_mass: fields of the groups, by their first candidate.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    anchor: NDArray[np.int64]
    count: NDArray[np.int64]
    support: NDArray[np.float64]
    score_mass: NDArray[np.float64]

    @classmethod
    def alone(cls, candidates: Candidates, index: NDArray[np.int64]) -> Grouping:
        """Candidates that stay single, ascending."""
        counts = candidates.counts[index].astype(np.int64)
        return cls(index, index, index, counts, candidates.supports[index], candidates.scores[index])

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Group:
        return Group(*(field[index].item() for field in self._fields()))

    def __iter__(self) -> Iterator[Group]:
        return (Group(*group) for group in zip(*(field.tolist() for field in self._fields()), strict=True))

    def __eq__(self, other: object) -> bool:
        """The same groups in the same order, in whatever they come."""
        return isinstance(other, Iterable) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def merged_with(self, others: Grouping) -> Grouping:
        """Both, ascending."""
        order = np.argsort(np.concatenate([self.first, others.first]))
        pairs = zip(self._fields(), others._fields(), strict=True)
        return Grouping(*(np.concatenate(pair)[order] for pair in pairs))

    def _fields(self) -> tuple[NDArray[Any], ...]:
        return self.first, self.last, self.anchor, self.count, self.support, self.score_mass
