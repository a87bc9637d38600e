"""Chunked, batched replay against the same replay fed token by token at batch 1, in one run.

Program traces of about 1,000 tokens, one method, one budget. Both ways must give the same numbers.
"""

from __future__ import annotations

import argparse

from decoding import load
from rates import traces_of
from timing import Found, milliseconds, script

from reasonkv import Budget, get_method
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.replay import Replayed, replay_batch


@script
def main(given: argparse.Namespace) -> Found:
    subject, fast, slow = load("testbed"), list[Replayed](), list[Replayed]()
    assert subject is not None
    traces = traces_of(subject, given.lines, given.limit)
    config = RunConfig(get_method(given.method), Budget(given.tokens, interval=128, prompt="on_top"))
    replay_batch(subject.model, traces[:2], config)  # warm up
    chunked = milliseconds(lambda: fast.extend(replay_batch(subject.model, traces, config))) / 1e3
    alone = milliseconds(lambda: [slow.extend(replay_batch(subject.model, [trace], config, chunked=False))
                                  for trace in traces]) / 1e3  # fmt: skip
    fed = sum(len(trace.prompt_P) + len(trace.output_T) - 1 for trace in traces)
    ways = (("token by token, batch 1", alone), (f"chunks, batch {len(traces)}", chunked))
    yield {
        "title": f"Replay of {len(traces)} program traces through {config.label}",
        "rows": [{"way": way, "seconds": one, "tokens/s": fed / one, "times faster": alone / one} for way, one in ways],
        "output_tokens_mean": sum(len(trace.output_T) for trace in traces) / len(traces),
        "prompt_tokens_mean": sum(len(trace.prompt_P) for trace in traces) / len(traces),
        "largest_nll_gap": max(abs(a.metrics.nll - b.metrics.nll) for a, b in zip(fast, slow, strict=True)),
        "events": [outcome.stats.events for outcome in fast],
    }
