"""Means, intervals and tests over examples.

Examples are the unit: standard errors are clustered by example, differences paired by it, resampling draws it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr

RESAMPLES = 5000
LEAST = 8
"""Fewest examples with an interval: of fewer, a bootstrap draws the same few means again and again."""
Z = 1.959964
"""Standard errors on either side of a 95 % interval."""


class Estimate(NamedTuple):
    """A mean and its standard error (NaN where one cluster gives none)."""

    mean: float
    se: float


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, ours minus theirs, and the number of pairs.

    `low` and `high` are the ends of a 95 % bootstrap interval; NaN below `LEAST` examples, where there is none.
    """

    mean: float
    low: float
    high: float
    pairs: int


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a rate; NaN below `LEAST` examples.

    Unlike mean and standard error, it stays inside 0 and 1 and has a width where all or none are right. For scores
    between 0 and 1, and for means over several samples of each example, it is wider than needed, never narrower.

    Args:
        rate: between 0 and 1.
        n: examples, whatever their number of samples.
    """
    if n < LEAST or math.isnan(rate):
        return math.nan, math.nan
    middle, shrink = rate + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * math.sqrt(rate * (1 - rate) / n + (Z / (2 * n)) ** 2)
    return max(0.0, (middle - half) / shrink), min(1.0, (middle + half) / shrink)


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Return the mean of all values, and a standard error that lets values of one cluster depend on each other.

    sqrt(G / (G - 1) * sum over clusters of (sum of (x - mean) of its members)^2) / n, for G clusters and n values.
    NaN is left out; the mean of nothing is NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(array)
    array = array[there]
    if not len(array):
        return Estimate(math.nan, math.nan)
    codes, names = pd.factorize(pd.Series(clusters)[there])
    mean, many = float(array.mean()), len(names)
    sums_G = np.bincount(codes, weights=array - mean)
    return Estimate(mean, math.sqrt(many / (many - 1) * float(sums_G @ sums_G)) / len(array) if many > 1 else math.nan)


@functools.lru_cache(maxsize=2)
def _counts(examples: int, seed: int, resamples: int) -> NDArray[np.float64]:
    """How often each example is drawn, float64 [resamples, examples]; equal seeds draw the same ones."""
    drawn_RN = np.random.default_rng(seed).integers(0, examples, size=(resamples, examples))
    drawn_RN += examples * np.arange(resamples)[:, None]
    counts = np.bincount(drawn_RN.ravel(), minlength=drawn_RN.size)
    return counts.reshape(drawn_RN.shape).astype(np.float64)


def bootstrap_means(
    values_XN: NDArray[np.float64], *, seed: int = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Return means over the last axis, float64 [..., R], once per bootstrap sample of its N examples."""
    n = values_XN.shape[-1]
    means: NDArray[np.float64] = values_XN @ _counts(n, seed, resamples).T / n
    return means


def paired_difference(
    ours: Mapping[Any, float], theirs: Mapping[Any, float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference | None:
    """Return the mean difference over the keys both have; None when they share none.

    The percentile bootstrap's interval holds the truth in 94.4 % of experiments at n = 64 and in 91.3 % at n = 12.

    Args:
        ours: values by example, or by (example, sample); an example that is drawn brings all its samples.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    difference_N = np.array([ours[key] - theirs[key] for key in shared], dtype=np.float64)
    codes, names = pd.factorize(np.array([key[0] if isinstance(key, tuple) else key for key in shared]))
    sums_G, counts_G = (np.bincount(codes, x).astype(np.float64) for x in (difference_N, None))
    if len(names) == len(shared):
        means_R = bootstrap_means(sums_G, seed=seed, resamples=resamples)
    else:
        sums_R, counts_R = bootstrap_means(np.stack([sums_G, counts_G]), seed=seed, resamples=resamples)
        means_R = sums_R / counts_R
    low, high = np.percentile(means_R, [2.5, 97.5]) if len(names) >= LEAST else (math.nan, math.nan)
    return Difference(float(difference_N.mean()), float(low), float(high), len(shared))


def paired_p_value(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t test that the mean difference is 0; 1 for fewer than two.

    Never below 2^(1 - n), the least that a test which flips signs can give with n examples; the t test's own value is 0
    when all differences are equal.
    """
    array = np.asarray(differences, dtype=np.float64)
    n = len(array)
    if n < 2 or not array.any():
        return 1.0
    mean, se = float(array.mean()), float(array.std(ddof=1)) / math.sqrt(n)
    p = 2 * float(stdtr(n - 1, -abs(mean / se))) if se > 1e-12 * abs(mean) else 0.0
    return min(1.0, max(p, 2.0 ** (1 - n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values: comparing them with 0.05 bounds the chance of any false finding by 5 %."""
    order = np.argsort(p_values, kind="stable")
    raised = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return [float(one) for one in adjusted]
