"""Intervals, p-values and corrections, for prompts that come in clusters and models that come in
seeds.

1. Prompts about one verb share what was held out, and the same prompts are put to the models of
   every seed: seeds and clusters are crossed, and both were drawn from more of their kind. The
   variance of a mean is that of its seeds' means plus that of its clusters' means, less what both
   count: their interaction (Owen and Eckles 2012; Cameron, Gelbach and Miller 2011).
2. An interval is Student's, with Satterthwaite's degrees of freedom between the two: three seeds
   say little about all seeds, and their interval is as wide as that.
3. Shares and differences of shares cannot leave their range. Their interval is taken on a scale
   without ends (atanh; for a share that is its logit) and brought back.
4. What such intervals cover, and how often a rule that asks for one above 0 errs, is simulated in
   the tests at 3, 5 and 12 seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import t as student
from statsmodels.stats.contingency_tables import StratifiedTable
from statsmodels.stats.proportion import proportion_confint

Column = Sequence[Any] | np.ndarray  # of rows: numbers, or what each row belongs to

LEVEL = 0.95
POWER = 0.8  # of the effect that a comparison is said to be able to show
_END = 1 - 1e-12  # atanh is infinite at 1


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds; n: rows, clusters: independent units among them, seeds:
    models trained; 0 where they are not counted.

    se, df: standard error and degrees of freedom, NaN where all values are equal. half: half the
    width of the range of values (0.5 of shares, 1 of differences), NaN where there is no range.
    """

    estimate: float
    low: float
    high: float
    n: int = 0
    clusters: int = 0
    seeds: int = 0
    se: float = math.nan
    df: float = math.nan
    half: float = math.nan

    def __str__(self) -> str:
        return f"{self.share} %"

    @property
    def points(self) -> str:
        """A difference in points, hundredths of a share, with its sign and bounds, without the
        unit.
        """
        return self._text("+.1f")

    @property
    def share(self) -> str:
        """A share in per cent with its bounds, without the unit."""
        return self._text(".0f")

    @property
    def percent(self) -> str:
        """A share in per cent, without its bounds."""
        return f"{100 * self.estimate:.0f} %"

    @property
    def odds(self) -> str:
        """Yule's Q as the odds ratio that it is of."""
        sides = (self.estimate, self.low, self.high)
        ratios = [(1 + side) / (1 - side) if side < 1 else math.inf for side in sides]
        texts = [f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}" for ratio in ratios]
        return "{} [{}, {}]".format(*texts)

    @property
    def complement(self) -> Interval:
        """The share that the other rows have."""
        return replace(self, estimate=1 - self.estimate, low=1 - self.high, high=1 - self.low)

    @property
    def detectable(self) -> float:
        """The smallest effect that would be told from 0 in `POWER` of repetitions; NaN where all
        values are equal.
        """
        quantiles = student.ppf([(1 + LEVEL) / 2, POWER], self.df)
        return float(quantiles.sum() * self.se)

    def p_value(self, value: float = 0.0) -> float:
        """Two-sided p-value of the estimate being `value`, of the distribution that the bounds are
        of. Where all values are equal: of as many signs, a cluster each, that agree.
        """
        if self.estimate == value:
            return 1.0
        if not self.se > 0:
            return min(1.0, 2.0 ** (1 - self.clusters))
        ends = np.array([self.estimate, value])
        se = self.se
        if not math.isnan(self.half):
            ends = np.arctanh(np.clip(ends / self.half, -_END, _END))
            se *= _slope(self.estimate, self.half)
        return float(2 * student.sf(abs(ends[0] - ends[1]) / se, self.df))

    def _text(self, form: str) -> str:
        sides = (self.estimate, self.low, self.high)
        estimate, low, high = [format(100 * side, form) for side in sides]
        return f"{estimate} [{low}, {high}]"


def sizes(cells: Any, what: str = "") -> str:
    """n and seeds of a table or list of intervals, their range where they differ; what is none was
    not measured, and counts of 0 are not said. what: behind n, what it counts.
    """
    known = [cell for cell in np.ravel(cells) if isinstance(cell, Interval)]
    n, seeds = (sorted({getattr(cell, name) for cell in known}) for name in ("n", "seeds"))
    texts = []
    if any(n):
        texts.append(f"n = {_span(n)}{what}")
    if any(seeds):
        texts.append(f"{_span(seeds)} seed{'' if seeds == [1] else 's'}")
    return ", ".join(texts)


def _span(counts: list[int]) -> str:
    """The first and the last, once where they are one."""
    return " to ".join(map(str, counts[:1] + counts[1:][-1:]))


def _slope(value: float, half: float) -> float:
    """How much atanh(value / half) grows with the value."""
    return half / max(half**2 - value**2, 1e-12)


def _interval(
    estimate: float,
    se: float,
    df: float,
    half: float = math.nan,
    **counts: int,
) -> Interval:
    """Student's interval; with a `half`, of values between -half and half, on the scale of
    atanh.
    """
    quantile = student.ppf((1 + LEVEL) / 2, df)
    if math.isnan(half):
        low, high = estimate - quantile * se, estimate + quantile * se
    else:
        centre = np.arctanh(np.clip(estimate / half, -_END, _END))
        reach = quantile * se * _slope(estimate, half)
        low, high = half * np.tanh([centre - reach, centre + reach])
    return Interval(estimate, float(low), float(high), **counts, se=se, df=df, half=half)


def _combined(by_seed: float, by_cluster: float, both: float, counts: Sequence[int]) -> Any:
    """(standard error, degrees of freedom) of a mean over crossed seeds and clusters, from the
    variances that each of them gives it and their interaction's.
    """
    parts = [by_seed, by_cluster]
    variance = max(by_seed + by_cluster - both, *parts)
    freedoms = [max(count - 1, 1) for count in counts]
    spread = sum(part**2 / free for part, free in zip(parts, freedoms, strict=True))
    df = variance**2 / spread if spread else math.inf
    return math.sqrt(variance), min(max(df, 1.0), sum(freedoms))


def _cells(values: Column, clusters: Column, seeds: Column | None) -> np.ndarray:
    """[2, seeds, clusters]: sums of values, and their numbers.

    Raises ValueError for no values, a value that is not finite, or columns of different lengths.
    """
    if seeds is None:
        seeds = np.zeros(len(values))
    lengths = (len(values), len(clusters), len(seeds))
    if lengths[0] == 0 or len(set(lengths)) > 1:
        found = "{} values, {} clusters, {} seeds".format(*lengths)
        raise ValueError(f"{found}: need one of each a row")
    numbers = np.asarray(values, float)
    wrong = np.count_nonzero(~np.isfinite(numbers))
    if wrong:
        raise ValueError(f"{wrong} of {lengths[0]} values are not finite: leave them out first")
    places = [pd.factorize(pd.Series(column), sort=True)[0] for column in (seeds, clusters)]
    cells = np.zeros((2, *(place.max() + 1 for place in places)))
    np.add.at(cells[0], tuple(places), numbers)
    np.add.at(cells[1], tuple(places), 1)
    return cells


def _spread(cells: np.ndarray) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean over all rows of `_cells`."""
    sums, numbers = cells
    n = numbers.sum()
    residuals = sums - sums.sum() / n * numbers  # 0 in all, also where cells differ in size
    left = residuals.copy()
    parts = []
    corrections = []
    for axis in (1, 0):  # of seeds, of clusters
        own = residuals.sum(axis, keepdims=True)
        left -= numbers * own / numbers.sum(axis, keepdims=True)
        count = own.size
        corrections.append(count / max(count - 1, 1))
        parts.append(corrections[-1] * (own**2).sum() / n**2)
    both = np.prod(corrections) * (left**2).sum() / n**2
    if min(numbers.shape) == 1:
        both = 0.0  # there is nothing to tell it by
    by_seed, by_cluster = parts
    return _combined(by_seed, by_cluster, both, numbers.shape)


def _mean(cells: np.ndarray, half: float, middle: float = 0.0) -> Interval:
    """The interval of the mean over all rows of `_cells`, whose values lie between middle - half
    and middle + half.
    """
    sums, numbers = cells
    n = int(numbers.sum())
    seeds, clusters = numbers.shape
    centred = float(sums.sum() / n) - middle
    se, df = _spread(cells)
    if se == 0 and not math.isnan(half):  # seeds and clusters agree, by chance: their rows do not
        se = math.sqrt((half**2 - centred**2) / n)
    found = _interval(centred, se, df, half, n=n, clusters=clusters, seeds=seeds)
    return replace(
        found,
        estimate=found.estimate + middle,
        low=found.low + middle,
        high=found.high + middle,
    )


def cluster_interval(
    values: Column, clusters: Column, seeds: Column | None = None, share: bool = True
) -> Interval:
    """95 % interval of the mean of `values`; see the module's docstring.

    share: whether they are shares, between 0 and 1. Where all are 0 or all are 1 nothing varies and
    an interval would claim certainty: there the bounds are Wilson's for that many *clusters* (not
    rows: clusters are what is independent). Any other constant keeps its interval of no width.
    Raises ValueError for no values, a NaN, a share outside, or columns of different lengths.
    """
    cells = _cells(values, clusters, seeds)
    lowest, highest = np.min(values), np.max(values)
    if share and not 0 <= lowest <= highest <= 1:
        raise ValueError(f"values from {lowest:g} to {highest:g} are no shares: give 0 to 1")
    if lowest < highest:
        return _mean(cells, half=0.5, middle=0.5) if share else _mean(cells, half=math.nan)
    units = cells.shape[2]
    low, high = float(lowest), float(highest)
    if share and low in (0, 1):
        low, high = _wilson(low, units)
    return Interval(float(lowest), float(low), float(high), len(values), units, cells.shape[1])


def _wilson(share: float, units: int) -> tuple[float, float]:
    """Wilson's bounds of a share of 0 or 1, one of which it is itself, but for rounding."""
    low, high = proportion_confint(share * units, units, alpha=1 - LEVEL, method="wilson")
    return min(low, share), max(high, share)


def paired_interval(
    differences: np.ndarray, clusters: Column, seeds: Column | None = None
) -> Interval:
    """Interval of the mean of `differences`, a[i] - b[i] of the same prompt and seed, shares each.

    Where all are 1, or -1, and where a and b agree on every row, the bounds are Wilson's as
    `cluster_interval` takes them, on both sides of 0. Raises ValueError as that does.
    """
    cells = _cells(differences, clusters, seeds)
    if np.ptp(differences) > 0:
        return _mean(cells, half=1.0)
    found = cluster_interval(np.abs(differences), clusters, seeds)
    value = float(differences[0])
    if value == 0:
        return replace(found, low=-found.high)
    if value < 0:
        return replace(found, estimate=value, low=-found.high, high=-found.low)
    return found


def jackknife_interval(statistics: npt.ArrayLike, n: int) -> Interval:
    """Interval of the mean over seeds of a difference of shares that is no mean of rows.

    statistics: [seeds, 1 + clusters], with every cluster, then without each one. What leaving a
    cluster out changes, times their number, stands for the cluster's rows (Tukey 1958). n: rows.
    """
    values = np.asarray(statistics, float)
    everything = values[:, :1]
    left_out = values[:, 1:]
    seeds, clusters = left_out.shape
    changes = left_out.mean(1, keepdims=True) - left_out
    of_clusters = everything + (clusters - 1) * changes
    se, df = _spread(np.stack([of_clusters, np.ones_like(of_clusters)]))
    mean = float(everything.mean())
    return _interval(mean, se, df, 1.0, n=n, clusters=clusters, seeds=seeds)


def odds_interval(outcome: Column, group: Column, seeds: Column) -> Interval:
    """How much likelier an outcome (bools) is in a group (bools) of rows: Yule's Q of the odds
    ratio, which is (1 + Q) / (1 - Q), pooled over seeds by Mantel and Haenszel.

    Half a row is added to each cell. The spread is the jackknife's over seeds, since rows of one
    seed follow one another. Raises ValueError when one of the groups is empty.
    """
    hit = np.asarray(outcome, bool)
    inside = np.asarray(group, bool)
    if len(set(inside)) < 2:
        raise ValueError("an odds ratio needs rows in both groups")
    names, place = np.unique(seeds, return_inverse=True)
    count = len(names)
    tables = np.zeros((2, 2, count))  # inside or outside, hit or missed, seed
    np.add.at(tables, (1 - inside, 1 - hit, place), 1)
    quotient = float(np.tanh(_pooled(tables) / 2))
    if count == 1:  # nothing is known of its spread
        return Interval(quotient, -1, 1, len(hit), 1, 1)
    left_out = [_pooled(np.delete(tables, seed, axis=2)) for seed in range(count)]
    of_log_odds = math.sqrt((count - 1) * np.var(left_out))
    se = of_log_odds / 2 / _slope(quotient, 1.0)
    return _interval(quotient, se, count - 1, 1.0, n=len(hit), clusters=count, seeds=count)


def _pooled(tables: np.ndarray) -> float:
    """Mantel and Haenszel's log odds ratio of [2, 2, seeds]."""
    padded = tables + 0.5 / tables.shape[2]
    return float(StratifiedTable(padded).logodds_pooled)


def holm(p_values: Column) -> list[float]:
    """p-values adjusted for their number by Holm's method, in the order given.

    The values are those of statsmodels' `multipletests`, which collects garbage in every call: a
    third of a second in a notebook."""
    p = np.asarray(p_values, dtype=float)
    order = p.argsort()
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted.tolist()
