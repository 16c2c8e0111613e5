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

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from latlib.config.sections import ModelSettings, ProfileError

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
    """A model on the hub. parameters: how many its card says there are, the output matrix once
    where it is tied (the download is two bytes each); gated: whether its licence must be accepted
    on its page first; source: of all these."""

    config: type[PretrainedConfig]
    numbers: dict[str, Any]
    parameters: int
    gated: bool
    source: str

    @property
    def download(self) -> int:
        """Bytes of its safetensors files, in bfloat16 or float16."""
        return 2 * self.parameters


_CARD = "config.json and model card on the hub [recall: not read again without a network]"
PUBLISHED: dict[str, Published] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": Published(
        LlamaConfig, _LLAMA_3_8B, 8_030_261_248, True, _CARD
    ),
    "meta-llama/Llama-2-7b-chat-hf": Published(
        LlamaConfig, _LLAMA_2_7B, 6_738_415_616, True, _CARD
    ),
    "Qwen/Qwen2.5-0.5B-Instruct": Published(
        Qwen2Config, _QWEN2_5_HALF_B, 494_032_768, False, _CARD
    ),
    # the authors' release keeps the shape of the model it was trained from
    "LLM-LAT/robust-llama3-8b-instruct": Published(
        LlamaConfig, _LLAMA_3_8B, 8_030_261_248, False, _CARD
    ),
}


def cached_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a hub repository if it is in this machine's cache; asks nobody."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except HFValidationError:  # neither a folder nor a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def config_of(settings: ModelSettings) -> PretrainedConfig | None:
    """The config of a profile's model; None for a model that is neither here nor in `PUBLISHED`.

    Raises ProfileError for a config.json that cannot be read.
    """
    if settings.source == "world":
        from latlib.world.organism import build_model, build_tokenizer

        return build_model(settings, build_tokenizer(settings.vocabulary), 0).config
    folder = Path(settings.source).expanduser()
    file = (
        folder / "config.json"
        if folder.is_dir()
        else cached_file(settings.source, "config.json", settings.revision)
    )
    if file is not None and file.is_file():
        try:
            return AutoConfig.from_pretrained(file.parent, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ProfileError(
                f"model.source = {settings.source!r}: {file} cannot be read: {error}"
            ) from None
    known = PUBLISHED.get(settings.source)
    return None if known is None else known.config(**known.numbers)
