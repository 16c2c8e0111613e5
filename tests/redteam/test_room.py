"""Prompts that do not fit the model's context as they will be asked stop a run before its hours."""

import pytest
import yaml
from small_profile import small_run, write_sources

from latlib.config.profile import load_profile
from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import Subject
from latlib.experiment.build import make_trainer
from latlib.experiment.layout import Layout
from latlib.experiment.spec import Spec
from latlib.models import load_model
from latlib.redteam.jailbreaks import jailbreaks, without_room
from latlib.redteam.room import check_room, everything_asked, lengths


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function: the profile of a small local model whose context is 256 tokens."""
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)

    def profile(**evaluation):
        (tmp_path / "small.yaml").write_text(
            yaml.safe_dump(small_run() | {"evaluation": evaluation})
        )
        return load_profile(tmp_path / "small.yaml")

    return profile


def test_a_training_ends_before_its_first_step(small, tmp_path):
    make_trainer(Layout(small(), tmp_path / "run"), Spec("lat", 0))
    spelt = small(encodings=["plain", "morse+morse"])
    with pytest.raises(ProfileError, match=r"'morse\+morse': .* context of 256"):
        make_trainer(Layout(spelt, tmp_path / "run"), Spec("lat", 0))


def test_a_long_system_prompt_stands_before_every_wording(small):
    profile = small(shots=1)
    lm = load_model("model", profile.model)
    plain = check_room(profile, lm.tokenizer, lm.context)
    data = profile.data.model_copy(update={"system_prompt": "say no " * 100})
    with pytest.raises(ProfileError, match="the train prompts of data.harmful"):
        check_room(profile.model_copy(update={"data": data}), lm.tokenizer, lm.context)
    assert check_room(profile, lm.tokenizer, lm.context) == plain


def test_everything_that_the_profile_asks_is_counted(small):
    profile = small(encodings=["plain", "leet>rot13"], further_encodings=["base64"], shots=3)
    asked = {each.setting: each for each in everything_asked(profile)}
    assert len(asked) == 4 + 3
    assert asked["evaluation.encodings, 'leet>rot13'"].wording.reply_encoding == "rot13"
    tokenizer = load_model("model", profile.model).tokenizer
    plain, coded = (asked[f"evaluation.encodings, {name!r}"] for name in ("plain", "base64"))
    assert lengths(profile, tokenizer, coded) > lengths(profile, tokenizer, plain)


def test_a_jailbreak_without_room_is_left_out(small):
    profile = small(shots=20, suffix={"steps": 1, "tokens": 240, "prompts": 2})
    lm = load_model("model", profile.model)
    assert set(without_room(profile, lm.tokenizer, lm.context)) == {
        "many-shot",
        "suffix-gcg",
        "suffix-random",
    }
    subject = Subject(profile, "base", 0, {})
    with pytest.warns(UserWarning, match="'many-shot' is left out: a prompt has "):
        rows, suffixes = jailbreaks(lm, subject)
    assert set(rows["attack"]) == {"system"} and suffixes == {}
