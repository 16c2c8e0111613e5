"""What a folder of ours holds, with checksums: the mark by which a run folder, or published
results, are known.

1. `latlib.sha256` has a line `<sha256>  <path>` a file, paths from its own folder; `sha256sum -c`
   reads it, too. A file that was written again has a line for each time.
2. A line is on the disk before its file moves into place (`latlib.io.files.aside`); whoever is
   killed in between leaves the file of an earlier line. So a file that is as none of its lines says
   was damaged, or changed by somebody else.
3. Names that begin with a dot are left out: checkpoints have checksums of their own and go again.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import Path

NAME = "latlib.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")
_CHUNK = 2**20


def root_of(path: Path) -> Path | None:
    """The folder above `path` whose manifest lists it; None where there is none, or where it is
    hidden there."""
    for folder in path.parents:
        if (folder / NAME).is_file():
            parts = path.relative_to(folder).parts
            return None if any(part.startswith(".") for part in parts) else folder
    return None


def listed(folder: Path) -> dict[str, set[str]]:
    """path -> sha256 of each time it was written, as a folder's manifest says; {} without one. What
    is no line is passed by."""
    file = folder / NAME
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    found: dict[str, set[str]] = {}
    for match in filter(None, map(_LINE.fullmatch, lines)):
        found.setdefault(match[2], set()).add(match[1])
    return found


def record(root: Path, target: Path, written: Path) -> None:
    """Append the lines of a file or folder `written` that will lie at `target` below `root`."""
    lines = []
    for file in files_below(written):
        place = (target / file.relative_to(written)).relative_to(root)
        lines.append(f"{read_digest(file)}  {place.as_posix()}\n")
    handle = os.open(root / NAME, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":  # a line that was cut stays alone
            lines.insert(0, "\n")
        os.write(handle, "".join(lines).encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def files_below(path: Path) -> list[Path]:
    """A file itself, or the files of a folder in order, without its manifest and hidden ones."""
    if path.is_file():
        return [path]
    found = []
    for file in sorted(path.rglob("*")):
        names = file.relative_to(path).parts
        hidden = any(name.startswith(".") for name in names)
        if file.is_file() and not hidden and names != (NAME,):
            found.append(file)
    return found


def damage(path: Path) -> str:
    """What is wrong with a finished file or folder; '' where it is as it was written, is not
    listed, or is not there."""
    root = root_of(path)
    if root is None or not path.exists():
        return ""
    name = path.relative_to(root).as_posix()
    for place, known in listed(root).items():
        if place == name or place.startswith(f"{name}/"):
            inside = place.removeprefix(name).strip("/")
            if not (root / place).is_file():
                return f"lacks {inside}"
            if digest(root / place) not in known:
                return f"does not match its checksum{inside and f' ({inside})'}"
    return ""


def is_ours(root: Path, file: Path) -> bool:
    """Whether a file is listed in the manifest of `root`, and as it was written."""
    known = listed(root).get(file.relative_to(root).as_posix())
    return known is not None and digest(file) in known


def digest(file: Path) -> str:
    """The sha256 of a file; read once as long as nobody has written to it."""
    stat = file.stat()
    return _kept_digest(file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=4096)
def _kept_digest(file: Path, *version: int) -> str:
    return read_digest(file)


def read_digest(file: Path) -> str:
    """The sha256 of a file, read now."""
    found = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
