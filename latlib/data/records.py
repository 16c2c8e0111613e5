"""Records of text under our names, from files, from folders of a data set, and from the hub.

1. A source is a CSV, JSON, JSONL or parquet file; a folder that the package `datasets` wrote or can
   read; or the id owner/name of a data set on the hub.
2. It is read whole, or, streaming, row by row up to the number of rows that is asked for.
   `datasets` is imported only where it is needed, and what it or the hub refuses is said as field,
   value and mend.
3. `columns` maps our name to a column, or to a format string over the record such as
   "{instruction}\\n{input}" or "{messages[1][content]}". None and NaN are ''. A column or key that
   is not there is an error that lists what is.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from latlib.config.sections import ProfileError

Record = Mapping[str, Any]
SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
ANY_SPLIT = "test, or the only one"  # for sets that may be published whole, as benchmarks are
_PLACE = re.compile(r"([^\[\]{}]+)((?:\[[^\[\]{}]+\])*)")  # name[key][key]


def read_table(
    path: str,
    columns: Mapping[str, str],
    needed: Sequence[str],
    field: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    rows: int | None = None,
) -> list[dict[str, str]]:
    """The first `rows` records of a file, a data set's folder or a hub id under our names.

    columns: our name -> column or format string. needed: which of ours may not be empty. config,
    split: of a folder or hub id. Raises ProfileError naming the field when the source is missing,
    unreadable, gated or empty, or lacks a column or a value.
    """
    return mapped(
        read_records(path, field, config, split, streaming, rows), path, columns, needed, field
    )


def read_records(
    path: str,
    field: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    rows: int | None = None,
) -> list[Record]:
    """The first `rows` records with all their columns, from wherever `path` is. Raises ProfileError
    as read_table.
    """
    place = Path(path).expanduser()
    if place.is_file() and not streaming:
        try:
            records = list(itertools.islice(_file_records(place, rows), rows))
        except (ValueError, OSError) as error:
            raise ProfileError(f"{field} = {path!r} cannot be read: {error}") from None
    elif place.is_file():
        if place.suffix not in SUFFIXES:
            raise ProfileError(f"{field} = {path!r} cannot be read: {_unknown(place)}")
        kind = "json" if place.suffix == ".jsonl" else place.suffix[1:]
        records = hub_records(kind, None, "train", path, field, True, rows, data_files=str(place))
    elif place.is_dir():
        records = hub_records(str(place), config, split, path, field, streaming, rows)
    elif is_hub_id(path):
        records = hub_records(path, config, split, path, field, streaming, rows)
    else:
        raise ProfileError(
            f"{field} = {path!r} is not a file: check the path, or give a hub id such as owner/name"
        )
    if not records:
        raise ProfileError(f"{field} = {path!r} holds no rows: give a file that has some")
    return records


def is_hub_id(path: str) -> bool:
    """Whether a source that is not on this machine reads as owner/name and not as a path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and Path(path).suffix not in SUFFIXES


def hub_records(
    source: str,
    config: str | None,
    split: str,
    shown: str | None,
    field: str,
    streaming: bool = False,
    rows: int | None = None,
    **options: Any,
) -> list[Record]:
    """Records of anything that `datasets.load_dataset` reads; `shown` is what the field says in
    errors.

    split: also ANY_SPLIT. Raises ProfileError where the package is missing or the data cannot be
    had.
    """
    what = shown or "/".join(part for part in (source, config, split) if part)
    subject = f"{field} = {shown!r}"
    try:
        import datasets
    except ImportError:
        raise ProfileError(
            f"{subject}, and the package `datasets` is not installed: download {what} from the hub"
            " and give the file's path, or run `pip install datasets`"
        ) from None
    failures = (
        OSError,
        ValueError,
        RuntimeError,
        getattr(getattr(datasets, "exceptions", None), "DatasetsError", OSError),
    )
    try:
        if Path(source).is_dir() and any((Path(source) / name).is_file() for name in _SAVED):
            return _saved(datasets, source, split, rows)
        if split == ANY_SPLIT:
            split = _benchmark_split(datasets.get_dataset_split_names(source, config))
        how = {**options, "split": split, **({"streaming": True} if streaming else {})}
        table = datasets.load_dataset(source, config, **how)
        if streaming:
            return list(itertools.islice(table, rows))
        table = table if rows is None else table.select(range(min(rows, len(table))))
        return table.to_pandas().to_dict("records")
    except failures as error:
        raise ProfileError(f"{subject}: {_refused(error, what, field)}") from error


# what `datasets` writes into the folders of save_to_disk
_SAVED = ("state.json", "dataset_dict.json")


def _saved(datasets, folder: str, split: str, rows: int | None) -> list[Record]:
    """Records of a folder that save_to_disk wrote; its rows stay on the disk until they are
    taken.
    """
    found = datasets.load_from_disk(folder)
    if hasattr(found, "keys"):  # several splits
        split = _benchmark_split(list(found)) if split == ANY_SPLIT else split
        if split not in found:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(found)}.")
        found = found[split]
    return list(itertools.islice(found, rows))


def _benchmark_split(names: Sequence[str]) -> str:
    if "test" in names or len(names) == 1:
        return "test" if "test" in names else names[0]
    raise ValueError(f"Unknown split 'test'. Should be one of {list(names)}.")


def _refused(error: Exception, what: str, field: str) -> str:
    """What went wrong with a data set, and the mend."""
    chain, at = [], error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    names, text = {type(e).__name__ for e in chain}, str(error).strip() or type(error).__name__
    done = "read" if Path(what).expanduser().exists() else "had from the hub"
    said = f"{what} cannot be {done} ({type(error).__name__}: {text})"
    if "gated" in text or "GatedRepoError" in names:
        return f"{said}: accept its terms and set HF_TOKEN, or download it and give the file's path"
    for part in ("split", "config"):
        if part in text.lower():
            # others have no such
            mend = f"set {field}_{part}, or " if field in ("data.harmful", "data.benign") else ""
            return f"{said}: {mend}give the one you mean as a file"
    if names & {"OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout"}:
        return f"{said}: check the network, or download it and give the file's path"
    if done == "read":
        return f"{said}: check what is in it, or give one file"
    return (
        f"{said}: check the name, set HF_TOKEN if it is private, or download it and give the file's"
        " path"
    )


def mapped(
    records: Sequence[Record],
    path: str,
    columns: Mapping[str, str],
    needed: Sequence[str],
    field: str,
) -> list[dict[str, str]]:
    """Records under our names, as `read_table` gives them; `path` says in errors where they came
    from.
    """
    there = list(dict.fromkeys(name for record in records for name in record))
    recipes = {}
    # a column that is named must be there, also an optional one
    for name in dict.fromkeys((*needed, *columns)):
        theirs = columns.get(name)
        recipes[name] = recipe = (
            _recipe(theirs, name, field) if theirs and "{" in theirs else [("", (theirs,))]
        )
        for column in (place[0] for _, place in recipe if place):
            if column not in there:
                raise ProfileError(
                    f"{field} = {path!r} has no column {column!r} for {name!r}; it has "
                    f"{', '.join(map(str, there))}: set {field}_columns"
                )
    rows = []
    for number, record in enumerate(records, start=1):
        row = {}
        for name, recipe in recipes.items():
            try:
                row[name] = "".join(
                    before + (_value(record, place) if place else "") for before, place in recipe
                ).strip()
            except LookupError as error:
                raise ProfileError(
                    f"{field} = {path!r}, row {number}: {columns[name]!r} for {name!r}"
                    f" {error.args[0]}: set {field}_columns"
                ) from None
            if name in needed and not row[name]:
                raise ProfileError(
                    f"{field} = {path!r}, row {number}: column {columns[name]!r} is empty: fill or"
                    " remove it"
                )
        rows.append(row)
    return rows


def _recipe(text: str, name: str, field: str) -> list[tuple[str, tuple[str, ...]]]:
    """(text before, column and keys) for each part of a format string; the last may
    have text only.
    """
    parts = []
    try:
        for before, inside, spec, conversion in string.Formatter().parse(text):
            place = _PLACE.fullmatch(inside) if inside is not None else None
            if inside is not None and (place is None or spec or conversion):
                raise ValueError(f"{{{inside}}} is not of the form {{column}} or {{column[key]}}")
            parts.append(
                (before, (place[1], *re.findall(r"\[([^\]]+)\]", place[2])) if place else ())
            )
    except ValueError as error:
        raise ProfileError(
            f"{field}_columns.{name} = {text!r} is no format string ({error}): write it like"
            " '{instruction}', or '{messages[1][content]}'"
        ) from None
    return parts


def _value(record: Record, place: tuple[str, ...]) -> str:
    """The text at a place of a record. Raises LookupError saying what is there where the place is
    not.
    """
    value = record.get(place[0])
    for depth, key in enumerate(place[1:], start=1):
        if _is_missing(value):
            return ""
        at = place[0] + "".join(f"[{k}]" for k in place[1:depth])
        if isinstance(value, Mapping):
            if key not in value:
                raise LookupError(
                    f"finds no {key!r} in {at}, which has {', '.join(map(str, value))}"
                )
            value = value[key]
        elif hasattr(value, "__getitem__") and not isinstance(value, str):
            if not key.isdecimal() or int(key) >= len(value):
                raise LookupError(
                    f"finds no {key!r} in {at}, which has items 0 to {len(value) - 1}"
                )
            value = value[int(key)]
        else:
            raise LookupError(f"finds no {key!r} in {at}, which is {type(value).__name__}")
    if _is_missing(value):
        return ""
    if isinstance(value, Mapping) or (hasattr(value, "__len__") and not isinstance(value, str)):
        raise LookupError(
            f"is no text but {type(value).__name__} with parts; take one, as in '{{{place[0]}[0]}}'"
        )
    return str(value)


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and pd.isna(value))


def _file_records(file: Path, rows: int | None) -> Iterator[Record] | Iterable[Record]:
    """Records of a file, in order."""
    if file.suffix == ".csv":
        return iter(pd.read_csv(file, nrows=rows).to_dict("records"))
    if file.suffix == ".parquet":
        return iter(pd.read_parquet(file).to_dict("records"))
    if file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            kept = itertools.islice((line for line in lines if line.strip()), rows)
            return iter(
                [_record(json.loads(line), number) for number, line in enumerate(kept, start=1)]
            )
    if file.suffix == ".json":
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list):
            return iter([_record(record, number) for number, record in enumerate(found, start=1)])
        return iter(pd.DataFrame(found).to_dict("records"))
    raise ValueError(_unknown(file))


def _record(value: Any, number: int) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"row {number} is {type(value).__name__}, not a record with named columns")
    return value


def _unknown(file: Path) -> str:
    return f"{file.suffix!r} is none of {', '.join(SUFFIXES)}"
