"""A message of several lines says all of it, wherever it is shown."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from papermill.exceptions import PapermillExecutionError
from small_profile import small_run

from latlib.config.profile import load_profile
from latlib.config.sections import ModelSettings
from latlib.errors import SettingError
from latlib.experiment import sweep
from latlib.io import hub
from latlib.io.machine import can_compile
from latlib.io.messages import LONGEST, in_a_line
from latlib.models import load_model
from latlib.planning import check as planning
from latlib.runner import notebooks

SEVERAL = "made with other settings:\n  train.steps: 4 -> 5\n\n  train.lr: 1 -> 2\nstart over\n"
ONE = "made with other settings: train.steps: 4 -> 5; train.lr: 1 -> 2; start over"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(SEVERAL), ONE),
        (ValueError("one"), "one"),
        (OSError(), "OSError"),
        (RuntimeError("\n \n"), "RuntimeError"),
        (SEVERAL, ONE),
    ],
)
def test_lines_become_one(error, said):
    assert in_a_line(error) == said


def test_of_a_long_message_both_ends_are_left():
    found = in_a_line(RuntimeError("process 1 failed:\n" + "frame\n" * 900 + "ValueError: no loss"))
    assert found.startswith("process 1 failed: frame") and found.endswith("ValueError: no loss")
    assert len(found) == LONGEST + len(" ... ")


def test_a_source_is_refused_with_all_that_the_hub_says(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("404 Client Error. (Request ID: x)\n\nEntry Not Found: config.json is gone")

    monkeypatch.setattr(hub.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(SettingError, match="404 Client.*Entry Not Found: config.json is gone"):
        load_model(tmp_path, ModelSettings(source=str(tmp_path)))


def test_a_check_says_every_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise SettingError(SEVERAL)

    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small_run()))
    monkeypatch.setattr(planning, "config_of", refuse)
    lines = planning.check(load_profile(tmp_path / "mine.yaml"), tmp_path)
    assert ONE in [line.text for line in lines]


def test_a_trial_says_every_line_of_its_error():
    assert sweep._reason(SettingError(SEVERAL)) == f"SettingError: {ONE}"


def test_a_notebook_says_every_line_of_its_error(tmp_path):
    error = PapermillExecutionError(1, 1, "\na = 1\nb", "ProfileError", f"\x1b[31m{SEVERAL}", [])
    with (tmp_path / "log").open("w") as log:
        failure = notebooks._describe(error, tmp_path / "01_a.ipynb", SimpleNamespace(cell=3), log)
    assert (failure.first_line, failure.error) == ("a = 1", f"ProfileError: {ONE}")


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    def compiled(_):
        raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No C++ compiler found")

    monkeypatch.setattr(torch, "compile", compiled)
    can_compile.cache_clear()
    try:
        with pytest.warns(UserWarning, match="raised: InvalidCxxCompiler: No C.. compiler found"):
            assert not can_compile("cpu")
    finally:
        can_compile.cache_clear()


def test_no_message_is_cut_to_its_first_line(root):
    """Neither by lines nor by parts; a docstring's and a cell's first line are no messages."""
    cuts = ("splitlines()[0]", 'partition("\\n")', 'split("\\n")[0]', 'split("\\n", 1)[0]')
    found = [
        path.name
        for path in Path(root / "latlib").rglob("*.py")
        for cut in cuts
        if cut in path.read_text(encoding="utf-8")
    ]
    assert found == []
