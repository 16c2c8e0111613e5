"""Published results are what was published, and their claims what their outcome table says."""

import json
import shutil

import pytest

from latlib.io import manifest
from latlib.report.publish import publish
from latlib.verify.__main__ import main, wrong_claims, wrong_files

RESULTS = "results/tiny"


@pytest.fixture
def copy(root, tmp_path):
    shutil.copytree(root / RESULTS, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_the_committed_results_are_as_they_were_published(root, capsys):
    assert main([str(root / RESULTS)]) == 0
    assert "files as written" in capsys.readouterr().out


def test_one_flipped_byte_in_any_file_is_seen(copy):
    files = [file for file in copy.rglob("*") if file.is_file()]
    assert len(files) > 40 and copy / manifest.NAME in files
    for file in files:
        whole = file.read_bytes()
        place = len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert wrong_files(copy), file
        file.write_bytes(whole)
    assert wrong_files(copy) == []


def test_every_byte_of_the_manifest_counts(copy):
    file = copy / manifest.NAME
    whole = file.read_bytes()
    for name in manifest.listed(copy):  # the checksums themselves are what is tried here
        (copy / name).write_bytes(b"")
    empty = manifest.read_digest(copy / "claims.json")
    whole = "".join(f"{empty}  {name}\n" for name in manifest.listed(copy)).encode()
    file.write_bytes(whole)
    assert wrong_files(copy) == []
    for place in range(0, len(whole), 7):
        for bit in (1, 2, 32):
            flipped = bytes([whole[place] ^ bit])
            file.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            assert wrong_files(copy), (place, bit)


def test_missing_and_added_files_are_named(copy, capsys):
    (copy / "training.json").unlink()
    (copy / "outcomes" / "more.parquet").write_bytes(b"")
    assert main([str(copy)]) == 1
    said = capsys.readouterr().out
    assert "training.json is missing" in said and "outcomes/more.parquet is not listed" in said


def test_a_claim_that_the_table_does_not_bear_out_is_named(copy):
    """Also where whoever changed it wrote a manifest that fits."""
    content = json.loads((copy / "claims.json").read_text())
    changed = next(row for row in content["claims"] if row["interval"])
    changed["interval"]["low"] += 1e-6
    (copy / "claims.json").write_text(json.dumps(content))
    manifest.record(copy, copy / "claims.json", copy / "claims.json")
    assert wrong_files(copy) == []
    assert wrong_claims(copy) == [
        f"claims.json: {changed['id']} is not what the outcome table says"
    ]


def test_a_folder_without_a_manifest_is_not_verified(tmp_path, capsys):
    (tmp_path / "claims.json").touch()
    assert main([str(tmp_path)]) == 1
    assert "neither a run folder nor published" in capsys.readouterr().out


def test_a_run_is_verified_in_its_own_folder(smoke_run):
    assert wrong_files(smoke_run.folder) == []
    file = smoke_run.layout.model_folder(smoke_run.spec("lat", 0)) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert wrong_files(smoke_run.folder) == [
        "models/lat-seed0/adapter_model.safetensors does not match its checksum"
    ]


def test_publishing_replaces_only_what_was_published(root, copy, tmp_path):
    run = tmp_path / "runs" / "tiny"  # as much of a run as publishing looks at
    shutil.copytree(root / RESULTS / "outcomes", run / "results" / "outcomes")
    (run / "report.html").write_text("<p>new</p>")
    (run / "began.json").write_text("{}")
    (copy / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.tex in it is not as it was published"):
        publish(run, copy)
    (copy / "thesis.tex").unlink()
    whole = (copy / "audit.json").read_text()
    (copy / "audit.json").write_text(f"{whole} ")
    with pytest.raises(FileExistsError, match=r"audit\.json"):
        publish(run, copy)
    assert wrong_files(copy) == ["audit.json does not match its checksum"]
    (copy / "audit.json").write_text(whole)
    publish(run, copy)
    assert (copy / "report.html").read_text() == "<p>new</p>" and wrong_files(copy) == []
    assert not list(tmp_path.glob(".*"))
