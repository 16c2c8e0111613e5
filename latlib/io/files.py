"""Files that are whole or absent: written aside, put on the disk, then renamed.

What lies in a run folder is entered in its manifest on the way (`latlib.io.manifest`), and nothing
is written over that this run did not write: it is set aside first.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from latlib.io import manifest

if TYPE_CHECKING:
    import pandas as pd

Json = dict[str, Any]  # what json, yaml or torch store of an object
SET_ASIDE = "set-aside"  # folder of a run folder; nothing in it is touched again


@contextmanager
def aside(target: Path, durable: bool = True) -> Iterator[Path]:
    """The path to write a file at, or to make a folder at: what is there at the end replaces
    `target`, but no folder that holds something; after an error it is deleted, and `target` is what
    it was.

    durable: wait until it is on the disk, and enter it in the manifest. Processes that write the
    same file do not meet: no two get one path. Raises OSError for a folder that holds something.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        yield partial
        if durable:
            mode = _usual_mode(target)
            for path in (*partial.rglob("*"), partial):
                if path.is_file():
                    path.chmod(mode)  # safetensors writes for its user alone
                sync(path)
            _record(target, partial)
        if target.is_dir():
            target.rmdir()
        partial.replace(target)
        if durable:
            sync(target.parent)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def _usual_mode(target: Path) -> int:
    """The mode of a new file beside `target`, as the umask says, which cannot be read without being
    changed."""
    probe = target.with_name(f".{target.name}.{uuid4().hex}")
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _record(target: Path, partial: Path) -> None:
    """Enter what will lie at `target` in the manifest of its folder, if there is one."""
    root = manifest.root_of(target)
    if root is None:
        return
    if target.is_file() and not manifest.is_ours(root, target):
        set_aside(root, target, "is not as this run wrote it")
    manifest.record(root, target, partial)


def enter(file: Path) -> None:
    """Put a file that was written in its place on the disk, and into the manifest."""
    sync(file)
    if root := manifest.root_of(file):
        manifest.record(root, file, file)


def discard(file: Path) -> None:
    """Delete a file of a run; one that was changed since is set aside."""
    root = manifest.root_of(file)
    if root and file.is_file() and not manifest.is_ours(root, file):
        set_aside(root, file, "is not as this run wrote it")
    file.unlink(missing_ok=True)


def set_aside(root: Path, path: Path, why: str) -> None:
    """Move what is at `path` in a run folder out of the way, and say so in a line."""
    name = path.relative_to(root).as_posix()
    place = root / SET_ASIDE / f"{name}.{uuid4().hex[:8]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # another process was faster
        path.replace(place)
        kept = place.relative_to(root).as_posix()
        print(f"{root.name}: {name} {why}; kept as {kept}", file=sys.stderr, flush=True)


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """The same of a folder: an empty one to be filled."""
    with aside(target) as partial:
        partial.mkdir()
        yield partial


def without_paths(text: str, run: Path, *files: Path) -> str:
    """A text without the paths of this machine: of a run folder, files, the environment, the
    package's folder, the current one and the user's home."""
    root = Path(__file__).resolve().parents[2]
    names = {file: file.name for file in files}
    names[run] = f"runs/{run.name}"
    if sys.prefix != sys.base_prefix:  # in an environment of its own
        names[Path(sys.prefix)] = ".venv"
    names[root] = "."
    names[Path.cwd()] = "."
    names[Path.home()] = "~"
    for folder, name in names.items():
        if folder.parent != folder:  # not the root of the disk
            end = r"(?![\w.-])"
            text = re.sub(re.escape(str(folder)) + end, name, text)
    return text


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(text: str, file: Path, durable: bool = True) -> None:
    """Write a text file. durable: see `aside`."""
    with aside(file, durable) as partial:
        partial.write_text(text, encoding="utf-8")


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a parquet file."""
    with aside(file) as partial:
        table.to_parquet(partial, index=False)


def write_json(data: Any, file: Path) -> None:
    """Write a JSON file; NaN and infinities become null."""
    write_text(json.dumps(json_ready(data), indent=1, allow_nan=False), file)


def read_json(file: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def json_ready(value: Any) -> Any:
    """The same in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
