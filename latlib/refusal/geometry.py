"""The shape of a set of activation differences: variance by component, subspaces, and the angles
between them.

1. `explained_variance`: shares of the squared singular values, centred or not (Abbas et al. do not
   say which).
2. `participation_ratio`: how many components it takes, as one number.
3. `principal_angles`: how far two models' subspaces lie apart.
4. Intervals are jackknives over pairs or clusters of them, with Student's t: resampling with
   repetition would make few differences look more concentrated than they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh, subspace_angles
from scipy.stats import t as student
from threadpoolctl import threadpool_limits
from torch import Tensor

from latlib.hooks import orthonormal
from latlib.threat import Site

Streams = dict[Site, Tensor]  # site -> a tensor of the residual stream there
COMPONENTS = 8  # explained variance is stored for this many components; our choice
LEADING = 2  # components that a concentration is read off, as Abbas et al. 2025 do
LEVEL = 0.95


def explained_variance(difference: Tensor, centred: bool = False) -> np.ndarray:
    """[min(pairs, d_model)] shares of the squared singular values, largest first; they sum to 1.

    difference: [pairs, d_model]. centred: subtract the mean difference first.
    """
    rows = difference - difference.mean(0) if centred else difference
    squares = torch.linalg.svdvals(rows.double()).square()
    return (squares / squares.sum().clamp(min=1e-300)).numpy()


def participation_ratio(shares: np.ndarray) -> float:
    """1 / sum of squared shares (which sum to 1): 1 for one component, k for k equal ones."""
    return float(1 / np.square(shares).sum())


def top_subspace(difference: Tensor, k: int) -> Tensor:
    """[k, d_model] first right singular vectors of the uncentred differences ([pairs, d_model]),
    orthonormal.
    """
    _, _, rows = torch.linalg.svd(difference.double(), full_matrices=False)
    return rows[:k]


def principal_angles(a: Tensor, b: Tensor) -> np.ndarray:
    """Angles in degrees between the spans of the rows of a and b ([d_model] or [k, d_model]),
    smallest first.
    """
    angles = subspace_angles(orthonormal(a).T.numpy(), orthonormal(b).T.numpy())
    return np.degrees(angles[::-1])


def principal_components(rows: Tensor, k: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """([rows, k] coordinates along the first principal components of `rows` ([rows, d_model]), [k]
    shares of variance).

    The sign of a component is the one that makes its largest coordinate positive.
    """
    centred = (rows - rows.mean(0)).double()
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = left[:, :k] * sizes[:k]
    largest = coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True))
    shares = sizes.square() / sizes.square().sum().clamp(min=1e-300)
    return (coordinates * torch.where(largest < 0, -1.0, 1.0)).numpy(), shares[:k].numpy()


def shares_left_out(
    difference: Tensor, centred: bool, clusters: Sequence[str] | None = None
) -> np.ndarray:
    """[1 + clusters, COMPONENTS] shares of the first components: of all pairs, then without each
    cluster, in the order of their names.

    difference: [pairs, d_model]; clusters: [pairs], None where each pair is one of its own.
    """
    rows = difference.double().numpy()
    products = rows @ rows.T
    names = np.arange(len(rows)) if clusters is None else np.asarray(clusters)
    with threadpool_limits(1):  # more threads wait for each other longer than so few rows take
        found = [_shares(products, centred)]
        for name in np.unique(names):
            left = names != name
            found.append(_shares(products[left][:, left], centred))
    return np.array(found)


def _shares(products: np.ndarray, centred: bool) -> np.ndarray:
    """Of the inner products of differences ([pairs, pairs]), whose eigenvalues are their squared
    singular values."""
    if centred:
        means = products.mean(0)
        products = products - means - means[:, None] + means.mean()
    n = len(products)
    count = min(n, COMPONENTS)
    largest = eigh(products, eigvals_only=True, subset_by_index=[n - count, n - 1])[::-1]
    shares = np.zeros(COMPONENTS)
    shares[:count] = largest / max(np.trace(products), 1e-300)
    return shares


def jackknife(values: np.ndarray) -> tuple[Any, Any, Any]:
    """(estimate, low, high) at `LEVEL` of statistics ([1 + units, ...]): with everything, then
    without each unit."""
    estimate, left_out = values[0], values[1:]
    n = len(left_out)
    error = np.sqrt((n - 1) * left_out.var(0))
    reach = student.ppf((1 + LEVEL) / 2, n - 1) * error
    return estimate, estimate - reach, estimate + reach


def variance_table(found: Streams, clusters: Sequence[str], site: Site) -> dict[str, Any]:
    """JSON-ready: shares of the first components per site, uncentred and centred, participation
    ratios, and at `site` the share of the first two together without each cluster, and intervals of
    every one's.

    found: site -> [pairs, d_model]. A site where all differences vanish (the embedding of one
    template's last token) has shares of 0 and no participation ratio.
    """
    table: dict[str, Any] = {
        "pairs": len(clusters),
        "clusters": len(set(clusters)),
        "fixed_site": site,
        "sites": [str(s) for s in found],
    }
    for name, centred in (("uncentred", False), ("centred", True)):
        table[name] = []
        table[f"{name}_ratio"] = []
        for difference in found.values():
            first = np.zeros(COMPONENTS)
            ratio = None
            if difference.any():
                shares = explained_variance(difference, centred)
                first[: len(shares)] = shares[:COMPONENTS]
                ratio = round(participation_ratio(shares), 4)
            table[name].append(_rounded(first, 6))
            table[f"{name}_ratio"].append(ratio)
        left_out = shares_left_out(found[site], centred, clusters)
        _, low, high = np.clip(jackknife(left_out), 0, 1)
        table[f"{name}_left_out"] = _rounded(left_out[:, :LEADING].sum(1), 6)
        table[f"{name}_low"] = _rounded(low, 5)
        table[f"{name}_high"] = _rounded(high, 5)
    return table


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
