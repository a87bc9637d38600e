"""PyramidKV: budgets of layers, and a cache whose layers follow schedules of their own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model
from oracle import differences, run_compressed

from reasonkv import Budget, BudgetError, CompressedCache, Plan, Requirements, SlotView, get_method, schedule
from reasonkv.budget import Window
from reasonkv.evaluate.cells import plan_cells
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.fates import NEVER, PlanRecorder, fates
from reasonkv.evaluate.matching import budget_for_mean, mean_physical
from reasonkv.methods import layer_budgets
from reasonkv.methods.pyramidkv import PyramidKV, kvpress_pyramid, pyramid
from reasonkv.methods.snapkv import SnapKV

CASES = json.loads((Path(__file__).parent / "data" / "field_uneven.json").read_text())["cases"]["pyramidkv_budgets"]
MODEL = tiny_model("qwen3")
METHOD, BUDGET = PyramidKV(window=6, kernel=3), Budget(16, interval=5, sinks=2, recent=3, prompt="count")
TOKENS = [24, 16, 8]  # sinks and window are 8; of the other 8 per layer, 15.6, 8 and 0.4


# ------------------------------------------------------------------------------------------------------------ integers


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["index"]))
def test_the_public_form_equals_kvpress(case: dict[str, Any]) -> None:
    found = kvpress_pyramid(
        case["q_len"] * (1 - case["compression_ratio"]),
        case["num_layers"],
        window=case["window_size"],
        beta=case["beta"],
        length=case["q_len"],
    )
    assert found == case["budgets"]


@given(mean=st.integers(0, 5000), layers=st.integers(1, 80), beta=st.integers(1, 60))
def test_shares_sum_exactly_lie_on_the_line_and_never_rise(mean: int, layers: int, beta: int) -> None:
    shares = pyramid(mean, layers, beta)
    assert sum(shares) == layers * mean
    assert all(upper <= lower for lower, upper in pairwise(shares))
    last = mean / beta
    for layer, share in enumerate(shares):
        on_line = mean if layers == 1 else 2 * mean - last - layer * 2 * (mean - last) / (layers - 1)
        assert abs(share - on_line) < 1


@given(
    tokens=st.integers(1, 3000),
    layers=st.integers(1, 64),
    beta=st.integers(1, 40),
    window=st.integers(1, 64),
    sinks=st.integers(0, 8),
    recent=st.integers(0, 128),
    prompt=st.integers(1, 2000),
    policy=st.sampled_from(["count", "keep", "on_top"]),
)
def test_budgets_of_layers_sum_to_layers_times_tokens_and_hold_what_is_protected(**drawn: Any) -> None:
    layers, prompt, method = drawn["layers"], drawn["prompt"], PyramidKV(window=drawn["window"], beta=drawn["beta"])
    try:
        budget = Budget(drawn["tokens"], sinks=drawn["sinks"], recent=drawn["recent"], prompt=drawn["policy"])
        budget.check_protected(recent=method.window, prompt_length=prompt)
    except BudgetError:
        return
    own = layer_budgets(method, budget, layers, prompt)
    assert sum(one.tokens for one in own if one) == layers * budget.tokens
    for one in own:
        assert one is not None and replace(one, tokens=budget.tokens) == budget
        one.check_protected(recent=method.window, prompt_length=prompt)


def test_a_share_that_cannot_hold_what_is_protected_is_one_sentence() -> None:
    model, public = MODEL, PyramidKV(window=6, beta=2, variant="kvpress")
    with pytest.raises(BudgetError) as caught:
        CompressedCache(model, public, Budget(16, sinks=4, recent=6, prompt="count"))
    assert str(caught.value) == (
        "Of 16 tokens, pyramidkv leaves 8 to layer 3 of 3, which cannot hold 4 sinks and 6 recent tokens; "
        "raise tokens, or divide them more evenly."
    )
    kept = CompressedCache(model, public, Budget(40, sinks=2, recent=6, prompt="keep"), prompt_lengths=[20])
    with pytest.raises(BudgetError, match="leaves 20 to layer 3 of 3, which cannot hold a prompt of 20 tokens, 6 rec"):
        kept.tokens_to_next_event()
    with pytest.raises(BudgetError, match="divides tokens among layers, which a Window has none of"):
        CompressedCache(model, METHOD, Window(16, 8, 0.5))


class WholeModel(PyramidKV):
    """For the tests: plans all layers at once."""

    @property
    def needs(self) -> Requirements:
        return Requirements(scope="model", layer_budgets=True)


def test_a_method_of_model_scope_cannot_have_layers_of_its_own() -> None:
    with pytest.raises(
        BudgetError, match="plans all layers at once, so they cannot have budgets or turns of their own"
    ):
        CompressedCache(MODEL, WholeModel(), Budget(128, prompt="count"))


# ------------------------------------------------------------------------------------------------------------- a cache


def decode(cache: CompressedCache, tensors: tuple[torch.Tensor, ...], start: int, end: int) -> torch.Tensor:
    """Feed columns start..end-1 in one forward; the last column's logits."""
    ids, mask, positions = tensors
    with torch.no_grad():
        return MODEL(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits[:, -1]


def test_every_layer_follows_the_schedule_of_its_own_budget() -> None:
    tensors, prompts = batch([70, 57]), [26, 13]
    states = [[schedule.Lengths(prompt=p) for p in prompts] for _ in TOKENS]
    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=prompts) as cache:
        for start, end in [(0, 26), *((n, n + 1) for n in range(26, 70))]:
            decode(cache, tensors, start, end)
            fed = tensors[1][:, start:end].sum(-1).tolist()
            far = []
            for layer, tokens in enumerate(TOKENS):
                one = replace(BUDGET, tokens=tokens)
                states[layer] = [schedule.step(one, s, n)[0] for s, n in zip(states[layer], fed, strict=True)]
                assert [p.shape[1] for p in cache.slot_positions(layer)] == [s.physical for s in states[layer]]
                far.append([schedule.next_event(one, s) - s.logical for s in states[layer]])
            assert cache.tokens_to_next_event() == [min(row) for row in zip(*far, strict=True)]
        assert [track.layers for track in cache.layer_groups] == [1, 1, 1]


@pytest.mark.parametrize("prompt", ["count", "keep", "on_top"])
def test_a_padded_batch_and_pieces_that_end_at_events_keep_what_single_tokens_alone_do(prompt: str) -> None:
    """Rows whose prompts differ divide `keep` budgets differently, and still hold what they would alone."""
    budget = replace(BUDGET, tokens=40 if prompt == "keep" else 16, prompt=prompt)
    lengths, prompts = [66, 57, 45], [24, 15, 24]
    draw = torch.Generator().manual_seed(1)
    rows = [
        TraceRow(*torch.randint(5, 90, (n,), generator=draw).split([p, n - p]))
        for n, p in zip(lengths, prompts, strict=True)
    ]

    def run(chosen: list[int], max_piece: int) -> tuple[dict[Any, torch.Tensor], CompressedCache, int]:
        found: dict[Any, torch.Tensor] = {}

        def note(layer: int, at: list[int], view: SlotView, plan: Plan) -> None:
            for place, row in enumerate(at):
                index = view.positions_BHN[place].gather(1, plan.kept_BHK[place])
                if int(view.length_B[place]) < rows[chosen[row]].fed:  # an event at a row's own end cuts nothing more
                    found[chosen[row], layer, int(view.length_B[place])] = index

        own = [prompts[row] for row in chosen]
        with CompressedCache(MODEL, METHOD, budget, prompt_lengths=own, observer=note) as cache:
            fed = [rows[row] for row in chosen]
            count = sum(1 for _ in feed(MODEL, cache, fed, distances=cache.tokens_to_next_event, max_piece=max_piece))
        return found, cache, count

    together, cache, _ = run([0, 1, 2], 1)
    for row in range(3):
        alone, single, slow = run([row], 1)
        pieces, chunked, fast = run([row], 512)
        assert fast < 0.8 * slow  # three layers' events end pieces, each every 5 tokens
        assert (
            len({len([k for k in alone if k[1] == layer]) for layer in range(3)}) > 1
        )  # layers have events of their own
        own = {key: index for key, index in together.items() if key[0] == row}
        assert own.keys() == alone.keys() == pieces.keys()
        for key, index in alone.items():
            assert torch.equal(index, pieces[key])
            assert torch.equal(index, own[key])
        stats = [cache.stats().rows[row], single.stats().rows[0], chunked.stats().rows[0]]
        assert stats[1] == stats[2]
        assert replace(stats[0], bytes_held=0, bytes_peak=0) == replace(stats[1], bytes_held=0, bytes_peak=0)


@pytest.mark.parametrize("batch_kind", [[60], [60, 47, 31]], ids=["single", "padded"])
def test_attention_over_each_layers_own_slots_is_exact(batch_kind: list[int]) -> None:
    ids, mask, positions = batch(batch_kind)
    prompts, pieces = [24 - (60 - n) if n > 40 else 5 for n in batch_kind], [24, 7, 1, 1, 7, 7, 7, 6]
    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=prompts) as cache:
        run = run_compressed(MODEL, cache, ids, mask, positions, pieces)
    attention, logits = differences(MODEL, run, ids, mask, positions, pieces)
    assert attention <= 1e-12
    assert logits <= 1e-6


def test_one_layer_gets_everything_and_a_flat_pyramid_is_snapkv() -> None:
    assert pyramid(100, 1, 20) == [100]
    tensors = batch([70, 57])
    outcomes = []
    for method in (SnapKV(window=6, kernel=3), PyramidKV(window=6, kernel=3, beta=1)):
        with CompressedCache(MODEL, method, BUDGET, prompt_lengths=[26, 13]) as cache:
            logits = [decode(cache, tensors, 0, 26)]
            logits += [decode(cache, tensors, start, start + 1) for start in range(26, 70)]
            assert len(cache.layer_groups) == 1
            outcomes.append((torch.stack(logits), cache.stats().rows, cache.slot_positions(2)))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]
    assert all(torch.equal(a, b) for a, b in zip(outcomes[0][2], outcomes[1][2], strict=True))


def test_bytes_and_lengths_are_those_of_the_layers_together() -> None:
    tensors = batch([70, 57])
    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=[26, 13]) as cache:
        decode(cache, tensors, 0, 26)
        attended, peak = 0, [26] * 3
        for start in range(26, 70):
            decode(cache, tensors, start, start + 1)
        stats = cache.stats()
        states = [[schedule.Lengths(prompt=p)] for p in (26,) for _ in TOKENS]
        for layer, tokens in enumerate(TOKENS):
            state = schedule.step(replace(BUDGET, tokens=tokens), states[layer][0], 26)[0]
            for _ in range(44):
                attended += state.physical + 1
                state = schedule.step(replace(BUDGET, tokens=tokens), state, 1)[0]
            states[layer] = [state]
    row = stats.rows[0]
    slot = 2 * ((16 + 16) * 8 + 4)  # KV heads, key and value in float64, token index
    ring = 3 * 4 * 6 * 16 * 8  # layers, query heads, window
    capacity = sum(tokens + BUDGET.interval for tokens in TOKENS)
    assert row.bytes_held == capacity * slot + ring
    assert row.bytes_held == 3 * (BUDGET.tokens + BUDGET.interval) * slot + ring  # as much as SnapKV's
    assert row.bytes_peak == sum(max(most, tokens + 5) for most, tokens in zip(peak, TOKENS, strict=True)) * slot + ring
    assert row.bytes_full == 70 * 3 * 2 * 32 * 8
    assert row.physical_mean == attended / 3 / 44
    assert row.physical_terminal == pytest.approx(sum(own[0].physical for own in states) / 3)
    assert row.physical_peak == pytest.approx((29 + 26 + 26) / 3)  # the first layer's 24 slots and 5 more
    assert stats.bytes_allocated == 2 * sum(tokens + 5 for tokens in TOKENS) * 2 * 32 * 8
    assert row.events == max(track.rows[0].events for track in cache.layer_groups)
    dropped = sum(70 - own[0].physical for own in states) / 3
    assert row.tokens_dropped == round(dropped)


def test_rows_move_and_copies_go_on_alone_with_every_layers_account() -> None:
    ids, mask, positions = batch([70, 57, 49])
    tensors = (ids, mask, positions)
    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=[26, 13, 5]) as cache:
        decode(cache, tensors, 0, 26)
        for start in range(26, 50):
            decode(cache, tensors, start, start + 1)
        twin = copy.deepcopy(cache)
        order = [2, 0, 0]
        cache.reorder_cache(torch.tensor(order))
        for new, old in enumerate(order):
            for one, other in zip(cache.layer_groups, twin.layer_groups, strict=True):
                assert one.rows[new] == other.rows[old]
        moved = tuple(tensor[order] for tensor in tensors)
        for start in range(50, 70):
            torch.testing.assert_close(
                decode(cache, moved, start, start + 1), decode(twin, tensors, start, start + 1)[order],
                rtol=0, atol=1e-10,
            )  # fmt: skip
        cache.batch_select_indices(torch.tensor([True, False, True]))
        assert [len(track.rows) for track in cache.layer_groups] == [2, 2, 2]
        cache.reset()
        assert cache.rows == [] and cache.forward is None
        decode(cache, tensors, 0, 26)
        assert [row.state.logical for row in cache.rows] == [26, 13, 5]
        twin.detach()


def test_fates_count_events_over_all_layers() -> None:
    tensors, recorder = batch([70]), PlanRecorder()
    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=[5], observer=recorder) as cache:
        decode(cache, tensors, 0, 5)
        for start in range(5, 70):
            decode(cache, tensors, start, start + 1)
    found = fates(recorder.plans, 70)
    lengths = {layer: [plan.length for plan in recorder.plans if plan.layer == layer] for layer in range(3)}
    assert list(found.lengths_E) == sorted({length for own in lengths.values() for length in own})
    assert len({tuple(own) for own in lengths.values()}) == 3
    for layer, own in lengths.items():
        events = found.dropped_GHN[layer][found.dropped_GHN[layer] >= 0].unique().tolist()
        assert [found.lengths_E[event] for event in events] == own
        held = cache.slot_positions(layer)[0]
        for head in range(2):
            alive = (found.dropped_GHN == NEVER) & (found.folded_GHN == NEVER)
            assert alive[layer, head].nonzero()[:, 0].tolist() == held[head].tolist()


# ------------------------------------------------------------------------------------------------------ equal lengths


@pytest.mark.parametrize("policy", ["count", "keep", "on_top"])
def test_the_mean_length_is_known_from_the_schedule(policy: str) -> None:
    budget, prompts, lengths = replace(BUDGET, tokens=40, prompt=policy), [26, 13], [70, 57]
    with CompressedCache(MODEL, METHOD, budget, prompt_lengths=prompts) as cache:
        for start, end in [(0, 26), *((n, n + 1) for n in range(26, 70))]:
            decode(cache, batch([70, 57]), start, end)
    means = [row.physical_mean for row in cache.stats().rows]
    assert mean_physical(budget, prompts, lengths, METHOD, 3) == pytest.approx(sum(means) / 2, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(target=st.floats(150, 400), layers=st.integers(2, 12), beta=st.integers(1, 20))
def test_tokens_are_solved_for_the_mean_over_layers(target: float, layers: int, beta: int) -> None:
    """Layers with large shares hold less than their share while a row is short, so more tokens are needed."""
    method, budget, prompts, lengths = (
        PyramidKV(window=6, beta=beta),
        Budget(64, recent=8, prompt="count"),
        [90, 40],
        [900, 700],
    )
    tokens = budget_for_mean(budget, target, prompts, lengths, method, layers).tokens
    found = mean_physical(replace(budget, tokens=tokens), prompts, lengths, method, layers)
    assert abs(found - target) < 0.01 * target
    assert tokens >= budget_for_mean(budget, target, prompts, lengths).tokens - 1


def test_every_method_meets_the_mean_with_tokens_of_its_own() -> None:
    rows = [(26, 600), (13, 500)]
    cells = plan_cells(
        [get_method("full"), SnapKV(), PyramidKV()], [Budget(100, prompt="count")], [200.0], rows, layers=6
    )
    full, snapkv, pyramidkv = (cell.budget for cell in cells)
    assert full is None and snapkv is not None and pyramidkv is not None
    assert pyramidkv.tokens > snapkv.tokens
    for cell in cells[1:]:
        mean = mean_physical(cell.budget, [26, 13], [600, 500], cell.method, 6)
        assert mean == pytest.approx(200, abs=0.6)
    with pytest.raises(BudgetError, match="leaves 58 to layer 4 of 6"):
        plan_cells(
            [PyramidKV(window=16, beta=2, variant="kvpress")],
            [Budget(64, recent=60, prompt="count")],
            (),
            rows,
            layers=6,
        )
