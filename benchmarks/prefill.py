"""How long a prompt takes, and what it holds at most: whole, in chunks, and in chunks with compactions between them.

Chunks with compactions hold at most the budget and a chunk, so their time should grow as the prompt does. Random token
ids; the logits of the last token only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from decoding import SMALL, Floor, Subject, load
from timing import by_turns, median, publish, script
from transformers import Cache, DynamicCache

from reasonkv import Budget, CompressedCache
from reasonkv.floor import prompt_tokens


@torch.no_grad()
def prefill(subject: Subject, ids: torch.Tensor, chunk: int, budget: Budget | None, method: str) -> dict[str, float]:
    """Feed a prompt [B, n] in chunks; measure its seconds, and the most bytes of keys and values."""
    cache: Cache = DynamicCache(config=subject.model.config)
    if budget is not None:
        cache = CompressedCache(subject.model, method, budget, prompt_lengths=ids.shape[1])
    start = time.perf_counter()
    for part in ids.split(chunk, dim=1):
        subject.model(part, past_key_values=cache, logits_to_keep=1)
    seconds, held = time.perf_counter() - start, ids.numel() * subject.token_bytes
    if isinstance(cache, CompressedCache):
        stats = cache.stats()
        held = stats.bytes_allocated_peak + stats.bytes_beside
        cache.detach()
    return {"seconds": seconds, "bytes": held}


def floor_seconds(floor: Floor, batch: int, tokens: int, chunk: int, most: int | None) -> float:
    """Return the floor of a prompt in chunks, each beside at most so many slots of those before it."""
    seconds = 0.0
    for start in range(0, tokens, chunk):
        before = start if most is None else min(start, most)
        own = prompt_tokens(floor.shape, batch, min(chunk, tokens - start), before, floor.dtype)
        seconds += own.seconds(floor.rates)
    return seconds


@script(
    small={"model": "testbed", "lengths": ["64", "128"], "chunk": 32, "budget": 32, "rounds": 1, "seconds": 2.0},
    model=SMALL, lengths=("1024", "2048", "4096", "8192"), batch=1, chunk=512, budget=512, method="expected", rounds=3,
    seconds=110.0,
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    subject = load(given.model)
    if subject is None:
        raise SystemExit("Nothing was measured.")
    floor, lengths, draw = Floor(subject), [int(one) for one in given.lengths], torch.Generator().manual_seed(0)
    bounded = Budget(given.budget, prompt="count", prefill_chunk=given.chunk)
    ways = {"stock, whole": (None, None), "stock, chunks": (given.chunk, None), given.method: (given.chunk, bounded)}
    arms: dict[str, Callable[[], Mapping[str, float]]] = {}
    for length in lengths:
        ids = torch.randint(5, 100, (given.batch, length), generator=draw)
        for name, (chunk, budget) in ways.items():
            arms[f"{name} {length}"] = partial(prefill, subject, ids, chunk or length, budget, given.method)
    found, rows = by_turns(arms, given.rounds, warm_up=0, seconds=given.seconds), []
    for name, (chunk, budget) in ways.items():
        for length in lengths:
            own = found[f"{name} {length}"]
            least = floor_seconds(floor, given.batch, length, chunk or length, budget and given.budget)
            seconds = median(own["seconds"])
            rows.append({"prompt": name, "tokens": length, "seconds": seconds,
                         "tokens/s": given.batch * length / seconds, "MB at most": median(own["bytes"]) / 1e6,
                         "of the floor": seconds / least, "rounds": len(own["seconds"])})  # fmt: skip
    per = [row["seconds"] / row["tokens"] for row in rows if row["prompt"] == given.method]
    title = (
        f"Prompts of {subject.name} {subject.dtype}, batch {given.batch}, chunks of {given.chunk}, {given.method} at "
        f"{given.budget} slots: the longest takes {per[-1] / per[0]:.2f} times as long a token as the shortest"
    )
    publish(given, title, rows)
