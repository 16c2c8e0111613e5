"""Intervals cover what they should, clusters and seeds widen them, and certainty is never claimed
from equal values.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest, ttest_1samp
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests

from latlib.refusal.geometry import shares_left_out
from latlib.report.stats import (
    cluster_interval,
    holm,
    jackknife_interval,
    odds_interval,
    paired_interval,
)
from latlib.report.verdicts import Effect, Verdict, decide

VERBS, ROWS = 12, 3  # of a held-out set: clusters, and prompts in each
# logits of two methods; spread between trainings, between verbs, and of verbs between methods
SPREADS = {"usual": (1.0, 1.0, 0.5), "seeds differ": (2.0, 0.7, 0.3)}
LEVELS = {"equal": (0.0, 0.0), "rare": (-4.0, -4.0), "apart": (2.0, 0.0), "far": (3.0, -3.0)}


def wilson(successes: int, n: int):
    return binomtest(successes, n).proportion_ci(method="wilson")


def probabilities(rng, repeats, seeds, verbs, levels, spread):
    """[repeats, 2, seeds, verbs] of two methods on the same seeds and verbs."""
    of_seed, of_verb, between = spread

    def normal(*shape):
        return rng.standard_normal((repeats, *shape))

    logits = np.array(levels)[:, None, None] + of_seed * normal(2, seeds, 1)
    logits = logits + 0.5 * normal(1, seeds, 1) + of_verb * normal(1, 1, verbs)
    logits = logits + between * normal(2, 1, verbs) + 0.5 * normal(2, seeds, verbs)
    return expit(logits)


def simulated(seeds, levels, spread, repeats):
    """(intervals of the difference of two methods, the true difference)."""
    rng = np.random.default_rng(20261126)
    truth = probabilities(rng, 40, 60, 60, levels, spread).mean((0, 2, 3))
    p = probabilities(rng, repeats, seeds, VERBS, levels, spread)
    hits = rng.random((*p.shape, ROWS)) < p[..., None]
    differences = (hits[:, 0].astype(float) - hits[:, 1]).reshape(repeats, -1)
    seed, verb, _ = (axis.ravel() for axis in np.indices((seeds, VERBS, ROWS)))
    found = [paired_interval(values, verb, seed) for values in differences]
    return found, truth[0] - truth[1]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 12])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("levels", LEVELS)
def test_an_interval_covers_the_difference_of_methods_at_every_number_of_seeds(
    seeds, spread, levels
):
    """95 % at least but for chance: its standard deviation over 600 repeats is .9 points."""
    found, truth = simulated(seeds, LEVELS[levels], SPREADS[spread], 600)
    covered = np.mean([one.low <= truth <= one.high for one in found])
    assert covered >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 12])
@pytest.mark.parametrize("levels", ["equal", "rare"])
def test_the_rule_reproduces_what_is_not_so_at_most_once_in_33(seeds, levels):
    """Of two methods that differ in nothing, the verdict errs in one direction of two."""
    found, _ = simulated(seeds, LEVELS[levels], SPREADS["seeds differ"], 1200)
    wrong = (Verdict.REPRODUCED, Verdict.NEGLIGIBLE)
    errors = [decide(Effect([one], ""))[0] in wrong for one in found]
    assert np.mean(errors) <= 0.03


def reference(values, clusters, seeds):
    """(mean, variance, degrees of freedom) of a balanced table, cell by cell."""
    names = [sorted(set(column)) for column in (seeds, clusters)]
    cells = {}
    for value, seed, cluster in zip(values, seeds, clusters):
        cells.setdefault((seed, cluster), []).append(value)
    table = [[sum(cells[s, c]) / len(cells[s, c]) for c in names[1]] for s in names[0]]
    n_seeds, n_clusters = len(names[0]), len(names[1])
    mean = sum(map(sum, table)) / (n_seeds * n_clusters)
    rows = [sum(row) / n_clusters for row in table]
    columns = [sum(row[c] for row in table) / n_seeds for c in range(n_clusters)]
    by_seed = sum((r - mean) ** 2 for r in rows) / (n_seeds - 1) / n_seeds
    by_cluster = sum((c - mean) ** 2 for c in columns) / (n_clusters - 1) / n_clusters
    left = 0.0
    for s in range(n_seeds):
        for c in range(n_clusters):
            left += (table[s][c] - rows[s] - columns[c] + mean) ** 2
    left /= (n_seeds - 1) * (n_clusters - 1) * n_seeds * n_clusters
    variance = max(by_seed + by_cluster - left, by_seed, by_cluster)
    spread = by_seed**2 / (n_seeds - 1) + by_cluster**2 / (n_clusters - 1)
    return mean, variance, variance**2 / spread


def test_standard_errors_are_those_of_a_plain_two_way_table():
    rng = np.random.default_rng(3)
    seeds, verbs, _ = (axis.ravel() for axis in np.indices((4, 9, 5)))
    values = (rng.random(180) < 0.2 + 0.1 * seeds + 0.03 * verbs).astype(float)
    found = cluster_interval(values, verbs, seeds)
    mean, variance, df = reference(values, verbs, seeds)
    assert found.estimate == pytest.approx(mean)
    assert found.se == pytest.approx(variance**0.5) and found.df == pytest.approx(df)
    # atanh of a share's distance from one half is half its logit
    logit = np.log(mean / (1 - mean))
    reach = student.ppf(0.975, df) * variance**0.5 / (mean * (1 - mean))
    assert found.low == pytest.approx(expit(logit - reach))
    assert found.high == pytest.approx(expit(logit + reach))


def test_clusters_widen_the_interval():
    rng, wider = np.random.default_rng(0), 0
    clusters = np.repeat(np.arange(40), 10)
    for _ in range(100):
        values = (rng.random(400) < np.repeat(rng.beta(1, 1, 40), 10)).astype(float)
        found = cluster_interval(values, clusters)
        naive = cluster_interval(values, np.arange(400))
        wider += found.high - found.low > naive.high - naive.low
    assert wider == 100


def test_seeds_that_disagree_widen_the_interval():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.random(200) < p for p in (0.1, 0.5, 0.9)]).astype(float)
    clusters = np.tile(np.repeat(np.arange(40), 5), 3)
    with_seeds = cluster_interval(values, clusters, np.repeat([0, 1, 2], 200))
    without = cluster_interval(values, clusters)
    assert (with_seeds.seeds, with_seeds.clusters, with_seeds.n) == (3, 40, 600)
    assert with_seeds.high - with_seeds.low > 2 * (without.high - without.low)


def test_bounds_stay_within_the_range_of_the_values():
    rng = np.random.default_rng(5)
    seeds, verbs = (axis.ravel() for axis in np.indices((3, 12)))
    for p in (0.03, 0.5, 0.97):
        values = (rng.random(36) < p).astype(float)
        found = cluster_interval(values, verbs, seeds)
        assert 0 <= found.low <= found.estimate <= found.high <= 1
        change = paired_interval(values - (rng.random(36) < 0.5), verbs, seeds)
        assert -1 <= change.low <= change.estimate <= change.high <= 1


def test_equal_values_give_a_wilson_interval_over_clusters_not_a_point():
    clusters = np.repeat(np.arange(42), 5)
    assert cluster_interval(np.zeros(210), clusters).high == pytest.approx(wilson(0, 42).high)
    assert cluster_interval(np.ones(210), clusters).low == pytest.approx(wilson(42, 42).low)
    same = paired_interval(np.zeros(210), clusters)
    assert same.estimate == 0 and same.low == -same.high < 0 and same.p_value() == 1
    lower = paired_interval(-np.ones(210), clusters)
    assert (lower.estimate, lower.low) == pytest.approx((-1, -1))
    assert lower.high == pytest.approx(-wilson(42, 42).low) and lower.p_value() < 1e-9


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_bound_leaves_the_range_whatever_the_number_of_clusters(share):
    for units in range(1, 80):
        found = cluster_interval([share] * units, range(units))
        assert 0 <= found.low <= found.estimate <= found.high <= 1, units


def test_rows_that_differ_where_seeds_and_clusters_agree_are_not_certain():
    values = np.tile([0.0, 1.0], 20)
    clusters, seeds = np.repeat(np.arange(10), 4), np.tile([0, 0, 1, 1], 10)
    found = cluster_interval(values, clusters, seeds)
    assert found.low < 0.45 and found.high > 0.55


def left_out(rows, clusters, statistic):
    """A statistic with every cluster, then without each one."""
    kept = [clusters != name for name in np.unique(clusters)]
    return [statistic(rows), *(statistic(rows[k]) for k in kept)]


def test_a_mean_by_leaving_clusters_out_has_the_interval_of_its_rows():
    rng = np.random.default_rng(3)
    clusters, seeds = np.tile(np.repeat(np.arange(8), 5), 4), np.repeat(np.arange(4), 40)
    values = rng.normal(0.2, 0.1, 160) + np.repeat(rng.normal(0, 0.05, 4), 40)
    by_seed = [left_out(values[seeds == s], clusters[:40], np.mean) for s in range(4)]
    found = jackknife_interval(by_seed, n=160)
    rows = paired_interval(values, clusters, seeds)
    for name in ("estimate", "low", "high", "se", "df", "n", "clusters", "seeds"):
        assert getattr(found, name) == pytest.approx(getattr(rows, name)), name


CLUSTERS = np.repeat(np.arange(12), 8)


def concentrations(rng, seeds):
    """[seeds, 1 + clusters] how much more concentrated one method's differences are than another's.
    The clusters' own directions are the same in all models, which differ by seed."""
    of_clusters = rng.normal(0, 0.6, (12, 48))[CLUSTERS]
    rows = []
    for _ in range(seeds):
        sides = []
        for along in (3.0, 2.0):
            difference = rng.normal(size=(96, 48)) + of_clusters
            difference[:, 0] += along + rng.normal(0, 0.3)
            shares = shares_left_out(torch.tensor(difference), False, CLUSTERS.tolist())
            sides.append(shares[:, :2].sum(1))
        rows.append(sides[0] - sides[1])
    return np.array(rows)


@pytest.mark.parametrize("seeds", [3, 12])
def test_intervals_of_concentrations_cover_what_they_should(seeds):
    rng = np.random.default_rng(11)
    truth = np.mean([concentrations(rng, 1)[0, 0] for _ in range(600)])
    found = [jackknife_interval(concentrations(rng, seeds), n=96) for _ in range(150)]
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.91
    assert np.median([one.high - one.low for one in found]) < 0.6


def test_odds_are_pooled_over_seeds_and_seeds_that_disagree_widen_them():
    rng = np.random.default_rng(7)
    seeds = np.repeat([0, 1, 2, 3], 100)
    group = rng.random(400) < 0.3
    hit = rng.random(400) < np.where(group, 0.6, 0.2)
    found = odds_interval(hit, group, seeds)
    ratio = (1 + found.estimate) / (1 - found.estimate)
    assert 3 < ratio < 12 and found.low > 0 and found.odds.startswith(f"{ratio:.2g} [")
    turned = odds_interval(np.where(seeds < 2, hit, ~hit), group, seeds)
    assert turned.low < 0 < turned.high
    one = odds_interval(hit, group, np.zeros(400))
    assert (one.low, one.high, one.seeds) == (-1, 1, 1)
    with pytest.raises(ValueError, match="both groups"):
        odds_interval(hit, np.ones(400), seeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "0 values"),
        (([1.0], ["a", "b"]), "2 clusters"),
        (([1.0, np.nan], ["a", "b"]), "1 of 2 values"),
        (([1.0, 3.0], ["a", "b"]), "no shares"),
    ],
)
def test_bad_columns_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster_interval(*arguments)
    with pytest.raises(ValueError, match="2 values, 1 clusters"):
        paired_interval(np.ones(2), ["a"])


def test_values_that_are_no_shares_have_students_interval():
    values = np.random.default_rng(8).normal(3, 2, 40)
    found = cluster_interval(values, np.arange(40), share=False)
    theirs = ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))


@settings(max_examples=20)  # theirs collects garbage in every call
@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_is_statsmodels(p_values):
    expected = multipletests(p_values, method="holm")[1].tolist() if p_values else []
    assert holm(p_values) == pytest.approx(expected)


def test_p_values_agree_with_intervals():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.2, 0.4):
        a, b = rng.random(100) < 0.5 + shift, rng.random(100) < 0.5
        found = paired_interval(a.astype(float) - b, np.arange(100))
        assert (found.p_value() < 0.05) == (found.low > 0 or found.high < 0)
        assert found.p_value(found.low) == pytest.approx(0.05)
