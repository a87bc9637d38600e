"""Sparse attention with an indexer: its keys stay with the slots, it chooses among them, and sharers hold the same."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from command_line import run as run_command
from models import batch
from torch import Tensor
from transformers import DeepseekV32Config, DynamicCache, GlmMoeDsaConfig, PreTrainedModel

from reasonkv import BudgetError, CompressedCache, UnsupportedModelError
from reasonkv.calibration.queries import collect
from reasonkv.footprint import footprint
from reasonkv.resolve import check_model
from tools.models_matrix import examine
from tools.tiny_models import tiny_config, tiny_model

LIMITS = {"tokens": 12, "interval": 4, "sinks": 1, "recent": 4, "prompt": "count"}


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_attention_over_what_the_indexer_chooses_among_the_kept_slots_is_exact(model_type: str) -> None:
    assert tiny_config(model_type).index_topk < LIMITS["tokens"]  # so that it has something to choose
    row = examine(model_type)
    assert row["verdict"] == "exact", row
    assert all(isinstance(found, float) for found in row["methods"].values()), row


def decode(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(1, 1)], 1)


def test_layers_that_share_an_indexer_hold_the_same_tokens() -> None:
    model = tiny_model("glm_moe_dsa")  # layers 1 and 3 attend to what 0 and 2 chose
    ids, _, _ = batch([40])
    with CompressedCache(model, "random", **LIMITS) as cache:
        decode(model, cache, ids)
        held = [cache.slot_positions(layer)[0] for layer in range(4)]
    assert cache.rows[0].events > 3
    assert torch.equal(held[0], held[1]) and torch.equal(held[2], held[3])
    assert not torch.equal(held[0], held[2])


def test_copies_and_moved_rows_take_the_keys_of_the_indexer_along() -> None:
    model = tiny_model("deepseek_v32")
    ids, _, _ = batch([30, 30])
    with CompressedCache(model, "keydiff", **LIMITS) as cache:
        decode(model, cache, ids)
        twin = copy.deepcopy(cache)
        twin.batch_select_indices(torch.tensor([1, 0, 1]))
        new = torch.tensor([[7, 3, 8], [9, 4, 2]])
        there = decode(model, twin, new[[1, 0, 1]])
        here = decode(model, cache, new)
    # norms and indexer round to float32, and batches of two and three are multiplied in another order
    torch.testing.assert_close(there, here[[1, 0, 1]], rtol=0, atol=1e-6)


def test_statistics_are_collected_under_the_attention_of_the_model_itself() -> None:
    model = tiny_model("deepseek_v32")
    ids = torch.randint(5, 200, (1, 40), generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(ids, past_key_values=DynamicCache(config=model.config))
    collect(model, [ids])
    handle.remove()
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-9)


def test_a_slot_takes_the_bytes_of_its_latent_vector_and_of_its_indexer_key() -> None:
    model, ids = tiny_model("glm_moe_dsa"), batch([40])[0]
    config = model.config
    with CompressedCache(model, "streaming", **LIMITS) as cache:
        decode(model, cache, ids)
    numbers = 4 * (config.kv_lora_rank + config.qk_rope_head_dim) + 2 * config.index_head_dim
    assert cache.stats().rows[0].bytes_full == 40 * numbers * 8
    assert [one.bytes_per_token for one in footprint(config)] == [numbers * 2]  # as bfloat16


def test_what_one_mask_for_all_layers_cannot_serve_is_refused_in_one_sentence() -> None:
    model = tiny_model("glm_moe_dsa")
    with pytest.raises(UnsupportedModelError, match="merges keys and values"):
        CompressedCache(model, "cask", **LIMITS)
    with pytest.raises(BudgetError, match="attend under one mask"):
        CompressedCache(model, "keydiff", stagger=2, **LIMITS)
    with pytest.raises(BudgetError, match="leave out layer_shares"):
        CompressedCache(
            model, "keydiff", **{**LIMITS, "tokens": 24}, layer_shares=range(1, 1 + model.config.num_hidden_layers)
        )
    with pytest.raises(BudgetError, match="attend under one mask"):
        CompressedCache(model, "pyramidkv:window=4", **{**LIMITS, "tokens": 24})
    with pytest.raises(UnsupportedModelError, match="indexer are not stored in fewer bits"):
        CompressedCache(model, "snapkv", dtype="int8", **LIMITS)
    assert "blocks of tokens for all KV heads" in check_model(tiny_config("qwen4_exp_text"))[0]


@pytest.mark.parametrize("config", [DeepseekV32Config, GlmMoeDsaConfig])
def test_doctor_knows_what_sparse_latent_attention_keeps_without_weights(config: type, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    code, stdout, stderr = run_command("doctor", "--model", tmp_path, "--budget", "1024", env={"COLUMNS": "160"})
    assert code == 0, stderr
    assert re.search(r"supported +yes", stdout)
    assert re.search(rf"indexed attention +{config().num_hidden_layers} +yes", stdout)
