"""An observer sees every plan that is carried out, exactly, while the slots are still there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from models import batch, tiny_model
from torch import Tensor

from reasonkv import Budget, CompressedCache
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.plan import Plan
from reasonkv.view import SlotView

BUDGET = Budget(16, interval=5, sinks=2, recent=3, prompt="count")


@dataclass
class Seen:
    """One call."""

    layer: int
    rows: list[int]
    events: list[int]
    before: Tensor
    after: Tensor
    keys: Tensor


class Recorder:
    """Copies what it is shown; deep copies of it would lose calls."""

    def __init__(self) -> None:
        self.calls: list[Seen] = []

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        after = view.positions_BHN.gather(2, plan.kept_BHK)
        self.calls.append(
            Seen(layer, list(rows), view.event_B.tolist(), view.positions_BHN.clone(), after, view.keys_BHND.clone())
        )


def decode(model: torch.nn.Module, cache: CompressedCache, ids: Tensor, mask: Tensor, start: int, end: int) -> None:
    with torch.no_grad():
        for at in range(start, end):
            model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)


def test_the_observer_sees_each_plan_before_storage_is_rewritten_and_what_it_keeps_is_what_the_cache_holds() -> None:
    model = tiny_model("qwen3")
    ids, mask, _ = batch([60])
    seen = Recorder()
    expected_events = 0
    with CompressedCache(model, "keydiff", BUDGET, observer=seen) as cache, torch.no_grad():
        model(ids[:, :24], attention_mask=mask[:, :24], past_key_values=cache)
        for at in range(24, 60):
            before = {layer: cache.slot_positions(layer)[0] for layer in range(3)}
            seen.calls.clear()
            model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache)
            if not seen.calls:
                continue
            expected_events += 1
            assert [call.layer for call in seen.calls] == [0, 1, 2]
            for call in seen.calls:
                assert call.rows == [0]
                assert call.events == [cache.rows[0].events - 1]
                newest = torch.full((2, 1), at)
                assert torch.equal(call.before[0], torch.cat([before[call.layer], newest], 1))
                assert torch.equal(call.after[0], cache.slot_positions(call.layer)[0])
                storage = cache.compressed_layers[call.layer].storage
                assert storage is not None
                assert storage.keys is not None
                held = call.after.shape[2]
                places = torch.searchsorted(call.before, call.after)
                kept = call.keys.gather(2, places[..., None].expand(-1, -1, -1, call.keys.shape[3]))
                assert torch.equal(kept, storage.keys[:, :, :held])
    assert expected_events == cache.rows[0].events - 1 == 7  # the cut of the prompt was the first


def test_rows_of_a_ragged_batch_come_in_groups_with_their_batch_rows() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    rows = [
        TraceRow(torch.randint(5, 200, (p,), generator=generator), torch.randint(5, 200, (t,), generator=generator))
        for p, t in ((24, 30), (11, 40), (24, 12), (3, 25))
    ]
    seen = Recorder()
    with CompressedCache(
        model, "streaming", BUDGET, prompt_lengths=[len(r.prompt_P) for r in rows], observer=seen
    ) as c:
        for _ in feed(model, c, rows, distances=c.tokens_to_next_event):
            pass
        events = [row.events for row in c.rows]
    assert any(len(call.rows) > 1 for call in seen.calls)
    assert any(len(call.rows) == 1 for call in seen.calls)
    for layer in range(3):
        for row, count in enumerate(events):
            numbers = [
                event
                for call in seen.calls
                if call.layer == layer
                for at, event in zip(call.rows, call.events, strict=True)
                if at == row
            ]
            assert numbers == list(range(count))
            assert count > 1


def test_a_deep_copy_shares_the_observer_and_reset_starts_the_events_anew() -> None:
    model = tiny_model("llama")
    ids, mask, _ = batch([40])
    seen = Recorder()
    with CompressedCache(model, "knorm", BUDGET, observer=seen, prompt_lengths=20) as cache:
        decode(model, cache, ids, mask, 0, 22)
        twin = copy.deepcopy(cache)
        assert twin.session.observer is seen
        seen.calls.clear()
        decode(model, cache, ids, mask, 22, 40)
        first = list(seen.calls)
        seen.calls.clear()
        decode(model, twin, ids, mask, 22, 40)
        assert len(seen.calls) == len(first) > 0
        assert all(torch.equal(x.after, y.after) for x, y in zip(first, seen.calls, strict=True))
        seen.calls.clear()
        cache.reset()
        decode(model, cache, ids, mask, 0, 40)
        assert seen.calls[0].events == [0]


def test_nothing_is_observed_without_an_event() -> None:
    model = tiny_model("llama")
    ids, mask, _ = batch([40])
    seen = Recorder()
    for method, budget in (("full", None), ("knorm", Budget(64, recent=3, prompt="count"))):
        with CompressedCache(model, method, budget, observer=seen) as cache:
            decode(model, cache, ids, mask, 0, 40)
    assert seen.calls == []
