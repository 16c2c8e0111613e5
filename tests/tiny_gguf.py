"""Little GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

gguf = pytest.importorskip("gguf", reason="pip install gguf: what reads GGUF files is not tested")

SPECIAL = ("<|end|>", "<|im_start|>", "<|im_end|>")
# the merge of two digits is never reached where numbers are split into digits
MERGES = [("2", "0"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("o", "o"), ("Ġ", "2")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The moon, in 2024 too:  the 20th tooth's 2 roots\n\nwere <|im_end|> found there ."


SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
)


def little_model(kind: type[PretrainedConfig] = LlamaConfig, **changes: Any) -> nn.Module:
    """A random model with `chat_tokenizer`'s vocabulary; its gains and biases would be missed."""
    torch.manual_seed(0)
    config = kind(vocab_size=len(chat_tokenizer()), **SHAPE | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def chat_tokenizer(digits: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text as GPT-2 does, and numbers into digits, as SmolLM2's."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, MERGES)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, MERGES))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        unk_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL),
        chat_template=TEMPLATE,
    )


def write_gguf(
    file: Path,
    model: nn.Module,
    architecture: str = "llama",
    pre: str = "smollm",
    kind: str = "F32",
    more: dict[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a model and `chat_tokenizer` as a GGUF file, its matrices as `kind`; returns its weights
    as they are in the file. more: further settings, and, of name 'tensor', tensors."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    more = more or {}
    if architecture == "llama" and "llama.rope.dimension_count" not in more:
        writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, pre)
    for name, value in more.items():
        if name != "tensor":
            writer.add_key_value(name, *value)
    kept = {}
    names = gguf.get_tensor_name_map(_architecture(architecture), config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, ending = name.rpartition(".")
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        turned = architecture == "llama" and ("q_proj" in name or "k_proj" in name)
        array = value.float()
        if turned:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(value.shape)
        type_ = getattr(gguf.GGMLQuantizationType, kind if value.dim() == 2 else "F32")
        data = gguf.quants.quantize(array.contiguous().numpy(), type_)
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", data, raw_dtype=type_)
        read = torch.from_numpy(gguf.quants.dequantize(data, type_).copy())
        if turned:
            read = read.reshape(heads, -1, 2, read.shape[1]).swapaxes(1, 2).reshape(value.shape)
        kept[name] = read
    for name, value in more.get("tensor", {}).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _architecture(name: str) -> Any:
    found = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name]
    return found[0]


def _add_tokenizer(writer: Any, pre: str) -> None:
    tokenizer = chat_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([word for word, _ in vocabulary])
    writer.add_token_types(
        [kinds.CONTROL if word in SPECIAL else kinds.NORMAL for word, _ in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
