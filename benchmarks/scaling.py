"""How the time of a decode step of a bounded cache grows with logical length, budget, batch and layers.

A step's time here is the median between compactions, and a compaction's over the interval. Logical length: the
pretrained model decodes at the positions given; what it dropped before was never computed, random keys and values are
written chunk by chunk and compacted on the way. Layers: stacks of random weights. All points of an axis take turns.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from decoding import Bounded, Floor, Subject, load, random_model
from scipy import stats
from timing import Arms, Found, Row, by_turns, interval, median, ratio, script

from reasonkv import Budget

AXES = {
    "logical length": ("tokens", 1024), "budget": ("slots", 128), "batch": ("rows", 1), "layers": ("layers", 1),
}  # fmt: skip
"""Unit of every axis, and the step that its slope is told for."""
FLAT = 2048
"""From this length on a step should take as long as at any larger one."""


def points(given: argparse.Namespace, axis: str, subject: Subject) -> Arms:
    """Return what is measured at every point of an axis; all else stands at its default."""
    found, floor = {}, Floor(subject)
    for value in getattr(given, axis.replace(" ", "_")):
        at = {"logical length": given.at_length, "budget": given.at_budget, "batch": given.at_batch, axis: value}
        budget = Budget(at["budget"], interval=given.interval, prompt="count")
        if axis == "layers":  # as wide as the smaller pretrained model
            fields = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
            model = random_model(num_hidden_layers=value, num_key_value_heads=2, vocab_size=1024, **fields)
            subject = Subject(f"{value} layers", model)
            floor = Floor(subject)
        length = max(at["logical length"], at["budget"] + 1)
        one = Bounded(subject, given.method, budget, steps=given.steps, length=length)
        found[value] = partial(measure, one, at["batch"], floor.bounded_ms(at["batch"], budget))
    return found


def measure(one: Bounded, batch: int, floor_ms: float) -> dict[str, float]:
    """Measure the mean milliseconds of a step, and how many times its floor that is."""
    ms = one.measure(batch).mean_ms
    return {"ms": ms, "of the floor": ms / floor_ms}


@script
def main(given: argparse.Namespace) -> Found:
    torch.manual_seed(0)
    if (subject := load(given.model)) is None:
        return
    rows, slopes, flat = list[Row](), list[Row](), list[Row]()
    for axis, (unit, per) in AXES.items():
        found = by_turns(points(given, axis, subject), given.rounds, seconds=given.seconds)
        rows += [{"axis": axis, "value": value, "unit": unit, "ms per step": median(own["ms"]),
                  "of the floor": median(own["of the floor"]), "rounds": len(own["ms"])}
                 for value, own in found.items()]  # fmt: skip
        pairs = [(value, ms) for value, own in found.items() for ms in own["ms"]]
        fit = stats.linregress(*zip(*pairs, strict=True))
        reach = float(stats.t.ppf(0.975, max(1, len(pairs) - 2)) * fit.stderr)
        slopes.append({"axis": axis, "ms per": f"{per} {unit}", "slope": per * fit.slope,
                       "95 % low": per * (fit.slope - reach), "95 % high": per * (fit.slope + reach),
                       "at 0, ms": fit.intercept, "r^2": fit.rvalue**2})  # fmt: skip
        if axis == "logical length":
            first = min((one for one in found if one >= FLAT), default=max(found))
            flat = [{"from": first, "to": one, **interval(ratio(found[one]["ms"], found[first]["ms"]), "time over")}
                    for one in found if one > first]  # fmt: skip
    title = (
        f"A decode step of {subject.name} {subject.dtype}, {given.method}; unless it is the axis: budget "
        f"{given.at_budget}, batch {given.at_batch}, length {given.at_length}"
    )
    yield {"title": title, "rows": rows, "slopes": slopes, "flat": flat}
