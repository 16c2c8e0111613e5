"""Records of text under our names, from files, from folders of a data set, and from the hub.

1. A source is a CSV, JSON, JSONL or parquet file; a folder of such files, or one that the package
   `datasets` wrote; or the id owner/name of a data set on the hub, which `datasets` reads.
2. Files are read here and not by `datasets`, which guesses types: to it an answer `None` is
   missing, `007` is a number and `2024-01-01` a date. Here what a file says is text, and an error
   names the line.
3. Records are taken one by one up to the number that is asked for; with `streaming` a hub data set
   is not downloaded first.
4. `columns` maps our name to a column, or to a format string over the record such as
   "{instruction}\\n{input}" or "{messages[1][content]}". What is missing is ''. A column or key
   that is not there is an error that lists what is.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet

from latlib.config.sections import ProfileError

Record = Mapping[str, Any]
ANY_SPLIT = "test, or the only one"  # for sets that may be published whole, as benchmarks are
# what `datasets` writes into the folders of save_to_disk
_SAVED = ("state.json", "dataset_dict.json")
_FIELD_LIMIT = 2**31 - 1  # letters of a CSV field; the csv module's own is 131,072
_FIELD = re.compile(r"([^\[\]{}]+)((?:\[[^\[\]{}]+\])*)")  # column[key][key]


@dataclass(frozen=True)
class Source:
    """Where records are. field: the setting that names it, for errors. config, split: of a folder
    or hub id; split may be ANY_SPLIT. rows: the most that are taken, None for all.
    """

    path: str
    field: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    rows: int | None = None

    @property
    def shown(self) -> str:
        """How errors begin."""
        return f"{self.field} = {self.path!r}"


def read_table(
    source: Source, columns: Mapping[str, str], needed: Sequence[str]
) -> list[dict[str, str]]:
    """The first records of a source under our names.

    columns: our name -> column or format string. needed: which of ours may not be empty. Raises
    ProfileError naming the field when the source is missing, unreadable, gated or empty, or lacks a
    column or a value.
    """
    records = _read(source)
    if not records:
        raise ProfileError(f"{source.shown} holds no rows: give a file that has some")
    there = dict.fromkeys(itertools.chain.from_iterable(records))
    wanted = []
    # a column that is named must be there, also an optional one
    for name in dict.fromkeys((*needed, *columns)):
        column = _column(name, columns.get(name), source, name in needed)
        for theirs in column.reads:
            if theirs not in there:
                raise ProfileError(
                    f"{source.shown} has no column {theirs!r} for {name!r}; it has "
                    f"{', '.join(there)}: set {source.field}_columns"
                )
        wanted.append(column)
    rows = []
    for number, record in enumerate(records, start=1):
        try:
            rows.append({column.name: column.text(record) for column in wanted})
        except LookupError as error:
            raise ProfileError(f"{source.shown}, row {number}: {error.args[0]}") from None
    return rows


def is_hub_id(path: str) -> bool:
    """Whether a source that is not on this machine reads as owner/name and not as a path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and Path(path).suffix not in READERS


def _read(source: Source) -> list[Record]:
    """The first records with all their columns."""
    place = Path(source.path).expanduser()
    if place.is_file():
        try:
            return list(itertools.islice(_file_records(place), source.rows))
        except (ValueError, OSError, csv.Error, pyarrow.ArrowException) as error:
            raise ProfileError(f"{source.shown} cannot be read: {error}") from None
    if not place.is_dir() and not is_hub_id(source.path):
        raise ProfileError(
            f"{source.shown} is not a file: check the path, or give a hub id such as owner/name"
        )
    what = source.path
    if not place.is_dir():  # a split or configuration may be what is wrong with it
        what = "/".join(part for part in (source.path, source.config, source.split) if part)
    try:
        import datasets
    except ImportError:
        raise ProfileError(
            f"{source.shown}, and the package `datasets` is not installed: download {what} from the"
            " hub and give the file's path, or run `pip install datasets`"
        ) from None
    exceptions = getattr(datasets, "exceptions", None)
    own_failure = getattr(exceptions, "DatasetsError", OSError)
    try:
        found = _dataset_records(datasets, place, source)
        return list(itertools.islice(found, source.rows))
    except (OSError, ValueError, RuntimeError, own_failure) as error:
        raise ProfileError(f"{source.shown}: {_refused(error, source, what)}") from error


# ---- files ---------------------------------------------------------------------------------------


def _file_records(file: Path) -> Iterator[Record]:
    """Records of a file, in order."""
    if file.suffix not in READERS:
        raise ValueError(f"{file.suffix!r} is none of {', '.join(READERS)}")
    return READERS[file.suffix](file)


def _csv_records(file: Path) -> Iterator[Record]:
    csv.field_size_limit(_FIELD_LIMIT)
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        names = list(reader.fieldnames or ())
        if not names:
            raise ValueError("it is empty")
        if len(set(names)) < len(names):
            raise ValueError(f"its header names a column twice: {', '.join(names)}")
        for record in reader:
            if None in record:
                raise ValueError(
                    f"line {reader.line_num} has more fields than the {len(names)} of the header"
                )
            yield record


def _jsonl_records(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from None
            yield _record(value, f"line {number}")


def _json_records(file: Path) -> Iterator[Record]:
    found = json.loads(file.read_text(encoding="utf-8-sig"))
    if isinstance(found, dict):  # column -> its values
        found = pd.DataFrame(found, dtype=object).to_dict("records")
    for number, value in enumerate(found, start=1):
        yield _record(value, f"row {number}")


def _parquet_records(file: Path) -> Iterator[Record]:
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, not a record with named columns")
    return value


READERS = {
    ".csv": _csv_records,
    ".json": _json_records,
    ".jsonl": _jsonl_records,
    ".parquet": _parquet_records,
}


# ---- folders and the hub -------------------------------------------------------------------------


def _dataset_records(datasets: Any, place: Path, source: Source) -> Iterable[Record]:
    """Records of a folder or of the hub. Of a folder of files `datasets` says only which of them
    are a split's; of one that save_to_disk wrote the rows stay on the disk until they are taken.
    """
    if any((place / name).is_file() for name in _SAVED):
        saved = datasets.load_from_disk(str(place))
        return saved[_split_of(source, list(saved))] if isinstance(saved, dict) else saved
    split = source.split
    if place.is_dir():
        parts = datasets.load_dataset_builder(str(place), source.config).config.data_files
        split = _split_of(source, list(parts))
        files = [Path(file) for file in parts[split]]
        if all(file.suffix in READERS for file in files):
            return itertools.chain.from_iterable(map(_file_records, files))
    elif split == ANY_SPLIT:
        names = datasets.get_dataset_split_names(source.path, source.config)
        split = _split_of(source, names)
    path = str(place) if place.is_dir() else source.path
    options = {"streaming": True} if source.streaming else {}
    return datasets.load_dataset(path, source.config, split=split, **options)


def _split_of(source: Source, names: Sequence[str]) -> str:
    if source.split in names:
        return source.split
    if source.split == ANY_SPLIT and "test" in names:
        return "test"
    if source.split == ANY_SPLIT and len(names) == 1:
        return names[0]
    asked = "test" if source.split == ANY_SPLIT else source.split
    raise ValueError(f"Unknown split {asked!r}. Should be one of {list(names)}.")


def _refused(error: Exception, source: Source, what: str) -> str:
    """What went wrong with a data set, and the mend."""
    text = str(error).strip() or type(error).__name__
    here = what == source.path
    said = f"{what} cannot be {'read' if here else 'had from the hub'}"
    return f"{said} ({type(error).__name__}: {text}): {_mend(error, text.lower(), source, here)}"


def _mend(error: Exception, text: str, source: Source, here: bool) -> str:
    names = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if "gated" in text or "GatedRepoError" in names:
        return "accept its terms and set HF_TOKEN, or download it and give the file's path"
    for part in ("split", "config"):
        if part in text:
            own = source.field in ("data.harmful", "data.benign")  # others have no such setting
            return f"set {source.field}_{part}, or {_ONE}" if own else _ONE
    if any("Offline" in name or "Connect" in name for name in names):
        return "check the network, or download it and give the file's path"
    if here:
        return "check what is in it, or give one file"
    return "check the name, set HF_TOKEN if it is private, or download it and give the file's path"


_ONE = "give the one you mean as a file"


# ---- columns and format strings ------------------------------------------------------------------

Place = tuple[str, ...]  # a column, and keys in it


@dataclass(frozen=True)
class _Column:
    """One of our columns. parts: text, then what stands at a place, () for nothing."""

    name: str
    theirs: str | None
    setting: str
    needed: bool
    parts: Sequence[tuple[str, Place]]

    @property
    def reads(self) -> list[str]:
        """The columns of the record that it is made of."""
        return [place[0] for _, place in self.parts if place]

    def text(self, record: Record) -> str:
        """Its text. Raises LookupError saying what is there where a place is not."""
        found = ""
        for text, place in self.parts:
            found += text
            if not place:
                continue
            try:
                found += _value(record, place)
            except LookupError as error:
                raise LookupError(
                    f"{self.theirs!r} for {self.name!r} {error.args[0]}: set {self.setting}"
                ) from None
        if self.needed and not found.strip():
            raise LookupError(f"column {self.theirs!r} is empty: fill or remove it")
        return found.strip()


def _column(name: str, theirs: str | None, source: Source, needed: bool) -> _Column:
    """A column or format string in its parts. Raises ProfileError for what is no format string."""
    setting = f"{source.field}_columns"
    if theirs is None or "{" not in theirs:
        return _Column(name, theirs, setting, needed, [("", (str(theirs),))])
    parts: list[tuple[str, Place]] = []
    try:
        for text, inside, spec, conversion in string.Formatter().parse(theirs):
            if inside is None:
                parts.append((text, ()))
                continue
            field = _FIELD.fullmatch(inside)
            if field is None or spec or conversion:
                raise ValueError(f"{{{inside}}} is not of the form {{column}} or {{column[key]}}")
            parts.append((text, (field[1], *re.findall(r"[^\[\]]+", field[2]))))
    except ValueError as error:
        raise ProfileError(
            f"{setting}.{name} = {theirs!r} is no format string ({error}): write it like"
            " '{instruction}', or '{messages[1][content]}'"
        ) from None
    return _Column(name, theirs, setting, needed, parts)


def _value(record: Record, place: Place) -> str:
    """The text at a place; '' for what is missing. Raises LookupError where a key leads nowhere."""
    value: Any = record
    at = ""
    for key in place:
        if value is None:
            return ""
        if isinstance(value, list | tuple):
            value = {str(number): part for number, part in enumerate(value)}
        if not isinstance(value, Mapping):
            raise LookupError(f"finds no {key!r} in {at}, which is {type(value).__name__}")
        if at and key not in value:
            raise LookupError(f"finds no {key!r} in {at}, which has {', '.join(value)}")
        value = value.get(key)
        at += f"[{key}]" if at else key
    if isinstance(value, Mapping | list | tuple):
        raise LookupError(
            f"is no text but {type(value).__name__} with parts; take one, as in '{{{place[0]}[0]}}'"
        )
    missing = value is None or value != value  # NaN is not itself
    return "" if missing else str(value)
