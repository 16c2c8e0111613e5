"""What this machine has for a run and what the profile asks it for: the lines of
`latlib.planning.check` on models and data.

1. `look` says what is here: GPUs and their free memory, RAM, disk, a hub token (whether, never
   which).
2. `model_lines` and `data_lines` go through every source: found, to be downloaded, or missing with
   its mend.
3. `row_lengths` reads the rows where they and the tokenizer are here, and says what it assumes
   where they are not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.data.records import is_hub_id
from latlib.data.splits import benign_rows, check_overlap, preference_rows
from latlib.planning import estimate
from latlib.planning.estimate import RowLengths
from latlib.planning.published_configs import PUBLISHED, cached_file
from latlib.text.chat import tokenise

OK, NOTE, MISSING = "ok", "note", "missing"
_READ_ROWS = 512  # rows that are tokenised for their lengths
GB = 1e9


@dataclass(frozen=True)
class Line:
    """One line of the table. state: ok, note or missing; mend: what to do about it, empty where
    nothing is to do.
    """

    subject: str
    state: str
    text: str
    mend: str = ""


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
    datasets: bool


def _existing(folder: Path) -> Path:
    return next(p for p in (folder, *folder.parents) if p.exists())


def look(folder: Path) -> Machine:
    """This machine, for a run in `folder`."""
    from huggingface_hub import constants, get_token

    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here, cache = _existing(folder), _existing(Path(constants.HF_HUB_CACHE))
    return Machine(
        gpus=tuple(torch.cuda.mem_get_info(i)[0] for i in range(n)),
        gpu=torch.cuda.get_device_name(0) if n else "",
        bf16=bool(n) and torch.cuda.is_bf16_supported(),
        ram=_free_ram(),
        disk=shutil.disk_usage(here).free,
        cache_disk=shutil.disk_usage(cache).free,
        one_disk=here.stat().st_dev == cache.stat().st_dev,
        token=bool(get_token()),
        offline=bool(constants.HF_HUB_OFFLINE),
        datasets=importlib.util.find_spec("datasets") is not None,
    )


def _free_ram() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def model_lines(profile: Profile, machine: Machine) -> Iterator[Line]:
    """Lines of every model that is used; returns the bytes still to be downloaded."""
    if profile.model.source == "world":
        yield Line("model", OK, "made here, from scratch: nothing to download")
        return 0
    sources = {profile.model.source: "model"}
    for method, source in profile.released.items():
        sources.setdefault(source, f"released {method}")
    download = 0
    for source, subject in sources.items():
        known, folder = PUBLISHED.get(source), Path(source).expanduser()
        if folder.is_dir():
            lacks = _lacking(folder, subject == "model")
            mend = f"give a folder with its {lacks}, as save_pretrained writes it" if lacks else ""
            text = f"folder {source}" + (f": no {lacks}" if lacks else "")
            yield Line(subject, MISSING if lacks else OK, text, mend)
            continue
        if not is_hub_id(source):
            yield Line(
                subject,
                MISSING,
                f"{source}: no such folder",
                "check the path, or give a hub id owner/name",
            )
            continue
        if _weights_cached(source, profile.model.revision if subject == "model" else None):
            yield Line(subject, OK, f"{source}: in the hub cache")
            continue
        size = f"about {known.download / GB:.1f} GB" if known else "size not known here"
        download += known.download if known else 0
        if machine.offline:
            mend = f"unset HF_HUB_OFFLINE, or download it elsewhere: hf download {source}"
            yield Line(
                subject,
                MISSING,
                f"{source}: not in the hub cache, and the hub is switched off",
                mend,
            )
        else:
            yield Line(subject, OK, f"{source}: to be downloaded, {size}")
        if known and known.gated:
            page = f"https://huggingface.co/{source}"
            if machine.token:
                text = (
                    f"{page}: gated; a token is here, whether its licence was accepted is only seen"
                    " on download"
                )
                yield Line("licence", NOTE, text, "accept the licence on that page, once")
            else:
                mend = f"accept the licence at {page}, then set HF_TOKEN or run: hf auth login"
                yield Line("licence", MISSING, f"{source} is gated and no token is here", mend)
    return download


def _lacking(folder: Path, base: bool) -> str:
    """What a model folder has not, or ''. base: it must be a whole model with its tokenizer."""
    if not any(
        (folder / name).is_file()
        for name in ("config.json", "adapter_config.json")[: 1 if base else 2]
    ):
        return "config.json"
    tokenizers = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    return "tokenizer" if base and not any((folder / name).is_file() for name in tokenizers) else ""


def _weights_cached(source: str, revision: str | None) -> bool:
    if any(
        cached_file(source, name, revision)
        for name in ("model.safetensors", "adapter_model.safetensors")
    ):
        return True
    index = cached_file(source, "model.safetensors.index.json", revision)
    if index is None:
        return False
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(cached_file(source, shard, revision) for shard in shards)


_SOURCES = ("harmful", "benign", "test_harmful", "test_benign", "test_borderline")


def data_lines(profile: Profile, machine: Machine) -> Iterator[Line]:
    """Lines of every source of prompts, of the package that reads some, and of overlap where all of
    them are files.
    """
    data = profile.data
    if data.source == "world":
        yield Line("data", OK, "drawn from the made-up world")
        return
    needs_package = data.streaming
    sources = {name: source for name in _SOURCES if (source := getattr(data, name)) is not None}
    for name, source in sources.items():
        place, subject = Path(source).expanduser(), f"data.{name}"
        if place.exists():
            needs_package |= place.is_dir()
            yield Line(subject, OK, f"{source}: found")
        elif not is_hub_id(source):
            mend = f"download it there, or set data.{name} to where it is"
            yield Line(subject, MISSING, f"{source}: no such file ({place.resolve()})", mend)
        else:
            needs_package, cached = True, _dataset_cached(source)
            if machine.offline and not cached:
                mend = f"unset HF_HUB_OFFLINE, or give the path of a file in data.{name}"
                yield Line(
                    subject,
                    MISSING,
                    f"{source}: not in the cache, and the hub is switched off",
                    mend,
                )
            else:
                yield Line(
                    subject, OK, f"{source}: " + ("in the cache" if cached else "to be downloaded")
                )
    if needs_package:
        state, text = (
            (OK, "installed") if machine.datasets else (MISSING, "not installed; the data needs it")
        )
        yield Line(
            "package datasets", state, text, "" if machine.datasets else "pip install datasets"
        )
    if all(Path(source).expanduser().is_file() for source in sources.values()):
        try:
            check_overlap(profile)
            yield Line(
                "overlap", OK, "no training or tuning prompt comes back among the test prompts"
            )
        except ProfileError as error:
            text, _, mend = str(error).rpartition(": ")
            yield Line("overlap", MISSING, text, mend)


def _dataset_cached(source: str) -> bool:
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def row_lengths(profile: Profile) -> RowLengths:
    """Of the profile's rows where data and tokenizer are on this machine, else assumed ones. Raises
    ProfileError or ValueError for data that cannot be used."""
    data = profile.data.model_copy(update={"rows": min(profile.data.rows, _READ_ROWS)})
    if data.source == "files" and not all(
        Path(p).expanduser().is_file() for p in (data.harmful, data.benign)
    ):
        return estimate.assumed_lengths(data.max_tokens)
    tokenizer = _tokenizer(profile)
    if tokenizer is None:
        return estimate.assumed_lengths(data.max_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rows that are cut: training says it
        read = (
            tokenise(
                rows(data, 0),
                tokenizer,
                data.max_tokens,
                data.system_prompt,
                too_long=data.too_long,
            )
            for rows in (preference_rows, benign_rows)
        )
        return estimate.lengths_of(*read)


def _tokenizer(profile: Profile) -> Any:
    source = profile.model.source
    if source == "world":
        from latlib.world.organism import build_tokenizer

        return build_tokenizer(profile.model.vocabulary)
    file = (
        cached_file(source, "tokenizer_config.json", profile.model.revision)
        if is_hub_id(source)
        else None
    )
    folder = (
        Path(source).expanduser() if Path(source).expanduser().is_dir() else file and file.parent
    )
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):  # what is wrong with the folder is said in the model's line
        return None
