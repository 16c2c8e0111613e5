"""Small random models of as many architectures as transformers knows how to chat with: what
`latlib` must run rightly, run the general way, or refuse with the reason.

name -> (transformers' class without its ending, settings). Windows are shorter than the rows that
the tests use where a name says so.
"""

from __future__ import annotations

import torch
import transformers
from transformers import PretrainedConfig

VOCABULARY = 64
BASIC = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=128,
    initializer_range=0.25,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
GROUPED = BASIC | dict(num_key_value_heads=2)
HEADS_8 = GROUPED | dict(head_dim=8)
GEMMA = HEADS_8 | dict(query_pre_attn_scalar=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, n_positions=128, initializer_range=0.25
)
LINEAR_ATTENTION = EXPERTS | dict(
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
MULTIPLIED = dict(residual_multiplier=0.22, embedding_multiplier=12.0, attention_multiplier=0.125)
ROUTED = dict(
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=16,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
)
MAMBA = dict(
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_d_state=8,
    mamba_chunk_size=8,
)

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 64}),
    "mistral-window": ("Mistral", GROUPED | {"sliding_window": 8}),
    "ministral": ("Ministral", HEADS_8 | {"sliding_window": 8}),
    "mixtral": ("Mixtral", GROUPED | LOCAL_EXPERTS),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-moe": (
        "Qwen2Moe",
        GROUPED | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3", HEADS_8),
    "qwen3-moe": ("Qwen3Moe", HEADS_8 | EXPERTS | {"moe_intermediate_size": 16}),
    "qwen3-next": ("Qwen3Next", HEADS_8 | LINEAR_ATTENTION),
    "qwen3.5": ("Qwen3_5Text", HEADS_8 | LINEAR_ATTENTION),
    "gemma": ("Gemma", HEADS_8),
    "gemma2": ("Gemma2", GEMMA | {"sliding_window": 64}),
    "gemma2-window": ("Gemma2", GEMMA | {"sliding_window": 8}),
    "gemma3": ("Gemma3Text", GEMMA | {"sliding_window": 64}),
    "gemma3-window": ("Gemma3Text", GEMMA | {"sliding_window": 8}),
    "gemma3n": (
        "Gemma3nText",
        GEMMA
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [48] * 4,
        },
    ),
    "phi": ("Phi", BASIC),
    "phi3": ("Phi3", GROUPED),
    "phi3-window": ("Phi3", GROUPED | {"sliding_window": 8}),
    "phimoe": ("Phimoe", GROUPED | LOCAL_EXPERTS),
    "cohere": ("Cohere", GROUPED),
    "cohere2": ("Cohere2", GROUPED | {"sliding_window": 64}),
    "cohere2-window": ("Cohere2", GROUPED | {"sliding_window": 8}),
    "granite": ("Granite", GROUPED | MULTIPLIED | {"logits_scaling": 8.0}),
    "granite-moe": (
        "GraniteMoe",
        GROUPED | MULTIPLIED | LOCAL_EXPERTS | {"logits_scaling": 6.0},
    ),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        GROUPED
        | MULTIPLIED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "mamba_n_groups": 1,
        },
    ),
    "glm": ("Glm", HEADS_8 | {"partial_rotary_factor": 0.5}),
    "glm4": ("Glm4", HEADS_8 | {"partial_rotary_factor": 0.5}),
    "glm4-moe": (
        "Glm4Moe",
        HEADS_8
        | {
            "partial_rotary_factor": 0.5,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "olmo": ("Olmo", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED | {"sliding_window": 8}),
    "olmoe": ("Olmoe", GROUPED | EXPERTS),
    "smollm3": ("SmolLM3", GROUPED),
    "stablelm": ("StableLm", GROUPED),
    "starcoder2": ("Starcoder2", GROUPED),
    "nemotron": ("Nemotron", GROUPED),
    "exaone4": ("Exaone4", GROUPED | {"sliding_window": 64}),
    "exaone4-window": ("Exaone4", GROUPED | {"sliding_window": 8}),
    "gpt-oss": ("GptOss", HEADS_8 | LOCAL_EXPERTS | {"sliding_window": 64}),
    "gpt-oss-window": ("GptOss", HEADS_8 | LOCAL_EXPERTS | {"sliding_window": 8}),
    "gpt2": ("GPT2", GPT2),
    "gpt-neox": ("GPTNeoX", BASIC),
    "gptj": ("GPTJ", GPT2 | {"rotary_dim": 8}),
    "bloom": ("Bloom", dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=4)),
    "falcon": ("Falcon", BASIC),
    "falcon-h1": (
        "FalconH1",
        GROUPED | MAMBA | {"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "opt": ("OPT", BASIC | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mpt": (
        "Mpt",
        dict(vocab_size=VOCABULARY, d_model=32, n_layers=4, n_heads=4, max_seq_len=128),
    ),
    "deepseek-v2": ("DeepseekV2", BASIC | ROUTED),
    "deepseek-v3": ("DeepseekV3", BASIC | ROUTED),
    "llama4": (
        "Llama4Text",
        HEADS_8 | LOCAL_EXPERTS | {"attention_chunk_size": 8, "intermediate_size_mlp": 48},
    ),
    "mamba": (
        "Mamba",
        dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, state_size=8),
    ),
    "mamba2": (
        "Mamba2",
        dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=4,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            chunk_size=8,
        ),
    ),
    "recurrent-gemma": (
        "RecurrentGemma",
        GROUPED
        | {"lru_width": 32, "attention_window_size": 8, "conv1d_width": 4, "num_hidden_layers": 3},
    ),
    "lfm2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 48}),
    "jamba": (
        "Jamba",
        GROUPED
        | EXPERTS
        | {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "bamba": (
        "Bamba",
        GROUPED
        | {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1, 3],
        },
    ),
    "helium": ("Helium", HEADS_8),
    "seed-oss": ("SeedOss", HEADS_8),
    "ernie4.5": ("Ernie4_5", HEADS_8),
    "hunyuan": ("HunYuanDenseV1", HEADS_8),
    "arcee": ("Arcee", GROUPED),
    "apertus": ("Apertus", GROUPED),
    "persimmon": ("Persimmon", BASIC),
    "minimax": ("MiniMax", HEADS_8 | LOCAL_EXPERTS | {"block_size": 8}),
    "zamba2": (
        "Zamba2",
        BASIC
        | {
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "adapter_rank": 4,
        },
    ),
}


def config_of(name: str) -> PretrainedConfig:
    """The config of an architecture; skips what this version of transformers lacks."""
    kind, settings = ARCHITECTURES[name]
    return getattr(transformers, f"{kind}Config")(**settings)


def random_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A model of an architecture with random weights, norms and biases too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype).eval().requires_grad_(False)
