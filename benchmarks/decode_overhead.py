"""Decoding with a compressed cache that never compresses, over plain `generate` with the stock dynamic cache.

All arms decode from a copy of the same prefilled cache, by turns; prefill is not timed. What is left is the price of
the mechanism, or its gain: keys are written in place instead of concatenated, and never repeated.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial

import torch
from timing import by_turns, interval, median, publish, random_model, ratio, script
from transformers import Cache, DynamicCache, LogitsProcessor, PreTrainedModel

from reasonkv import Budget, CompressedCache
from reasonkv.testbed import load_testbed

RATIOS = {
    "ours / stock": ("ours", "stock"),
    "ours / stock, ragged": ("ours ragged", "stock ragged"),
    "ours ragged / ours": ("ours ragged", "ours"),
}


class Clock(LogitsProcessor):
    """Notes when every step's logits are ready; the first note is the end of prefill."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate` after every forward."""
        self.times.append(time.perf_counter())
        return scores


def kv_heavy() -> PreTrainedModel:
    """Return a random model in which the cache is most of the work: 8 layers, 16 query and 8 KV heads of 128, bf16."""
    torch.manual_seed(0)
    return random_model(8, 16, 8, vocab_size=256, hidden_size=256, intermediate_size=512).to(torch.bfloat16)


def prefilled(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, method: str | None) -> Cache:
    """Return a cache that has seen all columns but the last; every measurement decodes from a copy of it."""
    cache: Cache = DynamicCache(config=model.config)
    if method is not None:
        cache = CompressedCache(model, method, Budget(tokens=4096, prompt="count"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions, past_key_values=cache, logits_to_keep=1)
    if isinstance(cache, CompressedCache):
        cache.detach()
    return cache


def decode_rate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, new: int, start: Cache
) -> dict[str, float]:
    """Measure the tokens per second of decoding `new` tokens for the whole batch with plain `generate`."""
    clock, cache = Clock(), copy.deepcopy(start)
    with torch.no_grad():
        model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False,
            pad_token_id=0, logits_processor=[clock],
        )  # fmt: skip
    if isinstance(cache, CompressedCache):
        assert all(row.events == 0 for row in cache.stats().rows)
        cache.detach()
    return {"rate": len(ids) * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])}


# snapkv keeps its ring of queries
@script(small={"tokens": 40, "new": 4, "pairs": 2, "batch": 2}, tokens=2000, new=32, pairs=7, batch=8, method="snapkv")
def main(given: argparse.Namespace) -> None:
    prompt, rows, rates = given.tokens - given.new, [], {}
    for name, model in (("testbed, fp32", load_testbed()[0]), ("KV-heavy, bf16", kv_heavy())):
        ids = torch.randint(5, 100, (given.batch, prompt), generator=torch.Generator().manual_seed(0))
        equal = torch.ones_like(ids)
        ragged = equal.clone()
        for row in range(given.batch):  # lengths from the whole prompt down to half of it
            ragged[row, : row * prompt // max(1, 2 * given.batch - 2)] = 0
        arms = {
            arm + kind: partial(
                decode_rate, model, ids * mask, mask, given.new, prefilled(model, ids * mask, mask, method)
            )
            for kind, mask in (("", equal), (" ragged", ragged))
            for arm, method in (("stock", None), ("ours", given.method))
        }
        found = rates[name] = {arm: own["rate"] for arm, own in by_turns(arms, given.pairs).items()}
        rows += [
            {"model": name, "ratio": label, **interval(ratio(found[a], found[b])), "tokens/s": median(found[a])}
            for label, (a, b) in RATIOS.items()
        ]
    title = f"Decode rate at {given.tokens} tokens, batch {given.batch}, {given.method}, no compaction"
    publish(given, title, rows, rates=rates)
