"""Selecting slots: exact, deterministic, ascending; pooling and window attention against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_views import random_view
from torch import Tensor

from reasonkv.methods import ops
from reasonkv.plan import PlanError
from reasonkv.view import SlotView

INF = float("inf")


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_top_k_keeps_the_best_slots_with_ties_to_the_newer(data: st.DataObject) -> None:
    B, H, N = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    values = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 3e38, INF])
    scores = torch.tensor(data.draw(st.lists(values, min_size=B * H * N, max_size=B * H * N))).view(B, H, N)
    flags = data.draw(st.lists(st.booleans(), min_size=B * H * N, max_size=B * H * N))
    forced = torch.tensor(flags).view(B, H, N)
    keep = data.draw(st.integers(int(forced.sum(-1).max()), N))
    kept = ops.top_k_slots(scores, keep, forced)
    assert (kept.dtype, kept.shape) == (torch.int64, (B, H, keep))
    for b in range(B):
        for h in range(H):
            order = sorted(
                range(N), key=lambda n: (bool(forced[b, h, n]), min(float(scores[b, h, n]), 3.4028235e38), n)
            )
            assert kept[b, h].tolist() == sorted(order[N - keep :])


def test_of_equal_scores_the_newest_slots_stay() -> None:
    assert ops.top_k_slots(torch.zeros(1, 1, 8), 3).tolist() == [[[5, 6, 7]]]


def test_an_infinite_score_never_displaces_a_forced_slot() -> None:
    forced = torch.tensor([[[True, False, False, False]]])
    assert ops.top_k_slots(torch.tensor([[[-INF, INF, INF, INF]]]), 2, forced).tolist() == [[[0, 3]]]


@pytest.mark.parametrize(
    ("scores", "keep", "forced", "message"),
    [
        ([1.0, float("nan"), 0.0], 2, None, "A score is NaN, so the slots have no order."),
        ([1.0, 2.0, 0.0], 1, [True, True, False], "2 slots are forced, but only 1 may stay."),
        ([1.0, 2.0, 0.0], 4, None, "Cannot keep 4 of 3 slots."),
    ],
)
def test_what_has_no_answer_is_one_sentence(
    scores: list[float], keep: int, forced: list[bool] | None, message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        ops.top_k_slots(torch.tensor([[scores]]), keep, None if forced is None else torch.tensor([[forced]]))
    assert str(caught.value) == message


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_pooling_looks_at_neighbouring_slots_only(kernel: int) -> None:
    x = torch.randn(2, 3, 4, 11, generator=torch.Generator().manual_seed(0))
    half = kernel // 2
    windows = [x[..., max(0, n - half) : n + half + 1] for n in range(11)]
    average = torch.stack([window.sum(-1) / kernel for window in windows], dim=-1)
    maximum = torch.stack([window.amax(-1) for window in windows], dim=-1)
    torch.testing.assert_close(ops.average_pool(x, kernel), average)
    assert torch.equal(ops.max_pool(x, kernel), maximum)


def test_largest_gives_ties_to_the_later_entry_and_counts_per_row() -> None:
    scores = torch.tensor([[1.0, 2, 2, 2, 0], [5, 5, 5, 5, 5], [1, 2, 3, 4, 5]])[:, None]
    for most in (3, None):
        chosen = ops.largest(scores, torch.tensor([2, 3, 0])[:, None, None], most)
        assert chosen[:, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]


def test_ranks_count_from_the_smallest_and_a_later_equal_is_higher() -> None:
    assert ops.ranks(torch.tensor([[3.0, 1, 3, 2], [0, 0, 0, 0]])).tolist() == [[2, 0, 3, 1], [0, 1, 2, 3]]


def attention_by_definition(view: SlotView, over: str, merge: bool) -> torch.Tensor:
    """One softmax per query head and query, from explicit sums, in float64."""
    queries, keys = view.queries_BHgTD().double(), view.keys_BHND.double()
    logits = torch.einsum("bhgtd,bhnd->bhgtn", queries, keys) * view.scaling
    if merge:
        logits = logits.amax(2, keepdim=True)
    assert view.query_positions_BT is not None
    if over == "old":
        logits = logits[..., : keys.shape[2] - queries.shape[3]]
    else:
        later = view.positions_BHN[:, :, None, None] > view.query_positions_BT[:, None, None, :, None]
        logits = logits.masked_fill(later, -INF)
    return logits.softmax(-1).mean(3)


@pytest.mark.parametrize("over", ["all", "old"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("shape", "group", "queries"), [((2, 3, 40, 8), 2, 8), ((1, 2, 700, 16), 4, 64), ((1, 1, 9, 4), 1, 1)]
)
def test_window_attention_is_the_mean_softmax_of_the_recent_queries(
    over: str, merge: bool, shape: tuple[int, int, int, int], group: int, queries: int
) -> None:
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        view = random_view(*shape, group=group, queries=queries, dtype=dtype)
        got = ops.window_attention(view, over=over, merge_logits=merge)  # type: ignore[arg-type]
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = attention_by_definition(view, over, merge)
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("merge_logits", [False, True])
def test_window_attention_leaves_out_slots_of_no_mass(merge_logits: bool) -> None:
    view = random_view(1, 1, 40, queries=6, recent=6)
    live = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.arange(3, 33, 4), False)
    mass_BHN = torch.zeros(1, 1, 40).masked_fill(~live, float("-inf"))
    of_slots = {
        name: value[:, :, live]
        for name, value in view.__dict__.items()
        if name.endswith(("_BHN", "_BHND")) and isinstance(value, Tensor)
    }
    found = ops.window_attention(replace(view, state={"log_mass": mass_BHN}), merge_logits=merge_logits)
    assert bool((found[..., ~live] == 0).all())
    torch.testing.assert_close(
        found[..., live], ops.window_attention(replace(view, **of_slots), merge_logits=merge_logits)
    )
