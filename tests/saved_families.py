"""Saved models of other families with the made-up world's tokenizer: what a profile opens by its
folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import world_tokenizer
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
)

from latlib.world import organism

SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=organism.CONTEXT,
    tie_word_embeddings=False,
)
GROUPED = dict(SHAPE, num_key_value_heads=1)
# family -> (its config, shape, names of layers that get an adapter)
FAMILIES = {
    "llama": (LlamaConfig, GROUPED, ["q_proj", "v_proj"]),
    "qwen2": (Qwen2Config, GROUPED | {"tie_word_embeddings": True}, ["q_proj", "v_proj"]),
    "gemma2": (
        Gemma2Config,
        GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16},
        ["q_proj", "down_proj"],
    ),
    "gpt_neox": (GPTNeoXConfig, SHAPE, ["query_key_value", "dense_4h_to_h"]),
}
OTHERS = {
    "mistral": (MistralConfig, GROUPED | {"sliding_window": 16}, ["q_proj", "down_proj"]),
    "phi3": (Phi3Config, GROUPED, ["qkv_proj", "gate_up_proj"]),
    "phi": (PhiConfig, SHAPE, ["q_proj", "fc1"]),  # attention and MLP side by side
    "gemma3": (
        Gemma3TextConfig,
        GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
        ["q_proj"],
    ),
    "falcon": (FalconConfig, SHAPE, ["query_key_value"]),  # its blocks return tuples
}


def saved_model(family: str, folder: Path) -> None:
    """A random model of a family and a tokenizer with a chat template, as `save_pretrained` writes
    them.
    """
    kind, shape, _ = (FAMILIES | OTHERS)[family]
    tokenizer = world_tokenizer()
    if family == "gpt_neox":  # another template: two tokens behind the request
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "'<|assistant|>'", "'<|end|><|assistant|>'"
        )
    torch.manual_seed(0)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    AutoModelForCausalLM.from_config(kind(vocab_size=512, **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
