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

Column = Sequence[Any] | np.ndarray  # of rows: numbers, or what each row belongs to

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
        return self._text(".3f")

    @property
    def signed(self) -> str:
        """A difference with its sign and bounds."""
        return self._text("+.3f")

    @property
    def points(self) -> str:
        """A difference in points, hundredths of a share, with its sign and bounds."""
        return self._text("+.1f", 100)

    @property
    def share(self) -> str:
        """A share in per cent with its bounds, without the unit."""
        return self._text(".0f", 100)

    @property
    def percent(self) -> str:
        """A share in per cent, without its bounds."""
        return f"{100 * self.estimate:.0f} %"

    @property
    def complement(self) -> Interval:
        """The share that the other rows have."""
        return replace(self, estimate=1 - self.estimate, low=1 - self.high, high=1 - self.low)

    def _text(self, form: str, scale: float = 1) -> str:
        sides = (self.estimate, self.low, self.high)
        estimate, low, high = [format(scale * side, form) for side in sides]
        return f"{estimate} [{low}, {high}]"


class _Rows:
    """Rows in cells of seed x cluster, and how often each resample draws them.

    values: [rows]. cell_of: number of the seed and of the cluster of each row, each [rows]. counts:
    how many seeds and clusters there are. draws: how often each is drawn, each [RESAMPLES, count].
    """

    def __init__(self, values: Column, clusters: Column, seeds: Column | None) -> None:
        """Raises ValueError for no values, a value that is not finite, or columns of different
        lengths.
        """
        if seeds is None:
            seeds = np.zeros(len(values))
        lengths = (len(values), len(clusters), len(seeds))
        if lengths[0] == 0 or len(set(lengths)) > 1:
            found = "{} values, {} clusters, {} seeds".format(*lengths)
            raise ValueError(f"{found}: need one of each a row")
        self.values = np.asarray(values, float)
        wrong = np.count_nonzero(~np.isfinite(self.values))
        if wrong:
            raise ValueError(f"{wrong} of {lengths[0]} values are not finite: leave them out first")
        rng = np.random.default_rng(0)
        _, seed_of = np.unique(seeds, return_inverse=True)
        _, cluster_of = np.unique(clusters, return_inverse=True)
        self.cell_of = (seed_of, cluster_of)
        self.counts = (seed_of.max() + 1, cluster_of.max() + 1)
        self.draws = [_drawn(rng, count, RESAMPLES) for count in self.counts]

    def sums(self, values: npt.ArrayLike) -> np.ndarray:
        """[RESAMPLES] sums of values, each counted as often as its seed times its cluster was
        drawn.
        """
        cells = np.zeros(self.counts)
        np.add.at(cells, self.cell_of, values)
        by_seed, by_cluster = self.draws
        return ((by_seed @ cells) * by_cluster).sum(1)

    def means(self, kept: npt.ArrayLike = 1.0) -> np.ndarray:
        """[RESAMPLES] means of the kept values (1: all); NaN where a resample drew none of them."""
        with np.errstate(invalid="ignore"):
            return self.sums(self.values * kept) / self.sums(kept)

    def interval(self, estimate: float, bounds: Sequence[float]) -> Interval:
        """An interval over these rows."""
        low, high = bounds
        seeds, clusters = self.counts
        return Interval(
            float(estimate), float(low), float(high), len(self.values), int(clusters), int(seeds)
        )


def _drawn(rng: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """[resamples, count]: how often each of some things is drawn."""
    return rng.multinomial(count, np.full(count, 1 / count), resamples)


def _bounds(statistics: np.ndarray) -> Sequence[float]:
    """The bounds of the middle LEVEL of resampled statistics; one without a row says nothing."""
    finite = statistics[np.isfinite(statistics)]
    if not len(finite):
        raise ValueError("no resample had a row: seeds and clusters do not meet")
    return np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def cluster_interval(values: Column, clusters: Column, seeds: Column | None = None) -> Interval:
    """95 % interval of the mean of `values` (finite numbers), resampling seeds and clusters; see
    the module's docstring.

    Where all values are 0 or all are 1 a bootstrap would claim certainty: there the bounds are
    Wilson's for that many *clusters* (not rows: clusters are what is independent). All -1 is the
    mirror image of all 1. Any other constant keeps its interval of no width. Raises ValueError for
    no values, a NaN, or columns of different lengths.
    """
    rows = _Rows(values, clusters, seeds)
    value = rows.values[0]
    if np.ptp(rows.values) > 0:
        return rows.interval(rows.values.mean(), _bounds(rows.means()))
    if abs(value) not in (0, 1):
        return rows.interval(value, (value, value))
    n = rows.counts[1]
    low, high = proportion_confint(abs(value) * n, n, alpha=1 - LEVEL, method="wilson")
    if value == 0:
        return rows.interval(0, (0, high))
    return rows.interval(value, sorted((value, value * low)))


def paired_interval(
    differences: np.ndarray, clusters: Column, seeds: Column | None = None
) -> Interval:
    """Interval of the mean of `differences`, a[i] - b[i] of the same prompt and seed.

    Where a and b agree on every row the bounds lie as far on both sides as Wilson's upper bound of
    0 lies above it. Raises ValueError as `cluster_interval` does.
    """
    interval = cluster_interval(differences, clusters, seeds)
    # a difference can be below 0
    return interval if differences.any() else replace(interval, low=-interval.high)


def paired_p_value(differences: np.ndarray, clusters: Column, seeds: Column | None = None) -> float:
    """Two-sided p-value of mean(differences) = 0 from the resamples of `paired_interval`; at least
    2 / (RESAMPLES + 1).

    1 where a and b agree on every row. Raises ValueError as `cluster_interval` does.
    """
    rows = _Rows(differences, clusters, seeds)
    sums = rows.sums(rows.values)
    rarer = min((sums <= 0).sum(), (sums >= 0).sum())
    return min(1.0, 2 * (1 + rarer) / (RESAMPLES + 1))


def difference_interval(
    values: Column, group: Column, clusters: Column, seeds: Column | None = None
) -> Interval:
    """Interval of mean(values where group) - mean(values where not group), of unpaired rows
    resampled together.

    Raises ValueError when one of the groups is empty.
    """
    rows = _Rows(values, clusters, seeds)
    inside = np.asarray(group, bool)
    if len(set(inside)) < 2:
        raise ValueError("a difference needs rows in both groups")
    estimate = rows.values[inside].mean() - rows.values[~inside].mean()
    return rows.interval(estimate, _bounds(rows.means(inside) - rows.means(~inside)))


def draws_interval(estimates: Column, draws: npt.ArrayLike, n: int, clusters: int) -> Interval:
    """Interval of the mean over seeds of a statistic that is no mean of rows.

    estimates: [seeds]. draws: [seeds, resamples], the statistic of resampled clusters, the same
    clusters in a column. Seeds are resampled here.
    """
    statistics = np.asarray(draws, float)
    seeds, resamples = statistics.shape
    by_seed = _drawn(np.random.default_rng(0), seeds, resamples)
    low, high = _bounds((by_seed * statistics.T).sum(1) / seeds)
    return Interval(float(np.mean(estimates)), low, high, n, clusters, seeds)


def holm(p_values: Column) -> list[float]:
    """p-values adjusted for their number by Holm's method, in the order given."""
    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []
