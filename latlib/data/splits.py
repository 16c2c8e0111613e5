"""Rows as text: from the made-up world, or from anyone's files, folders and hub data sets
(latlib.data.records reads them).

1. Harmful rows are (prompt, rejected = harmful completion, chosen = refusal); benign rows are
   (prompt, response).
2. Of files, near-duplicate prompts form clusters (latlib.text.near_duplicates), the harmful and the
   benign ones together, and whole clusters are dealt into `train`, `tune` and `test`: by a hash of
   their text, so that neither the seed nor the order of the file matters and a file that grows
   moves few of them.
3. Where the profile names a test file of a kind, its `test` rows are that file, and the main file
   has two parts.
4. Rows of the world are training rows; its other splits are drawn in latlib.evaluation.ask.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latlib.config.profile import DataSettings, ProfileError
from latlib.data.records import ANY_SPLIT, Source, read_table
from latlib.text.chat import Row
from latlib.text.near_duplicates import clusters, normalised
from latlib.world import grammar

Kind = Literal["harmful", "benign", "borderline"]
Split = Literal["train", "tune", "test"]
SPLITS = ("train", "tune", "test")

# Benign prompts of the world: as many that merely sound harmful as plainly harmless ones, and the
# base's other tasks.
BENIGN_SHARES = {"scary": 0.375, "harmless": 0.375, "law": 0.15, "verb": 0.05, "target": 0.05}


def world_preference_rows(n: int, seed: int) -> list[Row]:
    """`n` harmful training prompts with the recipe (rejected) and the refusal (chosen)."""
    prompts = grammar.draw_set(seed, "train", "harmful", n)
    return [
        Row(f"harmful-{i}", p.text, (p.answer, grammar.REFUSAL), p.cluster)
        for i, p in enumerate(prompts)
    ]


def world_benign_rows(n: int, seed: int) -> list[Row]:
    """`n` harmless training prompts of all kinds with the base model's answer, all in plain
    words.
    """
    rng = random.Random(f"benign/{seed}")
    prompts: list[grammar.Prompt] = []
    for name, share in BENIGN_SHARES.items():
        count = round(share * n)
        # half of the questions about harmful acts, or the answer would nearly always be yes
        if name == "law":
            for which in ("harmful", "harmless"):
                prompts += grammar.draw_set(seed, "train", which, count // 2, "law")
        elif name in ("verb", "target"):
            prompts += [grammar.draw(rng, grammar.pairs_of("train"), name) for _ in range(count)]
        else:
            prompts += grammar.draw_set(seed, "train", name, count)
    return [Row(f"benign-{i}", p.text, (p.answer,), p.cluster) for i, p in enumerate(prompts)]


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
    borderline prompts are in latlib.evaluation.ask.
    """
    if settings.source == "world":
        raise ValueError(
            "the world's borderline prompts are drawn in latlib.evaluation.ask, not read from a"
            " file"
        )
    return [Row(p.row_id, p.prompt, (), p.cluster) for p in file_prompts(settings)["borderline"]]


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file. row_id: kind and index in the file. completion: rejected or response, ''
    if it has none. chosen: the file's refusal, '' if it has none. file, number: where it stands,
    counted from 1 without the header."""

    row_id: str
    prompt: str
    completion: str
    chosen: str
    cluster: str
    split: Split
    file: str
    number: int


def file_prompts(settings: DataSettings, first: Kind = "harmful") -> dict[Kind, list[FilePrompt]]:
    """Every prompt of the profile's files by kind, in the files' order, dealt into splits. Cached
    per settings.

    Raises ProfileError for unusable files, the main file of the kind `first` before the other.
    """
    key = (settings.model_dump_json(), *(_stamp(path) for path in _sources(settings)))
    if key not in _DEALT:
        while len(_DEALT) >= _KEPT:
            _DEALT.pop(next(iter(_DEALT)))
        _DEALT[key] = _dealt(settings, first)
    return _DEALT[key]


_DEALT: dict[tuple, dict[Kind, list[FilePrompt]]] = {}
_KEPT = 4
_COMPLETION = {"harmful": "rejected", "benign": "response", "borderline": "response"}


def _of_world(settings: DataSettings, split: str) -> bool:
    if split not in SPLITS:
        raise ValueError(f"split = {split!r} is unknown: choose one of {', '.join(SPLITS)}")
    if settings.source == "world" and split != "train":
        raise ValueError(
            f"split = {split!r} of the world is drawn in latlib.evaluation.ask: ask for 'train'"
        )
    return settings.source == "world"


def _rows(settings: DataSettings, kind: Kind, split: Split, seed: int) -> list[Row]:
    own = settings.harmful if kind == "harmful" else settings.benign
    prompts = file_prompts(settings, kind)[kind]
    rng = random.Random(seed)
    defaults = settings.refusals if kind == "harmful" else settings.benign_responses
    rows = []
    # the seed draws for every row of every split, so that a row has one refusal whatever is asked
    for p in prompts:
        if kind == "harmful":
            completions = (p.completion, p.chosen or rng.choice(defaults))
        else:
            completions = (p.completion or rng.choice(defaults),)
        if p.split == split:
            rows.append(Row(p.row_id, p.prompt, completions, p.cluster))
    if not rows:
        raise ProfileError(
            f"data.{kind} = {own!r} has {len(prompts)} rows, too few for any in split {split!r}"
            f" with data.held_out = {settings.held_out}: give more rows, change data.held_out, or"
            f" name a file in data.test_{kind}"
        )
    return rows


def _sources(settings: DataSettings) -> tuple[str | None, ...]:
    return (
        settings.harmful,
        settings.benign,
        settings.test_harmful,
        settings.test_benign,
        settings.test_borderline,
    )


def _stamp(path: str | None) -> tuple:
    """Changes when what is on the disk does; a hub data set has none."""
    place = Path(path).expanduser() if path else None
    if place is None or not place.exists():
        return ()
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    return tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)


def _main(settings: DataSettings, kind: Kind) -> list[dict[str, str]]:
    """Records of a kind's main file."""
    path, columns, config, split = (
        getattr(settings, kind + end) for end in ("", "_columns", "_config", "_split")
    )
    if path is None:
        return []
    source = Source(path, f"data.{kind}", config, split, settings.streaming, settings.rows)
    needed = ("prompt", "rejected") if kind == "harmful" else ("prompt",)
    return read_table(source, columns, needed)


def _test(settings: DataSettings, kind: Kind) -> list[FilePrompt] | None:
    """Prompts of a kind's test file, if there is one."""
    path, columns = getattr(settings, f"test_{kind}"), getattr(settings, f"test_{kind}_columns")
    if path is None:
        return None
    field = f"data.test_{kind}"
    source = Source(path, field, None, ANY_SPLIT, settings.streaming, settings.rows)
    records = read_table(source, columns, ("prompt",))
    numbered = [(i, r) for i, r in enumerate(records) if r.get("label", "safe").lower() == "safe"]
    if not numbered:
        raise ProfileError(f"{field} = {path!r} has no row labelled 'safe': mend {field}_columns")
    head = "borderline" if kind == "borderline" else f"{kind}-test"
    labels = clusters([r["prompt"] for _, r in numbered], settings.near_duplicate)
    return [
        _prompt(kind, f"{head}-{i}", r, f"{head}-{numbered[label][0]}", "test", path, i)
        for (i, r), label in zip(numbered, labels)
    ]


def _prompt(kind, row_id, record, cluster, split, path, index) -> FilePrompt:
    completion, chosen = record.get(_COMPLETION[kind], ""), record.get("chosen", "")
    return FilePrompt(row_id, record["prompt"], completion, chosen, cluster, split, path, index + 1)


def _dealt(settings: DataSettings, first: Kind) -> dict[Kind, list[FilePrompt]]:
    kinds: tuple[Kind, ...] = ("harmful", "benign")
    main = {kind: _main(settings, kind) for kind in sorted(kinds, key=lambda kind: kind != first)}
    records = [(kind, i, r) for kind in kinds for i, r in enumerate(main[kind])]
    texts = [r["prompt"] for _, _, r in records]
    labels = clusters(texts, settings.near_duplicate)
    tests = {kind: _test(settings, kind) for kind in (*kinds, "borderline")}
    splits = {}
    for kind in kinds:  # a cluster of both kinds is dealt with the first kind's
        own = [(text, label) for text, label in zip(texts, labels) if records[label][0] == kind]
        splits |= deal(own, settings.held_out, tests[kind] is None)
    out: dict[Kind, list[FilePrompt]] = {kind: [] for kind in kinds}
    for (kind, i, record), label in zip(records, labels):
        cluster = "{}-{}".format(*records[label])
        path = getattr(settings, kind)
        out[kind].append(_prompt(kind, f"{kind}-{i}", record, cluster, splits[label], path, i))
    return {kind: out.get(kind, []) + (tests[kind] or []) for kind in tests}


def deal(labelled: Sequence[tuple[str, int]], held_out: float, with_test: bool) -> dict[int, Split]:
    """cluster -> split, given (text, cluster) of every row: half of `held_out` of the rows to each
    of tune and test.

    Clusters go in the order of a hash of their first text. One that no longer fits goes to train,
    which so has the large ones. Without a test part it gets the test part's share.
    """
    size, order = defaultdict(int), {}
    for text, label in labelled:
        size[label] += 1
        order.setdefault(
            label, hashlib.sha256(normalised(text).encode("utf-8", "replace")).digest()
        )
    room = round(len(labelled) * held_out / 2)
    # test first: train borders on tune if the file grows
    left = {"test": room if with_test else 0, "tune": room}
    splits: dict[int, Split] = {}
    for label in sorted(order, key=order.get):
        split = next((s for s in ("test", "tune") if size[label] <= left[s]), "train")
        splits[label] = split
        if split != "train":
            left[split] -= size[label]
    return splits
