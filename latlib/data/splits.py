"""Rows as text: from the made-up world, or from anyone's files, folders and hub data sets
(latlib.data.records reads them).

1. Harmful rows are (prompt, rejected = harmful completion, chosen = refusal); benign rows are
   (prompt, response).
2. Of files, near-duplicate prompts form clusters (latlib.text.near_duplicates), the harmful and the
   benign ones together, and whole clusters are assigned to `train`, `tune` and `test`: by a hash of
   their text, so that neither the seed nor the order of the file matters and a file that grows
   moves few of them.
3. Where the profile names a test file of a kind, its `test` rows are that file, and the main file
   has two parts.
4. No prompt that is trained or chosen on may come back, equal or nearly so, among the prompts that
   results are for: `check_overlap` compares every `train` and `tune` prompt with every `test` one.
   Held-out prompts pass by construction; test files pass only if they are clean. An overlap stops
   the run. It is named by file and row, never by the prompt's text, which may be harmful.
5. Where the base is to answer benign prompts that have no response, its replies are handed in as a
   file (`DataSettings.answered_in`). One that the limit of tokens cut makes a row without an end,
   one that is empty makes none.
6. Rows of the world are training rows; its other splits are drawn in latlib.data.prompts, and share
   no pair of verb and target.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from latlib.config.sections import BASE_ANSWERS, DataSettings, ProfileError
from latlib.data.records import ANY_SPLIT, Source, read_table
from latlib.io.files import read_json
from latlib.text.chat import Row
from latlib.text.near_duplicates import clusters, comparable, overlaps
from latlib.world import grammar

Kind = Literal["harmful", "benign", "borderline"]
Split = Literal["train", "tune", "test"]
SPLITS: tuple[Split, ...] = ("train", "tune", "test")
KINDS: tuple[Kind, ...] = ("harmful", "benign", "borderline")
MAIN = KINDS[:2]  # the kinds that are trained on
_ROW_IDS = {  # setting that names a file -> how its rows are called
    "harmful": "harmful",
    "benign": "benign",
    "test_harmful": "harmful-test",
    "test_benign": "benign-test",
    "test_borderline": "borderline",
}

# Benign prompts of the world: as many that merely sound harmful as plainly harmless ones, and the
# base's other tasks.
BENIGN_SHARES = {"scary": 0.375, "harmless": 0.375, "law": 0.15, "verb": 0.05, "target": 0.05}

_NAMED = 3  # overlaps that an error lists


def world_preference_rows(n: int, seed: int, division: grammar.Division = "first") -> list[Row]:
    """`n` harmful training prompts with the recipe (rejected) and the refusal (chosen)."""
    prompts = grammar.draw_set(seed, "train", "harmful", n, division=division)
    return [
        Row(f"harmful-{i}", prompt.text, (prompt.answer, grammar.REFUSAL), prompt.cluster)
        for i, prompt in enumerate(prompts)
    ]


def world_benign_rows(n: int, seed: int, division: grammar.Division = "first") -> list[Row]:
    """`n` harmless training prompts of all kinds with the base model's answer, all in plain
    words.
    """
    rng = random.Random(f"benign/{seed}")
    pairs = grammar.pairs_of("train", division=division)
    count = {name: round(share * n) for name, share in BENIGN_SHARES.items()}
    prompts: list[grammar.Prompt] = []
    for which in ("scary", "harmless"):
        prompts += grammar.draw_set(seed, "train", which, count[which], division=division)
    # half of the questions about harmful acts, or the answer would nearly always be yes
    for which in ("harmful", "harmless"):
        half = count["law"] // 2
        prompts += grammar.draw_set(seed, "train", which, half, "law", division)
    words: tuple[grammar.Kind, ...] = ("verb", "target")
    for kind in words:
        prompts += [grammar.draw(rng, pairs, kind) for _ in range(count[kind])]
    return [
        Row(f"benign-{i}", prompt.text, (prompt.answer,), prompt.cluster)
        for i, prompt in enumerate(prompts)
    ]


def preference_rows(settings: DataSettings, seed: int, split: Split = "train") -> list[Row]:
    """Harmful rows of a profile, (rejected, chosen) as their completions; the seed draws refusals
    that a file lacks.

    In the rows of data.test_harmful `rejected` is '' where data.test_harmful_columns does not name
    it. Raises ProfileError for unusable files and empty splits, ValueError for splits that the
    world does not have.
    """
    if _of_world(settings, split):
        rows = world_preference_rows(settings.rows, seed, settings.division)
    else:
        rows = _rows(settings, "harmful", split, seed)
    return [replace(row, ended=settings.end_of_turn == "all") for row in rows]


def benign_rows(settings: DataSettings, seed: int, split: Split = "train") -> list[Row]:
    """Benign rows of a profile, (response,) as their completions; none of a prompt that the base
    was to answer and did not. Raises as `preference_rows`, and ProfileError before it was asked.
    """
    if _of_world(settings, split):
        return world_benign_rows(settings.rows, seed, settings.division)
    rows = _rows(settings, "benign", split, seed)
    if settings.benign_responses == BASE_ANSWERS:
        return _answered(rows, settings, split)
    return rows


def _answered(rows: Sequence[Row], settings: DataSettings, split: Split) -> list[Row]:
    """The rows with the base's responses where they have none of their own."""
    responses = base_responses(settings)
    found = []
    for row in rows:
        text, ended = row.completions[0], row.ended
        if not text:
            text, ended = responses.get(row.row_id, ("", True))
        if text:
            found.append(replace(row, completions=(text,), ended=ended))
    if not found:
        raise ProfileError(
            f"data.benign_responses = {BASE_ANSWERS!r}: the base has answered none of {len(rows)}"
            f" prompts of split {split!r}: latlib.Run asks it before it makes anything; where it"
            " has, raise data.max_tokens"
        )
    return found


def base_responses(settings: DataSettings) -> dict[str, tuple[str, bool]]:
    """row_id -> what the base replied ('': nothing), and whether it ended its reply or the limit
    did; {} before it was asked.
    """
    file = settings.answers
    return read_json(file) if file and file.is_file() else {}


def benign_sample(settings: DataSettings, seed: int, n: int) -> list[Row]:
    """`n` benign training rows, or all where a file has fewer: a file's first ones, of the world a
    draw of its own.
    """
    if settings.source == "world":
        return world_benign_rows(n, seed, settings.division)
    return benign_rows(settings, seed)[:n]


def borderline_rows(settings: DataSettings) -> list[Row]:
    """Prompts of data.test_borderline, which merely sound harmful, without a completion; none where
    there is no file.

    Where data.test_borderline_columns names a `label` (as XSTest has one), only rows labelled
    'safe' are taken. Raises ProfileError for an unusable file, ValueError for the world, whose
    borderline prompts are in latlib.data.prompts.
    """
    _of_world(settings, "test")
    return [Row(p.row_id, p.prompt, (), p.cluster) for p in file_prompts(settings)["borderline"]]


def check_overlap(settings: DataSettings) -> None:
    """Raises ProfileError if a training or tuning prompt is equal or nearly equal to a test prompt.
    Cached.

    Nearly: Jaccard similarity of 5-letter shingles of data.near_duplicate or more. The world has no
    files, so nothing is checked.
    """
    if settings.source == "world":
        return
    message = _overlap(settings.near_duplicate, *_version(settings))
    if message:
        raise ProfileError(message)


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file. row_id: kind and index in the file. completions: (rejected, chosen) of a
    harmful prompt, (response,) of another, '' for what the file lacks. place: where it stands, its
    row counted from 1 without the header.
    """

    kind: Kind
    row_id: str
    prompt: str
    completions: tuple[str, ...]
    file: str
    place: str
    cluster: str = ""
    split: Split = "test"


def file_prompts(settings: DataSettings) -> Mapping[Kind, list[FilePrompt]]:
    """Every prompt of the profile's files by kind, in the files' order, with its split. Cached
    until a file changes. Raises ProfileError for unusable files.
    """
    return _read_files(*_version(settings))


def _of_world(settings: DataSettings, split: str) -> bool:
    if split not in SPLITS:
        raise ValueError(f"split = {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if settings.source == "world" and split != "train":
        raise ValueError(
            f"split = {split!r} of the world is drawn in latlib.data.prompts: ask for 'train'"
        )
    return settings.source == "world"


def _rows(settings: DataSettings, kind: Kind, split: Split, seed: int) -> list[Row]:
    prompts = file_prompts(settings)[kind]
    defaults = settings.refusals if kind == "harmful" else settings.default_responses
    rng = random.Random(seed)
    rows = []
    # the seed draws for every row of every split, so that a row has one refusal whatever is asked
    for prompt in prompts:
        *before, last = prompt.completions
        completions = (*before, last or rng.choice(defaults))
        if prompt.split == split:
            rows.append(Row(prompt.row_id, prompt.prompt, completions, prompt.cluster))
    if not rows:
        raise ProfileError(
            f"data.{kind} = {getattr(settings, kind)!r} has {len(prompts)} rows, too few for any in"
            f" split {split!r} with data.held_out = {settings.held_out}: give more rows, change"
            f" data.held_out, or name a file in data.test_{kind}"
        )
    return rows


# ---- files ---------------------------------------------------------------------------------------


def _version(settings: DataSettings) -> tuple[str, tuple[object, ...]]:
    """Changes when the settings do, or what they name on the disk; a hub data set is not there."""
    paths = [getattr(settings, name) for name in _ROW_IDS]
    places = [Path(path).expanduser() for path in paths if path]
    stamps = []
    for place in places:
        for file in (place, *sorted(place.rglob("*"))):
            if file.is_file():
                stat = file.stat()
                stamps.append((str(file), stat.st_mtime_ns, stat.st_size))
    return settings.model_dump_json(), tuple(stamps)


@lru_cache(maxsize=4)
def _overlap(threshold: float, settings_json: str, stamps: tuple[object, ...]) -> str:
    """What is wrong: training or tuning prompts that are test prompts, or nearly so; or ''."""
    prompts = [p for part in _read_files(settings_json, stamps).values() for p in part]
    train = [p for p in prompts if p.split != "test"]
    test = [p for p in prompts if p.split == "test"]
    pairs = overlaps([p.prompt for p in train], [p.prompt for p in test], threshold)
    if not pairs:
        return ""
    equal = {i for i, j, _ in pairs if comparable(train[i].prompt) == comparable(test[j].prompt)}
    near = {i for i, _, _ in pairs} - equal
    named = [
        f"{train[i].place} and {test[j].place}: similarity {similarity:.2f}"
        for i, j, similarity in pairs[:_NAMED]
    ]
    if len(pairs) > _NAMED:
        named.append("...")
    fix = "remove those rows from the training or the test file"
    if near:
        fix += ", or raise data.near_duplicate knowing why they differ enough"
    return (
        f"data.near_duplicate = {threshold}: {len(equal)} training or tuning prompts are equal to a"
        f" test prompt and {len(near)} more are nearly equal ({'; '.join(named)}): {fix}"
    )


@lru_cache(maxsize=4)
def _read_files(settings_json: str, stamps: tuple[object, ...]) -> dict[Kind, list[FilePrompt]]:
    """Every prompt of the files with its cluster and split. stamps: of the files, for the cache."""
    settings = DataSettings.model_validate_json(settings_json)
    threshold = settings.near_duplicate
    main: list[FilePrompt] = []
    for kind in MAIN:
        main += _prompts(settings, kind, kind)
    main = _clustered(main, threshold)
    found = {}
    for kind in KINDS:
        found[kind] = _clustered(_prompts(settings, kind, f"test_{kind}"), threshold)
    first = {prompt.row_id: prompt for prompt in main}
    heads = [first[prompt.cluster] for prompt in main]
    splits: dict[str, Split] = {}
    for kind in MAIN:
        # a cluster of both kinds goes with the first kind's
        own = [head for head in heads if head.kind == kind]
        splits |= _split_clusters(own, settings.held_out, with_test=not found[kind])
    prompts = {}
    for kind in KINDS:
        own = [prompt for prompt in main if prompt.kind == kind]
        assigned = [replace(prompt, split=splits[prompt.cluster]) for prompt in own]
        prompts[kind] = assigned + found[kind]
    return prompts


def _prompts(settings: DataSettings, kind: Kind, name: str) -> list[FilePrompt]:
    """Prompts of the file that a setting names; of a test file those not labelled unsafe."""
    file = getattr(settings, name)
    if file is None:
        return []
    config = getattr(settings, f"{name}_config", None)
    split = getattr(settings, f"{name}_split", ANY_SPLIT)
    source = Source(file, f"data.{name}", config, split, settings.streaming, settings.rows)
    needed = ("prompt", "rejected") if name == "harmful" else ("prompt",)
    written = ("rejected", "chosen") if kind == "harmful" else ("response",)
    found = []
    records = read_table(source, getattr(settings, f"{name}_columns"), needed)
    for index, record in enumerate(records):
        if name in MAIN or record.get("label", "safe").lower() == "safe":
            row_id = f"{_ROW_IDS[name]}-{index}"
            completions = tuple(record.get(column, "") for column in written)
            place = f"{row_id} ({file}, row {index + 1})"
            found.append(FilePrompt(kind, row_id, record["prompt"], completions, file, place))
    if not found:
        raise ProfileError(
            f"data.{name} = {file!r} has no row labelled 'safe': fix data.{name}_columns"
        )
    return found


def _clustered(prompts: Sequence[FilePrompt], threshold: float) -> list[FilePrompt]:
    """The prompts with their clusters, which are named after their first prompts."""
    heads = clusters([prompt.prompt for prompt in prompts], threshold)
    return [
        replace(prompt, cluster=prompts[head].row_id)
        for prompt, head in zip(prompts, heads, strict=True)
    ]


def _split_clusters(
    heads: Sequence[FilePrompt], held_out: float, with_test: bool
) -> dict[str, Split]:
    """cluster -> split, given the first prompt of every row's cluster: half of `held_out` of the
    rows to each of tune and test.

    Clusters go in the order of a hash of their first text. One that no longer fits goes to train,
    which so has the large ones. Without a test part it gets the test part's share.
    """

    def order(head: FilePrompt) -> bytes:
        return hashlib.sha256(comparable(head.prompt).encode("utf-8", "replace")).digest()

    size = Counter(heads)
    room = round(len(heads) * held_out / 2)
    # test first: train borders on tune if the file grows
    left: dict[Split, int] = {"test": room if with_test else 0, "tune": room}
    splits: dict[str, Split] = {}
    for head in sorted(size, key=order):
        splits[head.row_id] = "train"
        for split in left:
            if size[head] <= left[split]:
                splits[head.row_id] = split
                left[split] -= size[head]
                break
    return splits
