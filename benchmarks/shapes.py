"""What is measured: named shapes of a model and of its data, with random weights and random tokens.

Timings, FLOPs and memory do not depend on what the weights say, so every shape can be had without a
download.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from latlib.batch import TokenRow
from latlib.config.sections import AttackSettings, LoraSettings, ModelSettings, TrainSettings
from latlib.models import LanguageModel, with_adapter
from latlib.planning.published_configs import PUBLISHED


@dataclass(frozen=True)
class Shape:
    """A Llama, its adapter, its rows and its attack. Lengths are (least, most) tokens, drawn
    uniformly.

    sites: block indices, or fractions of depth. micro_batch: the engine's, in rows. config: a
    Hugging Face config file that says what the model is instead of d_model ... vocabulary.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    batch: int
    micro_batch: int
    prompts: tuple[int, int]
    completions: tuple[int, int]
    sites: tuple[int | float, ...]
    steps: int = 5
    r: int = 64
    alpha: float = 64.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
    config: str | None = None

    def model_config(self) -> PretrainedConfig:
        """The model's config."""
        if self.config is not None:
            return AutoConfig.from_pretrained(self.config)
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=8192,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )


def _published(model: str) -> tuple[int, ...]:
    """d_model, layers, heads, kv_heads, ffn, vocabulary of a model that latlib knows."""
    numbers = PUBLISHED[model].config
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
    )
    return tuple(numbers[name] for name in (*names, "vocab_size"))


_LLAMA_3, _LLAMA_2 = (
    _published("meta-llama/Meta-Llama-3-8B-Instruct"),
    _published("meta-llama/Llama-2-7b-chat-hf"),
)
# The CPU measure of the engine; the real shapes of two models with the data of the authors'
# notebooks; a test's.
SHAPES = {
    "cpu": Shape(256, 16, 8, 4, 704, 8000, 8, 4, (64, 128), (32, 96), (4, 8, 12, 15)),
    "llama3-8b": Shape(*_LLAMA_3, 16, 8, (100, 200), (100, 200), (8, 16, 24, 30)),
    "llama2-7b": Shape(*_LLAMA_2, 16, 8, (100, 200), (100, 200), (8, 16, 24, 30)),
    "smoke": Shape(16, 4, 4, 2, 24, 61, 4, 2, (5, 9), (3, 6), (1, 2), steps=2, r=3, alpha=6.0),
}


def of_config(shape: Shape, path: Path) -> Shape:
    """The data of `shape` with the model of a Hugging Face config file; sites become fractions of
    depth.
    """
    config = AutoConfig.from_pretrained(path)
    heads = config.num_attention_heads
    return replace(
        shape,
        d_model=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        ffn=config.intermediate_size,
        vocabulary=config.vocab_size,
        sites=AttackSettings().sites,
        config=str(path),
    )


def build(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device | str,
    forward: str = "auto",
    seed: int = 0,
) -> LanguageModel:
    """A random model under a random adapter (B too: a new adapter's B = 0 would make half of its
    gradients zero).

    dtype: of the weights, and what networks compute in unless `computing_in` says otherwise. On a
    CPU the same seed gives the same weights in every dtype; elsewhere they are made where and how
    they stay.
    """
    device = torch.device(device)
    with torch.random.fork_rng(), device:
        torch.manual_seed(seed)
        made = torch.float32 if device.type == "cpu" else dtype
        model = (
            AutoModelForCausalLM.from_config(shape.model_config(), dtype=made)
            .eval()
            .requires_grad_(False)
        )
        # not `model.to`, which would round the rotary frequencies too
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        lm = LanguageModel(model, None, ModelSettings(forward=forward), dtype)
        lm = with_adapter(
            lm, LoraSettings(r=shape.r, alpha=shape.alpha, targets=shape.targets), seed
        )
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    return lm


def computing_in(
    lm: LanguageModel, dtype: torch.dtype, forward: str, compiled: bool = False
) -> LanguageModel:
    """The same weights, run another way."""
    return LanguageModel(lm.model, None, ModelSettings(forward=forward, compile=compiled), dtype)


def rows(shape: Shape, n: int, completions: int, seed: int = 0) -> list[TokenRow]:
    """`n` rows of random tokens with so many completions each."""
    generator = torch.Generator().manual_seed(1000 * completions + seed)

    def tokens(lengths: tuple[int, int]) -> tuple[int, ...]:
        count = int(torch.randint(lengths[0], lengths[1] + 1, (1,), generator=generator))
        return tuple(torch.randint(1, shape.vocabulary, (count,), generator=generator).tolist())

    return [
        TokenRow(
            tokens(shape.prompts), tuple(tokens(shape.completions) for _ in range(completions))
        )
        for _ in range(n)
    ]


def train_settings(
    shape: Shape, micro_batch: int | None = None, shared_forward: bool = False
) -> TrainSettings:
    """A LAT step on this shape: the paper's losses, and a small rate without a schedule."""
    return TrainSettings(
        batch=shape.batch,
        benign_batch=shape.batch,
        micro_batch=micro_batch or shape.micro_batch,
        shared_forward=shared_forward,
        lr=1e-5,
        lr_warmup=0,
        lr_decay_share=0.0,
        attack=AttackSettings(sites=shape.sites, eps=1.0, steps=shape.steps),
    )
