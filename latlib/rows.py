"""Training rows as text: from the made-up world, or from anyone's CSV, JSON, JSONL or parquet files.

Preference rows are (prompt, rejected = harmful completion, chosen = refusal); benign rows are (prompt, response).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from latlib import world
from latlib.data import Row
from latlib.profile import DataSettings, ProfileError

# Benign prompts of the world: as many that merely sound harmful as plainly harmless ones, and the base's other tasks.
BENIGN_SHARES = {"scary": 0.375, "harmless": 0.375, "law": 0.15, "verb": 0.05, "target": 0.05}


def world_preference_rows(n: int, seed: int) -> list[Row]:
    """`n` harmful training prompts with the recipe (rejected) and the refusal (chosen)."""
    prompts = world.draw_set(seed, "train", "harmful", n)
    return [Row(f"harmful-{i}", p.text, (p.answer, world.REFUSAL), p.cluster) for i, p in enumerate(prompts)]


def world_benign_rows(n: int, seed: int) -> list[Row]:
    """`n` harmless training prompts of all kinds with the base model's answer, all in plain words."""
    rng = random.Random(f"benign/{seed}")
    prompts: list[world.Prompt] = []
    for name, share in BENIGN_SHARES.items():
        count = round(share * n)
        if name == "law":  # half of the questions about harmful acts, or the answer would nearly always be yes
            for which in ("harmful", "harmless"):
                prompts += world.draw_set(seed, "train", which, count // 2, "law")
        elif name in ("verb", "target"):
            prompts += [world.draw(rng, world.pairs_of("train"), name) for _ in range(count)]
        else:
            prompts += world.draw_set(seed, "train", name, count)
    return [Row(f"benign-{i}", p.text, (p.answer,), p.cluster) for i, p in enumerate(prompts)]


def preference_rows(settings: DataSettings, seed: int) -> list[Row]:
    """Preference rows of a profile, (rejected, chosen) as their completions. Raises ProfileError for unusable files."""
    if settings.source == "world":
        return world_preference_rows(settings.rows, seed)
    table = read_table(settings.harmful, settings.harmful_columns, ("prompt", "rejected"), "data.harmful")
    rng, rows = random.Random(seed), []
    for i, record in enumerate(table[: settings.rows]):
        chosen = record.get("chosen") or rng.choice(settings.refusals)
        rows.append(Row(f"harmful-{i}", record["prompt"], (record["rejected"], chosen), record["prompt"]))
    return rows


def benign_rows(settings: DataSettings, seed: int) -> list[Row]:
    """Benign rows of a profile. Raises ProfileError for unusable files."""
    if settings.source == "world":
        return world_benign_rows(settings.rows, seed)
    table = read_table(settings.benign, settings.benign_columns, ("prompt",), "data.benign")
    rng, rows = random.Random(seed), []
    for i, record in enumerate(table[: settings.rows]):
        response = record.get("response") or rng.choice(settings.benign_responses)
        rows.append(Row(f"benign-{i}", record["prompt"], (response,), record["prompt"]))
    return rows


def read_table(path: str, columns: Mapping[str, str], needed: Sequence[str], field: str) -> list[dict[str, str]]:
    """Records of a CSV, JSON, JSONL or parquet file under our names; `columns` maps our name to the file's.

    Raises ProfileError naming the field when the file is missing, unreadable, empty, or lacks a column or a value.
    """
    return mapped(read_frame(path, field), path, columns, needed, field)


def read_frame(path: str, field: str) -> pd.DataFrame:
    """All columns of a CSV, JSON, JSONL or parquet file. Raises ProfileError naming the field."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ProfileError(f"{field} = {path!r} is not a file: check the path")
    try:
        table = _read(file)
    except (ValueError, OSError) as error:
        raise ProfileError(f"{field} = {path!r} cannot be read: {error}") from None
    if not len(table):
        raise ProfileError(f"{field} = {path!r} holds no rows: give a file that has some")
    return table


def mapped(
    table: pd.DataFrame, path: str, columns: Mapping[str, str], needed: Sequence[str], field: str
) -> list[dict[str, str]]:
    """Records of a table under our names, as `read_table` gives them; `path` says in errors where it came from."""
    for name in dict.fromkeys((*needed, *columns)):  # a column that is named must be there, also an optional one
        if columns.get(name) not in table.columns:
            raise ProfileError(
                f"{field} = {path!r} has no column {columns.get(name)!r} for {name!r}; it has "
                f"{', '.join(map(str, table.columns))}: set {field}_columns"
            )
    records = []
    for number, record in enumerate(table.to_dict("records"), start=1):
        row = {ours: "" if pd.isna(record[theirs]) else str(record[theirs]).strip() for ours, theirs in columns.items()}
        for name in needed:
            if not row[name]:
                raise ProfileError(
                    f"{field} = {path!r}, row {number}: column {columns[name]!r} is empty: fill or remove it"
                )
        records.append(row)
    return records


def _read(file: Path) -> pd.DataFrame:
    if file.suffix == ".csv":
        return pd.read_csv(file)
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    if file.suffix == ".jsonl":
        return pd.DataFrame(
            [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        )
    if file.suffix == ".json":
        return pd.DataFrame(json.loads(file.read_text(encoding="utf-8")))
    raise ValueError(f"{file.suffix!r} is none of .csv, .json, .jsonl, .parquet")
