"""Statistics against simulation, analytic values and hand computation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from reasonkv.evaluate.statistics import (
    LEAST,
    bootstrap_means,
    clustered_mean,
    holm,
    paired_difference,
    paired_p_value,
    wilson,
)

Array = NDArray[np.float64]
Pair = Callable[[np.random.Generator, int], tuple[Array, Array]]
N, SIMULATIONS, RESAMPLES = 64, 400, 1000


def normal(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    return rng.normal(0.3, 1.0, n), rng.normal(0.0, 1.0, n)


def skewed(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Exponential against constant: the difference keeps its skewness of 2."""
    return rng.exponential(1.0, n) - 0.7, np.zeros(n)


def correlated(rng: np.random.Generator, n: int) -> tuple[Array, Array]:
    """Two methods on the same problems: a common difficulty nine times as variable as either method's own part."""
    difficulty = rng.normal(0.0, 3.0, n)
    return difficulty + rng.normal(0.3, 1.0, n), difficulty + rng.normal(0.0, 1.0, n)


def shared_coverage(simulate: Pair, interval: Callable[[Array, Array, int], tuple[float, float]]) -> float:
    """How often the interval holds the true difference, 0.3, over `SIMULATIONS` experiments."""
    rng, hits = np.random.default_rng(7), 0
    for seed in range(SIMULATIONS):
        ours, theirs = simulate(rng, N)
        low, high = interval(ours, theirs, seed)
        hits += low <= 0.3 <= high
    return hits / SIMULATIONS


def paired(ours: Array, theirs: Array, seed: int) -> tuple[float, float]:
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)), seed=seed, resamples=RESAMPLES)
    assert found is not None
    return found.low, found.high


def is_nominal(coverage: float, known_shortfall: float) -> bool:
    """Within three binomial standard errors (1.1 points each at 400 simulations) of what theory gives.

    Below, the percentile interval's known small-sample shortfall is allowed on top; above, nothing is.
    """
    tolerance = 3 * math.sqrt(0.95 * 0.05 / SIMULATIONS)
    return 0.95 - known_shortfall - tolerance <= coverage <= 0.95 + tolerance


def percentile_coverage(n: int) -> float:
    """How often a percentile interval for a nominal 95 % covers the mean of n normal values, resampled without end."""
    return float(1 - 2 * stats.t.sf(1.959964 * math.sqrt((n - 1) / n), n - 1))


# Skewness g costs a central interval about 0.02 g^2 / n more per tail pair: for exponential values at n = 64 published
# simulations and Edgeworth's first terms both give 1 to 2 points.
SHORTFALL = 0.95 - percentile_coverage(N)


@pytest.mark.parametrize(
    ("simulate", "shortfall"), [(normal, SHORTFALL), (correlated, SHORTFALL), (skewed, SHORTFALL + 0.015)]
)
def test_the_paired_bootstrap_covers_the_truth_at_its_nominal_rate(simulate: Pair, shortfall: float) -> None:
    assert is_nominal(shared_coverage(simulate, paired), shortfall)


def test_the_coverage_test_can_fail_both_ways() -> None:
    def unpaired(ours: Array, theirs: Array, seed: int) -> tuple[float, float]:
        a = bootstrap_means(ours, seed=2 * seed, resamples=RESAMPLES)
        b = bootstrap_means(theirs, seed=2 * seed + 1, resamples=RESAMPLES)
        return tuple(np.percentile(a - b, [2.5, 97.5]))

    def too_short(ours: Array, theirs: Array, seed: int) -> tuple[float, float]:
        return tuple(np.percentile(bootstrap_means(ours - theirs, seed=seed, resamples=RESAMPLES), [5, 95]))

    assert not is_nominal(shared_coverage(correlated, unpaired), SHORTFALL)  # covers nearly always
    assert not is_nominal(shared_coverage(normal, too_short), SHORTFALL)


def test_the_coverage_is_what_the_docstring_says() -> None:
    assert "94.4 % of experiments at n = 64 and in 91.3 % at n = 12" in " ".join(str(paired_difference.__doc__).split())
    assert percentile_coverage(64) == pytest.approx(0.944, abs=0.0005)
    assert percentile_coverage(12) == pytest.approx(0.913, abs=0.0005)


def test_an_effect_of_one_standard_deviation_is_found() -> None:
    """Power: 8 standard errors from zero at n = 64, so that no interval of 100 holds zero."""
    rng = np.random.default_rng(3)
    for seed in range(100):
        low, high = paired(rng.normal(1.0, 1.0, N), np.zeros(N), seed)
        assert low > 0
        assert high < 2


def test_a_paired_difference_uses_what_both_share_and_does_not_depend_on_order() -> None:
    ours = {"b": 2.0, "a": 1.0, "only ours": 50.0}
    found = paired_difference(ours, {"a": 0.5, "b": 0.5, "only theirs": 9.0})
    assert found is not None
    assert (found.mean, found.pairs) == (1.0, 2)
    assert np.isnan(found.low) and np.isnan(found.high), "two examples have no interval"
    many = {key: float(key) for key in range(LEAST)}
    whole = paired_difference(many, dict.fromkeys(many, 0.5))
    assert whole == paired_difference(dict(reversed(many.items())), dict.fromkeys(many, 0.5))
    assert whole is not None
    assert 0 < whole.low < whole.mean == 3.0 < whole.high
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_equal_seeds_draw_the_same_examples_and_the_draws_are_numpy_s() -> None:
    values = np.random.default_rng(0).normal(size=(2, 50))
    whole = bootstrap_means(values, seed=4, resamples=300)
    assert np.allclose(whole[0], bootstrap_means(values[0], seed=4, resamples=300), rtol=0, atol=1e-14)
    drawn = np.random.default_rng(4).integers(0, 50, size=(300, 50))
    assert np.allclose(whole, values[:, drawn].mean(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [LEAST, 12, 64])
def test_the_interval_of_a_rate_is_wilson_s_and_there_is_none_of_a_few_examples(n: int) -> None:
    for right in (0, 1, n // 2, n):
        expected = stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert all(math.isnan(end) for end in (*wilson(0.5, LEAST - 1), *wilson(math.nan, n)))


# -- clusters ---------------------------------------------------------------------------------------------------------


def test_the_clustered_error_equals_that_of_cluster_means_on_a_balanced_design() -> None:
    """An identity: with m values in each of G clusters both are sqrt(sum of (cluster mean - mean)^2 / (G (G - 1)))."""
    rng = np.random.default_rng(0)
    for many, size in ((2, 3), (17, 1), (40, 8)):
        values = rng.normal(size=(many, 1)) + rng.normal(size=(many, size))
        found = clustered_mean(values.ravel().tolist(), [g for g in range(many) for _ in range(size)])
        expected = values.mean(axis=1)
        assert found.mean == pytest.approx(expected.mean(), abs=1e-12)
        assert found.se == pytest.approx(stats.sem(expected), rel=1e-12)


def test_the_clustered_error_equals_the_analytic_one_of_a_one_way_random_effects_design() -> None:
    """x = b_g + e_gi: Var(mean) = (sigma_b^2 + sigma_e^2 / m) / G, and the squared SE estimates it without bias.

    The squared SE is Var times chi-squared with G - 1 degrees over G - 1, so the mean of 500 of them has a relative
    standard error of sqrt(2 / (29 * 500)) = 1.2 %; three of those are allowed.
    """
    rng, (many, size, between, within) = np.random.default_rng(1), (30, 4, 1.5, 2.0)
    clusters = [g for g in range(many) for _ in range(size)]
    squared, naive = [], []
    for _ in range(500):
        values = rng.normal(0, between, (many, 1)) + rng.normal(0, within, (many, size))
        found = clustered_mean(values.ravel().tolist(), clusters)
        squared.append(found.se**2)
        naive.append(values.var(ddof=1) / values.size)
    analytic = (between**2 + within**2 / size) / many
    allowed = 3 * math.sqrt(2 / ((many - 1) * 500))
    assert np.mean(squared) == pytest.approx(analytic, rel=allowed)
    assert np.mean(naive) < 0.7 * analytic  # what ignoring the clusters would claim


def test_clusters_of_unequal_size_by_hand() -> None:
    found = clustered_mean([1.0, 0.0, 1.0, 1.0, 0.0], ["a", "a", "b", "b", "c"])
    # mean 0.6; cluster sums of deviations 1 - 1.2, 2 - 1.2, 0 - 0.6
    assert found.mean == pytest.approx(0.6)
    assert found.se == pytest.approx(math.sqrt(3 / 2 * (0.2**2 + 0.8**2 + 0.6**2)) / 5)
    assert math.isnan(clustered_mean([1.0, 2.0], ["a", "a"]).se)
    assert math.isnan(clustered_mean([], []).mean)
    assert clustered_mean([1.0, math.nan, 3.0], [0, 1, 2]) == clustered_mean([1.0, 3.0], [0, 2])  # what is missing


def test_the_clustered_bootstrap_draws_examples_not_samples() -> None:
    rng = np.random.default_rng(5)
    effect = rng.normal(0.3, 1.0, N)
    ours = {(g, i): effect[g] + rng.normal(0, 0.1) for g in range(N) for i in range(8)}
    theirs = dict.fromkeys(ours, 0.0)
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found.pairs == 8 * N
    se = clustered_mean(list(ours.values()), [g for g, _ in ours]).se
    assert found.high - found.low == pytest.approx(2 * 1.96 * se, rel=0.06)
    per_sample = paired_difference(*({8 * g + i: one for (g, i), one in part.items()} for part in (ours, theirs)))
    assert per_sample is not None
    assert per_sample.high - per_sample.low < 0.5 * (found.high - found.low)
    one_each = paired_difference({(g, 0): effect[g] for g in range(N)}, {(g, 0): 0.0 for g in range(N)})
    plain = paired_difference({g: effect[g] for g in range(N)}, {g: 0.0 for g in range(N)})
    assert one_each is not None
    assert plain is not None
    assert (one_each.low, one_each.high) == pytest.approx((plain.low, plain.high), abs=1e-12)
    assert paired_difference({(0, 0): 1.0}, {(0, 1): 1.0}) is None


# -- p-values ---------------------------------------------------------------------------------------------------------


def test_p_values_are_uniform_without_an_effect_and_never_smaller_than_the_examples_allow() -> None:
    rng = np.random.default_rng(2)
    p = [paired_p_value(rng.normal(size=16).tolist()) for _ in range(400)]
    assert np.mean([one < 0.05 for one in p]) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 400))
    assert paired_p_value([1.0] * 4) == 0.125
    assert paired_p_value([0.0] * 4) == 1.0
    assert paired_p_value([1.0]) == 1.0
    values = rng.normal(size=64) + 1
    assert paired_p_value(values.tolist()) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-9)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
