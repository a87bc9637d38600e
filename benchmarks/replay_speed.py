"""Chunked, batched replay against the same replay fed token by token at batch 1, in one run.

Sixteen program traces of about 1,000 tokens, one method, one budget. Both ways must give the same numbers.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import publish

from reasonkv import Budget, get_method
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.replay import Replayed, replay_batch
from reasonkv.evaluate.traces import Trace, reference_logprobs
from reasonkv.tasks import get_task
from reasonkv.testbed import load_testbed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="snapkv")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--limit", type=int, default=16)
    arguments = parser.parse_args()
    model, tokenizer = load_testbed()
    task = get_task("program:lines=76")  # reference traces of about 1,000 tokens
    problems = [task.problem(example) for example in range(arguments.limit)]
    prompts = [torch.tensor(tokenizer(p.prompt, add_special_tokens=False).input_ids) for p in problems]
    outputs = [torch.tensor(tokenizer(p.trace, add_special_tokens=False).input_ids) for p in problems]
    traces = [
        Trace(problem.example, prompt, output, reference, correct=True)
        for problem, prompt, output, reference in zip(
            problems, prompts, outputs, reference_logprobs(model, prompts, outputs), strict=True
        )
    ]
    cell = RunConfig(get_method(arguments.method), Budget(arguments.tokens, interval=128, prompt="on_top"))
    replay_batch(model, traces[:2], cell)  # warm up

    start = time.perf_counter()
    fast = replay_batch(model, traces, cell)
    chunked = time.perf_counter() - start
    start = time.perf_counter()
    slow: list[Replayed] = []
    for trace in traces:
        slow += replay_batch(model, [trace], cell, chunked=False)
    token_by_token = time.perf_counter() - start

    gap = max(abs(a.metrics.nll - b.metrics.nll) for a, b in zip(fast, slow, strict=True))
    fed = sum(len(trace.prompt_P) + len(trace.output_T) - 1 for trace in traces)
    rows = [
        ["token by token, batch 1", token_by_token, fed / token_by_token, 1.0],
        [f"chunks, batch {len(traces)}", chunked, fed / chunked, token_by_token / chunked],
    ]
    publish(
        "replay_speed",
        f"Replay of {len(traces)} program traces through {cell.label}",
        ["way", "seconds", "tokens/s", "times faster"],
        rows,
        {
            "output_tokens_mean": sum(len(t.output_T) for t in traces) / len(traces),
            "prompt_tokens_mean": sum(len(t.prompt_P) for t in traces) / len(traces),
            "largest_nll_gap": gap,
            "events": [outcome.stats.events for outcome in fast],
        },
    )


if __name__ == "__main__":
    main()
