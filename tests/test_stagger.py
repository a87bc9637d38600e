"""Layers compacted in turns: each by its own schedule, never more at once than share a turn, attention exact."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import batch, calibration, tiny_model
from oracle import differences, run_compressed

from reasonkv import Budget, BudgetError, CompressedCache, schedule
from reasonkv.evaluate.matching import budget_for_mean, mean_physical
from reasonkv.methods import layer_budgets
from reasonkv.methods.pyramidkv import PyramidKV

MODEL, LAYERS = tiny_model("qwen3"), 3
BUDGET = Budget(16, interval=6, sinks=2, recent=3, prompt="count", stagger=3)
PROMPTS, LENGTHS = [26, 13], [70, 57]


def feed(cache: CompressedCache, start: int, end: int) -> None:
    ids, mask, positions = batch(LENGTHS)
    with torch.no_grad():
        MODEL(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache
        )


@pytest.mark.parametrize("fields", [{}, {"trigger": "grid"}, {"prompt": "on_top"}, {"cut_prompt": "first_event"}])
def test_every_layer_follows_its_turn_and_no_step_compacts_two(fields: dict[str, Any]) -> None:
    budget = replace(BUDGET, **fields)
    own = [replace(budget, stagger=1, early=2 * layer) for layer in range(LAYERS)]
    assert layer_budgets(None, budget, LAYERS) == own
    states = [[schedule.Lengths(prompt=p) for p in PROMPTS] for _ in own]
    at: Counter[tuple[int, int]] = Counter()  # layers compacted, by row and its length
    with CompressedCache(MODEL, "random", budget, prompt_lengths=PROMPTS) as cache:
        for start, end in [(0, 26), *((n, n + 1) for n in range(26, 70))]:
            feed(cache, start, end)
            fed = batch(LENGTHS)[1][:, start:end].sum(-1).tolist()
            for layer, one in enumerate(own):
                for row, (state, new) in enumerate(zip(states[layer], fed, strict=True)):
                    states[layer][row], keep = schedule.step(one, state, new)
                    at[row, states[layer][row].logical] += keep is not None and start > 26
                held = [found.shape[1] for found in cache.slot_positions(layer)]
                assert held == [state.physical for state in states[layer]]
        found = cache.stats().rows
    assert max(at.values()) == 1 and sum(at.values()) >= 2 * LAYERS
    decoded = mean_physical(budget, PROMPTS, LENGTHS, layers=LAYERS)
    assert decoded == pytest.approx(sum(row.physical_mean for row in found) / 2, rel=1e-12)


@pytest.mark.parametrize("method", ["snapkv:window=6,kernel=3", "h2o", "expected", "pyramidkv:window=6,kernel=3"])
@pytest.mark.parametrize("keep", [False, True])
def test_attention_over_what_each_layer_holds_is_exact(method: str, keep: bool) -> None:
    budget = replace(BUDGET, tokens=24)
    if keep and method.startswith("pyramidkv"):
        return  # divides tokens, not shares
    budget = Budget(keep=0.3, interval=6, sinks=1, recent=6, stagger=3) if keep else budget
    ids, mask, positions = batch([60, 47, 31])
    prompts, pieces = [24, 11, 5], [24, 7, *[1] * 15, 7, 7]
    with CompressedCache(MODEL, method, budget, prompt_lengths=prompts) as cache:
        run = run_compressed(MODEL, cache, ids, mask, positions, pieces)
        assert len(cache.layer_groups) == LAYERS
        assert all(row.events for group in cache.layer_groups for row in group.rows[:1])
    attention, logits = differences(MODEL, run, ids, mask, positions, pieces)
    assert attention <= 1e-12
    assert logits <= 1e-6


def test_turns_are_spread_over_the_interval_and_over_many_layers() -> None:
    turns = [one.early for one in layer_budgets(None, Budget(64, interval=128, stagger=8), 24) if one]
    assert turns == [16 * (layer % 8) for layer in range(24)]
    divided = layer_budgets(PyramidKV(), Budget(256, stagger=2), 4)
    assert [one.early for one in divided if one] == [0, 64, 0, 64]
    assert len({one.tokens for one in divided if one}) == 4


def test_a_mean_length_is_solved_over_the_turns() -> None:
    found = budget_for_mean(replace(BUDGET, interval=60, stagger=6), 40.0, [26, 13], [300, 250], layers=6)
    assert mean_physical(found, [26, 13], [300, 250], layers=6) == pytest.approx(40, abs=0.6)
    assert found.stagger == 6 and found.early == 0


def test_records_name_turns_only_where_there_are_some() -> None:
    assert not {"stagger", "early"} & set(Budget(64).to_dict())
    assert Budget.from_dict(BUDGET.to_dict()) == BUDGET


@pytest.mark.parametrize("fields", [{"stagger": 7}, {"stagger": 0}, {"stagger": 2, "early": 2}, {"early": 6}])
def test_turns_that_cannot_be_are_one_sentence(fields: dict[str, int]) -> None:
    with pytest.raises(BudgetError, match="stagger must be"):
        Budget(16, interval=6, **fields)


def test_what_cannot_take_turns_says_so() -> None:
    with pytest.raises(BudgetError, match="cask plans all layers at once, so they cannot have budgets or turns"):
        CompressedCache(MODEL, "cask", tokens=64, stagger=2, calibration=calibration(MODEL))
