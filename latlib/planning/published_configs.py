"""What a model is, without its weights and without a network: its config.

1. A local folder's `config.json`, or the one in the hub cache, is the truth where it is there.
2. Otherwise `PUBLISHED` holds the numbers of the models in the shipped profiles, as their
   config.json on the hub has them, and what one must know before a download: its size, and whether
   a licence has to be accepted first.
3. The organism of the made-up world is built from the profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from latlib.config.sections import ModelSettings, ProfileError
from latlib.world.organism import build_model, build_tokenizer

_LLAMA_3_8B = dict(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
_LLAMA_2_7B = _LLAMA_3_8B | dict(
    vocab_size=32_000,
    intermediate_size=11_008,
    num_key_value_heads=32,
    max_position_embeddings=4096,
)
_QWEN2_5_HALF_B = dict(
    vocab_size=151_936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Published:
    """A model on the hub, as its config.json and its card have it. parameters: the output matrix
    once where it is tied; gated: whether its licence must be accepted on its page first.
    """

    config: type[PretrainedConfig]
    numbers: dict[str, Any]
    parameters: int
    gated: bool

    @property
    def download(self) -> int:
        """Bytes of its safetensors files, in bfloat16 or float16."""
        return 2 * self.parameters


# See docs/sources.md#published-models
PUBLISHED: dict[str, Published] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": Published(LlamaConfig, _LLAMA_3_8B, 8_030_261_248, True),
    "meta-llama/Llama-2-7b-chat-hf": Published(LlamaConfig, _LLAMA_2_7B, 6_738_415_616, True),
    "Qwen/Qwen2.5-0.5B-Instruct": Published(Qwen2Config, _QWEN2_5_HALF_B, 494_032_768, False),
    # the authors' release keeps the shape of the model it was trained from
    "LLM-LAT/robust-llama3-8b-instruct": Published(LlamaConfig, _LLAMA_3_8B, 8_030_261_248, False),
}


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
    """The config of a profile's model; None for a model that is neither here nor in `PUBLISHED`.

    Raises ProfileError for a config.json that cannot be read.
    """
    source = settings.source
    if source == "world":
        return build_model(settings, build_tokenizer(settings.vocabulary), 0).config
    folder = local_folder(source, settings.revision)
    if folder is not None and (folder / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ProfileError(
                f"model.source = {source!r}: {folder} cannot be read: {error}"
            ) from None
    if source in PUBLISHED:
        known = PUBLISHED[source]
        return known.config(**known.numbers)
    return None
