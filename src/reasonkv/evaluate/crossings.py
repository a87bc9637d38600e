"""Where methods swap: a smaller budget of one that does better than a larger of another, with paired tests.

Pairs are of one task, budget rule and regime; examples are the unit, as in `reasonkv.evaluate.frontier`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from reasonkv.evaluate.frontier import HIGHER_IS_BETTER, Axis, FrontierError, Point
from reasonkv.evaluate.statistics import Difference, bootstrap_means, holm, paired_p_value, percentile_interval

EQUAL = 0.02
"""Two cells are at equal memory when their means on an axis differ by under this share."""


@dataclass(frozen=True)
class Comparison:
    """Two cells on the examples both have; the first holds no more than the second.

    Args:
        advantage: how much better ours is (a lower nll or kl is better), with a 95 % interval.
        p: Holm-adjusted over every pair that was compared.
    """

    ours: Point
    theirs: Point
    advantage: Difference
    p: float

    @property
    def holds(self) -> bool:
        """Ours is better: the interval lies above 0, and the adjusted p-value is below 0.05."""
        return self.advantage.low > 0 and self.p < 0.05

    @property
    def label(self) -> str:
        """As in `rkv@128 > snapkv@256`."""
        return f"{self.ours.method}@{self.ours.tokens:,} > {self.theirs.method}@{self.theirs.tokens:,}"


def crossings(points: Sequence[Point], metric: str, *, axis: Axis = "tokens", seed: int = 0) -> list[Comparison]:
    """Every pair of methods and budgets where the smaller budget does better, the surest first.

    Pairs are of one task, rule and regime, and ours is smaller on the axis (by over 2 % where it is a mean). All such
    pairs of the points given are tested (paired t test over examples, for a bootstrap of affordable size cannot give
    p-values small enough to survive the correction), and Holm's correction runs over all of them, also those where the
    larger budget does better. The interval is the paired bootstrap's and is not corrected.

    Args:
        points: from `measured_points`.
        metric: the points'.
        axis, seed: what "smaller" means; of the bootstrap.
    """
    pairs = []
    for one, other in combinations(points, 2):
        ours, theirs = (one, other) if one.x(axis) <= other.x(axis) else (other, one)
        slack = 1.0 if axis == "tokens" else 1 - EQUAL
        same = (ours.task, ours.rule, ours.regime) == (theirs.task, theirs.rule, theirs.regime)
        if same and ours.method != theirs.method and ours.x(axis) < slack * theirs.x(axis):
            pairs.append((ours, theirs))
    return _compare(pairs, metric, seed)


def matched(points: Sequence[Point], metric: str, *, axis: Axis = "physical_mean", seed: int = 0) -> list[Comparison]:
    """Every pair of methods at equal memory (means within 2 % on the axis), budget rules mixed, the surest first.

    Args:
        points, metric, seed: as in `crossings`.
        axis: what is equal.
    """
    pairs = []
    for one, other in combinations(points, 2):
        same = (one.task, one.regime) == (other.task, other.regime) and one.regime != "uncompressed"
        if same and one.method != other.method and abs(one.x(axis) / other.x(axis) - 1) < EQUAL:
            pairs += [(one, other), (other, one)]
    return _compare(pairs, metric, seed)


def between(
    points: Sequence[Point], ours: str, theirs: str, metric: str, *, axis: Axis = "tokens", seed: int = 0
) -> list[Comparison]:
    """One method against another at the same budget and at every larger one, whoever does better; by task and budget.

    As in `crossings`, but the pair of methods is named beforehand, so Holm's correction runs over these pairs alone.

    Args:
        points, metric, axis, seed: as in `crossings`.
        ours: label of the method at the smaller budget.
        theirs: label of the other.

    Raises:
        FrontierError: no decode-active cell of one of them, or none at an equal or larger budget of the other.
    """
    known = sorted({point.method for point in points})
    for name in (ours, theirs):
        if name not in known:
            raise FrontierError(f"No decode-active cell is of method {name!r}; there are {', '.join(known)}.")
    pairs = [
        (one, other)
        for one, other in product(points, repeat=2)
        if (one.method, other.method) == (ours, theirs)
        and (one.task, one.rule, one.regime) == (other.task, other.rule, other.regime)
        and one.x(axis) <= other.x(axis) * (1.0 if axis == "tokens" else 1 + EQUAL)
    ]
    if not pairs:
        raise FrontierError(f"{ours} has no cell at a budget that {theirs} has, or at a smaller one.")
    return _compared(pairs, metric, seed)


def _compare(pairs: Sequence[tuple[Point, Point]], metric: str, seed: int) -> list[Comparison]:
    """Compare, correct over all pairs, and keep those where the first is better, the surest first."""
    found = _compared(pairs, metric, seed, better=True)
    return sorted(found, key=lambda one: (not one.holds, one.p, -one.advantage.mean))


def _compared(
    pairs: Sequence[tuple[Point, Point]], metric: str, seed: int, *, better: bool = False
) -> list[Comparison]:
    """Compare and correct over all pairs; in their order, with `better` only those where the first is better."""
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    kept, p_values = [], []
    for ours, theirs in pairs:
        shared = sorted(ours.values.keys() & theirs.values.keys())
        if shared:
            kept.append((ours, theirs, np.array([sign * (ours.values[e] - theirs.values[e]) for e in shared])))
            p_values.append(paired_p_value(kept[-1][2].tolist()))
    found = []
    for (ours, theirs, difference_N), p in zip(kept, holm(p_values), strict=True):
        if not better or difference_N.mean() > 0:
            low, high = percentile_interval(bootstrap_means(difference_N, seed=seed, resamples=2000))
            advantage = Difference(float(difference_N.mean()), low, high, len(difference_N))
            found.append(Comparison(ours, theirs, advantage, p))
    return found
