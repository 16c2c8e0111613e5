"""Prompts of other people's benchmarks, from a file or the hub: what to ask, and whether a safe
model should answer.

1. Over-refusal sets: XSTest (arXiv 2308.01263; safe prompts that sound unsafe, and their unsafe
   contrasts) and OR-Bench (arXiv 2405.20947). Harmful sets: AdvBench, HarmBench, JailbreakBench,
   StrongREJECT.
2. A set is a file that the user has (`latlib.data.records` reads it; columns are mapped by name),
   or, where the package `datasets` is installed, the published copy on the hub. No prompt is
   shipped with latlib; benchmarks.yaml says where each set is and how its columns are called.
3. Every prompt says 'safe' (a refusal is over-refusal) or 'unsafe' (compliance is harm), by its
   file's label column or by the set it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import TypeAdapter

from latlib.config.sections import ProfileError
from latlib.data.records import ANY_SPLIT, Source, read_table

Label = Literal["safe", "unsafe"]
_LABELS: dict[str, Label] = {"safe": "safe", "unsafe": "unsafe"}


@dataclass(frozen=True)
class AskedPrompt:
    """One prompt of a benchmark: its id in results, its text, what a safe model should make of it,
    and its kind.
    """

    prompt_id: str
    text: str
    label: Label
    category: str = ""


@dataclass(frozen=True)
class PromptSet:
    """A benchmark: the published file's columns under our names (text, category, label), the label
    of prompts without such a column, and where the hub has it. contrast: how the categories of
    unsafe prompts begin, in a set of safe ones.
    """

    columns: Mapping[str, str]
    label: Label
    hub: Source | None = None
    contrast: str = ""


_FILE = Path(__file__).with_name("benchmarks.yaml")
_KNOWN = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
SETS = TypeAdapter(dict[str, PromptSet]).validate_python(_KNOWN)


def asked_prompts(
    name: str,
    file: str | Path | None = None,
    file_columns: Mapping[str, str] | None = None,
    n: int | None = None,
) -> list[AskedPrompt]:
    """The prompts of a set (see SETS), the first `n` if given, in the file's order.

    file: CSV, JSON, JSONL or parquet; None takes the hub's copy through `datasets`. file_columns:
    our names (text, and if there are any category and label) -> the file's, where they are not the
    published ones. Without a label column a prompt has its set's label, except that XSTest's
    contrast types are unsafe. Raises ProfileError naming the field, the value and the fix.
    """
    if name not in SETS:
        raise ProfileError(f"name = {name!r} is no set of prompts: choose one of {', '.join(SETS)}")
    if n is not None and n < 1:
        raise ProfileError(f"n = {n!r} asks for no prompts: give 1 or more, or leave it out")
    known = SETS[name]
    columns = dict(known.columns if file_columns is None else file_columns)
    if "text" not in columns or not set(columns) <= {"text", "category", "label"}:
        raise ProfileError(
            f"file_columns = {columns!r} needs 'text' and takes 'category' and 'label' besides"
        )
    source = known.hub
    if file is not None:
        source = Source(str(file), "file", split=ANY_SPLIT)
    if source is None:
        raise ProfileError(
            f"file = None: {name!r} is read from a file only: download it from its authors and give"
            " its path"
        )
    found = []
    # every row's label is checked, so that a broken file does not pass because n was small
    for i, row in enumerate(read_table(source, columns, ("text",))):
        label = _label(row, i, known)
        found.append(AskedPrompt(f"{name}-{i:04d}", row["text"], label, row.get("category", "")))
    return found[:n]


def _label(row: Mapping[str, str], index: int, known: PromptSet) -> Label:
    if "label" not in row:
        unsafe = known.contrast and row.get("category", "").startswith(known.contrast)
        return "unsafe" if unsafe else known.label
    label = _LABELS.get(row["label"].lower())
    if label is None:
        raise ProfileError(
            f"file, row {index + 1}: label = {row['label']!r} is neither 'safe' nor 'unsafe': fix"
            " the row, or leave 'label' out of file_columns"
        )
    return label
