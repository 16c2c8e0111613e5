"""Intervals, paired tests and corrections, for prompts that come in clusters and models that come
in seeds.

1. Prompts about one held-out (verb, target) pair share what was held out: the cluster, not the
   prompt, is resampled.
2. The same prompts are put to the models of every seed, so seeds and clusters are crossed: each
   resample draws seeds and, independently, clusters, and a row counts as often as its seed was
   drawn times its cluster (Owen 2007, the pigeonhole bootstrap, slightly conservative). Intervals
   are percentiles of the resampled means.
3. Three seeds resampled show less spread than all seeds would: read a narrow interval from few
   seeds with that in mind. The number of seeds is printed beside every interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from statsmodels.stats.contingency_tables import mcnemar as _mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

LEVEL, RESAMPLES = 0.95, 2000  # 2,000 resamples move a 95 % bound by less than half a point


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds; n: rows, clusters: independent units among them, seeds:
    models trained.
    """

    estimate: float
    low: float
    high: float
    n: int
    clusters: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's interval of a proportion of `n` independent trials.

    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"successes = {successes} of n = {n}: need 0 <= successes <= n and n > 0")
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    return Interval(successes / n, float(low), float(high), n, n, 1)


def cluster_interval(
    values: Sequence[float],
    clusters: Sequence,
    seeds: Sequence | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    rng_seed: int = 0,
) -> Interval:
    """Interval of the mean of `values` (finite numbers), resampling seeds and clusters; see the
    module's docstring.

    Where all values are 0 or all are 1 a bootstrap would claim certainty: there the bounds are
    Wilson's for that many *clusters* (not rows: clusters are what is independent). All -1 is the
    mirror image of all 1. Any other constant keeps its interval of no width. Raises ValueError for
    no values, a NaN, or columns of different lengths.
    """
    values, cluster_of, seed_of = _columns(values, clusters, seeds)
    n, n_clusters, n_seeds = len(values), cluster_of.max() + 1, seed_of.max() + 1
    if np.ptp(values) == 0:
        return _certain(float(values[0]), n, int(n_clusters), int(n_seeds), level)
    sums, counts = _cells(values, cluster_of, seed_of), _cells(np.ones(n), cluster_of, seed_of)
    by_seed, by_cluster = _draws(n_seeds, n_clusters, resamples, rng_seed)
    means = _weighted(sums, by_seed, by_cluster) / _weighted(counts, by_seed, by_cluster)
    return _percentiles(values.mean(), means, level, n, n_clusters, n_seeds)


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence,
    seeds: Sequence | None = None,
    **options,
) -> Interval:
    """Interval of mean(a - b) where a[i] and b[i] belong to the same prompt and seed; options as
    `cluster_interval`.

    Where a and b agree on every row the bounds lie as far on both sides as Wilson's upper bound of
    0 lies above it.
    """
    difference = _paired(a, b)
    interval = cluster_interval(difference, clusters, seeds, **options)
    # a difference can be below 0
    return interval if difference.any() else replace(interval, low=-interval.high)


def paired_p_value(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence,
    seeds: Sequence | None = None,
    resamples: int = RESAMPLES,
    rng_seed: int = 0,
) -> float:
    """Two-sided p-value of mean(a - b) = 0 from the resamples of `paired_interval`; at least 2 /
    (resamples + 1).

    1 where a and b agree on every row.
    """
    difference = _paired(a, b)
    if not difference.any():
        return 1.0
    values, cluster_of, seed_of = _columns(difference, clusters, seeds)
    draws = _draws(seed_of.max() + 1, cluster_of.max() + 1, resamples, rng_seed)
    sums = _weighted(_cells(values, cluster_of, seed_of), *draws)
    return min(1.0, 2 * (1 + min((sums <= 0).sum(), (sums >= 0).sum())) / (resamples + 1))


def _paired(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"a has {len(a)} rows and b {len(b)}: pair them first")
    return a - b


def difference_interval(
    values: Sequence[float],
    group: Sequence[bool],
    clusters: Sequence,
    seeds: Sequence | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    rng_seed: int = 0,
) -> Interval:
    """Interval of mean(values where group) - mean(values where not group), of unpaired rows
    resampled together.

    Raises ValueError when one of the groups is empty.
    """
    values, cluster_of, seed_of = _columns(values, clusters, seeds)
    group = np.asarray(group, bool)
    if group.all() or not group.any():
        raise ValueError(
            f"{group.sum()} of {len(group)} rows are in the group: a difference needs rows in both"
        )
    n_clusters, n_seeds = cluster_of.max() + 1, seed_of.max() + 1
    draws = _draws(n_seeds, n_clusters, resamples, rng_seed)
    means = []
    for part in (group, ~group):
        sums, counts = (
            _cells(v * part, cluster_of, seed_of) for v in (values, np.ones(len(values)))
        )
        # a resample may miss a small group altogether: it says nothing
        with np.errstate(invalid="ignore"):
            means.append(_weighted(sums, *draws) / _weighted(counts, *draws))
    found = means[0] - means[1]
    estimate = values[group].mean() - values[~group].mean()
    return _percentiles(
        estimate, found[np.isfinite(found)], level, len(values), n_clusters, n_seeds
    )


def draws_interval(
    estimates: Sequence[float], draws: Sequence[Sequence[float]], n: int, clusters: int
) -> Interval:
    """Interval of the mean over seeds of a statistic that is no mean of rows.

    estimates: [seeds]. draws: [seeds, resamples], the statistic of resampled clusters, the same
    clusters in a column. Seeds are resampled here.
    """
    draws = np.asarray(draws, float)
    by_seed, _ = _draws(*draws.shape, resamples=draws.shape[1], rng_seed=0)
    means = (by_seed * draws.T).sum(1) / len(draws)
    return _percentiles(np.mean(estimates), means, LEVEL, n, clusters, len(draws))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact p-value of McNemar's test that a and b, answers to the same prompts, are true equally
    often.

    Prompts are taken as independent: with clusters, prefer `paired_interval`.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"a has {len(a)} rows and b {len(b)}: pair them first")
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    return 1.0 if table[0][1] + table[1][0] == 0 else float(_mcnemar(table, exact=True).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method, in the order given."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


def _columns(
    values: Sequence, clusters: Sequence, seeds: Sequence | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values, index of each row's cluster, index of each row's seed)."""
    values, clusters = np.asarray(values, float), np.asarray(clusters)
    seeds = np.zeros(len(values), int) if seeds is None else np.asarray(seeds)
    if not len(values) or len({len(values), len(clusters), len(seeds)}) > 1:
        raise ValueError(
            f"{len(values)} values, {len(clusters)} clusters, {len(seeds)} seeds: need one of each"
            " a row"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{(~np.isfinite(values)).sum()} of {len(values)} values are not finite: leave them out"
            " first"
        )
    return values, *(np.unique(column, return_inverse=True)[1] for column in (clusters, seeds))


def _cells(values: np.ndarray, cluster_of: np.ndarray, seed_of: np.ndarray) -> np.ndarray:
    """[seeds, clusters] sums of values."""
    cells = np.zeros((seed_of.max() + 1, cluster_of.max() + 1))
    np.add.at(cells, (seed_of, cluster_of), values)
    return cells


def _draws(
    n_seeds: int, n_clusters: int, resamples: int, rng_seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed ([resamples, seeds]) and each cluster ([resamples, clusters]) is
    drawn.
    """
    rng = np.random.default_rng(rng_seed)
    return tuple(
        rng.multinomial(k, np.full(k, 1 / k), resamples) for k in (int(n_seeds), int(n_clusters))
    )


def _weighted(cells: np.ndarray, by_seed: np.ndarray, by_cluster: np.ndarray) -> np.ndarray:
    """[resamples] sums of cells, each counted as often as its seed times its cluster was drawn."""
    return ((by_seed @ cells) * by_cluster).sum(1)


def _percentiles(estimate, found: np.ndarray, level: float, n, clusters, seeds) -> Interval:
    found = found[np.isfinite(found)]
    if not len(found):
        raise ValueError("no resample had a row: seeds and clusters do not meet")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(estimate), float(low), float(high), int(n), int(clusters), int(seeds))


def _certain(value: float, n: int, clusters: int, seeds: int, level: float) -> Interval:
    """Bounds where every row has the same value: see `cluster_interval`."""
    low = high = value
    if abs(value) == 1.0:
        low, high = sorted((value, value * wilson(clusters, clusters, level).low))
    elif value == 0.0:
        high = wilson(0, clusters, level).high
    return Interval(value, low, high, n, clusters, seeds)
