"""Toward, away and KL, at label positions only.

1. A forward gives final hidden states [batch, seq, d_model]; only the rows that predict a label go through the output
   matrix, a chunk at a time, and a chunk's logits are computed again in the backward pass: no [batch, seq, vocabulary]
   tensor exists.
2. `token_losses` returns one value per label token; what is averaged over what is the caller's choice: the attack sums
   per-row means (rows do not interact), the defence averages over all tokens of the whole batch, however it is cut
   into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Unembed = Callable[[Tensor], Tensor]  # [n, d_model] -> [n, vocabulary]
CHUNK = 4096  # label rows whose logits exist at once
AWAY_LOG_P_FLOOR = -5.0  # FACTS: the authors ignore tokens that are already this unlikely


def _chunked(function: Callable[..., Tensor], chunk: int, *rows: Tensor) -> Tensor:
    """`function` over chunks of rows; with more than one chunk, each is recomputed in the backward pass."""
    if rows[0].shape[0] <= chunk:
        return function(*rows)
    parts = zip(*(r.split(chunk) for r in rows), strict=True)
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts], dim=-1)


def at_labels(hidden: Tensor, source: Tensor) -> Tensor:
    """[labels, d_model]: the hidden states ([batch, seq, d_model]) of the positions that predict a label."""
    return hidden.flatten(0, 1).index_select(0, source)


def token_losses(unembed: Unembed, rows: Tensor, labels: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(toward, away) of every label token, float32 or better, both [labels], in nats.

    rows: [labels, d_model] hidden states; labels: [labels]. toward = -log p(label). away = -log(1 - p(label)), 0 where
    log p(label) < -5. Both come from one softmax, and away is exact for p near 1.
    Source: Sheshadri et al. 2024 and the authors' code.
    """

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        return _LabelLosses.apply(unembed(rows), labels)

    toward, away = _chunked(losses, chunk, rows, labels)
    return toward, away


class _LabelLosses(torch.autograd.Function):
    """(toward, away) [2, n] from logits [n, vocabulary] with one softmax, which is all that the backward pass needs.

    With p the softmax, q = p(label) and s the sum of all other p (exact where q is near 1), toward = -log q and
    away = -log s. The gradient in the logits is (g1 + g2) p - g1 at the label and (g1 + g2 - g2 / s) p elsewhere.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        p = torch.softmax(logits, -1, dtype=wide)
        tiny, index = torch.finfo(wide).tiny, labels[:, None]
        own = p.gather(1, index)
        p.scatter_(1, index, 0.0)
        others = p.sum(1, keepdim=True)
        log_own = torch.where(own > 0.5, torch.log1p(-others), own.clamp(min=tiny).log()).squeeze(1)
        counts = log_own >= AWAY_LOG_P_FLOOR
        ctx.save_for_backward(p, own, others, labels, counts)
        ctx.dtype = logits.dtype
        return torch.stack((-log_own, torch.where(counts, -others.clamp(min=tiny).log().squeeze(1), 0.0)))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        p, own, others, labels, counts = ctx.saved_tensors
        toward, away = grad[0], torch.where(counts, grad[1], 0.0)
        both, tiny = (toward + away)[:, None], torch.finfo(p.dtype).tiny
        out = (p * (both - away[:, None] / others.clamp(min=tiny))).to(ctx.dtype)
        return out.scatter_(1, labels[:, None], (both * own - toward[:, None]).to(ctx.dtype)), None


def kl_divergence(
    student: Unembed,
    student_rows: Tensor,
    teacher: Unembed,
    teacher_rows: Tensor,
    mode: Literal["token", "reference"] = "token",
    chunk: int = CHUNK,
) -> Tensor:
    """KL between teacher and student at each label position, [labels].

    token: KL(teacher || student) in nats, summed over the vocabulary.
    reference: KL(student || teacher) divided by the vocabulary's size, as in the authors' code, whose mean is then
    divided by its own detached value (see `normalised`).
    """

    def divergence(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
        new = _log_softmax(student(student_rows))
        with torch.no_grad():
            old = _log_softmax(teacher(teacher_rows))
        if mode == "token":
            return F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
        return F.kl_div(old, new, log_target=True, reduction="none").mean(-1)

    return _chunked(divergence, chunk, student_rows, teacher_rows)


def normalised(loss: Tensor) -> Tensor:
    """loss / its own detached value, as the authors scale their KL: the value is 1, the direction is kept."""
    return loss / loss.detach().clamp(min=1e-8)


def row_means(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """[n] mean of the label values of each row; 0 for a row without labels. values, rows: [labels]."""
    total = torch.zeros(n, dtype=values.dtype, device=values.device).index_add(0, rows, values)
    count = torch.zeros_like(total).index_add(0, rows, torch.ones_like(values))
    return total / count.clamp(min=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
