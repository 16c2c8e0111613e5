"""Results on disk: what JSON cannot say becomes null, and a write that dies leaves what was there
before.
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from latlib.experiment.run import Run
from latlib.io.files import folder_aside, json_ready, write_json, write_table

OLD, NEW = (
    pd.DataFrame({"outcome": ["refused"]}),
    pd.DataFrame({"outcome": ["complied", "neither"], "eps": [0.1, 0.2]}),
)
WRITERS = {
    "result.json": (write_json, {"a": 1}, {"a": 2}, lambda f: json.loads(f.read_text())),
    "result.parquet": (write_table, OLD, NEW, pd.read_parquet),
}
plain = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=4)
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
)


def same(found, expected):
    return found.equals(expected) if isinstance(expected, pd.DataFrame) else found == expected


@given(values)
def test_every_number_survives_and_those_that_json_lacks_become_null(value):
    def expected(v):
        if isinstance(v, dict):
            return {k: expected(x) for k, x in v.items()}
        if isinstance(v, list):
            return [expected(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    assert json.loads(json.dumps(json_ready(value), allow_nan=False)) == expected(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64("nan"), None),
        (np.float32("-inf"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1.0, np.inf], [np.nan, 2.0]]), [[1.0, None], [None, 2.0]]),
        (np.array(7), 7),
        (torch.tensor([1.5, float("nan")]), [1.5, None]),
        (pd.Series([1, 2]), [1, 2]),
        ((1, (2.0, math.inf)), [1, [2.0, None]]),
        ({0: {"embedding": np.float64(1)}, 1.5: ()}, {"0": {"embedding": 1.0}, "1.5": []}),
        (True, True),
        (None, None),
    ],
)
def test_what_measurements_are_made_of_is_written(value, expected, tmp_path):
    found = json_ready(value)
    assert found == expected and json.dumps(found, allow_nan=False)
    assert type(found) is type(expected)
    write_json({"value": value}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": expected}


def test_a_table_comes_back_as_it_was_and_its_folder_is_made(tmp_path):
    table = pd.DataFrame(
        {
            "eps": [0.05, math.nan],
            "understood": pd.array([True, None], dtype="boolean"),
            "text": ["", "ü"],
        },
        index=[7, 9],
    )
    file = tmp_path / "results" / "outcomes" / "audit.parquet"
    write_table(table, file)
    pd.testing.assert_frame_equal(pd.read_parquet(file), table.reset_index(drop=True))
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("name", WRITERS)
def test_writing_again_replaces_and_leaves_nothing_aside(name, tmp_path):
    write, old, new, read = WRITERS[name]
    write(old, tmp_path / name)
    write(new, tmp_path / name)
    assert same(read(tmp_path / name), new) and [f.name for f in tmp_path.iterdir()] == [name]


def half(path, *_, **__):
    """Some bytes, and then no more."""
    Path(path).write_bytes(b'{"a": 2, "PAR1')
    raise OSError("No space left on device")


@pytest.mark.parametrize("begun", [True, False], ids=["there was one", "there was none"])
@pytest.mark.parametrize("dies", ["while writing", "before renaming"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_dies_leaves_the_file_as_it_was(name, dies, begun, tmp_path, monkeypatch):
    write, old, new, read = WRITERS[name]
    if begun:
        write(old, tmp_path / name)
    with monkeypatch.context() as patch:
        if dies == "before renaming":
            patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        else:
            patch.setattr(pd.DataFrame, "to_parquet", lambda self, path, **_: half(path))
            patch.setattr(Path, "write_text", half)
        with pytest.raises((OSError, KeyboardInterrupt)):
            write(new, tmp_path / name)
    assert (tmp_path / name).exists() == begun
    assert not begun or same(read(tmp_path / name), old)
    # what is left aside is nothing that a search for results finds
    assert [f.name for f in tmp_path.glob(f"*{Path(name).suffix}")] == [name] * begun
    write(new, tmp_path / name)  # and is in nobody's way
    assert same(read(tmp_path / name), new)


def fill(target, name, dies=False):
    with folder_aside(target) as folder:
        (folder / name).write_text(name)
        if dies:
            raise KeyboardInterrupt


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run" / "model"
    with pytest.raises(KeyboardInterrupt):
        fill(target, "half", dies=True)
    assert list(target.parent.iterdir()) == []
    fill(target, "one")
    with pytest.raises(KeyboardInterrupt):
        fill(target, "half", dies=True)
    with pytest.raises(OSError, match="not empty"):
        fill(target, "two")  # what is there stays: whoever wants it replaced moves it first
    assert [p.name for p in target.iterdir()] == ["one"] and len(list(target.parent.iterdir())) == 1


def test_what_cannot_be_written_as_json_destroys_nothing(tmp_path):
    write_json({"a": 1}, tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json({"a": object()}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_run_does_not_take_leftovers_for_outcomes(tmp_path, monkeypatch):
    run = Run("smoke", tmp_path / "run")
    folder = run.folder / "results" / "outcomes"
    write_table(OLD, folder / "audit-ssft-seed0.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", lambda self, path, **_: half(path))
        with pytest.raises(OSError, match="No space left"):
            write_table(NEW, folder / "audit-lat-seed0.parquet")
    assert len(list(folder.iterdir())) == 1
    assert run.outcomes().equals(OLD)
    assert not run.layout.table_file(run.spec("lat"), "audit").exists()


def test_a_run_keeps_its_results_whole(tmp_path, monkeypatch):
    run = Run("smoke", tmp_path / "run")
    run.save_result("rates", {"asr": float("nan"), 0: np.float32(0.25)})
    assert run.result("rates") == {"asr": None, "0": 0.25}
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        run.save_result("rates", {"asr": 1.0})
    assert run.result("rates") == {"asr": None, "0": 0.25}
    with pytest.raises(FileNotFoundError, match="no other.json in .*run the notebook"):
        run.result("other")


def test_files_are_read_by_whom_the_umask_allows(tmp_path):
    """safetensors writes for its user alone, whatever the umask."""
    before = os.umask(0o027)
    try:
        with folder_aside(tmp_path / "model") as partial:
            save_file({"a": torch.zeros(2)}, partial / "model.safetensors")
        write_json({}, tmp_path / "a.json")
    finally:
        os.umask(before)
    files = [tmp_path / "model" / "model.safetensors", tmp_path / "a.json"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o640"] * 2
    assert {file.name for file in tmp_path.iterdir()} == {"model", "a.json"}
