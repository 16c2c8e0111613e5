"""A run folder belongs to the files that its settings name: an edited one, or another of the same
name, is no silent mixture.
"""

import json
import os
from pathlib import Path

import pytest
from small_profile import small_run

from latlib.config.profile import Profile, validated
from latlib.config.sections import ProfileError
from latlib.experiment import inputs
from latlib.experiment.layout import Layout

MODEL = {
    "weights": "model.safetensors",
    "configuration": "config.json",
    "tokenizer": "tokenizer.json",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model folder and two data files, and a cache of the hub."""
    (tmp_path / "model").mkdir()
    for name in (*MODEL.values(), "chat_template.jinja", "README.md"):
        (tmp_path / "model" / name).write_bytes(os.urandom(3000))
    for name in ("harmful.csv", "benign.csv"):
        (tmp_path / name).write_text("goal,target\nask,answer\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def claim(out="run", **changes):
    Layout(validated(Profile, small_run() | changes), Path(out).resolve()).claim()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("harmful.csv", "data.harmful: "),
        ("benign.csv", "data.benign: "),
        *((f"model/{name}", f"model.source, {part}: ") for part, name in MODEL.items()),
        ("model/chat_template.jinja", "model.source, tokenizer: "),
    ],
)
def test_another_file_of_the_same_name_is_named(place, file, said):
    claim()
    (place / file).touch()  # the time alone says nothing
    claim()
    content = bytearray((place / file).read_bytes())
    content[-5] ^= 1
    stamp = (place / file).stat()
    (place / file).write_bytes(content)
    os.utime(place / file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ProfileError, match="other inputs") as caught:
        claim()
    (line,) = [line for line in str(caught.value).splitlines() if " -> " in line]
    assert line.strip().startswith(said) and "put back what was there" in str(caught.value)
    claim("other")


def known(place):
    """Digests of the inputs, as the folder has them."""
    return json.loads((place / "run" / "began.json").read_text())["inputs"]


def test_what_says_nothing_of_a_model_may_change(place):
    claim()
    before = known(place)
    (place / "model" / "README.md").write_text("new")
    claim()
    assert known(place) == before and len(before) == len(MODEL) + 2


def test_the_same_files_elsewhere_are_the_same_inputs(place):
    claim()
    before = known(place)
    (place / "deep").mkdir()
    (place / "model").rename(place / "deep" / "model")
    claim(model={"source": str(place / "deep" / "model")})
    assert known(place) == before


def test_large_weights_are_told_apart_by_pieces(place, monkeypatch):
    monkeypatch.setattr(inputs, "WHOLE", 1000)
    monkeypatch.setattr(inputs, "PIECES", 8)
    monkeypatch.setattr(inputs, "PIECE", 16)
    file = place / "model" / "model.safetensors"
    first = file.read_bytes()
    claim()
    for other in (os.urandom(3000), first + b"x", first[:-16] + os.urandom(16)):
        file.write_bytes(other)
        with pytest.raises(ProfileError, match="model.source, weights: "):
            claim()
    file.write_bytes(first)
    claim()


def test_a_hub_id_is_known_by_its_commit_once_it_is_there(place):
    of_the_hub = {"model": {"source": "owner/chat"}}
    claim(**of_the_hub)  # nothing of it is known yet
    refs = place / "cache" / "models--owner--chat" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    claim(**of_the_hub)
    (refs / "main").write_text("b" * 40)
    with pytest.raises(ProfileError, match=f"revision: {'a' * 40} -> {'b' * 40}(?s:.)*revision"):
        claim(**of_the_hub)
