"""Whatever a profile, its data files and its model folder hold, `--check` ends with 0, 2 or 3 and
says why: never with a traceback. 160 cases."""

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_profile import small_run, write_sources
from strange_values import JUNK, places, with_value

from latlib.io.progress import ExitStatus
from latlib.planning import check, estimate
from latlib.planning.step_cost import Memory
from latlib.runner import pipeline

ENDS = (ExitStatus.DONE, ExitStatus.USAGE, ExitStatus.INCOMPLETE)
EACH = settings(max_examples=80, suppress_health_check=list(HealthCheck))
STRANGE_FILES = (
    b"",
    b"\x00",
    b"\xff\xfe\x00g\x00o",
    b"goal,target\n",
    b"goal,target\na\n",
    b'goal,target\n"a,b\n',
    b"goal,target\na,b,c\n",
    "goal,target\n\ufeff\u202e,\x1b[31m\n".encode(),
    b"{}",
    b"[]",
    b"null",
    b"[[]]",
    b'{"goal": 1}',
    b'{"a": ' * 3000,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 100\n",
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 7, 10**6, 0.5, -0.5, "", "x", "bfloat16", [], {}, [1], {"a": 1}]),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a small model, two files of prompts and a profile that lacks nothing."""
    home = tmp_path_factory.mktemp("whole")
    write_sources(home)
    return home


@pytest.fixture
def home(whole, tmp_path, monkeypatch):
    """A function: a fresh copy, in which the test then works; a step's size is made up."""
    monkeypatch.setattr(estimate, "cpu_rate", lambda _: 1e9)
    monkeypatch.setattr(estimate, "predicted_flop", lambda *_: 1e15)
    memory = Memory(10**9, 10**7, 10**7, 10**9)
    monkeypatch.setattr(estimate, "predicted_memory", lambda *_: memory)

    def copy():
        place = tmp_path / "home"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole, place)
        monkeypatch.chdir(place)
        return place

    return copy


def checked(home, tree) -> int:
    (home / "p.yaml").write_text(yaml.dump(tree, allow_unicode=True), encoding="utf-8")
    command = ["--profile", str(home / "p.yaml"), "--out", str(home / "run"), "--check"]
    return pipeline.main(command)


def test_what_is_fuzzed_lacks_nothing(home):
    assert checked(home(), small_run()) == 0


def test_a_real_model_on_a_cpu_is_told_its_hours_here(home, monkeypatch, capsys):
    """4 steps of 1e15 FLOP at half of 1e9 a second; with evaluations three times as long."""
    seen = []
    monkeypatch.setattr(estimate, "cpu_rate", lambda dtype: seen.append(dtype) or 1e9)
    monkeypatch.setitem(check.WHOLE, "small", 3.0)
    tree = small_run()
    tree["model"]["dtype"] = "bfloat16"
    assert checked(home(), tree) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2222.2 h on this CPU, at 0.50 of 1 GFLOP/s in bfloat16 as measured here" in said
    assert "about 6666.7 h with evaluations" in said
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_that_of_products_as_networks_make_them(dtype, monkeypatch):
    made = []
    real = estimate.project
    monkeypatch.setattr(estimate, "project", lambda a, b: made.append(a.dtype) or real(a, b))
    monkeypatch.setattr(estimate, "CPU_SIZE", 64)
    assert estimate.cpu_rate(dtype) > 0
    assert set(made) == {dtype}


@EACH
@given(data=st.data())
def test_any_profile_is_checked(home, data):
    tree = small_run()
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()):  # one that stands there
            place = data.draw(st.sampled_from([p for p in places(tree) if p]))
            tree = with_value(tree, place, data.draw(JUNK))
        else:  # one that has its default
            section, name = data.draw(st.sampled_from(DEFAULTS))
            value = data.draw(st.one_of(VALUES, JUNK))
            if isinstance(tree.get(section, {}), dict):
                tree[section] = {**tree.get(section, {}), name: value}
    status = checked(home(), tree)
    assert status in ENDS
    assume(status != ExitStatus.USAGE)  # those are `test_any_profile`'s


DEFAULTS = [
    ("data", "rows"),
    ("data", "max_tokens"),
    ("data", "system_prompt"),
    ("data", "harmful_columns"),
    ("data", "near_duplicate"),
    ("data", "test_harmful"),
    ("model", "dtype"),
    ("model", "template"),
    ("model", "revision"),
    ("train", "objective"),
    ("train", "lr"),
    ("evaluation", "grader"),
    ("evaluation", "eps"),
    ("lora", "targets"),
    ("lora", "r"),
    ("parallel", "processes"),
    ("released", "lat"),
]


@EACH
@given(data=st.data())
def test_any_files_are_checked(home, data):
    place = home()
    for _ in range(data.draw(st.integers(1, 2))):
        files = sorted(file for file in place.rglob("*") if file.is_file())
        file = data.draw(st.sampled_from(files))
        how = data.draw(st.sampled_from(["strange", "cut", "changed", "gone", "a folder", "value"]))
        content = file.read_bytes()
        if how == "strange":
            file.write_bytes(data.draw(st.sampled_from(STRANGE_FILES)))
        elif how == "cut":
            file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        elif how == "changed":
            at = data.draw(st.integers(0, len(content)))
            file.write_bytes(content[:at] + data.draw(st.binary(max_size=9)) + content[at + 3 :])
        elif how == "value" and file.name.endswith("config.json"):
            try:
                tree = json.loads(content)
            except ValueError:  # it was cut before
                tree = {}
            if isinstance(tree, dict) and tree:
                tree[data.draw(st.sampled_from(sorted(tree)))] = data.draw(VALUES)
            file.write_text(json.dumps(tree))
        else:
            file.unlink()
            if how == "a folder":
                file.mkdir()
    assert checked(place, small_run()) in ENDS
