"""CASK's second stage as pure functions: protected core, runs of scratch, greedy merging of neighbours.

Everything here is about the n candidates of one row, oldest first; no cache, no view, no model. Arithmetic is Python's
and NumPy's float64 on the host, so that a plan is the same on every device once the scores are.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from reasonkv.methods.cask_votes import Votes

Representative = Literal["score_max_source", "weighted_latest"]
Operator = Literal["mean", "keepkv"]
Folding = Literal["similar", "neighbours", "none"]
LEAST_SUPPORT = 1e-4
"""Floor under a slot's support wherever it weighs something."""
_RELATIVE_ZERO = 1e-12  # floor under the norms a cosine is divided by


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

    groups: tuple[Group, ...]
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
    best = sorted(_best_first(candidates.scores)[:slots])
    return Consolidation(tuple(single(candidates, i) for i in best), (), feasible=False)


def merge_neighbours(
    candidates: Candidates,
    is_core: NDArray[np.bool_],
    slots: int,
    rules: Rules,
    *,
    phases: bool,
    least_mass: float = float("inf"),
    drop_gate: bool = False,
) -> tuple[list[Group], bool] | None:
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
    scratch = np.flatnonzero(~is_core)
    joined = _joins(candidates, is_core, phases).tolist()  # joined[i]: candidate i may merge with i - 1
    may_evict = rules.fold == "similar"
    if len(scratch) - sum(joined) > slots and not may_evict:
        return None  # more runs than slots
    groups = _Groups(candidates, rules)
    after = list(range(1, n + 1))  # first candidate of the group that follows, by the first of a group
    before = list(range(-1, n - 1))
    version = [0] * n  # of a group, by its first candidate; -1 once that is inside another group
    heap: list[tuple[int, float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        order = groups.order(left, right, least_mass)
        if order is not None:
            heapq.heappush(heap, (-order[0], -order[1], left, version[left], version[right]))

    def offer_all() -> None:
        for right in range(1, n):
            if joined[right] and version[right] >= 0:
                offer(before[right], right)

    offer_all()
    dropped = False
    surplus = len(scratch) - slots
    while surplus > 0:
        if not heap:
            if may_evict:
                break
            if dropped or not drop_gate or least_mass == float("inf"):
                return None
            dropped, least_mass = True, float("inf")
            offer_all()
            if not heap:
                return None
        _, _, left, left_version, right_version = heapq.heappop(heap)
        right = after[left]
        if version[left] != left_version or right == n or version[right] != right_version:
            continue
        groups.merge(left, right)
        version[left] += 1
        version[right] = -1
        after[left] = after[right]
        surplus -= 1
        if after[left] < n:
            before[after[left]] = left
            if joined[after[left]]:
                offer(left, after[left])
        if joined[left]:
            offer(before[left], left)
    firsts = [first for first in scratch.tolist() if version[first] >= 0]
    if surplus > 0:
        firsts = sorted(sorted(firsts, key=lambda first: -groups.score[first])[:slots])
    return [groups.group(first) for first in firsts], dropped


def single(candidates: Candidates, index: int) -> Group:
    """A candidate that stays alone."""
    score, support = float(candidates.scores[index]), float(candidates.supports[index])
    return Group(index, index, index, int(candidates.counts[index]), support, score)


class _Groups:
    """The growing groups, by their first candidate."""

    def __init__(self, candidates: Candidates, rules: Rules) -> None:
        self.rules = rules
        self.score = candidates.scores.tolist()
        self.score_mass = list(self.score)
        self.support = candidates.supports.tolist()
        self.count = candidates.counts.tolist()
        self.start, self.end = candidates.starts.tolist(), candidates.ends.tolist()
        self.anchor = list(range(candidates.size))
        self.last = list(range(candidates.size))
        self.vector = candidates.vectors.copy()
        self.unit = _unit(self.vector)
        # of every candidate and the one before it, worked out at once while both are alone
        self.similarity = [0.0, *(self.unit[:-1] * self.unit[1:]).sum(-1).tolist()]
        self.value = None if candidates.values is None else candidates.values.copy()

    def order(self, left: int, right: int, least_mass: float) -> tuple[int, float] | None:
        """(tier, similarity) of a pair, None where a gate forbids it."""
        rules = self.rules
        if self.score_mass[left] + self.score_mass[right] > least_mass:
            return None
        if self.value is not None and rules.value_gate > 0.0:
            difference = self.value[left] - self.value[right]
            if float(np.sqrt(np.dot(difference, difference))) > rules.value_gate:
                return None
        if self.last[left] == left == right - 1 and self.last[right] == right:
            similarity = self.similarity[right]
        else:
            similarity = float((self.unit[left] * self.unit[right]).sum())
        gap = max(0, self.start[right] - self.end[left])
        tier = 0 if gap > rules.local_window else 2 if similarity >= rules.similarity else 1
        return None if rules.fold == "similar" and tier < 2 else (tier, similarity)

    def merge(self, left: int, right: int) -> None:
        """Put the group `right` into the group `left` before it."""
        count_left, count_right = self.count[left], self.count[right]
        mass_left = count_left * max(self.support[left], LEAST_SUPPORT)
        mass_right = count_right * max(self.support[right], LEAST_SUPPORT)
        mass = mass_left + mass_right
        if self.value is not None:
            a, b = (mass_left, mass_right) if self.rules.operator == "keepkv" else (count_left, count_right)
            self.value[left] = (a * self.value[left] + b * self.value[right]) / (a + b)
        right_wins = self.score[right] >= self.score[left]  # a tie goes to the later position
        if self.rules.representative == "weighted_latest":
            self.vector[left] = (mass_left * self.vector[left] + mass_right * self.vector[right]) / mass
            self.unit[left] = _unit(self.vector[left])
        elif right_wins:
            self.unit[left] = self.unit[right]
        if right_wins:
            self.anchor[left], self.score[left] = self.anchor[right], self.score[right]
        self.count[left] = count_left + count_right
        self.support[left] = mass / (count_left + count_right)
        self.score_mass[left] += self.score_mass[right]
        self.start[left] = min(self.start[left], self.start[right])
        self.end[left] = max(self.end[left], self.end[right])
        self.last[left] = self.last[right]

    def group(self, first: int) -> Group:
        return Group(
            first, self.last[first], self.anchor[first], self.count[first], self.support[first], self.score_mass[first]
        )


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.sqrt(np.square(vectors).sum(-1, keepdims=True))
    unit: NDArray[np.float64] = vectors / np.maximum(norms, _RELATIVE_ZERO)
    return unit


def _best_first(scores: NDArray[np.float64]) -> list[int]:
    """Indices by falling score; of equals the earlier first."""
    best: list[int] = np.argsort(-scores, kind="stable").tolist()
    return best


def _core(scores: NDArray[np.float64], votes: Votes, size: int, rules: Rules) -> list[int]:
    if size == 0:
        return []
    if rules.core == "score":
        return _best_first(scores)[:size]
    order: list[int] = np.lexsort((-scores, -votes.count(size))).tolist()  # stable: of equals the earlier first
    return order[:size]


def _promoted(scores: NDArray[np.float64], core: list[int], slots: int, rules: Rules) -> list[int]:
    if rules.promotion == 0.0 or not core:
        return []
    least = rules.promotion * float(scores[core].min())
    chosen = set(core)
    worthy = [i for i in _best_first(scores) if i not in chosen and scores[i] >= least]
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
) -> tuple[tuple[Group, ...], bool, bool] | None:
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
            alone = [single(candidates, i) for i in np.flatnonzero(protected).tolist()]
            groups = tuple(sorted([*merged[0], *alone], key=lambda group: group.first))
            return groups, rules.phases and not phases, merged[1]
    return None


def _evict(
    candidates: Candidates, protected: NDArray[np.bool_], promoted: Sequence[int], scratch_slots: int
) -> Consolidation:
    """Keep the best-scored scratch and fold nothing."""
    scratch = [i for i in _best_first(candidates.scores) if not protected[i]][:scratch_slots]
    core = np.flatnonzero(protected).tolist()
    kept = sorted([*core, *scratch])
    return Consolidation(tuple(single(candidates, i) for i in kept), tuple(core), tuple(sorted(promoted)))
