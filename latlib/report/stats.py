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
from typing import Any

import numpy as np
import numpy.typing as npt
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Numbers = Sequence[float] | np.ndarray
Labels = Sequence[Any] | np.ndarray  # of what a row belongs to

LEVEL = 0.95
RESAMPLES = 2000  # they move a 95 % bound by less than half a point


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds; n: rows, clusters: independent units among them, seeds:
    models trained; 0 where they are not counted.
    """

    estimate: float
    low: float
    high: float
    n: int = 0
    clusters: int = 0
    seeds: int = 0

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def signed(self) -> str:
        """A difference with its sign and bounds."""
        return f"{self.estimate:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def points(self) -> str:
        """A difference in points, hundredths of a share, with its sign and bounds."""
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.estimate:+.1f} [{low:+.1f}, {high:+.1f}]"

    @property
    def percent(self) -> str:
        """A share in per cent, without its bounds."""
        return f"{100 * self.estimate:.0f} %"

    @property
    def share(self) -> str:
        """A share in per cent with its bounds, without the unit."""
        return f"{100 * self.estimate:.0f} [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def complement(self) -> Interval:
        """The share that the other rows have."""
        return replace(self, estimate=1 - self.estimate, low=1 - self.high, high=1 - self.low)


@dataclass(frozen=True)
class _Rows:
    """values: [rows]; cluster_of, seed_of: [rows] number of each row's cluster and seed."""

    values: np.ndarray
    cluster_of: np.ndarray
    seed_of: np.ndarray

    @classmethod
    def of(cls, values: Numbers, clusters: Labels, seeds: Labels | None) -> _Rows:
        """Raises ValueError for no values, a value that is not finite, or columns of different
        lengths.
        """
        of_one = np.zeros(len(values), int)
        seeds = of_one if seeds is None else seeds
        lengths = (len(values), len(clusters), len(seeds))
        if lengths[0] == 0 or len(set(lengths)) > 1:
            counts = "{} values, {} clusters, {} seeds".format(*lengths)
            raise ValueError(f"{counts}: need one of each a row")
        numbers = np.asarray(values, float)
        wrong = np.count_nonzero(~np.isfinite(numbers))
        if wrong:
            raise ValueError(f"{wrong} of {lengths[0]} values are not finite: leave them out first")
        return cls(numbers, _numbered(clusters), _numbered(seeds))

    @property
    def shape(self) -> tuple[int, int]:
        """How many seeds and clusters there are."""
        return int(self.seed_of.max()) + 1, int(self.cluster_of.max()) + 1

    def sums(self, values: np.ndarray, draws: Draws) -> np.ndarray:
        """[resamples] sums of values, each counted as often as its seed times its cluster was
        drawn.
        """
        cells = np.zeros(self.shape)
        np.add.at(cells, (self.seed_of, self.cluster_of), values)
        by_seed, by_cluster = draws
        return ((by_seed @ cells) * by_cluster).sum(1)

    def means(self, draws: Draws, kept: np.ndarray) -> np.ndarray:
        """[resamples] means of the kept values; NaN where a resample drew none of them."""
        with np.errstate(invalid="ignore"):
            return self.sums(self.values * kept, draws) / self.sums(kept, draws)

    def interval(self, estimate: float, low: float, high: float) -> Interval:
        """An interval over these rows."""
        seeds, clusters = self.shape
        return Interval(float(estimate), float(low), float(high), len(self.values), clusters, seeds)


Draws = tuple[np.ndarray, np.ndarray]  # how often a seed and a cluster are drawn: [resamples, of]


def _numbered(names: Labels) -> np.ndarray:
    return np.unique(np.asarray(names), return_inverse=True)[1]


def _draws(shape: tuple[int, int], resamples: int = RESAMPLES, rng_seed: int = 0) -> Draws:
    rng = np.random.default_rng(rng_seed)
    seeds, clusters = (rng.multinomial(k, np.full(k, 1 / k), resamples) for k in shape)
    return seeds, clusters


def _bounds(statistics: np.ndarray) -> np.ndarray:
    """The bounds of the middle LEVEL of resampled statistics; one without a row says nothing."""
    finite = statistics[np.isfinite(statistics)]
    if not len(finite):
        raise ValueError("no resample had a row: seeds and clusters do not meet")
    return np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def _wilson(successes: int, n: int) -> tuple[float, float]:
    return proportion_confint(successes, n, alpha=1 - LEVEL, method="wilson")


def cluster_interval(
    values: Numbers,
    clusters: Labels,
    seeds: Labels | None = None,
    resamples: int = RESAMPLES,
    rng_seed: int = 0,
) -> Interval:
    """95 % interval of the mean of `values` (finite numbers), resampling seeds and clusters; see
    the module's docstring.

    Where all values are 0 or all are 1 a bootstrap would claim certainty: there the bounds are
    Wilson's for that many *clusters* (not rows: clusters are what is independent). All -1 is the
    mirror image of all 1. Any other constant keeps its interval of no width. Raises ValueError for
    no values, a NaN, or columns of different lengths.
    """
    rows = _Rows.of(values, clusters, seeds)
    if np.ptp(rows.values) > 0:
        draws = _draws(rows.shape, resamples, rng_seed)
        means = rows.means(draws, np.ones(len(rows.values)))
        return rows.interval(rows.values.mean(), *_bounds(means))
    value = float(rows.values[0])
    n = rows.shape[1]
    low = high = value
    if abs(value) == 1.0:
        low, high = sorted((value, value * _wilson(n, n)[0]))
    elif value == 0.0:
        high = _wilson(0, n)[1]
    return rows.interval(value, low, high)


def paired_interval(
    a: Numbers, b: Numbers, clusters: Labels, seeds: Labels | None = None
) -> Interval:
    """Interval of mean(a - b) where a[i] and b[i] belong to the same prompt and seed.

    Where a and b agree on every row the bounds lie as far on both sides as Wilson's upper bound of
    0 lies above it. Raises ValueError for columns of different lengths.
    """
    difference = _paired(a, b)
    interval = cluster_interval(difference, clusters, seeds)
    # a difference can be below 0
    return interval if difference.any() else replace(interval, low=-interval.high)


def _paired(a: Numbers, b: Numbers) -> np.ndarray:
    return np.array([float(x) - float(y) for x, y in zip(a, b, strict=True)])


def paired_p_value(a: Numbers, b: Numbers, clusters: Labels, seeds: Labels | None = None) -> float:
    """Two-sided p-value of mean(a - b) = 0 from the resamples of `paired_interval`; at least 2 /
    (RESAMPLES + 1).

    1 where a and b agree on every row. Raises ValueError for columns of different lengths.
    """
    difference = _paired(a, b)
    rows = _Rows.of(difference, clusters, seeds)
    sums = rows.sums(difference, _draws(rows.shape))
    rarer = min((sums <= 0).sum(), (sums >= 0).sum())
    return min(1.0, 2 * (1 + rarer) / (RESAMPLES + 1))


def difference_interval(
    values: Numbers,
    group: Numbers,
    clusters: Labels,
    seeds: Labels | None = None,
) -> Interval:
    """Interval of mean(values where group) - mean(values where not group), of unpaired rows
    resampled together.

    Raises ValueError when one of the groups is empty.
    """
    rows = _Rows.of(values, clusters, seeds)
    inside = np.asarray(group, bool)
    if len(set(inside)) < 2:
        raise ValueError("a difference needs rows in both groups")
    draws = _draws(rows.shape)
    means = rows.means(draws, inside.astype(float)) - rows.means(draws, (~inside).astype(float))
    estimate = rows.values[inside].mean() - rows.values[~inside].mean()
    return rows.interval(estimate, *_bounds(means))


def draws_interval(estimates: Numbers, draws: npt.ArrayLike, n: int, clusters: int) -> Interval:
    """Interval of the mean over seeds of a statistic that is no mean of rows.

    estimates: [seeds]. draws: [seeds, resamples], the statistic of resampled clusters, the same
    clusters in a column. Seeds are resampled here.
    """
    statistics = np.asarray(draws, float)
    seeds, resamples = statistics.shape
    by_seed, _ = _draws((seeds, 1), resamples)
    low, high = _bounds((by_seed * statistics.T).sum(1) / seeds)
    return Interval(float(np.mean(estimates)), float(low), float(high), n, clusters, seeds)


def holm(p_values: Numbers) -> list[float]:
    """p-values adjusted for their number by Holm's method, in the order given."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []
