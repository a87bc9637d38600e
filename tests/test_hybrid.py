"""Hybrid models: full attention is bounded, recurrent layers stay stock, and every architecture keeps its promise."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import run as run_command
from models import batch
from tiny import TASK
from transformers import PreTrainedModel, Qwen3NextConfig
from transformers.cache_utils import LinearAttentionLayer

from reasonkv import CompressedCache
from reasonkv.calibration.queries import collect
from reasonkv.evaluate.job import BudgetOptions, GenerateJob, ReplayJob, TraceSettings
from reasonkv.evaluate.run import run
from reasonkv.footprint import footprint, total_bytes
from reasonkv.identity import model_hash
from reasonkv.layers import bounded_layers, layer_rotaries
from reasonkv.models import LoadedModel
from reasonkv.resolve import UnsupportedModelError
from reasonkv.runtimes.transformers.layer import CompressedLayer
from tools.models_matrix import examine, examine_apart
from tools.testbed.tokenizer import make_tokenizer
from tools.tiny_models import architectures, tiny_config, tiny_model

# a state beside attention, both in one layer, shared attention, convolutions, layers without rotation
SAMPLE = ["qwen3_next", "nemotron_h", "falcon_h1", "zamba2", "lfm2", "granitemoehybrid", "smollm3"]
LIMITS = {"tokens": 12, "interval": 4, "sinks": 1, "recent": 4, "prompt": "count"}


@cache
def hybrid() -> PreTrainedModel:
    return tiny_model("qwen3_next")


@pytest.mark.parametrize("model_type", SAMPLE)
def test_hybrid_models_are_exact_over_the_kept_slots(model_type: str) -> None:
    row = examine(model_type)
    assert row["verdict"] == "exact", row
    assert all(isinstance(found, float) for found in row["methods"].values()), row


@pytest.mark.full
@pytest.mark.parametrize("model_type", architectures())
def test_no_causal_architecture_is_wrong(model_type: str) -> None:
    row = examine_apart(model_type)
    assert row["verdict"] != "wrong", row
    assert row["verdict"] == "exact" or row["why"]


def test_only_layers_that_grow_are_bounded() -> None:
    ids = torch.randint(5, 200, (1, 16_000), generator=torch.Generator().manual_seed(0))
    held = []
    for size in (2_000, 16_000):
        spec = "snapkv:window=4,kernel=3"
        with CompressedCache(hybrid(), spec, prompt_lengths=[500], **LIMITS) as cache, torch.no_grad():
            for part in ids[:, :size].split(500, 1):
                hybrid()(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
            stats = cache.stats()
        assert stats.rows[0].length == size
        held.append((stats.bytes_allocated, stats.bytes_allocated_peak, stats.bytes_beside))
    kinds = [isinstance(layer, CompressedLayer) for layer in cache.layers]
    assert kinds == [False, True, False, True]
    assert type(cache.layers[0]) is LinearAttentionLayer
    assert held[0] == held[1]
    assert cache.stats().compressed_layers == 2 and cache.stats().other_layers == 2


def test_reset_forgets_the_states_and_takes_another_number_of_rows() -> None:
    ids, _, _ = batch([30, 30])
    model, made = hybrid(), []
    with CompressedCache(model, "random", **LIMITS) as cache:
        for rows in (2, 1, 2):
            made.append(model.generate(ids[:rows], past_key_values=cache, max_new_tokens=8, do_sample=False))
            cache.reset()
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0][:1], made[1])


def test_copies_and_moved_rows_take_their_states_along() -> None:
    ids, _, _ = batch([30, 30])
    model = hybrid()
    with CompressedCache(model, "keydiff", **LIMITS) as cache, torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        twin.batch_select_indices(torch.tensor([1, 0, 1]))
        next_ids = torch.tensor([[7], [9]])
        there = model(next_ids[[1, 0, 1]], past_key_values=twin, use_cache=True).logits
        here = model(next_ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(there, here[[1, 0, 1]], rtol=0, atol=1e-9)


def test_padding_between_the_tokens_of_a_row_is_refused_because_a_state_would_take_it_in() -> None:
    ids, mask, _ = batch([30, 30])
    with CompressedCache(hybrid(), "random", prompt_lengths=[20, 20], **LIMITS) as cache, torch.no_grad():
        hybrid()(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache, use_cache=True)
        mask[1, 10:15] = 0
        with pytest.raises(UnsupportedModelError, match="padded between its tokens"):
            hybrid()(ids[:, 10:20], attention_mask=mask[:, :20], past_key_values=cache, use_cache=True)
        cache.reset()
        hybrid()(ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache, use_cache=True)  # ends in padding
        with pytest.raises(UnsupportedModelError, match="padded between its tokens"):
            hybrid()(ids[:, 15:16], attention_mask=mask[:, :16], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("model_type", ["qwen3_next", "nemotron_h"])
def test_statistics_are_of_the_layers_that_attend_and_serve_methods_without_rotation(model_type: str) -> None:
    model = tiny_model(model_type)
    found = collect(model, [torch.randint(5, 200, (2, 48))], horizon=True)
    attending = bounded_layers(model.config)
    assert all((found.modulus_LHqF[layer].max() > 0) == (layer in attending) for layer in range(found.layers))
    rotates = [bool(rotary.inv_freq.any()) for rotary in layer_rotaries(model.config)]
    assert rotates == [model_type == "qwen3_next" and layer in attending for layer in range(found.layers)]
    ids, _, _ = batch([30])
    with CompressedCache(model, "triattention", calibration=found, **LIMITS) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert cache.rows[0].events > 0


def test_the_footprint_of_a_configuration_is_what_a_cache_holds() -> None:
    config = tiny_config("qwen3_next")
    kinds = {one.kind: one for one in footprint(config)}
    assert kinds["full attention"].bounded and not kinds["linear attention"].bounded
    full = kinds["full attention"]
    assert (full.layers, full.bytes_per_token, full.bytes_fixed) == (2, 2 * 2 * 2 * 16 * 2, 0)  # bfloat16
    assert kinds["linear attention"].bytes_per_token == 0 and kinds["linear attention"].bytes_fixed > 0
    assert total_bytes([full], 1000, 100) == 100 * full.bytes_per_token
    real = {one.kind: one for one in footprint(Qwen3NextConfig(num_hidden_layers=4))}  # 80B: no weights are made
    assert real["full attention"].bytes_per_token == 2 * 2 * 256 * real["full attention"].layers * 2


def test_replay_and_generate_run_on_a_hybrid(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = tiny_model("qwen3_next", vocab_size=len(tokenizer)).float()
    loaded = LoadedModel("hybrid", model, tokenizer, model_hash(model))
    common = {
        "task": [TASK],
        "methods": ["full", "keydiff"],
        "budget": BudgetOptions(tokens=[16], interval=8, prompt="count"),
        "limit": 2,
    }
    records = run(ReplayJob(**common, traces=TraceSettings(max_new_tokens=24)), loaded, tmp_path / "replay")
    assert len(records) == 4
    kl = {kind: [one.kl for one in records if (one.method == "full") == kind] for kind in (True, False)}
    assert max(kl[True]) < 1e-9 < min(kl[False]), kl
    answers = run(GenerateJob(**common, max_new_tokens=24), loaded, tmp_path / "answers")
    assert len(answers) == 4


def test_doctor_prints_what_each_kind_of_layer_keeps_from_the_configuration_alone(tmp_path: Path) -> None:
    Qwen3NextConfig(architectures=["Qwen3NextForCausalLM"]).save_pretrained(tmp_path)
    code, stdout, _ = run_command("doctor", "--model", tmp_path, "--budget", "1024", env={"COLUMNS": "160"})
    assert code == 0
    assert re.search(r"full attention +12 +yes", stdout) and re.search(r"36 +stock", stdout)
    code, _, stderr = run_command("doctor", "--budget", "0")
    assert code == 2 and "budget must be a whole number of at least 1, not 0." in stderr
