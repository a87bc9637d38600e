"""Hybrid models: layers that grow are bounded; sliding windows, states and convolutions stay as vLLM makes them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    FULL_KV,
    Watcher,
    bounded_managers,
    engine,
    free_blocks,
    greedy,
    manager_of,
    reference,
    runtime_of,
    serve,
)
from transformers import PreTrainedModel
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from reasonkv import Budget
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig, ServingError
from reasonkv.runtimes.vllm.setup import bounded_specs, budgets_by_layer
from tools.tiny_models import VOCABULARY, tiny_config, tiny_model

SEED = 7
SMALL = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
BUDGET = Budget(**SMALL)
FULL, SLIDING = "full_attention", "sliding_attention"
MAMBA2 = {"hidden_size": 128, "mamba_d_head": 32, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    # two groups of two full-attention layers, which have block tables of their own, beside two that slide
    "gemma3_text": {"head_dim": 32, "num_hidden_layers": 6, "layer_types": [FULL, SLIDING, FULL, FULL, SLIDING, FULL]},
    "falcon_h1": {"head_dim": 32, "num_hidden_layers": 2},  # attention and Mamba-2 in every layer
    "granitemoehybrid": MAMBA2 | {"layer_types": ["linear_attention", FULL]},
    "gpt_oss": {"head_dim": 32, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
}
OTHER_TEXT: dict[str, dict[str, Any]] = {
    # short convolutions; on a CPU stock vLLM's text differs from that of transformers and changes with the batch
    "lfm2": {
        "hidden_size": 128, "num_hidden_layers": 2, "layer_types": ["conv", FULL], "conv_dim": 128,
        "conv_dim_out": 128, "block_dim": 128, "block_ff_dim": 128, "block_multiple_of": 32,
    },
    # gated delta net; vLLM's kernel for CPUs takes bfloat16 and heads of 128
    "qwen3_next": {
        "head_dim": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", FULL],
    },
}  # fmt: skip
"""Models whose text cannot be compared between the runtimes; the slots that `random` keeps can."""


@dataclass
class Hybrid:
    """A tiny random model in both runtimes."""

    model: PreTrainedModel
    llm: Any


@contextmanager
def served(name: str, changes: dict[str, Any], where: Path, dtype: torch.dtype = torch.float32) -> Iterator[Hybrid]:
    """A model in both runtimes."""
    model = tiny_model(name, **changes).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(where)
    options = {"scheduler_cls": SCHEDULER, "block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 512}
    # vLLM's Mamba-2 kernel for CPUs keeps no states inside a prompt, which prefix caching would ask for
    options |= {"skip_tokenizer_init": True, "enable_prefix_caching": "mamba" not in str(vars(model.config))}
    with engine(where, {"method": "random", "seed": SEED, **SMALL}, dtype=str(dtype)[6:], **options) as llm:
        yield Hybrid(model, llm)


@pytest.fixture(
    scope="module",
    params=[
        name if name in ("gemma3_text", "falcon_h1") else pytest.param(name, marks=pytest.mark.full)
        for name in FAMILIES
    ],
)
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hybrid]:
    with served(request.param, FAMILIES[request.param], tmp_path_factory.mktemp(request.param)) as made:
        yield made


def asked(*lengths: int) -> list[list[int]]:
    made = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(5, VOCABULARY, (length,), generator=made).tolist() for length in lengths]


@pytest.mark.parametrize("method", ["random", "expected"])
def test_all_tokens_and_kept_slots_equal_the_transformers_runtimes(hybrid: Hybrid, method: str) -> None:
    runtime_of(hybrid.llm).use(EngineConfig.parse({"method": method, "seed": SEED, **SMALL}))
    before, prompts = free_blocks(hybrid.llm), asked(12, 40, 71, 130)
    mine = serve(hybrid.llm, prompts, greedy(100))
    theirs = reference(method, BUDGET, prompts, 100, model=hybrid.model, seed=SEED)
    assert mine.tokens == theirs.tokens
    assert mine.kept.keys() == theirs.kept.keys() and theirs.kept
    for key, kept in theirs.kept.items():
        assert torch.equal(mine.kept[key], kept), key
    assert free_blocks(hybrid.llm) == before


@pytest.mark.full
@pytest.mark.parametrize("name", OTHER_TEXT)
def test_models_whose_text_differs_keep_the_same_slots(name: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if name == "qwen3_next" else torch.float32
    with served(name, OTHER_TEXT[name], tmp_path, dtype) as one:
        before, prompts = free_blocks(one.llm), asked(12, 40, 71, 130)
        mine = serve(one.llm, prompts, greedy(100))
        theirs = reference("random", BUDGET, prompts, 100, model=one.model, seed=SEED)
        assert mine.kept.keys() == theirs.kept.keys() and theirs.kept
        for key, kept in theirs.kept.items():
            assert torch.equal(mine.kept[key], kept), key
        assert free_blocks(one.llm) == before


def test_a_request_that_opts_out_keeps_full_kv_beside_compressed_ones(hybrid: Hybrid) -> None:
    runtime_of(hybrid.llm).use(EngineConfig.parse({"method": "random", "seed": SEED, **SMALL}))
    prompts = asked(90, 47, 64)
    watcher = Watcher(hybrid.llm)
    for number, ids in enumerate(prompts):
        watcher.add(str(number), ids, 150, extra_args=FULL_KV if number == 1 else None)
    watcher.run()
    compressed = reference("random", BUDGET, prompts, 150, model=hybrid.model, seed=SEED).tokens
    stock = reference("full", None, prompts, 150, model=hybrid.model).tokens
    assert [watcher.tokens[str(number)] for number in range(3)] == [compressed[0], stock[1], compressed[2]]
    assert compressed[1] != stock[1]
    size = manager_of(hybrid.llm).block_size  # vLLM takes larger ones where a state would not fit
    groups, steady = len(bounded_managers(hybrid.llm)), -(-(64 + 32) // size)
    held = [watcher.last[str(number)] for number in range(3)]
    assert held == [groups * blocks for blocks in (steady, -(-(47 + 149) // size), steady)]


def test_all_blocks_come_back_and_every_text_is_its_own_whoever_is_aborted(hybrid: Hybrid) -> None:
    runtime_of(hybrid.llm).use(EngineConfig.parse({"method": "random", "seed": SEED, **SMALL}))
    before, draw = free_blocks(hybrid.llm), random.Random(0)
    wants = {f"r{number}": (asked(draw.randint(1, 130))[0], draw.randint(1, 50)) for number in range(200)}
    # tokens after which a request is aborted; the first ones while they wait or before they say anything
    aborted = {name: draw.randint(0, wants[name][1] - 1) for name in draw.sample(sorted(wants), 40)}
    texts = []
    for doomed in ({}, dict(aborted)):
        watcher = Watcher(hybrid.llm)
        for name, (ids, tokens) in wants.items():
            watcher.add(name, ids, tokens)
        while watcher.engine.has_unfinished_requests():
            watcher.step()
            for name in [name for name, after in doomed.items() if len(watcher.tokens.get(name, ())) >= after]:
                watcher.engine.abort_request([name])
                del doomed[name]
        assert free_blocks(hybrid.llm) == before
        texts.append({name: tokens for name, tokens in watcher.tokens.items() if name not in aborted})
    assert len(texts[0]) == 160 and texts[0] == texts[1]
    manager = manager_of(hybrid.llm)
    assert not manager.allocations and not any(manager.req_to_blocks.values())


def test_a_prompt_of_16k_tokens_holds_no_more_blocks_than_one_of_2k(tmp_path: Path) -> None:
    model = tiny_model(
        "gemma3_text", head_dim=32, num_hidden_layers=2, layer_types=[SLIDING, FULL], max_position_embeddings=32768
    )
    model.float().save_pretrained(tmp_path)
    given = {"method": "random", **SMALL, "prefill_chunk": 256}
    options = {"scheduler_cls": SCHEDULER, "block_size": 32, "max_num_batched_tokens": 256, "max_model_len": 16500}
    options |= {"skip_tokenizer_init": True, "num_gpu_blocks_override": 40}  # a sixteenth of what full KV needs
    with engine(tmp_path, given, **options) as llm:
        before, peaks = free_blocks(llm), []
        for length in (2_000, 16_000):
            watcher, least = Watcher(llm), before
            watcher.add("0", asked(length)[0], 100)
            while watcher.engine.has_unfinished_requests():
                watcher.step()
                least = min(least, free_blocks(llm))
            assert len(watcher.tokens["0"]) == 100
            assert watcher.most["0"] == (64 + 256) // 32 and watcher.last["0"] == (64 + 32) // 32
            peaks.append(before - least)  # of both groups of layers
            assert free_blocks(llm) == before
        assert peaks[0] == peaks[1]


def attention(**changes: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32} | changes)


def window() -> SlidingWindowSpec:
    return SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=16)


def test_layers_of_other_kinds_stay_stock_and_no_prompt_is_shared_beside_them() -> None:
    config = EngineConfig.parse({"method": "random", **SMALL, "prompt": "on_top"})
    budgets = budgets_by_layer(config, ["a"])
    plain = bounded_specs({"a": attention()}, config, budgets, 512, 1, allows_groups=False)
    mixed = bounded_specs({"a": attention(), "b": window()}, config, budgets, 512, 1, allows_groups=True)
    assert plain["a"].shares(60) and not mixed["a"].shares(60)
    assert mixed["b"] == window() and mixed["a"].budget == plain["a"].budget == config.budget


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"a": attention(), "b": window()}, "drop --disable-hybrid-kv-cache-manager"),
        ({"a": attention(), "b": attention(head_size=64)}, "layers of different shapes are not served yet"),
        ({"a": attention(sliding_window=16)}, "Layer a keeps a cache of vLLM's kind FullAttentionSpec"),
        (
            {
                "a": attention(),
                "b": MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=576, dtype=torch.float32),
            },
            "Layer b keeps a cache of vLLM's kind MLAAttentionSpec, which reasonkv does not bound",
        ),
    ],
)
def test_layers_that_cannot_be_served_are_refused_in_one_sentence(found: dict[str, Any], sentence: str) -> None:
    config = EngineConfig.parse({"method": "random", **SMALL})
    with pytest.raises(ServingError, match=sentence):
        bounded_specs(found, config, budgets_by_layer(config, list(found)), 512, 1, allows_groups=False)


def test_latent_attention_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    made = tiny_config("deepseek_v2", architectures=["DeepseekV2ForCausalLM"], first_k_dense_replace=4)
    made.save_pretrained(tmp_path)  # and no weights
    given = {"method": "random", **SMALL}
    options = {"skip_tokenizer_init": True, "max_model_len": 512}
    with pytest.raises(ServingError, match="latent attention"), engine(tmp_path, given, **options):
        pass
