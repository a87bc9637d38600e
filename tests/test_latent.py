"""Latent attention: exact on every family, methods see its logits, and a slot is what the model caches."""

from __future__ import annotations

import copy

import pytest
import torch
from models import LATENT, batch, tiny_model
from test_exactness import BATCHES, LENGTH, PIECES, Case, check
from torch import Tensor
from transformers import DynamicCache

from reasonkv import Budget, CompressedCache, Plan, SlotView, UnsupportedModelError
from reasonkv.evaluate.chunks import TraceRow
from reasonkv.evaluate.reference import FullAttention
from reasonkv.resolve import check_model
from reasonkv.runtimes.transformers.latent import Expansion

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1", "youtu", "minicpm3", "mistral4", "longcat_flash",
)  # fmt: skip
BUDGET = Budget(16, interval=5, sinks=2, recent=3, prompt="count")


@pytest.mark.parametrize("family", FAMILIES)
def test_latent_attention_is_exact(family: str) -> None:
    check(Case("snapkv", family, "forward7", "padded", "sdpa", "on_top"))


@pytest.mark.parametrize("pieces", list(PIECES))
@pytest.mark.parametrize(
    "method", ["h2o", "expected", "triattention", "beaconkv", "vase-attnv", "adakv", "defensivekv", "keydiff", "oracle"]
)
def test_methods_of_every_kind_are_exact_on_latent_attention(method: str, pieces: str) -> None:
    batch_kind, kernel = ("single", "eager") if pieces == "decode" else ("padded", "reference")
    check(Case(method, "deepseek_v2", pieces, batch_kind, kernel, "count"))


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_times_keys_of_a_view_are_the_logits_of_the_model(family: str) -> None:
    model = tiny_model(family)
    seen: list[tuple[SlotView, Tensor]] = []

    def look(layer: int, rows: list[int], view: SlotView, plan: Plan) -> None:
        own = cache.layers[layer]
        keys, _ = own.expansion.expand(
            own.storage.keys[:, :, : view.positions_BHN.shape[2]], view.keys_BHND[..., LATENT["kv_lora_rank"] :]
        )
        queries = own.storage.ring.transpose(1, 2)[:, :, (view.query_positions_BT[0] % own.storage.ring.shape[1])]
        seen.append((view, queries @ keys.mT))

    ids, _, _ = batch([LENGTH])
    with CompressedCache(model, "snapkv:window=6", BUDGET, observer=look) as cache, torch.no_grad():
        for part in torch.split(ids, [24, *[1] * 36], 1):
            model(part, past_key_values=cache)
    assert seen
    for view, logits in seen:
        assert view.keys_BHND.shape[1:] == (
            1,
            view.positions_BHN.shape[2],
            LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"],
        )
        assert view.group_size == 4
        found = (view.queries_BHgTD() @ view.keys_BHND[:, :, None].mT)[:, 0]
        torch.testing.assert_close(found, logits, atol=1e-12, rtol=0)


def test_values_of_a_view_times_its_output_projection_are_what_a_token_adds_to_the_layer() -> None:
    model = tiny_model("deepseek_v3")
    attention = model.model.layers[0].self_attn
    expansion = Expansion(attention.expand_kv, LATENT["kv_lora_rank"], LATENT["qk_rope_head_dim"])
    latents = torch.randn(1, 1, 5, LATENT["kv_lora_rank"], dtype=torch.float64)
    _, values = attention.expand_kv(latents, latents[..., :8])
    output = attention.o_proj.weight.detach().view(-1, 4, LATENT["v_head_dim"]).permute(1, 2, 0)
    torch.testing.assert_close(latents[0] @ expansion.project(output, latents), values[0] @ output, atol=1e-12, rtol=0)


def test_a_slot_takes_the_bytes_of_its_latent_vector() -> None:
    model = tiny_model("deepseek_v3")
    ids, _, _ = batch([LENGTH])
    with CompressedCache(model, "streaming", BUDGET) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
    layers, numbers = 3, LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]
    assert cache.stats().rows[0].bytes_full == LENGTH * layers * numbers * 8
    assert cache.stats().bytes_allocated == 21 * layers * numbers * 8


def test_the_attention_still_to_come_is_that_of_the_model() -> None:
    model = tiny_model("deepseek_v3", torch.float32, kernel="eager")
    ids, _, _ = batch([LENGTH])
    future = FullAttention.collect(model, [TraceRow(ids[0, :24], torch.cat([ids[0, 24:], ids[0, :1]]))])
    with torch.no_grad():
        paid = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(paid):
        expected = weights[0].mean(0, keepdim=True)[:, 30:].sum(1)
        torch.testing.assert_close(future.received(layer, 0, 30, LENGTH), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("method", "words"), [("cask", "merges keys and values"), ("quest", "selects per KV head")])
def test_what_needs_keys_of_each_head_is_refused_in_one_sentence(method: str, words: str) -> None:
    model = tiny_model("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        CompressedCache(model, method, BUDGET)
    assert str(caught.value).endswith("snapkv.")
    assert check_model(model) == []


def test_a_model_runs_as_before_once_its_cache_is_detached() -> None:
    model = tiny_model("glm4_moe_lite")
    ids, _, _ = batch([LENGTH])
    with torch.no_grad():
        before = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        with CompressedCache(model, "snapkv:window=6", BUDGET) as cache:
            model(ids[:, :24], past_key_values=cache)
            assert torch.equal(model(ids, past_key_values=DynamicCache(config=model.config)).logits, before)
        after = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", list(BATCHES))
def test_a_copied_cache_of_latent_attention_goes_on_as_the_original(kind: str) -> None:
    model = tiny_model("minicpm3")
    ids, mask, _ = batch(BATCHES[kind])
    with (
        CompressedCache(model, "snapkv:window=6", BUDGET, prompt_lengths=mask[:, :30].sum(1).tolist()) as cache,
        torch.no_grad(),
    ):
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        twin = copy.deepcopy(cache)
        one, other = (
            [
                model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=used).logits
                for t in range(30, 50)
            ]
            for used in (cache, twin)
        )
        twin.detach()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
