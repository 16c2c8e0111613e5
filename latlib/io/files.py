"""Files that are whole or absent: written aside, put on the disk, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    import pandas as pd

Json = dict[str, Any]  # what json, yaml or torch store of an object


@contextmanager
def aside(target: Path, durable: bool = True) -> Iterator[Path]:
    """The path to write a file at, or to make a folder at: what is there at the end replaces
    `target`; after an error it is deleted, and `target` is what it was.

    durable: wait until it is on the disk. Processes that write the same file do not meet: no two
    get one path.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        yield partial
        if durable:
            for path in (*partial.rglob("*"), partial):
                sync(path)
        if target.is_dir():
            shutil.rmtree(target)
        partial.replace(target)
        if durable:
            sync(target.parent)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def folder_aside(target: Path) -> Iterator[Path]:
    """The same of a folder: an empty one to be filled."""
    with aside(target) as partial:
        partial.mkdir()
        yield partial


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(text: str, file: Path) -> None:
    """Write a text file."""
    with aside(file) as partial:
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
