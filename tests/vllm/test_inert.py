"""An engine that was not asked to compress is a stock engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engines import core_of, engine, greedy, manager_of, prompts
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from reasonkv.runtimes.vllm.config import SCHEDULER, WORKER

STOCK = """
import json, sys
from pathlib import Path
from engines import engine, greedy, prompts
with engine(Path(sys.argv[1])) as llm:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], greedy(100), use_tqdm=False)
    print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
assert not {f"reasonkv.runtimes.vllm.{name}" for name in ("backend", "scheduler", "worker")} & set(sys.modules)
"""


def generated(llm: Any) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts()], greedy(100), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_without_configuration_tokens_and_attention_are_stock(folder: Path) -> None:
    without_plugin = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"VLLM_PLUGINS": "", "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert without_plugin.returncode == 0, without_plugin.stderr[-2000:]
    line = next((one for one in without_plugin.stdout.splitlines() if one.startswith("TOKENS ")), None)
    assert line is not None, without_plugin.stderr[-2000:]
    expected = json.loads(line.removeprefix("TOKENS "))

    # A compressed engine before, in the same process, must leave nothing behind.
    with engine(folder, {"method": "random", "tokens": 96, "interval": 32, "recent": 16, "prompt": "count"}) as llm:
        assert generated(llm) != expected
    for options in ({}, {"worker_cls": WORKER, "scheduler_cls": SCHEDULER}):
        with engine(folder, **options) as llm:
            assert generated(llm) == expected
            runner = core_of(llm).model_executor.driver_worker.worker.model_runner
            layers = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).values()
            seen = [manager_of(llm), *(layer.impl for layer in layers), *(layer.attn_backend for layer in layers)]
            seen += [
                builder for groups in runner.attn_groups for group in groups for builder in group.metadata_builders
            ]
            names = {getattr(one, "__module__", "") for one in seen} | {type(one).__module__ for one in seen}
            assert len(seen) >= 8 and not any(name.startswith("reasonkv") for name in names), names
            assert type(manager_of(llm)) is FullAttentionManager
            assert type(manager_of(llm).kv_cache_spec) is FullAttentionSpec
