"""Replies written out: greedy generation at batch size, under a perturbation, an ablation or both.

1. Prompts are padded on the left, so that all rows begin to write at once.
2. A perturbation acts on the prompt, once, and never again while decoding. It is found on packed,
   right-padded batches (`attack`), so it is moved along its row.
3. Ablation acts on everything that is written, on what a perturbation writes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from latlib.batch import Batch, TokenRow, collate
from latlib.evaluation.fast_linears import fast_linears
from latlib.evaluation.phrases import Texts
from latlib.hooks import Ablate, LATHook
from latlib.models import LanguageModel
from latlib.proof.prove import greedy
from latlib.text.chat import Row, tokenise
from latlib.threat import Site

TokenRows = Sequence[TokenRow]
Perturb = Callable[[Batch], Mapping[Site, Tensor]]


@dataclass(frozen=True)
class Reply:
    """What a model wrote. ended: whether it ended its turn, and no limit of tokens did."""

    text: str
    ended: bool


def batches(
    rows: TokenRows, size: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[list[int], Batch]]:
    """(row indices, batch) of up to `size` rows of similar length."""
    for index in of_similar_length([row.length for row in rows], size):
        yield index, collate([rows[i] for i in index], device=device)


def of_similar_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of up to `size` rows at a time, the shortest first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for at in range(0, len(order), size):
        yield order[at : at + size]


def generate(
    lm: LanguageModel,
    prompts: Texts,
    perturb: Perturb | None = None,
    max_new_tokens: int = 24,
    system_prompt: str | None = None,
    directions: Tensor | None = None,
    size: int = 32,
) -> list[str]:
    """Greedy replies to prompts as text, through the chat template, `size` prompts at a time with a
    key-value cache.

    perturb: makes the perturbation of a batch of prompts, which acts on them only, never again
    while decoding. directions: [d_model] or [k, d_model], ablated throughout.
    """
    asked = [Row(str(i), prompt, ()) for i, prompt in enumerate(prompts)]
    rows = tokenise(asked, lm.tokenizer, lm.context, system_prompt)
    return write(lm, rows, perturb, directions, size, max_new_tokens)


def write(
    lm: LanguageModel,
    rows: TokenRows,
    perturb: Perturb | None = None,
    directions: Tensor | None = None,
    size: int = 32,
    max_new_tokens: int = 64,
) -> list[str]:
    """`generate` for the prompts of rows, in their order."""
    found = replies(lm, rows, perturb, directions, size, max_new_tokens)
    return [reply.text for reply in found]


def replies(
    lm: LanguageModel,
    rows: TokenRows,
    perturb: Perturb | None = None,
    directions: Tensor | None = None,
    size: int = 32,
    max_new_tokens: int = 64,
) -> list[Reply]:
    """`write`, and whether each reply ended. Replies end at the model's context."""
    tokenizer = lm.tokenizer
    pad = tokenizer.pad_token_id
    options = {
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }
    found = [Reply("", False)] * len(rows)
    for index, batch in _prompt_batches(lm, rows, size):
        packed = perturb(batch) if perturb else {}
        deltas = {site: shift_left_padded(delta, batch) for site, delta in packed.items()}
        inputs = left_padded(lm, [rows[i].prompt for i in index])
        ablation = nullcontext() if directions is None else Ablate(lm.model, directions)
        # the last token that is written is not read again
        room = lm.context + 1 - inputs["input_ids"].shape[1]
        options["max_new_tokens"] = min(max_new_tokens, room)
        # in this order, so that what a perturbation writes is ablated too
        hook = LATHook(lm.model, deltas, decoding=True)
        with torch.no_grad(), hook, ablation, greedy(lm.model), _fast(lm):
            ends = _ends(lm.model.generation_config)
            # through the processes, if several hold the model between them: each writes all replies
            run = partial(lm.model.generate, **inputs, **options)
            out = lm.processes.through(False, run)
        new = out[:, inputs["input_ids"].shape[1] :]
        written = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text, ids in zip(index, written, new.tolist(), strict=True):
            found[i] = Reply(text.strip(), not ends.isdisjoint(ids))
    return found


def _fast(lm: LanguageModel) -> AbstractContextManager[None]:
    whole = lm.processes.mode is None and lm.model.dtype == torch.float32
    return fast_linears(lm.model) if whole and lm.paths.lean else nullcontext()


def _ends(settings: GenerationConfig) -> set[int]:
    """The tokens that end a reply."""
    ids = settings.eos_token_id
    return set(ids if isinstance(ids, list) else [ids])


def _prompt_batches(
    lm: LanguageModel, rows: TokenRows, size: int
) -> Iterator[tuple[list[int], Batch]]:
    """`batches`; of prompts of one length each, where the model cannot be padded."""
    if lm.paths.padded:
        yield from batches(rows, size, lm.device)
        return
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row.prompt), []).append(i)
    for group in by_length.values():
        for index, batch in batches([rows[i] for i in group], size, lm.device):
            yield [group[i] for i in index], batch


def left_padded(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask [batch, longest] of rows of token ids, padded on the left as
    batched generation needs.
    """
    tensors = [torch.tensor(row) for row in rows]
    pad = lm.tokenizer.pad_token_id or 0  # masked, so any token does
    ids = pad_sequence(tensors, True, pad, padding_side="left")
    ones = [torch.ones_like(row) for row in tensors]
    mask = pad_sequence(ones, True, 0, padding_side="left")
    return {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}


def shift_left_padded(delta: Tensor, batch: Batch) -> Tensor:
    """Move a packed batch's prompt perturbation ([batch, seq, d_model], right-padded) to a
    left-padded prompt batch.
    """
    lengths = (batch.segments == 0).sum(1).tolist()
    prompts = [row[:n] for row, n in zip(delta, lengths, strict=True)]
    return pad_sequence(prompts, True, padding_side="left")
