"""Chunked, batched replay against the same replay fed token by token at batch 1, in one run.

Program traces of about 1,000 tokens, one method, one budget. Both ways must give the same numbers.
"""

from __future__ import annotations

import argparse
import time

import torch
from timing import publish, script

from reasonkv import Budget, get_method
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.traces import Trace, reference_logprobs
from reasonkv.tasks import get_task
from reasonkv.testbed import load_testbed


@script(small={"tokens": 64, "limit": 2, "lines": 8}, method="snapkv", tokens=256, limit=16, lines=76)
def main(given: argparse.Namespace) -> None:
    model, tokenizer = load_testbed()
    problems = [get_task(f"program:lines={given.lines}").problem(example) for example in range(given.limit)]
    prompts, outputs = (
        [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
        for texts in ([one.prompt for one in problems], [one.trace for one in problems])
    )
    teachers = reference_logprobs(model, prompts, outputs)
    traces = [Trace(*one, correct=True) for one in zip(range(given.limit), prompts, outputs, teachers, strict=True)]
    config = RunConfig(get_method(given.method), Budget(given.tokens, interval=128, prompt="on_top"))
    replay_batch(model, traces[:2], config)  # warm up

    times = [time.perf_counter()]
    fast = replay_batch(model, traces, config)
    times.append(time.perf_counter())
    slow = [one for trace in traces for one in replay_batch(model, [trace], config, chunked=False)]
    times.append(time.perf_counter())

    chunked, alone = times[1] - times[0], times[2] - times[1]
    fed = sum(len(trace.prompt_P) + len(trace.output_T) - 1 for trace in traces)
    ways = (("token by token, batch 1", alone), (f"chunks, batch {len(traces)}", chunked))
    rows = [{"way": way, "seconds": took, "tokens/s": fed / took, "times faster": alone / took} for way, took in ways]
    publish(
        given, f"Replay of {len(traces)} program traces through {config.label}", rows,
        output_tokens_mean=sum(len(t.output_T) for t in traces) / len(traces),
        prompt_tokens_mean=sum(len(t.prompt_P) for t in traces) / len(traces),
        largest_nll_gap=max(abs(a.metrics.nll - b.metrics.nll) for a, b in zip(fast, slow, strict=True)),
        events=[outcome.stats.events for outcome in fast],
    )  # fmt: skip
