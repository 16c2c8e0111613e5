"""SVD, PCA and angles against scikit-learn and scipy; intervals that hold the estimate; what is
invariant.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA, TruncatedSVD

from latlib.refusal import geometry


@pytest.fixture(scope="module")
def difference():
    """[40, 16] with a strong mean and one strong direction besides."""
    rng = np.random.default_rng(0)
    rows = (
        rng.normal(size=(40, 16))
        + 3 * rng.normal(size=16)
        + np.outer(rng.normal(size=40), 2 * rng.normal(size=16))
    )
    return torch.tensor(rows)


def test_explained_variance_and_subspace_equal_scikit_learns(difference):
    ours = geometry.explained_variance(difference, centred=True)
    np.testing.assert_allclose(
        ours, PCA().fit(difference.numpy()).explained_variance_ratio_, atol=1e-6
    )
    svd = TruncatedSVD(3, algorithm="arpack", random_state=0).fit(difference.numpy())
    shares = svd.singular_values_**2 / (difference.numpy() ** 2).sum()
    np.testing.assert_allclose(geometry.explained_variance(difference)[:3], shares, atol=1e-6)
    space = geometry.top_subspace(difference, 3).numpy()
    np.testing.assert_allclose(np.abs((space * svd.components_).sum(1)), 1, atol=1e-6)


def test_principal_components_equal_scikit_learns(difference):
    ours, shares = geometry.principal_components(difference, 2)
    pca = PCA(2).fit(difference.numpy())
    theirs = pca.transform(difference.numpy())
    np.testing.assert_allclose(ours * np.sign((ours * theirs).sum(0)), theirs, atol=1e-6)
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, atol=1e-6)
    assert all(column[np.abs(column).argmax()] > 0 for column in ours.T)


@given(st.integers(1, 30))
def test_participation_ratio_counts_equal_components(k):
    assert geometry.participation_ratio(np.full(k, 1 / k)) == pytest.approx(k)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_principal_angles_of_a_rotated_basis_and_of_known_planes(seed, k):
    rows = torch.randn(k, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixed = torch.randn(
        k, k, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    ) + 3 * torch.eye(k)
    # another basis of the same span
    assert geometry.principal_angles(rows, 5 * mixed @ rows).max() < 1e-5
    axes = torch.eye(8).double()
    turned = torch.stack((axes[0], (axes[1] + axes[2]) / 2**0.5))
    np.testing.assert_allclose(geometry.principal_angles(axes[:2], turned), [0, 45], atol=1e-6)
    assert geometry.principal_angles(axes[0], axes[3]) == pytest.approx(90)


@pytest.mark.parametrize("centred", [False, True])
def test_shares_without_a_cluster_are_those_of_the_other_pairs(difference, centred):
    clusters = [f"verb{i // 4}" for i in range(40)]
    found = geometry.shares_left_out(difference, centred, clusters)
    assert found.shape == (11, geometry.COMPONENTS)
    whole = geometry.explained_variance(difference, centred)[: geometry.COMPONENTS]
    np.testing.assert_allclose(found[0], whole)
    rest = geometry.explained_variance(difference[4:], centred)[: geometry.COMPONENTS]
    np.testing.assert_allclose(found[1], rest)
    one, low, high = geometry.jackknife(found)
    assert (low < one).all() and (one < high).all()


@pytest.mark.parametrize("pairs", [5, 40])  # fewer pairs than components, and more
def test_the_table_of_a_model(difference, pairs):
    clusters = [f"pair{i // 2}" for i in range(pairs)]
    rows = difference[:pairs]
    table = geometry.variance_table({"embedding": 0 * rows, 0: rows}, clusters, 0)
    assert table["sites"] == ["embedding", "0"] and table["clusters"] == -(-pairs // 2)
    assert not any(table["uncentred"][0]) and table["uncentred_ratio"][0] is None
    assert len(table["uncentred"][1]) == geometry.COMPONENTS
    assert table["uncentred_low"][0] <= table["uncentred"][1][0] <= table["uncentred_high"][0]
    assert 1 <= table["centred_ratio"][1] <= 16
