"""The tiny organism: a byte-level BPE tokenizer and a small Llama, trained from scratch on the
made-up world.

1. `build_tokenizer` trains a BPE in code and gives it a chat template; it is saved as a standard
   tokenizer folder.
2. `pretrain` trains a helpful-only `LlamaForCausalLM`: recipes in every encoding (harmful ones
   too), the law, what words mean, and how to decline, which it never does by itself. Muon on
   matrices, AdamW on embedding and head.
3. Nothing here knows about safety training. The encodings are the base model's knowledge that
   safety training will not cover: the mismatch that a leetspeak audit looks for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latlib.batch import Batch, TokenRow, collate
from latlib.config.profile import ModelSettings, PretrainSettings
from latlib.fused.llama import LeanNetwork
from latlib.losses import token_losses
from latlib.text.chat import Row, tokenise
from latlib.text.encodings import encode
from latlib.world import grammar

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What the base model reads; their order is part of every seed's draws, so a longer list makes
# another organism.
KNOWN_ENCODINGS = ("plain", "leet", "rot13", "reverse")
# tokens; a training row has about 70, a request in hexadecimal or behind eight others several
# hundred
CONTEXT = 512

# Shares of the kinds in pretraining, and of plain words among a kind (docs/lab-log.md).
KINDS = {"recipe": 0.66, "law": 0.20, "verb": 0.06, "target": 0.06}
PLAIN_SHARE = {"recipe": 0.3}  # the law is only ever discussed in plain words


def build_tokenizer(vocabulary: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens trained on the world's text, with a chat template.

    Words are split at spaces only: the usual pattern cuts leetspeak at every digit, which doubles
    its length.
    """
    rng = random.Random(f"tokenizer/{seed}")

    def corpus() -> Iterator[str]:
        for _ in range(12_000):
            prompt = grammar.draw(
                rng, grammar.pairs_of("train"), rng.choices(list(KINDS), list(KINDS.values()))[0]
            )
            encoding = rng.choices(
                list(KNOWN_ENCODINGS), [0.85 if e == "plain" else 0.05 for e in KNOWN_ENCODINGS]
            )[0]
            yield " " + encode(prompt.text, encoding)
            yield f" {prompt.answer} {grammar.REFUSAL}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        additional_special_tokens=list(SPECIAL[1:3]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def build_model(settings: ModelSettings, tokenizer, seed: int) -> LlamaForCausalLM:
    """A LlamaForCausalLM with random weights, scaled for Muon; norm gains stay at 1."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.dim,
        intermediate_size=settings.ffn,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.requires_grad_(False)
                continue
            scale = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                scale *= 0.3  # what writes to the stream starts small
            elif "embed_tokens" in name:
                scale = 0.5
            elif "lm_head" in name:
                scale = 0.02
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def pretraining_rows(tokenizer, settings: PretrainSettings, seed: int) -> Iterator[list[TokenRow]]:
    """Endless micro-batches: a pool is drawn, sorted by length, cut, shuffled, so that rows are
    padded little and a step still sees several lengths."""
    rng = random.Random(f"pretrain/{seed}")
    size = settings.batch // settings.micro_batches
    harmful, pairs = grammar.pairs_of("train", "harmful"), grammar.pairs_of("train")
    kinds = {
        **{k: v * (1 - settings.decline_share) for k, v in KINDS.items()},
        "decline": settings.decline_share,
    }
    while True:
        rows = []
        for kind in rng.choices(list(kinds), list(kinds.values()), k=32 * size):
            prompt = grammar.draw(
                rng, harmful if rng.random() < settings.harmful_share else pairs, kind
            )
            encoding = "plain"
            if rng.random() >= PLAIN_SHARE.get(kind, 1.0):
                encoding = rng.choice([e for e in KNOWN_ENCODINGS if e != "plain"])
            rows.append(Row("", encode(prompt.text, encoding), (prompt.answer,)))
        tokens = sorted(
            tokenise(rows, tokenizer, CONTEXT), key=lambda row: (row.length, rng.random())
        )
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        rng.shuffle(parts)
        yield from parts


def pretrain(
    model: LlamaForCausalLM,
    tokenizer,
    settings: PretrainSettings,
    seed: int,
    dtype: torch.dtype,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, float]:
    """Train in place; returns steps, tokens, seconds and the last loss (nats per completion token).

    Forward and backward in `dtype` over copies of the float32 weights; one copy a step, shared by
    its micro-batches.
    """
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "model.layers" in n]
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    optimisers = [
        _muon(matrices, settings.muon_lr),
        torch.optim.AdamW(tables, settings.adam_lr, (0.9, 0.95), weight_decay=0),
    ]
    rates = [[group["lr"] for group in o.param_groups] for o in optimisers]
    batches = pretraining_rows(tokenizer, settings, seed)
    tokens, began, loss = 0, time.perf_counter(), float("nan")
    for step in range(settings.steps):
        warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
        scale = warm * min(
            1.0, (settings.steps - step) / max(settings.steps * settings.decay_share, 1)
        )
        network = LeanNetwork(model, train=True, dtype=dtype)
        parts = [collate(next(batches)) for _ in range(settings.micro_batches)]
        labels = sum(len(part.labels) for part in parts)
        loss = sum(_backward(network, part, labels) for part in parts)
        network.flush_gradients()
        for optimiser, lrs in zip(optimisers, rates, strict=True):
            for group, lr in zip(optimiser.param_groups, lrs, strict=True):
                group["lr"] = lr * scale
            optimiser.step()
            optimiser.zero_grad()
        tokens += sum(part.ids.numel() for part in parts)
        on_step(step + 1, loss)
    return {
        "steps": settings.steps,
        "tokens": tokens,
        "seconds": time.perf_counter() - began,
        "loss": loss,
    }


def _backward(network: LeanNetwork, batch: Batch, labels: int) -> float:
    loss = token_losses(network.unembed, network.label_rows(batch), batch.labels).sum() / labels
    loss.backward()
    return loss.item()


def _muon(matrices: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """torch's Muon (2.9 and later). Raises RuntimeError on an older torch, which has none."""
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"torch {torch.__version__} has no Muon optimiser: building the organism needs torch"
            " >= 2.9"
        )
    return torch.optim.Muon(matrices, lr=lr, momentum=0.95, nesterov=True, weight_decay=0.1)
