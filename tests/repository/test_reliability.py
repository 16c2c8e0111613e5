"""docs/reliability.md is what the results say, these are of every case that there is, and all of
them held; a few are run anew.
"""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import cases
import kills
import reliability
from cases import CASES, Case, Command, Place

RESULTS = reliability.read()
SUBSET = (
    "killed in a checkpoint",
    "disk full in a table",
    "adapter flipped",
    "fresh on a project",
    "method named ../../../pwn",
)


def test_the_page_is_what_the_results_make():
    assert RESULTS["fuzzed"] == reliability.fuzzed()
    assert reliability.PAGE.read_text("utf-8") == reliability.page(RESULTS), (
        "run: python benchmarks/reliability.py --page"
    )


def test_every_case_was_run_and_held():
    assert [case["name"] for case in RESULTS["cases"]] == list(CASES)
    assert [case["name"] for case in RESULTS["cases"] if not case["held"]] == []
    for found in RESULTS["cases"]:
        case = CASES[found["name"]]
        assert (found["kind"], found["injected"]) == (case.kind, case.injected)
        assert found["seen"]


def test_there_are_as_many_as_promised():
    kinds = [case.kind for case in CASES.values()]
    assert kinds.count(kills.WHOLE) >= 20
    assert len(kinds) - kinds.count(kills.WHOLE) - kinds.count(kills.ONE) >= 40
    fuzzed = reliability.fuzzed()
    assert fuzzed["profiles"] >= 2000 and fuzzed["data files"] >= 100


def failing(place):
    raise AssertionError(f"in {place.folder}/run something is wrong")


def test_a_case_that_does_not_hold_is_said_to_be_that(tmp_path):
    found = reliability.perform(Case("a", "kind", "fault", failing), tmp_path)
    assert not found["held"] and found["seen"] == "AssertionError: in run something is wrong"


def test_an_orphan_is_seen_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "ORPHANS_S", 1.0)
    sleeps = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeps!r}])"
    place = Place(tmp_path, tmp_path)
    command = Command([sys.executable, "-c", code], tmp_path, place.environment()).start()
    assert command.wait().status == 0
    with pytest.raises(AssertionError, match="left after"):
        command.nobody_is_left()
    command.nobody_is_left()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("reliability")


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBSET)
def test_a_case_holds_here(work, name):
    found = reliability.perform(CASES[name], work)
    assert found["held"], found["seen"]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["metrics/lat-seed0.jsonl", "models/lat-seed0/latlib.json", "a"])
def test_another_bit_in_a_result_is_seen(work, tmp_path, file):
    reference = cases.reference(work / "shared")
    copy = tmp_path / "run"
    shutil.copytree(reference, copy)
    cases.same_results(reference, copy)
    path = copy / file if "/" in file else next(copy.glob("results/outcomes/*.parquet"))
    content = bytearray(path.read_bytes())
    place = content.find(b"0.") + 2  # a digit of a number, or a byte of a table
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(AssertionError, match="not the same"):
        cases.same_results(reference, copy)
