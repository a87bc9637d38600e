"""What part of decoding goes into compaction: events of several methods over a long generation on the testbed.

Every method decodes the same number of tokens from the same prompts at the same budget; seconds in events are the
cache's own count, seconds of decoding are wall-clock over all steps after the cache has first been full. Runs of the
methods are interleaved.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import median_interval, publish
from transformers import PreTrainedModel

from reasonkv import Budget, CompressedCache
from reasonkv.testbed import load_testbed

METHODS = (
    "random", "streaming", "snapkv", "rkv", "triattention", "cask", "cask:fold=neighbours", "cask:profile=paper"
)  # fmt: skip

PROMPT = 64


def decode(
    model: PreTrainedModel, method: str, prompt_BL: torch.Tensor, tokens: int, budget: Budget
) -> tuple[float, float, int]:
    """Seconds in events, seconds of decoding, and events per row; greedy, end tokens ignored."""
    lengths = [PROMPT] * len(prompt_BL)  # the rest of the filling counts as decoded
    with torch.no_grad(), CompressedCache(model, method, budget, prompt_lengths=lengths) as cache:
        model(prompt_BL[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        ids = (
            model(prompt_BL[:, PROMPT:], past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        )
        start, already = time.perf_counter(), cache.compaction_seconds
        for _ in range(tokens):
            ids = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        took = time.perf_counter() - start
        return cache.compaction_seconds - already, took, cache.stats().rows[0].events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--interval", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    budget = Budget(arguments.budget, interval=arguments.interval, prompt="count")
    model, rows = load_testbed()[0], []
    for batch in (1, 8):
        prompt = torch.randint(5, 100, (batch, arguments.budget), generator=torch.Generator().manual_seed(0))
        shares: dict[str, list[float]] = {method: [] for method in METHODS}
        events: dict[str, list[float]] = {method: [] for method in METHODS}
        rates: dict[str, list[float]] = {method: [] for method in METHODS}
        for repeat in range(arguments.repeats + 1):  # the first warms up
            for method in METHODS:
                inside, took, count = decode(model, method, prompt, arguments.tokens, budget)
                if repeat:
                    shares[method].append(100 * inside / took)
                    events[method].append(1e3 * inside / count)
                    rates[method].append(batch * arguments.tokens / took)
        for method in METHODS:
            event, rate = median_interval(events[method])[0], median_interval(rates[method])[0]
            rows.append([batch, method, *median_interval(shares[method]), event, rate])
    publish(
        "event_share",
        f"Compaction in decoding, testbed float32, budget {arguments.budget}, an event every {arguments.interval} "
        f"tokens, {arguments.tokens} tokens",
        ["batch", "method", "% of decoding", "95 % low", "95 % high", "ms per event", "tokens/s"],
        rows,
        {"repeats": arguments.repeats},
    )


if __name__ == "__main__":
    main()
