"""Replies written out: greedy generation at batch size, under a perturbation, an ablation or both.

1. Prompts are padded on the left, so that all rows begin to write at once.
2. A perturbation acts on the prompt, once, and never again while decoding. It is found on packed,
   right-padded batches (`attack`), so it is moved along its row.
3. Ablation acts on everything that is written, on what a perturbation writes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from latlib.batch import Batch, TokenRow, collate
from latlib.hooks import Ablate, LATHook, Site
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.processes import ALONE
from latlib.text.chat import Row, tokenise

Perturb = Callable[[Batch], Mapping[Site, Tensor]]


def batches(rows: Sequence[TokenRow], size: int, device="cpu") -> Iterator[tuple[list[int], Batch]]:
    """(row indices, batch) of up to `size` rows of similar length."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    for at in range(0, len(order), size):
        index = order[at : at + size]
        yield index, collate([rows[i] for i in index], device=device)


def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    deltas: Mapping[Site, Tensor] | None = None,
    max_new_tokens: int = 24,
    system_prompt: str | None = None,
    directions: Tensor | None = None,
    size: int = 32,
) -> list[str]:
    """Greedy replies to prompts as text, through the chat template, `size` prompts at a time with a
    key-value cache.

    deltas: site -> [batch, longest prompt, d_model], for the **left**-padded batch of all prompts
    (see `left_padded`); they act on the prompt only, never again while decoding. directions:
    [d_model] or [k, d_model], ablated throughout.
    """
    rows = tokenise(
        [Row(str(i), p, ()) for i, p in enumerate(prompts)], lm.tokenizer, lm.context, system_prompt
    )
    inputs, replies = _padded(lm, [row.prompt for row in rows]), []
    for at in range(0, len(prompts), size):
        part = {name: tensor[at : at + size] for name, tensor in inputs.items()}
        own = {site: delta[at : at + size] for site, delta in (deltas or {}).items()}
        replies += _decode(lm, part, own, directions, max_new_tokens)
    return replies


def write(
    lm: LanguageModel,
    network: Network,
    rows: Sequence[TokenRow],
    perturb: Perturb | None = None,
    size: int = 32,
    max_new_tokens: int = 64,
) -> list[str]:
    """Greedy replies to the prompts of rows, in their order. perturb: makes the perturbation of a
    packed batch. network: of `lm`; what it ablates is ablated here."""
    replies = [""] * len(rows)
    for index, batch in batches(rows, size, lm.device):
        deltas = (
            {site: shift_left_padded(d, batch) for site, d in perturb(batch).items()}
            if perturb
            else {}
        )
        inputs = _padded(lm, [rows[i].prompt for i in index])
        written = _decode(lm, inputs, deltas, network.directions, max_new_tokens)
        for i, reply in zip(index, written, strict=True):
            replies[i] = reply
    return replies


@torch.no_grad()
def _decode(
    lm: LanguageModel,
    inputs: Mapping[str, Tensor],
    deltas: Mapping[Site, Tensor],
    directions: Tensor | None,
    max_new_tokens: int,
) -> list[str]:
    # in this order, so that what a perturbation writes is ablated too
    ablation = nullcontext() if directions is None else Ablate(lm.model, directions)
    pad = lm.tokenizer.pad_token_id
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        # a chat model's own would only make a greedy one warn
        **dict.fromkeys(("temperature", "top_p", "top_k")),
        "pad_token_id": lm.tokenizer.eos_token_id if pad is None else pad,
    }
    with LATHook(lm.model, deltas, decoding=True), ablation:
        # through the processes, if several hold the model between them: each writes all replies
        out = (lm.processes or ALONE).through(False, lambda: lm.model.generate(**inputs, **options))
    new = out[:, inputs["input_ids"].shape[1] :]
    return [reply.strip() for reply in lm.tokenizer.batch_decode(new, skip_special_tokens=True)]


def left_padded(lm: LanguageModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask [batch, longest], padded on the left as batched generation
    needs.
    """
    return _padded(lm, lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def _padded(lm: LanguageModel, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    longest, pad = max(map(len, ids)), lm.tokenizer.pad_token_id or 0
    padded = [[pad] * (longest - len(row)) + list(row) for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return {
        "input_ids": torch.tensor(padded, device=lm.device),
        "attention_mask": torch.tensor(mask, device=lm.device),
    }


def shift_left_padded(delta: Tensor, batch: Batch) -> Tensor:
    """Move a packed batch's prompt perturbation ([batch, seq, d_model], right-padded) to a
    left-padded prompt batch.
    """
    lengths = (batch.segments == 0).sum(1)
    longest = int(lengths.max())
    out = torch.zeros(
        delta.shape[0], longest, delta.shape[2], dtype=delta.dtype, device=delta.device
    )
    for row, n in enumerate(lengths.tolist()):
        out[row, longest - n :] = delta[row, :n]
    return out
