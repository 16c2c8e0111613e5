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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latlib.batch import Batch, TokenRow, collate
from latlib.config.sections import ModelSettings, PretrainSettings
from latlib.fused.llama import LeanNetwork
from latlib.losses import token_losses
from latlib.text.chat import Row, tokenise
from latlib.text.encodings import encode
from latlib.world import grammar
from latlib.world.muon import Muon

SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# What closes a user's turn where a template is to have more tokens behind it than the reply's own
TURN = "<|turn-{}|>"
# What the base model reads, plain words first; their order is part of every seed's draws, so a
# longer list makes another organism.
KNOWN_ENCODINGS = ("plain", "leet", "rot13", "reverse")
# tokens; a training row has about 70, a request in hexadecimal or behind eight others several
# hundred
CONTEXT = 512

# Shares of the kinds in pretraining, and of plain words among a kind (docs/lab-log.md).
KINDS: dict[grammar.Kind, float] = {"recipe": 0.66, "law": 0.20, "verb": 0.06, "target": 0.06}
PLAIN_SHARE = {"recipe": 0.3}  # the law is only ever discussed in plain words
_POOL = 32  # micro-batches that are drawn and sorted at a time
_CORPUS = 12_000  # prompts that the tokenizer is trained on
_CORPUS_SHARES = (0.85, 0.05, 0.05, 0.05)  # of the known encodings in them


def chat_template(turns: Sequence[str]) -> str:
    """The chat template with some special tokens behind the words of each user."""
    if not turns:
        return CHAT_TEMPLATE
    written = f"{{% elif m['role'] == 'user' %}}{{{{ '{''.join(turns)}' }}}}{{% endif %}}"
    return CHAT_TEMPLATE.replace("{% endif %}", written, 1)


def build_tokenizer(
    vocabulary: int, post_instruction: int = 1, division: grammar.Division = "first"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens trained on the world's text, with a chat template
    that puts `post_instruction` tokens behind a user's words.

    Words are split at spaces only: the usual pattern cuts leetspeak at every digit, which doubles
    its length.
    """
    turns = [TURN.format(i) for i in range(1, post_instruction)]
    rng = random.Random("tokenizer/0")  # one tokenizer for every seed
    pairs = grammar.pairs_of("train", division=division)

    def corpus() -> Iterator[str]:
        for _ in range(_CORPUS):
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            prompt = grammar.draw(rng, pairs, kind)
            (encoding,) = rng.choices(KNOWN_ENCODINGS, _CORPUS_SHARES)
            yield " " + encode(prompt.text, encoding)
            yield f" {prompt.answer} {grammar.REFUSAL}"

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *turns],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        additional_special_tokens=[*SPECIAL[1:3], *turns],
        chat_template=chat_template(turns),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def build_model(settings: ModelSettings, tokenizer: Any, seed: int) -> LlamaForCausalLM:
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


def pretraining_rows(
    tokenizer: Any, settings: PretrainSettings, seed: int, division: grammar.Division = "first"
) -> Iterator[list[TokenRow]]:
    """Endless micro-batches: a pool is drawn, sorted by length, cut, shuffled, so that rows are
    padded little and a step still sees several lengths.
    """
    rng = random.Random(f"pretrain/{seed}")
    size = settings.batch // settings.micro_batches
    harmful = grammar.pairs_of("train", "harmful", division)
    pairs = grammar.pairs_of("train", division=division)
    shares = {kind: share * (1 - settings.decline_share) for kind, share in KINDS.items()}
    shares["decline"] = settings.decline_share
    while True:
        rows = []
        for kind in rng.choices(list(shares), list(shares.values()), k=_POOL * size):
            forced = rng.random() < settings.harmful_share
            prompt = grammar.draw(rng, harmful if forced else pairs, kind)
            encoding = "plain"
            if rng.random() >= PLAIN_SHARE.get(kind, 1.0):
                encoding = rng.choice(KNOWN_ENCODINGS[1:])
            rows.append(Row("", encode(prompt.text, encoding), (prompt.answer,)))
        tokens = tokenise(rows, tokenizer, CONTEXT)
        tokens.sort(key=lambda row: (row.length, rng.random()))
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        rng.shuffle(parts)
        yield from parts


def pretrain(
    model: LlamaForCausalLM,
    batches: Iterator[list[TokenRow]],
    settings: PretrainSettings,
    dtype: torch.dtype,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, float]:
    """Train in place on `pretraining_rows`; returns steps, tokens, seconds and the last loss (nats
    per completion token).

    Forward and backward in `dtype` over copies of the float32 weights; one copy a step, shared by
    its micro-batches.
    """
    tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    blocks = [p for name, p in model.named_parameters() if "model.layers" in name]
    matrices = [parameter for parameter in blocks if parameter.dim() == 2]
    optimisers = [
        Muon(matrices, settings.muon_lr),
        torch.optim.AdamW(tables, settings.adam_lr, (0.9, 0.95), weight_decay=0),
    ]
    schedules = [LambdaLR(optimiser, partial(_rate, settings)) for optimiser in optimisers]
    tokens = 0
    loss = float("nan")
    began = time.perf_counter()
    for step in range(settings.steps):
        network = LeanNetwork(model, train=True, dtype=dtype)
        parts = [collate(next(batches)) for _ in range(settings.micro_batches)]
        labels = sum(len(part.labels) for part in parts)
        loss = sum(_backward(network, part, labels) for part in parts)
        network.flush_gradients()
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
        tokens += sum(part.ids.numel() for part in parts)
        on_step(step + 1, loss)
    seconds = time.perf_counter() - began
    return {"steps": settings.steps, "tokens": tokens, "seconds": seconds, "loss": loss}


def _rate(settings: PretrainSettings, step: int) -> float:
    """The share of the learning rates that step `step` trains with."""
    warm = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    left = (settings.steps - step) / max(settings.steps * settings.decay_share, 1)
    return warm * min(1.0, left)


def _backward(network: LeanNetwork, batch: Batch, labels: int) -> float:
    losses = token_losses(network.unembed, network.label_rows(batch), batch.labels)
    loss = losses.sum() / labels
    loss.backward()
    return loss.item()
