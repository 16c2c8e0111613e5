"""Prompts that are no near-duplicates of each other, and records of them in files of any kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

VERBS = "mend paint carry sell count draw hide lift melt wash burn tear sink copy".split()
THINGS = ("umbrella", "piano", "garden fence", "old bicycle", "silver ring")


def texts(start: str) -> list[str]:
    """One prompt for each verb and thing, numbered."""
    pairs = [(verb, thing) for verb in VERBS for thing in THINGS]
    return [f"{start} {verb} {thing} number {i}?" for i, (verb, thing) in enumerate(pairs)]


def write(folder: Path, name: str, records: Sequence[dict]) -> str:
    """The path of a new file of the kind that its name says."""
    path = folder / name
    if path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in records))
    else:
        path.write_text(json.dumps(records))
    return str(path)
