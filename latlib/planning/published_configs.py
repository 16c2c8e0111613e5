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
from transformers import AutoConfig, PretrainedConfig

from latlib.config.sections import ModelSettings
from latlib.io.hub import Allowed, local_folder, open_config
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


def config_of(settings: ModelSettings) -> PretrainedConfig | None:
    """The config of a profile's language model (of one that also sees, that part); None for a model
    that is neither here nor in `PUBLISHED`.

    Raises ProfileError for a config.json that cannot be read.
    """
    source = settings.source
    if source == "world":
        return build_model(settings, build_tokenizer(settings.vocabulary), 0).config
    folder = local_folder(source, settings.revision)
    if folder is None:
        return AutoConfig.for_model(**PUBLISHED[source].config) if source in PUBLISHED else None
    return open_config(str(folder), "model.source", Allowed.by(settings)).get_text_config()
