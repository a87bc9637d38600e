"""CASK's second stage: the heap gives what a full rescan gives, and every plan fits."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonkv.methods.cask_plan import (
    Candidates,
    Folding,
    Group,
    Rules,
    _Groups,
    _joins,
    consolidate,
    largest_core,
    merge_neighbours,
)
from reasonkv.methods.cask_votes import Votes


def rescan(
    candidates: Candidates, is_core: np.ndarray, slots: int, rules: Rules, *, phases: bool, limit: float, drop: bool
) -> tuple[list[Group], bool] | None:
    """The reference's way: look at all adjacent pairs again after every merge; the first of the best wins."""
    joined, groups = _joins(candidates, is_core, phases), _Groups(candidates, rules)
    firsts = np.flatnonzero(~is_core).tolist()
    similar = rules.fold == "similar"
    if len(firsts) - int(joined.sum()) > slots and not similar:
        return None
    dropped = False
    while len(firsts) > slots:
        best, chosen = None, None
        for left, right in pairwise(firsts):
            if not joined[right] or groups.last[left] + 1 != right:
                continue
            order = groups.order(left, right, limit)
            if order is not None and (best is None or order > best):
                best, chosen = order, (left, right)
        if chosen is None:
            if similar:  # the worst of what is left go
                best_first = sorted(firsts, key=lambda first: (-groups.score[first], first))
                return [groups.group(first) for first in sorted(best_first[:slots])], dropped
            if dropped or not drop or limit == float("inf"):
                return None
            dropped, limit = True, float("inf")
            continue
        groups.merge(*chosen)
        firsts.remove(chosen[1])
    return [groups.group(first) for first in firsts], dropped


@st.composite
def situations(draw: st.DrawFn) -> tuple[Candidates, np.ndarray, int, Rules]:
    n = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    counts = random.integers(1, 4, n)
    steps = random.integers(0, 20, n)
    ends = np.cumsum(counts + steps) - 1
    vectors = random.integers(-levels, levels + 1, (n, 3)).astype(float)
    if draw(st.booleans()):
        vectors[:] = vectors[random.integers(0, max(1, n // 3), n)]
    scores = random.integers(-levels, levels + 1, n) / levels
    candidates = Candidates(
        scores=scores,
        supports=np.log1p(np.exp(scores)) + 1e-4,
        counts=counts,
        starts=ends - counts + 1,
        ends=ends,
        phases=np.cumsum(random.random(n) < 0.15),
        vectors=vectors,
        values=random.standard_normal((n, 2)) if draw(st.booleans()) else None,
        linked=np.concatenate([[False], random.random(n - 1) < 0.95]),
    )
    rules = Rules(
        core=draw(st.sampled_from(["vote", "score"])),
        core_ratio=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        promotion=draw(st.sampled_from([0.0, 0.5])),
        operator=draw(st.sampled_from(["mean", "keepkv"])),
        representative=draw(st.sampled_from(["score_max_source", "weighted_latest"])),
        local_window=draw(st.sampled_from([4, 32])),
        similarity=draw(st.sampled_from([0.5, 0.985])),
        value_gate=draw(st.sampled_from([0.0, 1.0])),
        mass_gate=draw(st.sampled_from([0.0, 1.5])),
        phases=draw(st.booleans()),
        fold=draw(st.sampled_from(["neighbours", "similar"])),
    )
    return candidates, random.random(n) < draw(st.sampled_from([0.0, 0.3])), draw(st.integers(1, n)), rules


@settings(max_examples=150, deadline=None)
@given(situations(), st.booleans(), st.booleans())
def test_the_heap_merges_exactly_what_a_full_rescan_merges(
    situation: tuple[Candidates, np.ndarray, int, Rules], phases: bool, drop: bool
) -> None:
    candidates, is_core, slots, rules = situation
    limit = 0.8 if rules.mass_gate else float("inf")
    fast = merge_neighbours(candidates, is_core, slots, rules, phases=phases, least_mass=limit, drop_gate=drop)
    assert fast == rescan(candidates, is_core, slots, rules, phases=phases, limit=limit, drop=drop)


@settings(max_examples=150, deadline=None)
@given(situations(), st.sampled_from(get_args(Folding)))
def test_every_consolidation_fills_its_slots_and_covers_each_candidate_once(
    situation: tuple[Candidates, np.ndarray, int, Rules], fold: Folding
) -> None:
    candidates, _, slots, rules = situation
    if not 2 <= slots < candidates.size:
        return
    rules = Rules(**{**rules.__dict__, "fold": fold})
    matrix = torch.from_numpy(np.stack([candidates.scores, -candidates.scores]))
    found = consolidate(candidates, Votes(matrix), slots, rules)
    members = [i for group in found.groups for i in range(group.first, group.last + 1)]
    assert len(found.groups) == slots
    assert members == sorted(set(members))
    assert all(group.first <= group.anchor <= group.last for group in found.groups)
    assert {group.first for group in found.groups if group.first == group.last} >= set(found.core)
    if fold == "neighbours" and found.feasible:
        assert members == list(range(candidates.size))
        assert sum(group.count for group in found.groups) == candidates.counts.sum()
    if fold != "neighbours":  # what is worth least goes, so nothing has to give way
        assert found.feasible
        assert not found.phases_relaxed
        assert not found.mass_relaxed


def simple(n: int, **changes: object) -> Candidates:
    values: dict[str, object] = {
        "scores": np.zeros(n),
        "supports": np.ones(n),
        "counts": np.ones(n, dtype=np.int64),
        "starts": np.arange(n),
        "ends": np.arange(n),
        "phases": np.zeros(n, dtype=np.int64),
        "vectors": np.ones((n, 2)),
    }
    return Candidates(**{**values, **changes})  # type: ignore[arg-type]


def merged(candidates: Candidates, slots: int, rules: Rules, phases: bool = True) -> list[tuple[int, int]]:
    found = merge_neighbours(candidates, np.zeros(candidates.size, dtype=bool), slots, rules, phases=phases)
    assert found is not None
    return [(group.first, group.last) for group in found[0]]


def test_of_equal_pairs_the_oldest_merges_first() -> None:
    assert merged(simple(5), 3, Rules()) == [(0, 2), (3, 3), (4, 4)]


def test_closeness_goes_before_similarity_and_similarity_before_age() -> None:
    angles = np.array([0.0, 0.6, 0.6, 1.1])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    far = np.array([0, 1, 100, 101])
    assert merged(simple(4, vectors=vectors), 3, Rules()) == [(0, 0), (1, 2), (3, 3)]
    assert merged(simple(4, vectors=vectors, starts=far, ends=far), 3, Rules()) == [(0, 0), (1, 1), (2, 3)]


def test_unlike_neighbours_are_evicted_instead_where_only_similar_ones_fold() -> None:
    angles = np.array([0.0, 0.01, 0.6, 1.2, 1.21])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    scores = np.array([1.0, 2.0, 5.0, 0.5, 0.0])
    rules = Rules(fold="similar")
    assert merged(simple(5, vectors=vectors, scores=scores), 3, rules) == [(0, 1), (2, 2), (3, 4)]
    assert merged(simple(5, vectors=vectors, scores=scores), 2, rules) == [(0, 1), (2, 2)]


def test_the_anchor_is_the_best_source_and_of_equals_the_latest() -> None:
    scores = np.array([1.0, 3.0, 3.0, 2.0])
    found = merge_neighbours(simple(4, scores=scores), np.zeros(4, dtype=bool), 1, Rules(), phases=True)
    assert found is not None
    assert found[0][0].anchor == 2


def test_a_phase_boundary_holds_while_the_slots_suffice_and_gives_way_before_the_core() -> None:
    phases = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    votes = Votes(torch.arange(8.0)[None])
    rules = Rules(core_ratio=0.25)
    kept = consolidate(simple(8, phases=phases, scores=np.arange(8.0)), votes, 4, rules)
    assert not kept.phases_relaxed
    assert [(g.first, g.last) for g in kept.groups] == [(0, 2), (3, 5), (6, 6), (7, 7)]
    relaxed = consolidate(simple(8, phases=phases, scores=np.arange(8.0)), votes, 3, rules)
    assert relaxed.phases_relaxed
    assert relaxed.core == (7,)


def test_without_any_allowed_pair_the_best_stay_and_nothing_is_folded() -> None:
    values = 10.0 * np.eye(6)
    found = consolidate(
        simple(6, values=values, scores=np.arange(6.0)), Votes(torch.arange(6.0)[None]), 3, Rules(value_gate=1.0)
    )
    assert not found.feasible
    assert [group.first for group in found.groups] == [3, 4, 5]


@pytest.mark.parametrize("best", [0, 1, 2, 5, 6])
def test_a_heads_votes_go_to_its_best_and_of_equals_to_the_older(best: int) -> None:
    matrix = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    wanted = np.zeros(6, dtype=int)
    for row in matrix.tolist():
        for i in sorted(range(6), key=lambda i, row=row: (-row[i], i))[:best]:  # type: ignore[misc]
            wanted[i] += 1
    assert Votes(matrix).count(best).tolist() == wanted.tolist()


def test_the_largest_core_leaves_scratch_a_slot() -> None:
    assert largest_core(28, 100, Rules()) == 14
    assert largest_core(2, 74, Rules()) == 1
    assert largest_core(5, 74, Rules()) == 2  # halves are rounded to even, as Python does
    assert largest_core(4, 50, Rules(core_ratio=1.0)) == 3
    assert largest_core(4, 50, Rules(core_ratio=0.0)) == 1
    assert largest_core(4, 50, Rules(core_ratio=0.0, core_least=0)) == 0
