"""Selection in a cache: statistics, rows that move, generation, later turns, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from models import batch, tiny_model
from oracle import run_compressed
from torch import Tensor

from reasonkv import Budget, BudgetError, CompressedCache
from reasonkv.methods.quest import Quest

LENGTHS, PROMPTS = [60, 47, 31], [24, 11, 1]
C, PAGES = 4, 3
BUDGET = Budget(C * PAGES + 1, sinks=0, recent=0, prompt="count")


def run(model, method, budget, pieces, lengths=LENGTHS, prompts=PROMPTS, kernel=None):
    ids, mask, positions = batch(lengths)
    with CompressedCache(model, method, budget, prompt_lengths=prompts, kernel=kernel) as cache:
        out = run_compressed(model, cache, ids, mask, positions, pieces)
        return out, cache.stats(), cache, mask.bool()


# -- life of a cache ---------------------------------------------------------------------------------------------------


def test_stats_tell_slots_read_from_slots_held() -> None:
    model = tiny_model("qwen3")
    _, stats, _, _ = run(model, Quest(page_size=C), BUDGET, [24] + [1] * 36, [60], [24])
    (row,) = stats.rows
    read = [min(token // C, PAGES - 1) * C + token % C + 1 for token in range(24, 60)]
    assert row.slots_read_mean == pytest.approx(sum(read) / len(read))
    assert row.slots_read_mean <= BUDGET.tokens
    assert (row.physical_terminal, row.events, row.tokens_dropped) == (60, 0, 0)
    page, slot = 3 * 2 * 2 * 16 * 8, 3 * 2 * 2 * 16 * 8  # layers, heads, two vectors, D, float64
    assert row.bytes_held == row.bytes_full + 15 * page
    pages_scored = sum(token // C for token in range(24, 60)) / 36
    assert row.bytes_read_mean == pytest.approx(row.slots_read_mean * slot + pages_scored * page)
    _, full, _, _ = run(model, "full", None, [24] + [1] * 36, [60], [24])
    assert full.rows[0].slots_read_mean is None and full.rows[0].bytes_held == row.bytes_full


def test_rows_move_with_their_pages() -> None:
    """Beams: reordered, repeated and copied rows go on as they would have alone."""
    model = tiny_model("qwen3")
    ids, _, positions = batch([40, 40])

    def feed(cache: CompressedCache, rows: Tensor, start: int, end: int) -> Tensor:
        with torch.no_grad():
            return model(
                rows[:, start:end], past_key_values=cache, position_ids=positions[: len(rows), start:end]
            ).logits

    with CompressedCache(model, Quest(page_size=C), BUDGET) as cache:
        feed(cache, ids, 0, 20)
        for token in range(20, 30):
            feed(cache, ids, token, token + 1)
        twin = copy.deepcopy(cache)
        wanted = torch.cat([feed(cache, ids, token, token + 1) for token in range(30, 40)], 1)
        twin.reorder_cache(torch.tensor([1, 0]))
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([1, 3]))
        found = torch.cat([feed(twin, ids.flip(0), token, token + 1) for token in range(30, 40)], 1)
        assert (found.flip(0) - wanted).abs().max() <= 1e-12
        assert twin.stats().rows[0] == cache.stats().rows[1]
        cache.reset()
        assert cache.session.reader is not None and not cache.session.reader.tables


def test_generate_runs_and_greedy_text_with_all_pages_is_full_kvs() -> None:
    model = tiny_model("qwen3")
    ids, mask, _ = batch([30, 21])
    texts = []
    for method, budget in (
        ("full", None),
        (Quest(page_size=C), Budget(200, prompt="count")),
        (Quest(page_size=C), BUDGET),
    ):
        with CompressedCache(model, method, budget) as cache:
            texts.append(
                model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, past_key_values=cache)
            )
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_a_later_turn_is_decode_unless_the_prompt_is_reopened() -> None:
    model = tiny_model("qwen3")
    ids, _, positions = batch([60])
    runs = {}
    for name, method, budget, reopen in (
        ("full", "full", None, False), ("decode", Quest(page_size=C), BUDGET, False),
        ("reopened", Quest(page_size=C), BUDGET, True),
    ):  # fmt: skip
        with CompressedCache(model, method, budget, reopen_prompt=reopen) as cache, torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:21], past_key_values=cache)
            runs[name] = model(ids[:, 21:50], past_key_values=cache, position_ids=positions[:, 21:50]).logits
    # token 20 was read sparsely in both, so the turn's own tokens differ from full KV's, but less where it reads all
    gap = {name: (found - runs["full"]).abs().mean() for name, found in runs.items()}
    assert 0 < gap["reopened"] < gap["decode"]


@pytest.mark.parametrize(
    "method,budget,words",
    [
        (Quest(), Budget(15, sinks=0, recent=0, prompt="count"), "at least 16"),
        (Quest(first=1), Budget(20, sinks=0, recent=0, prompt="count"), "at least 32"),
        (Quest(), None, "needs a budget"),
    ],
)
def test_budgets_that_cannot_be_read_with_are_one_sentence(method: Quest, budget: Budget | None, words: str) -> None:
    with pytest.raises(BudgetError, match=words):
        CompressedCache(tiny_model("qwen3"), method, budget)


def test_a_prompt_in_pieces_must_be_announced_and_options_are_checked() -> None:
    model = tiny_model("qwen3")
    ids, _, _ = batch([20])
    with CompressedCache(model, Quest(page_size=C), BUDGET) as cache, torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        with pytest.raises(BudgetError, match="prompt_lengths"):
            model(ids[:, 10:], past_key_values=cache)
    for options in ({"page_size": 0}, {"share": "mean"}, {"last": 0}, {"first": -1}, {"dense": -1}):
        with pytest.raises(ValueError):
            Quest(**options)
