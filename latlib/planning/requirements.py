"""What this machine has for a run and what the profile asks it for: the lines of
`latlib.planning.check` on models and data.

1. `look` says what is here: GPUs and their free memory, RAM, disk, a hub token (whether, never
   which).
2. `model_lines` and `data_lines` go through every source: found, to be downloaded, or missing with
   its fix.
3. `row_lengths` reads the rows where they and the tokenizer are here, and says what it assumes
   where they are not.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants, get_token
from peft import get_peft_model

from latlib.batch import TokenRow
from latlib.config.profile import Profile
from latlib.config.sections import BASE_ANSWERS, DataSettings, ProfileError
from latlib.data.records import is_hub_id
from latlib.data.splits import (
    SPLITS,
    benign_rows,
    check_overlap,
    file_prompts,
    preference_rows,
)
from latlib.evaluation.graders import judges, read_template
from latlib.evaluation.outcomes import MANY_SHOT, SYSTEM
from latlib.io.files import read_json
from latlib.io.gguf import SUFFIX, contents, folder_of
from latlib.io.hub import (
    ADAPTER_FILES,
    MODEL_FILES,
    Allowed,
    check_adapter_keys,
    local_folder,
    open_adapter_config,
    open_config,
    open_tokenizer,
    weights_are_safe,
)
from latlib.io.messages import in_a_line
from latlib.io.weights import (
    bytes_of_weights,
    check_folder,
    check_tokens,
    check_values,
    header,
    skeleton,
)
from latlib.planning.estimate import RowLengths, assumed_lengths, lengths_of
from latlib.planning.published_configs import PUBLISHED
from latlib.redteam.jailbreaks import SYSTEM_OVERRIDE, without_room
from latlib.redteam.room import check_room
from latlib.text.chat import Row, accepts, chat_text, templated, tokenise
from latlib.world.organism import build_tokenizer

OK, NOTE, MISSING = "ok", "note", "missing"
GRADER = "grader"  # what a model is that grades
_TOKENIZERS = {"tokenizer_config.json", "tokenizer.json", "tokenizer.model"}
LOOKED_THROUGH = 4_000_000_000  # bytes of weights that are read whole: our choice
_READ_ROWS = 512  # rows that are tokenised for their lengths


@dataclass(frozen=True)
class Line:
    """One line of the table. state: ok, note or missing; fix: what to do about it, empty where
    nothing is to do.
    """

    subject: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """What is here. gpus: free bytes of each GPU that torch sees; ram, disk, cache_disk: free
    bytes, the last two of the run folder's disk and of the hub cache's, which may be one
    (`one_disk`)."""

    gpus: tuple[int, ...]
    gpu: str
    bf16: bool
    ram: int
    disk: int
    cache_disk: int
    one_disk: bool
    token: bool
    offline: bool


def gigabytes(size: float) -> str:
    """Bytes for a table."""
    return f"{size / 1e9:.1f} GB"


def look(folder: Path) -> Machine:
    """This machine, for a run in `folder`."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = _existing(folder)
    cache = _existing(Path(constants.HF_HUB_CACHE))
    return Machine(
        gpus=tuple(torch.cuda.mem_get_info(i)[0] for i in range(n_gpus)),
        gpu=torch.cuda.get_device_name(0) if n_gpus else "",
        bf16=n_gpus > 0 and torch.cuda.is_bf16_supported(),
        ram=psutil.virtual_memory().available,
        disk=shutil.disk_usage(here).free,
        cache_disk=shutil.disk_usage(cache).free,
        one_disk=here.stat().st_dev == cache.stat().st_dev,
        token=bool(get_token()),
        offline=bool(constants.HF_HUB_OFFLINE),
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def used_models(profile: Profile) -> dict[str, str]:
    """source -> what it is, of every model that is used and not made here."""
    if profile.model.source == "world":
        return {}
    used = {profile.model.source: "model"}
    for method, seed in product(profile.released, profile.seeds):
        source = profile.released_source(method, seed)
        assert source is not None  # it is released
        used.setdefault(source, f"released {method}")
    for source in judges(profile.evaluation.grader):
        used.setdefault(source, GRADER)
    return used


def bytes_to_download(profile: Profile) -> int:
    """Of the models that are not here, as far as their sizes are known, and of those that are to be
    dequantised."""
    size = 0
    for source in used_models(profile):
        folder = _place(profile, source)
        if folder is not None and folder.suffix == SUFFIX:
            size += contents(folder, source).size
        elif source in PUBLISHED and not _is_here(profile, source):
            size += PUBLISHED[source].download
    return size


def _place(profile: Profile, source: str) -> Path | None:
    """Where a model is on this machine; the revision is that of model.source alone."""
    revision = profile.model.revision if source == profile.model.source else None
    return local_folder(source, revision)


def _is_here(profile: Profile, source: str) -> bool:
    """Whether a model is a folder, or all its weights are in the hub cache."""
    folder = _place(profile, source)
    if folder is None or folder.suffix == SUFFIX or Path(source).expanduser().is_dir():
        return folder is not None
    here = _files(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(read_json(index)["weight_map"].values()) <= here
    return bool(here & {"model.safetensors", "adapter_model.safetensors"})


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def model_lines(profile: Profile, machine: Machine) -> Iterator[Line]:
    """Lines of every model that is used."""
    used = used_models(profile)
    if not used:
        yield Line("model", OK, "made here, from scratch: nothing to download")
    for source, subject in used.items():
        folder = Path(source).expanduser()
        if folder.is_dir() or (folder.suffix == SUFFIX and folder.is_file()):
            yield _folder_line(profile, subject, source, folder)
        elif not is_hub_id(source):
            fix = "check the path, or give a hub id owner/name"
            yield Line(subject, MISSING, f"{source}: no such folder", fix)
        elif _is_here(profile, source):
            cached = _place(profile, source)
            assert cached is not None, "it is here"
            yield _whole_line(profile, subject, f"{source}: in the hub cache", cached)
        else:
            known = PUBLISHED.get(source)
            size = f"about {gigabytes(known.download)}" if known else "size not known here"
            elsewhere = f"download it elsewhere: hf download {source}"
            yield _download_line(subject, source, f", {size}", elsewhere, machine)
            if known and known.gated:
                yield _licence_line(source, machine)
    grader = profile.evaluation.grader
    if used and grader.template:
        try:
            read_template(grader.template)
        except ValueError as error:
            yield _wrong(GRADER, error)
    if GRADER in used.values():
        yield Line(GRADER, NOTE, "memory for it, and its hours, are not in what follows")


def _folder_line(profile: Profile, subject: str, source: str, folder: Path) -> Line:
    try:
        folder = local_folder(source) or folder
    except ValueError as error:
        return _wrong(subject, error)
    if folder.suffix == SUFFIX:
        text = f"{folder}: to be dequantised into {folder_of(folder)}"
        return _whole_line(profile, subject, text, folder)
    files = _files(folder)
    configs = {"config.json"} if subject == "model" else {"config.json", "adapter_config.json"}
    lacks = ""
    if not files & configs:
        lacks = "config.json"
    elif subject == "model" and not files & _TOKENIZERS:
        lacks = "tokenizer"
    if lacks:
        fix = f"give a folder with its {lacks}, as save_pretrained writes it"
        return Line(subject, MISSING, f"folder {source}: no {lacks}", fix)
    return _whole_line(profile, subject, f"folder {source}", folder)


def _whole_line(profile: Profile, subject: str, text: str, folder: Path) -> Line:
    try:
        _look_into(profile, subject, folder)
        size = bytes_of_weights(folder)
        if size <= LOOKED_THROUGH:
            check_values(folder, f"{subject} {folder}")
    except ValueError as error:
        return _wrong(subject, error)
    if size > LOOKED_THROUGH:
        text += f"; {gigabytes(size)} of weights, looked through for NaN when they are loaded"
    return Line(subject, OK, text)


def _wrong(subject: str, error: ValueError) -> Line:
    """What an error says, and its fix."""
    text, _, fix = str(error).rpartition(": ")
    if not text:  # of a library's, which names no fix
        text, fix = fix, "give one that fits the model"
    return Line(subject, MISSING, text, fix)


def _look_into(profile: Profile, subject: str, folder: Path) -> None:
    """Raise ValueError for a model, adapter, tokenizer or template that would stop the run later,
    as far as it can be told without loading weights."""
    field = f"{subject} {folder}"
    grades = subject == GRADER
    allowed = Allowed.by(profile.model, revision=False)
    adapter = (folder / "adapter_config.json").is_file()
    if folder.suffix != SUFFIX:
        weights_are_safe(str(folder), subject, allowed, ADAPTER_FILES if adapter else MODEL_FILES)
    if adapter and grades:  # on a model of its own
        open_adapter_config(str(folder), subject)
        return
    if adapter:
        _look_into_adapter(profile, subject, folder)
        return
    config = open_config(str(folder), subject, allowed)
    if folder.suffix != SUFFIX:
        check_folder(folder, config, field)
    tokenizer = _templated(profile, open_tokenizer(str(folder), subject, allowed))
    check_tokens(tokenizer, config.get_text_config().vocab_size, field)
    if not grades:
        chat_text(tokenizer, "A", profile.data.system_prompt)


def _look_into_adapter(profile: Profile, subject: str, folder: Path) -> None:
    adapter = open_adapter_config(str(folder), subject)
    file = folder / "adapter_model.safetensors"
    base = local_folder(profile.model.source, profile.model.revision)
    if base is None or not file.is_file():  # pickles, which were allowed, have no header
        return
    config = open_config(str(base), "model.source", Allowed.by(profile.model, revision=False))
    model = skeleton(config, "model.source")
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter)
    except Exception as error:  # of peft, which takes a config as it is
        said = in_a_line(error).rstrip(".")
        raise ProfileError(f"{said}: give one that fits the model") from error
    check_adapter_keys(adapted, header(file, subject), f"{subject} {folder}")


def _templated(profile: Profile, tokenizer: Any) -> Any:
    """The tokenizer as a run has it."""
    return templated(tokenizer, profile.model.template, profile.model.date)


def _download_line(subject: str, source: str, size: str, otherwise: str, machine: Machine) -> Line:
    """Of what is on the hub and not here. otherwise: what to do while the hub is switched off."""
    if machine.offline:
        text = f"{source}: not in the cache, and the hub is switched off"
        return Line(subject, MISSING, text, f"unset HF_HUB_OFFLINE, or {otherwise}")
    return Line(subject, OK, f"{source}: to be downloaded{size}")


def _licence_line(source: str, machine: Machine) -> Line:
    page = f"https://huggingface.co/{source}"
    if not machine.token:
        fix = f"accept the licence at {page}, then set HF_TOKEN or run: hf auth login"
        return Line("licence", MISSING, f"{source} is gated and no token is here", fix)
    text = (
        f"{page}: gated; a token is here, whether its licence was accepted is only seen on download"
    )
    return Line("licence", NOTE, text, "accept the licence on that page, once")


def template_lines(tokenizer: Any) -> Iterator[Line]:
    """Lines of jailbreaks that the model's chat template refuses."""
    if tokenizer is None or not accepts(tokenizer):  # said in the model's line
        return
    system = accepts(tokenizer, system_prompt=SYSTEM_OVERRIDE)
    shots = accepts(tokenizer, shots=[("A", "B")])
    for name, accepted in ((SYSTEM, system), (MANY_SHOT, shots)):
        if not accepted:
            text = f"{name!r} will be left out: the model's chat template refuses its messages"
            yield Line("jailbreaks", NOTE, text)


def data_lines(profile: Profile, machine: Machine) -> Iterator[Line]:
    """Lines of every source of prompts, and of overlap where all of them are files."""
    data = profile.data
    if data.source == "world":
        yield Line("data", OK, "drawn from the made-up world")
        return
    for name, source in _sources(profile).items():
        yield _data_line(f"data.{name}", source, machine)
    are_here = _all_here(profile)
    if are_here:
        yield _overlap_line(profile)
    if data.benign_responses == BASE_ANSWERS:
        yield _responses_line(data, are_here)


def _sources(profile: Profile) -> dict[str, str]:
    """The data's setting -> what it names; nothing in the made-up world."""
    data = profile.data
    if data.source == "world":
        return {}
    names = ("harmful", "benign", "test_harmful", "test_benign", "test_borderline")
    return {name: getattr(data, name) for name in names if getattr(data, name) is not None}


def _all_here(profile: Profile) -> bool:
    return all(Path(source).expanduser().exists() for source in _sources(profile).values())


def _data_line(field: str, source: str, machine: Machine) -> Line:
    place = Path(source).expanduser()
    if place.exists():
        return Line(field, OK, f"{source}: found")
    if not is_hub_id(source):
        text = f"{source}: no such file ({place.resolve()})"
        return Line(field, MISSING, text, f"download it there, or set {field} to where it is")
    if local_folder(source, kind="dataset") is not None:
        return Line(field, OK, f"{source}: in the cache")
    return _download_line(field, source, "", f"give the path of a file in {field}", machine)


def _overlap_line(profile: Profile) -> Line:
    try:
        check_overlap(profile.data)
    except ProfileError as error:
        return _wrong("overlap", error)
    return Line("overlap", OK, "no training or tuning prompt comes back among the test prompts")


def _responses_line(data: DataSettings, are_here: bool) -> Line:
    """That the base will be asked first. are_here: whether its prompts can be counted."""
    count = "all"
    if are_here:
        with suppress(ProfileError):  # said in the line on overlap
            prompts = file_prompts(data)["benign"]
            count = f"{sum(not prompt.completions[0] for prompt in prompts):,}"
    text = (
        f"the base answers {count} benign prompts without a response once, before anything is"
        f" trained, with at most data.response_tokens = {data.response_tokens} tokens each; rows"
        " are taken to be so long in what follows, and its time is not in it"
    )
    return Line("responses", NOTE, text)


def row_lengths(profile: Profile, context: int, tokenizer: Any) -> RowLengths:
    """Of the profile's rows where data and tokenizer are on this machine, else assumed ones.
    context: of the model. Raises ProfileError or ValueError for data that cannot be used."""
    data = profile.data.model_copy(update={"rows": min(profile.data.rows, _READ_ROWS)})
    limit = min(data.max_tokens, context)
    sources = (data.harmful, data.benign) if data.source == "files" else ()
    if tokenizer is None or not all(Path(str(path)).expanduser().exists() for path in sources):
        return assumed_lengths(limit)

    def tokens(rows: Sequence[Row]) -> list[TokenRow]:
        system, too_long = data.system_prompt, data.too_long
        return tokenise(rows, tokenizer, limit, system, too_long=too_long)

    answered = _as_if_answered(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rows that are cut: training says it
        if sources:
            for split in SPLITS:  # too few rows leave one empty
                preference_rows(data, 0, split)
                benign_rows(answered, 0, split)
        benign = tokens(benign_rows(answered, 0))
        if answered is not data:
            benign = [_as_long_as_may_be(row, data.response_tokens, limit) for row in benign]
        return lengths_of(tokens(preference_rows(data, 0)), benign)


def _as_if_answered(data: DataSettings) -> DataSettings:
    """The data with stand-ins for replies of the base, which are not there yet."""
    if data.benign_responses != BASE_ANSWERS:
        return data
    return data.model_copy(update={"benign_responses": ("A",)})


def _as_long_as_may_be(row: TokenRow, most: int, limit: int) -> TokenRow:
    """A row with a response of `most` tokens, or of what `limit` leaves."""
    return TokenRow(row.prompt, ((0,) * min(most, limit - len(row.prompt)),))


def room_lines(profile: Profile, context: int, tokenizer: Any) -> Iterator[Line]:
    """Lines of whether prompts fit as they will be asked, where data and tokenizer are on this
    machine, and of jailbreaks that will be left out. Raises ProfileError or ValueError where they
    do not."""
    if tokenizer is None or not _all_here(profile):
        return
    profile = profile.model_copy(update={"data": _as_if_answered(profile.data)})
    for attack, why in without_room(profile, tokenizer, context).items():
        yield Line(f"room of {attack}", NOTE, f"it will be left out: {why}")
    longest = check_room(profile, tokenizer, context)
    text = f"a prompt as it will be asked has at most {longest} of {context} tokens"
    written = profile.evaluation.max_new_tokens
    if profile.data.source == "files" and longest + written > context:
        fix = "lower evaluation.max_new_tokens or data.max_tokens, or use a longer context"
        text += f": no room for evaluation.max_new_tokens = {written}, replies are cut short"
        yield Line("room", NOTE, text, fix)
        return
    yield Line("room", OK, text)


def tokenizer_of(profile: Profile) -> Any:
    """As a run has it; None where it is not on this machine or its folder is wrong, which its own
    line says."""
    model = profile.model
    if model.source == "world":
        return build_tokenizer(
            model.vocabulary, model.post_instruction_tokens, profile.data.division
        )
    folder = local_folder(model.source, model.revision)
    if folder is None:
        return None
    try:
        tokenizer = open_tokenizer(str(folder), "model.source", Allowed.by(model, revision=False))
    except ValueError:  # what is wrong with the folder is said in the model's line
        return None
    return _templated(profile, tokenizer)
