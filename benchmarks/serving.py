"""Output tokens per second through vLLM on CPU, stock against compressed, on the same blocks.

The cache is given as many blocks as full KV needs for 8 sequences of 2,000 output tokens. 64 requests ask for 2,000
tokens each: full KV starts more of them while they are short and preempts as they grow, a compressed cache runs as many
as its blocks allow throughout. Every arm is a process of its own, with the bundled model (`make bench-vllm`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import publish

BLOCK, PROMPT = 128, 40
ARMS = ["stock", "random@256", "vase-dkv@256", "kara@256", "cask:mass=none@256", "random@512", "vase-dkv@512"]
WORKER = "reasonkv.runtimes.vllm.worker.Worker"


def configuration(arm: str) -> dict[str, Any] | None:
    """What `--additional-config` gets under "reasonkv"; None for stock vLLM."""
    if arm == "stock":
        return None
    from reasonkv.testbed import testbed_path

    method, _, tokens = arm.rpartition("@")
    given: dict[str, Any] = {"method": method, "tokens": int(tokens), "interval": 128}
    if method.startswith("cask"):
        given["calibration"] = str(testbed_path() / "reasonkv_calibration.safetensors")
    return given


def run_arm(arm: str, requests: int, tokens: int, at_once: int) -> dict[str, Any]:
    """Serve all requests in this process and say how it went."""
    from vllm import LLM, SamplingParams

    from reasonkv.tasks import get_task
    from reasonkv.testbed import testbed_path

    blocks = at_once * -(-(PROMPT + tokens) // BLOCK)
    given = configuration(arm)
    options = {} if given is None else {"worker_cls": WORKER, "additional_config": {"reasonkv": given}}
    with tempfile.TemporaryDirectory() as folder:
        for file in testbed_path().iterdir():  # vLLM would take the statistics for weights
            if file.suffix != ".safetensors" or file.name == "model.safetensors":
                (Path(folder) / file.name).symlink_to(file)
        llm = LLM(
            folder, max_model_len=-(-(PROMPT + tokens) // BLOCK) * BLOCK, max_num_seqs=requests, dtype="float32",
            enforce_eager=True, block_size=BLOCK, num_gpu_blocks_override=blocks + 1, enable_prefix_caching=False,
            disable_log_stats=True, **options,
        )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    engine, core = llm.llm_engine, llm.llm_engine.engine_core.engine_core
    for number in range(requests):
        problem = get_task("program").problem(number)
        ids = tokenizer(f"{problem.prompt} {problem.trace}", add_special_tokens=False)["input_ids"][:PROMPT]
        engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    steps: list[tuple[int, float]] = []
    first, start = {}, time.perf_counter()
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        for output in engine.step():
            first.setdefault(output.request_id, time.perf_counter() - start)
        steps.append((len(core.scheduler.running), time.perf_counter() - before))
    seconds = time.perf_counter() - start
    taken = sorted(one for _, one in steps)
    runtime = core.model_executor.driver_worker.worker.runtime if given is not None else None
    share = runtime.meter.seconds / runtime.meter.step_seconds if runtime is not None else 0.0
    return {
        "arm": arm, "blocks": blocks, "running_peak": max(running for running, _ in steps),
        "running_mean": statistics.mean(running for running, _ in steps),
        "tokens_per_second": requests * tokens / seconds,
        "step_p50_ms": 1e3 * statistics.median(taken), "step_p99_ms": 1e3 * taken[int(0.99 * len(taken))],
        "event_share": share, "first_token_s": min(first.values()), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=8, help="sequences of full KV that the blocks hold")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print("RESULT", json.dumps(run_arm(given.one, given.requests, given.tokens, given.at_once)))
        return
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    found = []
    for arm in given.arms:
        command = [sys.executable, __file__, "--one", arm, "--requests", str(given.requests)]
        command += ["--tokens", str(given.tokens), "--at-once", str(given.at_once)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        line = next((one for one in done.stdout.splitlines() if one.startswith("RESULT ")), None)
        if line is None:
            sys.exit(f"{arm} failed:\n{done.stderr[-3000:]}")
        found.append(json.loads(line.removeprefix("RESULT ")))
        print(found[-1], flush=True)
    stock = next((one["tokens_per_second"] for one in found if one["arm"] == "stock"), float("nan"))
    publish(
        "serving",
        f"{given.requests} requests of {given.tokens} output tokens on the blocks of {given.at_once} full sequences",
        ["arm", "running, mean", "tokens/s", "over stock", "step p50 ms", "step p99 ms", "events, % of step time"],
        [
            [
                one["arm"], one["running_mean"], one["tokens_per_second"], one["tokens_per_second"] / stock,
                one["step_p50_ms"], one["step_p99_ms"], 100 * one["event_share"],
            ]
            for one in found
        ],
        {"arms": found, "prompt": PROMPT, "block": BLOCK},
    )  # fmt: skip


if __name__ == "__main__":
    main()
