"""Decoding with a compressed cache that never compresses, over plain `generate` with the stock dynamic cache.

Both arms decode from a copy of the same prefilled cache, in interleaved pairs; prefill is not timed. What is left
is the price of the mechanism, or its gain: keys are written in place instead of concatenated, and never repeated.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from common import median_interval, publish
from transformers import AutoModelForCausalLM, Cache, DynamicCache, LogitsProcessor, PreTrainedModel, Qwen3Config

from reasonkv import Budget, CompressedCache
from reasonkv.testbed import load_testbed

BATCH = 8


class Clock(LogitsProcessor):
    """Notes when every step's logits are ready; the first note is the end of prefill."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate` after every forward."""
        self.times.append(time.perf_counter())
        return scores


def kv_heavy() -> PreTrainedModel:
    """A random model in which the cache is most of the work: 8 layers, 16 query and 8 KV heads of 128, bf16."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def prefilled(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, method: str | None) -> Cache:
    """A cache that has seen all columns but the last; every measurement decodes from a copy of it."""
    cache: Cache = DynamicCache(config=model.config)
    if method is not None:
        cache = CompressedCache(model, method, Budget(tokens=4096, prompt="count"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            logits_to_keep=1,
        )
    if isinstance(cache, CompressedCache):
        cache.detach()
    return cache


def decode_rate(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, new: int, start: Cache) -> float:
    """Tokens per second of decoding `new` tokens for the whole batch with plain `generate`."""
    clock, cache = Clock(), copy.deepcopy(start)
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            logits_processor=[clock],
        )
    if isinstance(cache, CompressedCache):
        assert all(row.events == 0 for row in cache.stats().rows)
        cache.detach()
    return len(ids) * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2000, help="length at the end of decoding")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded up to it")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--method", default="snapkv", help="the method under the compressed cache (it keeps its ring)")
    arguments = parser.parse_args()
    prompt = arguments.tokens - arguments.new
    rows, pairs = [], {}
    for name, model in (("testbed, fp32", load_testbed()[0]), ("KV-heavy, bf16", kv_heavy())):
        ids = torch.randint(5, 100, (BATCH, prompt), generator=torch.Generator().manual_seed(0))
        equal = torch.ones_like(ids)
        ragged = equal.clone()
        for row in range(BATCH):  # lengths from the whole prompt down to half of it
            ragged[row, : row * prompt // (2 * BATCH - 2)] = 0
        arms = {
            arm: (ids * mask, mask, prefilled(model, ids * mask, mask, method))
            for arm, mask, method in (
                ("stock", equal, None),
                ("ours", equal, arguments.method),
                ("stock ragged", ragged, None),
                ("ours ragged", ragged, arguments.method),
            )
        }
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        for pair in range(arguments.pairs + 1):
            for arm, (tokens, mask, start) in arms.items():
                rate = decode_rate(model, tokens, mask, arguments.new, start)
                if pair:  # the first round warms up
                    rates[arm].append(rate)
        pairs[name] = rates
        for label, over, under in (
            ("ours / stock", "ours", "stock"),
            ("ours / stock, ragged", "ours ragged", "stock ragged"),
            ("ours ragged / ours", "ours ragged", "ours"),
        ):
            ratios = [a / b for a, b in zip(rates[over], rates[under], strict=True)]
            median, low, high = median_interval(ratios)
            rows.append([name, label, median, low, high, median_interval(rates[over])[0]])
    publish(
        "decode_overhead",
        f"Decode rate at {arguments.tokens} tokens, batch {BATCH}, {arguments.method}, no event",
        ["model", "ratio", "median", "95 % low", "95 % high", "tokens/s"],
        rows,
        {"tokens": arguments.tokens, "new": arguments.new, "batch": BATCH, "pairs": arguments.pairs, "rates": pairs},
    )


if __name__ == "__main__":
    main()
