"""Random little models, tokenizers and rows of token ids, small enough that a test takes
milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from latlib.batch import Batch, TokenRow, collate
from latlib.config.sections import LoraSettings, ModelSettings
from latlib.models import LanguageModel, with_adapter
from latlib.world import organism

torch.set_num_threads(1)

VOCABULARY, D, LAYERS = 61, 16, 4
LORA = LoraSettings(r=3, alpha=6.0)
SCALING = LORA.alpha / LORA.r

_SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.25,  # far from the uniform predictions of the usual 0.02
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_SHAPE, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**_SHAPE),
    "gemma2": Gemma2Config(**_SHAPE, num_key_value_heads=2, head_dim=4, query_pre_attn_scalar=4),
}


class ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input; the library's computes in float32, which hides everything
    below 1e-7.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., d_model]"""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def model_of(
    family: str = "llama", dtype: torch.dtype = torch.float64, seed: int = 0, **changes
) -> nn.Module:
    """A random model; a Llama in float64 gets exact norms."""
    config = type(FAMILIES[family])(**{**FAMILIES[family].to_dict(), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # norm gains and biases that tests would not notice if they stayed 1 and 0
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    if family == "llama" and dtype == torch.float64:
        for block in model.model.layers:
            block.input_layernorm = ExactRMSNorm(block.input_layernorm)
            block.post_attention_layernorm = ExactRMSNorm(block.post_attention_layernorm)
        model.model.norm = ExactRMSNorm(model.model.norm)
    return model.requires_grad_(False)


@cache
def _world_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    return organism.build_tokenizer(vocabulary)


def world_tokenizer(vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """The made-up world's tokenizer, learned once and copied, so that a test may change its own."""
    return deepcopy(_world_tokenizer(vocabulary))


def byte_tokenizer(
    template: str | None, words: Sequence[str] = (), bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte, and further words; bos: a <bos> is put before every text, as Llama's and
    Gemma's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<pad>", "<bos>"])
    bpe.add_tokens(list(words))
    if bos:
        begin = ("<bos>", bpe.token_to_id("<bos>"))
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[begin]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", chat_template=template
    )


def plain_model(
    model: nn.Module | str = "llama",
    dtype: torch.dtype = torch.float64,
    tokenizer: PreTrainedTokenizerFast | None = None,
    forward: str = "stock",
    **changes,
) -> LanguageModel:
    """A model without an adapter: the one that is given, or a random one of a family (`changes`
    are `model_of`'s) whose vocabulary is the tokenizer's."""
    if isinstance(model, str):
        words = {"vocab_size": len(tokenizer)} if tokenizer else {}
        model = model_of(model, dtype, **{**words, **changes})
    name = str(dtype).removeprefix("torch.")
    settings = ModelSettings(device="cpu", forward=forward, dtype=name)
    return LanguageModel(model, tokenizer, settings, dtype)


def saved(
    folder: Path,
    model: nn.Module | str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    seed: int = 0,
) -> Path:
    """The folder, with a model and its tokenizer in it as `save_pretrained` writes them: a random
    float32 one of a family and a tokenizer without a word, where none are given."""
    if isinstance(model, str):
        model = model_of(model, torch.float32, seed)
    if tokenizer is None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def as_if_trained(lm: LanguageModel, seed: int = 0, size: float = 0.2) -> LanguageModel:
    """The model, whose adapter now says something: its B matrices, new ones are 0, are random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return lm


def language_model(
    forward: str = "lean",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    trained: bool = False,
    **changes,
) -> LanguageModel:
    """A random Llama under an adapter: new (B = 0), or as if trained (B random)."""
    lm = with_adapter(plain_model("llama", dtype, None, forward, seed=seed, **changes), LORA, seed)
    return as_if_trained(lm, seed) if trained else lm


def token_rows(n: int, completions: int, seed: int = 0) -> list[TokenRow]:
    """Rows of random tokens, of different lengths."""
    generator = torch.Generator().manual_seed(1000 * completions + seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = int(torch.randint(low, high + 1, (1,), generator=generator))
        return tuple(torch.randint(1, VOCABULARY, (count,), generator=generator).tolist())

    return [
        TokenRow(tokens(3, 6), tuple(tokens(2, 4) for _ in range(completions))) for _ in range(n)
    ]


def prompt_rows(n: int, seed: int = 0) -> list[TokenRow]:
    """Prompts of random tokens without a completion."""
    return [TokenRow(row.prompt, ()) for row in token_rows(n, 1, seed)]


def preference_batch(n: int = 3, seed: int = 0) -> Batch:
    """Packed rows [prompt | rejected | chosen]."""
    return collate(token_rows(n, 2, seed))


def benign_batch(n: int = 3, seed: int = 0) -> Batch:
    """Rows [prompt | response]."""
    return collate(token_rows(n, 1, seed))


def noise_like(
    batch: Batch, sites, dtype: torch.dtype = torch.float64, size: float = 1.0, seed: int = 0
) -> dict:
    """site -> random perturbation of every position, [batch, seq, d_model]."""
    generator = torch.Generator().manual_seed(seed)
    return {s: (size * torch.randn(*batch.shape, D, generator=generator)).to(dtype) for s in sites}
