"""Decode steps with static shapes: attention, kept slots and tokens as without them, and one graph for all steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import batch, calibration, tiny_model
from oracle import PlanLog, differences, held_by, run_compressed
from test_exactness import SPECS
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CompileConfig

from reasonkv import Budget, CompressedCache, generate_with, get_method
from reasonkv.runtimes.transformers import UnsupportedModelError
from reasonkv.runtimes.transformers.steady import SteadyCache, SteadyLayer

LENGTHS, PROMPT = [60, 47, 40], 24  # all rows are past their padding when decoding begins
PIECES = [PROMPT] + [1] * (LENGTHS[0] - PROMPT)
METHODS = [
    "random", "streaming", "snapkv", "expected", "cask", "vase-attnv", "forecast", "rkv", "d2o", "raas", "beaconkv",
]  # fmt: skip
CASES = [(method, ["count", "on_top", "keep"][i % 3], ["sdpa", "eager"][i % 2]) for i, method in enumerate(METHODS)]


def options_of(method: str, model: Any) -> dict[str, Any]:
    statistics = calibration(model) if get_method(method).needs.calibration else None
    return {"calibration": statistics, "row_seeds": [3, 4, 5], "kernel": None}


@pytest.mark.parametrize(("name", "prompt", "kernel"), CASES)
def test_steps_attend_to_exactly_the_slots_that_a_compressed_cache_keeps(name: str, prompt: Any, kernel: str) -> None:
    model, method = tiny_model("qwen3", kernel=kernel), SPECS.get(name, name)
    fed, tokens = (*batch(LENGTHS), PIECES), {"count": 24, "on_top": 16, "keep": 31}[prompt]
    budget = Budget(tokens=tokens, interval=9, recent=4, prompt=prompt)
    options = options_of(method, model)
    with sdpa_kernel(SDPBackend.MATH):
        with CompressedCache(model, method, budget, **options) as plain:
            wanted = run_compressed(model, plain, *fed)
        needs = plain.method.needs
        log = PlanLog() if needs.merges or needs.log_mass else None
        with SteadyCache(model, method, budget, observer=log, **options) as steady:
            if log is not None:
                log.cache = steady
            found = run_compressed(model, steady, *fed, kept=wanted.kept)
            assert all(isinstance(layer, SteadyLayer) for layer in steady.layers)
        attention, logits = differences(model, found, *fed, log)
    assert attention <= (1e-6 if kernel == "eager" else 1e-12)
    assert logits <= 1e-6 and (found.logits - wanted.logits).abs()[fed[1].bool()].max() < 1e-6
    assert steady.columns_seen == plain.columns_seen == LENGTHS[0]
    assert steady.stats().rows == plain.stats().rows and all(row.events for row in steady.stats().rows)
    for a, b in zip(held_by(steady).values(), held_by(plain).values(), strict=True):
        assert all(torch.equal(*rows) for rows in zip(a, b, strict=True))


def generated(model: Any, ids: Any, mask: Any, compiled: bool, method: str = "snapkv:window=6", **asked: Any) -> Any:
    size = {"tokens": 24, "interval": 12, "recent": 4, "prompt": "on_top"}
    decode = generate_with(method, **size, compile=compiled, calibration=calibration(model))
    asked = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False, **asked}
    out = model.generate(ids, attention_mask=mask, custom_generate=decode, **asked)
    assert decode.stats is not None
    return out, decode.stats.rows


@pytest.mark.parametrize("method", ["snapkv:window=6", "expected", "cask"])
def test_all_steps_run_in_one_graph_that_is_compiled_once(method: str) -> None:
    model, texts = tiny_model("llama"), [(batch([20, 13]), 60), (batch([20, 13]), 60), (batch([29, 31]), 70)]
    asked = [{"max_new_tokens": tokens, "min_new_tokens": tokens} for _, tokens in texts]
    wanted = [generated(model, *text[:2], False, method, **one) for (text, _), one in zip(texts, asked, strict=True)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        config = CompileConfig(fullgraph=True, backend="aot_eager")
        # neither another cache nor another length of the prompt or of the answer is compiled again
        for (text, _), one, (out, rows) in zip(texts, asked, wanted, strict=True):
            found = generated(model, *text[:2], True, method, compile_config=config, **one)
            assert torch.equal(found[0], out) and found[1] == rows
            assert all(row.events > 1 for row in rows)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


@pytest.mark.full  # seconds of a C++ compiler
def test_inductor_writes_the_same() -> None:
    model, (ids, mask, _) = tiny_model("llama"), batch([20, 13])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1  # compiling takes seconds a layer
    torch._dynamo.reset()
    compiled, plain = (generated(model, ids, mask, one) for one in (True, False))
    assert torch.equal(compiled[0], plain[0]) and compiled[1] == plain[1]


def test_a_later_turn_goes_on_as_in_a_compressed_cache() -> None:
    model, (ids, mask, _), texts = tiny_model("qwen3", torch.float32), batch([20, 13]), []
    for kind in (CompressedCache, SteadyCache):
        with kind(model, "snapkv:window=6", tokens=24, interval=8, recent=4) as cache:
            first = model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=19, min_new_tokens=19
            )
            longer = torch.cat([first, ids], 1)
            mask_2 = torch.cat([mask, torch.ones(2, longer.shape[1] - 20, dtype=torch.long)], 1)
            texts.append(
                model.generate(longer, attention_mask=mask_2, past_key_values=cache, max_new_tokens=20, do_sample=False)
            )
    assert torch.equal(*texts)


def test_copies_and_fewer_rows_go_on_as_in_a_compressed_cache() -> None:
    model, fed, texts = tiny_model("qwen3"), batch([60, 60, 60]), []
    for kind in (CompressedCache, SteadyCache):
        with kind(model, "expected", tokens=24, interval=9, recent=4, prompt="count") as cache:
            run_compressed(model, cache, *fed, [24] + [1] * 6, kept=[{}] * 7)
            twin, logits = copy.deepcopy(cache), []
            cache.batch_select_indices(torch.tensor([2, 0]))
            for one, rows in ((twin, [0, 1, 2]), (cache, [2, 0])):
                for at in range(31, 57):
                    inputs = {"attention_mask": fed[1][rows, : at + 1], "position_ids": fed[2][rows, at : at + 1]}
                    with torch.no_grad():
                        out = model(fed[0][rows, at : at + 1], past_key_values=one, **inputs)
                    logits.append(out.logits[:, -1])
            assert cache.rows[0].events == twin.rows[0].events == 3
            texts.append(torch.cat(logits))
    assert (texts[0] - texts[1]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("family", "method", "options", "words"),
    [
        ("llama", "full", {}, "full KV"),
        ("llama", "snapkv:window=6", {"tokens": 24, "dtype": "int4"}, "fewer bits"),
        ("llama", "quest", {"tokens": 32}, "selects"),
        ("llama", "cask:markers=3", {"tokens": 24}, "reads token ids"),
        ("llama", "pyramidkv:window=6", {"tokens": 24}, "layers with budgets"),
        ("llama", "snapkv:window=6", {"tokens": 24, "stagger": 2}, "layers with budgets"),
        ("llama", "snapkv:window=6", {"tokens": 24, "layer_shares": "1/2/3"}, "layers with budgets"),
        ("llama", "snapkv:window=6", {"tokens": 24, "kernel": "flash_attention_2"}, "flash attention"),
        ("gemma3", "snapkv:window=6", {"tokens": 24}, "this model"),
        ("deepseek_v3", "snapkv:window=6", {"tokens": 24}, "this model"),
    ],
)
def test_what_has_no_static_shapes_is_one_sentence(family: str, method: str, options: Any, words: str) -> None:
    model = tiny_model(family)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=f"do not serve.*{words}"):
        SteadyCache(model, method, calibration=calibration(model) if family == "llama" else None, **options)
    assert model.config._attn_implementation == before


def test_beams_prompts_in_chunks_padding_between_steps_and_too_long_a_text_are_one_sentence() -> None:
    model, (ids, mask, _) = tiny_model("llama", torch.float32), batch([20, 13])
    for asked in ({"num_beams": 2}, {"prefill_chunk_size": 8}):
        with pytest.raises(UnsupportedModelError, match="compile=True serves no"):
            generated(model, ids, mask, True, **asked)
    fed = batch([60, 60])
    for max_length, words in ((40, "beyond the max_length of 40"), (60, "given padding after its prompt")):
        with (
            SteadyCache(model, "keydiff", tokens=24, interval=8, recent=4, max_length=max_length) as cache,
            pytest.raises(UnsupportedModelError, match=words),
        ):
            run_compressed(model, cache, *fed, PIECES, kept=[{}] * len(PIECES))
        fed[1][1, 30] = 0
