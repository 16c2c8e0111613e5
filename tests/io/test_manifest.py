"""The manifest of a folder: a line for every file before it is there, and every byte under it."""

import subprocess

import pytest

from latlib.io import manifest
from latlib.io.files import discard, folder_aside, write_json, write_text


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / manifest.NAME).touch()
    return folder


def fill(folder, **texts):
    with folder_aside(folder) as partial:
        for name, text in texts.items():
            (partial / name).write_text(text)


def test_what_is_written_below_it_is_listed_as_sha256sum_reads_it(root):
    write_json({"a": 1}, root / "results" / "a.json")
    fill(root / "models" / "lat", weights="w", record="r")
    write_text("half", root / "progress.json", durable=False)
    write_text("state", root / "models" / ".lat.checkpoints" / "step-1.pt")
    assert set(manifest.listed(root)) == {
        "results/a.json",
        "models/lat/weights",
        "models/lat/record",
    }
    command = ["sha256sum", "--check", "--strict", "--quiet", manifest.NAME]
    assert subprocess.run(command, cwd=root).returncode == 0


def test_killed_between_a_line_and_its_file_the_file_before_it_is_whole(root, monkeypatch):
    write_text("one", root / "a")
    with monkeypatch.context() as patch:
        patch.setattr(type(root), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            write_text("two", root / "a")
        with pytest.raises(KeyboardInterrupt):
            write_text("new", root / "b")
    assert (root / "a").read_text() == "one" and len(manifest.listed(root)["a"]) == 2
    assert set(manifest.listed(root)) == {"a", "b"}, "no file comes before its line"
    assert manifest.damage(root / "a") == "" == manifest.damage(root / "b")
    write_text("two", root / "a")
    assert not (root / "set-aside").exists()


def test_a_line_that_was_cut_spoils_no_other(root):
    write_text("one", root / "a")
    with (root / manifest.NAME).open("a") as file:
        file.write("0123abc")  # power was lost
    write_text("two", root / "a")
    write_text("b", root / "b")
    assert set(manifest.listed(root)) == {"a", "b"}
    assert manifest.damage(root / "a") == "" == manifest.damage(root / "b")


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty])
def test_damage_is_seen_in_a_file_and_in_a_folder(root, harm):
    write_text("content", root / "a")
    fill(root / "models" / "lat", weights="content")
    assert manifest.damage(root / "a") == manifest.damage(root / "models" / "lat") == ""
    for path in (root / "a", root / "models" / "lat" / "weights"):
        harm(path)
    assert manifest.damage(root / "a") == "does not match its checksum"
    assert manifest.damage(root / "models" / "lat") == "does not match its checksum (weights)"
    assert manifest.damage(root / "nothing") == ""


def test_an_emptied_folder_is_damaged(root):
    fill(root / "models" / "lat", weights="w")
    (root / "models" / "lat" / "weights").unlink()
    assert manifest.damage(root / "models" / "lat") == "lacks weights"


def test_nothing_is_written_over_or_deleted_that_was_not_written_here(root, capsys):
    """A user's file of that name, or a result that somebody has edited since."""
    (root / "mine.txt").write_text("a thesis")
    write_text("ours", root / "edited.txt")
    (root / "edited.txt").write_text("with notes")
    write_text("ours", root / "plain.txt")
    for name in ("mine.txt", "edited.txt", "plain.txt"):
        write_text("new", root / name)
        assert (root / name).read_text() == "new"
    (root / "edited.txt").write_text("with notes again")
    discard(root / "edited.txt")
    discard(root / "plain.txt")
    kept = sorted(file.read_text() for file in (root / "set-aside").iterdir())
    assert kept == ["a thesis", "with notes", "with notes again"]
    assert not (root / "edited.txt").exists() and not (root / "plain.txt").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[0].startswith("run: mine.txt is not as this run wrote it; kept")


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    fill(tmp_path / "target", a="a")  # an empty one is
    with pytest.raises(OSError, match="not empty"):
        fill(tmp_path / "target", b="b")
    assert [file.name for file in tmp_path.rglob("*")] == ["target", "a"]
