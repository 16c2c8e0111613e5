"""A run folder belongs to the settings it was made with, and to one command at a time."""

import datetime

import pytest

from latlib.config.profile import Profile, load_profile, validated
from latlib.config.sections import ProfileError
from latlib.experiment import layout
from latlib.experiment.layout import Layout
from latlib.experiment.run import Run


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


def test_a_folder_is_held_by_one_command_at_a_time(tmp_path):
    first, second = (Layout(load_profile("smoke"), tmp_path / "run") for _ in range(2))
    with first.locked(), pytest.raises(ProfileError, match="another run is using"):
        second.locked().__enter__()
    with second.locked():
        pass


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
