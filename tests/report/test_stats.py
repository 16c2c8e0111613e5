"""Intervals cover what they should, clusters widen them, and certainty is never claimed from equal
values.
"""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_rel

from latlib.report.stats import (
    cluster_interval,
    difference_interval,
    draws_interval,
    holm,
    paired_interval,
    paired_p_value,
)


def wilson(successes: int, n: int):
    return binomtest(successes, n).proportion_ci(method="wilson")


def test_the_interval_covers_a_known_mean_and_clusters_widen_it():
    rng, covered, wider = np.random.default_rng(0), 0, 0
    clusters = np.repeat(np.arange(40), 10)
    for _ in range(100):
        # mean 0.5, dependent in clusters
        values = (rng.random(400) < np.repeat(rng.beta(1, 1, 40), 10)).astype(float)
        found = cluster_interval(values, clusters)
        naive = cluster_interval(values, np.arange(400))
        covered += found.low <= 0.5 <= found.high
        wider += found.high - found.low > naive.high - naive.low
    assert covered >= 88 and wider == 100


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.random(200) < p for p in (0.1, 0.5, 0.9)])
    clusters, seeds = np.tile(np.repeat(np.arange(40), 5), 3), np.repeat([0, 1, 2], 200)
    with_seeds, without = (
        cluster_interval(values, clusters, seeds),
        cluster_interval(values, clusters),
    )
    assert with_seeds.seeds == 3 and with_seeds.clusters == 40 and with_seeds.n == 600
    assert with_seeds.high - with_seeds.low > 2 * (without.high - without.low)


def test_equal_values_give_a_wilson_interval_over_clusters_not_a_point():
    clusters = np.repeat(np.arange(42), 5)
    assert cluster_interval(np.zeros(210), clusters).high == pytest.approx(wilson(0, 42).high)
    assert cluster_interval(np.ones(210), clusters).low == pytest.approx(wilson(42, 42).low)
    same = paired_interval(np.zeros(210), clusters)
    assert same.estimate == 0 and same.low == -same.high < 0
    lower = paired_interval(-np.ones(210), clusters)
    assert (lower.estimate, lower.low) == (-1, -1) and lower.high == pytest.approx(
        -wilson(42, 42).low
    )


def test_pairing_removes_what_both_answers_share():
    rng, clusters = np.random.default_rng(2), np.repeat(np.arange(40), 5)
    hard = np.repeat(rng.random(40), 5)
    a, b = rng.random(200) < hard, rng.random(200) < hard - 0.3
    paired, loose = (
        paired_interval(a.astype(float) - b, clusters),
        difference_interval(np.r_[a, b], np.arange(400) < 200, np.r_[clusters, clusters + 40]),
    )
    assert paired.estimate == pytest.approx(loose.estimate)
    assert paired.low > 0 and paired.high - paired.low < loose.high - loose.low


def test_a_statistic_with_its_own_draws_keeps_the_spread_over_seeds():
    draws = np.random.default_rng(3).normal([[0.2], [0.5], [0.8]], 0.001, (3, 500))
    found = draws_interval([0.2, 0.5, 0.8], draws, n=256, clusters=64)
    assert (
        found.estimate == pytest.approx(0.5)
        and found.low < 0.3
        and found.high > 0.7
        and found.seeds == 3
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "0 values"),
        (([1.0], ["a", "b"]), "2 clusters"),
        (([1.0, np.nan], ["a", "b"]), "1 of 2 values"),
    ],
)
def test_bad_columns_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster_interval(*arguments)
    for paired in (paired_interval, paired_p_value):
        with pytest.raises(ValueError, match="2 values, 1 clusters"):
            paired(np.ones(2), ["a"])


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


def test_p_values_agree_with_intervals_and_with_a_t_test():
    """One row a cluster and no seeds: the resampled p-value is close to the paired t-test's."""
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.15, 0.3, 0.6):
        a, b = rng.normal(shift, 1, 100), rng.normal(0, 0.5, 100)
        p, interval = (f(a - b, np.arange(100)) for f in (paired_p_value, paired_interval))
        assert p == pytest.approx(ttest_rel(a, b).pvalue, abs=0.03)
        assert (p < 0.05) == (interval.low > 0 or interval.high < 0)


def test_p_values_are_two_sided_and_never_zero():
    a, b = np.ones(50), np.zeros(50)
    assert (
        paired_p_value(a - b, np.arange(50))
        == paired_p_value(b - a, np.arange(50))
        == pytest.approx(2 / 2001)
    )
    assert paired_p_value(a - a, np.arange(50)) == 1.0
