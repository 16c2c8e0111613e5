"""Massive activations: a few dimensions of the stream that tower over all others, and how much of a
concentration of refusal in two components is theirs.

1. `MASSIVE` has two rules for which entries of a stream are massive: Sun et al. 2024 (arXiv
   2402.17762, section 2), by magnitude; Kang et al. 2025 (arXiv 2503.03321), by the share of the
   stream's length.
2. `shares_without` removes dimensions from paired differences, or the pairs that these dominate,
   and measures the share of the first two components anew, in several models on the same prompts.
3. Intervals are jackknives over pairs, with Student's t: resampling with repetition would make few
   differences look more concentrated than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from latlib.refusal.geometry import (
    LEADING,
    explained_variance,
    jackknife,
    principal_angles,
    shares_left_out,
    top_subspace,
)

SUN_MAGNITUDE = 100.0  # Sun et al. 2024, section 2
SUN_TIMES_MEDIAN = 1000.0  # the same; of the magnitudes of one stream
# Kang et al. 2025: 20 times the root mean square, in a stream of 4,096 dimensions. As a share of
# the squared length, so that it means the same at every width: our choice.
KANG_SHARE = 20.0**2 / 4096
# A pair is dominated by dimensions that hold more than half of its length: our choice.
DOMINATED = 0.5
# what is removed from the differences
NOTHING = "nothing"
DIMENSIONS = "dimensions"  # those that are named
PAIRS = "pairs"  # those that the named dimensions dominate
LARGEST = "largest"  # as many dimensions as are named, the model's own largest: the control
REMOVALS = (NOTHING, DIMENSIONS, PAIRS, LARGEST)

Sides = tuple[Tensor, Tensor]  # [pairs, d_model] of harmful prompts, and of harmless ones


def massive_by_sun(stream: Tensor) -> Tensor:
    """[prompts, d_model] bool: above 100, and 1,000 times the median magnitude of the same stream
    ([prompts, d_model])."""
    sizes = stream.abs()
    median = sizes.median(-1, keepdim=True).values
    return (sizes > SUN_MAGNITUDE) & (sizes >= SUN_TIMES_MEDIAN * median)


def massive_by_kang(stream: Tensor) -> Tensor:
    """[prompts, d_model] bool: holds at least `KANG_SHARE` of the squared length of its stream."""
    squares = stream.double().square()
    whole = squares.sum(-1, keepdim=True)
    return (squares >= KANG_SHARE * whole) & (whole > 0)


MASSIVE: dict[str, Callable[[Tensor], Tensor]] = {"Sun": massive_by_sun, "Kang": massive_by_kang}


def prompts_by_dimension(massive: Tensor) -> dict[int, int]:
    """Dimension -> in how many prompts it is massive, by dimension; of [prompts, d_model] bool."""
    counts = massive.sum(0)
    return {dim: int(counts[dim]) for dim in counts.nonzero().flatten().tolist()}


def massive_record(sides: Sides) -> dict[str, Any]:
    """JSON-ready: how many prompts; by rule how many have which dimension massive; the largest
    magnitude, and in multiples of its stream's median; the shares of the first two components of
    the differences, uncentred and centred, with all dimensions and, by rule, without those found.
    """
    stream = torch.cat(sides)
    sizes = stream.abs()
    # a median of 0 has no multiple
    multiples = sizes / sizes.median(-1, keepdim=True).values.clamp(min=1e-300)
    difference = sides[0] - sides[1]
    record: dict[str, Any] = {
        "prompts": len(stream),
        "largest": float(sizes.max()),
        "times_median": float(multiples.max()),
        "share": _both_shares(difference),
    }
    for name, rule in MASSIVE.items():
        found = prompts_by_dimension(rule(stream))
        record[name] = {str(dim): count for dim, count in found.items()}
        record[f"share_without_{name}"] = _both_shares(without(difference, list(found)))
    return record


def _both_shares(difference: Tensor) -> list[float]:
    """Share of the first two components, uncentred and centred; 0 where nothing is left."""
    return [float(explained_variance(difference, c)[:LEADING].sum()) for c in (False, True)]


def without(difference: Tensor, dimensions: Sequence[int]) -> Tensor:
    """The differences ([pairs, d_model]) with 0 in some dimensions."""
    left = difference.clone()
    left[:, list(dimensions)] = 0.0
    return left


def dominated(difference: Tensor, dimensions: Sequence[int]) -> Tensor:
    """[pairs] bool: the dimensions hold more than `DOMINATED` of the length of a pair's difference
    ([pairs, d_model])."""
    return difference[:, list(dimensions)].norm(dim=1) > DOMINATED * difference.norm(dim=1)


def largest(difference: Tensor, count: int) -> list[int]:
    """The dimensions with the largest sums of squares over pairs ([pairs, d_model])."""
    return difference.double().square().sum(0).topk(count).indices.tolist()


def leading_shares(difference: Tensor, centred: bool) -> np.ndarray:
    """[1 + pairs] share of the first two components: of all pairs, then without each one.

    difference: [pairs, d_model].
    """
    return shares_left_out(difference, centred)[:, :LEADING].sum(1)


def shares_without(
    models: Mapping[str, Sides], dimensions: Sequence[int], reference: str, centred: bool = False
) -> pd.DataFrame:
    """The share of the first two components with and without massive dimensions: a row for each
    model and removal.

    models: name -> activations of the same prompts. dimensions: to be removed. reference: the model
    that all are compared with, under the same removal: without the *same* pairs, and for `LARGEST`
    without its own largest dimensions.

    Columns: model, removed, pairs (that are left), share, low, high (clipped to [0, 1]); more,
    more_low, more_high: the share minus the reference's, paired by prompt.
    """
    differences = {name: harmful - harmless for name, (harmful, harmless) in models.items()}
    rows = []
    for name, difference in differences.items():
        others = differences[reference]
        pairs = ~dominated(difference, dimensions)
        count = len(dimensions)
        left = {
            NOTHING: (difference, others),
            DIMENSIONS: (without(difference, dimensions), without(others, dimensions)),
            PAIRS: (difference[pairs], others[pairs]),
            LARGEST: tuple(without(d, largest(d, count)) for d in (difference, others)),
        }
        for removed, both in left.items():
            shares, other_shares = (leading_shares(d, centred) for d in both)
            estimate, low, high = jackknife(shares)
            more = jackknife(shares - other_shares)
            row = [name, removed, len(both[0]), estimate, max(low, 0.0), min(high, 1.0), *more]
            rows.append(row)
    columns = ["model", "removed", "pairs", "share", "low", "high"]
    return pd.DataFrame(rows, columns=[*columns, "more", "more_low", "more_high"])


def direction_angles(models: Mapping[str, Sides], dimensions: Sequence[int]) -> pd.DataFrame:
    """How far directions of two models lie apart, in degrees: a row for each pair of models and for
    `NOTHING` and `DIMENSIONS` removed.

    Columns: a, b, removed; angle, low, high: between the differences of means; first, second:
    principal angles between the first two singular directions.
    """
    rows = []
    differences = {name: harmful - harmless for name, (harmful, harmless) in models.items()}
    for b, a in combinations(differences, 2):
        first = differences[a]
        second = differences[b]
        rows.append([a, b, NOTHING, *_angles(first, second)])
        first = without(first, dimensions)
        second = without(second, dimensions)
        rows.append([a, b, DIMENSIONS, *_angles(first, second)])
    columns = ["a", "b", "removed", "angle", "low", "high", "first", "second"]
    return pd.DataFrame(rows, columns=columns)


def _angles(first: Tensor, second: Tensor) -> list[float]:
    """Degrees between the means of two models' differences, with their bounds, and between the
    planes of their first two singular directions."""
    mean = torch.cosine_similarity(_means(first), _means(second)).clamp(-1, 1)
    angle = jackknife(torch.rad2deg(mean.acos()).numpy())
    planes = [top_subspace(difference, LEADING) for difference in (first, second)]
    return [*angle, *principal_angles(*planes)]


def _means(difference: Tensor) -> Tensor:
    """[1 + pairs, d_model] means of all pairs, then without each one; of any length."""
    total = difference.sum(0)
    return torch.cat([total[None], total - difference])
