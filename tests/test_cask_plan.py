"""CASK's second stage against a slow merging written from the paper: every pair is looked at again after every merge."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonkv.methods import get_method
from reasonkv.methods.cask import CASK, Row

CLOSE = 32  # positions


def row_of(n: int, **changes: Any) -> Row:
    """Candidates of one row, all alike unless changed."""
    index = np.arange(n)
    values: dict[str, Any] = {
        "scores_MN": torch.zeros(1, n), "counts_N": np.ones(n, dtype=np.int64), "starts_N": index, "ends_N": index,
        "phases_N": np.zeros(n, dtype=np.int64), "protected_N": np.zeros(n, dtype=bool), "vectors_ND": np.ones((n, 2)),
    }  # fmt: skip
    return Row(**{**values, **changes})


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """0 for a vector of zeros; equal fractions give equal floats here, because test vectors are small integers."""
    size = float(np.sqrt((a * a).sum())), float(np.sqrt((b * b).sum()))
    return 0.0 if 0.0 in size else float(((a / size[0]) * (b / size[1])).sum())


def merged_slowly(
    row: Row, scores: list[float], linked: list[bool], is_core: list[bool], phases: list[int], slots: int,
    similarity: float, evicts: bool,
) -> list[int] | None:  # fmt: skip
    """What continues each candidate (-1: evicted): groups are lists of candidates, compared by their best one."""
    n = len(scores)
    groups = [[i] for i in range(n) if not is_core[i]]

    def best(group: list[int]) -> int:
        return max(group, key=lambda i: (scores[i], i))  # of equals the latest

    def order(left: list[int], right: list[int]) -> tuple[int, float] | None:
        last, first = left[-1], right[0]
        if first != last + 1 or not linked[first] or phases[first] != phases[last]:
            return None
        alike = cosine(row.vectors_ND[best(left)], row.vectors_ND[best(right)])
        gap = min(row.starts_N[i] for i in right) - max(row.ends_N[i] for i in left)
        tier = 0 if gap > CLOSE else 2 if alike >= similarity else 1
        return None if evicts and tier < 2 else (tier, alike)

    while len(groups) > slots:
        orders = [order(left, right) for left, right in pairwise(groups)]
        possible = [i for i, one in enumerate(orders) if one is not None]
        if not possible:
            if not evicts:
                return None
            groups = sorted(groups, key=lambda group: (-max(scores[i] for i in group), group[0]))[:slots]
            break
        place = max(possible, key=lambda i: (orders[i], -i))  # of equals the oldest
        groups[place : place + 2] = [groups[place] + groups[place + 1]]
    target = [i if is_core[i] else -1 for i in range(n)]
    for group in groups:
        for i in group:
            target[i] = best(group)
    return target


@st.composite
def situations(draw: st.DrawFn) -> tuple[Row, np.ndarray, np.ndarray, np.ndarray, int]:
    """Candidates, their scores, which follow their neighbour directly, which are core, and slots for the others."""
    n = draw(st.integers(2, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    counts = random.integers(1, 4, n)
    ends = np.cumsum(counts + random.integers(0, 40, n)) - 1
    vectors = random.integers(-levels, levels + 1, (n, 3)).astype(float)
    if draw(st.booleans()):
        vectors[:] = vectors[random.integers(0, max(1, n // 3), n)]
    scores = random.integers(-levels, levels + 1, n) / levels
    row = row_of(
        n, scores_MN=torch.from_numpy(np.stack([scores, -scores])), counts_N=counts, starts_N=ends - counts + 1,
        ends_N=ends, phases_N=np.cumsum(random.random(n) < 0.15), vectors_ND=vectors,
    )  # fmt: skip
    linked = np.concatenate([[False], random.random(n - 1) < 0.95])
    is_core = random.random(n) < draw(st.sampled_from([0.0, 0.3]))
    return row, scores, linked, is_core, draw(st.integers(1, n))


@settings(max_examples=200, deadline=None)
@given(situations(), st.booleans(), st.sampled_from(["similar", "neighbours"]), st.sampled_from([0.5, 0.985]))
def test_runs_merge_exactly_as_they_do_pair_by_pair(
    situation: tuple[Row, np.ndarray, np.ndarray, np.ndarray, int], by_phase: bool, fold: str, similarity: float
) -> None:
    row, scores, linked, is_core, slots = situation
    phases = row.phases_N if by_phase else np.zeros_like(row.phases_N)
    method = cask(f"fold={fold},similarity={similarity}")
    found = method.merge_runs(row, scores, linked, is_core, phases, slots)
    wanted = merged_slowly(
        row, scores.tolist(), linked.tolist(), is_core.tolist(), phases.tolist(), slots, similarity, fold == "similar"
    )
    assert (None if found is None else found.tolist()) == wanted


@settings(max_examples=150, deadline=None)
@given(situations(), st.sampled_from(["similar", "neighbours", "none"]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_every_outcome_fills_its_slots_and_covers_each_candidate_once(
    situation: tuple[Row, np.ndarray, np.ndarray, np.ndarray, int], fold: str, core_ratio: float
) -> None:
    row, scores, linked, _, slots = situation
    if not 2 <= slots < len(scores):
        return
    found = cask(f"fold={fold},core_ratio={core_ratio}").decode_stage(row, scores, linked, slots)
    if found is None:
        assert fold == "neighbours"  # elsewhere what is worth least goes, so nothing has to give way
        return
    target, is_core = found
    going_on = np.unique(target[target >= 0])
    assert len(going_on) == slots
    assert all(target[slot] == slot for slot in going_on)
    assert set(np.flatnonzero(is_core)) <= set(going_on)
    for slot in going_on:
        members = np.flatnonzero(target == slot)
        assert members.tolist() == list(range(members[0], members[-1] + 1))
        assert scores[members].max() == scores[slot]
        assert len(members) == 1 or not is_core[members].any()
    if fold == "neighbours":
        assert (target >= 0).all()


def cask(options: str) -> CASK:
    method = get_method(f"cask:{options}")
    assert isinstance(method, CASK)
    return method


def groups(row: Row, slots: int, scores: np.ndarray | None = None, fold: str = "neighbours") -> list[tuple[int, int]]:
    n = len(row.starts_N)
    scores = np.zeros(n) if scores is None else scores
    linked = np.arange(n) > 0
    target = cask(f"fold={fold}").merge_runs(row, scores, linked, np.zeros(n, dtype=bool), row.phases_N, slots)
    assert target is not None
    members = [np.flatnonzero(target == slot) for slot in np.unique(target[target >= 0])]
    return [(int(own[0]), int(own[-1])) for own in members]


def vectors(*angles: float) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def test_of_equal_pairs_the_oldest_merges_first() -> None:
    assert groups(row_of(5), 3) == [(0, 2), (3, 3), (4, 4)]


def test_closeness_goes_before_similarity_and_similarity_before_age() -> None:
    own, far = vectors(0.0, 0.6, 0.6, 1.1), np.array([0, 1, 100, 101])
    assert groups(row_of(4, vectors_ND=own), 3) == [(0, 0), (1, 2), (3, 3)]
    assert groups(row_of(4, vectors_ND=own, starts_N=far, ends_N=far), 3) == [(0, 0), (1, 1), (2, 3)]


def test_unlike_neighbours_are_evicted_instead_where_only_similar_ones_merge() -> None:
    row, scores = row_of(5, vectors_ND=vectors(0.0, 0.01, 0.6, 1.2, 1.21)), np.array([1.0, 2.0, 5.0, 0.5, 0.0])
    assert groups(row, 3, scores, "similar") == [(0, 1), (2, 2), (3, 4)]
    assert groups(row, 2, scores, "similar") == [(0, 1), (2, 2)]


def test_a_phase_boundary_holds_while_the_slots_suffice_and_gives_way_before_the_core() -> None:
    phases, scores = np.array([0, 0, 0, 1, 1, 1, 2, 2]), np.arange(8.0)
    row = row_of(8, phases_N=phases, scores_MN=torch.arange(8.0)[None])
    method, linked = cask("fold=neighbours,core_ratio=0.25"), np.arange(8) > 0
    kept = method.decode_stage(row, scores, linked, 4)
    assert kept is not None
    assert kept[0].tolist() == [2, 2, 2, 5, 5, 5, 6, 7]
    relaxed = method.decode_stage(row, scores, linked, 3)
    assert relaxed is not None
    assert relaxed[1].tolist() == [False] * 7 + [True]
    assert len(np.unique(relaxed[0])) == 3


def test_without_any_way_to_merge_nothing_fits() -> None:
    """Protected slots between all candidates leave no neighbours."""
    row = row_of(6, scores_MN=torch.arange(6.0)[None])
    assert cask("fold=neighbours").decode_stage(row, np.arange(6.0), np.zeros(6, dtype=bool), 3) is None


@pytest.mark.parametrize("size", [0, 1, 2, 5, 6])
def test_the_core_is_what_most_heads_have_among_their_best_and_of_equals_the_older(size: int) -> None:
    matrix = np.array([[1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    votes = [0] * 6
    for row in matrix.tolist():
        for i in sorted(range(6), key=lambda i, row=row: (-row[i], i))[:size]:  # type: ignore[misc]
            votes[i] += 1
    scores = matrix.max(0)
    wanted = sorted(range(6), key=lambda i: (-votes[i], -scores[i], i))[:size]
    assert np.flatnonzero(cask("").core(matrix, scores, size, 6)).tolist() == sorted(wanted)


@pytest.mark.parametrize(
    ("core_ratio", "slots", "size"),
    [(0.5, 28, 14), (0.5, 2, 1), (0.5, 5, 2), (1.0, 4, 3), (0.01, 4, 1), (0.0, 4, 0)],  # halves go to the even number
)
def test_the_core_leaves_scratch_a_slot(core_ratio: float, slots: int, size: int) -> None:
    row = row_of(74, scores_MN=torch.arange(74.0)[None])
    found = cask(f"core_ratio={core_ratio}").decode_stage(row, np.arange(74.0), np.arange(74) > 0, slots)
    assert found is not None
    assert found[1].sum() == size
