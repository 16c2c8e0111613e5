"""Results on disk: written aside, then renamed, so that a file is whole or absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd


def write_table(table: pd.DataFrame, file: Path) -> None:
    """Write a parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    table.to_parquet(aside, index=False)
    aside.replace(file)


def write_json(data: Any, file: Path) -> None:
    """Write a JSON file; NaN and infinities become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps(json_ready(data), indent=1, allow_nan=False), encoding="utf-8")
    aside.replace(file)


def json_ready(value: Any) -> Any:
    """The same in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if hasattr(value, "tolist"):
        return json_ready(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
