"""Models that a run does not make: somebody's trained model or adapter, and tokenizers alone."""

from __future__ import annotations

import os
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from latlib.config.sections import ModelSettings
from latlib.io.hub import Allowed, is_adapter, located, open_adapter, open_tokenizer
from latlib.models import LanguageModel, load_model
from latlib.text.chat import templated


def load_tokenizer(
    folder: str | os.PathLike[str], settings: ModelSettings
) -> PreTrainedTokenizerBase:
    """The tokenizer of what `load_model` loads, without its weights."""
    field = "model.source"
    allowed = Allowed.by(settings, revision=str(folder) == settings.source)
    tokenizer = open_tokenizer(located(folder, field, allowed.revision), field, allowed)
    return templated(tokenizer, settings.template, settings.date)


def load_released(
    base_source: str | os.PathLike[str], settings: ModelSettings, released: str | os.PathLike[str]
) -> LanguageModel:
    """Somebody's trained model: a whole one (folder or hub id, with its own tokenizer), or an
    adapter (it has an adapter_config.json) on the model `base_source`, with that one's tokenizer.
    Raises as `load_model`, naming `released`."""
    source = located(released, "released")
    if not is_adapter(source, "released"):
        return load_model(source, settings, field="released")
    lm = load_model(base_source, settings)
    model = open_adapter(lm.model, source, "released", Allowed.by(settings, revision=False)).eval()
    return replace(lm, model=model.requires_grad_(False))
