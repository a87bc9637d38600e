"""Decoders that differ from the ordinary in what they cache or how they mask it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import batch
from transformers import DynamicCache

from reasonkv import CompressedCache, UnsupportedModelError
from reasonkv.calibration.queries import collect
from reasonkv.resolve import check_model
from tools.models_matrix import examine
from tools.slot_oracle import RecordingCache
from tools.tiny_models import tiny_config, tiny_model

LIMITS = {"tokens": 12, "interval": 4, "sinks": 1, "recent": 4, "prompt": "count"}


# layers that attend to images, a mask of sliding layers that are not there, no encoder, a mask that may be more
@pytest.mark.parametrize("model_type", ["mllama", "qwen2_moe", "whisper", "gemma4_unified_text", "modernbert-decoder"])
def test_unusual_decoders_are_exact_over_the_kept_slots(model_type: str) -> None:
    row = examine(model_type)
    assert row["verdict"] == "exact", row
    found = [
        one for method, one in row["methods"].items() if (model_type, method) != ("gemma4_unified_text", "triattention")
    ]
    assert all(isinstance(one, float) for one in found), row


@pytest.mark.parametrize("model_type", ["gptj", "falcon", "trocr"])
def test_models_that_attend_by_themselves_are_exact_for_methods_that_read_keys_alone(model_type: str) -> None:
    row = examine(model_type)
    assert row["verdict"] == "keys alone", row
    assert set(row["methods"].values()) == {0.0}, row
    model = tiny_model(model_type)
    for method in ("snapkv:window=4", "triattention", "h2o", "cask", "quest"):
        with pytest.raises(UnsupportedModelError, match="attends by code of its own"):
            CompressedCache(model, method, **LIMITS)


def test_queries_that_a_model_does_not_show_are_not_collected() -> None:
    with pytest.raises(UnsupportedModelError, match="which shows no queries"):
        collect(tiny_model("gptj"), [torch.randint(5, 200, (1, 20))])


@pytest.mark.parametrize("model_type", ["gemma4_unified", "doge"])
def test_tokens_that_see_later_ones_and_masks_made_from_values_are_refused(model_type: str) -> None:
    model, (ids, _, _) = tiny_model(model_type), batch([20])
    kinds = torch.zeros_like(ids)
    kinds[:, 5:9] = 1  # tokens of an image
    options = {"mm_token_type_ids": kinds} if model_type == "gemma4_unified" else {}
    with (
        CompressedCache(model, "random", **LIMITS) as cache,
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match="more than a causal mask"),
    ):
        model(ids, past_key_values=cache, **options)


def test_the_oracle_of_attention_of_their_own_notices_one_wrong_key_and_one_wrong_position() -> None:
    model, (ids, mask, _) = tiny_model("gptj"), batch([30])
    for spoil in ("key", "row"):
        with RecordingCache(model, "random", mask_BL=mask, **LIMITS) as cache, torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
            held = cache.compressed_layers[1].storage
            if spoil == "key":
                held.keys[0, 2, 5] = held.keys[0, 2, 6]
            else:
                held.token_index[0, 2, 5] += 1
            model(ids[:, 20:21], past_key_values=cache)
        assert cache.worst > 1e-3, spoil


def test_a_model_that_attends_by_itself_runs_as_before_once_its_cache_is_detached() -> None:
    model, (ids, _, _) = tiny_model("falcon"), batch([20])
    with torch.no_grad():
        before = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        with CompressedCache(model, "keydiff", **LIMITS) as cache:
            out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
            assert cache.rows[0].events > 1 and out.shape[1] == 32
        assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, before)


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


def test_a_model_with_a_cache_class_of_its_own_runs_beams_and_copies_through_ours() -> None:
    row = examine("minimax")
    assert row["verdict"] == "exact", row
    assert all(isinstance(one, float) for one in row["methods"].values()), row
    model, (ids, _, _) = tiny_model("minimax"), batch([20, 20])
    with CompressedCache(model, "full") as cache:  # MiniMax's own class leaves the states where the beams were
        beams = model.generate(ids, past_key_values=cache, num_beams=2, max_new_tokens=8, do_sample=False)
    whole = model.generate(ids, use_cache=False, num_beams=2, max_new_tokens=8, do_sample=False)
    assert torch.equal(beams, whole)
    with CompressedCache(model, "random", **LIMITS) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        first, second = (model(ids[:, :1], past_key_values=one).logits for one in (cache, twin))
        assert torch.equal(first, second)
        cache.reset()
        assert cache.get_linear_cache(0 if model.config.layer_types[0] == "linear_attention" else 1) is None
