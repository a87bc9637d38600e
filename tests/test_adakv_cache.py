"""AdaKV in a cache: padding that nothing attends to, in batches, kernels, copies and records."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, tiny_model
from oracle import PlanLog, differences, run_compressed
from test_adakv import BUDGET, EVEN, INF, METHOD, MODEL, attended
from torch import Tensor

from reasonkv import Budget, CompressedCache, Plan, SlotView
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.evaluate.fates import NEVER, PlanRecorder, fates
from reasonkv.evaluate.job import BudgetOptions, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.methods.adakv import AdaKV
from reasonkv.runtimes.transformers.attention import naive_attention


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
