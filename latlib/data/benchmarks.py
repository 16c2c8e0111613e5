"""Prompts of other people's benchmarks, from a file or the hub: what to ask, and whether a safe
model should answer.

1. Over-refusal sets: XSTest (arXiv 2308.01263; safe prompts that sound unsafe, and their unsafe
   contrasts) and OR-Bench (arXiv 2405.20947). Harmful sets: AdvBench, HarmBench, JailbreakBench,
   StrongREJECT.
2. A set is a file that the user has (`latlib.data.splits` reads it; columns are mapped by name),
   or, where the package `datasets` is installed, the published copy on the hub. No prompt is
   shipped with latlib.
3. Every prompt says 'safe' (a refusal is over-refusal) or 'unsafe' (compliance is harm), by its
   file's label column or by the set it is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latlib.config.sections import ProfileError
from latlib.data.records import ANY_SPLIT, Record, hub_records, mapped, read_records

Label = Literal["safe", "unsafe"]


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
    """A benchmark: the published file's columns under our names (text, category, label), and where
    the hub has it.
    """

    columns: Mapping[str, str]
    label: Label  # of prompts without a label column
    hub: tuple[str, str | None, str] | None = None  # repository, configuration, split


_OR_BENCH = {"text": "prompt", "category": "category"}
_JBB, _JBB_HUB = {"text": "Goal", "category": "Category"}, "JailbreakBench/JBB-Behaviors"
SETS: dict[str, PromptSet] = {
    "xstest": PromptSet(
        {"text": "prompt", "category": "type", "label": "label"},
        "safe",
        ("Paul/XSTest", None, "train"),
    ),
    "or-bench": PromptSet(_OR_BENCH, "safe", ("bench-llm/or-bench", "or-bench-80k", "train")),
    "or-bench-hard": PromptSet(
        _OR_BENCH, "safe", ("bench-llm/or-bench", "or-bench-hard-1k", "train")
    ),
    "or-bench-toxic": PromptSet(
        _OR_BENCH, "unsafe", ("bench-llm/or-bench", "or-bench-toxic", "train")
    ),
    "advbench": PromptSet({"text": "goal"}, "unsafe"),
    "harmbench": PromptSet({"text": "Behavior", "category": "SemanticCategory"}, "unsafe"),
    "jailbreakbench": PromptSet(_JBB, "unsafe", (_JBB_HUB, "behaviors", "harmful")),
    "jailbreakbench-benign": PromptSet(_JBB, "safe", (_JBB_HUB, "behaviors", "benign")),
    "strongreject": PromptSet({"text": "forbidden_prompt", "category": "category"}, "unsafe"),
}
_CONTRAST = "contrast_"  # how XSTest names the types of its unsafe prompts


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
    contrast types are unsafe. Raises ProfileError naming the field, the value and the mend.
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
    if file is None:
        source, records = _from_hub(name, known)
    else:
        source, records = str(file), read_records(str(file), "file", split=ANY_SPLIT)
    # every row's label is checked, so that a broken file does not pass because n was small
    found = [
        AskedPrompt(
            f"{name}-{i:04d}", row["text"], _label(name, row, i, known), row.get("category", "")
        )
        for i, row in enumerate(mapped(records, source, columns, ("text",), "file"))
    ]
    return found[:n]


def _label(name: str, row: Mapping[str, str], number: int, known: PromptSet) -> Label:
    if "label" in row:
        label = row["label"].lower()
        if label not in ("safe", "unsafe"):
            raise ProfileError(
                f"file, row {number + 1}: label = {row['label']!r} is neither 'safe' nor 'unsafe':"
                " mend the row, or leave 'label' out of file_columns"
            )
        return label
    if name == "xstest" and row.get("category", "").startswith(_CONTRAST):
        return "unsafe"
    return known.label


def _from_hub(name: str, known: PromptSet) -> tuple[str, list[Record]]:
    """(what it is, its rows) of the published copy. Raises ProfileError where there is none or it
    cannot be had.
    """
    if known.hub is None:
        raise ProfileError(
            f"file = None: {name!r} is read from a file only: download it from its authors and give"
            " its path"
        )
    repository, configuration, split = known.hub
    source = "/".join(part for part in known.hub if part)
    return source, hub_records(repository, configuration, split, None, "file")
