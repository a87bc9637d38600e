"""Real vLLM engines on the bundled model, in this process, and the same requests through the transformers runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonkv import Budget, CompressedCache
from reasonkv.methods import get_method
from reasonkv.plan import Plan
from reasonkv.runtimes.transformers.setup import fitted
from reasonkv.tasks import get_task
from reasonkv.testbed import load_testbed, testbed_path
from reasonkv.view import SlotView

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler, and with one rank the worker, are where tests see them
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
WORKER = "reasonkv.runtimes.vllm.worker.Worker"
Kept = dict[tuple[int, int, int], Tensor]
"""(request, layer, event) to the token indices that stayed, [H, K]."""


@dataclass
class Run:
    """What became of a batch of requests: their tokens, what every event kept, and what it saw."""

    tokens: list[list[int]]
    kept: Kept = field(default_factory=dict)
    views: dict[tuple[int, int, int], SlotView] = field(default_factory=dict)
    """What each event saw, one request a view."""


def model_folder(where: Path) -> Path:
    """The bundled model without its statistics, which vLLM's loader would take for weights."""
    for file in testbed_path().iterdir():
        if file.suffix != ".safetensors" or file.name == "model.safetensors":
            (where / file.name).symlink_to(file)
    return where


def prompts(lengths: Sequence[int] = (12, 31, 47, 64, 90, 101, 130, 200)) -> list[list[int]]:
    """Prompts of exactly these lengths, cut from the start of real problems and their solutions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(testbed_path())
    families = ("program", "recall", "program:steps=30", "recall")
    found = []
    for number, length in enumerate(lengths):
        problem = get_task(families[number % 2]).problem(number, seed=3)
        ids = tokenizer(f"{problem.prompt} {problem.trace}", add_special_tokens=False)["input_ids"]
        assert len(ids) >= length, (number, len(ids))
        found.append(ids[:length])
    return found


@contextmanager
def engine(folder: Path, reasonkv: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM`, with our worker and configuration if any is given."""
    from vllm import LLM

    if reasonkv is not None:
        options |= {"worker_cls": WORKER, "additional_config": {"reasonkv": reasonkv}}
    settings = {"max_model_len": 1024, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True, "seed": 0}
    made = LLM(str(folder), disable_log_stats=True, **(settings | options))
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()


def core_of(llm: Any) -> Any:
    """The engine's core: scheduler and executor."""
    return llm.llm_engine.engine_core.engine_core


def runtime_of(llm: Any) -> Any:
    """The worker's runtime."""
    return core_of(llm).model_executor.driver_worker.worker.runtime


def manager_of(llm: Any) -> Any:
    """The scheduler's manager of blocks."""
    return core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers[0]


def greedy(tokens: int, **options: Any) -> Any:
    """Sampling parameters of a greedy request that goes on to the end."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options)


class Recorder:
    """Notes what every event saw and kept."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, int, int], Tensor] = {}
        self.views: dict[tuple[Any, int, int], SlotView] = {}

    def __call__(self, layer: int, rows: Sequence[Any], view: SlotView, plan: Plan) -> None:
        positions_BHK = view.positions_BHN.gather(2, plan.kept_BHK)
        for place, row in enumerate(rows):
            key = (row, layer, int(view.event_B[place]))
            assert key not in self.kept
            self.kept[key], self.views[key] = positions_BHK[place].clone(), one_row(view, place)


def one_row(view: SlotView, row: int) -> SlotView:
    """A copy of one row of a view."""
    batched = {name: value for name, value in vars(view).items() if isinstance(value, Tensor) and "_B" in name}
    cut: dict[str, Any] = {name: value[row : row + 1].clone() for name, value in batched.items()}
    cut["state"] = {name: value[row : row + 1].clone() for name, value in view.state.items()}
    cut["token_ids"] = None if view.token_ids is None else (view.token_ids[row].clone(),)
    return replace(view, rows=(0,), **cut)


def serve(llm: Any, asked: list[list[int]], sampling: Any) -> Run:
    """All requests at once through an engine."""
    recorder = Recorder()
    runtime = runtime_of(llm)
    if runtime is not None:
        runtime.observer = recorder
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
    number = {output.request_id: index for index, output in enumerate(outputs)}

    def numbered(found: dict[tuple[Any, int, int], Any]) -> dict[tuple[int, int, int], Any]:
        return {(number[name.split("-")[0]], layer, event): value for (name, layer, event), value in found.items()}

    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return Run(tokens, numbered(recorder.kept), numbered(recorder.views))


def reference(method: str, budget: Budget, asked: list[list[int]], tokens: int, **options: Any) -> Run:
    """The same requests through the transformers runtime, in one left-padded batch."""
    model, tokenizer = load_testbed()
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked])
    made, _ = fitted(get_method(method).for_tokenizer(tokenizer), budget)
    recorder = Recorder()
    with CompressedCache(model, made, budget, observer=recorder, **options) as cache:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return Run(out[:, longest:].tolist(), recorder.kept, recorder.views)
