"""Plans are checked, carried out in place, and folds keep their sums."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model

from reasonkv import Budget, CompressedCache, Merge, Method, Plan, Requirements, SlotView, UnsupportedModelError
from reasonkv.compaction import compact_pair, gather_slots, merge_counts, merge_slots, merge_state
from reasonkv.methods.ops import top_k_slots
from reasonkv.plan import PlanError
from reasonkv.rotary import Rotary


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 20), st.data())
def test_gathered_slots_are_the_kept_ones(batch_size: int, heads: int, slots: int, data: st.DataObject) -> None:
    allocated = slots + data.draw(st.integers(0, 5))
    rows = data.draw(st.lists(st.integers(0, batch_size - 1), min_size=1, max_size=batch_size, unique=True))
    keep = data.draw(st.integers(1, slots))
    buffer = torch.randn(batch_size, heads, allocated, 3)
    kept = torch.stack([torch.stack([torch.randperm(slots)[:keep].sort().values for _ in range(heads)]) for _ in rows])
    expected = buffer[rows].gather(2, kept[..., None].expand(-1, -1, -1, 3))
    assert torch.equal(gather_slots(buffer, rows, kept), expected)


def test_a_fold_is_the_weighted_sum_of_its_group_and_one_hot_weights_copy_bits() -> None:
    keys = torch.randn(1, 2, 6, 4, dtype=torch.bfloat16)
    into = torch.tensor([[[0, 1, 0, -1, 1, 2], [0, 0, 0, 1, 2, -1]]])
    one_hot = torch.tensor([[[0.0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]]])
    fold = Merge(into, one_hot, one_hot)
    kept = torch.tensor([[[0, 1, 5], [0, 3, 4]]])

    def folded(source: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return merge_slots(gather_slots(source, [0], kept), source, [0], weights, Plan(kept, fold))

    out = folded(keys, one_hot)
    assert torch.equal(out[0, 0], keys[0, 0, [2, 1, 5]])
    assert torch.equal(out[0, 1], keys[0, 1, [0, 3, 4]])
    half = torch.full((1, 2, 6), 0.5)
    mean = folded(keys.double(), half)
    torch.testing.assert_close(mean[0, 0, 0], (keys[0, 0, 0].double() + keys[0, 0, 2].double()) / 2)
    counts = merge_counts(torch.tensor([[[1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1, 1]]]), fold, 3)
    assert counts.tolist() == [[[4, 7, 6], [3, 1, 1]]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 14), st.data())
def test_folds_equal_sums_written_out(rows: int, heads: int, slots: int, data: st.DataObject) -> None:
    """Any groups and weights, some rows of a larger batch, keys turned to the kept slot's position."""
    batch_size, keep = rows + 1, data.draw(st.integers(1, slots))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    chosen = torch.randperm(batch_size)[:rows].tolist()
    keys, values = torch.randn(2, batch_size, heads, slots + 2, 4, dtype=torch.float64)
    positions = torch.stack([torch.randperm(50)[:slots].sort().values for _ in range(rows * heads)])
    positions = positions.view(rows, heads, slots)
    kept = torch.stack([torch.randperm(slots)[:keep].sort().values for _ in range(rows * heads)]).view(rows, heads, -1)
    into = torch.randint(-1, keep, (rows, heads, slots)).scatter(2, kept, torch.arange(keep).expand(rows, heads, -1))
    weights = torch.rand(2, rows, heads, slots)
    weights[0] = torch.where(torch.rand(rows, heads, slots) < 0.5, weights[0].round(), weights[0])
    rotary = Rotary(torch.tensor([1.0, 0.3]))
    plan = Plan(kept, Merge(into, weights[0], weights[1], rotary))
    state = torch.rand(rows, heads, slots)
    new_keys, new_values = compact_pair(keys, values, chosen, plan, positions)
    for place, row in enumerate(chosen):
        for head in range(heads):
            for slot in range(keep):
                members = [n for n in range(slots) if into[place, head, n] == slot]
                home = positions[place, head, kept[place, head, slot]]
                turned = [rotary.rerotate(keys[row, head, n], positions[place, head, n], home) for n in members]
                expected = sum(weights[0, place, head, n] * key for n, key in zip(members, turned, strict=True))
                torch.testing.assert_close(new_keys[place, head, slot], expected, rtol=1e-12, atol=1e-12)
                expected = sum(weights[1, place, head, n] * values[row, head, n] for n in members)
                torch.testing.assert_close(new_values[place, head, slot], expected, rtol=1e-12, atol=1e-12)
                for how, function in (("sum", sum), ("max", max), ("min", min)):
                    combined = merge_state(state, plan, how)[place, head, slot]
                    assert combined == pytest.approx(float(function(state[place, head, n] for n in members)))
    assert torch.equal(merge_state(state, plan, "kept"), state.gather(2, kept))


def test_a_plan_without_folds_leaves_the_kept_bits_alone() -> None:
    keys, values = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 6)
    kept = torch.tensor([[[0, 3, 5], [1, 2, 7]]])
    new_keys, new_values = compact_pair(keys, values, [1], Plan(kept), torch.arange(8).expand(1, 2, 8))
    assert torch.equal(new_keys[0, 1], keys[1, 1, [1, 2, 7]])
    assert torch.equal(new_values[0, 0], values[1, 0, [0, 3, 5]])


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([[[0, 1]]], r"\[1, 1, 3\]"),
        ([[[0, 2, 2]]], "ascending"),
        ([[[2, 1, 0]]], "ascending"),
        ([[[0, 1, 9]]], "below 6"),
        ([[[-1, 1, 2]]], "below 6"),
        ([[[0, 1, 2]]], "protected"),
    ],
)
def test_a_wrong_plan_is_caught_before_it_touches_anything(kept: list, words: str) -> None:
    protected = torch.zeros(1, 1, 6, dtype=torch.bool)
    protected[..., 5] = True
    with pytest.raises(PlanError, match=words):
        Plan(torch.tensor(kept)).check((1, 1, 6), 3, protected)


@dataclass(frozen=True)
class FoldOldest(Method):
    """For the tests: keep the newest slots and fold every dropped one into the oldest kept slot, equally weighted."""

    name = "fold-oldest"
    title = "test"
    paper = "-"
    declare: bool = True

    @property
    def needs(self) -> Requirements:
        return Requirements(merges=self.declare)

    def plan(self, view: SlotView, keep: int) -> Plan:
        kept = top_k_slots(view.positions_BHN.float(), keep, forced_BHN=view.is_protected_BHN)
        marked = torch.zeros_like(view.is_protected_BHN).scatter_(2, kept, True)
        into = torch.where(marked, marked.cumsum(-1) - 1, 0)
        weights = view.counts_BHN / merge_counts(view.counts_BHN, Merge(into, into, into), keep).gather(2, into)
        return Plan(kept, Merge(into, weights, weights))


def test_folds_travel_through_a_cache_with_their_counts() -> None:
    """With everything folded into slot 0, that slot holds the mean value of all tokens it stands for."""
    model = tiny_model("llama")
    ids, mask, _ = batch([60, 45])
    budget = Budget(16, interval=8, sinks=0, recent=0, prompt="count")
    with torch.no_grad(), CompressedCache(model, "full") as full:
        model(ids, attention_mask=mask, past_key_values=full)
    pieces = [40] + [1] * 20
    with torch.no_grad(), CompressedCache(model, FoldOldest(), budget) as cache:
        end = 0
        for size in pieces:
            end += size
            model(ids[:, end - size : end], attention_mask=mask[:, :end], past_key_values=cache)
    layer, everything = cache.compressed_layers[0].storage, full.compressed_layers[0].storage
    for row, length in enumerate([60, 45]):
        state = cache.rows[row]
        compacted = torch.tensor([state.compacted_slots])
        counts = layer.source_counts(torch.tensor([row]), state.state.physical, compacted)
        assert int(counts[0, 0].sum()) == length
        folded = int(counts[0, 0, 0])
        torch.testing.assert_close(layer.values[row, 0, 0], everything.values[row, 0, :folded].mean(0))
        assert cache.stats().rows[row].tokens_folded > 0
    with torch.no_grad(), CompressedCache(model, FoldOldest(declare=False), budget) as cache:
        with pytest.raises(PlanError, match="merges=True"):
            model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match="did not finish"):
            model(ids, attention_mask=mask, past_key_values=cache)
        cache.reset()


def test_storage_is_allocated_once_and_events_happen_in_place() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, _, _ = batch([20])
    with (
        torch.no_grad(),
        CompressedCache(model, "keydiff", Budget(32, interval=8, sinks=0, recent=4, prompt="count")) as cache,
    ):
        model(ids, past_key_values=cache)
        storage = cache.compressed_layers[0].storage
        address = (storage.keys.data_ptr(), storage.values.data_ptr())
        for token in range(200):
            model(ids[:, token % 20 : token % 20 + 1], past_key_values=cache)
        assert (storage.keys.data_ptr(), storage.values.data_ptr()) == address
        assert storage.keys.shape[2] == 40
        assert cache.rows[0].events > 15
        assert cache.stats().bytes_allocated == 3 * 2 * 40 * 2 * 16 * 4
