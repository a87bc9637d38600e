"""Uses of a cache, budgets and models that are refused, in one sentence each."""

from __future__ import annotations

import pytest
import torch
from models import batch, tiny_model
from test_generate import BUDGET, FAMILIES, generate

from reasonkv import Budget, BudgetError, CompressedCache, UnsupportedModelError
from reasonkv.runtimes.transformers import check_model


def test_unsupported_uses_are_refused_in_one_sentence() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([20])
    with CompressedCache(model, "keydiff", BUDGET) as cache:
        with pytest.raises(UnsupportedModelError, match="rolled back"):
            cache.crop(-1)
        with pytest.raises(UnsupportedModelError, match=r"no_grad"):
            model(ids, past_key_values=cache)
        cache.reset()
        square = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="4-D"):
            model(ids, attention_mask=square, past_key_values=cache)
        for speculation in ({"assistant_model": tiny_model("qwen3", torch.float32)}, {"prompt_lookup_num_tokens": 3}):
            cache.reset()
            with pytest.raises(UnsupportedModelError, match="rolled back"):
                generate(model, ids, mask, cache, **speculation)
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        CompressedCache(model, "keydiff", BUDGET, kernel="flex_attention")


def test_contradictory_budgets_are_refused_in_one_sentence() -> None:
    model = tiny_model("qwen3", torch.float32)
    ids, mask, _ = batch([30])
    with pytest.raises(BudgetError, match="needs a budget"):
        CompressedCache(model, "keydiff")
    with pytest.raises(BudgetError, match="takes no budget"):
        CompressedCache(model, "full", BUDGET)
    with pytest.raises(BudgetError, match=r"24 tokens cannot hold 2 sinks and 30 recent"):
        CompressedCache(model, "snapkv:window=30", BUDGET)
    budget = Budget(32, sinks=2, recent=6, prompt="keep")
    with CompressedCache(model, "keydiff", budget) as cache, pytest.raises(BudgetError, match="30 tokens and 6 recent"):
        generate(model, ids, mask, cache)
    with (
        CompressedCache(model, "keydiff", BUDGET, prompt_lengths=[5, 5]) as cache,
        pytest.raises(BudgetError, match="2 entries for a batch of 1"),
    ):
        generate(model, ids, mask, cache)


def test_models_that_cannot_be_served_are_named() -> None:
    from transformers import (
        BambaConfig,
        BartConfig,
        BloomConfig,
        MistralConfig,
    )

    cases = {
        "encoder-decoder": BartConfig(),
        "carry a state": BambaConfig(),  # without attention layers by default
        "all slide": MistralConfig(sliding_window=128),
        "ALiBi": BloomConfig(),
    }
    for words, config in cases.items():
        problems = check_model(config)
        assert problems, words
        assert any(words in problem for problem in problems), (words, problems)
        assert all(problem.count(".") >= 1 and "\n" not in problem for problem in problems)
    for family in FAMILIES:
        assert check_model(tiny_model(family, torch.float32)) == []
