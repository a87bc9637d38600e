"""How the time of a decode step of a bounded cache grows with logical length, budget, batch and layers.

A step's time here is the median between compactions, and a compaction's over the interval. Logical length: the
pretrained model decodes at the positions given; what it dropped before was never computed, random keys and values are
written chunk by chunk and compacted on the way. Layers: stacks of random weights. All points of an axis take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from decoding import SMALL, Bounded, Floor, Subject, load
from scipy import stats
from timing import by_turns, interval, median, publish, random_model, ratio, script

from reasonkv import Budget

AXES = {
    "logical length": "tokens", "budget": "slots", "batch": "rows", "layers": "layers",
}  # fmt: skip
FLAT = 2048
"""From this length on a step should take as long as at any larger one."""


def stack(layers: int) -> Subject:
    """Return a stack of random weights as wide as the smaller pretrained model."""
    fields = {"hidden_size": 896, "intermediate_size": 4864, "vocab_size": 1024, "max_position_embeddings": 32768}
    return Subject(f"{layers} layers", random_model(layers, 14, 2, dtype=torch.bfloat16, **fields))


def points(given: argparse.Namespace, axis: str, subject: Subject) -> Mapping[int, Callable[[], Mapping[str, float]]]:
    """Return what is measured at every point of an axis; all else stands at its default."""
    found: dict[int, Callable[[], Mapping[str, float]]] = {}
    floor = Floor(subject)
    for value in map(int, getattr(given, axis.replace(" ", "_"))):
        at = {"logical length": given.at_length, "budget": given.at_budget, "batch": given.at_batch, axis: value}
        budget = Budget(at["budget"], interval=given.interval, prompt="count")
        own = stack(value) if axis == "layers" else subject
        length = max(at["logical length"], at["budget"] + 1)
        if axis == "layers":
            floor = Floor(own)
        one = Bounded(own, given.method, budget, steps=given.steps, length=length)
        found[value] = partial(measure, one, at["batch"], floor.bounded_ms(at["batch"], budget))
    return found


def measure(one: Bounded, batch: int, floor_ms: float) -> dict[str, float]:
    """Measure the mean milliseconds of a step, and how many times its floor that is."""
    ms = one.measure(batch).mean_ms
    return {"ms": ms, "of the floor": ms / floor_ms}


@script(
    small={"model": "testbed", "logical_length": ["256", "512"], "budget": ["32", "64"], "batch": ["1", "2"],
           "layers": ["1", "2"], "at_budget": 32, "at_length": 256, "at_batch": 2, "interval": 16, "steps": 2,
           "rounds": 2, "seconds": 3.0},
    model=SMALL, method="expected", logical_length=("1024", "2048", "4096", "8192", "16384", "32768", "65536"),
    budget=("128", "256", "512", "1024", "2048"), batch=("1", "4", "16", "64"), layers=("2", "4", "8", "16"),
    at_budget=256, at_length=4096, at_batch=8, interval=128, steps=4, rounds=7, seconds=28.0,
)  # fmt: skip
def main(given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    began, subject = time.monotonic(), load(given.model)
    if subject is None:
        raise SystemExit("Nothing was measured.")
    rows, slopes, flat = [], [], []
    for axis, unit in AXES.items():
        found = by_turns(points(given, axis, subject), given.rounds, warm_up=0, seconds=given.seconds)
        for value, own in found.items():
            rows.append({"axis": axis, "value": value, "unit": unit, "ms per step": median(own["ms"]),
                         "of the floor": median(own["of the floor"]), "rounds": len(own["ms"])})  # fmt: skip
            print(f"{axis} {value}: {rows[-1]['ms per step']:.1f} ms a step", flush=True)
        pairs = [(value, ms) for value, own in found.items() for ms in own["ms"]]
        fit = stats.linregress(*zip(*pairs, strict=True))
        reach = float(stats.t.ppf(0.975, max(1, len(pairs) - 2)) * fit.stderr)
        per = 1024 if axis == "logical length" else 128 if axis == "budget" else 1
        slopes.append({"axis": axis, "ms per": f"{per} {unit}", "slope": per * fit.slope,
                       "95 % low": per * (fit.slope - reach), "95 % high": per * (fit.slope + reach),
                       "at 0, ms": fit.intercept, "r^2": fit.rvalue**2})  # fmt: skip
        if axis == "logical length":
            first = min((one for one in found if one >= FLAT), default=max(found))
            flat = [{"from": first, "to": one, **interval(ratio(found[one]["ms"], found[first]["ms"]), "time over")}
                    for one in found if one > first]  # fmt: skip
    where = f"{subject.name} {subject.dtype}, {given.method}"
    title = (
        f"A decode step of {where}; unless it is the axis: budget {given.at_budget}, batch {given.at_batch}, "
        f"length {given.at_length}"
    )
    publish(given, title, rows, slopes=slopes, flat=flat, seconds=time.monotonic() - began)
