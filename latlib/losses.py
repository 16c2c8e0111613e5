"""Toward, away and KL, at label positions only.

1. A forward gives final hidden states [batch, seq, d_model]; only the rows that predict a label
   meet the output matrix, a chunk at a time: no [batch, seq, vocabulary] tensor exists, nor one of
   all labels once they fill more than a chunk.
2. A label's loss depends on its own row alone, so the gradient of a chunk's sum holds every row's
   own gradient. It is taken while the chunk's logits are there, and [labels, d_model] is all that
   is kept: two products with the output matrix, where computing the logits again in the backward
   pass needs three.
3. `token_losses` returns one value per label token; what is averaged over what is the caller's
   choice: the attack sums per-row means (rows do not interact), the defence averages over all
   tokens of the whole batch, however it is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Unembed = Callable[[Tensor], Tensor]  # [n, d_model] -> [n, vocabulary]
CHUNK_ELEMENTS = 1 << 25  # logits that exist at once: 128 MiB in float32
AWAY_LOG_P_FLOOR = -5.0  # the authors ignore tokens this unlikely (docs/sources.md)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, sums and losses: float32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def at_labels(hidden: Tensor, source: Tensor) -> Tensor:
    """[labels, d_model]: the hidden states ([batch, seq, d_model]) where labels are predicted."""
    return hidden.flatten(0, 1).index_select(0, source)


def rows_per_chunk(vocabulary: int) -> int:
    """How many rows of logits exist at once."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def token_losses(
    unembed: Unembed, rows: Tensor, labels: Tensor, away: Tensor | None = None
) -> Tensor:
    """Loss of every label token, [labels], float32 or better, in nats.

    rows: [labels, d_model] hidden states; labels: [labels]; away: [labels] bool, which tokens to
    push away from. toward = -log p(label). away = -log(1 - p(label)), 0 where log p(label) < -5,
    exact for p near 1. Source: Sheshadri et al. 2024 and the authors' code."""
    away = torch.zeros_like(labels, dtype=torch.bool) if away is None else away

    def losses(rows: Tensor, labels: Tensor, away: Tensor) -> Tensor:
        return _LabelLosses.apply(unembed(rows), labels, away)

    return _by_row(losses, unembed, rows, labels, away)


class _LabelLosses(torch.autograd.Function):
    """Toward or away losses [n] from logits [n, vocabulary] with one softmax, all that the backward
    pass needs.

    With p the softmax, q = p(label) and s the sum of all other p (exact where q is near 1), toward
    = -log q and away = -log s. The gradient in the logits is, at the label and elsewhere, q - 1 and
    p for toward, q and (1 - 1 / s) p for away."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, away: Tensor) -> Tensor:
        p = torch.softmax(logits, -1, dtype=wide_of(logits.dtype))
        index = labels[:, None]
        own = p.gather(1, index)
        p.scatter_(1, index, 0.0)
        others = p.sum(1, keepdim=True)
        likely = torch.log1p(-others)
        tiny = torch.finfo(p.dtype).tiny  # of which there is a logarithm
        log_own = torch.where(own > 0.5, likely, own.clamp(min=tiny).log()).squeeze(1)
        counts = ~away | (log_own >= AWAY_LOG_P_FLOOR)
        ctx.save_for_backward(p, own, others, index, away, counts)
        ctx.dtype = logits.dtype
        log_others = others.clamp(min=tiny).log().squeeze(1)
        return torch.where(away, -log_others * counts, -log_own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        p, own, others, index, away, counts = ctx.saved_tensors
        grad = torch.where(counts, grad, 0.0).unsqueeze(1)
        away = away.unsqueeze(1)
        tiny = torch.finfo(p.dtype).tiny
        pushed = 1 - 1 / others.clamp(min=tiny)
        elsewhere = grad * torch.where(away, pushed, 1.0)
        out = (p * elsewhere).to(ctx.dtype)
        at_label = grad * torch.where(away, own, own - 1)
        out.scatter_(1, index, at_label.to(ctx.dtype))
        return out, None, None


def kl_divergence(
    student: Unembed,
    student_rows: Tensor,
    teacher: Unembed,
    teacher_rows: Tensor,
    mode: Literal["token", "reference"] = "token",
) -> Tensor:
    """KL between teacher and student at each label position, [labels].

    token: KL(teacher || student) in nats, summed over the vocabulary. reference: KL(student ||
    teacher) divided by the vocabulary's size, as in the authors' code; its mean is `normalised`."""

    def divergence(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        new = _log_softmax(student(student_rows))
        with torch.no_grad():
            old = _log_softmax(teacher(teacher_rows))
        if mode == "token":
            return F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
        return F.kl_div(old, new, log_target=True, reduction="none").mean(-1)

    return _by_row(divergence, student, student_rows, teacher_rows)


def argmax_matches(unembed: Unembed, rows: Tensor, labels: Tensor) -> Tensor:
    """[labels] bool: whether each label is its row's most likely token. rows: [labels, d_model]."""

    def matches(rows: Tensor, labels: Tensor) -> Tensor:
        return unembed(rows).argmax(-1) == labels

    with torch.no_grad():
        return _by_row(matches, unembed, rows.detach(), labels)


def _by_row(function: Callable[..., Tensor], unembed: Unembed, *rows: Tensor) -> Tensor:
    """`function(*rows)` [n], each value from its own row of every argument, with a chunk's logits
    at a time."""
    one = unembed(rows[0][:1].detach())
    size = rows_per_chunk(one.shape[-1])
    if len(rows[0]) <= size:
        return function(*rows)
    if one.requires_grad:  # the output matrix is trained: its gradient needs the logits again
        parts = zip(*(r.split(size) for r in rows), strict=True)
        return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
    return _ByRow.apply(function, size, *rows)


class _ByRow(torch.autograd.Function):
    """Values [n] of a function of rows, whose gradient in the first is found in the forward."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
        values, gradients = [], []
        for part, *rest in zip(*(r.split(size) for r in rows), strict=True):
            leaf = part.detach().requires_grad_(ctx.needs_input_grad[2])
            with torch.set_grad_enabled(leaf.requires_grad):
                found = function(leaf, *rest)
                if leaf.requires_grad:
                    gradients += torch.autograd.grad(found.sum(), leaf)
            values.append(found.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.others = len(rows) - 1
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (gradients,) = ctx.saved_tensors
        rows = gradients * grad[:, None].to(gradients.dtype)
        return None, None, rows, *[None] * ctx.others


def normalised(loss: Tensor) -> Tensor:
    """loss / (its own detached value + 1e-8), as the authors scale their KL: the value is 1, the
    direction is kept."""
    return loss / (loss.detach() + 1e-8)


def row_means(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """[n] mean of each row's values; 0 for a row without labels. values, rows: [labels]."""
    total = torch.zeros(n, dtype=values.dtype, device=values.device).index_add(0, rows, values)
    count = torch.zeros_like(total).index_add(0, rows, torch.ones_like(values))
    return total / count.clamp(min=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(wide_of(logits.dtype)).log_softmax(-1)
