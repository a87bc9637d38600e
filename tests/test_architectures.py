"""Decoders that differ from the ordinary in what they cache or how they mask it."""

from __future__ import annotations

import pytest
import torch
from models import batch
from transformers import DynamicCache

from reasonkv import CompressedCache, UnsupportedModelError
from reasonkv.resolve import check_model
from tools.models_matrix import examine
from tools.tiny_models import tiny_config, tiny_model

LIMITS = {"tokens": 12, "interval": 4, "sinks": 1, "recent": 4, "prompt": "count"}


# layers that attend to images, a mask of sliding layers that are not there, no encoder
@pytest.mark.parametrize("model_type", ["mllama", "qwen2_moe", "whisper"])
def test_unusual_decoders_are_exact_over_the_kept_slots(model_type: str) -> None:
    row = examine(model_type)
    assert row["verdict"] == "exact", row
    assert all(isinstance(found, float) for found in row["methods"].values()), row


def test_a_decoder_without_its_encoder_is_bounded_in_its_own_layers() -> None:
    model = tiny_model("bart", encoder_layers=2, encoder_attention_heads=2, decoder_layers=3)
    ids, mask, _ = batch([30, 30])
    stock = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=False)
    with CompressedCache(model, "full") as cache:
        assert len(cache.compressed_layers) == 3
        full = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(stock, full)
    with CompressedCache(model, "snapkv:window=4", **LIMITS) as cache:
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert cache.rows[0].events > 0
    assert "only its decoder alone" in check_model(tiny_config("bart"))[0]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("diffllama", "values of one KV head"), ("inkling_text", "bias by distance"), ("jetmoe", "repeats its KV heads")],
)
def test_attention_that_kept_slots_would_falsify_is_refused_for_its_true_reason(model_type: str, words: str) -> None:
    assert words in check_model(tiny_config(model_type))[0]


def test_a_decoder_that_reads_an_encoder_is_refused_before_its_keys_are_mixed_with_the_texts() -> None:
    model, (ids, _, _) = tiny_model("bart"), batch([30])
    states = torch.zeros(1, 5, model.config.d_model, dtype=torch.float64)
    with (
        CompressedCache(model, "random", **LIMITS) as cache,
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="caches twice in one forward"),
    ):
        model(ids, past_key_values=cache, encoder_hidden_states=states)


def test_a_layer_shows_the_keys_it_holds_as_a_stock_layer_does() -> None:
    model, (ids, _, _) = tiny_model("llama"), batch([20])
    with CompressedCache(model, "full") as cache, torch.no_grad():
        assert cache.layers[0].keys is None and cache.layers[0].values is None
        model(ids, past_key_values=cache)
        stock = DynamicCache(config=model.config)
        model(ids, past_key_values=stock)
        torch.testing.assert_close(cache.layers[1].keys, stock.layers[1].keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(cache.layers[1].values, stock.layers[1].values, rtol=0, atol=1e-12)
