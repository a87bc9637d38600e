"""vLLM on CPU under growing load: 1 to 256 requests at once, stock and compressed, on the same blocks, by turns.

A model of random weights whose steps consist of reading keys and values (`serving.make_kv_heavy`), float32, eager, and
blocks for a few whole sequences. All requests of a load arrive at once, with a long prompt and an answer after it; the
time to the first token includes waiting for blocks. Each arm has an engine in this process and its own clock.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from serving import BLOCK, ENVIRONMENT, Serving, engine_of, make_kv_heavy, prompts, serve, serve_by_turns
from timing import publish, script

ARMS = ("stock", "random@128", "expected@128")
TURN = 20
"""Steps that an engine takes at a time."""


class Load(Serving):
    """An engine under load, with the clock of every token, preemptions and blocks in use."""

    def __init__(self, llm: Any, ids: list[list[int]], tokens: int) -> None:
        super().__init__(llm, ids, tokens)
        self.clock = 0.0
        self.said_at: dict[str, list[float]] = defaultdict(list)
        self.preemptions: dict[str, int] = {}
        self.blocks_used: list[int] = []

    def step(self) -> list[Any]:
        """One step of the engine; what it reports."""
        outputs, scheduler = super().step(), self.core.scheduler
        self.clock += self.steps[-1][2]
        for output in outputs:
            self.said_at[output.request_id].append(self.clock)
        for request in scheduler.requests.values():
            self.preemptions[request.request_id] = request.num_preemptions
        pool = scheduler.kv_cache_manager.block_pool
        self.blocks_used.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return outputs

    def row(self) -> dict[str, Any]:
        """Return the columns of a table."""
        every = self.said_at.values()
        first, gaps = [one[0] for one in every], 1e3 * np.concatenate([np.diff(one) for one in every])
        return {
            "tokens/s": sum(map(len, every)) / self.clock, "first token p50 s": float(np.percentile(first, 50)),
            "first token p99 s": float(np.percentile(first, 99)), "inter-token p50 ms": float(np.percentile(gaps, 50)),
            "inter-token p99 ms": float(np.percentile(gaps, 99)), "preemptions": sum(self.preemptions.values()),
            "blocks in use, mean": float(np.mean(self.blocks_used)), "blocks in use, peak": max(self.blocks_used),
            "running, peak": max(running for running, *_ in self.steps),
        }  # fmt: skip


# at_once: whole sequences that the blocks hold; seconds: after which no larger load begins
@script(
    small={"arms": ["stock", "random@128"], "load": ["1", "3"], "prompt": 300, "tokens": 140, "at_once": 2},
    arms=ARMS, load=("1", "16", "64", "256"), prompt=600, tokens=260, at_once=16, seconds=120.0,
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    os.environ |= ENVIRONMENT
    began, rows, left_out = time.monotonic(), [], [int(one) for one in given.load]
    longest = given.prompt + given.tokens
    blocks = given.at_once * -(-longest // BLOCK)
    title = (
        f"vLLM under load: prompts of {given.prompt}, answers of {given.tokens} tokens, {blocks} blocks of {BLOCK}, a "
        "model of random weights with 2 layers of 8 KV heads of 128, float32, eager"
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        given.model, given.eager, given.policy = str(Path(folder) / "kv-heavy"), True, "count"
        make_kv_heavy(given.model)
        engines = {
            arm: stack.enter_context(engine_of(given, arm, blocks, longest, max(left_out))) for arm in given.arms
        }
        for llm in engines.values():
            serve(llm, prompts(llm, 2, given.prompt), 8)  # warms up
        while left_out and time.monotonic() - began < given.seconds:
            requests = left_out.pop(0)
            loads = {arm: Load(llm, prompts(llm, requests, given.prompt), given.tokens) for arm, llm in engines.items()}
            serve_by_turns(list(loads.values()), TURN)
            found = {arm: load.row() for arm, load in loads.items()}
            stock = found[given.arms[0]]["tokens/s"]
            rows += [
                {"requests": requests, "cache": arm, **row, "over stock": row["tokens/s"] / stock}
                for arm, row in found.items()
            ]
            # after every load, so that a run that is stopped leaves what it measured
            publish(given, title, rows, left_out=left_out, seconds=time.monotonic() - began)
    if left_out:
        print(f"Not measured, for time: {', '.join(map(str, left_out))} requests.")
