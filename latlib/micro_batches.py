"""What goes through the model together: rows in micro-batches, and the perturbations that belong to
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch.nn.functional as F
from torch import Tensor

from latlib.batch import Batch, TokenRow
from latlib.hooks import Site
from latlib.losses import Unembed

Deltas = Mapping[Site, Tensor]
Item = TypeVar("Item")


class Teacher(NamedTuple):
    """All that KL needs of the frozen model: its output matrix, and its `label_rows` of a benign
    batch.
    """

    unembed: Unembed
    rows: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. attacked: rows that carry delta; benign: rows with
    delta = 0.
    """

    attacked: Batch
    benign: Batch | None
    clean: Tensor  # [rows of attacked] bool: rows whose delta is put back to zero
    number: int = 0  # its place in the step's list, whichever process runs it
    teacher: Teacher | None = None  # where the objective has a KL term


def split(rows: list[Item], count: int) -> list[list[Item]]:
    """`count` runs of nearly equal length."""
    bounds = [round(i * len(rows) / count) for i in range(count + 1)]
    return [rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def wanted_only(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Preference rows without their rejected completion."""
    return [TokenRow(row.prompt, row.completions[1:]) for row in rows]


def grown(delta: Tensor, batch: Batch) -> Tensor:
    """A perturbation of the first rows of a joined batch, zero on all others."""
    n, seq, _ = delta.shape
    return F.pad(delta, (0, 0, 0, batch.shape[1] - seq, 0, batch.shape[0] - n))


def without(deltas: Deltas, clean: Tensor) -> dict[Site, Tensor]:
    """The perturbations with those of `clean` rows ([batch] bool) put back to zero."""
    return {site: delta.masked_fill(clean[:, None, None], 0.0) for site, delta in deltas.items()}
