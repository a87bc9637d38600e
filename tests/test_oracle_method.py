"""The oracle keeps what full KV really looks at later, in replay, and is refused everywhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import VOCABULARY, batch, tiny_model
from slot_views import random_view
from test_reference import eager_weights
from torch import Tensor

import reasonkv
from reasonkv import Budget, CompressedCache, UnsupportedModelError, get_method
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.chunks import MAX_CHUNK, TraceRow, feed
from reasonkv.evaluate.metrics import TeacherLogprobs
from reasonkv.evaluate.reference import FullAttention
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.traces import Trace
from reasonkv.methods import MethodError
from reasonkv.plan import Plan
from reasonkv.view import SlotView

BUDGET = Budget(16, interval=5, sinks=2, recent=3, prompt="count")
REFUSAL = "oracle looks into the future: it works in replay only, where the trace is known."


def make_rows(shapes: list[tuple[int, int]]) -> list[TraceRow]:
    generator = torch.Generator().manual_seed(1)
    return [
        TraceRow(*(torch.randint(5, VOCABULARY, (count,), generator=generator) for count in shape)) for shape in shapes
    ]


def feed_all(model: torch.nn.Module, cache: CompressedCache, rows: list[TraceRow], max_piece: int = MAX_CHUNK) -> None:
    for _ in feed(model, cache, rows, distances=cache.tokens_to_next_event, max_piece=max_piece):  # type: ignore[arg-type]
        pass


def prompts(rows: list[TraceRow]) -> list[int]:
    return [len(row.prompt_P) for row in rows]


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_every_kept_set_is_the_top_k_of_eager_attention_over_the_queries_to_come(family: str, reduce: str) -> None:
    model = tiny_model(family)
    rows = make_rows([(24, 40), (9, 51), (24, 17)])
    weights = [eager_weights(model, row) for row in rows]
    checked = 0

    def check(layer: int, members: list[int], view: SlotView, plan: Plan) -> None:
        nonlocal checked
        for i, row in enumerate(members):
            length, keep = int(view.length_B[i]), plan.kept_BHK.shape[-1]
            future = weights[row][layer][:, length:]
            scores = future.sum(1) if reduce == "sum" else future.amax(1)
            for head in range(2):
                positions = view.positions_BHN[i, head]
                protected = set(positions[view.is_protected_BHN[i, head]].tolist())
                others = [n for n in positions.tolist() if n not in protected]
                others.sort(key=lambda n: (scores[head, n].item(), n), reverse=True)
                expected = sorted(protected | set(others[: keep - len(protected)]))
                assert positions[plan.kept_BHK[i, head]].tolist() == expected
                checked += 1

    reference = FullAttention.collect(model, rows)
    with CompressedCache(
        model, f"oracle:reduce={reduce}", BUDGET, prompt_lengths=prompts(rows), reference=reference, observer=check
    ) as cache:
        feed_all(model, cache, rows)
        events = sum(row.events for row in cache.rows)
    assert checked == events * 2 * len(reference.layers)
    assert events > 15


def test_pieces_give_the_kept_sets_of_single_tokens() -> None:
    model = tiny_model("qwen3")
    rows = make_rows([(24, 60), (11, 33)])
    reference = FullAttention.collect(model, rows)
    kept = []
    for piece in (MAX_CHUNK, 1):
        with CompressedCache(model, "oracle", BUDGET, prompt_lengths=prompts(rows), reference=reference) as cache:
            feed_all(model, cache, rows, piece)
            kept.append([cache.slot_positions(layer) for layer in range(3)])
    for fast, slow in zip(*kept, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(fast, slow, strict=True))


def known_view(received: Tensor, length: int, end: int) -> SlotView:
    """A view of one row whose reference always answers `received` [H, end]."""

    class Known:
        lengths = (7, end)

        def received(self, layer: int, row: int, start: int, stop: int, reduce: str = "sum") -> Tensor:
            assert (layer, row, start, stop) == (0, 1, length, end)
            return received

    return replace(random_view(N=length, queries=0), rows=(1,), reference=Known())  # type: ignore[arg-type]


def test_with_nothing_to_come_the_newest_slots_stay() -> None:
    view = known_view(torch.zeros(2, 30), 30, 30)
    assert torch.equal(get_method("oracle").plan(view, 10).kept_BHK, torch.arange(20, 30).expand(1, 2, 10))


def test_it_scores_tokens_and_not_slots() -> None:
    received = torch.rand(2, 90, generator=torch.Generator().manual_seed(0))
    view = known_view(received, 60, 90)
    positions = torch.stack([torch.arange(0, 40), torch.arange(20, 60)])[None]
    view = replace(view, positions_BHN=positions)
    scores = view.future_attention_BHN()
    assert torch.equal(scores[0], torch.stack([received[0, :40], received[1, 20:60]]))


def test_a_cache_without_a_reference_and_the_decoding_drop_in_refuse_in_one_sentence() -> None:
    model = tiny_model("llama")
    with pytest.raises(MethodError) as caught:
        CompressedCache(model, "oracle", BUDGET)
    assert str(caught.value) == REFUSAL
    reference = FullAttention.collect(model, make_rows([(10, 20)]))
    for options in ({}, {"reference": reference}):
        with pytest.raises(MethodError) as caught:
            reasonkv.generate_with("oracle:reduce=max", BUDGET, **options)
        assert str(caught.value) == REFUSAL
    assert model.config._attn_implementation == "sdpa", "a refused cache must leave the model as it was"


def test_rows_other_than_the_references_are_refused() -> None:
    model = tiny_model("llama")
    rows = make_rows([(10, 20), (10, 20)])
    reference = FullAttention.collect(model, rows)
    ids, mask, _ = batch([10])
    with CompressedCache(model, "oracle", BUDGET, reference=reference) as cache, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="collected from 2 rows but the forward has 1"):
            model(ids, attention_mask=mask, past_key_values=cache)
    with CompressedCache(model, "oracle", BUDGET, prompt_lengths=prompts(rows), reference=reference) as cache:
        feed_all(model, cache, rows)
        for move in (
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
        ):
            with pytest.raises(UnsupportedModelError, match="cannot be reordered, repeated or dropped"):
                move()
    longer = make_rows([(10, 40), (10, 40)])
    with CompressedCache(model, "oracle", BUDGET, prompt_lengths=prompts(longer), reference=reference) as cache:
        with pytest.raises(ValueError, match="its reference knows only 29"):
            feed_all(model, cache, longer)


def test_a_view_without_a_reference_names_the_need() -> None:
    with pytest.raises(ValueError, match="Requirements\\(future=True\\)"):
        get_method("oracle").plan(random_view(), 40)


def test_replay_collects_what_the_oracle_needs() -> None:
    """On a model whose attention decides its output, knowing the future beats random slots."""
    model = tiny_model("qwen3")
    rows = make_rows([(24, 60), (11, 33), (18, 1)])
    traces = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.cat([row.prompt_P, row.output_T])[None]).logits[0, len(row.prompt_P) - 1 : -1]
        reference = TeacherLogprobs.from_logits(logits, 10**6)
        traces.append(Trace(number, row.prompt_P, row.output_T, reference, False))

    def kl(method: str) -> float:
        outcomes = replay_batch(model, traces, RunConfig(get_method(method), BUDGET))
        assert all(outcome.stats.physical_peak <= 24 for outcome in outcomes)
        return sum(outcome.metrics.kl for outcome in outcomes)

    assert kl("oracle") < kl("random")
