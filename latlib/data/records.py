"""Records of text under our names, from files, from folders of a data set, and from the hub.

1. A source is a CSV, JSON, JSONL or parquet file; a folder of such files, or one that the package
   `datasets` wrote; or the id owner/name of a data set on the hub, which `datasets` reads.
2. Files are read here and not by `datasets`, which guesses types: to it an answer `None` is
   missing, `007` is a number and `2024-01-01` a date. Here what a file says is text, and an error
   names the line.
3. Records are taken one by one up to the number that is asked for; with `streaming` a hub data set
   is not downloaded first.
4. `columns` maps our name to a column, or to a format string over the record such as
   "{instruction}\\n{input}". What is missing is ''. A column or key that is not there is an error
   that lists what is.
5. Of a chat, "{messages[user]}" is what the user says first and "{messages[assistant]}" the reply
   to that; a system turn is passed over ("{messages[system]}"). A turn may also be taken by its
   number, if the same role has it in every row.
6. A contextual behaviour of HarmBench is asked with its context, as its authors' code joins them.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import string
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet

from latlib.config.sections import ProfileError
from latlib.io.outages import FIX, causes, is_outage, through_outages

Record = Mapping[str, Any]
ANY_SPLIT = "test, or the only one"  # for sets that may be published whole, as benchmarks are
# what `datasets` writes into the folders of save_to_disk
_SAVED = ("state.json", "dataset_dict.json")
_FIELD_LIMIT = 2**31 - 1  # letters of a CSV field; the csv module's own is 131,072
_FIELD = re.compile(r"([^\[\]{}]+)((?:\[[^\[\]{}]+\])*)")  # column[key][key]
_FORM = "is not of the form {column} or {column[key]}"
# who speaks in a chat, in OpenAI's and in ShareGPT's words
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_ROLES["system"] = "system"
# HarmBench's columns (Mazeika et al. 2024), and how its baselines join them (DirectRequest)
_BEHAVIOUR, _CONTEXT, _KIND = "Behavior", "ContextString", "FunctionalCategory"
_JOINED = "{}\n\n---\n\n{}"


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
    setting = f"{source.field}_columns"
    templates = {}
    for name in dict.fromkeys((*needed, *columns)):
        theirs = str(columns.get(name))
        templates[name] = _template(theirs, f"{setting}.{name}")
        # a column that is named must be there, also an optional one
        for _, place in templates[name]:
            if place and place[0] not in there:
                raise ProfileError(
                    f"{source.shown} has no column {place[0]!r} for {name!r}; it has "
                    f"{', '.join(there)}: set {setting}"
                )
    used = {place[0] for parts in templates.values() for _, place in parts if place}
    if _BEHAVIOUR in used:
        records = _in_context(records, used, source)
    rows = []
    roles: dict[str, str] = {}
    for number, record in enumerate(records, start=1):
        where = f"{source.shown}, row {number}"
        row = {}
        for name, parts in templates.items():
            theirs = str(columns.get(name))
            try:
                texts = [before + _value(record, place, roles) for before, place in parts]
            except LookupError as error:
                said = f"{theirs!r} for {name!r} {error.args[0]}"
                raise ProfileError(f"{where}: {said}: set {setting}") from None
            row[name] = "".join(texts).strip()
            if name in needed and not row[name]:
                raise ProfileError(f"{where}: column {theirs!r} is empty: fill or remove it")
        rows.append(row)
    return rows


def _in_context(records: list[Record], used: Collection[str], source: Source) -> list[Record]:
    """HarmBench's records, a behaviour behind its context unless `used` names that too."""
    protected = sum(record.get(_KIND) == "copyright" for record in records)
    if protected:
        warnings.warn(
            f"{source.shown}: {protected} of {len(records)} rows are HarmBench's copyright"
            " behaviours, which its authors judge by hashes of the texts; here they are judged as"
            " all others: remove them if that is not meant",
            stacklevel=3,
        )
    if _CONTEXT in used:
        return records
    joined: list[Record] = []
    for record in records:
        if context := record.get(_CONTEXT):
            asked = _JOINED.format(context, record[_BEHAVIOUR])
            record = {**record, _BEHAVIOUR: asked}
        joined.append(record)
    return joined


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
    try:
        return through_outages(lambda: _taken(datasets, place, source), source.shown)
    except Exception as error:  # of `datasets`, the hub's client or what these call
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
                value = json.loads(line, object_pairs_hook=_each_once)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON ({error})") from None
            yield _record(value, f"line {number}")


def _json_records(file: Path) -> Iterator[Record]:
    text = file.read_text(encoding="utf-8-sig")
    found = json.loads(text, object_pairs_hook=_each_once)
    if isinstance(found, dict):  # column -> its values
        found = pd.DataFrame(found, dtype=object).to_dict("records")
    if not isinstance(found, list):
        raise ValueError(f"it holds {type(found).__name__}, not a list of records")
    for number, value in enumerate(found, start=1):
        yield _record(value, f"row {number}")


def _parquet_records(file: Path) -> Iterator[Record]:
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


def _each_once(pairs: list[tuple[str, Any]]) -> Record:
    """A JSON object, of which Python would keep the last of two equal keys."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands twice in a record: keep one of them")
    return found


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


def _taken(datasets: Any, place: Path, source: Source) -> list[Record]:
    return list(itertools.islice(_dataset_records(datasets, place, source), source.rows))


def _dataset_records(datasets: Any, place: Path, source: Source) -> Iterable[Record]:
    """Records of a folder or of the hub. Of a folder of files `datasets` says only which of them
    are a split's; of one that save_to_disk wrote the rows stay on the disk until they are taken.
    """
    if any((place / name).is_file() for name in _SAVED):
        saved = datasets.load_from_disk(str(place))
        return saved[_split_of(source, list(saved))] if isinstance(saved, dict) else saved
    path = source.path
    split = source.split
    if place.is_dir():
        path = str(place)
        parts = datasets.load_dataset_builder(path, source.config).config.data_files
        split = _split_of(source, list(parts))
        files = [Path(file) for file in parts[split]]
        if all(file.suffix in READERS for file in files):
            return itertools.chain.from_iterable(map(_file_records, files))
    elif split == ANY_SPLIT:
        split = _split_of(source, datasets.get_dataset_split_names(path, source.config))
    options = {"streaming": True} if source.streaming else {}
    return datasets.load_dataset(path, source.config, split=split, **options)


def _split_of(source: Source, names: Sequence[str]) -> str:
    split = source.split
    if split == ANY_SPLIT:
        split = names[0] if len(names) == 1 else "test"
    if split not in names:
        raise ValueError(f"Unknown split {split!r}. Should be one of {list(names)}.")
    return split


def _refused(error: Exception, source: Source, what: str) -> str:
    """What went wrong with a data set, and the fix."""
    text = str(error).strip() or type(error).__name__
    here = what == source.path
    said = f"{what} cannot be {'read' if here else 'had from the hub'}"
    if is_outage(error):
        return f"{said} ({type(error).__name__}: {text}): {FIX}"
    words = [text, *(type(cause).__name__ for cause in causes(error))]
    fix = _WRONG_HERE if here else _WRONG_NAME
    for word, known in _FIXES.items():
        if word in " ".join(words).lower():
            fix = known
            if known == _PART and source.split != ANY_SPLIT:
                fix = f"set {source.field}_{word}, or {known}"
            break
    return f"{said} ({type(error).__name__}: {text}): {fix}"


# word in the error or in the names of its causes -> what to do
_NETWORK = "check the network, or download it and give the file's path"
_PART = "give the one you mean as a file"
_FIXES = {
    "gated": "accept its terms and set HF_TOKEN, or download it and give the file's path",
    "split": _PART,
    "config": _PART,
    "offline": _NETWORK,
}
_WRONG_HERE = "check what is in it, or give one file"
_WRONG_NAME = (
    "check the name, set HF_TOKEN if it is private, or download it and give the file's path"
)


# ---- columns and format strings ------------------------------------------------------------------


def _template(theirs: str, setting: str) -> list[tuple[str, list[str]]]:
    """A column or format string as parts: a text, and the place of the value that follows it or an
    empty one. Raises ProfileError for what is no format string.
    """
    if "{" not in theirs:
        return [("", [theirs])]
    parts = []
    try:
        for before, field, spec, conversion in string.Formatter().parse(theirs):
            if spec or conversion:
                raise ValueError(f"{{{field}}} with more behind it {_FORM}")
            parts.append((before, [] if field is None else _place(field)))
    except ValueError as error:
        raise ProfileError(
            f"{setting} = {theirs!r} is no format string ({error}): write it like"
            " '{instruction}', or '{messages[user]}'"
        ) from None
    return parts


def _place(field: str) -> list[str]:
    """The column and the keys of 'column[key][key]'."""
    place = _FIELD.fullmatch(field)
    if place is None:
        raise ValueError(f"{{{field}}} {_FORM}")
    return [place[1], *re.findall(r"[^\[\]]+", place[2])]


def _value(record: Record, place: Sequence[str], roles: dict[str, str]) -> str:
    """The text at a place; '' for what is missing. roles: of the turns that were taken by number
    before. Raises LookupError where a key leads nowhere."""
    if not place:
        return ""
    value: Any = record
    at = ""
    for key in place:
        if value is None:
            return ""
        if isinstance(value, list) and key in _ROLES:
            value = _turn(value, _ROLES[key], at)
            at += f"[{key}]"
            continue
        if isinstance(value, list):
            value = {str(number): part for number, part in enumerate(value)}
            _check_role(value.get(key), f"{at}[{key}]", roles)
        if not isinstance(value, Mapping):
            raise LookupError(f"finds no {key!r} in {at}, which is {type(value).__name__}")
        if at and key not in value:
            raise LookupError(f"finds no {key!r} in {at}, which has {', '.join(value)}")
        value = value.get(key)
        at += f"[{key}]" if at else key
    if isinstance(value, Mapping | list):
        raise LookupError(
            f"is no text but {type(value).__name__} with parts; take one, as in '{{{place[0]}[0]}}'"
        )
    missing = value is None or value != value  # NaN is not itself
    return "" if missing else str(value)


def _role_of(turn: Any) -> str | None:
    """Who speaks in a turn of a chat, in our word or else in its own; None for what is no turn."""
    if not isinstance(turn, Mapping):
        return None
    said = turn.get("role", turn.get("from"))
    return None if said is None else _ROLES.get(str(said).lower(), str(said))


def _turn(turns: Sequence[Any], role: str, at: str) -> Any:
    """What a role says in a chat: the user first, the assistant to that, the system, if at all.
    Raises LookupError for a chat that goes otherwise."""
    said = [turn for turn in turns if (_role_of(turn) == "system") == (role == "system")]
    if role == "system" and not said:
        return ""
    wanted = ["user", "assistant"] if role == "assistant" else [role]
    found = [_role_of(turn) for turn in said[: len(wanted)]]
    if found != wanted:
        raise LookupError(
            f"looks for {', then '.join(wanted)} in {at}, which goes"
            f" {', '.join(map(str, found)) or 'nowhere'}"
        )
    last = said[len(wanted) - 1]
    return last.get("content", last.get("value"))


def _check_role(turn: Any, at: str, roles: dict[str, str]) -> None:
    """Raise LookupError for a turn by another role than the same turn of rows before."""
    role = _role_of(turn)
    before = role and roles.setdefault(at, role)
    if role != before:
        column = at.partition("[")[0]
        raise LookupError(
            f"takes a turn of {role!r} at {at}, which was of {before!r} in rows before: take turns"
            f" by role, as in '{{{column}[user]}}' and '{{{column}[assistant]}}'"
        )
