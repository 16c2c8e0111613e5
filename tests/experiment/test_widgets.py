"""The interactive cell of notebook 04: what its widgets call, and that a batch run leaves it
out.
"""

import pytest

from latlib.batch import TokenRow, collate
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.generate import generate
from latlib.experiment import widgets
from latlib.experiment.widgets import Steering


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


def test_replies_are_those_of_generate_under_the_same_change(run, monkeypatch):
    prompt, asked = prompt_set("harmful", run.profile)[0].text, []

    def spy(lm, prompts, perturb=None, **options):
        asked.append((perturb, options["directions"] if "directions" in options else None))
        return generate(lm, prompts, perturb, max_new_tokens=3, **options)

    monkeypatch.setattr(widgets, "generate", spy)
    direction = run.directions("ssft")["best"]
    for mode in ("nothing", "ablate", "add"):
        assert isinstance(
            widgets.reply(run, "lat", 0, prompt, Steering(mode, "ssft", "best", 0.5)), str
        )
    (none, _), (_, ablated), (perturb, _) = asked
    assert none is None and (ablated == direction.vector).all()
    deltas = perturb(collate([TokenRow((1, 2), ())]))
    assert (
        list(deltas) == [direction.site]
        and (deltas[direction.site] == 0.5 * direction.vector).all()
    )


def test_what_cannot_be_done_is_said(run):
    with pytest.raises(ValueError, match="mode = 'subtract' is unknown"):
        widgets.reply(run, "ssft", 0, "hello", Steering("subtract", "ssft", "best"))
    with pytest.raises(ValueError, match="rule = 'subspace' is a subspace"):
        widgets.reply(run, "ssft", 0, "hello", Steering("add", "ssft", "subspace"))


def test_the_widgets_offer_every_model_and_rule_and_a_batch_run_has_none(run, monkeypatch):
    assert widgets.picker(run) is None
    monkeypatch.delenv("LATLIB_BATCH")
    monkeypatch.setattr(widgets, "reply", lambda *chosen: str(chosen))
    choices = {
        w.description: getattr(w, "options", None)
        for w in widgets.picker(run, seed=1).children[:-1]
    }
    assert choices["target"] == choices["vector"] == ("base", *run.profile.methods)
    assert set(choices) == {"target", "mode", "vector", "rule", "strength", "prompt", "show text"}


def test_a_real_models_reply_is_shown_when_it_is_asked_for(run, monkeypatch, capsys):
    monkeypatch.delenv("LATLIB_BATCH")
    monkeypatch.setattr(widgets, "reply", lambda *chosen: "take a rope")
    chosen = {"target": "lat", "prompt": "?", "mode": "add", "vector": "lat", "rule": "best"}
    show = widgets.picker(run).f
    show(show=True, **chosen)
    show(show=False, **chosen)
    shown, hidden = capsys.readouterr().out.splitlines()[-2:]
    assert shown == "take a rope" and hidden.startswith("[11 characters, sha256")
