"""AdaKV: one budget for the heads of a layer, padding that nothing attends to, and what records say about both."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model
from oracle import PlanLog, differences, run_compressed
from safetensors.torch import load_file
from slot_views import random_view
from torch import Tensor

from reasonkv import Budget, BudgetError, CompressedCache, MethodError, Plan, SlotView, get_method
from reasonkv.budget import Window
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.fates import NEVER, PlanRecorder, fates
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.methods.adakv import AdaKV, shared_top_k
from reasonkv.plan import PlanError
from reasonkv.runtimes.transformers.attention import naive_attention

DATA = Path(__file__).parent / "data"
TENSORS = load_file(DATA / "field_uneven.safetensors")
CASES = json.loads((DATA / "field_uneven.json").read_text())["cases"]["adakv"]
MODEL = tiny_model("qwen3")
METHOD, BUDGET = AdaKV("snapkv:window=6;kernel=3"), Budget(16, interval=5, sinks=2, recent=3, prompt="count")
EVEN = 11  # slots a head attends to on average after an event: 16 / 1.5
INF = float("inf")


# ------------------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['index']}-{case['options']['base']}")
def test_the_shared_top_k_equals_kvpress(case: dict[str, Any]) -> None:
    scores, masked, counts = (TENSORS[case[name]["tensor"]] for name in ("base_score", "masked", "kept_per_head"))
    assert case["margin_flattened"] > 1e-6
    chosen = shared_top_k(
        scores, case["n_kept"], int(case["options"]["alpha_safeguard"] * case["n_kept"]), torch.zeros_like(scores) > 0
    )
    assert int(case["options"]["alpha_safeguard"] * case["n_kept"]) == case["n_safe"]
    assert torch.equal(~chosen, masked.bool())
    assert torch.equal(chosen.sum(-1), counts.long())


def ada_view(B: int = 2, H: int = 3, N: int = 60, *, padding: int = 0, seed: int = 0, **options: Any) -> SlotView:
    """Random keys; in every head up to `padding` of the slots that are not protected are padding."""
    view = random_view(B, H, N, queries=6, key_seed=seed, sinks=2, recent=6, **options)
    draw = torch.Generator().manual_seed(seed + 1)
    order = torch.rand(view.positions_BHN.shape, generator=draw).masked_fill(view.is_protected_BHN, 2.0).argsort(-1)
    count = torch.randint(0, padding + 1, (B, H, 1), generator=draw)
    dead = torch.zeros_like(view.is_protected_BHN).scatter_(2, order, torch.arange(N).expand(B, H, N) < count)
    return replace(view, state={"log_mass": torch.zeros(B, H, N).masked_fill(dead, -INF)})


def slowly(method: AdaKV, view: SlotView, keep: int, row: int) -> tuple[list[list[int]], list[set[int]]]:
    """The rule in plain lists: what every head stores, and what of it it attends to."""
    scores, mean = method.scorer.score(view)[row].tolist(), round((keep - 2) / method.stretch)  # beside two sinks
    dead, protected = view.state["log_mass"][row].isneginf().tolist(), view.is_protected_BHN[row].tolist()
    stored, chosen, rest = [], [], []
    for h, own in enumerate(scores):
        order = sorted(range(len(own)), key=lambda n: (not protected[h][n], dead[h][n], -own[n], -n))
        stored.append(sorted(order[:keep]))
        alive = [n for n in order[:keep] if not dead[h][n]]
        sure = [n for rank, n in enumerate(alive) if protected[h][n] or rank < 2 + int(method.alpha * mean)]
        chosen.append(set(sure))
        rest += [(-own[n], h, n) for n in alive if n not in chosen[h]]
    for _, h, n in sorted(rest)[: max(0, len(scores) * (2 + mean) - sum(len(c) for c in chosen))]:
        chosen[h].add(n)
    return stored, chosen


@pytest.mark.parametrize("padding", [0, 12])
@pytest.mark.parametrize("method", [METHOD, replace(METHOD, alpha=0.9), replace(METHOD, alpha=0.0, stretch=3.0)])
def test_a_plan_is_the_rule_written_out(method: AdaKV, padding: int) -> None:
    for seed in range(4):
        view = ada_view(padding=padding, seed=seed)
        plan = method.plan(view, 40)
        assert plan.log_mass_BHK is not None
        assert set(plan.log_mass_BHK.unique().tolist()) == {-INF, 0.0}
        for row in range(2):
            stored, chosen = slowly(method, view, 40, row)
            assert plan.kept_BHK[row].tolist() == stored
            for h in range(3):
                attended = plan.kept_BHK[row, h][~plan.log_mass_BHK[row, h].isneginf()].tolist()
                assert set(attended) == chosen[h]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    N=st.integers(30, 90),
    H=st.integers(1, 4),
    alpha=st.floats(0, 1),
    stretch=st.floats(1.01, 5),
    padding=st.integers(0, 8),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_a_layer_attends_to_its_share_and_every_head_to_what_it_is_sure_of(
    N: int, H: int, alpha: float, stretch: float, padding: int, seed: int, dtype: Any, data: st.DataObject
) -> None:
    method = AdaKV("snapkv:window=6;kernel=3", alpha, stretch)
    view = ada_view(2, H, N, padding=padding, seed=seed, dtype=dtype)
    keep = data.draw(st.integers(8, N - padding - 1))
    plan = method.plan(view, keep)
    plan.check((2, H, N), keep, view.is_protected_BHN)
    assert plan.log_mass_BHK is not None
    attended = ~plan.log_mass_BHK.isneginf()
    mean = max(1, round((keep - 2) / stretch))  # beside two sinks
    assert (attended.flatten(1).sum(-1) == H * max(2 + mean, 8)).all()  # 8 are protected in every head
    assert (attended.sum(-1) >= 2 + int(alpha * mean)).all()
    assert attended[view.is_protected_BHN.gather(2, plan.kept_BHK)].all()
    assert not attended[view.state["log_mass"].isneginf().gather(2, plan.kept_BHK)].any()


def test_heads_with_equal_scores_share_evenly_and_the_newer_slots_win() -> None:
    chosen = shared_top_k(torch.zeros(1, 3, 10), 4, 0, torch.zeros(1, 3, 10) > 0)
    assert chosen[0].tolist() == [[False] * 6 + [True] * 4] * 3


def test_a_head_with_much_attention_gets_more_and_the_rule_is_not_that_of_single_heads() -> None:
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    scores[0, 1] += 1
    assert shared_top_k(scores, 15, 3, scores.isnan())[0].sum(-1).tolist() == [3, 27]
    capped = shared_top_k(scores, 25, 3, torch.zeros(1, 2, 40, dtype=torch.bool))
    assert capped[0].sum(-1).tolist() == [10, 40]


def test_without_stretch_it_is_its_base_method() -> None:
    view, method = ada_view(), AdaKV("snapkv:window=6;kernel=3", stretch=1.0)
    base = get_method("snapkv:window=6,kernel=3")
    plan = method.plan(replace(view, state={}), 40)
    assert torch.equal(plan.kept_BHK, base.plan(view, 40).kept_BHK)
    assert plan.log_mass_BHK is None
    assert method.needs == base.needs and not method.needs.log_mass


def test_nan_is_an_error_and_not_a_winner() -> None:
    view = ada_view()
    view.keys_BHND[0, 0, 30, 0] = float("nan")
    with pytest.raises(PlanError, match="NaN"):
        METHOD.plan(view, 40)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adakv:alpha=1.5", "adakv: alpha must be at most 1, not 1.5."),
        ("adakv:stretch=0.5", "adakv: stretch must be at least 1, not 0.5."),
        ("adakv:base=cask", "adakv: base must be a method that scores slots, not cask."),
        (
            "adakv:base=tova",
            "adakv: base must score every head by itself and store nothing beside slots, unlike tova.",
        ),
    ],
)
def test_a_bad_option_is_one_sentence(spec: str, message: str) -> None:
    with pytest.raises(MethodError) as caught:
        get_method(spec)
    assert str(caught.value) == message


@pytest.mark.parametrize("base", ["keydiff", "random", "rkv", "curdkv", "expected", "beaconkv", "vase-dkv", "lagkv"])
def test_any_method_that_scores_heads_can_be_the_base(base: str) -> None:
    options = {"rkv": ":window=6", "beaconkv": ":beacons=4;window=4;recent=6", "vase-dkv": ":window=6"}.get(base, "")
    ids, mask, positions = batch([60])
    with CompressedCache(MODEL, f"adakv:base={base}{options}", BUDGET) as cache:
        run = run_compressed(MODEL, cache, ids, mask, positions, [24] + [1] * 36)
    assert run.logits.isfinite().all()
    assert cache.rows[0].events > 5 and cache.rows[0].padding == 16 - EVEN


def test_a_window_is_refused() -> None:
    with pytest.raises(BudgetError, match="divides all slots of a layer at every compaction; give it a Budget"):
        CompressedCache(MODEL, METHOD, Window(16, 8, 0.5))


# ------------------------------------------------------------------------------------------------------------- a cache


def attended(cache: CompressedCache, layer: int, row: int) -> list[list[int]]:
    """Tokens that a row's next query attends to, by head."""
    storage, state = cache.compressed_layers[layer].storage, cache.rows[row].state
    assert storage is not None
    mass = storage.log_mass(storage.allocated)
    held = cache.slot_positions(layer)[row]
    if mass is None:
        return held.tolist()
    alive = ~mass[row, :, : state.physical].isneginf()
    return [held[h][alive[h]].tolist() for h in range(held.shape[0])]


def feed_rows(chosen: list[int], max_piece: int, method: AdaKV = METHOD) -> tuple[dict[Any, Any], CompressedCache]:
    """Feed some of three rows; by row, layer and length what every event stores and attends to."""
    lengths, prompts = [52, 43, 40], [24, 15, 24]
    draw = torch.Generator().manual_seed(1)
    rows = [
        TraceRow(*torch.randint(5, 90, (n,), generator=draw).split([p, n - p]))
        for n, p in zip(lengths, prompts, strict=True)
    ]
    found: dict[Any, Any] = {}

    def note(layer: int, at: list[int], view: SlotView, plan: Plan) -> None:
        assert plan.log_mass_BHK is not None
        for place, row in enumerate(at):
            length = int(view.length_B[place])
            if length < rows[chosen[row]].fed:
                index = view.positions_BHN[place].gather(1, plan.kept_BHK[place])
                found[chosen[row], layer, length] = index, plan.log_mass_BHK[place].isneginf()

    own = [prompts[row] for row in chosen]
    with CompressedCache(MODEL, method, BUDGET, prompt_lengths=own, observer=note) as cache:
        fed = [rows[row] for row in chosen]
        for _ in feed(MODEL, cache, fed, distances=cache.tokens_to_next_event, max_piece=max_piece):
            pass
    return found, cache


def test_a_padded_batch_and_pieces_keep_and_attend_to_what_single_tokens_alone_do() -> None:
    together, cache = feed_rows([0, 1, 2], 1)
    for row in range(3):
        alone, single = feed_rows([row], 1)
        pieces, chunked = feed_rows([row], 512)
        own = {key: found for key, found in together.items() if key[0] == row}
        assert own.keys() == alone.keys() == pieces.keys()
        for key, (index, padding) in alone.items():
            for other in (own[key], pieces[key]):
                assert torch.equal(index, other[0])
                assert torch.equal(padding, other[1])
        stats = [one.stats().rows[number] for one, number in ((cache, row), (single, 0), (chunked, 0))]
        assert stats[1] == stats[2]
        assert replace(stats[0], bytes_held=0, bytes_peak=0) == replace(stats[1], bytes_held=0, bytes_peak=0)


@pytest.mark.parametrize("kernel", ["sdpa", "reference", "eager"])
@pytest.mark.parametrize("lengths", [[60], [60, 47, 31]], ids=["single", "padded"])
def test_attention_leaves_padding_out_exactly(kernel: str, lengths: list[int]) -> None:
    model = tiny_model("qwen3", kernel="eager" if kernel == "eager" else None)
    ids, mask, positions = batch(lengths)
    prompts, pieces = [24 - (60 - n) if n > 40 else 5 for n in lengths], [24, 7, 1, 1, 7, 7, 7, 6]
    log, own = PlanLog(), "reference" if kernel == "reference" else None
    with CompressedCache(model, METHOD, BUDGET, prompt_lengths=prompts, observer=log, kernel=own) as cache:
        log.cache = cache
        run = run_compressed(model, cache, ids, mask, positions, pieces)
    attention, logits = differences(model, run, ids, mask, positions, pieces, log)
    assert attention <= (1e-6 if kernel == "eager" else 1e-12)
    assert logits <= 1e-6
    counts = [[len(head) for head in attended(cache, layer, 0)] for layer in range(3)]
    assert any(own[0] != own[1] for own in counts)  # heads do differ
    new = cache.rows[0].state.physical - 16
    assert all(sum(own) == 2 * (EVEN + new) for own in counts)


class Starving(AdaKV):
    """For the tests: head 0 attends to nothing but its 6 newest slots, as if the other head had taken all the rest."""

    def plan(self, view: SlotView, keep: int) -> Plan:
        plan = super().plan(view, keep)
        assert plan.log_mass_BHK is not None
        plan.log_mass_BHK[:, 0, :-6] = -INF
        return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[760], [760, 700]], ids=["single", "padded"])
def test_hundreds_of_slots_of_padding_before_the_first_attended_are_finite_in_every_dtype(
    dtype: torch.dtype, lengths: list[int]
) -> None:
    model, outs = tiny_model("qwen3", dtype), []
    ids, mask, positions = batch(lengths)
    prompts, budget = [n - 3 for n in lengths], Budget(640, interval=9, sinks=0, recent=6, prompt="count")
    for kernel in (None, "reference"):
        method, logits = Starving("snapkv:window=6"), []
        with CompressedCache(model, method, budget, kernel=kernel, prompt_lengths=prompts) as cache, torch.no_grad():
            for start, end in ((0, 757), (757, 759), (759, 760)):
                out = model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    logits_to_keep=2,
                )
                logits.append(out.logits)
            for row in range(len(lengths)):
                assert len(attended(cache, 0, row)[0]) == 6 + 3
        outs.append(torch.cat(logits, 1))
    assert outs[0].isfinite().all()
    close = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.2}[dtype]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=close)


def test_softmax_over_padding_equals_softmax_without_it() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, n, 16, generator=draw).double() for h, n in ((4, 1), (2, 50), (2, 50)))
    mask = torch.zeros(1, 4, 1, 50, dtype=torch.float64)
    mask[:, :2, :, :45] = -INF
    out = naive_attention(torch.nn.Module(), query, key, value, mask)[0]
    alone = naive_attention(torch.nn.Module(), query[:, :2], key[:, :1, 45:], value[:, :1, 45:], None)[0]
    torch.testing.assert_close(out[:, :, :2], alone, rtol=0, atol=1e-15)


def test_stats_hold_slots_held_and_slots_attended() -> None:
    ids, mask, positions = batch([60])
    read: list[float] = []
    with CompressedCache(MODEL, METHOD, BUDGET) as cache, torch.no_grad():
        MODEL(ids[:, :24], past_key_values=cache)
        for n in range(24, 60):
            before = [attended(cache, layer, 0) for layer in range(3)]
            read.append(1 + sum(len(head) for own in before for head in own) / 6)
            MODEL(ids[:, n : n + 1], past_key_values=cache)
        row, plain = cache.stats().rows[0], CompressedCache(MODEL, "snapkv:window=6,kernel=3", BUDGET)
        with plain:
            run_compressed(MODEL, plain, ids, mask, positions, [24] + [1] * 36)
    held = plain.stats().rows[0]
    assert row.slots_read_mean == pytest.approx(sum(read) / 36, rel=1e-12)
    assert row.slots_read_mean == pytest.approx(
        row.physical_mean - (16 - EVEN)
    )  # every decoded token comes after the prompt's cut
    slot = 3 * 2 * (16 + 16) * 8
    assert row.bytes_read_mean == pytest.approx(row.slots_read_mean * slot)
    assert (row.physical_mean, row.physical_peak, row.events) == (held.physical_mean, held.physical_peak, held.events)
    assert row.bytes_held == held.bytes_held + 3 * 2 * 21 * 8  # log mass of every slot, float64 beside float64 keys
    assert held.slots_read_mean is None


def test_before_the_first_padding_all_held_slots_are_attended() -> None:
    ids, _, _ = batch([20])
    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=[8]) as cache, torch.no_grad():
        MODEL(ids[:, :8], past_key_values=cache)
        for n in range(8, 20):
            MODEL(ids[:, n : n + 1], past_key_values=cache)
        assert cache.stats().rows[0].slots_read_mean is None
    with CompressedCache(MODEL, replace(METHOD, stretch=1.0), BUDGET) as cache, torch.no_grad():
        MODEL(batch([60])[0], past_key_values=cache)
        assert cache.rows[0].events == 1 and cache.stats().rows[0].slots_read_mean is None


def test_rows_move_and_copies_go_on_alone_with_their_padding() -> None:
    ids, mask, positions = batch([70, 57, 49])

    def step(cache: CompressedCache, order: list[int], start: int, end: int) -> Tensor:
        with torch.no_grad():
            return MODEL(ids[order, start:end], attention_mask=mask[order, :end],
                         position_ids=positions[order, start:end], past_key_values=cache).logits[:, -1]  # fmt: skip

    with CompressedCache(MODEL, METHOD, BUDGET, prompt_lengths=[26, 13, 5]) as cache:
        step(cache, [0, 1, 2], 0, 26)
        for start in range(26, 50):
            step(cache, [0, 1, 2], start, start + 1)
        twin, order = copy.deepcopy(cache), [2, 0, 0]
        cache.reorder_cache(torch.tensor(order))
        for new, old in enumerate(order):
            assert cache.rows[new] == twin.rows[old]
            assert attended(cache, 1, new) == attended(twin, 1, old)
        for start in range(50, 70):
            moved, stayed = step(cache, order, start, start + 1), step(twin, [0, 1, 2], start, start + 1)
            torch.testing.assert_close(moved, stayed[order], rtol=0, atol=1e-10)
        twin.detach()


def test_fates_tell_padding_from_what_is_attended() -> None:
    recorder, (ids, mask, positions) = PlanRecorder(), batch([60])
    with CompressedCache(MODEL, METHOD, BUDGET, observer=recorder) as cache:
        run_compressed(MODEL, cache, ids, mask, positions, [24] + [1] * 36)
    what = fates(recorder.plans, 60)
    for layer in range(3):
        for head in range(2):
            alive = (what.dropped_GHN == NEVER) & (what.folded_GHN == NEVER)
            assert alive[layer, head].nonzero()[:, 0].tolist() == attended(cache, layer, 0)[head]


def test_a_replay_record_holds_both_lengths(tmp_path: Path) -> None:
    from tiny import TASK, tiny_loaded

    budget = BudgetOptions(tokens=(24,), interval=6, sinks=2, recent=8, prompt="count")
    traces = TraceSettings(max_new_tokens=40)
    job = ReplayJob(task=TASK, methods="adakv:base=snapkv:window=8", budget=budget, limit=1, traces=traces)
    (record,) = run(job, tiny_loaded(torch.float64), tmp_path)
    assert record.slots_read_mean == pytest.approx(record.physical_mean - (24 - 17))  # two sinks, and 22 / 1.5 more
    assert not record.selects and record.model_copy(update={"events": 0}).selects  # what only selects has no events
    assert record.bytes_read_mean is not None and record.bytes_read_mean < record.bytes_held
    assert math.isclose(
        record.bytes_read_mean / record.slots_read_mean,
        record.bytes_full / (record.prompt_tokens + record.output_tokens - 1),
    )
