"""Real vLLM engines on the bundled model, in this process, and the same requests through the transformers runtime."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonkv import Budget, CompressedCache
from reasonkv.methods import Method, get_method
from reasonkv.plan import Merge, Plan
from reasonkv.resolve import resolve_budget
from reasonkv.runtimes.vllm.config import WORKER
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
FULL_KV = {"reasonkv": {"enabled": False}}
"""`extra_args` of a request that opts out."""
Kept = dict[tuple[int, int, int], Tensor]
"""(request, layer, event) to the token indices that stayed, [H, K]."""


@dataclass
class Run:
    """What became of a batch of requests: their tokens, what every event kept, and what it saw."""

    tokens: list[list[int]]
    kept: Kept = field(default_factory=dict)
    views: dict[tuple[int, int, int], SlotView] = field(default_factory=dict)
    """What each event saw, one request a view."""
    plans: dict[tuple[int, int, int], Plan] = field(default_factory=dict)
    """What each event decided, one request a plan."""
    logprobs: list[list[float]] = field(default_factory=list)
    """Log-probability of every token, where it was asked for."""
    margins: list[list[float]] = field(default_factory=list)
    """How far the likeliest token's logit is above the next one's; of the transformers runtime."""


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
    """The scheduler's manager of blocks, of the first group of layers that are bounded."""
    from reasonkv.runtimes.vllm.manager import BoundedManager

    managers = core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
    return next((one for one in managers if isinstance(one, BoundedManager)), managers[0])


def bounded_managers(llm: Any) -> list[tuple[Any, Any]]:
    """The scheduler's managers of blocks, one for every group of bounded layers, and the worker's tier of each."""
    from reasonkv.runtimes.vllm.manager import BoundedManager

    runtime = runtime_of(llm)
    tiers = {layer.group: runtime.tiers[layer.tier] for layer in runtime.layers}
    managers = core_of(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
    return [(one, tiers[one.kv_cache_group_id]) for one in managers if isinstance(one, BoundedManager)]


def greedy(tokens: int, **options: Any) -> Any:
    """Sampling parameters of a greedy request that goes on to the end."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **options)


class Recorder:
    """Notes what every event saw and kept."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, int, int], Tensor] = {}
        self.views: dict[tuple[Any, int, int], SlotView] = {}
        self.plans: dict[tuple[Any, int, int], Plan] = {}

    def __call__(self, layer: int, rows: Sequence[Any], view: SlotView, plan: Plan) -> None:
        positions_BHK = view.positions_BHN.gather(2, plan.kept_BHK)
        for place, row in enumerate(rows):
            key = (row, layer, int(view.event_B[place]))
            assert key not in self.kept
            self.kept[key], self.views[key] = positions_BHK[place].clone(), one_row(view, place)
            self.plans[key] = one_plan(plan, place)


def one_row(view: SlotView, row: int) -> SlotView:
    """A copy of one row of a view."""
    every = {one.name: getattr(view, one.name) for one in fields(SlotView)}  # keys and values are read here, if never
    batched = {name: value for name, value in every.items() if isinstance(value, Tensor) and "_B" in name}
    cut: dict[str, Any] = {name: value[row : row + 1].clone() for name, value in batched.items()}
    for named in ("state", "row_state"):
        cut[named] = {name: value[row : row + 1].clone() for name, value in getattr(view, named).items()}
    cut["token_ids"] = None if view.token_ids is None else (view.token_ids[row].clone(),)
    return replace(view, rows=(0,), **cut)


def one_plan(plan: Plan, row: int) -> Plan:
    """A copy of one row of a plan."""

    def cut(x: Tensor) -> Tensor:
        return x[row : row + 1].clone()

    fold = plan.merge
    if fold is not None:
        fold = Merge(cut(fold.into_BHN), cut(fold.key_weights_BHN), cut(fold.value_weights_BHN), fold.rotary)
    return Plan(cut(plan.kept_BHK), fold, {name: cut(value) for name, value in plan.state.items()})


def serve(llm: Any, asked: list[list[int]], sampling: Any) -> Run:
    """All requests at once through an engine."""
    recorder = Recorder()
    runtime = runtime_of(llm)
    if runtime is not None:
        runtime.compactor.observer = recorder
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
    number = {output.request_id: index for index, output in enumerate(outputs)}

    def numbered(found: dict[tuple[Any, int, int], Any]) -> dict[tuple[int, int, int], Any]:
        return {(number[name.split("-")[0]], layer, event): value for (name, layer, event), value in found.items()}

    ends = [output.outputs[0] for output in outputs]
    tokens = [list(end.token_ids) for end in ends]
    logprobs = [
        [step[token].logprob for step, token in zip(end.logprobs or (), end.token_ids, strict=False)] for end in ends
    ]
    return Run(tokens, numbered(recorder.kept), numbered(recorder.views), numbered(recorder.plans), logprobs)


def reference(
    method: str | Method, budget: Budget | None, asked: list[list[int]], tokens: int, dtype: torch.dtype = torch.float32,
    text: list[list[int]] | None = None, model: Any = None, **options: Any,
) -> Run:  # fmt: skip
    """The same requests through the transformers runtime, in one left-padded batch; with a text, it says that.

    The model is the bundled one unless another is given.
    """
    made = get_method(method)
    if model is None:
        model, tokenizer = load_testbed(dtype)
        made = made.for_tokenizer(tokenizer)
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked])
    made, _ = resolve_budget(made, budget)
    recorder = Recorder()

    def say(said: Tensor, scores: Tensor) -> Tensor:
        token_B1 = torch.tensor(text)[:, said.shape[1] - longest, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)

    with CompressedCache(model, made, budget, observer=recorder, **options) as cache:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_logits=True,
            logits_processor=None if text is None else [say],
        )  # fmt: skip
    said_Bt, logits_BtV = out.sequences[:, longest:], torch.stack(out.logits, 1).float()
    best_Bt2 = logits_BtV.topk(2).values
    logprobs_Bt = logits_BtV.log_softmax(-1).gather(2, said_Bt[..., None])[..., 0]
    return Run(
        said_Bt.tolist(), recorder.kept, recorder.views, recorder.plans, logprobs_Bt.tolist(),
        (best_Bt2[..., 0] - best_Bt2[..., 1]).tolist(),
    )  # fmt: skip


def full_kv(asked: list[list[int]], tokens: int) -> list[list[int]]:
    """What the model says greedily with the stock cache of transformers, in one left-padded batch."""
    model, _ = load_testbed()
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return list(out[:, longest:].tolist())


def free_blocks(llm: Any) -> int:
    """Blocks that nobody holds."""
    return int(manager_of(llm).block_pool.get_num_free_blocks())


class Watcher:
    """Steps an engine and looks at both sides after every step.

    Args:
        llm: the engine.
        repeats: a request that is fed again must have every event again, and keep the same slots.
    """

    def __init__(self, llm: Any, *, repeats: bool = False) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        runtime_of(llm).compactor.observer = self._note_event if repeats else None
        self.kept: dict[tuple[str, int, int], Tensor] = {}
        self.repeated = 0
        self.most: dict[str, int] = defaultdict(int)
        self.last: dict[str, int] = {}
        self.pieces: dict[str, list[int]] = defaultdict(list)
        self.preempted: set[str] = set()
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, str | None] = {}

    def add(self, name: str, ids: list[int], tokens: int, **options: Any) -> None:
        """Ask for tokens after a prompt."""
        self.engine.add_request(name, {"prompt_token_ids": ids}, greedy(tokens, **options))

    def _note_event(self, layer: int, rows: Sequence[str], view: SlotView, plan: Plan) -> None:
        for place, row in enumerate(rows):
            kept = view.positions_BHN[place].gather(1, plan.kept_BHK[place]).clone()
            key = (row, layer, int(view.event_B[place]))
            self.repeated += key in self.kept
            assert torch.equal(self.kept.setdefault(key, kept), kept), key

    def preempt_all(self) -> None:
        """Preempt every running request, as vLLM itself does when its weights are changed under it."""
        assert self.llm.reset_prefix_cache(reset_running_requests=True)

    def step(self) -> None:
        """One step, after which scheduler and worker must agree in every number and block.

        Blocks are counted in all groups of bounded layers.
        """
        runtime, managers = runtime_of(self.llm), bounded_managers(self.llm)
        before = {name: (one, one.state.logical) for name, one in runtime.requests.items()}
        for output in self.engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)
            self.ends[output.request_id] = output.outputs[0].finish_reason
        batch = core_of(self.llm).model_executor.driver_worker.worker.model_runner.input_batch
        for name, one in runtime.requests.items():
            if name not in managers[0][0].req_to_blocks:  # it has finished, or was preempted
                continue
            short = name.rsplit("-", 1)[0]
            was, start = before.get(name, (None, 0))
            if was is not one:  # it has just been admitted
                start = 0
                if self.pieces[short]:
                    self.preempted.add(short)
            if one.state.logical > start:
                self.pieces[short].append(one.state.logical - start)
            total = 0
            for manager, tier in managers:
                blocks, mine = [block.block_id for block in manager.req_to_blocks[name]], tier.requests[name]
                assert len(set(blocks)) == len(blocks)
                assert manager.allocations[name].now == mine.state  # the scheduler's integers are the worker's
                assert mine.state.logical == one.state.logical and mine.row == one.row
                assert mine.state.physical <= len(blocks) * manager.block_size
                if mine.budget is None:
                    assert len(blocks) == -(-mine.state.logical // manager.block_size)
                if name in batch.req_id_to_index:
                    table = batch.block_table[manager.kv_cache_group_id]
                    row = table.block_table.np[batch.req_id_to_index[name]]
                    assert row[: len(blocks)].tolist() == blocks
                total += len(blocks)
            self.most[short] = max(self.most[short], total)
            self.last[short] = total
        every = core_of(self.llm).scheduler.kv_cache_manager.coordinator.single_type_managers
        owned = [
            block.block_id
            for one in every  # all groups of layers take their blocks from one pool
            for blocks in one.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        ]
        assert len(set(owned)) == len(owned)  # no block belongs to two requests

    def run(self) -> None:
        """Step until all is done."""
        while self.engine.has_unfinished_requests():
            self.step()
