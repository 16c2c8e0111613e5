"""Load a causal LM with its tokenizer, put an adapter on it, and hand out the networks that run it.

The frozen teacher is the same weights with the adapter off; there is never a second copy."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from latlib.errors import SettingError
from latlib.fused.llama import LeanNetwork, fits, runs_lean, will_run_lean
from latlib.hooks import CausalLM
from latlib.io.hub import (
    Allowed,
    located,
    open_adapter,
    open_config,
    open_model,
    open_tokenizer,
    quietly,
)
from latlib.io.machine import can_compile, resolve_device, resolve_dtype
from latlib.network import StockNetwork
from latlib.network_protocol import Network
from latlib.processes import ALONE, Processes

Options = Any  # a section of `config.sections`, or anything with its fields


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal LM (plain or PEFT) with its tokenizer and the precision it computes in."""

    model: CausalLM
    tokenizer: Any
    settings: Options
    dtype: torch.dtype
    processes: Processes = ALONE  # those that train it together (`latlib.distributed.ranks.wrap`)

    @property
    def lean(self) -> bool:
        """Whether networks run the lean forward: asked for, or small and of the Llama family."""
        if self.settings.forward == "lean" and not fits(self.model):
            raise SettingError(
                f"model.forward = 'lean' does not fit {type(self.model).__name__} with this"
                " adapter: set it to 'auto'"
            )
        if self.processes.mode is not None or self.settings.forward == "stock":
            return False
        return self.settings.forward == "lean" or runs_lean(self.model)

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return self.model.config.num_hidden_layers

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        return getattr(self.model.config, "max_position_embeddings", 1 << 30)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    def network(self, adapter: bool = True, train: bool = False) -> Network:
        """A view of the weights as they are now. adapter=False is the frozen teacher; train=True
        keeps the graph."""
        if self.lean:
            return LeanNetwork(self.model, adapter, train, self.dtype)
        # a compiled block would not be gathered
        spread = self.processes.mode == "fsdp2"
        compiled = self.settings.compile and not spread and can_compile(self.device.type)
        return StockNetwork(self.model, adapter, train, compiled=compiled, processes=self.processes)


def load_model(
    folder: str | os.PathLike[str],
    settings: Options,
    adapter: str | os.PathLike[str] | None = None,
    field: str = "model.source",
) -> LanguageModel:
    """A `LanguageModel` from a model folder or hub id, with an adapter folder on top if given.

    A model small enough for the lean forward keeps float32 weights and computes in
    `settings.dtype`; a large one is loaded in that dtype. model.revision is that of model.source
    alone. Raises SettingError naming `field` (or 'adapter') for what is missing, gated or broken,
    and for pickles and foreign code that the settings do not allow."""
    device = resolve_device(settings.device)
    dtype = resolve_dtype(settings.dtype, device)
    allowed = Allowed.by(settings, revision=str(folder) == settings.source)
    source = located(folder, field)
    lean = settings.forward != "stock" and will_run_lean(open_config(source, field, allowed))
    weights = torch.float32 if lean and dtype == torch.bfloat16 else dtype
    tokenizer = open_tokenizer(source, field, allowed)
    model = _cast(open_model(source, field, allowed, weights), weights).to(device).eval()
    if adapter is not None:
        model = open_adapter(
            model, located(adapter, "adapter"), "adapter", Allowed.by(settings, revision=False)
        ).eval()
    model.requires_grad_(False)
    return LanguageModel(model, tokenizer, settings, dtype)


def _cast(model: CausalLM, dtype: torch.dtype) -> nn.Module:
    """Parameters in `dtype`; buffers stay: rotary frequencies rounded to bf16 turn far positions by
    the wrong angle."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def with_adapter(lm: LanguageModel, lora: Options, seed: int) -> LanguageModel:
    """A new LoRA adapter on a plain model; B starts at zero, so the model is unchanged until it is
    trained.

    Raises SettingError when a target module does not exist."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(lm.model, config)
        except ValueError as error:
            raise SettingError(f"lora.targets = {list(lora.targets)}: {error}") from None
    return LanguageModel(model.eval(), lm.tokenizer, lm.settings, lm.dtype)
