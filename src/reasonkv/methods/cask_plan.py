"""CASK's second stage as pure functions: protected core, runs of scratch, greedy merging of neighbours.

Everything here is about the n candidates of one row, oldest first; no cache, no view, no model. Arithmetic is Python's
and NumPy's float64 on the host, so that a plan is the same on every device once the scores are.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reasonkv.methods.cask_groups import (
    LEAST_SUPPORT,
    Candidates,
    Folding,
    Group,
    Grouping,
    Operator,
    Representative,
    Rules,
)
from reasonkv.methods.cask_votes import Votes

__all__ = [
    "LEAST_SUPPORT",
    "Candidates",
    "Consolidation",
    "Folding",
    "Group",
    "Grouping",
    "Operator",
    "Representative",
    "Rules",
    "consolidate",
    "largest_core",
    "merge_neighbours",
]

_RELATIVE_ZERO = 1e-12  # floor under the norms a cosine is divided by


@dataclass(frozen=True)
class Consolidation:
    """What becomes of the candidates.

    Args:
        groups: ascending; single slots (the core among them) are groups of one. Candidates in none are evicted.
        core: protected candidates, ascending, promoted ones included.
        promoted: those of the core that were promoted from scratch.
        phases_relaxed: merging crossed phase boundaries, because the slots did not suffice otherwise.
        mass_relaxed: merging ignored the mass gate, because the slots did not suffice otherwise.
        feasible: False where no core size was; the best-scored candidates were kept then, and none folded.
    """

    groups: Grouping
    core: tuple[int, ...]
    promoted: tuple[int, ...] = ()
    phases_relaxed: bool = False
    mass_relaxed: bool = False
    feasible: bool = True


def largest_core(slots: int, candidates: int, rules: Rules) -> int:
    """The first core size to try, for `slots` output slots."""
    size = min(max(round(rules.core_ratio * slots), 0), slots, candidates)
    size = max(size, min(rules.core_least, candidates, slots - 1))
    return slots - 1 if candidates > size == slots else size


def consolidate(candidates: Candidates, votes: Votes, slots: int, rules: Rules) -> Consolidation:
    """Bring n candidates down to `slots` output slots (spec: core, runs, greedy merging, in this order of preference).

    Where all scratch has to be folded (`fold="neighbours"`), the core shrinks from its largest size until it fits; at
    each size phase boundaries are given up before the mass gate, and the mass gate before the core. With "similar" and
    "none" nothing has to give way: what is not folded is evicted, worst first.

    Args:
        candidates: n of them, more than `slots`.
        votes: of the same candidates.
        slots: at least 2.
        rules: how.

    """
    for size in range(largest_core(slots, candidates.size, rules), -1, -1):
        core = _core(candidates.scores, votes, size, rules)
        promoted = _promoted(candidates.scores, core, slots, rules)
        protected = np.zeros(candidates.size, dtype=bool)
        protected[core] = protected[promoted] = True
        scratch_slots = slots - int(protected.sum())
        if rules.fold == "none":
            return _evict(candidates, protected, promoted, scratch_slots)
        found = _merge(candidates, protected, scratch_slots, slots, rules)
        if found is not None:
            groups, phases_relaxed, mass_relaxed = found
            core_all = tuple(np.flatnonzero(protected).tolist())
            return Consolidation(groups, core_all, tuple(sorted(promoted)), phases_relaxed, mass_relaxed)
    best = np.sort(_best_first(candidates.scores)[:slots])
    return Consolidation(Grouping.alone(candidates, best), (), feasible=False)


def merge_neighbours(
    candidates: Candidates,
    is_core: NDArray[np.bool_],
    slots: int,
    rules: Rules,
    *,
    phases: bool,
    least_mass: float = float("inf"),
    drop_gate: bool = False,
) -> tuple[Grouping, bool] | None:
    """Merge neighbouring scratch, best pair first, until `slots` groups are left.

    A pair's order is (tier, similarity), of equals the older first. Tier 2: close (within `local_window` positions)
    and similar (at least `similarity`); 1: close; 0: the rest.

    A heap holds every adjacent pair; a merge makes at most two new ones and leaves outdated ones in the heap, where
    they are recognised by their versions: O(n log n) instead of a scan of all pairs per merge.

    With `fold="similar"` pairs below tier 2 do not merge; of the groups that are too many then, the worst-scored go.

    Args:
        candidates: the n candidates.
        is_core: bool [n], candidates that stay alone and end a run.
        slots: groups allowed for all scratch together.
        rules: operator, representative, tiers and value gate.
        phases: runs end where the phase changes.
        least_mass: pairs whose scores add up to more may not merge (the mass gate); infinite when off.
        drop_gate: when no pair is left that the mass gate allows, go on from there without it.

    Returns:
        The groups of the scratch, ascending, and whether the mass gate was dropped; None where that many cannot be
        reached.

    """
    n = candidates.size
    is_first = ~is_core  # of a group
    may_join = _joins(candidates, is_core, phases)  # of a candidate and the one before it
    may_evict = rules.fold == "similar"
    scratch = int(is_first.sum())
    if scratch - int(may_join.sum()) > slots and not may_evict:
        return None  # more runs than slots
    groups, joined = _Groups(candidates, rules), may_join.tolist()
    after = list(range(1, n + 1))  # first candidate of the group that follows, by the first of a group
    before = list(range(-1, n - 1))
    version = [0] * n  # of a group, by its first candidate; -1 once that is inside another group
    heap = groups.first_orders(may_join, least_mass)
    heapq.heapify(heap)

    def offer(left: int, right: int) -> None:
        order = groups.order(left, right, least_mass)
        if order is not None:
            heapq.heappush(heap, (-order[0], -order[1], left, version[left], version[right]))

    dropped = False
    surplus = scratch - slots
    while surplus > 0:
        if not heap:
            if may_evict:
                break
            if dropped or not drop_gate or least_mass == float("inf"):
                return None
            dropped, least_mass = True, float("inf")
            for right in range(1, n):
                if joined[right] and version[right] >= 0:
                    offer(before[right], right)
            if not heap:
                return None
        _, _, left, left_version, right_version = heapq.heappop(heap)
        right = after[left]
        if version[left] != left_version or right == n or version[right] != right_version:
            continue
        groups.merge(left, right)
        version[left] += 1
        version[right] = -1
        is_first[right] = False
        after[left] = after[right]
        surplus -= 1
        if after[left] < n:
            before[after[left]] = left
            if joined[after[left]]:
                offer(left, after[left])
        if joined[left]:
            offer(before[left], left)
    firsts = np.flatnonzero(is_first)
    if surplus > 0:
        firsts = np.sort(firsts[_best_first(np.array(groups.score)[firsts])[:slots]])
    return groups.grouping(firsts), dropped


class _Groups:
    """The growing groups, by their first candidate."""

    def __init__(self, candidates: Candidates, rules: Rules) -> None:
        self.rules, self.candidates = rules, candidates
        # Lists, because single entries are read and written, which arrays are slow at.
        self.score: list[float] = candidates.scores.tolist()
        self.support: list[float] = candidates.supports.tolist()
        self.score_mass = self.score.copy()
        self.count: list[int] = candidates.counts.tolist()
        self.start: list[int] = candidates.starts.tolist()
        self.end: list[int] = candidates.ends.tolist()
        self.anchor, self.last = list(range(candidates.size)), list(range(candidates.size))
        self.vector = candidates.vectors.copy()
        self.unit = _unit(self.vector)
        self.value = None if candidates.values is None else candidates.values.copy()
        # of every candidate and the one before it, worked out at once; of other pairs of anchors as they are met
        self.neighbours = np.zeros(candidates.size)
        (self.unit[:-1] * self.unit[1:]).sum(-1, out=self.neighbours[1:])
        self.similarity: dict[tuple[int, int], float] = {}

    def first_orders(self, joined: NDArray[np.bool_], least_mass: float) -> list[tuple[int, float, int, int, int]]:
        """What `order` says of every candidate and the one before it where they may join, while all are alone.

        As entries of the heap: (-tier, -similarity, left, 0, 0).
        """
        rules, known = self.rules, self.candidates
        right = np.flatnonzero(joined)
        if self.value is not None and rules.value_gate > 0.0:
            orders = [(i - 1, self.order(i - 1, i, least_mass)) for i in right.tolist()]
            return [(-order[0], -order[1], left, 0, 0) for left, order in orders if order is not None]
        left = right - 1
        similarity = self.neighbours[right]
        is_close = known.starts[right] - known.ends[left] <= rules.local_window
        tier = np.where(is_close, np.where(similarity >= rules.similarity, 2, 1), 0)
        allowed = ~(known.scores[left] + known.scores[right] > least_mass)
        if rules.fold == "similar":
            allowed &= tier == 2
        columns = ((-tier)[allowed].tolist(), (-similarity)[allowed].tolist(), left[allowed].tolist())
        return [(*entry, 0, 0) for entry in zip(*columns, strict=True)]

    def order(self, left: int, right: int, least_mass: float) -> tuple[int, float] | None:
        """(tier, similarity) of a pair, None where a gate forbids it."""
        rules = self.rules
        if self.score_mass[left] + self.score_mass[right] > least_mass:
            return None
        if self.value is not None and rules.value_gate > 0.0:
            difference = self.value[left] - self.value[right]
            if float(np.sqrt(np.dot(difference, difference))) > rules.value_gate:
                return None
        similarity = self._similarity(left, right)
        is_close = self.start[right] - self.end[left] <= rules.local_window
        tier = 0 if not is_close else 2 if similarity >= rules.similarity else 1
        return None if rules.fold == "similar" and tier < 2 else (tier, similarity)

    def _similarity(self, left: int, right: int) -> float:
        """Cosine of two groups' vectors. An anchor's does not change, and half of all pairs are met again."""
        if self.rules.representative == "weighted_latest":
            if self.last[left] == left == right - 1 and self.last[right] == right:
                return float(self.neighbours[right])
            return float(np.add.reduce(self.unit[left] * self.unit[right]))
        pair = one, other = self.anchor[left], self.anchor[right]
        found = self.similarity.get(pair)
        if found is None:
            are_neighbours = other - one == 1
            found = self.neighbours[other] if are_neighbours else np.add.reduce(self.unit[one] * self.unit[other])
            found = self.similarity[pair] = float(found)
        return found

    def merge(self, left: int, right: int) -> None:
        """Put the group `right` into the group `left` before it."""
        count_left, count_right = self.count[left], self.count[right]
        mass_left = count_left * max(self.support[left], LEAST_SUPPORT)
        mass_right = count_right * max(self.support[right], LEAST_SUPPORT)
        mass = mass_left + mass_right
        if self.value is not None:
            a, b = (mass_left, mass_right) if self.rules.operator == "keepkv" else (count_left, count_right)
            self.value[left] = (a * self.value[left] + b * self.value[right]) / (a + b)
        if self.rules.representative == "weighted_latest":
            self.vector[left] = (mass_left * self.vector[left] + mass_right * self.vector[right]) / mass
            self.unit[left] = _unit(self.vector[left])
        if self.score[right] >= self.score[left]:  # a tie goes to the later position
            self.anchor[left], self.score[left] = self.anchor[right], self.score[right]
        self.count[left] = count_left + count_right
        self.support[left] = mass / (count_left + count_right)
        self.score_mass[left] += self.score_mass[right]
        self.start[left] = min(self.start[left], self.start[right])
        self.end[left] = max(self.end[left], self.end[right])
        self.last[left] = self.last[right]

    def grouping(self, firsts: NDArray[np.int64]) -> Grouping:
        """The groups that start with `firsts`."""
        index = firsts.tolist()

        def of_firsts(numbers: list[Any], dtype: type) -> NDArray[Any]:
            return np.array([numbers[i] for i in index], dtype=dtype)

        last, anchor, count = (of_firsts(numbers, np.int64) for numbers in (self.last, self.anchor, self.count))
        return Grouping(firsts, last, anchor, count, of_firsts(self.support, float), of_firsts(self.score_mass, float))

    def group(self, first: int) -> Group:
        """One of them."""
        return self.grouping(np.asarray([first]))[0]


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.sqrt(np.square(vectors).sum(-1, keepdims=True))
    unit: NDArray[np.float64] = vectors / np.maximum(norms, _RELATIVE_ZERO)
    return unit


def _best_first(scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by falling score; of equals the earlier first."""
    best: NDArray[np.int64] = np.argsort(-scores, kind="stable")
    return best


def _core(scores: NDArray[np.float64], votes: Votes, size: int, rules: Rules) -> list[int]:
    if size == 0:
        return []
    if rules.core == "score":
        best: list[int] = _best_first(scores)[:size].tolist()
        return best
    order: list[int] = np.lexsort((-scores, -votes.count(size))).tolist()  # stable: of equals the earlier first
    return order[:size]


def _promoted(scores: NDArray[np.float64], core: list[int], slots: int, rules: Rules) -> list[int]:
    if rules.promotion == 0.0 or not core:
        return []
    least = rules.promotion * float(scores[core].min())
    chosen = set(core)
    worthy = [i for i in _best_first(scores).tolist() if i not in chosen and scores[i] >= least]
    return worthy[: max(0, slots - len(core) - 1)]


def _joins(candidates: Candidates, is_core: NDArray[np.bool_], phases: bool) -> NDArray[np.bool_]:
    """bool [n]: a candidate lies in the same run as the one before it."""
    joined = ~is_core
    joined[1:] &= ~is_core[:-1]
    joined[:1] = False
    if candidates.linked is not None:
        joined &= candidates.linked
    if phases:
        joined[1:] &= candidates.phases[1:] == candidates.phases[:-1]
    return joined


def _merge(
    candidates: Candidates, protected: NDArray[np.bool_], scratch_slots: int, slots: int, rules: Rules
) -> tuple[Grouping, bool, bool] | None:
    """Groups, phases relaxed, mass gate relaxed; None where the scratch does not fit."""
    gate = float("inf")
    if rules.mass_gate > 0.0:
        gate = rules.mass_gate * float(np.mean(np.sort(candidates.scores)[-slots:]))
    attempts = [True, False] if rules.phases else [False]
    for phases in attempts:
        merged = merge_neighbours(
            candidates, protected, scratch_slots, rules, phases=phases, least_mass=gate, drop_gate=not phases
        )
        if merged is not None:
            groups = merged[0].merged_with(Grouping.alone(candidates, np.flatnonzero(protected)))
            return groups, rules.phases and not phases, merged[1]
    return None


def _evict(
    candidates: Candidates, protected: NDArray[np.bool_], promoted: Sequence[int], scratch_slots: int
) -> Consolidation:
    """Keep the best-scored scratch and fold nothing."""
    best = _best_first(candidates.scores)
    kept = protected.copy()
    kept[best[~protected[best]][:scratch_slots]] = True
    core = tuple(np.flatnonzero(protected).tolist())
    return Consolidation(Grouping.alone(candidates, np.flatnonzero(kept)), core, tuple(sorted(promoted)))
