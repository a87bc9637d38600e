"""Milliseconds of one compaction of TriAttention and CASK at Qwen3-8B geometry, one row, float32.

36 layers, 32 query and 8 KV heads of 128. The last compaction of a cache that holds budget + 128 slots, nothing merged
yet; every layer has its own memory, so nothing is warm in the caches. Keys are clustered and drift, so that neighbours
are alike as in a trace. Planning is everything between views and plans. Carrying out is the gather and the merges of
keys and values of all layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from event_cost import KV_HEADS, QUERY_HEADS, D
from timing import Found, by_turns, interval, median, median_interval, milliseconds, script

from reasonkv import get_method
from reasonkv.compaction import compact_pair
from reasonkv.methods.frequency import layer_scores
from reasonkv.methods.keys import comparison_vectors
from reasonkv.plan import Plan
from reasonkv.rotary import Rotary
from reasonkv.view import LayerStatistics, SlotView

THETA, INTERVAL = 1e6, 128
SPECS = (
    "triattention", "triattention:mode=global", "triattention:mode=per_layer_per_head", "cask", "cask:fold=neighbours",
    "cask:fold=none", "cask:per_layer=true", "cask:variant=paper",
)  # fmt: skip


def view_of(layer: int, held: int, prompt: int, rotary: Rotary) -> SlotView:
    """Return one layer's slots, rotated at 0 .. held - 1."""
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


def once(keep: int, layers: int, rotary: Rotary) -> dict[str, float]:
    """Measure every method's compaction, and the parts they share, on fresh slots."""
    views = [view_of(layer, keep + INTERVAL, INTERVAL, rotary) for layer in range(layers)]

    def carry_out(plans: list[Plan]) -> None:
        for view, plan in zip(views, plans, strict=True):
            compact_pair(view.keys_BHND, view.values_BHND, [0], plan, view.positions_BHN)

    shared: dict[str, Callable[[], object]] = {
        "read": lambda: [(view.keys_BHND.sum(), view.values_BHND.sum()) for view in views],
        "scores": lambda: [layer_scores(view) for view in views], "vectors": lambda: comparison_vectors(views),
    }  # fmt: skip
    timed = {name: milliseconds(work, cold=True) for name, work in shared.items()}
    for spec in SPECS:
        plans = list[Plan]()
        plan_layers = partial(get_method(spec).plan_layers, views, keep)
        timed[f"plan {spec}"] = milliseconds(lambda plan=plan_layers, into=plans: into.extend(plan()), cold=True)
        timed[f"carry {spec}"] = milliseconds(partial(carry_out, plans), cold=True)
    return timed


@script
def main(given: argparse.Namespace) -> Found:
    torch.manual_seed(0)
    rotary = Rotary(1.0 / THETA ** (torch.arange(0, D, 2) / D))
    rows = []
    for keep in given.budgets:
        parts = by_turns({"": partial(once, keep, given.layers, rotary)}, given.repeats, warm_up=1)[""]
        for spec in SPECS:
            compares = spec.startswith("cask") and "fold=none" not in spec
            rows.append({
                "budget": keep, "method": spec, **interval(median_interval(parts[f"plan {spec}"]), "planning ms"),
                "of it scores": median(parts["scores"]), "of it vectors": median(parts["vectors"]) if compares else 0.0,
                "carrying out": median(parts[f"carry {spec}"]), "to read K and V once": median(parts["read"]),
            })  # fmt: skip
    where = f"{given.layers} layers at Qwen3-8B geometry, budget + {INTERVAL} -> budget, float32, batch 1"
    yield {"title": f"One compaction of {where}", "rows": rows}
