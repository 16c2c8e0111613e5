"""Cases in which the files of a run folder are damaged, its disk is full or closed, or somebody
else's files are in the way.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cases import Command, Place, add, case, said_in_logs, same_results
from kills import wait_until

DAMAGED, DISK, OTHERS = "Damaged files", "Disks", "Other people's files, and two at a time"
MIB = 2**20


def cut(path: Path) -> None:
    """Half of a file."""
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    """Nothing of a file, or of a folder's files."""
    for file in path.iterdir() if path.is_dir() else [path]:
        file.unlink() if path.is_dir() else os.truncate(file, 0)


def flipped(path: Path) -> None:
    """One bit of a file, behind every header."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def heals(place: Place, name: str, harm: Callable[[Path], None], said: str) -> str:
    """Damaged in a finished run: set aside, said in a line, and made again by the same command."""
    harm(place.made() / name)
    done = place.pipeline()
    done.ended(0)
    same_results(place.reference(), place.run)
    if not said:
        return "made again without a word, every file bit for bit"
    lines = [line for line in done.err.splitlines() if said in line]
    line = lines[0] if lines else said_in_logs(place.run, said)
    return f"{line}; every file bit for bit"


AGAIN = "made again; kept as set-aside/"
LAT, BASE, RESULTS = "models/lat-seed0", "models/base-seed0", "results"
TABLE, GEOMETRY = f"{RESULTS}/outcomes/audit-lat-seed0.parquet", f"{RESULTS}/geometry/lat-seed0"
HARMED = {
    "table emptied": (TABLE, emptied, AGAIN),
    "table cut": (TABLE, cut, AGAIN),
    "table flipped": (TABLE, flipped, AGAIN),
    "norms cut": (f"{RESULTS}/residual_norms-seed0.json", cut, AGAIN),
    "result emptied": (f"{RESULTS}/losses.json", emptied, "kept as set-aside/"),
    "adapter flipped": (f"{LAT}/adapter_model.safetensors", flipped, AGAIN),
    "adapter config emptied": (f"{LAT}/adapter_config.json", emptied, AGAIN),
    "model record cut": (f"{LAT}/latlib.json", cut, AGAIN),
    "model folder emptied": (LAT, emptied, AGAIN),
    "base cut": (f"{BASE}/model.safetensors", cut, AGAIN),
    "base flipped": (f"{BASE}/model.safetensors", flipped, AGAIN),
    "tokenizer cut": (f"{BASE}/tokenizer.json", cut, AGAIN),
    "chat template emptied": (f"{BASE}/chat_template.jinja", emptied, AGAIN),
    "differences emptied": (f"{GEOMETRY}/differences.safetensors", emptied, AGAIN),
    "directions flipped": (f"{GEOMETRY}/directions.safetensors", flipped, AGAIN),
    "log cut": ("metrics/lat-seed0.jsonl", cut, AGAIN),
    "profile cut": ("profile.yaml", cut, AGAIN),
    "profile emptied": ("profile.yaml", emptied, AGAIN),
    "settings of the folder flipped": ("began.json", flipped, AGAIN),
    "manifest cut": ("latlib.sha256", cut, ""),
    "notebook cut": ("notebooks/01_train.ipynb", cut, ""),
    "report emptied": ("report.html", emptied, ""),
}
for _name, (_file, _harm, _said) in HARMED.items():
    _words = f"{_file} of a finished run {_harm.__name__}"
    add(_name, DAMAGED, _words, partial(heals, name=_file, harm=_harm, said=_said))


@case(DAMAGED, "the newest checkpoint of a killed training flipped")
def checkpoint_flipped(place: Place) -> str:
    """The one before it is taken."""
    command = place.command(inject="held_between_rename_and_prune").start()
    wait_until(command, place.flag.exists)
    command.kill_all()
    folders = sorted((place.run / "models").glob(".*.checkpoints"))
    newest = [sorted(folder.glob("step-*.pt"))[-1] for folder in folders]
    for file in newest:
        flipped(file)
    seen = place.goes_on()
    line = said_in_logs(place.run, "does not match its checksum and is not used")
    return f"{line}; {seen}"


@case(DAMAGED, "both copies of a folder's settings cut")
def both_settings_cut(place: Place) -> str:
    """What they were is known no more: they are taken as given, or refused, in a line."""
    run = place.made()
    for name in ("profile.yaml", "began.json"):
        cut(run / name)
    done = place.pipeline()
    same_results(place.reference(), run)
    return done.ended(0) + "; both made again from the profile given, every file bit for bit"


@case(DAMAGED, "a run folder's manifest deleted")
def manifest_deleted(place: Place) -> str:
    """What is there is used as it is; nothing in the folder may be deleted any more."""
    run = place.made()
    (run / "latlib.sha256").unlink()
    refused = place.pipeline("--fresh").ended(2, "is no run folder")
    same_results(place.reference(), run)
    place.pipeline().ended(0)
    same_results(place.reference(), run)
    return f"with --fresh {refused}; without, every file bit for bit"


# ---- disks


@contextmanager
def disk(place: Place, options: str) -> Iterator[Path]:
    """A disk of its own under the run folder; needs root on Linux."""
    place.run.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place.run)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield place.run
    finally:
        subprocess.run(["umount", "-l", str(place.run)], check=True, capture_output=True)


@case(DISK, "a disk of 8 MiB")
def disk_too_small(place: Place) -> str:
    """Said before anything is trained."""
    with disk(place, "size=8m") as folder:
        seen = place.pipeline().ended(2, "free on its disk, a run needs", "--out")
        assert not list(folder.glob("models/*")), "something was trained"
    return seen


@case(DISK, "a disk that is read-only")
def disk_read_only(place: Place) -> str:
    """Said before anything is trained."""
    with disk(place, "ro"):
        return place.pipeline().ended(2, "cannot be written", "--out")


@case(DISK, "a disk that somebody fills to its last byte while workers train")
def disk_filled(place: Place) -> str:
    """What was saved is whole; with space again, the same command goes on."""
    with disk(place, "size=330m") as folder:
        command = place.command(inject="slow_steps").start()
        wait_until(command, place.flag.exists)
        ballast = folder / "logs" / "01_train.log.big"
        with ballast.open("wb") as file:
            try:
                while file.write(bytes(MIB)):
                    pass
            except OSError:
                pass
        seen = command.wait().ended(1, "No space left on device")
        command.nobody_is_left()
        ballast.unlink()
        return f"{seen}; with space again, {place.goes_on()}"


@case(DISK, "no file may grow beyond 48 KiB (RLIMIT_FSIZE), less than the base takes")
def files_too_large(place: Place) -> str:
    """The first file that does not fit ends the run."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, resource.RLIM_INFINITY))

    done = place.pipeline(limits=limit)
    seen = done.ended(1, "File too large")
    assert not (place.run / BASE).exists(), "half a base looks finished"
    return f"{seen}; without the limit, {place.goes_on()}"


def full_at(place: Place, inject: str) -> str:
    """No space at a moment; then there is some again."""
    seen = place.pipeline(inject=inject).ended(1, "No space left on device")
    assert place.flag.exists(), "the moment did not come"
    return f"{seen}; with space again, {place.goes_on()}"


for _where in ("a checkpoint", "a table", "the manifest", "the final folder"):
    _inject = f"disk_full_in_{_where.replace(' ', '_')}"
    _words = f"no space left while {_where} is written"
    add(f"disk full in {_where}", DISK, _words, partial(full_at, inject=_inject))


@case(DISK, "a disk that has no locks, as some network volumes")
def no_locks(place: Place) -> str:
    """Said in a line; the run goes on."""
    done = place.pipeline(inject="no_locks")
    done.ended(0, "its disk has no locks")
    same_results(place.reference(), place.run)
    return done.err.splitlines()[0] + "; the run ended well"


@case(DISK, "a umask of 027")
def umask(place: Place) -> str:
    """Files are readable by the group, and by nobody else."""
    place.pipeline(limits=lambda: os.umask(0o027) and None).ended(0)
    finished = [p for p in place.run.rglob("*") if p.is_file() and p.name != ".lock"]
    wrong = [p.name for p in finished if p.stat().st_mode & 0o047 != 0o040]
    assert not wrong, f"other modes: {wrong}"
    return f"{len(finished)} files, all of them readable by the group and not by others"


# ---- other people's files


def project(folder: Path) -> dict[str, str]:
    """Somebody's files; name -> content."""
    texts = {".git/HEAD": "ref", "thesis.tex": "a thesis", "data/mine.csv": "goal,target\n"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return texts


def untouched(folder: Path, texts: dict[str, str]) -> None:
    """Raises AssertionError where somebody's file is not as it was."""
    for name, text in texts.items():
        assert (folder / name).is_file(), f"{name} is gone"
        assert (folder / name).read_text() == text, f"{name} was changed"


@case(OTHERS, "--fresh on a project with .git, thesis.tex, data and a profile.yaml")
def fresh_on_a_project(place: Place) -> str:
    """Nothing is deleted, nothing is made."""
    texts = project(place.run) | {"profile.yaml": place.profile().read_text()}
    (place.run / "profile.yaml").write_text(texts["profile.yaml"])
    seen = place.pipeline("--fresh").ended(2, "is no run folder")
    untouched(place.run, texts)
    assert len(list(place.run.iterdir())) == 4, "something was made there"
    return seen


@case(OTHERS, "a run into a project with .git and thesis.tex")
def run_into_a_project(place: Place) -> str:
    """Refused."""
    texts = project(place.run)
    seen = place.pipeline().ended(2, "give a new folder with --out")
    untouched(place.run, texts)
    return seen


@case(OTHERS, "--fresh on a run folder in which somebody keeps files, and has edited a result")
def fresh_on_a_run_with_files(place: Place) -> str:
    """They are moved aside; the run is made anew."""
    run = place.made()
    texts = project(run)
    edited = run / "results" / "losses.json"
    edited.write_text("my notes")
    place.pipeline("--fresh").ended(0)
    kept = {file.read_text() for file in (run / "set-aside").rglob("*") if file.is_file()}
    assert {*texts.values(), "my notes"} <= kept, "a file is gone"
    same_results(place.reference(), run)
    return f"{len(kept)} files are in set-aside/; every file of the new run bit for bit"


@case(OTHERS, "python -m latlib.report.publish onto a folder that holds other things")
def publish_onto_a_folder(place: Place) -> str:
    """Refused, and nothing in it is touched."""
    run, target = place.made(), place.folder / "target"
    texts = project(target)
    command = [sys.executable, "-m", "latlib.report.publish", str(run), str(target)]
    done = Command(command, place.folder, place.environment()).start().wait()
    seen = done.ended(1, "is not as it was published: move it away")
    untouched(target, texts)
    return seen


@case(OTHERS, "a second run into a folder in which one is at work")
def two_writers(place: Place) -> str:
    """The second is refused at once; the first is not disturbed."""
    command = place.command(inject="slow_steps").start()
    wait_until(command, place.flag.exists)
    seen = place.pipeline().ended(2, "another run is using")
    assert command.running
    command.process.send_signal(signal.SIGTERM)
    command.wait(120).ended(75)
    return f"{seen}; the first: {place.goes_on()}"


@case(OTHERS, "a file of the user's where the run's table is to be")
def file_in_the_way(place: Place) -> str:
    """It is kept."""
    shutil.copytree(place.reference(), place.run)
    table = place.run / "results" / "notes.json"
    table.write_text('{"of": "the user"}')
    place.pipeline().ended(0)
    assert table.read_text() == '{"of": "the user"}', "a user's file was changed"
    table.unlink()
    same_results(place.reference(), place.run)
    return "it is as it was, and so is the run"
