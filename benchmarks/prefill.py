"""How long a prompt takes, and what it holds at most: whole, in chunks, and in chunks with compactions between them.

Chunks with compactions hold at most the budget and a chunk, so their time should grow as the prompt does. Random token
ids; the logits of the last token only.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from decoding import Floor, Subject, load
from timing import Found, by_turns, median, script
from transformers import Cache, DynamicCache

from reasonkv import Budget, CompressedCache


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


@script
def main(given: argparse.Namespace) -> Found:
    if (subject := load(given.model)) is None:
        return
    floor, draw = Floor(subject), torch.Generator().manual_seed(0)
    bounded = Budget(given.budget, prompt="count", prefill_chunk=given.chunk)
    ways = {"stock, whole": (None, None), "stock, chunks": (given.chunk, None), given.method: (given.chunk, bounded)}
    prompts = {length: torch.randint(5, 100, (given.batch, length), generator=draw) for length in given.lengths}
    arms = {
        (name, length): partial(prefill, subject, ids, chunk or length, budget, given.method)
        for length, ids in prompts.items() for name, (chunk, budget) in ways.items()
    }  # fmt: skip
    found, rows = by_turns(arms, given.rounds, seconds=given.seconds), []
    for (name, (chunk, budget)), length in ((way, length) for way in ways.items() for length in given.lengths):
        own, chunk = found[name, length], chunk or length
        seconds, most = median(own["seconds"]), length if budget is None else given.budget
        least = sum(floor.prompt_seconds(given.batch, min(chunk, length - start), min(start, most))
                    for start in range(0, length, chunk))  # fmt: skip
        rows.append({"prompt": name, "tokens": length, "seconds": seconds, "tokens/s": given.batch * length / seconds,
                     "MB at most": median(own["bytes"]) / 1e6, "of the floor": seconds / least,
                     "rounds": len(own["seconds"])})  # fmt: skip
    per = [row["seconds"] / row["tokens"] for row in rows if row["prompt"] == given.method]
    title = (
        f"Prompts of {subject.name} {subject.dtype}, batch {given.batch}, chunks of {given.chunk}, {given.method} at "
        f"{given.budget} slots: the longest takes {per[-1] / per[0]:.2f} times as long a token as the shortest"
    )
    yield {"title": title, "rows": rows}
