"""Load a causal LM with its tokenizer, put an adapter on it, and hand out the networks that run it.

The frozen teacher is the same weights with the adapter off; there is never a second copy."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from latlib.blocks import CausalLM, text_config
from latlib.errors import SettingError
from latlib.fused.llama import runs_lean, will_run_lean
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
from latlib.io.weights import check_tokens
from latlib.network_protocol import Network
from latlib.processes import ALONE, Processes
from latlib.proof.prove import Paths, check_targets, check_teacher, network_of, prove
from latlib.text.chat import templated

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
    def paths(self) -> Paths:
        """The shortcuts that are this model's own function (`latlib.proof`), found once.

        Raises SettingError for a model that latlib cannot run rightly."""
        # 'auto' takes the lean forward where it pays, in one process
        auto = self.settings.forward == "auto" and self.processes.mode is None
        wanted = self.settings.forward == "lean" or (auto and runs_lean(self.model))
        paths = prove(self.model, self.dtype, wanted)
        if self.settings.forward == "lean" and not paths.lean:
            raise SettingError(
                f"model.forward = 'lean' does not fit {type(self.model).__name__} with this"
                " adapter: set it to 'auto'"
            )
        return paths

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return text_config(self.model).num_hidden_layers

    @property
    def context(self) -> int:
        """Longest sequence the model takes, in tokens."""
        config = text_config(self.model)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # a longer row would turn every row of its batch
            return rope["original_max_position_embeddings"]
        return getattr(config, "max_position_embeddings", 1 << 30)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    def network(self, adapter: bool = True, train: bool = False) -> Network:
        """A view of the weights as they are now. adapter=False is the frozen teacher; train=True
        keeps the graph."""
        if not adapter:
            check_teacher(self.model)
        spread = self.processes.mode == "fsdp2"  # a compiled block would not be gathered
        compiled = self.settings.compile and not spread and can_compile(self.device.type)
        options = {"compiled": compiled, "processes": self.processes}
        return network_of(self.model, self.dtype, self.paths, adapter, train, **options)


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
    source = located(folder, field, allowed.revision)
    lean = settings.forward != "stock" and will_run_lean(open_config(source, field, allowed))
    weights = torch.float32 if lean and dtype == torch.bfloat16 else dtype
    tokenizer = templated(open_tokenizer(source, field, allowed), settings.template, settings.date)
    model: Any = open_model(source, field, allowed, weights).to(device).eval()
    if adapter is not None:
        model = open_adapter(
            model, located(adapter, "adapter"), "adapter", Allowed.by(settings, revision=False)
        ).eval()
    model.requires_grad_(False)
    check_tokens(tokenizer, model.get_input_embeddings().weight.shape[0], f"{field} = {source!r}")
    return _proven(LanguageModel(model, tokenizer, settings, dtype))


def _proven(lm: LanguageModel) -> LanguageModel:
    """`lm`, looked at before it is used; what is not the fast way is said."""
    if lm.paths.note:
        warnings.warn(lm.paths.note, stacklevel=3)
    return lm


def with_adapter(lm: LanguageModel, lora: Options, seed: int) -> LanguageModel:
    """A new LoRA adapter on a plain model; B starts at zero, so the model is unchanged until it is
    trained.

    Raises SettingError for a target that is no layer of the model."""
    outside = check_targets(lm.model, lora.targets)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        exclude_modules=outside or None,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(lm.model, config)
        except ValueError as error:
            raise SettingError(f"lora.targets = {list(lora.targets)}: {error}") from None
    return _proven(LanguageModel(model.eval(), lm.tokenizer, lm.settings, lm.dtype))
