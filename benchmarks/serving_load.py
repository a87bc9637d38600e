"""Requests through vLLM on CPU, stock and compressed, on the same blocks, by turns.

    python benchmarks/serving_load.py                                     # 1 to 256 requests at once
    python benchmarks/serving_load.py --preset serving --parts FILE.jsonl # 64 requests of 2,000 tokens, by method
    python benchmarks/serving_load.py --preset first_token                # a lone prompt's first two tokens
    python benchmarks/serving_load.py --preset steps_by_batch             # steps by running requests

All requests of a load arrive at once. The cache has as many blocks as full KV needs for a few whole sequences: full KV
starts more of them while they are short and preempts as they grow, a compressed cache runs as many as its blocks allow
throughout. The time to the first token includes waiting for blocks. Every arm has an engine in this process and a clock
of its own, and whichever has said least so far takes the next steps: all begin and end together, so a machine that is
slower for a while is so for all.

The model is the bundled one, or without a name one of random weights whose steps consist of reading keys and values, as
those of large models with long texts do. It runs operation by operation, or compiled, as vLLM does unless told
otherwise. Measurements that `--parts` has are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibrated import random_calibration
from decoding import random_model, text_ids
from timing import Found, Row, interval, median, ratio, script, store, stored

from reasonkv.calibration import save_calibration
from reasonkv.calibration.files import FILE
from reasonkv.testbed import testbed_path

BLOCK = 128
WINDOW = {"size": 128, "buffer": 32, "retention": 0.3}
SCHEDULES = {"threshold": WINDOW, "period": WINDOW | {"period": 129, "most": 8}}
"""Kara's windows, cut in a request as each is full, or in the 8 fullest requests at once (KvLLM's policy)."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def engine_options(arm: str, policy: str) -> dict[str, Any]:
    """Return what makes vLLM's an arm's engine: METHOD@TOKENS or METHOD@SCHEDULE; `policy` is the prompt's."""
    method, _, kept_tokens = arm.rpartition("@")
    if not method:
        return {}
    given: dict[str, Any] = {"method": method, "tokens": kept_tokens, "interval": 128, "prompt": policy}
    options = {"worker_cls": "reasonkv.runtimes.vllm.worker.Worker"}
    if kept_tokens in SCHEDULES:
        given = {"method": method, "window": SCHEDULES[kept_tokens]}
        options["scheduler_cls"] = "reasonkv.runtimes.vllm.scheduler.Scheduler"
    else:
        given["tokens"] = int(kept_tokens)
    if method.startswith("cask"):  # others find the statistics beside the model
        given["calibration"] = str(testbed_path() / "reasonkv_calibration.safetensors")
    return options | {"additional_config": {"reasonkv": given}}


def make_kv_heavy(folder: str) -> str:
    """Write 2 layers of 8 KV heads and 16 query heads of 128, narrow otherwise, with the bundled model's tokenizer.

    Statistics for the methods that need some are random, too: what their compactions take does not depend on them.
    """
    torch.manual_seed(0)
    model = random_model(
        dtype=torch.float32, num_hidden_layers=2, num_attention_heads=16, vocab_size=186, hidden_size=256,
        intermediate_size=512, max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    model.save_pretrained(folder, max_shard_size="8MB")  # with an index: vLLM reads no other file as weights
    save_calibration(Path(folder) / FILE, random_calibration(model.config))
    for file in testbed_path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@contextlib.contextmanager
def engine_of(given: argparse.Namespace, model: str, arm: str) -> Iterator[Any]:
    """Yield vLLM in this process."""
    from vllm import LLM

    each = -(-(given.prompt + given.tokens) // BLOCK)
    llm = LLM(
        model, max_model_len=each * BLOCK, max_num_seqs=max(given.load), dtype="float32", block_size=BLOCK,
        enforce_eager=not given.compiled, num_gpu_blocks_override=given.at_once * each + 1,
        enable_prefix_caching=False, disable_log_stats=True, **engine_options(arm, given.policy),
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


class Load:
    """An engine that serves a number of requests at once, with a clock of its own.

    Args:
        llm: the engine.
        requests: so many of generated problems and their reference traces.
        prompt, tokens: of every request.
    """

    def __init__(self, llm: Any, requests: int, prompt: int, tokens: int) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.engine, self.core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
        runtime = getattr(self.core.model_executor.driver_worker.worker, "runtime", None)
        self.meter = None if runtime is None else runtime.meter
        if self.meter is not None:
            self.meter.seconds = self.meter.step_seconds = 0.0
        self.clock, self.said = 0.0, 0
        self.steps: list[tuple[int, int, int, float]] = []  # running, waiting, blocks in use, seconds
        self.said_at: dict[str, list[float]] = defaultdict(list)
        self.preemptions: dict[str, int] = {}
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        sampling.output_kind = RequestOutputKind.DELTA
        ids = text_ids(llm.get_tokenizer(), prompt + requests)[0].tolist()
        for number in range(requests):
            self.engine.add_request(str(number), {"prompt_token_ids": ids[number : number + prompt]}, sampling)

    @property
    def is_done(self) -> bool:
        """Whether all requests have ended."""
        return not self.engine.has_unfinished_requests()

    def step(self) -> None:
        """Take one step, unless all is done."""
        if self.is_done:
            return
        start, scheduler = time.perf_counter(), self.core.scheduler
        outputs = self.engine.step()
        taken = time.perf_counter() - start
        self.clock += taken
        pool = scheduler.kv_cache_manager.block_pool
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        self.steps.append((len(scheduler.running), len(scheduler.waiting), used, taken))
        self.said += self.steps[-1][0]
        for output in outputs:
            self.said_at[output.request_id].append(self.clock)
        for request in scheduler.requests.values():
            self.preemptions[request.request_id] = request.num_preemptions

    def row(self) -> dict[str, float]:
        """Return the columns of a table."""
        every = self.said_at.values()
        first, gaps = [one[0] for one in every], 1e3 * np.concatenate([np.diff(one) for one in every])
        running, waiting, used, taken = map(np.array, zip(*self.steps, strict=True))
        busy = waiting > 0
        of_steps = {f"step p{q} ms": 1e3 * float(np.percentile(taken, q)) for q in (50, 99)}
        return {
            "tokens/s": sum(map(len, every)) / self.clock,
            **{f"first token p{q} s": float(np.percentile(first, q)) for q in (50, 99)},
            **{f"inter-token p{q} ms": float(np.percentile(gaps, q)) for q in (50, 99)},
            "preemptions": sum(self.preemptions.values()), "blocks in use, mean": float(used.mean()),
            "blocks in use, peak": int(used.max()), "running, peak": int(running.max()),
            "running, mean": float(running.mean()),
            "tokens/s while requests wait": float(running[busy].sum() / taken[busy].sum()) if busy.any() else 0.0,
            **of_steps, "longest ms": 1e3 * float(taken.max()),
            "compactions, share of step time": self.meter.seconds / self.meter.step_seconds if self.meter else 0.0,
        }  # fmt: skip


def by_turns(loads: Mapping[str, Load], turn: int) -> dict[str, dict[str, float]]:
    """Serve all to the end; whichever has said least so far takes the next steps."""
    while going := [one for one in loads.values() if not one.is_done]:
        behind = min(going, key=lambda one: one.said)
        for _ in range(turn):
            behind.step()
    return {arm: one.row() for arm, one in loads.items()}


def rows_of(requests: int, rounds: list[dict[str, dict[str, float]]]) -> list[Row]:
    """Return a load's rows: medians of the rounds, and ratios to the first arm in the same round."""
    base, rows = next(iter(rounds[0])), []
    for arm, one in rounds[0].items():
        over = {name: ratio(*([found[side][name] for found in rounds] for side in (arm, base)))
                for name in ("tokens/s", "first token p50 s")}  # fmt: skip
        middle = {name: median([found[arm][name] for found in rounds]) for name in one}
        rows.append({
            "requests": requests, "cache": arm, **middle,
            **interval(over["tokens/s"], f"over {base}"), f"first token over {base}": over["first token p50 s"][0],
        })  # fmt: skip
    return rows


@script
def main(given: argparse.Namespace) -> Found:
    os.environ |= ENVIRONMENT
    began, rows, left_out = time.monotonic(), list[Row](), list(given.load)
    options = {name: value for name, value in vars(given).items() if name not in ("out", "parts", "load", "rounds")}
    name = f"the model {given.model}" if given.model else (
        "a model of random weights with 2 layers of 8 KV heads of 128"
    )  # fmt: skip
    title = (
        f"vLLM under load: prompts of {given.prompt}, answers of {given.tokens} tokens, blocks of {BLOCK} for "
        f"{given.at_once} sequences, {name}, float32, {'compiled' if given.compiled else 'eager'}"
    )
    parts = Path(given.parts) if given.parts else None
    done = stored(parts) if parts else []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        engines = dict[str, Any]()
        model = make_kv_heavy(folder) if not given.model else given.model
        model = str(testbed_path()) if model == "testbed" else model

        def measure(requests: int) -> dict[str, Any]:
            for arm in given.arms if not engines else ():
                engines[arm] = stack.enter_context(engine_of(given, model, arm))
                by_turns({arm: Load(engines[arm], 2, given.prompt, min(8, given.tokens))}, given.turn)  # warms up
            loads = {arm: Load(llm, requests, given.prompt, given.tokens) for arm, llm in engines.items()}
            return by_turns(loads, given.turn)

        while left_out and time.monotonic() - began < given.seconds:
            requests = left_out.pop(0)
            rounds = []
            for number in range(given.rounds):
                key: Row = {"requests": requests, "round": number, "options": options}
                there = [row for row in done if key.items() <= row.items()]
                if not there:
                    there = [{**key, "found": measure(requests)}]
                    if parts:
                        store(parts, there[0])
                rounds.append(there[0]["found"])
            rows += rows_of(requests, rounds)
            yield {"title": title, "rows": rows, "left_out": left_out}
    if left_out:
        print(f"Not measured, for time: {', '.join(map(str, left_out))} requests.")
