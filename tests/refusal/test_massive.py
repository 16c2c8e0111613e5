"""Massive activations: the published rules at their bounds, removals with a known truth, intervals
that hold their level."""

import math

import numpy as np
import pytest
import torch

from latlib.refusal import massive
from latlib.refusal.geometry import explained_variance, jackknife


def test_suns_rule_needs_both_the_magnitude_and_the_multiple():
    stream = torch.full((4, 9), 0.15)
    stream[0, 3] = -151.0  # both
    stream[1, 3] = 149.0  # not 1,000 times the median
    stream[2] = 0.01
    stream[2, 3] = 99.0  # 9,900 times, and not above 100
    assert massive.massive_by_sun(stream).nonzero().tolist() == [[0, 3]]


def test_kangs_rule_is_20_root_mean_squares_at_its_width():
    stream = torch.ones(3, 4096)
    rms = 20 * math.sqrt(4095 / (4096 - 400))  # x = 20 RMS of a stream that holds x itself
    stream[0, 7], stream[1, 7] = rms * 1.001, -rms * 0.999
    stream[2] = 0
    assert massive.massive_by_kang(stream).nonzero().tolist() == [[0, 7]]
    assert massive.prompts_by_dimension(massive.massive_by_kang(stream)) == {7: 1}


@pytest.fixture(scope="module")
def models():
    """40 pairs in 200 dimensions: b is a with dimensions 4 and 9 in the first ten pairs."""
    rng = np.random.default_rng(0)
    harmless = torch.tensor(rng.normal(size=(40, 200)))
    harmful = torch.tensor(rng.normal(size=(40, 200)) + rng.normal(size=200))
    loud = harmful.clone()
    loud[:10, [4, 9]] = torch.tensor([40.0, -15.0]).double()
    return {"a": (harmful, harmless), "b": (loud, harmless)}


def test_what_is_removed_is_what_the_share_loses(models):
    table = massive.shares_without(models, (4, 9), "a").set_index(["model", "removed"])
    difference = models["b"][0] - models["b"][1]
    assert massive.largest(difference, 2) == [4, 9]
    assert massive.dominated(difference, (4, 9)).tolist() == [True] * 10 + [False] * 30
    expected = {
        massive.NOTHING: difference,
        massive.DIMENSIONS: difference[:, [i for i in range(200) if i not in (4, 9)]],
        massive.PAIRS: difference[10:],
    }
    for removed, rows in expected.items():
        row = table.loc[("b", removed)]
        assert row["share"] == pytest.approx(explained_variance(rows)[:2].sum())
        assert row["pairs"] == len(rows) and 0 <= row["low"] < row["share"] < row["high"] <= 1
    b = table.loc["b"]
    assert b.loc[massive.NOTHING, "more_low"] > 0
    # without the two dimensions, or without the same pairs, both models are one
    assert abs(b.loc[[massive.DIMENSIONS, massive.PAIRS], "more"]).max() < 1e-12
    assert b.loc[massive.LARGEST, "share"] == b.loc[massive.DIMENSIONS, "share"]


def test_a_model_without_loud_dimensions_keeps_its_share(models):
    table = massive.shares_without(models, (4, 9), "a").set_index(["model", "removed"])
    a = table.loc["a"]
    assert a.loc[massive.PAIRS, "pairs"] == 40 and not a["more"].any()
    assert abs(a.loc[massive.DIMENSIONS, "share"] - a.loc[massive.NOTHING, "share"]) < 0.05


@pytest.mark.parametrize("centred", [False, True])
def test_shares_equal_the_singular_values_of_every_subset(models, centred):
    difference = models["b"][0] - models["b"][1]
    shares = massive.leading_shares(difference, centred)
    assert shares[0] == pytest.approx(explained_variance(difference, centred)[:2].sum())
    for pair in (0, 17):
        rest = torch.cat([difference[:pair], difference[pair + 1 :]])
        expected = explained_variance(rest, centred)[:2].sum()
        assert shares[1 + pair] == pytest.approx(expected)


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.array([1.0, 4.0, 2.0, 7.0, 6.0])
    left_out = [np.delete(values, i).mean() for i in range(5)]
    estimate, low, high = jackknife(np.array([values.mean(), *left_out]))
    reach = 2.7764451 * values.std(ddof=1) / math.sqrt(5)
    assert (estimate, low, high) == pytest.approx((4.0, 4 - reach, 4 + reach))


def pairs_of(rng, loud: bool):
    """60 pairs in 128 dimensions round one direction; in some of them two dimensions are loud."""
    rows = rng.normal(size=(60, 128))
    rows[:, 0] += 6
    if loud:
        on = rng.random(60) < 0.3
        rows[on, 5] += 40 * rng.uniform(0.3, 1, on.sum())
    return torch.tensor(rows)


@pytest.mark.parametrize("loud", [False, True])
def test_intervals_of_shares_cover_what_they_should(loud):
    rng = np.random.default_rng(1)
    others = [explained_variance(pairs_of(rng, loud))[:2].sum() for _ in range(1000)]
    truth = np.mean(others)
    covered = 0
    for _ in range(200):
        shares = massive.leading_shares(pairs_of(rng, loud), False)
        _, low, high = jackknife(shares)
        covered += low <= truth <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_angles_of_known_directions_with_and_without_a_loud_dimension():
    noise = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).double()
    harmless = torch.zeros(30, 12).double()
    first = 1e-3 * noise
    first[:, 0] += 1
    turned = 1e-3 * noise.flip(0)
    turned[:, :2] += 1
    turned[:, 5] += 10
    for rows in (first, turned):  # a second direction that both have
        rows[:15, 8] += 0.5
        rows[15:, 8] -= 0.5
    models = {"a": (first, harmless), "b": (turned, harmless)}
    table = massive.direction_angles(models, (5,)).set_index("removed")
    assert list(table[["a", "b"]].iloc[0]) == ["b", "a"]
    angle = math.degrees(math.acos(1 / math.sqrt(102)))
    assert table.loc[massive.NOTHING, "angle"] == pytest.approx(angle, abs=0.1)
    assert table.loc[massive.DIMENSIONS, "angle"] == pytest.approx(45, abs=0.1)
    assert (table["low"] < table["angle"]).all() and (table["angle"] < table["high"]).all()
    assert table.loc[massive.DIMENSIONS, "first"] == pytest.approx(0, abs=0.5)
    assert table.loc[massive.DIMENSIONS, "second"] == pytest.approx(45, abs=0.5)


def test_the_record_of_a_model_names_what_each_rule_finds(models):
    record = massive.massive_record(models["b"])
    assert record["prompts"] == 80 and record["Sun"] == {} and record["largest"] == 40
    assert record["Kang"] == {"4": 10, "9": 10}
    assert record["share_without_Sun"] == record["share"]
    assert record["share_without_Kang"][0] < record["share"][0]
