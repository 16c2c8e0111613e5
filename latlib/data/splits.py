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
5. Rows of the world are training rows; its other splits are drawn in latlib.data.prompts, and share
   no pair of verb and target.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from latlib.config.profile import Profile
from latlib.config.sections import DataSettings, ProfileError
from latlib.data.records import ANY_SPLIT, Source, read_table
from latlib.text.chat import Row
from latlib.text.near_duplicates import clusters, comparable, overlaps
from latlib.world import grammar

Kind = Literal["harmful", "benign", "borderline"]
Split = Literal["train", "tune", "test"]
SPLITS: tuple[Split, ...] = ("train", "tune", "test")
KINDS: tuple[Kind, ...] = ("harmful", "benign", "borderline")
MAIN = KINDS[:2]  # the kinds that are trained on

# Benign prompts of the world: as many that merely sound harmful as plainly harmless ones, and the
# base's other tasks.
BENIGN_SHARES = {"scary": 0.375, "harmless": 0.375, "law": 0.15, "verb": 0.05, "target": 0.05}

_NAMED = 3  # overlaps that an error lists


def world_preference_rows(n: int, seed: int) -> list[Row]:
    """`n` harmful training prompts with the recipe (rejected) and the refusal (chosen)."""
    rows = []
    for i, prompt in enumerate(grammar.draw_set(seed, "train", "harmful", n)):
        completions = (prompt.answer, grammar.REFUSAL)
        rows.append(Row(f"harmful-{i}", prompt.text, completions, prompt.cluster))
    return rows


def world_benign_rows(n: int, seed: int) -> list[Row]:
    """`n` harmless training prompts of all kinds with the base model's answer, all in plain
    words.
    """
    rng = random.Random(f"benign/{seed}")
    pairs = grammar.pairs_of("train")
    prompts: list[grammar.Prompt] = []
    for name, share in BENIGN_SHARES.items():
        count = round(share * n)
        # half of the questions about harmful acts, or the answer would nearly always be yes
        if name == "law":
            for which in ("harmful", "harmless"):
                prompts += grammar.draw_set(seed, "train", which, count // 2, "law")
        elif name == "verb":
            prompts += [grammar.draw(rng, pairs, "verb") for _ in range(count)]
        elif name == "target":
            prompts += [grammar.draw(rng, pairs, "target") for _ in range(count)]
        else:
            prompts += grammar.draw_set(seed, "train", name, count)
    rows = []
    for i, prompt in enumerate(prompts):
        rows.append(Row(f"benign-{i}", prompt.text, (prompt.answer,), prompt.cluster))
    return rows


def preference_rows(settings: DataSettings, seed: int, split: Split = "train") -> list[Row]:
    """Harmful rows of a profile, (rejected, chosen) as their completions; the seed draws refusals
    that a file lacks.

    In the rows of data.test_harmful `rejected` is '' where data.test_harmful_columns does not name
    it. Raises ProfileError for unusable files and empty splits, ValueError for splits that the
    world does not have.
    """
    if _of_world(settings, split):
        return world_preference_rows(settings.rows, seed)
    return _rows(settings, "harmful", split, seed)


def benign_rows(settings: DataSettings, seed: int, split: Split = "train") -> list[Row]:
    """Benign rows of a profile, (response,) as their completions. Raises as `preference_rows`."""
    if _of_world(settings, split):
        return world_benign_rows(settings.rows, seed)
    return _rows(settings, "benign", split, seed)


def benign_sample(settings: DataSettings, seed: int, n: int) -> list[Row]:
    """`n` benign training rows, or all where a file has fewer: a file's first ones, of the world a
    draw of its own.
    """
    if settings.source == "world":
        return world_benign_rows(n, seed)
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


def check_overlap(settings: DataSettings | Profile) -> None:
    """Raises ProfileError if a training or tuning prompt is equal or nearly equal to a test prompt.
    Cached.

    Nearly: Jaccard similarity of 5-letter shingles of data.near_duplicate or more. The world has no
    files, so nothing is checked.
    """
    data = settings.data if isinstance(settings, Profile) else settings
    if data.source == "world":
        return
    message = _files(data).overlap
    if message:
        raise ProfileError(message)


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file. row_id: kind and index in the file. record: its row under our names.
    file, number: where it stands, counted from 1 without the header.
    """

    kind: Kind
    row_id: str
    record: Mapping[str, str]
    cluster: str
    split: Split
    file: str
    number: int

    @property
    def prompt(self) -> str:
        """What is asked."""
        return self.record["prompt"]

    @property
    def completion(self) -> str:
        """Its harmful completion or its response; '' if it has none."""
        return self.record.get("rejected" if self.kind == "harmful" else "response", "")

    @property
    def chosen(self) -> str:
        """Its refusal; '' if it has none."""
        return self.record.get("chosen", "")

    @property
    def place(self) -> str:
        """Where it stands, for errors."""
        return f"{self.row_id} ({self.file}, row {self.number})"


def file_prompts(settings: DataSettings) -> Mapping[Kind, list[FilePrompt]]:
    """Every prompt of the profile's files by kind, in the files' order, with its split. Cached
    until a file changes. Raises ProfileError for unusable files.
    """
    return _files(settings).prompts


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
    rng = random.Random(seed)
    rows = []
    # the seed draws for every row of every split, so that a row has one refusal whatever is asked
    for prompt in prompts:
        completions: tuple[str, ...]
        if kind == "harmful":
            refusal = prompt.chosen or rng.choice(settings.refusals)
            completions = (prompt.completion, refusal)
        else:
            completions = (prompt.completion or rng.choice(settings.benign_responses),)
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


@dataclass(frozen=True)
class _Files:
    """The prompts of a profile's files, and whether they overlap."""

    prompts: Mapping[Kind, list[FilePrompt]]
    threshold: float

    @cached_property
    def overlap(self) -> str:
        """What is wrong: training or tuning prompts that are test prompts, or nearly so; or ''."""
        train: list[FilePrompt] = []
        test: list[FilePrompt] = []
        for prompts in self.prompts.values():
            for prompt in prompts:
                (test if prompt.split == "test" else train).append(prompt)
        pairs = overlaps([p.prompt for p in train], [p.prompt for p in test], self.threshold)
        if not pairs:
            return ""
        touched = {i for i, _, _ in pairs}
        equal = {
            i for i, j, _ in pairs if comparable(train[i].prompt) == comparable(test[j].prompt)
        }
        named = []
        for i, j, similarity in pairs[:_NAMED]:
            named.append(f"{train[i].place} and {test[j].place}: similarity {similarity:.2f}")
        if len(pairs) > _NAMED:
            named.append("...")
        fix = "remove those rows from the training or the test file"
        if touched - equal:
            fix += ", or raise data.near_duplicate knowing why they differ enough"
        return (
            f"data.near_duplicate = {self.threshold}: {len(equal)} training or tuning prompts are"
            f" equal to a test prompt and {len(touched - equal)} more are nearly equal"
            f" ({'; '.join(named)}): {fix}"
        )


def _files(settings: DataSettings) -> _Files:
    names = (*MAIN, *(f"test_{kind}" for kind in KINDS))
    stamps = tuple(_stamp(getattr(settings, name)) for name in names)
    return _read_files(settings.model_dump_json(), stamps)


def _stamp(path: str | None) -> tuple[object, ...]:
    """Changes when what is on the disk does; a hub data set has none."""
    if path is None:
        return ()
    place = Path(path).expanduser()
    files = [file for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@lru_cache(maxsize=4)
def _read_files(settings_json: str, stamps: tuple[object, ...]) -> _Files:
    """Every prompt of the files with its cluster and split. stamps: of the files, for the cache."""
    settings = DataSettings.model_validate_json(settings_json)
    main = []
    for kind in MAIN:
        file = getattr(settings, kind)
        for index, record in enumerate(_records(settings, kind)):
            row_id = f"{kind}-{index}"
            main.append(FilePrompt(kind, row_id, record, "", "train", file, index + 1))
    texts = [prompt.prompt for prompt in main]
    heads = clusters(texts, settings.near_duplicate)
    found = {kind: _test_prompts(settings, kind) for kind in KINDS}
    splits: dict[int, Split] = {}
    for kind in MAIN:
        # a cluster of both kinds goes with the first kind's
        own = [head for head in heads if main[head].kind == kind]
        splits |= _split_clusters(own, texts, settings.held_out, with_test=not found[kind])
    assigned: dict[Kind, list[FilePrompt]] = {kind: [] for kind in KINDS}
    for prompt, head in zip(main, heads, strict=True):
        cluster = main[head].row_id
        assigned[prompt.kind].append(replace(prompt, cluster=cluster, split=splits[head]))
    for kind, prompts in found.items():
        assigned[kind] += prompts
    return _Files(assigned, settings.near_duplicate)


def _records(settings: DataSettings, name: str) -> list[dict[str, str]]:
    """Records of the file that a setting names; none where it names none."""
    path = getattr(settings, name)
    if path is None:
        return []
    config = getattr(settings, f"{name}_config", None)
    split = getattr(settings, f"{name}_split", ANY_SPLIT)
    source = Source(path, f"data.{name}", config, split, settings.streaming, settings.rows)
    needed = ("prompt", "rejected") if name == "harmful" else ("prompt",)
    return read_table(source, getattr(settings, f"{name}_columns"), needed)


def _test_prompts(settings: DataSettings, kind: Kind) -> list[FilePrompt]:
    """Prompts of a kind's test file that are not labelled unsafe."""
    records = _records(settings, f"test_{kind}")
    safe = [i for i, r in enumerate(records) if r.get("label", "safe").lower() == "safe"]
    file = getattr(settings, f"test_{kind}")
    if records and not safe:
        field = f"data.test_{kind}"
        raise ProfileError(f"{field} = {file!r} has no row labelled 'safe': fix {field}_columns")
    name = "borderline" if kind == "borderline" else f"{kind}-test"
    heads = clusters([records[i]["prompt"] for i in safe], settings.near_duplicate)
    prompts = []
    for index, head in zip(safe, heads, strict=True):
        row_id = f"{name}-{index}"
        cluster = f"{name}-{safe[head]}"
        record = records[index]
        prompts.append(FilePrompt(kind, row_id, record, cluster, "test", file, index + 1))
    return prompts


def _split_clusters(
    heads: Sequence[int], texts: Sequence[str], held_out: float, with_test: bool
) -> dict[int, Split]:
    """cluster -> split, given the cluster of every row, which is the index of its first text: half
    of `held_out` of the rows to each of tune and test.

    Clusters go in the order of a hash of their first text. One that no longer fits goes to train,
    which so has the large ones. Without a test part it gets the test part's share.
    """

    def order(head: int) -> bytes:
        return hashlib.sha256(comparable(texts[head]).encode("utf-8", "replace")).digest()

    size = Counter(heads)
    room = round(len(heads) * held_out / 2)
    # test first: train borders on tune if the file grows
    left: dict[Split, int] = {"test": room if with_test else 0, "tune": room}
    splits: dict[int, Split] = {}
    for head in sorted(size, key=order):
        splits[head] = "train"
        for split in left:
            if size[head] <= left[split]:
                splits[head] = split
                left[split] -= size[head]
                break
    return splits
