"""Rules, controls and the ablation suite: what a direction is made of, and that every cell of the
matrix is there.
"""

import random

import numpy as np
import pandas as pd
import pytest
import tiny_models as tiny
import torch
from sklearn.decomposition import TruncatedSVD

from latlib.config.profile import load_profile
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.examine import WorldExaminer
from latlib.evaluation.outcomes import CROSS_RULES, OWN_RULES, Examined
from latlib.refusal import activations, directions
from latlib.refusal.directions import Differences
from latlib.refusal.interventions import Direction
from latlib.world import grammar

ROWS = tiny.prompt_rows(12)
SITES = activations.sites_of(tiny.LAYERS)


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


def test_the_ablated_network_holds_none_of_the_direction():
    lm = tiny.language_model(trained=True)
    direction = activations.activation_differences(lm.network(), ROWS[:6], ROWS[6:], SITES)[2].mean(
        0
    )[0]
    ablated = activations.activations(lm.network().ablated(direction), ROWS, SITES)
    for rows in ablated.values():
        assert (rows @ direction).abs().max() < 1e-6 * direction.norm() * rows.norm(dim=-1).max()


def test_random_directions_have_the_norm_and_the_papers_depth_is_rounded_down():
    assert torch.allclose(
        directions.random_directions(16, 3, norm=2.5).norm(dim=1), torch.tensor(2.5).double()
    )
    assert [directions.fixed_site(n) for n in (32, 8, 4)] == [14, 3, 1]


def test_the_top_direction_is_scikit_learns_towards_harmful_and_as_long_as_the_mean():
    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.normal(size=(40, 16)) + 3 * rng.normal(size=16))
    svd = TruncatedSVD(1, algorithm="arpack", random_state=0).fit(rows.numpy())
    top, mean = directions.top_direction(rows), rows.mean(0)
    assert abs(svd.components_[0] @ top.numpy()) / top.norm() == pytest.approx(1, abs=1e-6)
    assert top @ mean > 0 and top.norm() == pytest.approx(mean.norm())


def test_means_of_pairs_are_differences_of_means_and_shuffled_labels_leave_little():
    generator = torch.Generator().manual_seed(0)
    harmful, harmless = torch.randn(2, 200, 2, 16, generator=generator, dtype=torch.float64)
    harmful = harmful + 5.0
    found = Differences({0: harmful - harmless}, ["c"] * 200)
    np.testing.assert_allclose(
        found.means()[0], harmful.numpy().mean(0) - harmless.numpy().mean(0), atol=1e-6
    )
    assert torch.equal(found.last()[0], (harmful - harmless)[:, 1])
    assert found.shuffled(0).norm() < 0.1 * found.means()[0][-1].norm()
    assert not torch.equal(found.shuffled(0, seed=1), found.shuffled(0, seed=2))


def test_the_best_site_is_the_one_whose_ablation_makes_the_model_comply_most(monkeypatch):
    lm, tune = (
        tiny.language_model(),
        [grammar.draw(random.Random(0), grammar.pairs_of("tune", "harmful"))] * 3,
    )
    means = {"embedding": torch.zeros(tiny.D), 0: torch.ones(tiny.D), 1: torch.ones(tiny.D)}
    replies = iter([["refused", "complied", "neither"], ["neither", "complied", "neither"]])
    monkeypatch.setattr(WorldExaminer, "examine", lambda *_, **__: Examined(next(replies), True))
    # as many complied, fewer refused; no direction at the embedding
    assert directions.best_site(lm, load_profile("smoke"), means, tune) == 1
    with pytest.raises(ValueError, match="do not differ at any of the sites"):
        directions.best_site(lm, load_profile("smoke"), {"embedding": torch.zeros(tiny.D)}, tune)


def test_directions_are_kept_exactly(tmp_path):
    found = {
        "fixed": Direction(torch.randn(8).double(), 3),
        "subspace": Direction(torch.randn(3, 8).double(), "embedding", -2, "nothing passed", False),
    }
    directions.save_directions(found, tmp_path / "directions.safetensors")
    again = directions.load_directions(tmp_path / "directions.safetensors")
    assert len(list(tmp_path.iterdir())) == 1 and list(again) == list(found)
    for rule, d in found.items():
        assert torch.equal(again[rule].vector, d.vector)
        kept = vars(again[rule])
        assert {**kept, "vector": None} == {**vars(d), "vector": None}


def test_differences_are_kept_with_their_clusters(tmp_path):
    pairs = {"embedding": torch.randn(3, 2, 4).double(), 0: torch.randn(3, 2, 4).double()}
    Differences(pairs, ["x", "x", "y"]).save(tmp_path / "found.safetensors")
    again = Differences.load(tmp_path / "found.safetensors")
    assert list(again.pairs) == ["embedding", 0] and len(list(tmp_path.iterdir())) == 1
    assert again.clusters == ["x", "x", "y"]
    for site, rows in pairs.items():
        assert torch.equal(again.pairs[site], rows.float().double())


def test_a_models_directions_are_what_their_rules_say(run):
    found, lm = run.directions("ssft"), run.model("ssft")
    assert tuple(found) == OWN_RULES
    means, fixed = run.differences("ssft").means(), directions.fixed_site(lm.n_layers)
    torch.testing.assert_close(found["fixed"].vector, means[fixed][-1])
    torch.testing.assert_close(found["best"].vector, means[found["best"].site][-1])
    torch.testing.assert_close(
        found["selected"].vector, means[found["selected"].site][found["selected"].position]
    )
    torch.testing.assert_close(
        found["subspace"].vector @ found["subspace"].vector.T,
        torch.eye(directions.SUBSPACE).double(),
    )
    assert found["svd"].vector.norm().item() == pytest.approx(found["fixed"].vector.norm().item())
    learned = found["learned-subspace"].vector
    torch.testing.assert_close(learned @ learned.T, torch.eye(directions.SUBSPACE).double())
    length = found["fixed"].vector.norm().item()
    assert found["learned"].vector.norm() == pytest.approx(length)
    assert found["fixed"].found is None and None not in {found[r].found for r in OWN_RULES[2:]}
    harmful, _ = activations.paired_prompts(run.profile, "train", 16)
    assert run.differences("ssft").clusters == [p.cluster for p in harmful]


def test_a_direction_is_found_where_it_opens_more_than_chance_does(monkeypatch, run):
    """Of 20 tuning prompts the worst random direction opens 3; two more are the margin."""
    opened = {"nothing": 1, "random": iter([0, 3, 2])}

    def opens(lm, profile, vector, tune):
        if vector is None:
            return opened["nothing"], 0
        known = {2.0: 4, 3.0: 5}.get(round(vector[0].item(), 6))
        return (next(opened["random"]) if known is None else known), 0

    monkeypatch.setattr(directions, "_opened", opens)
    weak, strong = (Direction(torch.full((8,), v).double(), 0) for v in (2.0, 3.0))
    dropped = Direction(strong.vector, 0, note="no filter left", found=False)
    searched = {"best": weak, "learned": strong, "selected": dropped}
    found = directions.judged(run.model("ssft"), run.profile, searched, [None] * 20)
    assert {rule: d.found for rule, d in found.items()} == {
        "best": False,
        "learned": True,
        "selected": False,
    }


def test_what_the_search_found_stands_in_the_table(run):
    table = run.evaluate("lat", 0, "ablation")
    for source in ("base", "lat"):
        rows = table[(table["source"] == source) & (table["rule"] == "best")]
        assert set(rows["found"]) == {run.directions(source)["best"].found}
    assert table.loc[table["rule"].isin(["", "fixed", "site-sweep"]), "found"].isna().all()


def filtered(monkeypatch, run, kept, filter_prompts=True):
    """(the `selected` direction, what the choice was given) where the model treats rightly the
    prompts of these numbers. kept: of trained harmful and harmless, of validation harmful and
    harmless prompts."""
    seen, calls, lm = {}, iter(kept), run.model("ssft")

    def rightly(network, rows, tokens, harmful):
        mask = torch.zeros(len(rows), dtype=torch.bool)
        mask[next(calls)] = True
        return mask

    def select(network, means, harmful, harmless, tokens):
        seen.update(means=means, harmful=harmful, harmless=harmless)
        return Direction(means[0][-1], 0, note="as ever")

    monkeypatch.setattr(directions, "treated_rightly", rightly)
    monkeypatch.setattr(directions, "select", select)
    changes = {"filter_prompts": filter_prompts}
    evaluation = run.profile.evaluation.model_copy(update=changes)
    profile = run.profile.model_copy(update={"evaluation": evaluation})
    found = directions.find_directions(lm, profile, run.differences("ssft"))
    return found["selected"], seen


def test_prompts_that_are_not_treated_rightly_leave_the_selection(run, monkeypatch):
    pairs = run.differences("ssft").pairs
    tune = activations.paired_prompts(run.profile, "tune", 16)
    loud, quiet = (activations.prompt_rows(run.model("ssft"), side) for side in tune)
    direction, seen = filtered(monkeypatch, run, ([0, 1, 4], [1, 4, 5], [2, 3], [0]))
    assert direction.note == (
        f"kept 2 of {len(pairs[0])} pairs, 2 of {len(loud)} harmful and 1 of {len(quiet)} harmless"
        " validation prompts; as ever"
    )
    for site, mean in seen["means"].items():
        torch.testing.assert_close(mean, pairs[site][[1, 4]].mean(0))
    assert seen["harmful"] == [loud[2], loud[3]] and seen["harmless"] == [quiet[0]]


def test_where_no_prompt_is_treated_rightly_all_count_and_that_is_said(run, monkeypatch):
    pairs = run.differences("ssft").pairs
    direction, seen = filtered(monkeypatch, run, ([], [0], [], [0, 1]))
    assert "kept 0 of 16 pairs, 0 of 16 harmful" in direction.note
    assert "(all where none would be left)" in direction.note
    torch.testing.assert_close(seen["means"][0], pairs[0].mean(0))
    assert len(seen["harmful"]) == 16 and len(seen["harmless"]) == 2
    direction, seen = filtered(monkeypatch, run, (), filter_prompts=False)
    assert direction.note == "as ever" and len(seen["harmless"]) == 16


def test_the_suite_has_every_cell_of_the_matrix_and_its_controls(run):
    """Targets by sources, each target's own rules and sweep, and random and shuffled controls."""
    names = directions.sources(run.profile)
    assert names == ("base", *run.profile.methods)
    target, layers = "lat", run.profile.model.layers
    table = run.evaluate(target, 0, "ablation")
    assert set(table["attack"]) == {"none"}
    keys = ["intervention", "source", "rule", "site", "draw"]
    cells = {tuple(None if pd.isna(x) else x for x in row) for row in table[keys].values}
    best = str(run.directions(target)["best"].site)
    expected = {("ablate", "nothing", "", "", None), ("ablate", "shuffled", "", best, None)}
    expected |= {("ablate", "random", "", "", draw) for draw in range(3)}
    for source in names:
        for rule in OWN_RULES if source == target else CROSS_RULES:
            found = run.directions(source)[rule]
            expected.add(("ablate", source, rule, str(found.site), None))
    # the template's last token embeds alike
    expected |= {("ablate", target, "site-sweep", str(site), None) for site in range(layers)}
    expected |= {("add", "random", "", best, 0), ("add", target, "best", best, None)}
    assert cells == expected
    sizes = table.groupby([*keys, "prompts"], dropna=False).size()
    assert set(sizes) == {
        min(run.profile.evaluation.ablation_prompts, run.profile.evaluation.prompts)
    }
    harmless = table[table["prompts"] == "harmless"]
    asked = set(zip(harmless["intervention"], harmless["source"], harmless["rule"]))
    assert asked == {
        *(("ablate", source, "best") for source in names),
        ("ablate", target, "learned"),
        *(("ablate", "nothing", ""), ("add", "random", ""), ("add", target, "best")),
    }
    harmful = prompt_set("harmful", run.profile, run.profile.evaluation.ablation_prompts)
    assert set(table.loc[table["prompts"] == "harmful", "cluster"]) == {p.cluster for p in harmful}


def test_the_profile_says_whose_directions_are_removed(run):
    some = {"evaluation": run.profile.evaluation.model_copy(update={"sources": ("ssft", "lat")})}
    few = run.profile.model_copy(update=some)
    assert directions.sources(few) == directions.sources(few, "lat") == ("ssft", "lat")
    assert directions.sources(few, "at") == ("ssft", "lat", "at"), "each target's own are tried"
