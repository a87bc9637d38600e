"""Decode tokens per second of every method on the testbed beside `random`, and what part of it goes into compactions.

Every method decodes the same number of tokens from the same prompts at the same budget, greedily, end tokens ignored.
A method's rate is divided by that of `random` in the same round. Left out, unless named, are methods that read the
queries of every step, selection methods, which evict nothing, full KV, and methods that look into the future.

    python benchmarks/decode_speed.py --batch 1 --prompt 1024 --budget 1024 --tokens 1024 --methods cask
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from timing import by_turns, interval, median, median_interval, publish, ratio, script
from transformers import PreTrainedModel

from reasonkv import Budget, CompressedCache, get_method
from reasonkv.methods import method_classes
from reasonkv.testbed import load_testbed

BASE, BOUND = "random", 0.9


def methods() -> list[str]:
    """Return the names of all methods whose decode steps should cost no more than those of `random`."""
    needs = {cls.name: get_method(cls.name).needs for cls in method_classes() if cls.bounded}
    return [name for name, one in needs.items() if not (one.observes or one.future or one.selects)]


def decode(
    model: PreTrainedModel, method: str, prompt_BL: torch.Tensor, tokens: int, budget: Budget
) -> dict[str, float]:
    """Decode for the whole batch; prefill, and compactions in it, are not timed."""
    with torch.no_grad(), CompressedCache(model, method, budget, max_length=prompt_BL.shape[1] + tokens) as cache:
        ids = model(prompt_BL, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        start, before = time.perf_counter(), cache.compaction_seconds
        for _ in range(tokens):
            ids = model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        took, inside = time.perf_counter() - start, cache.compaction_seconds - before
    each = 1e3 * inside / max(1, cache.stats().rows[0].events)
    return {"rate": len(prompt_BL) * tokens / took, "share": 100 * inside / took, "event": each}


@script(
    small={"batch": 2, "tokens": 80, "prompt": 16, "budget": 48, "interval": 16, "rounds": 2, "methods": ["snapkv"]},
    batch=16, tokens=2000, prompt=64, budget=256, interval=128, rounds=5, methods=("all",),
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    budget = Budget(given.budget, interval=given.interval, prompt="count")
    specs = dict.fromkeys([BASE, *(methods() if given.methods == ["all"] else given.methods)])
    prompt = torch.randint(5, 100, (given.batch, given.prompt), generator=torch.Generator().manual_seed(0))
    model = load_testbed()[0]
    for spec in specs:  # warms up, over one compaction
        decode(model, spec, prompt, min(given.tokens, given.budget + given.interval), budget)
    arms = {spec: partial(decode, model, spec, prompt, given.tokens, budget) for spec in specs}
    found = by_turns(arms, given.rounds, warm_up=0)
    rows = []
    for spec, own in found.items():
        beside = ratio(own["rate"], found[BASE]["rate"])
        share, low, high = median_interval(own["share"])
        rows.append({
            "method": spec, "tokens/s": median(own["rate"]), **interval(beside, f"of {BASE}"),
            "within 10 %": "yes" if beside[0] >= BOUND else "no", "compactions, % of decoding": share, "low": low,
            "high": high, "ms per compaction": median(own["event"]),
        })  # fmt: skip
    title = (
        f"Decoding {given.tokens} tokens, batch {given.batch}, budget {given.budget}, a compaction every "
        f"{given.interval} tokens, testbed float32"
    )
    publish(given, title, rows, rounds=found)
