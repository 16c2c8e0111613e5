"""A run's folder: what is there is loaded, what is missing is made, and shared work changes
nothing.
"""

import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small_profile import small_run, write_sources

from latlib import train
from latlib.config.profile import Profile, load_profile
from latlib.config.sections import ProfileError
from latlib.experiment import build
from latlib.experiment.layout import DIRECTIONS
from latlib.experiment.run import Run, _kept
from latlib.io.files import write_table
from latlib.io.progress import Stopped
from latlib.redteam import audit
from latlib.redteam.gcg import Suffix
from latlib.redteam.latent import AttackCell, claimed, replace_settings
from latlib.refusal import directions


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


def adapter(run, method, seed=0):
    return load_file(run.layout.model_folder(run.spec(method, seed)) / "adapter_model.safetensors")


def test_plain_steps_are_done_once_and_change_no_bit(run, tmp_path):
    alone = Run("smoke", tmp_path / "alone")
    base = alone.folder / "models" / "base-seed0"
    base.symlink_to(run.layout.model_folder(run.spec("base", 0)))
    (alone.folder / "results" / "residual_norms-seed0.json").write_bytes(
        (run.folder / "results" / "residual_norms-seed0.json").read_bytes()
    )
    assert list((run.folder / "models").glob(".plain-2-*.pt")), "SSFT left nothing to share"
    alone.ensure([("lat", 0)])
    shared, whole = adapter(run, "lat"), adapter(alone, "lat")
    assert (
        all(torch.equal(shared[name], whole[name]) for name in whole)
        and shared.keys() == whole.keys()
    )
    columns = ["step", "total", "toward", "kl", "attack_end"]
    assert run.metrics("lat")[columns].equals(alone.metrics("lat")[columns])


def test_what_is_made_is_not_made_again(run):
    folder = run.layout.model_folder(run.spec("lat", 0))
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    Run("smoke", run.folder).model("lat", 0)
    assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_an_adapter_is_a_standard_one_with_a_card(run):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = run.layout.model_folder(run.spec("lat", 0))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder.parent / "base-seed0"), folder
    )
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())
    card = (folder / "README.md").read_text()
    assert "{" not in card and "# lat, seed 0" in card and str(run.folder) not in card
    assert str(run.folder) not in (folder / "adapter_config.json").read_text()


def test_other_settings_in_the_same_folder_are_named(run):
    profile = load_profile("smoke")
    other = profile.model_copy(update={"train": profile.train.model_copy(update={"lr": 0.5})})
    with pytest.raises(ProfileError, match=r"train.lr: 0.002 -> 0.5(?s:.)*--fresh"):
        Run(other, run.folder)


def test_a_grid_may_grow_in_the_same_folder(run):
    sweep = run.profile.sweep.model_copy(update={"grid": {"attack.eps": (0.1, 0.3)}})
    assert Run(run.profile.model_copy(update={"sweep": sweep}), run.folder).folder == run.folder
    other = run.profile.sweep.model_copy(update={"variants": {"eps-0.2": {"attack.eps": 0.2}}})
    with pytest.raises(ProfileError, match="sweep.variants"):
        Run(run.profile.model_copy(update={"sweep": other}), run.folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latt", 0), "method = 'latt'"),
        (("lat", -1), "seed = -1"),
        (("lat", 0, "no-such"), "variant = 'no-such'"),
        (("lat", 0, {"attack.epz": 1.0}), "did you mean 'attack.eps'"),
        (("lat", 0, {"attack.eps": "8e-5"}), "is text, not a number"),
        (("base", 0, {"attack.eps": 1.0}), "the base model has none"),
    ],
)
def test_a_wrong_model_is_named(run, arguments, message):
    with pytest.raises(ProfileError, match=message):
        run.spec(*arguments)


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ProfileError, match="cannot be written.*--out"):
        Run("smoke", tmp_path / "file" / "run")


def test_outcomes_are_measured_once_and_are_three_classes(run):
    table = run.evaluate("ssft", 0, "audit")
    assert set(table["outcome"]) <= {"refused", "complied", "neither"}
    assert run.evaluate("ssft", 0, "audit").equals(table)
    assert set(run.outcomes()["method"]) == {"ssft"}
    assert (
        table.loc[table["prompts"] == "harmful", "prompt_id"].nunique()
        == run.profile.evaluation.prompts
    )


def attack_cells(run):
    lat = run.profile.training("lat").attack
    return [
        AttackCell(replace_settings(lat, eps=eps), name, n=4)
        for eps in (0.05, 0.2)
        for name in ("pgd", "noise")
    ]


def test_attacks_side_by_side_equal_attacks_alone(run, tmp_path):
    """Measured in one pool or one after the other, in this process: the same rows, each told from
    every other.
    """
    cells = attack_cells(run)
    run.measure([(("ssft", 0), cell) for cell in cells])
    files = {run.layout.table_file(run.spec("ssft", 0), cell) for cell in cells}
    assert len(files) == len(cells) and all(file.exists() for file in files)
    alone = Run("smoke", tmp_path / "alone")
    for name in ("models/base-seed0", "models/ssft-seed0", "results/residual_norms-seed0.json"):
        (alone.folder / name).symlink_to(run.folder / name)
    for cell in cells:
        found = run.attack("ssft", 0, cell)
        assert found.equals(alone.attack("ssft", 0, cell))
        assert (
            set(found["eps"]) == {cell.settings.eps}
            and set(found["attack"]) == {cell.name}
            and len(found) == 4
        )


@pytest.fixture
def half_measured(run, tmp_path, monkeypatch):
    """A run that was asked to stop after the third attack of a suite, its table when nobody had, and
    a list of the attacks that are measured from now on."""
    again = Run("smoke", tmp_path / "again")
    for name in ("models/base-seed0", "models/ssft-seed0", "results/residual_norms-seed0.json"):
        (again.folder / name).symlink_to(run.folder / name)
    measured, measure = [], AttackCell.measure

    def counted(cell, *arguments):
        measured.append(cell)
        if len(measured) == 3:
            (again.folder / "STOP").touch()
        return measure(cell, *arguments)

    lm, subject = run.model("ssft"), run.subject(run.spec("ssft", 0))
    whole = pd.concat([cell.measure(lm, subject) for cell in claimed(run.profile, lm.n_layers)])
    monkeypatch.setattr(AttackCell, "measure", counted)
    with pytest.raises(Stopped, match="asked to stop after pgd.* at eps .*; what was measured is"):
        again.evaluate("ssft", 0, "claimed")
    (again.folder / "STOP").unlink()
    assert len(measured) == 3
    measured[:] = [None] * 3
    return again, whole.reset_index(drop=True), measured


def test_a_suite_that_is_stopped_goes_on_behind_the_attacks_it_has(half_measured):
    again, whole, measured = half_measured
    pd.testing.assert_frame_equal(again.evaluate("ssft", 0, "claimed"), whole)
    assert len(measured) == len(claimed(again.profile, again.profile.model.layers))
    assert not list(again.folder.glob("results/.unfinished/*"))


@pytest.mark.parametrize("what", ["an attack", "the model"])
def test_what_belongs_to_something_else_is_measured_again(what, half_measured):
    again, whole, measured = half_measured
    folder = again.layout.unfinished(again.spec("ssft", 0), "claimed")
    if what == "an attack":
        file = sorted(folder.glob("*.parquet"))[0]
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    else:  # as if these were of another one
        folder.rename(folder.with_name("another"))
    pd.testing.assert_frame_equal(again.evaluate("ssft", 0, "claimed"), whole)
    kept = 2 if what == "an attack" else 0
    assert len(measured) - 3 == len(claimed(again.profile, again.profile.model.layers)) - kept
    assert not list(again.folder.glob("results/.unfinished/*"))


def test_what_is_unfinished_is_of_the_models_own_weights(run, tmp_path):
    other, spec = Run("smoke", tmp_path / "other"), run.spec("ssft", 0)
    made = other.layout.model_folder(spec)
    shutil.copytree(run.layout.model_folder(spec), made)
    before = other.layout.unfinished(spec, "claimed")
    assert other.layout.unfinished(spec, "claimed") == before
    with (made / "adapter_model.safetensors").open("ab") as file:
        file.write(b" ")
    assert other.layout.unfinished(spec, "claimed") != before


def test_a_geometry_that_is_stopped_goes_on_behind_what_it_has(run, monkeypatch):
    def asked(*_):
        raise Stopped("asked to stop")

    monkeypatch.setattr(directions, "find_directions", asked)
    with pytest.raises(Stopped):
        run.directions("lat")
    monkeypatch.undo()
    found = directions.paired_differences
    monkeypatch.setattr(directions, "paired_differences", lambda *_: pytest.fail("found again"))
    assert run.directions("lat") and len(run.differences("lat").pairs)
    monkeypatch.setattr(directions, "paired_differences", found)
    # directions stand on the differences: where these are found again, so are they
    run.layout.geometry_file(run.spec("lat", 0), "differences.safetensors").unlink()
    monkeypatch.setattr(directions, "find_directions", asked)
    with pytest.raises(Stopped):
        run.directions("lat")


def test_explained_variance_needs_no_search_for_directions(run, monkeypatch):
    monkeypatch.setattr(directions, "find_directions", lambda *_: pytest.fail("searched"))
    assert run.variance("ssft")["uncentred"]
    assert not run.layout.has_geometry(run.spec("ssft", 0), [DIRECTIONS])
    assert len(run.differences("ssft").pairs)


def test_suites_and_attacks_share_one_call(run):
    cell = attack_cells(run)[0]
    run.measure([(("ssft", 0), "audit"), (("lat", 0, "no-kl"), "variant"), (("lat", 0), cell)])
    for spec, what in (
        (run.spec("ssft", 0), "audit"),
        (run.spec("lat", 0, "no-kl"), "variant"),
        (run.spec("lat", 0), cell),
    ):
        assert run.layout.table_file(spec, what).exists()


def shared_base(tmp_path, monkeypatch, workers):
    """A run of two seeds on a model that is not made there."""
    monkeypatch.chdir(tmp_path)
    write_sources(tmp_path)
    asked = {"encodings": ["plain"], "further_encodings": ["reverse"], "max_new_tokens": 4}
    small = small_run() | {"seeds": [3, 5], "evaluation": asked, "workers": workers}
    small["methods"] = {"ssft": {"attack.steps": 0}, "lat": {}}
    return Run(Profile.model_validate(small), tmp_path / "run")


def test_a_base_that_all_seeds_share_is_asked_once(tmp_path, monkeypatch):
    run = shared_base(tmp_path, monkeypatch, 1)
    opened, model = [], run._model
    monkeypatch.setattr(run, "_model", lambda spec: opened.append(spec.name) or model(spec))
    run.measure([(("base", seed), "audit") for seed in (5, 3)])
    assert opened == ["base seed 3"]
    first, other = (run.evaluate("base", seed, "audit") for seed in (3, 5))
    assert set(first["encoding"]) == {"plain", "reverse"} and set(first["seed"]) == {3}
    spec = run.spec("base", 5)
    alone = audit.audit(model(spec), run.subject(spec))
    pd.testing.assert_frame_equal(other, alone)


def test_side_by_side_a_shared_bases_first_audit_is_waited_for(tmp_path, monkeypatch):
    run = shared_base(tmp_path, monkeypatch, 2)
    table = run.evaluate("base", 5, "audit")
    assert set(table["seed"]) == {5} and set(table["encoding"]) == {"plain"}
    assert set(run.outcomes()["seed"]) == {3, 5}


def test_an_unknown_suite_is_named_before_anything_is_made(run):
    with pytest.raises(ValueError, match="suite = 'audti' is unknown: choose one of audit"):
        run.measure([(("at", 1), "audit"), (("at", 1), "audti")])
    assert not run.layout.has(run.spec("at", 1))


def test_a_table_that_is_there_needs_no_model(run, monkeypatch):
    """Tables come home from a sweep without their models: nothing is trained to read them."""
    table = run.evaluate("lat", 0, "audit")
    file = run.layout.table_file(run.spec("lat", 0, {"attack.eps": 0.3}), "audit")
    table.to_parquet(file)
    monkeypatch.setattr(Run, "_work", lambda self, jobs: jobs and pytest.fail(f"made {jobs}"))
    try:
        assert run.evaluate("lat", 0, "audit", {"attack.eps": 0.3}).equals(table)
    finally:
        file.unlink()


def test_of_a_suffix_on_a_real_model_no_more_is_kept_than_of_a_reply():
    found = {"suffix-gcg": Suffix("some junk", (5, 6), 1.5, (2.0, 1.5), 9, 4, " ")}
    of_world = _kept(found, load_profile("smoke"))["suffix-gcg"]
    assert of_world["text"] == "some junk" and of_world["token_ids"] == (5, 6)
    of_real = _kept(found, Profile(**small_run()))["suffix-gcg"]
    assert "junk" not in str(of_real) and of_real["token_ids"] == [] and of_real["loss"] == 1.5


@pytest.mark.parametrize("fails", ["once", "always"])
def test_where_memory_runs_out_fewer_rows_go_at_a_time(run, capsys, monkeypatch, fails):
    """In the attack, before any weight has moved: the step and what it logs are the same."""
    expected, trainer = (build.make_trainer(run.layout, run.spec("lat")) for _ in range(2))
    for each in (expected, trainer):
        each.step = each.settings.attack_after  # the first attacked one
    find, rows = train.pgd, trainer.micro_batch

    def tight(network, batch, *rest, **more):
        if fails == "always" or batch.shape[0] > rows // 2:
            raise torch.OutOfMemoryError("out of memory")
        return find(network, batch, *rest, **more)

    one = expected.train_step()
    monkeypatch.setattr(train, "pgd", tight)
    step = build._within_memory(trainer, "lat-seed0")
    if fails == "always":
        with pytest.raises(torch.OutOfMemoryError):
            step()
        assert trainer.micro_batch == 1
        return
    two = step()
    assert trainer.micro_batch == rows // 2 and two == pytest.approx(one, rel=1e-3)
    assert f"step {trainer.step} with train.micro_batch = {rows // 2}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "suite", ["audit", "variant", "attacks", "transfer", "ablation", "jailbreaks"]
)
def test_any_suite_that_is_killed_goes_on_behind_the_pieces_it_has(
    suite, run, tmp_path, monkeypatch
):
    whole = run.evaluate("ssft", 0, suite)
    shutil.copytree(run.folder, tmp_path / "again")
    again, pieces = Run("smoke", tmp_path / "again"), []
    again.layout.table_file(again.spec("ssft", 0), suite).unlink()

    def written(table, file):
        pieces.append(file)
        if len(pieces) == 2:
            raise MemoryError  # before the second is there
        write_table(table, file)

    monkeypatch.setattr("latlib.experiment.run.write_table", written)
    with pytest.raises(MemoryError):
        again.evaluate("ssft", 0, suite)
    assert pieces[0].exists() and not pieces[1].exists()
    pd.testing.assert_frame_equal(again.evaluate("ssft", 0, suite), whole)
    assert pieces[1] == pieces[2] and len(set(pieces)) == len(pieces) - 1, "one twice, no other"
