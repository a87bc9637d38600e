"""Kara: attention inside the window, Token2Chunk, and what a cache under its schedule computes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch, tiny_model
from oracle import differences, run_compressed
from same_choice import check_same_choice
from slot_views import make_view, random_view
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reasonkv import Budget, CompressedCache, Plan, SlotView
from reasonkv.budget import Window
from reasonkv.evaluate.chunks import TraceRow, feed
from reasonkv.methods.kara import Kara, accept_chunks, chunked_top_k
from reasonkv.methods.ops import top_k_slots

WINDOW = Window(16, 5, 0.4)  # 6 of 16 slots stay
PROMPT, LENGTH = 11, 11 + 16 * 3 + 5 + 4
PIECES = {
    "decode": [PROMPT] + [1] * (LENGTH - PROMPT),
    "forward7": [PROMPT] + [7] * 8 + [1],
    "whole": [PROMPT, LENGTH - PROMPT - 1, 1],
    "chunked": [4, 4, 3] + [19] * 3,
}


# -- Token2Chunk ------------------------------------------------------------------------------------------------------


def plain_token2chunk(scores: list[float], keep: int, gamma: int, alpha: float) -> tuple[list[int], list[tuple]]:
    """One list at a time, as the method's page says."""
    candidates = sorted(sorted(range(len(scores)), key=lambda slot: (scores[slot], slot), reverse=True)[:keep])
    pairs = [(a, b) for a, b in pairwise(candidates) if 2 <= b - a <= gamma - 1]
    kept: set[int] = set()
    chunks, inner = [], 0
    for a, b in sorted(pairs, key=lambda pair: (min(scores[pair[0]], scores[pair[1]]), pair[1]), reverse=True):
        more = kept | set(range(a, b + 1))
        if inner + b - a - 1 > alpha * keep or len(more) > keep:
            break
        kept, inner = more, inner + b - a - 1
        chunks.append((a, b))
    rest = sorted(set(candidates) - kept, key=lambda slot: (scores[slot], slot), reverse=True)
    return sorted(kept | set(rest[: keep - len(kept)])), sorted(chunks)


def runs(kept: Tensor) -> Tensor:
    """Contiguous runs of kept slots, summed over the last axis."""
    return (kept[..., 1:] - kept[..., :-1] > 1).sum(-1) + 1


def plain_slots(scores_BHM: Tensor) -> tuple[Tensor, Tensor]:
    """Positions 0..M-1, nothing forced."""
    return torch.arange(scores_BHM.shape[2]).expand(scores_BHM.shape), torch.zeros_like(scores_BHM, dtype=torch.bool)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_token2chunk_is_the_plain_algorithm_and_keeps_exactly_r_slots(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 48))
    levels = data.draw(st.sampled_from([2, 5, 1000]))  # few levels: many ties
    rows = data.draw(st.lists(st.lists(st.integers(0, levels), min_size=size, max_size=size), min_size=1, max_size=3))
    keep, gamma = data.draw(st.integers(0, size)), data.draw(st.integers(1, 12))
    alpha = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    scores_BHM = torch.tensor(rows, dtype=torch.float32)[None]
    positions_BHM, forced_BHM = plain_slots(scores_BHM)
    kept_BHK = chunked_top_k(scores_BHM, positions_BHM, keep, forced_BHM, gamma=gamma, alpha=alpha)
    assert kept_BHK.shape == (1, len(rows), keep)
    candidate_BHM = torch.zeros_like(forced_BHM).scatter_(2, top_k_slots(scores_BHM, keep), True)
    start_BHM, accepted_BHM = accept_chunks(scores_BHM, positions_BHM, candidate_BHM, gamma=gamma, alpha=alpha)
    for head, row in enumerate(rows):
        kept, chunks = plain_token2chunk(row, keep, gamma, alpha)
        assert kept_BHK[0, head].tolist() == kept
        ends = accepted_BHM[0, head].nonzero()[:, 0]
        found = list(zip(start_BHM[0, head, ends].tolist(), ends.tolist(), strict=True))
        assert found == chunks
        assert all(b - a + 1 <= gamma for a, b in found)  # never longer than gamma,
        assert all(set(range(a, b + 1)) <= set(kept) for a, b in found)  # and whole
        assert sum(b - a - 1 for a, b in found) <= alpha * keep


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([128, 256, 384, 512]), st.sampled_from([0.2, 0.3, 0.4, 0.5, 0.6]))
def test_token2chunk_leaves_fewer_contiguous_runs(seed: int, size: int, retention: float) -> None:
    scores_BHM = torch.rand(2, 4, size, generator=torch.Generator().manual_seed(seed))
    positions_BHM, forced_BHM = plain_slots(scores_BHM)
    keep = round(retention * size)
    chunked_BHK = chunked_top_k(scores_BHM, positions_BHM, keep, forced_BHM, gamma=8, alpha=0.5)
    single_BHK = top_k_slots(scores_BHM, keep)
    assert bool((runs(chunked_BHK) < runs(single_BHK)).all())


def test_runs_fall_to_a_third_at_the_published_setting() -> None:
    scores_BHM = torch.rand(8, 8, 512, generator=torch.Generator().manual_seed(1))
    positions_BHM, forced_BHM = plain_slots(scores_BHM)
    chunked_BHK = chunked_top_k(scores_BHM, positions_BHM, 154, forced_BHM, gamma=8, alpha=0.5)
    assert 2.5 < (runs(top_k_slots(scores_BHM, 154)).sum() / runs(chunked_BHK).sum()).item() < 3.5


def test_gamma_counts_tokens_and_not_slots() -> None:
    """Under an ordinary budget a window has gaps: slots that stand side by side may be far apart in the text."""
    scores = torch.tensor([[[9.0, 1.0, 8.0, 0.0, 7.0, 2.0, 6.0]]])
    near = torch.arange(7).expand(1, 1, 7)
    far = torch.tensor([0, 20, 40, 41, 42, 60, 80]).expand(1, 1, 7)
    forced = torch.zeros(1, 1, 7, dtype=torch.bool)
    assert chunked_top_k(scores, near, 4, forced, gamma=3, alpha=0.5)[0, 0].tolist() == [0, 1, 2, 4]
    assert chunked_top_k(scores, far, 4, forced, gamma=3, alpha=0.5)[0, 0].tolist() == [0, 2, 3, 4]


# -- scores -----------------------------------------------------------------------------------------------------------


def window_view(seed: int = 0, prompt: int = 10, size: int = 24, buffer: int = 6, dtype=torch.float64) -> SlotView:
    """A view under a window: everything but `size` slots after the prompt is protected."""
    length = prompt + size + buffer
    view = random_view(B=2, H=2, N=length, queries=size + buffer, dtype=dtype, key_seed=seed)
    slot = torch.arange(length)
    protected = (slot < prompt) | (slot >= length - buffer)
    return replace(view, is_protected_BHN=protected.expand(2, 2, length).clone())


def plain_scores(view: SlotView, first: int, last: int, *, causal: bool, buffer: bool) -> Tensor:
    """s_j, one query at a time: [B, H, last - first]."""
    B, H, _, D = view.keys_BHND.shape
    out = torch.zeros(B, H, last - first, dtype=view.keys_BHND.dtype)
    for b in range(B):
        for h in range(H):
            keys = view.keys_BHND[b, h, first:last]
            votes = []
            for head in (2 * h, 2 * h + 1):
                for place, token in enumerate(view.query_positions_BT[b].tolist()):
                    if token < first or (token >= last and not buffer):
                        continue
                    logits = keys @ view.queries_BHqTD[b, head, place] * D**-0.5
                    if causal:
                        logits[torch.arange(first, last) > token] = -torch.inf
                    votes.append(logits.softmax(-1))
            out[b, h] = torch.stack(votes).mean(0)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buffer", [False, True])
def test_scores_are_attention_inside_the_window(causal: bool, buffer: bool) -> None:
    view, first, last = window_view(), 10, 34
    method = Kara(causal=causal, buffer_votes=buffer)
    window = torch.arange(first, last).expand(2, 2, 24)
    scores = method.score(view, window, torch.zeros(2, 2, 24, dtype=torch.bool))
    expected = plain_scores(view, first, last, causal=causal, buffer=buffer)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-15)
    assert torch.allclose(scores.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    kept = method.plan(view, view.positions_BHN.shape[2] - 14).kept_BHK  # 10 of 24 stay
    for b in range(2):
        for h in range(2):
            inside, _ = plain_token2chunk(expected[b, h].tolist(), 10, 8, 0.5)
            assert kept[b, h].tolist() == [*range(10), *(first + slot for slot in inside), *range(34, 40)]


def test_both_directions_see_what_only_earlier_tokens_attend_to() -> None:
    """A key that the queries before it point at and no query after it: causal scoring cannot see it."""
    view = window_view()
    keys, queries = torch.zeros_like(view.keys_BHND), torch.zeros_like(view.queries_BHqTD)
    keys[:, :, 30, 0] = 10.0
    queries[:, :, :18, 0] = 10.0  # tokens 10..27
    view = replace(view, keys_BHND=keys, values_BHND=keys, queries_BHqTD=queries)
    window, filler = torch.arange(10, 34).expand(2, 2, 24), torch.zeros(2, 2, 24, dtype=torch.bool)
    both, causal = Kara().score(view, window, filler), Kara(causal=True).score(view, window, filler)
    assert bool((both.argmax(-1) == 20).all())
    assert bool((causal.argmax(-1) != 20).all())


def test_a_window_without_own_queries_is_scored_by_later_ones() -> None:
    view = window_view()
    newest = replace(
        view, queries_BHqTD=view.queries_BHqTD[:, :, -4:], query_positions_BT=view.query_positions_BT[:, -4:]
    )
    window, filler = torch.arange(10, 34).expand(2, 2, 24), torch.zeros(2, 2, 24, dtype=torch.bool)
    for causal in (False, True):
        scores = Kara(causal=causal).score(newest, window, filler)
        torch.testing.assert_close(scores, plain_scores(newest, 10, 34, causal=causal, buffer=True))


def test_rows_with_windows_of_different_sizes_are_planned_as_each_alone() -> None:
    """Under an ordinary budget a kept prompt leaves one row fewer slots to choose from than another."""
    view = random_view(B=3, H=2, N=48, queries=20, key_seed=4)
    slot, prompts = torch.arange(48), torch.tensor([4, 17, 30])
    protected = (slot < prompts[:, None]) | (slot >= 44)
    view = replace(view, is_protected_BHN=protected[:, None].expand(3, 2, 48).clone())
    for method in (Kara(), Kara(causal=True), Kara(token2chunk=False), Kara(gamma=3, buffer_votes=True)):
        together = method.plan(view, 40)
        together.check((3, 2, 48), 40, view.is_protected_BHN)
        for row in range(3):
            one = slice(row, row + 1)
            alone = replace(
                view,
                **{
                    name: getattr(view, name)[one]
                    for name in ("keys_BHND", "values_BHND", "positions_BHN", "counts_BHN", "is_prompt_BHN")
                },
                is_protected_BHN=view.is_protected_BHN[one],
                queries_BHqTD=view.queries_BHqTD[one],
                query_positions_BT=view.query_positions_BT[one],
            )
            check_same_choice(method, [alone], [Plan(together.kept_BHK[one])], [method.plan(alone, 40)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_plans_in_float32(dtype: torch.dtype) -> None:
    view = window_view(dtype=dtype)
    Kara().plan(view, 26).check((2, 2, 40), 26, view.is_protected_BHN)


def test_a_plan_may_keep_the_protected_slots_alone() -> None:
    view = make_view(torch.randn(1, 2, 20, 8), torch.randn(1, 4, 6, 8), sinks=2, recent=4)
    assert Kara().plan(view, 6).kept_BHK[0, 0].tolist() == [0, 1, 16, 17, 18, 19]


@pytest.mark.parametrize(("field", "value"), [("gamma", 0), ("alpha", 1.5), ("alpha", -0.1), ("queries", -1)])
def test_options_that_make_no_sense_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Kara(**{field: value})


def test_the_ring_is_as_long_as_the_budget_asks() -> None:
    assert Kara().needs.queries == 576
    assert Kara().for_budget(Window(256, 32, 0.3)).needs.queries == 288
    assert Kara().for_budget(Budget(512, interval=100, recent=20, prompt="count")).needs.queries == 120
    assert Kara(queries=7).for_budget(Window(256, 32, 0.3)).needs.queries == 7


# -- in a cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("pieces", list(PIECES))
@pytest.mark.parametrize("lengths", [[LENGTH], [LENGTH, LENGTH - 4, LENGTH - 9]], ids=["single", "padded"])
def test_compressed_attention_equals_full_attention_over_the_kept_slots(
    family: str, pieces: str, lengths: list[int]
) -> None:
    model = tiny_model(family)
    ids, mask, positions = batch(lengths)
    prompts = [PROMPT - (LENGTH - length) for length in lengths]
    with CompressedCache(model, Kara(), WINDOW, prompt_lengths=prompts) as cache, sdpa_kernel(SDPBackend.MATH):
        run = run_compressed(model, cache, ids, mask, positions, PIECES[pieces])
        attention, logits = differences(model, run, ids, mask, positions, PIECES[pieces])
        assert attention <= 1e-12
        assert logits <= 1e-6
        for row in cache.rows:
            assert row.dropped == 30
            assert row.events == {"whole": 1, "chunked": 2}.get(pieces, 3)
            assert row.state.physical == LENGTH - PROMPT + row.state.prompt - 30


class Kept:
    """An observer: what every plan keeps of every row, by layer, row and event."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int, int], list[list[int]]] = {}

    def __call__(self, layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        kept = view.positions_BHN.gather(2, plan.kept_BHK)
        for place, row in enumerate(rows):
            self.seen[layer, row, int(view.event_B[place])] = kept[place].tolist()


def generated(prompts: list[Tensor], outputs: list[Tensor], max_piece: int, method: Kara, budget: Budget) -> Kept:
    """What a batch of traces keeps, fed in pieces that end at events."""
    model, log = tiny_model("qwen3"), Kept()
    rows = [TraceRow(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    lengths = [len(prompt) for prompt in prompts]
    with CompressedCache(model, method, budget, prompt_lengths=lengths, observer=log) as cache:
        for _ in feed(model, cache, rows, distances=cache.tokens_to_next_event, max_piece=max_piece):
            pass
    return log


@pytest.mark.parametrize(
    "budget", [WINDOW, Budget(30, interval=9, sinks=2, recent=4, prompt="count")], ids=["window", "budget"]
)
def test_padded_batches_equal_singles_and_pieces_equal_tokens(budget: Budget) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 200, (n,), generator=generator) for n in (9, 26, 14)]
    outputs = [torch.randint(5, 200, (n,), generator=generator) for n in (60, 48, 75)]
    together = generated(prompts, outputs, 512, Kara(), budget)
    assert together.seen == generated(prompts, outputs, 1, Kara(), budget).seen
    events = {row: sum(1 for layer, other, _ in together.seen if (layer, other) == (0, row)) for row in range(3)}
    assert all(events.values())
    for row in range(3):
        alone = generated(prompts[row : row + 1], outputs[row : row + 1], 512, Kara(), budget)
        assert len(alone.seen) == 3 * events[row]
        for (layer, _, event), kept in alone.seen.items():
            assert together.seen[layer, row, event] == kept


@pytest.mark.parametrize(
    "method", [Kara(), Kara(causal=True), Kara(token2chunk=False), Kara(buffer_votes=True, gamma=4, alpha=0.2)]
)
def test_every_option_keeps_exactly_r_of_the_window_and_freezes_them(method: Kara) -> None:
    prompt, output = torch.arange(5, 5 + PROMPT), torch.arange(20, 20 + LENGTH - PROMPT)
    log = generated([prompt], [output], 512, method, WINDOW)
    for (layer, _, event), heads in log.seen.items():
        first = PROMPT + 16 * event
        for head, kept in enumerate(heads):
            assert kept[:PROMPT] == list(range(PROMPT))
            assert sum(first <= token < first + 16 for token in kept) == WINDOW.tokens == 6
            assert kept[-5:] == list(range(first + 16, first + 21))
            if event:
                before = log.seen[layer, 0, event - 1][head][:-5]
                assert kept[: len(before)] == before


def test_options_change_what_stays() -> None:
    prompt, output = (
        torch.arange(5, 5 + PROMPT),
        torch.randint(5, 200, (60,), generator=torch.Generator().manual_seed(0)),
    )
    base = generated([prompt], [output], 512, Kara(), WINDOW).seen
    for method in (Kara(causal=True), Kara(token2chunk=False), Kara(buffer_votes=True), Kara(gamma=3)):
        assert generated([prompt], [output], 512, method, WINDOW).seen != base


def test_generate_with_a_window() -> None:
    model, (ids, mask, _) = tiny_model("llama", torch.float32), batch([20, 13])
    with CompressedCache(model, Kara(), WINDOW) as cache:
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=60, do_sample=False)
        rows = cache.stats().rows
    assert out.shape == (2, 80)
    assert [row.events for row in rows] == [3, 3]
    assert [row.physical_terminal for row in rows] == [79 - 30, 72 - 30]
    assert cache.compressed_layers[0].storage.ring.shape[1] == 21
