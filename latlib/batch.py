"""Tokenised rows -> batches.

1. A `TokenRow` is a prompt with its completions: (rejected, chosen) for preference rows,
   (response,) for benign rows. `latlib.text.chat` makes them of text.
2. `collate` packs a row as `[prompt | completion 1 | completion 2]`: all completions continue the
   prompt's positions and do not see each other, so the prompt is computed once and one forward
   serves the toward and the away loss.
3. `Schedule` says which rows step n takes: a fresh permutation for each epoch, a function of (seed,
   epoch) alone, so that a resumed run needs no stored cursor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a row: the templated prompt, and completions, each with what ends it."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens fed to the model: all but the last of each completion, which is only predicted."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest completion, its last token included."""
        return len(self.prompt) + max((len(c) for c in self.completions), default=0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed, right-padded rows.

    ids, positions, segments: [batch, seq] int64. segments: 0 prompt, 1, 2, ... the completions, -1
    padding. source: [labels] index into the flattened [batch * seq] of the position that predicts
    each label. labels, label_segments, label_rows: [labels] int64: the token, its completion (from
    1), and its row. packed: whether some row holds several completions (then attention needs a mask
    of its own)."""

    ids: Tensor
    positions: Tensor
    segments: Tensor
    source: Tensor
    labels: Tensor
    label_segments: Tensor
    label_rows: Tensor
    packed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, seq)"""
        return self.ids.shape[0], self.ids.shape[1]

    def attends(self) -> Tensor:
        """[batch, seq, seq] bool: query i sees key j. Padding sees itself only, so that no softmax
        row is empty."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        place = torch.arange(self.shape[1], device=self.ids.device)
        seen = ((key == 0) | (key == query)) & (query != PADDING)
        return (seen & (place[:, None] >= place)) | (place[:, None] == place)

    def label_index(self, segment: int) -> Tensor:
        """Indices into the label tensors of one completion; found once: a GPU waits for that."""
        return self._label_indices[segment - 1]

    @cached_property
    def _label_indices(self) -> list[Tensor]:
        segments = range(1, 1 + max([2, *self.label_segments.tolist()]))
        return [(self.label_segments == segment).nonzero().squeeze(1) for segment in segments]

    def tensors(self) -> dict[str, Any]:
        """Its fields but `packed`."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def select(self, rows: Tensor) -> Batch:
        """The batch of some rows ([n] int64, repeated or not) in that order, as long as this."""
        # in the order of `rows`
        own, kept = (rows[:, None] == self.label_rows).nonzero(as_tuple=True)
        parts = {name: getattr(self, name)[rows] for name in ("ids", "positions", "segments")}
        labels = {name: getattr(self, name)[kept] for name in ("labels", "label_segments")}
        source = own * self.shape[1] + self.source[kept] % self.shape[1]
        return replace(self, **parts, **labels, source=source, label_rows=own)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = replace(self, **{name: t.to(device) for name, t in self.tensors().items()})
        vars(moved)["_label_indices"] = [index.to(device) for index in self._label_indices]
        return moved


def collate(
    rows: Sequence[TokenRow], pad_id: int = 0, pad_to: int = 1, device: torch.device | str = "cpu"
) -> Batch:
    """Pack rows into one right-padded batch whose length is a multiple of `pad_to`."""
    seq = -(-max(row.length for row in rows) // pad_to) * pad_to
    columns: dict[str, list[Any]] = {
        field.name: [] for field in fields(Batch) if field.name != "packed"
    }
    for index, row in enumerate(rows):
        begin = len(row.prompt)
        tokens = list(row.prompt)
        places = list(range(begin))
        parts = [0] * begin
        for segment, completion in enumerate(row.completions, start=1):
            first = len(tokens)
            n = len(completion)
            tokens += completion[:-1]
            places += range(begin, begin + n - 1)
            parts += [segment] * (n - 1)
            # the prompt's last token predicts the first label, each token the one behind it
            predicting = (begin - 1, *range(first, first + n - 1))
            columns["source"] += [index * seq + at for at in predicting]
            columns["labels"] += completion
            columns["label_segments"] += [segment] * n
            columns["label_rows"] += [index] * n
        fill = seq - len(tokens)
        columns["ids"].append(tokens + [pad_id] * fill)
        columns["positions"].append(places + [0] * fill)
        columns["segments"].append(parts + [PADDING] * fill)
    tensors: dict[str, Any] = {
        name: torch.tensor(column, dtype=torch.long) for name, column in columns.items()
    }
    packed = any(len(row.completions) > 1 for row in rows)
    return Batch(**tensors, packed=packed).to(device)


def join(a: Batch, b: Batch) -> Batch:
    """One batch of the rows of both, `a`'s first, and their labels in the same order."""
    seq = max(a.shape[1], b.shape[1])
    a, b = _as_long_as(a, seq), _as_long_as(b, seq)
    n = a.shape[0]
    others = replace(b, source=b.source + n * seq, label_rows=b.label_rows + n).tensors()
    both = {name: torch.cat((own, others[name])) for name, own in a.tensors().items()}
    return Batch(**both, packed=a.packed or b.packed)


def _as_long_as(batch: Batch, seq: int) -> Batch:
    """The batch with its rows padded to `seq` positions."""
    more = seq - batch.shape[1]
    return replace(
        batch,
        ids=F.pad(batch.ids, (0, more)),
        positions=F.pad(batch.positions, (0, more)),
        segments=F.pad(batch.segments, (0, more), value=PADDING),
        source=batch.source + (batch.source // batch.shape[1]) * more,
    )


@dataclass(frozen=True)
class Schedule:
    """Which of `n` rows step `step` takes, `batch` at a time; (seed, epoch) shuffles each epoch."""

    n: int
    batch: int
    seed: int

    def rows(self, step: int) -> list[int]:
        """Row indices of a step; a batch may run over the end of an epoch into the next
        permutation."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [_order(self.n, self.seed, at // self.n)[at % self.n] for at in places]


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()
