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
    log p(label) < -5. Both come from one logsumexp over the other tokens, so away is exact for p near 1.
    Source: Sheshadri et al. 2024 and the authors' code.
    """

    def losses(rows: Tensor, labels: Tensor) -> Tensor:
        logits = unembed(rows)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        own = logits.gather(1, labels[:, None]).squeeze(1)
        others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
        total = torch.logaddexp(own, others)
        away = torch.where(own - total < AWAY_LOG_P_FLOOR, 0.0, total - others)
        return torch.stack((total - own, away))

    toward, away = _chunked(losses, chunk, rows, labels)
    return toward, away


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
