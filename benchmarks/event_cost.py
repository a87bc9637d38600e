"""Milliseconds of one event at Qwen3-8B geometry, beside the time to read the same keys and values once from memory.

36 layers, 32 query and 8 KV heads of 128, bf16, 1,152 -> 1,024 slots, one row. An event is everything the cache does:
view, scores, top-k, check, gather, write back. Every layer has its own memory, so nothing is warm in the caches.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import median_interval, publish

from reasonkv import Budget, get_method
from reasonkv.runtimes.transformers.rows import Piece, Row
from reasonkv.runtimes.transformers.storage import LayerStorage
from reasonkv.schedule import State
from reasonkv.selection import top_k_slots
from reasonkv.view import SlotView

LAYERS, QUERY_HEADS, KV_HEADS, D = 36, 32, 8, 128
HELD, KEEP = 1152, 1024


def storage(queries: int, dtype: torch.dtype) -> tuple[LayerStorage, Piece]:
    """One layer about to have its event, filled with clustered random keys."""
    budget = Budget(KEEP, interval=HELD - KEEP)
    layer = LayerStorage(HELD, queries=queries)
    centres = torch.randn(1, KV_HEADS, 64, D)
    keys = (centres[:, :, torch.randint(64, (HELD,))] + 0.7 * torch.randn(1, KV_HEADS, HELD, D)).to(dtype)
    rows = [Row(State(prompt=1))]  # no event while it is filled
    fill = Piece.plan(rows, HELD - 1)
    layer.append(keys[:, :, :-1], torch.randn_like(keys[:, :, :-1]), fill)
    layer.remember_queries(torch.randn(1, QUERY_HEADS, HELD - 1, D, dtype=dtype), fill)
    rows[0].state, rows[0].budget = State(HELD - 1, HELD - 1, 1), budget
    last = Piece.plan(rows, 1)
    layer.append(keys[:, :, -1:], torch.randn_like(keys[:, :, -1:]), last)
    layer.remember_queries(torch.randn(1, QUERY_HEADS, 1, D, dtype=dtype), last)
    return layer, last


def event(layer: LayerStorage, piece: Piece, method: object, index: int) -> None:
    """What `CompressedLayer` does at an event, on a storage of its own."""
    position = layer.token_indices([0], HELD, [HELD], [0])
    keys, values = layer.slots([0], HELD)
    queries = query_positions = None
    if layer.ring_length:
        queries, query_positions = layer.recent_queries([0], [HELD])
    protected = position < 4
    protected[..., -64:] = True
    one = torch.zeros(1, dtype=torch.long)
    view = SlotView(
        keys, values, position, layer.source_counts([0], HELD, [0]), position < 1, protected,
        queries, query_positions, D**-0.5, one + HELD, one, one, 0, index,
    )  # fmt: skip
    plan = method.plan(view, KEEP)
    plan.check((1, KV_HEADS, HELD), KEEP, protected)
    layer.carry_out([([0], plan, view)], piece)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = torch.bfloat16
    rows = []
    for spec in ("streaming", "keydiff", "snapkv", "rkv", "rkv:form=port"):
        method = get_method(spec)
        total, read, select = [], [], []
        for repeat in range(arguments.repeats + 1):
            torch.manual_seed(repeat)
            layers = [storage(method.needs.queries, dtype) for _ in range(LAYERS)]
            flush = torch.zeros(64 * 2**20)
            flush.add_(1)  # 256 MiB: nothing of the layers stays in a cache
            start = time.perf_counter()
            for layer, _ in layers:
                layer.keys.view(torch.int64).sum()
                layer.values.view(torch.int64).sum()
            once = time.perf_counter() - start
            flush.add_(1)
            start = time.perf_counter()
            for index, (layer, piece) in enumerate(layers):
                event(layer, piece, method, index)
            took = time.perf_counter() - start
            scores = torch.randn(1, KV_HEADS, HELD)
            start = time.perf_counter()
            for _ in range(LAYERS):
                top_k_slots(scores, KEEP)
            chosen = time.perf_counter() - start
            if repeat:
                total.append(took * 1e3)
                read.append(once * 1e3)
                select.append(chosen * 1e3)
        middle, low, high = median_interval(total)
        base = median_interval(read)[0]
        rows.append([method.spec(), middle, low, high, base, middle / base, median_interval(select)[0]])
    publish(
        "event_cost",
        f"One event of all {LAYERS} layers at Qwen3-8B geometry, {HELD} -> {KEEP} slots, bf16, batch 1, CPU",
        ["method", "ms", "95 % low", "95 % high", "ms to read K and V once", "ratio", "ms of it in top-k"],
        rows,
        {"layers": LAYERS, "query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": D, "dtype": str(dtype)},
    )


if __name__ == "__main__":
    main()
