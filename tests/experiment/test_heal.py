"""What is damaged in a run folder is set aside, said in a line and made again, to the same bits."""

import json
import shutil

import numpy as np
import pytest

from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import Outcome
from latlib.experiment.layout import DIFFERENCES, DIRECTIONS, VARIANCE
from latlib.experiment.run import Run
from latlib.io import manifest
from latlib.report.evidence import Evidence, MissingError


@pytest.fixture(scope="module")
def run(smoke_run):
    smoke_run.evaluate("ssft", 0, "audit")
    smoke_run.find_geometry([("ssft", 0)])
    return smoke_run


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-2] ^= 1  # behind every header
    file.write_bytes(content)


HARMS = [empty, cut, flip]


def in_model(method, name):
    return lambda run: run.layout.model_folder(run.spec(method, 0)) / name


def in_geometry(name):
    return lambda run: run.layout.geometry_file(run.spec("ssft", 0), name)


# what -> (its file, what needs it)
MADE = {
    "table": (
        lambda run: run.layout.table_file(run.spec("ssft", 0), "audit"),
        lambda run: run.evaluate("ssft", 0, "audit"),
    ),
    "norms": (lambda run: run.layout.norms_file(0), lambda run: run.norms(0)),
    "log": (
        lambda run: run.layout.metrics_file(run.spec("lat", 0)),
        lambda run: run.metrics("lat", 0),
    ),
    "differences": (in_geometry(DIFFERENCES), lambda run: run.differences("ssft", 0)),
    "directions": (in_geometry(DIRECTIONS), lambda run: run.directions("ssft", 0)),
    "variance": (in_geometry(VARIANCE), lambda run: run.variance("ssft", 0)),
    "adapter": (in_model("ssft", "adapter_model.safetensors"), lambda run: run.model("ssft", 0)),
    "config": (in_model("ssft", "adapter_config.json"), lambda run: run.model("ssft", 0)),
    "base": (in_model("base", "model.safetensors"), lambda run: run.model("ssft", 0)),
    "profile": (lambda run: run.folder / "profile.yaml", lambda run: None),
    "began": (lambda run: run.folder / "began.json", lambda run: None),
}
CASES = [(what, harm) for what in MADE for harm in HARMS]
LONG = ("adapter", "config", "base")  # a training each
CASES = [(what, harm) for what, harm in CASES if what not in LONG or harm is HARMS[len(what) % 3]]


@pytest.mark.parametrize(("what", "harm"), CASES)
def test_what_is_damaged_is_made_again(run, capsys, what, harm):
    place, needed = MADE[what]
    needed(run)  # what stands on other things may have gone with them
    file = place(run)
    before = file.read_bytes()
    harm(file)
    needed(Run("smoke", run.folder))
    assert file.read_bytes() == before
    lines = [line for line in capsys.readouterr().err.splitlines() if "made again" in line]
    assert len(lines) == 1 and "kept as set-aside/" in lines[0]


def test_an_emptied_model_folder_is_made_again(run, capsys):
    folder = run.layout.model_folder(run.spec("ssft", 0))
    before = (folder / "adapter_model.safetensors").read_bytes()
    for file in folder.iterdir():
        file.unlink()
    Run("smoke", run.folder).model("ssft", 0)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert "models/ssft-seed0 lacks " in capsys.readouterr().err


def test_a_damaged_result_is_as_good_as_none(run, capsys):
    cut(run.save_result("rates", {"asr": 0.25}))
    with pytest.raises(FileNotFoundError, match="run the notebook that makes it"):
        run.result("rates")
    run.save_result("rates", {"asr": 0.25})
    assert run.result("rates") == {"asr": 0.25}


def test_what_a_notebook_computes_is_computed_once_for_its_settings(run):
    """And again where its file is damaged; first and later reads are alike."""
    calls = []

    def compute():
        calls.append(1)
        return {"losses": np.array([0.1, np.nan]), "outcomes": [Outcome.REFUSED]}

    def found(**settings):
        return run.computed("attacked", settings, compute)

    expected = {"losses": [0.1, None], "outcomes": ["refused"]}
    assert found(eps=0.1, sites=(1, 2)) == expected and len(calls) == 1
    assert found(sites=[1, 2], eps=0.1) == expected and len(calls) == 1
    assert found(eps=0.2, sites=[1, 2]) == expected and len(calls) == 2
    cut(run.layout.computed_file("attacked", {"eps": 0.1, "sites": [1, 2]}))
    assert found(eps=0.1, sites=[1, 2]) == expected and len(calls) == 3


def test_the_report_says_which_table_is_damaged(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    flip(next((folder / "results" / "outcomes").iterdir()))
    with pytest.raises(MissingError, match=r"parquet does not match.*run_all.sh makes it again"):
        Evidence.load(folder)


def test_a_model_on_another_base_is_named(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    base = folder / "models" / "base-seed0" / "model.safetensors"
    flip(base)
    manifest.record(folder, base, base)  # made on another machine, say
    with pytest.raises(ProfileError, match="was trained on the base .* --fresh"):
        Run("smoke", folder).model("lat", 0)


def test_a_model_names_what_it_was_made_from(run):
    base = run.layout.model_folder(run.spec("base", 0)) / "model.safetensors"
    assert manifest.digest(base).startswith(run.card("ssft")["inputs"]["base"])
    record = run.layout.model_folder(run.spec("ssft", 0)) / "latlib.json"
    assert json.loads(record.read_text())["inputs"] == run.card("ssft")["inputs"]
