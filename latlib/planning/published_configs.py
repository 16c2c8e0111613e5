"""What a model is, without its weights and without a network: its config.

1. A local folder's `config.json`, or the one in the hub cache, is the truth where it is there.
2. Otherwise `published.yaml` holds what one must know of the models in the shipped profiles before
   a download.
3. The organism of the made-up world is built from the profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from latlib.config.sections import ModelSettings, ProfileError
from latlib.world.organism import build_model, build_tokenizer


@dataclass(frozen=True)
class Published:
    """A model on the hub; see `published.yaml`."""

    config: dict[str, Any]
    parameters: int
    gated: bool

    @property
    def download(self) -> int:
        """Bytes of its safetensors files, in bfloat16 or float16."""
        return 2 * self.parameters


_TEXT = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
PUBLISHED = {source: Published(**known) for source, known in yaml.safe_load(_TEXT).items()}


def local_folder(source: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """Where a model or data set is on this machine: the folder `source`, or what the hub cache has
    of it; asks nobody. kind: 'model' or 'dataset'.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        cached = snapshot_download(source, repo_type=kind, revision=revision, local_files_only=True)
    except (HFValidationError, LocalEntryNotFoundError):  # no hub id, or not here
        return None
    return Path(cached)


def config_of(settings: ModelSettings) -> PretrainedConfig | None:
    """The config of a profile's language model (of one that also sees, that part); None for a model
    that is neither here nor in `PUBLISHED`.

    Raises ProfileError for a config.json that cannot be read.
    """
    source = settings.source
    if source == "world":
        return build_model(settings, build_tokenizer(settings.vocabulary), 0).config
    folder = local_folder(source, settings.revision)
    if folder is not None and (folder / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            return config.get_text_config()
        except (OSError, ValueError, KeyError) as error:
            raise ProfileError(
                f"model.source = {source!r}: {folder} cannot be read: {error}"
            ) from None
    return AutoConfig.for_model(**PUBLISHED[source].config) if source in PUBLISHED else None
