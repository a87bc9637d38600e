"""Positions and keys beyond the ordinary: shared keys, soft caps, frequencies that change, positions of several axes."""

from __future__ import annotations

import copy

import pytest
import torch
from models import COMMON, HEAD, batch, tiny_model
from oracle import differences, run_compressed
from test_exactness import BATCHES, LENGTH, PIECES, Case, check
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from reasonkv import Budget, CompressedCache, UnsupportedModelError
from reasonkv.resolve import check_model
from reasonkv.rotary import RotaryError
from tools.slot_oracle import RecordingCache

BUDGET = Budget(16, interval=5, sinks=2, recent=3, prompt="count")
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
    "original_max_position_embeddings": 40,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("batch_kind", list(BATCHES))
@pytest.mark.parametrize("family", ["gemma2", "gemma3n", "gemma4"])
def test_soft_caps_shared_keys_and_head_sizes_of_each_layer_are_exact(family: str, batch_kind: str) -> None:
    check(Case("snapkv", family, "forward7", batch_kind, "reference", "on_top"))
    check(Case("h2o", family, "decode" if batch_kind == "single" else "chunked", batch_kind, "reference", "count"))


def test_shared_keys_are_compacted_after_their_last_reader() -> None:
    model = tiny_model("gemma3n")
    ids, _, _ = batch([LENGTH])
    with CompressedCache(model, "streaming", BUDGET) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    assert [layer.readers for layer in cache.compressed_layers] == [1, 2]
    assert cache.rows[0].state.physical == 16


@pytest.mark.parametrize("batch_kind", list(BATCHES))
@pytest.mark.parametrize("family", ["glm4", "cohere"])
@pytest.mark.parametrize("method", ["expected", "triattention", "cask:fold=neighbours"])
def test_methods_that_unrotate_are_exact_on_interleaved_pairs(family: str, batch_kind: str, method: str) -> None:
    check(Case(method, family, "forward7", batch_kind, "sdpa", "count"))


def text_model(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).double().eval()


def difference(model: PreTrainedModel, method: str, lengths: list[int], pieces: list[int]) -> float:
    ids, mask, positions = batch(lengths)
    prompts = [max(1, pieces[0] - (max(lengths) - length)) for length in lengths]
    with CompressedCache(model, method, BUDGET, prompt_lengths=prompts, kernel="reference") as cache:
        run = run_compressed(model, cache, ids, mask, positions, pieces)
    return differences(model, run, ids, mask, positions, pieces)[0]


@pytest.mark.parametrize("lengths", list(BATCHES.values()), ids=list(BATCHES))
def test_frequencies_that_grow_with_the_text_leave_kept_keys_as_they_were(lengths: list[int]) -> None:
    model = text_model(LlamaConfig(**{**COMMON, "max_position_embeddings": 32}, rope_parameters=DYNAMIC))
    assert difference(model, "snapkv:window=6", lengths, PIECES["forward7"]) <= 1e-12
    assert difference(model, "h2o", lengths, PIECES["decode"]) <= 1e-12
    with pytest.raises(RotaryError, match="'dynamic' changes its frequencies"):
        CompressedCache(model, "expected", BUDGET)


def phi3() -> PreTrainedModel:
    config = Phi3Config(**{**COMMON, "max_position_embeddings": 160}, rope_parameters=dict(LONGROPE))
    config.original_max_position_embeddings = 40
    return text_model(config)


def test_a_switch_of_frequencies_is_refused_before_it_corrupts_kept_keys() -> None:
    model = phi3()
    ids, _, _ = batch([LENGTH])
    assert difference(model, "snapkv:window=6", [36], [24, *[1] * 12]) <= 1e-12
    assert difference(model, "snapkv:window=6", [LENGTH], [44, *[1] * 16]) <= 1e-12  # beyond it from the start
    with pytest.raises(RotaryError, match="'longrope' changes its frequencies"):
        CompressedCache(model, "triattention", BUDGET)
    with CompressedCache(model, "snapkv:window=6", BUDGET) as cache, torch.no_grad():
        model(ids[:, :38], past_key_values=cache)
        with pytest.raises(UnsupportedModelError, match=r"frequencies after 40 tokens.*end the answer before"):
            model(ids[:, 38:44], past_key_values=cache)
    with (
        CompressedCache(model, "snapkv:window=6", BUDGET) as cache,
        pytest.raises(UnsupportedModelError, match="frequencies after 40 tokens"),
    ):  # where `generate` would go on with a cache of its own
        model.generate(ids[:, :30], past_key_values=cache, max_new_tokens=20, do_sample=False)
    cache.reset()
    with cache:
        cache.attach()
        assert model.generate(ids[:, :30], past_key_values=cache, max_new_tokens=10, do_sample=False).shape[1] == 40


def test_transformers_leaves_cached_keys_in_the_frequencies_that_they_were_rotated_by() -> None:
    """Why no key is un-rotated here: its frequencies depend on when it was cached, which no position tells."""
    model, (ids, _, _) = phi3(), batch([LENGTH])
    cache, whole = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :38], past_key_values=cache)
        before = cache.layers[0].keys.clone()
        model(ids[:, 38:44], past_key_values=cache)
        model(ids[:, :44], past_key_values=whole)
    assert torch.equal(cache.layers[0].keys[:, :, :38], before)  # by the short factors
    gaps = (cache.layers[0].keys - whole.layers[0].keys).abs().amax(dim=(0, 1, 3))
    assert gaps[38:].max() < 1e-12 < 1e-3 < gaps[1:38].min()  # all by the long ones


def vision_model(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    text = {
        **COMMON,
        **HEAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    tokens = {"image_token_id": 200, "video_token_id": 201, "vision_start_token_id": 202, "vision_end_token_id": 203}
    if family == "qwen2_5_vl":
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]}, **tokens)
        )
    else:
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}, **tokens)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=0.07)
    return model.double().eval()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_text_through_a_model_of_images_is_the_same_as_through_its_text_model(family: str) -> None:
    model = vision_model(family)
    assert check_model(model) == []
    ids, _, _ = batch([LENGTH])
    ids = ids.clamp(max=199)
    budget = Budget(16, interval=5, sinks=2, recent=3, prompt="count")
    for method in ("snapkv:window=6", "expected"):
        with CompressedCache(model, method, budget, kernel="reference") as cache:
            output = model.generate(ids[:, :24], past_key_values=cache, max_new_tokens=20, do_sample=False)
            held = cache.slot_positions(1)[0]
        assert cache.rows[0].events > 3
        with CompressedCache(model, method, budget, kernel="reference") as cache, torch.no_grad():
            for column in range(23, 43):
                start = 0 if column == 23 else column
                model(output[:, start : column + 1], past_key_values=cache)
            assert torch.equal(cache.slot_positions(1)[0], held)


def with_image(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A prompt of 28 tokens, four of which are an image's."""
    side = model.config.vision_config.patch_size
    patches = torch.randn(16, 3 * model.config.vision_config.temporal_patch_size * side * side, dtype=torch.float64)
    ids = torch.tensor([[5, 6, 202, 200, 200, 200, 200, 203, *range(10, 30)]])
    grid = torch.tensor([[1, 4, 4]])
    return ids, {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == 200).long()}


@pytest.mark.parametrize("prompt", ["on_top", "count"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_with_an_image_is_exact_and_a_kept_prompt_keeps_the_image(family: str, prompt: str) -> None:
    model = vision_model(family)
    ids, image = with_image(model)
    budget = Budget(16, interval=5, sinks=2, recent=3, prompt=prompt)
    for method in ("snapkv:window=6", "random"):
        seen = torch.ones(1, ids.shape[1] + 40, dtype=torch.long)
        with RecordingCache(model, method, budget, mask_BL=seen, kernel="reference") as cache:
            output = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False, **image)
        assert output.shape[1] == ids.shape[1] + 40
        assert cache.rows[0].events > 3
        assert cache.worst <= 1e-12 and cache.calls == 40 * len(cache.compressed_layers)
        held = cache.slot_positions(1)[0][0, : ids.shape[1]]
        assert torch.equal(held, torch.arange(len(held))) == (prompt == "on_top")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_methods_that_unrotate_refuse_images_whose_positions_differ_between_axes(family: str) -> None:
    model = vision_model(family)
    ids, image = with_image(model)
    with (
        CompressedCache(model, "expected", BUDGET) as cache,
        pytest.raises(UnsupportedModelError, match="images have several rotary positions"),
    ):
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **image)
