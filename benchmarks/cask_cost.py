"""Milliseconds of one CASK event at Qwen3-8B geometry: planning (scores included) and carrying out, one row, float32.

36 layers, 32 query and 8 KV heads of 128. The last event of a cache that holds budget + 128 slots, nothing folded yet;
every layer has its own memory, so nothing is warm in the caches. Keys are clustered and drift, so that neighbours are
alike as in a trace. Planning is everything between views and plans: scores, comparison vectors, both stages, the
feasibility search. Carrying out is the gather and the folds of keys and values of all layers.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from common import median_interval, publish
from event_cost import KV_HEADS, LAYERS, QUERY_HEADS, D

from reasonkv import get_method
from reasonkv.calibration import LayerStatistics
from reasonkv.compaction import compact_pair
from reasonkv.methods.cask import comparison_vectors
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

THETA, FLUSH = 1e6, 64 * 2**20


def view_of(layer: int, held: int, prompt: int, rotary: Rotary) -> SlotView:
    """One layer's slots, rotated at 0 .. held - 1."""
    drift_HND = torch.randn(1, KV_HEADS, held, D).cumsum(2) / held**0.5
    keys = torch.randn(1, KV_HEADS, 1, D) + drift_HND + 0.3 * torch.randn(1, KV_HEADS, held, D)
    position = torch.arange(held).expand(1, KV_HEADS, held)
    protected = (position < 4) | (position >= held - 64)
    mean = torch.randn(QUERY_HEADS, D // 2, dtype=torch.complex64)
    statistics = LayerStatistics(mean, mean.abs() + torch.rand(QUERY_HEADS, D // 2))
    one = torch.zeros(1, dtype=torch.long)
    return SlotView(
        rotary.rotate(keys, position), torch.randn_like(keys), position,
        torch.ones(1, KV_HEADS, held, dtype=torch.int32), position < prompt, protected, None, None, D**-0.5,
        one + held, one, one, 0, layer, prompt_length_B=one + prompt, query_heads=QUERY_HEADS,
        calibration=statistics, rotary=rotary,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rotary = Rotary(1.0 / THETA ** (torch.arange(0, D, 2) / D))
    load = os.getloadavg()[0]
    rows = []
    for spec in ("cask", "cask:profile=paper,prompt_stage=pin", "cask:per_layer=true", "cask:fold=none"):
        for keep in (384, 1024):
            method = get_method(spec)
            plan_ms, score_ms, vector_ms, carry_ms = [], [], [], []
            for repeat in range(arguments.repeats + 1):
                torch.manual_seed(repeat)
                views = [view_of(layer, keep + 128, 128, rotary) for layer in range(LAYERS)]
                torch.zeros(FLUSH).add_(1)  # 256 MiB: nothing of the layers stays in a cache
                start = time.perf_counter()
                plans = method.plan_layers(views, keep)
                planned = time.perf_counter()
                torch.zeros(FLUSH).add_(1)
                carried = time.perf_counter()
                for view, plan in zip(views, plans, strict=True):
                    compact_pair(view.keys_BHND, view.values_BHND, [0], plan, view.positions_BHN)
                done = time.perf_counter()
                torch.zeros(FLUSH).add_(1)
                again = time.perf_counter()
                for view in views:
                    method._scores(view)
                scored = time.perf_counter()
                torch.zeros(FLUSH).add_(1)
                before = time.perf_counter()
                comparison_vectors(views)
                after = time.perf_counter()
                if repeat:
                    plan_ms.append((planned - start) * 1e3)
                    carry_ms.append((done - carried) * 1e3)
                    score_ms.append((scored - again) * 1e3)
                    vector_ms.append((after - before) * 1e3)
            middle, low, high = median_interval(plan_ms)
            parts = [median_interval(part)[0] for part in (score_ms, vector_ms, carry_ms)]
            rows.append([method.spec(), keep, middle, low, high, *parts])
    publish(
        "cask_cost",
        f"One CASK event of all {LAYERS} layers at Qwen3-8B geometry, budget + 128 -> budget, float32, batch 1, CPU",
        ["method", "budget", "planning ms", "95 % low", "95 % high", "scores ms of it", "vectors ms of it", "carry ms"],
        rows,
        {
            "layers": LAYERS,
            "query_heads": QUERY_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": D,
            "dtype": "torch.float32",
            "load_average_before": load,
        },
    )


if __name__ == "__main__":
    main()
