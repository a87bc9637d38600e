"""Milliseconds of one event of TriAttention and CASK at Qwen3-8B geometry, one row, float32.

36 layers, 32 query and 8 KV heads of 128. The last event of a cache that holds budget + 128 slots, nothing folded yet;
every layer has its own memory, so nothing is warm in the caches. Keys are clustered and drift, so that neighbours are
alike as in a trace. Planning is everything between views and plans: scores, for CASK comparison vectors, both stages
and the feasibility search. Carrying out is the gather and the folds of keys and values of all layers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

import torch
from common import median_interval, publish
from event_cost import KV_HEADS, LAYERS, QUERY_HEADS, D

from reasonkv import get_method
from reasonkv.calibration import LayerStatistics
from reasonkv.compaction import compact_pair
from reasonkv.methods.cask import comparison_vectors
from reasonkv.methods.frequency import frequency_scores
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import SlotView

THETA, FLUSH = 1e6, 64 * 2**20
BUDGETS, INTERVAL = (384, 1024), 128
SPECS = (
    "triattention",
    "triattention:mode=global",
    "triattention:mode=per_layer_per_head",
    "cask",
    "cask:fold=neighbours",
    "cask:fold=none",
    "cask:per_layer=true",
    "cask:profile=paper,prompt_stage=pin",
)


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


def scores(views: list[SlotView]) -> None:
    """All layers' scores for all query heads: what TriAttention and CASK share."""
    for view in views:
        assert view.calibration is not None and view.rotary is not None
        frequency_scores(view.keys_BHND, view.calibration, view.rotary, view.length_B)


def carry_out(views: list[SlotView], plans: list[Plan]) -> None:
    """Gather and fold the keys and values of all layers."""
    for view, plan in zip(views, plans, strict=True):
        compact_pair(view.keys_BHND, view.values_BHND, [0], plan, view.positions_BHN)


def milliseconds(work: Callable[[], object]) -> float:
    """How long `work` takes on keys that lie in no cache."""
    torch.zeros(FLUSH).add_(1)  # 256 MiB
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def once(views: list[SlotView], keep: int) -> dict[str, float]:
    """Every method's event, and the parts they share, in milliseconds."""
    timed = {
        "read": milliseconds(lambda: [(view.keys_BHND.sum(), view.values_BHND.sum()) for view in views]),
        "scores": milliseconds(lambda: scores(views)),
        "vectors": milliseconds(lambda: comparison_vectors(views)),
    }
    for spec in SPECS:
        planned: list[Plan] = []
        plan = partial(get_method(spec).plan_layers, views, keep)
        timed[f"plan {spec}"] = milliseconds(lambda plan=plan, planned=planned: planned.extend(plan()))  # type: ignore[misc]
        timed[f"carry {spec}"] = milliseconds(partial(carry_out, views, planned))
    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rotary = Rotary(1.0 / THETA ** (torch.arange(0, D, 2) / D))
    load = os.getloadavg()[0]
    rows = []
    for keep in BUDGETS:
        parts: dict[str, list[float]] = {}
        for repeat in range(arguments.repeats + 1):  # the first warms up
            torch.manual_seed(repeat)
            views = [view_of(layer, keep + INTERVAL, INTERVAL, rotary) for layer in range(LAYERS)]
            timed = once(views, keep)
            if repeat:
                for name, took in timed.items():
                    parts.setdefault(name, []).append(took)
        middle = {name: median_interval(took)[0] for name, took in parts.items()}
        for spec in SPECS:
            low, high = median_interval(parts[f"plan {spec}"])[1:]
            vectors = middle["vectors"] if spec.startswith("cask") and "fold=none" not in spec else 0.0
            rows.append(
                [keep, spec, middle[f"plan {spec}"], low, high, middle["scores"], vectors,
                 middle[f"carry {spec}"], middle["read"]]
            )  # fmt: skip
    publish(
        "calibrated_cost",
        f"One event of all {LAYERS} layers at Qwen3-8B geometry, budget + {INTERVAL} -> budget, float32, batch 1, CPU",
        ["budget", "method", "planning ms", "95 % low", "95 % high", "of it scores", "of it vectors", "carrying out",
         "to read K and V once"],
        rows,
        {
            "layers": LAYERS,
            "query_heads": QUERY_HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": D,
            "dtype": "torch.float32",
            "repeats": arguments.repeats,
            "load_average_before": load,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
