"""The interactive cells of notebooks 02, 04 and 05: what their widgets call, and that a batch run
leaves them out.
"""

import pytest
import torch

from latlib.attack import pgd
from latlib.batch import TokenRow, collate
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.generate import generate
from latlib.experiment import widgets
from latlib.experiment.widgets import Told
from latlib.redteam.latent import base_attack, search_within


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


def test_replies_are_those_of_generate_under_the_same_change(run, monkeypatch):
    monkeypatch.delenv("LATLIB_BATCH")
    prompt, asked = prompt_set("harmful", run.profile)[0].text, []

    def spy(lm, prompts, perturb=None, **options):
        asked.append((perturb, options["directions"] if "directions" in options else None))
        return generate(lm, prompts, perturb, max_new_tokens=3, **options)

    monkeypatch.setattr(widgets, "generate", spy)
    direction = run.directions("ssft")["best"]
    chosen = {"target": "lat", "vector": "ssft", "rule": "best", "strength": 0.5, "show": True}
    tell = widgets.picker(run).f
    asked.clear()  # of what it shows at once
    for mode in ("nothing", "ablate", "add"):
        assert f"<th>{mode}</th>" in tell(prompt=prompt, mode=mode, **chosen).data
    assert asked[0] == asked[1] == asked[3] == (None, None)  # untouched, beside each of the others
    (_, ablated), (perturb, _) = asked[2::2]
    assert (ablated == direction.vector).all()
    deltas = perturb(collate([TokenRow((1, 2), ())]))
    assert (
        list(deltas) == [direction.site]
        and (deltas[direction.site] == 0.5 * direction.vector).all()
    )


def test_what_cannot_be_done_is_said(run):
    directions = run.directions("ssft")
    with pytest.raises(ValueError, match="mode = 'subtract' is unknown"):
        widgets.steered(directions, "best", "subtract")
    for rule in ("subspace", "learned-subspace"):
        with pytest.raises(ValueError, match=f"rule = '{rule}' is a subspace"):
            widgets.steered(directions, rule, "add")


def test_the_widgets_offer_every_model_and_rule_and_a_batch_run_has_none(run, monkeypatch):
    def not_searched(*_):
        raise ValueError("none is searched for here")

    assert widgets.picker(run) is None
    monkeypatch.delenv("LATLIB_BATCH")
    monkeypatch.setattr(type(run), "directions", not_searched)
    choices = {
        w.description: getattr(w, "options", None)
        for w in widgets.picker(run, seed=1).children[:-1]
    }
    assert choices["target"] == choices["vector"] == ("base", *run.profile.methods)
    assert set(choices) == {"target", "mode", "vector", "rule", "strength", "prompt", "show text"}


def test_a_steered_reply_stands_beside_the_untouched_one(run, monkeypatch):
    """With its outcome where the prompt is known, and redacted until its text is asked for."""
    monkeypatch.delenv("LATLIB_BATCH")
    prompt = prompt_set("harmful", run.profile)[0]

    def written(lm, prompts, perturb=None, **options):
        return [prompt.answer if perturb else prompt.refusal]

    monkeypatch.setattr(widgets, "generate", written)
    chosen = {"target": "lat", "mode": "add", "vector": "lat", "rule": "best", "strength": 1.0}
    tell = widgets.picker(run).f
    page = tell(prompt=prompt.text, show=True, **chosen).data
    first, second = page.split("<tr>")[2:]
    assert "<th>nothing</th><td><b>refused</b>" in first and "<mark>" not in first
    assert "<th>add</th><td><b>complied</b>" in second and "<mark>" in second
    assert tell(prompt="what?", show=True, **chosen).data.count("not graded") == 2
    hidden = tell(prompt=prompt.text, show=False, **chosen).data
    assert prompt.answer not in hidden and f"[{len(prompt.answer)} characters, sha256" in hidden


def test_what_cannot_be_done_is_said_where_the_reply_would_be(run, monkeypatch):
    monkeypatch.delenv("LATLIB_BATCH")
    chosen = {"target": "lat", "mode": "add", "vector": "lat", "strength": 1.0, "show": True}
    page = widgets.picker(run).f(prompt="what?", rule="subspace", **chosen).data
    assert "is a subspace: it can be ablated" in page


@pytest.fixture
def asked(run):
    return widgets.examiner_of(run.profile, run.model("ssft", 0))


def test_one_prompt_under_nothing_noise_and_the_attack(run, asked, monkeypatch):
    """The outcome and the reply are of the same perturbation, whose noise is as long as PGD's."""
    settings, prompt = base_attack(run.profile), prompt_set("harmful", run.profile)[0]
    threat = settings.threat_model(asked.lm.n_layers, run.norms(0))
    perturbed = []

    def spy(lm, rows, perturb=None, **options):
        perturbed.append(perturb(None))
        return [f"reply {i}" for i in range(len(rows))]

    monkeypatch.setattr(widgets, "write", spy)
    search = search_within(settings, threat, asked.network.d_model)
    found = widgets.attacked(asked, prompt, threat, search)
    replies = {how: said.reply for how, said in found.items()}
    assert replies == {"none": "reply 0", "noise": "reply 1", "PGD": "reply 2"}
    assert set(perturbed[0]) == set(threat.sites)
    batch = collate(asked.rows([prompt]))
    own = pgd(asked.network, batch, threat, search, torch.Generator().manual_seed(0)).deltas
    for site, (nothing, noise, found) in perturbed[0].items():
        assert not nothing.any() and found.any()
        assert torch.equal(found, own[site][0])
        assert torch.allclose(noise.norm(dim=-1), found.norm(dim=-1), rtol=1e-4)
        assert not torch.allclose(noise, found, rtol=0.1), site


def test_a_reply_and_its_outcome_are_of_the_same_perturbation(run, asked):
    prompt = prompt_set("harmful", run.profile)[0]
    (row,) = asked.rows([prompt])
    generator = torch.Generator().manual_seed(0)
    delta = 30 * torch.randn(2, row.length, run.profile.model.dim, generator=generator)
    delta[0] = 0
    seen = widgets.told(asked, [prompt] * 2, lambda _: {1: delta})
    assert seen[0] == widgets.told(asked, [prompt])[0]
    assert seen[1] == widgets.told(asked, [prompt], lambda _: {1: delta[1:]})[0]
    assert seen[0].reply != seen[1].reply
    assert all(said.outcome in ("refused", "complied", "neither") for said in seen)


def test_changed_words_are_marked_and_text_is_no_mark_up():
    assert widgets.changed_words("a b c", "a b c") == "a b c"
    assert (
        widgets.changed_words("a b c", "a <x> c d") == "a <mark>&lt;x&gt;</mark> c <mark>d</mark>"
    )
    replies = {"ssft": {"none": Told("refused", "no & no"), "PGD": Told("complied", "take no")}}
    page = widgets.side_by_side(replies, show=True).data
    assert "<b>refused</b></td><td style='text-align: left'>no &amp; no</td>" in page
    assert "<b>complied</b></td><td style='text-align: left'><mark>take</mark> no</td>" in page
    page = widgets.side_by_side(replies, show=False).data
    assert "take" not in page and "[7 characters, sha256" in page


@pytest.mark.parametrize(
    ("make", "moved", "models"),
    [
        (lambda run: widgets.attack_slider(run, 0.05), {"eps": 20.0}, ("ssft", "lat")),
        (
            widgets.encoding_picker,
            {"encoding": "leet", "strength": 0.5},
            ("base", "ssft", "lat"),
        ),
    ],
)
def test_moving_a_widget_changes_the_replies_and_loads_no_model_again(
    run, monkeypatch, make, moved, models
):
    assert make(run) is None, "a batch run has nobody to move it"
    monkeypatch.delenv("LATLIB_BATCH")
    loaded, drawn = [], []
    load = type(run).model
    monkeypatch.setattr(type(run), "model", lambda *of: (loaded.append(of[1:]), load(*of))[1])
    widget = make(run)
    choices = {w.description: w for w in widget.children[:-1]}
    values = {name: choice.value for name, choice in choices.items() if name != "show text"}
    for change in ({}, moved):
        drawn.append(widget.f(show=True, **values | change).data)
    assert loaded == [(model, 0) for model in models]
    assert drawn[0] != drawn[1]
    for model in models:
        assert f"<th>{model}</th>" in drawn[0]


def test_an_encoding_without_a_strength_is_taken_whole(run, monkeypatch):
    monkeypatch.delenv("LATLIB_BATCH")
    tell = widgets.encoding_picker(run).f
    prompt = prompt_set("harmful", run.profile)[0]
    page = tell(prompt=prompt, encoding="reverse", strength=0.5, show=True).data
    assert prompt.text[::-1].split()[0] in page
    page = tell(prompt=prompt, encoding="leet", strength=0.5, show=True).data
    assert "<th>leet@0.5</th>" in page
