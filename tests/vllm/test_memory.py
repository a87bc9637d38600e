"""What an engine keeps beside its blocks, what it sends to the device, and which prompts share blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    FULL_KV,
    Run,
    core_of,
    engine,
    free_blocks,
    full_kv,
    greedy,
    manager_of,
    prompts,
    reference,
    runtime_of,
    serve,
)

from reasonkv import Budget
from reasonkv.methods import get_method
from reasonkv.runtimes.vllm import tiers
from reasonkv.runtimes.vllm.config import SCHEDULER, EngineConfig
from reasonkv.testbed import testbed_path

SMALL = {"tokens": 64, "interval": 32, "sinks": 4, "recent": 16, "prompt": "count"}
ON_TOP = {"tokens": 48, "interval": 32, "sinks": 4, "recent": 16, "prompt": "on_top"}
CALIBRATION = str(testbed_path() / "reasonkv_calibration.safetensors")
OURS = {"scheduler_cls": SCHEDULER, "block_size": 32}


def test_memory_beside_the_blocks_is_there_before_the_first_request_and_for_those_that_fit(folder: Path) -> None:
    given = {"method": "snapkv:window=16", **SMALL}
    with engine(folder, given, max_num_seqs=64, max_model_len=256, num_gpu_blocks_override=11, **OURS) as llm:
        made = runtime_of(llm)
        assert made.rows == 10 // 3  # of 64 requests that could run
        before = made.bytes
        asked = prompts((60,) * 6)
        sampling = [greedy(100, extra_args=FULL_KV if row % 2 else None) for row in range(6)]
        mine = serve(llm, asked, sampling)  # requests with full KV take no row
        assert made.bytes == before
        assert [mine.tokens[row] for row in (1, 3, 5)] == full_kv(asked[1::2], 100)
        budget = Budget(**SMALL)
        assert [mine.tokens[row] for row in (0, 2, 4)] == reference("snapkv:window=16", budget, asked[::2], 100).tokens


def test_blocks_and_what_is_kept_beside_them_share_the_memory_that_vllm_found(folder: Path) -> None:
    given = {"method": "snapkv:window=64", **SMALL}
    with engine(folder, given, max_num_seqs=256, **OURS) as llm:
        made, spec = runtime_of(llm), manager_of(llm).kv_cache_spec
        blocks = manager_of(llm).block_pool.num_gpu_blocks * spec.page_size_bytes * len(made.layers)
        assert made.rows == 256 and made.row_bytes > 0
        assert 0.95 * 2**30 < blocks + made.bytes <= 2**30  # VLLM_CPU_KVCACHE_SPACE


def test_a_step_without_a_compaction_copies_nothing_to_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []

    def spy(numbers: Any, device: torch.device) -> torch.Tensor:
        copies.append(len(numbers))
        return torch.from_numpy(numbers).to(device)

    monkeypatch.setattr(tiers, "to_device", spy)
    with engine(folder, {"method": "snapkv:window=16", **SMALL}, **OURS) as llm:
        serve(llm, prompts((40, 50)), greedy(100))
        # the batch, each prompt's first step, and the three compactions of each of the two
        assert 0 < len(copies) <= 10


def test_gauges_are_zero_once_every_request_has_ended(folder: Path) -> None:
    with engine(folder, {"method": "random", **SMALL}, **OURS) as llm:
        serve(llm, prompts((40,)), greedy(40))
        core_of(llm).step()  # the engine's last, in which the worker hears that the request has ended
        meter = runtime_of(llm).meter
        assert (meter.physical, meter.logical, meter.peak) == (0, 0, 79)


def kept_alike(mine: Run, theirs: Run) -> None:
    assert mine.tokens == theirs.tokens
    assert mine.kept.keys() == theirs.kept.keys() and theirs.kept
    for key, kept in theirs.kept.items():
        assert torch.equal(mine.kept[key], kept), key


@pytest.mark.parametrize("method", ["random", "snapkv:window=16"])
def test_turns_of_a_chat_share_the_blocks_of_their_prompts_and_keep_what_they_keep_alone(
    folder: Path, method: str
) -> None:
    given = {"method": method, "seed": 7, **ON_TOP}
    with engine(folder, given, max_model_len=1024, num_gpu_blocks_override=129, **OURS) as llm:
        turn, own = prompts((130,))[0], max(1, get_method(method).needs.queries)
        for number in range(4):
            mine = serve(llm, [turn, turn[:96]], greedy(100))
            kept_alike(mine, reference(method, Budget(**ON_TOP), [turn, turn[:96]], 100, seed=7))
            turn = turn + mine.tokens[0] + prompts((20 + number,))[0]
            said = llm.generate([{"prompt_token_ids": ids} for ids in (turn, turn)], greedy(1), use_tqdm=False)
            # the answer before was computed from fewer slots, so the first of the two feeds it
            assert said[0].num_cached_tokens < len(turn) - 120
            again = llm.generate([{"prompt_token_ids": turn}], greedy(1), use_tqdm=False)
            assert again[0].num_cached_tokens == (len(turn) - own) // 32 * 32
        assert free_blocks(llm) == 128


@pytest.mark.parametrize(
    ("method", "prompt"), [("random", "count"), ("expected", "on_top"), ("cask:mass=none", "on_top")]
)
def test_prompts_that_compactions_change_or_methods_observe_share_nothing(
    folder: Path, method: str, prompt: str
) -> None:
    given = {"method": method, "calibration": CALIBRATION, **ON_TOP, "prompt": prompt}
    with engine(folder, given, **OURS) as llm:
        ids = prompts((130,))[0]
        serve(llm, [ids], greedy(4))
        again = llm.generate([{"prompt_token_ids": ids}], greedy(4), use_tqdm=False)
        assert again[0].num_cached_tokens == 0


def test_blocks_of_8_bits_move_as_they_are_stored(folder: Path) -> None:
    """Methods see what the bytes stand for; a slot that stays has the same bytes, also where others are merged."""
    asked = prompts((90, 130))
    with engine(folder, {"method": "random", **SMALL}, kv_cache_dtype="fp8", dtype="bfloat16", **OURS) as llm:
        made = runtime_of(llm)
        stock = serve(llm, asked, greedy(60, extra_args=FULL_KV)).tokens
        assert made.layers[0].codec is not None and made.layers[0].module.kv_cache.dtype == torch.uint8
        for method in ("random", "keydiff", "snapkv:window=16", "cask:mass=none"):
            made.use(EngineConfig.parse({"method": method, "calibration": CALIBRATION, **SMALL}))
            check_compactions(llm, asked)
        assert stock != serve(llm, asked, greedy(60)).tokens


def check_compactions(llm: Any, asked: list[list[int]]) -> None:
    """Serve, and compare the bytes of every slot that stays alone before and after each compaction."""
    made, moved = runtime_of(llm), 0
    compact = made.compactor._compact

    def checked(layers: Any, block_tables: Any, due: Any, group: Any) -> None:
        nonlocal moved
        plans: list[Any] = []
        made.compactor.observer = lambda layer, rows, view, plan: plans.append((view.keys_BHND, view.values_BHND, plan))
        table = block_tables[layers[0].group]
        blocks = table[torch.tensor(group.batch_rows)][:, : -(-group.held // layers[0].module.kv_cache.shape[2])]
        every = torch.arange(group.held).expand(len(due), layers[0].slots.heads, -1)
        before = [{kind: layer.read_stored(kind, blocks, every) for kind in ("keys", "values")} for layer in layers]
        compact(layers, block_tables, due, group)
        for layer, stored, (*seen, plan) in zip(layers, before, plans, strict=True):
            kept, alone = plan.kept_BHK, torch.ones_like(plan.kept_BHK, dtype=torch.bool)
            if plan.merge is not None:
                into = plan.merge.into_BHN
                members = torch.zeros_like(kept).scatter_add_(2, into.clamp(min=0), (into >= 0).long())
                alone = members == 1
            front = torch.arange(kept.shape[2]).expand(kept.shape)
            for kind, numbers in zip(("keys", "values"), seen, strict=True):
                assert torch.equal(numbers, layer.codec.decode(kind, stored[kind], torch.bfloat16))
                old = stored[kind].gather(2, kept[..., None].expand(-1, -1, -1, stored[kind].shape[3]))
                new = layer.read_stored(kind, blocks, front)
                assert torch.equal(new[alone], old[alone])
                moved += int(alone.sum())

    made.compactor._compact = checked
    llm.generate([{"prompt_token_ids": ids} for ids in asked], greedy(60), use_tqdm=False)
    assert moved
