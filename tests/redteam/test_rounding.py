"""What of a perturbation is rounded away, against plain loops; who is warned, and who is not."""

import warnings

import pytest
import tiny_models as tiny
import torch

from latlib.experiment import build
from latlib.experiment.layout import Layout
from latlib.experiment.spec import Spec
from latlib.hooks import EMBEDDING
from latlib.redteam import rounding
from latlib.redteam.latent import AttackCell, base_attack, replace_settings
from latlib.threat import ThreatModel


def rows_of(scale, dtype=torch.bfloat16):
    return (scale * torch.randn(50, 256, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("share", [1e-4, 5e-4, 2e-3])
def test_the_share_is_what_the_rounded_sum_moves_along_the_perturbation(share):
    stream = rows_of(3.0)
    radius = share * stream.float().norm(dim=-1).median().item()
    generator = torch.Generator().manual_seed(0)
    moved = wanted = 0.0
    deltas = torch.randn(stream.shape, generator=generator, dtype=torch.float64)
    for row, delta in zip(stream.tolist(), deltas.tolist(), strict=True):
        norm = sum(x * x for x in delta) ** 0.5
        for x, d in zip(row, delta, strict=True):
            d = torch.tensor(radius * d / norm).bfloat16().item()
            moved += d * (torch.tensor(x + d).bfloat16().item() - x)
            wanted += d * d
    assert rounding.share_added(stream, radius) == pytest.approx(moved / wanted, rel=0.02)


def test_less_arrives_where_the_stream_is_longer_and_all_of_it_in_32_bits():
    shares = [rounding.share_added(rows_of(scale), 0.1) for scale in (0.1, 1.0, 10.0, 100.0)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.99 and shares[-1] < 0.2
    assert rounding.share_added(rows_of(100.0, torch.float32), 0.1) > 0.99


def test_the_site_at_which_least_arrives_is_named():
    network = tiny.language_model(dtype=torch.bfloat16).network()
    batch = tiny.preference_batch()
    norms = {
        site: streams.float().norm(dim=-1).median().item()
        for site, streams in network.capture(batch, [EMBEDDING, 2]).items()
    }
    wide = ThreatModel.relative(0.1, norms)
    assert rounding.lost_in_rounding(network, batch, wide) == ""
    radii = {EMBEDDING: 0.1 * norms[EMBEDDING], 2: 5e-4 * norms[2]}
    said = rounding.lost_in_rounding(network, batch, ThreatModel.within(radii))
    assert "norm at site 2, and bfloat16 adds " in said and "model.dtype: float32" in said
    percent = int(said.split("bfloat16 adds ")[1].split("%")[0])
    assert 5 < percent < 90
    exact = tiny.language_model(dtype=torch.float32).network()
    assert rounding.lost_in_rounding(exact, batch, ThreatModel.within(radii)) == ""


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_an_evaluation_in_16_bits_says_so(smoke_run, dtype, warned):
    lm = smoke_run.model("ssft")
    half = build.load_model(
        smoke_run.layout.model_folder(Spec("base", 0)),
        smoke_run.profile.model.model_copy(update={"dtype": dtype}),
    )
    subject = smoke_run.subject(smoke_run.spec("ssft"))
    cell = AttackCell(replace_settings(base_attack(smoke_run.profile), eps=3e-4, steps=1), n=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cell.measure(half, subject)
    said = [str(w.message) for w in caught if "of so small a" in str(w.message)]
    assert bool(said) == warned and lm.n_layers == half.n_layers
    assert not warned or said[0].startswith("eps = 0.0003: a radius of ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"rule": "adamw", "lr": 1.0e-5}, "lat seed 0: eps = 0.05 never binds: "),
        ({"eps": 3.0e-4}, "lat seed 0: a radius of "),
    ],
)
def test_a_training_whose_radius_means_nothing_says_so(smoke_models, tmp_path, changes, said):
    from latlib.experiment.run import Run

    profile = Run("smoke", smoke_models).profile
    attack = profile.train.attack.model_copy(update=changes)
    model = profile.model.model_copy(update={"dtype": "bfloat16"})
    train = profile.train.model_copy(update={"attack": attack})
    profile = profile.model_copy(update={"train": train, "model": model})
    (tmp_path / "models").symlink_to(smoke_models / "models")
    (tmp_path / "results").symlink_to(smoke_models / "results")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build.make_trainer(Layout(profile, tmp_path), Spec("lat", 0))
    found = [str(w.message) for w in caught if str(w.message).startswith("lat seed 0")]
    assert [text.startswith(said) for text in found] == [True] if said else found == []
