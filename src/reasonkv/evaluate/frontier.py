"""What a method needs to keep a target (usable budgets), and where a smaller budget does better (crossings).

A mean is only ever taken over one task, one budget rule and one regime. Examples are the unit: samples of a problem are
averaged first, differences are paired by example, and resampling draws examples.

Legend: B measured budgets, N examples, R bootstrap samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reasonkv.evaluate.statistics import LEAST, Difference, bootstrap_means, holm, paired_difference, paired_p_value
from reasonkv.evaluate.table import read_manifest, read_results
from reasonkv.evaluate.target import HIGHER_IS_BETTER, FrontierError, Target

Axis = Literal["tokens", "physical_mean", "bytes_held"]
EQUAL = 0.02
"""Two cells are at equal memory when their means on an axis differ by under this share."""
_SETTINGS = ("dtype", "seed", "limit", "traces", "samples", "sampling", "max_new_tokens")


@dataclass(frozen=True)
class Point:
    """One cell on one task in one regime."""

    task: str
    method: str
    rule: str  # every field of the budget but its size, as canonical JSON
    regime: str
    tokens: int
    values: dict[int, float]  # the metric by example
    full: dict[int, float]  # full KV's on the same examples, as far as it ran
    physical_mean: float  # slots attended, mean over examples
    bytes_held: float  # mean over examples

    @property
    def mean(self) -> float:
        """Mean of the metric over examples."""
        return math.fsum(self.values.values()) / len(self.values)

    def says_nothing(self, target: Target) -> bool:
        """Return whether full KV itself has nothing here, so that a relative target asks for nothing."""
        relative = target.relative and HIGHER_IS_BETTER[target.metric]
        return relative and bool(self.full) and not any(self.full.values())

    def x(self, axis: Axis) -> float:
        """Return the cell's place on an axis."""
        return float(getattr(self, axis))

    def comparable(self, other: Point) -> bool:
        """Whether both are of one task, rule and regime, and of different methods."""
        same = (self.task, self.rule, self.regime) == (other.task, other.rule, other.regime)
        return same and self.method != other.method


def measured_points(frame: pd.DataFrame, metric: str) -> list[Point]:
    """Return every cell, split by task, budget rule and regime, budgets ascending, in the order they first occur.

    Raises:
        FrontierError: records of this kind have no such metric.
    """
    if (frame["kind"].iloc[0] == "evaluate") != (metric == "accuracy"):
        has = "accuracy" if frame["kind"].iloc[0] == "evaluate" else "top1, nll and kl"
        raise FrontierError(f"These records have {has}, not {metric}; choose another --metric or another folder.")
    name = "correct" if metric == "accuracy" else metric

    def examples(part: pd.DataFrame) -> dict[int, float]:
        means = part[name].astype(float).groupby(part["example"]).mean()
        return {int(example): float(value) for example, value in means.items()}

    full = {task: examples(part) for task, part in frame[frame["tokens"] == 0].groupby("task")}
    bounded = frame[frame["tokens"] > 0]
    keys = ["task", "label", "rule", "regime"]
    order = {key: at for at, key in enumerate(dict.fromkeys(zip(*(bounded[one] for one in keys), strict=True)))}
    cells = {key: part for key, part in bounded.groupby([*keys, "tokens"], sort=False)}
    points = []
    for key in sorted(cells, key=lambda key: (order[key[:4]], key[4])):
        part, values = cells[key], examples(cells[key])
        reference = {one: full[key[0]][one] for one in values if one in full.get(key[0], {})}
        slots, held = (float(part[one].mean()) for one in ("physical_mean", "bytes_held"))
        task, method, rule, regime, tokens = key
        points.append(Point(task, method, rule, regime, int(tokens), values, reference, slots, held))
    return points


# -- usable budgets ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UsableBudget:
    """The smallest budget that keeps a target."""

    # "reached" between two measured budgets; "at most" the smallest measured one, which keeps it already; "not reached"
    # by the largest
    status: Literal["reached", "at most", "not reached"]
    tokens: float | None  # on the axis it was asked for; None when not reached
    # lower end of the 95 % interval; equal to `smallest` it means "or less". None: not reached either.
    low: float | None
    # upper end; None where more than 2.5 % of resamples do not reach the target. Below `LEAST` examples there is no
    # interval, and both are None.
    high: float | None
    smallest: float
    largest: float
    examples: int
    fails_above: tuple[float, ...] = ()  # measured budgets above one that keeps the target, which do not keep it


def usable_budget(
    points: Sequence[Point], target: Target, *, axis: Axis = "tokens", seed: int = 0, resamples: int = 2000
) -> UsableBudget:
    """Return the smallest budget from which on every measured budget keeps the target.

    Between two measured budgets the metric is taken to be linear in log(budget). Measured curves need not rise: the
    envelope that is crossed is, at every budget, the worst margin at it or at any larger one, so a budget that keeps
    the target by luck below one that fails is not called usable (`fails_above` names such budgets). The interval is the
    bootstrap percentile interval over examples: each resample computes all means and the crossing again.

    Args:
        points: of one task, method, rule and regime, at one or more budgets.
        resamples: bootstrap samples; those that hold no example of some point are left out.

    Raises:
        FrontierError: no points, points of several cells, or full KV is missing.
    """
    if not points:
        raise FrontierError("A usable budget needs at least one measured budget.")
    if len({(p.task, p.method, p.rule, p.regime) for p in points}) > 1:
        raise FrontierError("A usable budget belongs to one task, method, budget rule and regime.")
    if target.relative and any(len(p.full) < len(p.values) for p in points):
        raise FrontierError("A target relative to full KV needs full KV on the same examples; add full to --methods.")
    points = sorted(points, key=lambda point: point.x(axis))
    x_B = np.array([point.x(axis) for point in points])
    examples = sorted(set().union(*(point.values for point in points)))
    stack_3BN = np.zeros((3, len(points), len(examples)))
    for b, point in enumerate(points):
        for n, example in enumerate(examples):
            if example in point.values:
                stack_3BN[:, b, n] = point.values[example], point.full.get(example, 0.0), 1.0
    margin_B = _margins(stack_3BN.mean(axis=-1), target)
    found = float(_crossing(x_B, margin_B[:, None])[0])
    drawn_BR = _margins(bootstrap_means(stack_3BN, seed=seed, resamples=resamples), target)
    drawn_R = _crossing(x_B, drawn_BR[:, np.isfinite(drawn_BR).all(axis=0)])
    ends = [float(np.quantile(drawn_R, q, method="higher")) if len(drawn_R) else math.inf for q in (0.025, 0.975)]
    keeps = np.flatnonzero(margin_B >= 0)
    fails = tuple(float(x) for b, x in enumerate(x_B) if len(keeps) and b > keeps[0] and margin_B[b] < 0)
    status: Literal["reached", "at most", "not reached"] = "reached"
    if math.isinf(found):
        status = "not reached"
    elif found <= x_B[0]:
        status = "at most"
    if len(examples) < LEAST:
        ends = [math.inf, math.inf]
    tokens, low, high = (None if math.isinf(one) else one for one in (found, *ends))
    return UsableBudget(status, tokens, low, high, float(x_B[0]), float(x_B[-1]), len(examples), fails)


def _margins(stack: NDArray[np.float64], target: Target) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        margins: NDArray[np.float64] = target.margin(stack[0] / stack[2], stack[1] / stack[2])
    return margins


def _crossing(x_B: NDArray[np.float64], margin_BR: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the envelope of each column reaches 0; infinite where it never does, and at least the smallest x."""
    envelope_BR = np.minimum.accumulate(margin_BR[::-1], axis=0)[::-1]
    log_B = np.log(x_B)
    first_R = (envelope_BR >= 0).argmax(axis=0)
    columns = np.arange(margin_BR.shape[1])
    before_R = np.maximum(first_R - 1, 0)
    below, above = envelope_BR[before_R, columns], envelope_BR[first_R, columns]
    share = -below / np.where(above > below, above - below, 1.0)
    at = np.exp(log_B[before_R] + np.clip(share, 0, 1) * (log_B[first_R] - log_B[before_R]))
    at = np.where(first_R == 0, x_B[0], at)  # without the rounding of exp and log
    crossing: NDArray[np.float64] = np.where(envelope_BR[-1] >= 0, at, np.inf)
    return crossing


# -- crossings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two cells on the examples both have; the first holds no more than the second."""

    ours: Point
    theirs: Point
    advantage: Difference  # how much better ours is (a lower nll or kl is better), with a 95 % interval
    p: float  # Holm-adjusted over every pair that was compared

    @property
    def holds(self) -> bool:
        """Ours is better: the interval lies above 0, and the adjusted p-value is below 0.05."""
        return self.advantage.low > 0 and self.p < 0.05

    @property
    def label(self) -> str:
        """As in `rkv@128 > snapkv@256`."""
        return f"{self.ours.method}@{self.ours.tokens:,} > {self.theirs.method}@{self.theirs.tokens:,}"


def pairs_to_test(points: Sequence[Point], axis: Axis = "tokens") -> list[tuple[Point, Point]]:
    """Return every pair of methods on one task, rule and regime whose first is the smaller on the axis.

    Where the axis is a mean, cells within 2 % of each other are at equal memory, and no pair.
    """
    slack = 1.0 if axis == "tokens" else 1 - EQUAL
    ordered = (sorted(pair, key=lambda one: one.x(axis)) for pair in combinations(points, 2))
    return [
        (ours, theirs)
        for ours, theirs in ordered
        if ours.comparable(theirs) and ours.x(axis) < slack * theirs.x(axis) and ours.values.keys() & theirs.values
    ]


def crossings(points: Sequence[Point], metric: str, *, axis: Axis = "tokens") -> list[Comparison]:
    """Return every pair of methods and budgets where the smaller budget does better, the surest first.

    All pairs of `pairs_to_test` are tested (paired t test over examples, for a bootstrap of affordable size cannot give
    p-values small enough to survive the correction), and Holm's correction runs over all of them, also those where the
    larger budget does better. The interval is the paired bootstrap's and is not corrected.
    """
    found = compared(pairs_to_test(points, axis), metric, better=True)
    return sorted(found, key=lambda one: (not one.holds, one.p, -one.advantage.mean))


def between(points: Sequence[Point], ours: str, theirs: str, metric: str, *, axis: Axis = "tokens") -> list[Comparison]:
    """Compare one method with another at the same budget and at every larger one, whoever does better.

    The pair of methods is named beforehand, so Holm's correction runs over these pairs alone.

    Args:
        ours: label of the method at the smaller budget.

    Raises:
        FrontierError: no compressed cell of one of them, or none at an equal or larger budget of the other.
    """
    known = sorted({point.method for point in points})
    for name in (ours, theirs):
        if name not in known:
            raise FrontierError(f"No compressed cell is of method {name!r}; there are {', '.join(known)}.")
    slack = 1.0 if axis == "tokens" else 1 + EQUAL
    pairs = [
        (one, other)
        for one, other in product(points, repeat=2)
        if (one.method, other.method) == (ours, theirs)
        and (one.comparable(other) or ours == theirs)
        and one.x(axis) <= other.x(axis) * slack
    ]
    if not pairs:
        raise FrontierError(f"{ours} has no cell at a budget that {theirs} has, or at a smaller one.")
    return compared(pairs, metric)


def compared(
    pairs: Iterable[tuple[Point, Point]], metric: str, *, better: bool = False, seed: int = 0, resamples: int = 2000
) -> list[Comparison]:
    """Compare pairs that share an example, in their order; Holm's correction runs over all of them.

    Args:
        better: leave out the pairs whose first is not better.
    """
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    pairs = [(ours, theirs) for ours, theirs in pairs if ours.values.keys() & theirs.values]
    gains = [
        {one: sign * (ours.values[one] - theirs.values[one]) for one in sorted(ours.values.keys() & theirs.values)}
        for ours, theirs in pairs
    ]
    found = []
    for pair, own, p in zip(pairs, gains, holm([paired_p_value(list(one.values())) for one in gains]), strict=True):
        if not better or sum(own.values()) > 0:
            gain = paired_difference(own, dict.fromkeys(own, 0.0), seed=seed, resamples=resamples)
            assert gain is not None, "they share an example"
            found.append(Comparison(*pair, gain, p))
    return found


def read_comparable(folders: Sequence[Path]) -> pd.DataFrame:
    """Read folders that may be compared; a record that several hold (full KV's, say) counts once.

    Raises:
        FrontierError: their models, kinds or settings differ, or they hold full KV alone.
    """
    manifests = [read_manifest(folder) for folder in folders]
    frames = [read_results([folder]) for folder in folders]
    for folder, manifest, frame in zip(folders[1:], manifests[1:], frames[1:], strict=True):
        if frame["kind"].iloc[0] != frames[0]["kind"].iloc[0]:
            raise FrontierError(f"{folder} and {folders[0]} hold different kinds of results; give one kind.")
        if manifest.get("model", {}).get("hash") != manifests[0].get("model", {}).get("hash"):
            raise FrontierError(f"{folder} and {folders[0]} hold results of different models.")
        ours, theirs = (one.get("arguments", {}) for one in (manifest, manifests[0]))
        for name in _SETTINGS:
            if json.dumps(ours.get(name), sort_keys=True) != json.dumps(theirs.get(name), sort_keys=True):
                raise FrontierError(f"{folder} and {folders[0]} differ in {name}, so they cannot be compared.")
    whole = pd.concat(frames, ignore_index=True)
    identity = ["method", "options", "budget", "task", "example", "sample", "seed"]
    if (whole["tokens"] == 0).all():
        raise FrontierError("These results hold full KV alone; a frontier needs bounded methods.")
    return whole.drop_duplicates(identity, ignore_index=True)
