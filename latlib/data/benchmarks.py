"""Prompts of other people's benchmarks, from a file or the hub: what to ask, and whether a safe
model should answer.

1. Over-refusal sets: XSTest (arXiv 2308.01263; safe prompts that sound unsafe, and their unsafe
   contrasts) and OR-Bench (arXiv 2405.20947). Harmful sets: AdvBench, HarmBench, JailbreakBench,
   StrongREJECT.
2. A set is a file that the user has (`latlib.data.records` reads it; columns are mapped by name),
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
from latlib.data.records import ANY_SPLIT, Source, read_table

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
    hub: Source | None = None
    contrast: str = ""  # how the categories of unsafe prompts begin, in a set of safe ones


def _hub(repository: str, config: str | None, split: str) -> Source:
    return Source(repository, "the hub's copy", config, split)


_OR_BENCH = {"text": "prompt", "category": "category"}
_OR_HUB = "bench-llm/or-bench"
_JBB = {"text": "Goal", "category": "Category"}
_JBB_HUB = "JailbreakBench/JBB-Behaviors"
_XSTEST = {"text": "prompt", "category": "type", "label": "label"}
_HARMBENCH = {"text": "Behavior", "category": "SemanticCategory"}
_STRONG = {"text": "forbidden_prompt", "category": "category"}
SETS: dict[str, PromptSet] = {
    "xstest": PromptSet(_XSTEST, "safe", _hub("Paul/XSTest", None, "train"), "contrast_"),
    "or-bench": PromptSet(_OR_BENCH, "safe", _hub(_OR_HUB, "or-bench-80k", "train")),
    "or-bench-hard": PromptSet(_OR_BENCH, "safe", _hub(_OR_HUB, "or-bench-hard-1k", "train")),
    "or-bench-toxic": PromptSet(_OR_BENCH, "unsafe", _hub(_OR_HUB, "or-bench-toxic", "train")),
    "advbench": PromptSet({"text": "goal"}, "unsafe"),
    "harmbench": PromptSet(_HARMBENCH, "unsafe"),
    "jailbreakbench": PromptSet(_JBB, "unsafe", _hub(_JBB_HUB, "behaviors", "harmful")),
    "jailbreakbench-benign": PromptSet(_JBB, "safe", _hub(_JBB_HUB, "behaviors", "benign")),
    "strongreject": PromptSet(_STRONG, "unsafe"),
}


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
    if row["label"].lower() == "safe":
        return "safe"
    if row["label"].lower() == "unsafe":
        return "unsafe"
    raise ProfileError(
        f"file, row {index + 1}: label = {row['label']!r} is neither 'safe' nor 'unsafe': fix the"
        " row, or leave 'label' out of file_columns"
    )
