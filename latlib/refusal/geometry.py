"""The shape of a set of activation differences: variance by component, subspaces, and the angles
between them.

1. `explained_variance`: shares of the squared singular values, centred or not (Abbas et al. do not
   say which).
2. `participation_ratio`: how many components it takes, as one number.
3. `principal_angles`: how far two models' subspaces lie apart.
4. Intervals resample clusters of pairs, the same ones for every model, so that models can be
   compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from latlib.hooks import orthonormal
from latlib.threat import Site

Streams = dict[Site, Tensor]  # site -> a tensor of the residual stream there
COMPONENTS = 8  # explained variance is stored for this many components; our choice
RESAMPLES = 400  # of pairs; our choice


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


def share_draws(difference: Tensor, clusters: Sequence[str], centred: bool) -> np.ndarray:
    """[RESAMPLES, COMPONENTS] shares of the first components, clusters of pairs resampled, the same
    ones for every model. difference: [pairs, d_model]; clusters: [pairs]."""
    names = sorted(set(clusters))
    of_pair = np.asarray(clusters)
    members = [np.flatnonzero(of_pair == name) for name in names]
    pairs = difference.numpy()
    rng = np.random.default_rng(0)
    shares = np.zeros((RESAMPLES, COMPONENTS))
    for draw in range(RESAMPLES):
        drawn = rng.integers(len(names), size=len(names))
        rows = pairs[np.concatenate([members[i] for i in drawn])]
        if centred:
            rows = rows - rows.mean(0)
        # the smaller of the two matrices that have these eigenvalues
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        largest = np.linalg.eigvalsh(gram)[::-1][:COMPONENTS]
        shares[draw, : len(largest)] = largest / max(np.trace(gram), 1e-300)
    return shares


def variance_table(found: Streams, clusters: Sequence[str], site: Site) -> dict[str, Any]:
    """JSON-ready: shares of the first components per site, uncentred and centred, participation
    ratios, and at `site` draws of the first two components' share and intervals of every one's.

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
        draws = share_draws(found[site], clusters, centred)
        low, high = np.quantile(draws, (0.025, 0.975), axis=0)
        table[f"{name}_draws"] = _rounded(draws[:, :2].sum(1), 5)
        table[f"{name}_low"] = _rounded(low, 5)
        table[f"{name}_high"] = _rounded(high, 5)
    return table


def _rounded(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(value), digits) for value in values]
