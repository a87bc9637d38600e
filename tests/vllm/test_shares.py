"""`layer_shares` in vLLM: groups of layers have blocks of their own, and keep what the transformers runtime keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    FULL_KV,
    Watcher,
    bounded_managers,
    core_of,
    engine,
    free_blocks,
    greedy,
    prompts,
    reference,
    runtime_of,
    serve,
)
from near_ties import check_agreement
from test_config import stock
from test_requests import Fragile
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

from reasonkv import Budget, schedule
from reasonkv.calibration import load_calibration, save_calibration
from reasonkv.methods import get_method, layer_budgets
from reasonkv.numbers import shares_in_groups
from reasonkv.plan import Plan
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig, ServingError, check_engine
from reasonkv.runtimes.vllm.setup import bounded_specs, budgets_by_layer, grouped, groups_for
from reasonkv.testbed import testbed_path
from reasonkv.view import SlotView
from tools.tiny_models import VOCABULARY, tiny_model

SEED, BLOCK = 7, 32
FULL, SLIDING = "full_attention", "sliding_attention"
SHARES = "0.4/2/0.5"
FIELDS: dict[str, Any] = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16}
GIVEN = FIELDS | {"layer_shares": SHARES, "layer_groups": 2}
BUDGET = Budget(**FIELDS, layer_shares=shares_in_groups(SHARES, 2))
CALIBRATION = testbed_path() / "reasonkv_calibration.safetensors"
OPTIONS: dict[str, Any] = {"scheduler_cls": SCHEDULER, "max_num_batched_tokens": 64, "block_size": BLOCK}


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Any]:
    with engine(
        folder, {"method": "snapkv:window=16", "seed": SEED, **GIVEN}, num_gpu_blocks_override=150, **OPTIONS
    ) as llm:
        yield llm


def use(llm: Any, method: str, **changes: Any) -> None:
    given = {"method": method, "seed": SEED, "calibration": str(CALIBRATION), **GIVEN} | changes
    assert llm.reset_prefix_cache()  # blocks may be shared by the method that the engine started with alone
    runtime_of(llm).use(EngineConfig.parse(given))


@pytest.mark.parametrize("method", ["random", "expected", "snapkv:window=16", "vase-dkv:window=16", "forecast"])
def test_every_layer_keeps_what_it_keeps_in_the_transformers_runtime(shared: Any, method: str) -> None:
    use(shared, method)
    found = [
        (one.kv_cache_spec.budget.tokens, one.layers, tier.budget.tokens) for one, tier in bounded_managers(shared)
    ]
    # vLLM's groups are all of one size: two of a layer each have the budget of a mean of 1.25 shares
    assert found == [(38, 1, 38), (77, 1, 77), (77, 1, 77)]
    asked, before = prompts(), free_blocks(shared)
    mine = serve(shared, asked, greedy(120))
    assert free_blocks(shared) == before
    theirs = reference(method, BUDGET, asked, 120, seed=SEED)
    check_agreement(mine, theirs, get_method(method), asked, identical=8 if method == "random" else 6)
    kept = {layer: {one.shape[1] for (_, at, _), one in mine.kept.items() if at == layer} for layer in range(3)}
    assert kept == {layer: {size + len(ids) for ids in asked} for layer, size in enumerate((38, 77, 77))}


def test_scheduler_and_worker_agree_and_all_blocks_come_back(shared: Any) -> None:
    """With requests that keep full KV, are preempted, or are aborted among them."""
    use(shared, "random")
    before, asked = free_blocks(shared), prompts((90, 47, 64, 130, 12, 75))
    watcher = Watcher(shared, repeats=True)
    for number, ids in enumerate(asked):
        watcher.add(str(number), ids, 130, extra_args=FULL_KV if number == 1 else None)
    for step in range(500):
        watcher.step()
        if step == 110:
            watcher.preempt_all()
        if step == 120:
            watcher.engine.abort_request(["5"])
        if not watcher.engine.has_unfinished_requests():
            break
    assert free_blocks(shared) == before and watcher.preempted and watcher.repeated
    compressed = reference("random", BUDGET, asked, 130, seed=SEED).tokens
    stock = reference("full", None, asked, 130).tokens
    for number in range(5):
        assert watcher.tokens[str(number)] == (stock if number == 1 else compressed)[number]
    assert watcher.last["1"] == 3 * -(-(47 + 129) // BLOCK)
    for number in (0, 2, 3, 4):
        tiers = layer_budgets(get_method("random"), BUDGET, 3)
        blocks = [-(-schedule.capacity(one, len(asked[number]), 1024) // BLOCK) for one in tiers]
        assert watcher.last[str(number)] == sum(blocks)


def test_prompts_are_shared_between_requests_whose_layers_have_budgets_of_their_own(shared: Any) -> None:
    """But for the tokens whose queries the method reads, which are left out once and not once for every budget."""
    use(shared, "snapkv:window=16")
    for length, cached in ((130, 3 * BLOCK), (128 + 15, 3 * BLOCK), (128 + 16, 4 * BLOCK)):
        (ids,) = prompts((length,))
        assert shared.reset_prefix_cache()
        first, again = (shared.generate([{"prompt_token_ids": ids}], greedy(100), use_tqdm=False)[0] for _ in range(2))
        assert (first.num_cached_tokens, again.num_cached_tokens) == (0, cached)
        assert again.outputs[0].token_ids == first.outputs[0].token_ids


def test_a_request_whose_options_fail_goes_on_with_the_engines_in_all_layers(shared: Any) -> None:
    runtime, seen = runtime_of(shared), list[tuple[int, list[str]]]()
    use(shared, "random")
    runtime.use(EngineConfig(Fragile(), replace(BUDGET, layer_shares=SHARES), SEED, layer_groups=2))

    def note(layer: int, names: list[str], view: SlotView, plan: Plan) -> None:
        seen.append((layer, [one.requests[names[0]].method.spec() for one in runtime.tiers]))

    runtime.compactor.observer = note
    sampling = greedy(140, extra_args={"reasonkv": {"options": {"divisor": 0}}})
    shared.generate([{"prompt_token_ids": prompts((40,))[0]}], sampling, use_tqdm=False)
    runtime.compactor.observer = None
    first = next(at for at, (layer, _) in enumerate(seen) if layer == 1)  # which fails
    assert [said for _, said in seen[:first]] == [["fragile:divisor=0"] * 2] * first and first
    assert all(said == ["fragile"] * 2 for _, said in seen[first:])
    assert {layer for layer, _ in seen[first:]} == {0, 1, 2}


def test_a_response_says_the_mean_of_what_its_layers_held(shared: Any) -> None:
    use(shared, "random")
    (ids,) = prompts((47,))
    (output,) = shared.generate([{"prompt_token_ids": ids}], greedy(120), use_tqdm=False)
    said = output.kv_transfer_params["reasonkv"]
    budgets = layer_budgets(get_method("random"), BUDGET, 3)
    held = [schedule.one_by_one(one, schedule.Lengths(prompt=47), 47 + 119).physical for one in budgets]
    assert said["tokens"] == 47 + 119 and said["slots"] == round(sum(held) / 3, 2) and len(set(held)) == 2
    assert said["budget"]["layer_shares"] == BUDGET.layer_shares
    one, _ = bounded_managers(shared)[0]
    assert said["slot_bytes"] == 3 * one.kv_cache_spec.page_size_bytes // BLOCK


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {"num_hidden_layers": 4, "max_position_embeddings": 512}),
        ("gemma3_text", {"num_hidden_layers": 6, "layer_types": [FULL, SLIDING, FULL, FULL, SLIDING, FULL]}),
    ],
)
def test_groups_of_several_layers_alone_and_beside_layers_of_another_kind(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name, head_dim=32, **changes).float()
    model.save_pretrained(tmp_path)
    shares = "0.4/2/0.5/1.1"
    budget = Budget(**FIELDS, layer_shares=shares_in_groups(shares, 2))
    asked = [torch.randint(5, VOCABULARY, (length,)).tolist() for length in (12, 40, 71)]
    given = {"method": "random", "seed": SEED, **GIVEN, "layer_shares": shares}
    options = OPTIONS | {"skip_tokenizer_init": True, "max_model_len": 512}
    with engine(tmp_path, given, **options) as llm:
        assert [(one.layers, tier.budget.tokens) for one, tier in bounded_managers(llm)] == [(2, 40), (2, 88)]
        stores, pool = [one.slots for one in runtime_of(llm).layers], core_of(llm).scheduler.kv_cache_manager.block_pool
        assert len({one.token_index.data_ptr() for one in stores}) == 2  # a group's blocks are no other's
        page = bounded_managers(llm)[0][0].kv_cache_spec.page_size_bytes
        used = pool.num_gpu_blocks * page * 2 + runtime_of(llm).bytes
        assert 0.95 * 2**30 < used <= 2**30  # VLLM_CPU_KVCACHE_SPACE
        mine = serve(llm, asked, greedy(100))
        theirs = reference("random", budget, asked, 100, model=model, seed=SEED)
        assert mine.tokens == theirs.tokens and mine.kept.keys() == theirs.kept.keys()
        assert all(torch.equal(mine.kept[key], kept) for key, kept in theirs.kept.items())
        budgets, meter = layer_budgets(get_method("random"), budget, 4), runtime_of(llm).meter
        means = [  # of the longest request's layers, before a compaction
            sum(schedule.one_by_one(one, schedule.Lengths(prompt=71), n).physical for one in budgets) / 4 + 1
            for n in range(71, 170)
        ]
        assert meter.peak == max(means)
        dropped = [
            len(ids) + 99 - schedule.one_by_one(one, schedule.Lengths(prompt=len(ids)), len(ids) + 99).physical
            for ids in asked
            for one in budgets
        ]
        assert meter.dropped == sum(dropped) / 4


@pytest.mark.parametrize(("layers", "others"), [(22, 0), (24, 0), (26, 0), (28, 0), (62, 0), (5, 0), (4, 22), (12, 36)])
def test_layers_are_grouped_as_vllm_groups_them(layers: int, others: int) -> None:
    chosen = groups_for(layers, [others] if others else [])
    shares = shares_in_groups("/".join(str(1 + layer * layer % 17) for layer in range(layers)), chosen)
    config = EngineConfig.parse({"method": "random", "tokens": 130, "layer_shares": shares})
    names = [f"layer {number}" for number in range(layers)]
    stock = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
    window = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=16)
    found = dict.fromkeys(names, stock) | {f"window {number}": window for number in range(others)}
    specs = bounded_specs(found, config, budgets_by_layer(config, names), 512, 1, allows_groups=True)
    budgets = Counter(specs[name].budget for name in names)
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    assert len(budgets) <= chosen <= 8 and not UniformTypeKVCacheSpecs.is_uniform_type(specs)
    assert grouped([*budgets.values(), *([others] if others else [])])[1] == len(groups) <= (13 if others else 9)
    assert all(len({specs[name] for name in one.layer_names}) == 1 for one in groups)
    padded = max(len(one.layer_names) for one in groups) * len(groups) / (layers + others)
    assert padded < 1.25


def test_shares_are_refused_where_every_worker_has_some_of_the_layers() -> None:
    stages = stock(parallel_config__pipeline_parallel_size=2)
    with pytest.raises(ServingError, match=r"layer_shares with pipeline parallelism, .* use --tensor-parallel-size"):
        check_engine(stages, EngineConfig.parse({"method": "random", **GIVEN}))


def test_shares_that_the_engine_cannot_give_are_refused_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    for changes, options, sentence in (
        ({"layer_shares": "1/2"}, {}, "layer_shares has 2 numbers, and the model has 3 bounded layers"),
        ({"layer_shares": "calibrated"}, {}, "need a calibration, .* --task QUESTIONS --layer-shares"),
        (
            {"layer_shares": "calibrated", "calibration": str(CALIBRATION)},
            {},
            "This calibration holds no layer_shares; measure them with",
        ),
        ({}, {"disable_hybrid_kv_cache_manager": True}, "drop --disable-hybrid-kv-cache-manager"),
    ):
        with (
            pytest.raises(ServingError, match=sentence),
            engine(folder, {"method": "random", **GIVEN} | changes, **OPTIONS | options),
        ):
            pass
    path = tmp_path / "stats.safetensors"
    save_calibration(path, replace(load_calibration(CALIBRATION), layer_shares=SHARES))
    with engine(folder, {"method": "random", **GIVEN, "layer_shares": "calibrated", "calibration": str(path)}) as llm:
        assert runtime_of(llm).config.budget.layer_shares == BUDGET.layer_shares
        assert len(core_of(llm).scheduler.kv_cache_config.kv_cache_groups) == 3
