"""What a run stands on beside its settings: digests of what these name on this machine.

1. A data file is read whole.
2. A model folder has three digests: weights, configuration, and tokenizer with chat template. Any
   other file above WHOLE bytes is not read whole, for 16 GB would take minutes: PIECES of it
   are, spread evenly from its start to its end. Another model, or the same one trained further,
   differs there; a change of one number may not.
3. Of a hub id it is the commit that its revision means in this machine's cache, and nothing before
   the first download.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from huggingface_hub import constants

from latlib.config.paths import named_paths
from latlib.config.profile import Profile
from latlib.io import manifest

WHOLE = 2**28
PIECES, PIECE = 256, 2**14  # of a large file: how many, and bytes of each
SHOWN = 16  # letters of a digest

_PARTS = {
    "weights": (
        "*.safetensors",
        "*.safetensors.index.json",
        "pytorch_model*",
        "adapter_model.bin",
        "*.gguf",
    ),
    "configuration": ("config.json", "generation_config.json", "adapter_config.json", "*.py"),
    "tokenizer": (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "vocab*",
        "merges.txt",
    ),
}


def digests(profile: Profile) -> dict[str, str]:
    """What a setting names, such as 'data.harmful' or 'model.source, weights' -> a short digest of
    it. What is not on this machine has none."""
    found = {}
    for section, name, value in named_paths(profile.model_dump(mode="json")):
        setting = f"{section}.{name}"
        place = Path(value).expanduser()
        if place.is_file() and section == "data":
            found[setting] = manifest.digest(place)[:SHOWN]
        elif place.is_file():
            found[setting] = _sampled(place)[:SHOWN]
        elif place.is_dir() and section == "data":
            found[setting] = _digest(place, sorted(filter(Path.is_file, place.rglob("*"))))
        elif place.is_dir():
            for part, patterns in _PARTS.items():
                files = {file for pattern in patterns for file in place.glob(pattern)}
                if files:
                    found[f"{setting}, {part}"] = _digest(place, sorted(files))
        elif commit := _commit(value, profile, setting):
            found[f"{setting}, revision"] = commit
    return found


def _digest(folder: Path, files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.relative_to(folder).as_posix()} {_sampled(file)}\n".encode())
    return found.hexdigest()[:SHOWN]


def _sampled(file: Path) -> str:
    """The digest of a file, of a large one by pieces."""
    size = file.stat().st_size
    if size <= WHOLE:
        return manifest.digest(file)
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for place in np.linspace(0, size - PIECE, PIECES, dtype=np.int64).tolist():
            handle.seek(place)
            found.update(handle.read(PIECE))
    return found.hexdigest()


def _commit(repository: str, profile: Profile, setting: str) -> str:
    """The commit of a hub id in the cache, '' where there is none."""
    revision = "main"
    if setting == "model.source":
        revision = profile.model.revision or revision
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    kind = "dataset" if setting.startswith("data.") else "model"
    folder = f"{kind}s--{repository.replace('/', '--')}"
    file = Path(constants.HF_HUB_CACHE, folder, "refs", revision)
    return file.read_text().strip() if file.is_file() else ""
