"""Latent attacks as they are evaluated: which cells, at which radii, whose gradient, and what if
there is none.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from learned_models import COMPLIES, IS_LOST, KNOWS, learned, small_profile, subject_of

from latlib.attack import Attack, attack_losses, perturbed_positions, pgd
from latlib.batch import collate
from latlib.config.profile import load_profile
from latlib.config.sections import AttackSettings, ProfileError
from latlib.evaluation.ask import prompt_set, token_rows
from latlib.evaluation.examine import WorldExaminer, examiner_of
from latlib.evaluation.outcomes import COLUMNS, Cell, Examined, outcome_rows
from latlib.experiment.build import measure_norms
from latlib.hooks import EMBEDDING, resolve_sites
from latlib.models import LanguageModel
from latlib.redteam import latent
from latlib.redteam.latent import (
    AttackCell,
    base_attack,
    gradient_norms,
    replace_settings,
)
from latlib.threat import ADAM_LR

PROFILE = small_profile()
LAT = PROFILE.training("lat").attack
SITES, EPS = (0, 1, 2), (0.05, 0.2)  # of the smoke profile


@pytest.fixture(scope="module")
def lm():
    """Answers a third of the harmful prompts, and refuses the others, half of which it would
    finish.
    """
    return learned(PROFILE, lambda name, encoding, i: i % 3, steps=70)


@pytest.fixture(scope="module")
def other():
    """Another model, which refuses everything."""
    return learned(PROFILE, lambda name, encoding, i: IS_LOST if i % 2 else KNOWS, seed=1, steps=70)


@pytest.fixture(scope="module")
def subject(lm):
    return replace(subject_of(PROFILE), norms=measure_norms(lm, PROFILE, 0))


def counted(lm):
    """A model of which one network is made, and the batches that its `label_rows` is asked for."""
    network, calls = lm.network(), []
    run = network.label_rows
    network.label_rows = lambda batch, *rest: calls.append(batch.shape[0]) or run(batch, *rest)
    parts = {name: getattr(lm, name) for name in ("tokenizer", "n_layers", "context", "device")}
    return SimpleNamespace(network=lambda: network, **parts), calls


def test_a_cell_is_told_from_every_other_one():
    changes = [
        {},
        *({"sites": sites} for sites in ((0,), (0, 1), ("embedding",))),
        *({"eps": eps} for eps in (0.1, 0.05000001)),
        *(
            {"eps_mode": "absolute"},
            {"steps": 3},
            {"rule": "sign"},
            {"lr": 0.3},
            {"start": "random"},
            {"restarts": 2},
        ),
        *({"positions": "prompt+completion"}, {"toward": 0.5}, {"away": 0.5}, {"targeted": False}),
    ]
    assert {name for change in changes for name in change} == set(AttackSettings.model_fields)
    cells = [AttackCell(replace_settings(LAT, **change)) for change in changes]
    cells += [AttackCell(LAT, noise=True), AttackCell(LAT, "noise"), AttackCell(LAT, n=4)]
    digests = [
        cell.digest(model) for cell in cells for model in ("lat-seed0", "lat-seed1", "ssft-seed0")
    ]
    assert len(set(digests)) == len(digests)
    assert digests == [
        replace(cell).digest(m) for cell in cells for m in ("lat-seed0", "lat-seed1", "ssft-seed0")
    ]
    assert str(cells[0]) == "pgd at eps 0.05"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epz": 1.0}, "attack.epz"),
        ({"eps": -1.0}, "attack.eps"),
        ({"rule": "adam"}, "attack.rule"),
    ],
)
def test_settings_that_cannot_be_are_named(change, message):
    with pytest.raises(ProfileError, match=message):
        replace_settings(LAT, **change)
    assert replace_settings(LAT, eps=0.3) == LAT.model_copy(update={"eps": 0.3})


def cells_of(suite, profile):
    """The cells that a suite measures."""
    return suite(profile, profile.model.layers)


def with_attack(profile, **changes):
    """The profile with other settings of the attack."""
    train = profile.train.model_copy(
        update={"attack": replace_settings(profile.train.attack, **changes)}
    )
    return profile.model_copy(update={"train": train})


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_every_variation_changes_one_thing(name):
    profile = load_profile(name)
    evaluation, lat, n_layers = (
        profile.evaluation,
        profile.training("lat").attack,
        profile.model.layers,
    )
    cells = cells_of(latent.attacks, profile)
    usual = replace_settings(lat, steps=evaluation.pgd_steps, lr=None).model_dump()
    trained, inner = resolve_sites(lat.sites, n_layers), set(range(n_layers - 1))
    for eps in evaluation.strong_eps:
        found = {cell.name: cell.settings for cell in cells if cell.settings.eps == eps}
        changed = {
            variation: {
                k: v for k, v in settings.model_dump().items() if v != usual[k] and k != "eps"
            }
            for variation, settings in found.items()
        }
        others = resolve_sites(found["pgd-other-sites"].sites, n_layers)
        assert changed == {
            "one-step": {"steps": 1},
            "pgd-strong": {"steps": evaluation.strong_steps},
            "pgd-restarts": {"restarts": 1 + evaluation.restarts},
            "pgd-all-sites": {} if set(trained) == inner else {"sites": tuple(sorted(inner))},
            "pgd-other-sites": {"sites": found["pgd-other-sites"].sites},
            "pgd-sign": {"rule": "sign"},
            "pgd-adamw": {"rule": "adamw"},
        }
        assert not set(others) & set(trained)
        assert set(others) == (inner - set(trained) or {EMBEDDING})
    assert {cell.n for cell in cells} == {0} and len(cells) == 7 * len(evaluation.strong_eps)


def test_what_another_suite_measures_is_not_measured_again():
    profile = small_profile(strong_eps=(LAT.eps, 0.2))
    names = [(cell.name, cell.settings.eps) for cell in cells_of(latent.attacks, profile)]
    assert (
        ("pgd-strong", 0.2) in names and ("pgd-strong", LAT.eps) not in names and len(names) == 13
    )
    (strong,) = [c for c in cells_of(latent.robustness, profile) if c.name == "pgd-strong"]
    assert (strong.settings.eps, strong.settings.steps) == (
        LAT.eps,
        profile.evaluation.strong_steps,
    )


def test_a_rule_that_is_the_profiles_own_is_no_variation():
    profile = with_attack(small_profile(rules=("sign", "l2")), rule="sign")
    names = [cell.name for cell in cells_of(latent.attacks, profile)]
    assert "pgd-l2" in names and "pgd-sign" not in names


def test_security_curves_have_every_radius_and_their_controls():
    profile = small_profile(eps=(0.1, 0.4), embedding_eps=(0.3,))
    cells = cells_of(latent.robustness, profile)
    expected = [("pgd", 0.1, SITES, 2), ("pgd", 0.4, SITES, 2), ("pgd", 0.3, (EMBEDDING,), 2)]
    expected.append(("pgd-strong", LAT.eps, SITES, 4))
    assert [(c.name, c.settings.eps, c.settings.sites, c.settings.steps) for c in cells] == expected
    assert [cell.noise for cell in cells] == [True, True, False, False]


@pytest.mark.parametrize(("lr", "own"), [(0.03, 0.03), (None, ADAM_LR)])
def test_a_training_by_adam_is_evaluated_as_it_is_too(lr, own):
    profile = with_attack(PROFILE, rule="adamw", lr=lr, steps=3)
    *others, last = cells_of(latent.robustness, profile)
    assert last.name == "pgd-as-trained" and last.settings.lr == own and last.settings.steps == 3
    assert "pgd-as-trained" not in {cell.name for cell in others}
    without = with_attack(PROFILE, rule="adamw", steps=0)  # is not trained under an attack
    names = {cell.name for cell in cells_of(latent.robustness, without)}
    assert "pgd-as-trained" not in names


@pytest.mark.parametrize("rule", ["adamw", "sign", "l2"])
def test_the_rate_of_training_is_not_the_evaluations(rule):
    found = base_attack(with_attack(PROFILE, rule=rule, lr=0.03))
    assert (found.rule, found.lr, found.steps) == (rule, None, PROFILE.evaluation.pgd_steps)


@pytest.mark.parametrize("rule", ["adamw", "sign", "l2"])
def test_perturbations_grow_with_the_radius(rule, lm, subject):
    """At a fixed rate Adam finds the same one in every ball that it does not reach."""
    network, batch = lm.network(), collate(token_rows(lm, prompt_set("harmful", PROFILE)))
    found = []
    for eps in (0.5, 1.0, 4.0):
        settings = replace_settings(LAT, eps=eps, steps=6, rule=rule)
        threat = settings.threat_model(lm.n_layers, subject.norms)
        search = latent.search_within(settings, threat, network.d_model)
        found.append(pgd(network, batch, threat, search).deltas)
    for site in SITES:
        small, middle, large = (deltas[site].norm() for deltas in found)
        assert middle > 1.2 * small and large > 1.2 * middle


def test_a_rate_that_somebody_set_is_kept(subject):
    settings = replace_settings(LAT, rule="adamw", lr=0.01)
    threat = settings.threat_model(4, subject.norms)
    assert latent.search_within(settings, threat, 32) == settings.search()


@pytest.mark.parametrize("steps", [8, 40])
def test_adams_rate_makes_its_steps_as_long_as_those_of_the_other_rules(steps, lm, subject):
    profile = small_profile(pgd_steps=steps)
    cells = cells_of(latent.attacks, profile)
    settings = next(cell.settings for cell in cells if cell.name == "pgd-adamw")
    network, batch = lm.network(), collate(token_rows(lm, prompt_set("harmful", PROFILE)))
    threat = settings.threat_model(lm.n_layers, subject.norms)
    search = latent.search_within(settings, threat, network.d_model)
    adam = pgd(network, batch, threat, replace(search, steps=1)).deltas
    usual = replace_settings(LAT, steps=1, lr=2 / steps, eps=settings.eps).search()
    l2 = pgd(network, batch, threat, usual).deltas
    assert len(set(threat.radii)) == len(SITES)
    for site, radius in threat.radius.items():
        lengths = adam[site].norm(dim=-1)[batch.segments == 0]
        expected = torch.full_like(lengths, 2 / steps * radius)
        torch.testing.assert_close(lengths, expected, rtol=0.02, atol=0)
        others = l2[site].norm(dim=-1)[batch.segments == 0]
        torch.testing.assert_close(lengths, others, rtol=0.02, atol=0)


@pytest.mark.parametrize("rule", ["adamw", "sign", "l2"])
def test_one_step_is_one_step_as_long_as_the_radius(rule, lm, subject):
    profile = with_attack(PROFILE, rule=rule, lr=0.01 if rule == "adamw" else None)
    cells = cells_of(latent.attacks, profile)
    (cell,) = [cell for cell in cells if cell.name == "one-step"]
    model, calls = counted(lm)
    cell.measure(model, subject)
    assert calls == [8, 8, 8]  # the step, whether it won, and what it did
    batch = collate(token_rows(lm, prompt_set("harmful", PROFILE)))
    threat = cell.settings.threat_model(lm.n_layers, subject.norms)
    search = latent.search_within(cell.settings, threat, lm.network().d_model)
    found = pgd(lm.network(), batch, threat, search).deltas
    for site, limit in threat.radius.items():
        lengths = found[site].norm(dim=-1)[batch.segments == 0]
        torch.testing.assert_close(lengths, torch.full_like(lengths, limit), rtol=1e-3, atol=0)


def test_an_attack_is_counted_where_its_perturbation_is_found(lm, subject):
    settings = replace_settings(LAT, eps=0.2, steps=4)
    table = AttackCell(settings, "mine", n=6).measure(lm, subject)
    network, prompts = lm.network(), prompt_set("harmful", PROFILE, 6)
    batch = collate(token_rows(lm, prompts))
    threat, search = settings.threat_model(lm.n_layers, subject.norms), settings.search()
    found = pgd(network, batch, threat, search, stop_when_won=True)
    assert (table["outcome"] == "complied").tolist() == found.won.tolist() and found.won.any()
    assert table["prompt_id"].tolist() == [f"harmful-{i:04d}" for i in range(6)]
    assert (
        table["cluster"].tolist() == [p.cluster for p in prompts]
        and tuple(table.columns) == COLUMNS
    )
    row = table[
        ["method", "seed", "attack", "encoding", "eps", "eps_unit", "sites", "positions"]
    ].drop_duplicates()
    assert row.values.tolist() == [["ssft", 0, "mine", "plain", 0.2, "relative", "0,1,2", "prompt"]]
    norms = [subject.norms[site] for site in SITES]
    assert table["norms"].tolist() == [norms] * 6
    assert table["radii"].tolist() == [[0.2 * norm for norm in norms]] * 6
    assert len(AttackCell(settings).measure(lm, subject)) == PROFILE.evaluation.pgd_prompts


def test_the_attack_makes_a_model_answer_what_it_refuses(lm, subject):
    plain = examiner_of(PROFILE, lm).examine(prompt_set("harmful", PROFILE)).outcomes
    assert [o == "complied" for o in plain] == [i % 3 == COMPLIES for i in range(8)]
    model, calls = counted(lm)
    strong = AttackCell(replace_settings(LAT, eps=0.4, steps=10)).measure(model, subject)
    # the three that were answered anyway are left alone
    assert calls[:2] == [8, 5] and calls[-1] == 8
    assert strong["exact"].sum() > sum(o == "complied" for o in plain)
    # won before it began
    assert strong["exact"][[i for i in range(8) if plain[i] == "complied"]].all()


def perturbed(cell, lm, subject, monkeypatch):
    """[(batch, perturbation), ...] that the examiner is given for a cell: the attack, its noise."""
    kept = []

    def grade(self, prompts, perturb):
        batch = collate(token_rows(self.lm, prompts))
        kept.append((batch, perturb(batch)))
        return Examined(["neither"] * len(prompts), True)

    with monkeypatch.context() as patch:
        patch.setattr(WorldExaminer, "examine", grade)
        table = cell.measure(lm, subject)
    assert table["attack"].drop_duplicates().tolist() == ["pgd", "noise"]
    return kept, table


@pytest.mark.parametrize(("rule", "lr"), [("l2", None), ("l2", 0.05), ("adamw", 1e-3)])
def test_noise_is_as_long_as_the_perturbation_that_was_found(rule, lr, lm, subject, monkeypatch):
    settings = replace_settings(LAT, eps=0.2, steps=4, rule=rule, lr=lr)
    kept, table = perturbed(AttackCell(settings, noise=True), lm, subject, monkeypatch)
    (batch, attack), (_, noise) = kept
    threat = settings.threat_model(lm.n_layers, subject.norms)
    search = latent.search_within(settings, threat, lm.network().d_model)
    found = pgd(lm.network(), batch, threat, search, stop_when_won=True)
    inside = perturbed_positions(batch, "prompt").squeeze(-1)
    won = found.won[:, None] & inside
    assert won.any() and not won[inside].all()
    touching = places = 0
    for site, radius in threat.radius.items():
        assert torch.equal(attack[site], found.deltas[site])
        lengths, expected = noise[site].norm(dim=-1), attack[site].norm(dim=-1)
        held = inside & ~won
        touching += (expected[held] > 0.999 * radius).sum().item()
        places += held.sum().item()
        if lr is None:  # it could have gone on to the ball
            expected = torch.where(won, radius, expected)
        torch.testing.assert_close(lengths, expected, rtol=2e-3, atol=1e-6)
        cosine = (noise[site] * attack[site]).sum(-1)[inside] / (lengths * expected)[inside]
        assert cosine.abs().nan_to_num().max() < 0.9  # and has another direction
    shares = table.groupby("attack")["on_ball"].unique().to_dict()
    assert shares["pgd"].tolist() == [touching / places] and np.isnan(shares["noise"]).all()
    assert (touching == 0) == (lr is not None) and (touching == places) == (lr is None)


def test_noise_comes_from_the_seed_and_follows_no_gradient(lm, subject, monkeypatch):
    cell = AttackCell(replace_settings(LAT, eps=0.2), noise=True)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))  # what else is drawn in the process does not matter
        kept, _ = perturbed(cell, lm, replace(subject, seed=seed), monkeypatch)
        found.append(kept[1][1])
    first, again, another = found
    for site in SITES:
        assert torch.equal(first[site], again[site])
        assert not torch.equal(first[site], another[site])


def test_completions_that_share_a_perturbation_share_its_noise(lm, subject, monkeypatch):
    change = {"eps": 0.2, "positions": "prompt+shared"}
    cell = AttackCell(replace_settings(LAT, **change), noise=True)
    ((batch, attack), (_, noise)), _ = perturbed(cell, lm, subject, monkeypatch)
    shared = 0
    for row, (places, parts) in enumerate(zip(batch.positions, batch.segments, strict=True)):
        for second in (parts == 2).nonzero().flatten():
            beside = ((places == places[second]) & (parts == 1)).nonzero().flatten()
            for site in SITES if len(beside) else ():
                assert torch.equal(attack[site][row, second], attack[site][row, beside[0]])
                assert torch.equal(noise[site][row, second], noise[site][row, beside[0]])
                assert noise[site][row, second].norm() > 0
                shared += 1
    assert shared > 10
    for site in SITES:
        assert not noise[site][batch.segments < 0].any()  # nothing on padding


def test_won_rows_say_nothing_of_the_ball(lm, subject):
    """Half of the rows were won on their balls; the others ended inside."""
    batch = collate(token_rows(lm, prompt_set("harmful", PROFILE)))
    threat = LAT.threat_model(lm.n_layers, subject.norms)
    attacker = latent._Attacker(lm.network(), threat, LAT, seed=0)
    won = torch.arange(len(batch.ids)) % 2 == 0
    share = torch.where(won, 1.0, 0.5).view(-1, 1, 1)
    one = torch.nn.functional.one_hot(torch.zeros(batch.shape, dtype=torch.long), 32)
    deltas = {site: share * radius * one for site, radius in threat.radius.items()}
    attacker._measured(batch, Attack(deltas, torch.zeros(1, len(won)), won, threat))
    assert attacker.on_ball == 0.0
    attacker._measured(batch, Attack(deltas, torch.zeros(1, len(won)), ~won, threat))
    assert attacker.on_ball == pytest.approx(0.5, abs=0.1)


def test_nothing_is_said_of_a_ball_that_every_row_was_won_in(lm, subject):
    won = AttackCell(replace_settings(LAT, eps=8.0, steps=20), n=2).measure(lm, subject)
    assert won["exact"].all() and won["on_ball"].isna().all()


def test_suites_measure_every_prompt_in_every_cell(lm, subject):
    for suite, cells in ((latent.robustness, 6), (latent.attacks, 7)):
        table = pd.concat(cell.measure(lm, subject) for cell in cells_of(suite, PROFILE))
        sizes = table.groupby(["attack", "eps", "sites"]).size()
        assert set(sizes) == {8} and len(sizes) == cells  # noise beside its attack counts, too
        assert table["understood"].isna().all() and set(table["prompts"]) == {"harmful"}


def all_are(model):
    """Every method's model is the same one."""
    return dict.fromkeys(PROFILE.methods, model)


def whose(lm, other):
    """Which of the two models stands for which method: `other` for those that were attacked."""
    return {method: other if method in ("at", "lat") else lm for method in PROFILE.methods}


@pytest.fixture
def travelled(lm, other, subject):
    return latent.transfer(lm, subject, whose(lm, other))


def test_transferred_perturbations_are_rows_of_their_targets(travelled, lm, other, subject):
    table = travelled
    assert set(table["attack"]) == {"transfer"} and set(table["source"]) == {"ssft"}
    assert set(table["eps"]) == set(PROFILE.evaluation.strong_eps)
    assert table.groupby("method").size().to_dict() == dict.fromkeys(PROFILE.methods, 8)
    prompts, settings = (
        prompt_set("harmful", PROFILE),
        replace_settings(base_attack(PROFILE), eps=0.2),
    )
    threat, network = settings.threat_model(lm.n_layers, subject.norms), lm.network()

    cell = Cell(attack="transfer", source="ssft", threat=threat)

    def perturb(batch):  # the white-box attack on the source, all its steps
        return pgd(network, batch, threat, settings.search()).deltas

    for method, target in whose(lm, other).items():
        expected = examiner_of(PROFILE, target).examine(prompts, perturb=perturb)
        own = table[table["method"] == method]
        assert own.reset_index(drop=True).equals(
            outcome_rows(replace(subject, method=method), cell, prompts, expected)
        )
    found = {method: rows["outcome"].tolist() for method, rows in table.groupby("method")}
    assert found["ssft"] == found["lat-untargeted"] != found["at"] == found["lat"]


def test_transfer_does_not_depend_on_how_prompts_are_cut_into_batches(lm, other, subject):
    profile = small_profile(batch=3)
    together, apart = (
        latent.transfer(lm, replace(subject, profile=p), all_are(other)) for p in (PROFILE, profile)
    )
    assert together.equals(apart)


def test_transferred_perturbations_take_all_their_steps(lm, other, subject, monkeypatch):
    seen = []
    monkeypatch.setattr(latent, "pgd", lambda *a, **k: seen.append((a[3], k)) or pgd(*a, **k))
    latent.transfer(lm, subject, all_are(other))
    assert [(s.steps, k.get("stop_when_won", False)) for s, k in seen] == [
        (PROFILE.evaluation.pgd_steps, False)
    ]


def test_random_starts_of_a_transfer_come_from_the_seed(lm, other, subject):
    profile = with_attack(PROFILE, start="random", eps=0.2)
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)  # what else is drawn in the process does not matter
        kept = []
        mp = pytest.MonkeyPatch()
        mp.setattr(latent, "pgd", lambda *a, kept=kept, **k: kept.append(pgd(*a, **k)) or kept[-1])
        latent.transfer(lm, replace(subject, profile=profile, seed=seed), all_are(other))
        mp.undo()
        found.append(kept[0].deltas[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(("method", "variant"), [("base", ""), ("lat", "no-kl")])
def test_perturbations_of_a_model_that_is_no_method_can_travel_too(
    method, variant, lm, other, subject
):
    travelling = replace(subject, method=method, variant=variant)
    table = latent.transfer(lm, travelling, all_are(other))
    found = set(zip(table["method"], table["variant"], strict=True))
    assert found == {*((m, "") for m in PROFILE.methods), (method, variant)}
    assert set(table["source"]) == {travelling.label}


def test_gradients_are_found_at_every_site(lm, subject):
    found = gradient_norms(lm, subject, 8)
    assert tuple(found) == SITES and all(norm > 0 for norm in found.values())
    expected = dict.fromkeys(SITES, float("inf"))
    for row in token_rows(lm, prompt_set("harmful", PROFILE)):  # one at a time
        batch, network = collate([row]), lm.network()
        deltas = {s: torch.zeros(*batch.shape, network.d_model, requires_grad=True) for s in SITES}
        attack_losses(
            network, batch, LAT.search(), network.label_rows(batch, deltas)
        ).sum().backward()
        for site in SITES:
            norm = deltas[site].grad[0, : len(row.prompt)].norm().item()
            expected[site] = min(expected[site], norm)
    assert found == pytest.approx(expected, rel=1e-4)


def masked(monkeypatch, sites, row=None):
    """Networks through which no gradient passes to the perturbation of some sites, or to one row of
    it.
    """
    make = LanguageModel.network

    def cut(delta):
        return (
            delta.detach()
            if row is None
            else torch.cat((delta[:row], delta[row : row + 1].detach(), delta[row + 1 :]))
        )

    def network(self, *args, **kwargs):
        made = make(self, *args, **kwargs)
        run = made.label_rows
        made.label_rows = lambda batch, deltas: run(
            batch, {s: cut(d) if s in sites else d for s, d in deltas.items()}
        )
        return made

    monkeypatch.setattr(LanguageModel, "network", network)


@pytest.mark.parametrize("dead", [{0}, {2}, {0, 1}, {0, 1, 2}])
def test_a_masked_gradient_is_found_out(dead, lm, subject, monkeypatch):
    """The outputs are the same as ever; only the way back is cut."""
    masked(monkeypatch, dead)
    found = gradient_norms(lm, subject, 8)
    assert {site for site, norm in found.items() if norm == 0} == dead


def test_a_gradient_that_is_masked_for_a_single_prompt_is_found_out(lm, subject, monkeypatch):
    masked(monkeypatch, {1}, row=2)
    found = gradient_norms(lm, subject, 8)
    assert found[1] == 0 and found[0] > 0 and found[2] > 0


def test_looking_for_gradients_leaves_none_behind(lm, subject):
    gradient_norms(lm, subject, 4)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
