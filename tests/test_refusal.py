"""Directions and SVD against scikit-learn, positions against one prompt at a time, ablation against projection."""

import random

import numpy as np
import pytest
import tiny_models as tiny
import torch
from sklearn.decomposition import PCA, TruncatedSVD

from latlib import refusal, world
from latlib.data import TokenRow, collate
from latlib.hooks import Capture

ROWS = [TokenRow(row.prompt, ()) for row in tiny.token_rows(12, 1)]
SITES = refusal.sites_of(tiny.LAYERS)


@pytest.fixture(scope="module")
def difference():
    """[40, 16] with a strong mean and one strong direction besides."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 16)) + 3 * rng.normal(size=16) + np.outer(rng.normal(size=40), 2 * rng.normal(size=16))
    return torch.tensor(rows)


@pytest.mark.parametrize("forward", ["lean", "stock"])
def test_activations_are_those_of_each_prompt_alone_at_its_last_token(forward):
    lm = tiny.language_model(forward)
    found = refusal.activations(lm.network(), ROWS, SITES, size=5)
    for i, row in enumerate(ROWS):
        with torch.no_grad(), Capture(lm.model, SITES, positions=[-1]) as streams:
            lm.model(torch.tensor([row.prompt]))
        for site in SITES:
            torch.testing.assert_close(found[site][i], streams[site][0, 0], atol=1e-6, rtol=1e-6)


def test_last_prompt_token_of_a_packed_row_is_the_one_that_predicts_the_reply():
    batch = collate(tiny.token_rows(4, 2))
    first_label = [batch.source[batch.label_rows == row][0].item() for row in range(4)]
    assert refusal.last_prompt_tokens(batch).tolist() == first_label


def test_explained_variance_and_directions_equal_scikit_learns(difference):
    ours = refusal.explained_variance(difference, centred=True)
    np.testing.assert_allclose(ours, PCA().fit(difference.numpy()).explained_variance_ratio_, atol=1e-6)
    svd = TruncatedSVD(2, algorithm="arpack", random_state=0).fit(difference.numpy())
    shares = svd.singular_values_**2 / (difference.numpy() ** 2).sum()
    np.testing.assert_allclose(refusal.explained_variance(difference)[:2], shares, atol=1e-6)
    top, mean = refusal.top_direction(difference), refusal.difference_of_means(difference)
    assert abs(svd.components_[0] @ top.numpy()) / top.norm() == pytest.approx(1, abs=1e-6)
    assert top @ mean > 0 and top.norm() == pytest.approx(mean.norm())
    np.testing.assert_allclose(mean, difference.numpy().mean(0), atol=1e-6)


def test_draws_surround_the_share_and_are_the_same_clusters_for_every_model(difference):
    clusters = [f"pair{i // 2}" for i in range(40)]
    draws = refusal.top_two_draws(difference, clusters, centred=False)
    share = refusal.explained_variance(difference)[:2].sum()
    assert np.quantile(draws, 0.01) < share < np.quantile(draws, 0.99)
    np.testing.assert_array_equal(draws, refusal.top_two_draws(2 * difference, clusters, centred=False))
    table = refusal.variance_table({"embedding": 0 * difference, 0: difference}, clusters, 0)
    assert table["sites"] == ["embedding", "0"] and table["clusters"] == 20 and not any(table["uncentred"][0])


def test_ablated_network_holds_none_of_the_direction():
    lm = tiny.language_model(trained=True)
    direction = refusal.differences(lm.network(), ROWS[:6], ROWS[6:], SITES)[2].mean(0)
    ablated = refusal.activations(lm.network().ablated(direction), ROWS, SITES)
    for rows in ablated.values():
        assert (rows @ direction).abs().max() < 1e-6 * direction.norm() * rows.norm(dim=1).max()


def test_random_directions_have_the_norm_and_the_papers_depth_is_rounded_down():
    assert torch.allclose(refusal.random_directions(16, 3, norm=2.5).norm(dim=1), torch.tensor(2.5).double())
    assert [refusal.fixed_site(n) for n in (32, 8, 4)] == [14, 3, 1]


def test_pairs_are_twins_of_one_split():
    harmful, harmless = refusal.paired_prompts("train", 20)
    assert all(h.harmful and not c.harmful for h, c in zip(harmful, harmless))
    assert all((h.verb, h.tool, h.template) == (c.verb, c.tool, c.template) for h, c in zip(harmful, harmless))
    assert {p.cluster for p in harmful} <= {"+".join(pair) for pair in world.pairs_of("train", "harmful")}


def test_sides_that_do_not_pair_up_are_an_error():
    lm = tiny.language_model()
    with pytest.raises(ValueError, match="3 harmful and 2 harmless"):
        refusal.differences(lm.network(), ROWS[:3], ROWS[:2], SITES)


def test_best_site_is_the_one_whose_ablation_makes_the_model_comply_most(monkeypatch):
    lm, tune = tiny.language_model(), [world.draw(random.Random(0), world.pairs_of("tune", "harmful"))] * 3
    found = {"embedding": torch.zeros(4, tiny.D), 0: torch.ones(4, tiny.D), 1: torch.ones(4, tiny.D)}
    replies = iter([["refused", "complied", "neither"], ["neither", "complied", "neither"]])
    monkeypatch.setattr(refusal, "forced_outcomes", lambda *_: next(replies))
    assert refusal.best_site(lm, found, tune) == 1  # as many complied, fewer refused; no direction at the embedding


def test_directions_are_kept_exactly(tmp_path):
    found = {"fixed": torch.randn(8).double(), "svd": torch.randn(8).double()}
    refusal.save_directions(found, tmp_path / "directions.safetensors")
    again = refusal.load_directions(tmp_path / "directions.safetensors")
    assert (
        all(torch.equal(again[rule], vector) for rule, vector in found.items()) and len(list(tmp_path.iterdir())) == 1
    )
