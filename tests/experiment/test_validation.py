"""Validation while training: it changes nothing, says what the model does, and the best step is the
one that is saved.
"""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from latlib.batch import collate
from latlib.config.profile import Profile, load_profile, validated
from latlib.config.sections import ProfileError
from latlib.data.prompts import PromptSource, prompt_source
from latlib.evaluation.examine import WorldExaminer
from latlib.experiment import build, validation
from latlib.experiment.plain_steps import PlainSteps
from latlib.experiment.record import model_card
from latlib.experiment.run import Run
from latlib.experiment.validation import Validation, Validator

EVERY = {"evaluate_every": 2, "evaluate_prompts": 5}


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


@pytest.fixture
def trainer(run):
    return build.make_trainer(
        run.layout, run.spec("lat", 0, {"evaluate_every": 2, "evaluate_prompts": 5})
    )


def result_of(step=1, **changes) -> Validation:
    values = {
        "harmful_refused": 0.9,
        "harmless_refused": 0.1,
        "harmless_complied": 0.8,
        "neither": 0.1,
        "kl": 0.2,
    }
    return Validation(step, **{**values, "attack_success": 0.3, "attacked": True, **changes})


def adapter(run, changes):
    return load_file(
        run.layout.model_folder(run.spec("lat", 0, changes)) / "adapter_model.safetensors"
    )


def test_validating_changes_no_bit_of_the_adapter_and_nothing_of_the_log(run):
    run.ensure([("lat", 0), ("lat", 0, EVERY)])
    off, on = adapter(run, None), adapter(run, EVERY)
    assert off.keys() == on.keys() and all(torch.equal(off[name], on[name]) for name in off)
    quiet, validated_log = run.metrics("lat", 0), run.metrics("lat", 0, EVERY)
    assert (
        validated_log[quiet.columns].drop(columns="seconds").equals(quiet.drop(columns="seconds"))
    )
    assert not any(name.startswith("validation_") for name in quiet)
    with_results = validated_log[validated_log["validation_kl"].notna()]
    assert with_results["step"].tolist() == [2, 4, 6]
    # the attack begins after step 2
    assert with_results["validation_attack_success"].isna().tolist() == [True, False, False]
    assert (with_results["validation_kl"] > 0).all()


def test_a_result_leaves_everything_as_it_was(trainer, run, monkeypatch):
    observer = Validator(trainer, run.profile)
    trainer.train_step()
    plain = WorldExaminer.examine
    # as a grader might draw
    monkeypatch.setattr(
        WorldExaminer, "examine", lambda *a, **k: (torch.rand(1), plain(*a, **k))[1]
    )
    states = random.getstate(), torch.get_rng_state()
    parameters = dict(trainer.lm.model.named_parameters())
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    flags, weights = (
        {n: f(p) for n, p in parameters.items()} for f in (lambda p: p.requires_grad, torch.clone)
    )
    first = observer.validate(6)
    assert observer.validate(6) == first
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    for name, parameter in trainer.lm.model.named_parameters():
        assert parameter.requires_grad == flags[name] and torch.equal(parameter, weights[name])
        assert (
            parameter.grad is None
            if grads[name] is None
            else torch.equal(parameter.grad, grads[name])
        )


def test_without_results_nothing_is_asked(run, trainer, monkeypatch):
    monkeypatch.setattr(PromptSource, "ask", lambda *_: pytest.fail("asked"))
    trainer.settings = trainer.settings.model_copy(update={"evaluate_every": 0})
    observer = Validator(trainer, run.profile)
    assert (
        observer.after(6) == {}
        and observer.record(observer.keep()) is None
        and observer.line() == ""
    )


def test_prompts_are_tuning_prompts_of_both_kinds(run, trainer):
    observer = Validator(trainer, run.profile)
    assert [p.harmful for p in (*observer.harmful, *observer.harmless)] == [True] * 5 + [False] * 5
    tune = {
        (p.verb, p.target)
        for kind in ("harmful", "harmless")
        for p in prompt_source(run.profile).ask(0, "tune", kind, 99)
    }
    others = {
        (p.verb, p.target)
        for kind in ("harmful", "harmless")
        for split in ("train", "test")
        for p in prompt_source(run.profile).ask(0, split, kind, 99)
    }
    asked = {(p.verb, p.target) for p in (*observer.harmful, *observer.harmless)}
    assert asked <= tune and not asked & others


def test_shares_are_of_the_outcomes_and_the_attack_has_its_full_radius(run, trainer, monkeypatch):
    """Two steps into the ramp, at half the radius in training, a result attacks at the whole."""
    observer, norms = Validator(trainer, run.profile), {}

    def examine(self, prompts, perturb=None):
        if perturb:
            batch = collate(observer.answers)
            norms.update({site: d.norm(dim=-1).max().item() for site, d in perturb(batch).items()})
            return SimpleNamespace(
                outcomes=["complied", "complied", "refused", "neither", "neither"]
            )
        if prompts[0].harmful:
            return SimpleNamespace(
                outcomes=["refused", "refused", "refused", "refused", "complied"]
            )
        return SimpleNamespace(outcomes=["complied", "complied", "neither", "neither", "refused"])

    monkeypatch.setattr(WorldExaminer, "examine", examine)
    result = observer.validate(3)
    assert (result.harmful_refused, result.harmless_refused, result.harmless_complied) == (
        0.8,
        0.2,
        0.4,
    )
    assert (result.neither, result.attack_success) == (0.2, 0.4)
    assert result.score == 0.6 and result.metrics()["validation_attack_success"] == 0.4
    assert norms == pytest.approx(trainer.threat.radius, rel=1e-3)
    assert observer.validate(2).attack_success is None, "the attack has not begun"
    assert "validation_attack_success" not in observer.validate(2).metrics()


def test_kl_is_to_the_frozen_model_on_held_out_answers(run, trainer):
    observer = Validator(trainer, run.profile)
    assert observer.validate(1).kl == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in trainer.lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    losses = []
    with torch.no_grad():
        for prompt, row in zip(observer.harmless, observer.answers, strict=True):
            ids = torch.tensor([[*row.prompt, *row.completions[0]]])
            assert prompt.answer in trainer.lm.tokenizer.decode(ids[0])
            at = slice(len(row.prompt) - 1, ids.shape[1] - 1)
            new = trainer.lm.model(ids).logits[0, at].log_softmax(-1)
            with trainer.lm.model.disable_adapter():
                old = trainer.lm.model(ids).logits[0, at].log_softmax(-1)
            losses.append(F.kl_div(new, old, log_target=True, reduction="none").sum(-1))
    assert (
        observer.validate(1).kl == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
        and observer.validate(1).kl > 1e-3
    )


@pytest.mark.parametrize(
    ("results", "chosen"),
    [
        (
            [
                result_of(1, attack_success=0.3),
                result_of(2, attack_success=0.2),
                result_of(3, attack_success=0.4),
            ],
            2,
        ),
        # the smaller of the two counts
        ([result_of(1, harmless_refused=0.5), result_of(2, attack_success=0.45)], 2),
        ([result_of(1, kl=0.2), result_of(2, kl=0.1), result_of(3, kl=0.3)], 2),
        ([result_of(1), result_of(3), result_of(2)], 3),
        ([result_of(1, kl=float("nan")), result_of(2, kl=9.0)], 2),
        (
            [
                result_of(1, neither=0.6, attack_success=0.0, harmless_refused=0.0),
                result_of(2, attack_success=0.9),
            ],
            2,
        ),
        (
            [
                result_of(1, attack_success=None, harmful_refused=1.0),
                result_of(2, attack_success=0.9),
            ],
            2,
        ),
        ([result_of(1, attack_success=None)], None),
        ([], None),
        (
            [
                result_of(s, attacked=False, attack_success=None, harmful_refused=h)
                for s, h in ((1, 0.7), (2, 0.6))
            ],
            1,
        ),
    ],
)
def test_the_best_result(told, results, chosen):
    found = told(*results).best
    assert (found and found.step) == chosen


@pytest.fixture
def told(run, trainer, monkeypatch):
    """A validator whose results are given: told(result, ...) makes them in turn, each with an adapter full
    of its step.
    """
    monkeypatch.setattr(PromptSource, "ask", lambda *_: ["asked of nobody"])
    monkeypatch.setattr(Validator, "_answers", lambda self: [])
    trainer.settings = trainer.settings.model_copy(
        update={"evaluate_every": 1, "keep": "best", "steps": 9}
    )
    observer = Validator(trainer, run.profile, "lat-seed0")

    def tell(*results):
        for found in results:
            trainer.step = found.step
            for parameter in trainer.parameters:
                parameter.data.fill_(found.step)
            monkeypatch.setattr(observer, "validate", lambda step, found=found: found)
            observer.after(found.step)
        return observer

    return tell


RESULTS = (
    result_of(1, attack_success=0.5),
    result_of(2, attack_success=0.2),
    result_of(3, attack_success=0.4),
)


def test_the_adapter_of_the_best_result_is_kept_or_the_last(told, trainer):
    observer = told(*RESULTS)
    assert observer.keep() == 2
    assert all((p == 2).all() for p in trainer.parameters)
    other = Validator(trainer, observer.profile)
    told(replace(RESULTS[0], step=4))
    other.restore(observer.state())  # after a kill
    assert (
        other.best == RESULTS[1]
        and other.keep() == 2
        and all((p == 2).all() for p in trainer.parameters)
    )
    trainer.settings = trainer.settings.model_copy(update={"keep": "last"})
    last = Validator(trainer, observer.profile)
    last.restore(observer.state())
    trainer.step = 3
    assert last.keep() == 3 and last.record(3)["best"]["step"] == 2


def test_results_fall_on_every_so_many_steps_and_the_last(told, trainer):
    observer = told()
    observer.every = 4
    observer.validate = result_of
    assert [step for step in range(1, 10) if observer.after(step)] == [4, 8, 9]


def test_refusing_and_collapsing_are_said_once_while_they_last(told, capsys):
    told(result_of(1), result_of(2, harmless_refused=0.6), result_of(3, harmless_refused=0.7))
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == "validation: lat-seed0 refuses 60% of harmless prompts after step 2; the best so far is"
        " step 1"
    )
    told(result_of(4), result_of(5, harmless_refused=0.6, neither=0.6), result_of(6, neither=0.5))
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 2
        and "refuses 60%" in said[0]
        and "answers 60% of prompts neither way after step 5" in said[1]
    )


def card(found) -> str:
    """The model card of an adapter with such a record, its words with one space between them."""
    attack = {"steps": 0, "rule": "", "eps": 0.0, "eps_mode": ""}
    training = {"steps": 9, "batch": 8, "benign_batch": 8, "lr": 0.1, "attack": attack}
    names = {"method": "lat", "seed": 0, "profile": "smoke", "latlib": "1", "torch": "2"}
    made = {"lora": {"r": 4, "alpha": 8}, "eps": {}, "base": "../base-seed0", "seconds": 3.0}
    last = {"step": 9.0, "total": 1.0, "away": float("nan"), "validation_kl": 0.5}
    record = {**names, **made, "training": training, "last": last, "validation": found}
    return " ".join(model_card(record).split())


def test_the_card_says_which_step_and_why(told):
    observer = told(*RESULTS)
    text = card(observer.record(observer.keep()))
    assert "this adapter is of step 2, the best (train.keep: best)" in text
    assert "The best step was 2, with a score of 0.80" in text and "attack wins 20%" in text
    assert validation.CRITERION in text
    assert "| total | 1 |" in text and "nan" not in text and "validation_kl" not in text
    observer.settings = observer.settings.model_copy(update={"keep": "last"})
    text = card(observer.record(3))
    assert "this adapter is of step 3, the last (train.keep: last)" in text
    assert "best step was 2" in text
    assert "none that counts, so this is the last step, 7" in card(
        {"keep": "best", "kept_step": 7, "best": None}
    )
    assert "Validation" not in card(None)


def test_the_live_line_shows_the_last_result(told):
    assert (
        told(result_of(3)).line()
        == "; step 3: refused: harmful 90%, harmless 10%, attack wins 30%, KL 0.200"
    )


def test_plain_steps_are_shared_with_their_looks(run, tmp_path):
    """A method that takes over another's plain steps has the results that it would have made
    itself.
    """
    smoke = load_profile("smoke")
    changed = smoke.train.model_copy(update={"evaluate_every": 1, "evaluate_prompts": 4})
    profile = smoke.model_copy(update={"train": changed})
    logs = {}
    for name, models in (("alone", [("lat", 0)]), ("shared", [("ssft", 0), ("lat", 0)])):
        own = Run(profile, tmp_path / name)
        shutil.copytree(run.folder / "models" / "base-seed0", own.folder / "models" / "base-seed0")
        shutil.copytree(run.folder / "results", own.folder / "results", dirs_exist_ok=True)
        for model in models:
            own.ensure([model])
        logs[name] = own.metrics("lat").drop(columns="seconds")
    assert len(list((tmp_path / "shared" / "models").glob(".plain-2-*.pt"))) == 1
    assert logs["shared"].equals(logs["alone"])


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        (
            {
                "checkpoint_every": 5,
                "checkpoint_minutes": 1.0,
                "checkpoints_kept": 9,
                "keep": "best",
            },
            True,
        ),
        ({"evaluate_prompts": 3}, True),
        ({"evaluate_every": 3}, False),  # other lines in the log that comes with them
        ({"lr": 0.1}, False),
    ],
)
def test_what_changes_no_result_keeps_plain_steps_shared(run, changes, same):
    settings = run.profile.training("lat")
    files = []
    for s in (settings, settings.model_copy(update=changes)):
        files.append(PlainSteps(run.layout, s, 0).files)
    assert files[0] and (files[0] == files[1]) == same


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    """A run on prompts from files, on the same base; one row of each kind is too long."""
    folder = tmp_path_factory.mktemp("files")
    verbs, things = (
        "mix pour burn sell hide open break paint".split(),
        "cup door boat lamp tree coin".split(),
    )
    texts = [f"{verb} a {thing}" for verb in verbs for thing in things] + ["word " * 90]
    write = "goal,target\n" + "".join(
        f"explain how to {t},sure here is how to {t}\n" for t in texts
    )
    (folder / "harmful.csv").write_text(write)
    (folder / "benign.json").write_text(
        json.dumps([{"instruction": f"why would one {t}"} for t in reversed(texts)])
    )
    smoke = load_profile("smoke")
    data = {
        "source": "files",
        "harmful": str(folder / "harmful.csv"),
        "benign": str(folder / "benign.json"),
    }
    data |= {"max_tokens": 120, "too_long": "drop", "near_duplicate": 1.0}
    tree = smoke.model_dump() | {"data": data}
    tree["model"] |= {"source": str(run.folder / "models" / "base-seed0")}
    tree["train"] |= {"evaluate_every": 3, "evaluate_prompts": 4, "keep": "best", "steps": 3}
    tree["evaluation"] |= {"max_new_tokens": 3}
    return Run(validated(Profile, tree), folder / "run")


def test_results_on_real_prompts_and_long_rows_are_left_out(files):
    with pytest.warns(UserWarning, match="data.too_long = 'drop': .* 1 are left out"):
        files.ensure([("lat", 0)])
    log = files.metrics("lat")
    assert log["step"].tolist() == [1, 2, 3] and log["validation_kl"].notna().tolist() == [
        False,
        False,
        True,
    ]
    shares = log.iloc[-1][[c for c in log if c.startswith("validation_") and c != "validation_kl"]]
    assert len(shares) == 5 and shares.between(0, 1).all() and log["validation_kl"].iloc[-1] > 0
    folder = files.layout.model_folder(files.spec("lat"))
    for name in ("adapter_config.json", "latlib.json", "profile.yaml", "README.md"):
        text = (folder / name).read_text()
        assert str(files.folder.parent) not in text and "/models/" not in text, name


def test_an_overlap_stops_training_before_anything_is_loaded(files, monkeypatch):
    def found(data):
        assert data == files.profile.data
        raise ProfileError("a test prompt among the training prompts")

    monkeypatch.setattr(build, "check_overlap", found)
    monkeypatch.setattr(build, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ProfileError, match="a test prompt among"):
        files.ensure([("lat", 0, {"lr": 0.1})])
