"""A run folder belongs to the settings it was made with, and to one command at a time."""

import datetime
import errno
import fcntl
import json
import os

import pytest
import yaml
from filelock import FileLock

from latlib.config.profile import Profile, load_profile, validated
from latlib.config.sections import ProfileError
from latlib.experiment import layout
from latlib.experiment.inputs import digests
from latlib.experiment.jobs import HELD
from latlib.experiment.layout import Layout
from latlib.experiment.run import Run
from latlib.io import manifest
from latlib.io.progress import unseen


def test_a_run_folder_is_the_same_wherever_its_files_lie(tmp_path):
    tree = {
        "name": "mine",
        "description": "a test",
        "model": {"source": "owner/chat"},
        "methods": {"lat": {}},
    }
    tree["data"] = {"source": "files", "harmful": "/here/bad.csv", "benign": "owner/good"}
    Layout(validated(Profile, tree), tmp_path).claim()
    moved = tree | {"data": tree["data"] | {"harmful": "/there/bad.csv"}}
    Layout(validated(Profile, moved), tmp_path).claim()
    with pytest.raises(ProfileError, match="data.harmful: 'bad.csv' -> 'worse.csv'"):
        other = tree | {"data": tree["data"] | {"harmful": "/here/worse.csv"}}
        Layout(validated(Profile, other), tmp_path).claim()


def test_a_grader_is_a_setting_of_real_prompts_alone(tmp_path):
    own = load_profile("smoke").model_dump()
    for source in ("world", "files"):
        tree = own | {"name": source}
        if source == "files":
            tree["data"] = {"source": "files", "harmful": "owner/bad", "benign": "owner/good"}
            tree["model"] = {"source": "owner/chat"}
        Layout(validated(Profile, tree), tmp_path / source).claim()
        tree["evaluation"] = own["evaluation"] | {"grader": {"name": "phrases"}}
        again = Layout(validated(Profile, tree), tmp_path / source)
        if source == "world":
            again.claim()
            continue
        with pytest.raises(ProfileError, match="evaluation.grader.name: 'rules' -> 'phrases'"):
            again.claim()


def test_what_lies_in_somebodys_home_is_named_from_there(tmp_path, monkeypatch):
    home = tmp_path / "somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "bad.csv").write_text("goal,target\na,b\n")
    tree = {"name": "mine", "description": "a test", "methods": {"lat": {}}}
    tree["model"] = {"source": "owner/chat"}
    tree["data"] = {"source": "files", "harmful": str(home / "bad.csv"), "benign": "owner/good"}
    run = Layout(validated(Profile, tree), tmp_path / "run")
    run.claim()
    texts = [f.read_text() for f in run.folder.rglob("*") if f.is_file()]
    assert sum("~/bad.csv" in text for text in texts) == 2
    assert not any("somebody" in text for text in texts)
    run.claim()
    again = load_profile(run.folder / "profile.yaml")
    Layout(again, run.folder).claim()
    assert digests(again) == digests(run.profile) and digests(again)


def test_a_folder_of_an_earlier_version_goes_on_while_newer_settings_are_at_their_defaults(
    tmp_path,
):
    run = Layout(load_profile("smoke"), tmp_path / "run")
    run.claim()
    for name in ("began.json", "profile.yaml"):
        file = run.folder / name
        settings = yaml.safe_load(file.read_text())
        (settings.get("profile") or settings)["model"].pop("post_instruction_tokens")
        file.write_text(json.dumps(settings))
        manifest.record(run.folder, file, file)
    Layout(load_profile("smoke"), run.folder).claim()
    model = run.profile.model.model_copy(update={"post_instruction_tokens": 3})
    other = run.profile.model_copy(update={"model": model})
    with pytest.raises(ProfileError, match="model.post_instruction_tokens: 1 -> 3"):
        Layout(other, run.folder).claim()


def test_looking_at_a_run_changes_nothing_in_its_folder(smoke_run):
    def files():
        return {f: f.stat().st_mtime_ns for f in smoke_run.folder.rglob("*") if f.is_file()}

    before = files()
    Run("smoke", smoke_run.folder).model("lat")
    assert files() == before


def test_a_folder_is_held_by_one_command_at_a_time(tmp_path, monkeypatch):
    first, second = (Layout(load_profile("smoke"), tmp_path / "of 16:02") for _ in range(2))
    with first.locked():
        with second.locked():  # one process, or one that it has started
            pass
        with monkeypatch.context() as patch:
            patch.delenv(HELD)  # any other
            with pytest.raises(ProfileError, match="another run is using"):
                second.locked().__enter__()
    with second.locked():
        pass


def test_a_notebook_beside_a_run_reads_and_does_not_write(smoke_run):
    """Of six tries two lost both runs and two lost one, when a notebook wrote beside run_all.sh."""
    with FileLock(smoke_run.folder / ".lock"):
        beside = Run("smoke", smoke_run.folder)
        assert len(beside.metrics("lat")) == beside.profile.train.steps
        beside.model("ssft")
        for write in (lambda: beside.save_result("a", {}), lambda: beside.ensure([("at", 1)])):
            with pytest.raises(ProfileError, match="another run is using"):
                write()
    assert beside.save_result("a", {}).is_file()
    assert not beside.layout.has(beside.spec("at", 1))


def test_what_was_made_while_it_waited_is_not_made_again(smoke_run, monkeypatch):
    """Two notebooks look at the same moment; the second holds the folder after the first."""
    spec = smoke_run.spec("lat", 0)
    file = smoke_run.layout.model_folder(spec) / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    smoke_run._make(spec, unseen)
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_said_in_a_line(tmp_path, monkeypatch, capsys, number):
    def no_lock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_lock)
    run = Run("smoke", tmp_path / "run")
    assert run.save_result("a", {}).is_file()
    (line,) = capsys.readouterr().err.splitlines()
    assert "its disk has no locks" in line and os.strerror(number) in line


@pytest.mark.parametrize("strange", ["thesis.tex", ".git"])
def test_a_folder_of_something_else_does_not_become_a_run(tmp_path, strange):
    (tmp_path / strange).touch()
    with pytest.raises(ProfileError, match=f"holds {strange}: give a new folder"):
        Run("smoke", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [strange]


def test_the_day_of_a_run_is_the_day_it_began(tmp_path, monkeypatch):
    """A chat template that writes the date must write the same one when the run is continued."""
    profile = load_profile("smoke")
    assert profile.model.date is None
    began = Run(profile, tmp_path / "run").profile.model.date
    assert began == datetime.date.today()

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date(2199, 1, 1)

    monkeypatch.setattr(layout.datetime, "date", Tomorrow)
    again = Run(profile, tmp_path / "run")
    assert again.profile.model.date == began
    assert Run(again.profile, tmp_path / "run").profile.model.date == began
    assert Run(profile, tmp_path / "other").profile.model.date == datetime.date(2199, 1, 1)
