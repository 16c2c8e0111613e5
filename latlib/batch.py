"""Tokenised rows -> batches.

1. A `TokenRow` is a prompt with one or two completions: (rejected, chosen) for preference rows,
   (response,) for benign rows. `latlib.text.chat` makes them of text.
2. `collate` packs a row as `[prompt | completion 1 | completion 2]`: both completions continue the
   prompt's positions and do not see each other, so the prompt is computed once and one forward
   serves the toward and the away loss.
3. `Schedule` says which rows step n takes: a fresh permutation for each epoch, a function of (seed,
   epoch) alone, so that a resumed run needs no stored cursor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class TokenRow:
    """Token ids of a row: the templated prompt, and each completion ended by the end-of-turn
    token."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens fed to the model: everything but the last token of each completion, which is only
        predicted."""
        return len(self.prompt) + sum(len(c) - 1 for c in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longer completion, its last token included."""
        return len(self.prompt) + max((len(c) for c in self.completions), default=0)


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed, right-padded rows.

    ids, positions, segments: [batch, seq] int64. segments: 0 prompt, 1 and 2 the completions, -1
    padding. source: [labels] index into the flattened [batch * seq] of the position that predicts
    each label. labels, label_segments, label_rows: [labels] int64: the token, its completion (1 or
    2), and its row. packed: whether some row holds two completions (then attention needs a mask of
    its own)."""

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
        causal = torch.ones(
            self.shape[1], self.shape[1], dtype=torch.bool, device=self.ids.device
        ).tril()
        seen = ((key == 0) | (key == query)) & (key != PADDING) & (query != PADDING)
        return (seen & causal) | torch.eye(self.shape[1], dtype=torch.bool, device=self.ids.device)

    def label_index(self, segment: int) -> Tensor:
        """Indices into the label tensors of one completion; found once, for looking makes a GPU
        wait."""
        found = self.__dict__.setdefault("_label_index", {})
        if segment not in found:
            found[segment] = (self.label_segments == segment).nonzero().squeeze(1)
        return found[segment]

    def select(self, rows: Tensor) -> Batch:
        """The batch of some rows ([n] int64 indices, repeated or not), in that order, as long as
        this one."""
        # in the order of `rows`
        own, kept = (rows[:, None] == self.label_rows).nonzero(as_tuple=True)
        parts = {name: getattr(self, name)[rows] for name in ("ids", "positions", "segments")}
        labels = {name: getattr(self, name)[kept] for name in ("labels", "label_segments")}
        source = own * self.shape[1] + self.source[kept] % self.shape[1]
        return replace(self, **parts, **labels, source=source, label_rows=own)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        tensors: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        moved = replace(self, **tensors)
        moved.__dict__["_label_index"] = {
            segment: self.label_index(segment).to(device) for segment in (1, 2)
        }
        return moved


def collate(
    rows: Sequence[TokenRow], pad_id: int = 0, pad_to: int = 1, device: torch.device | str = "cpu"
) -> Batch:
    """Pack rows into one right-padded batch whose length is a multiple of `pad_to`."""
    seq = -(-max(row.length for row in rows) // pad_to) * pad_to
    ids, positions, segments = [], [], []
    source: list[int] = []
    labels: list[int] = []
    label_segments: list[int] = []
    label_rows: list[int] = []
    for index, row in enumerate(rows):
        begin = len(row.prompt)
        tokens, places, parts = list(row.prompt), list(range(begin)), [0] * begin
        for segment, completion in enumerate(row.completions, start=1):
            first, n = len(tokens), len(completion)
            tokens += completion[:-1]
            places += range(begin, begin + n - 1)
            parts += [segment] * (n - 1)
            # the prompt's last token predicts the first label, each token the one behind it
            predicting = (begin - 1, *range(first, first + n - 1))
            source += [index * seq + at for at in predicting]
            labels += completion
            label_segments += [segment] * n
            label_rows += [index] * n
        fill = seq - len(tokens)
        ids.append(tokens + [pad_id] * fill)
        positions.append(places + [0] * fill)
        segments.append(parts + [PADDING] * fill)
    batch = Batch(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(segments),
        torch.tensor(source),
        torch.tensor(labels),
        torch.tensor(label_segments),
        torch.tensor(label_rows),
        packed=any(2 in row for row in segments),
    )
    return batch if torch.device(device) == batch.ids.device else batch.to(device)


def join(a: Batch, b: Batch) -> Batch:
    """One batch of the rows of both, `a`'s first, and their labels in the same order."""
    seq = max(a.shape[1], b.shape[1])
    a = _as_long_as(a, seq)
    b = _as_long_as(b, seq)
    n = a.shape[0]
    source, label_rows = b.source + n * seq, b.label_rows + n
    b = replace(b, source=source, label_rows=label_rows)
    both: dict[str, Any] = {}
    for field in fields(Batch):
        if field.name != "packed":
            sides = (getattr(a, field.name), getattr(b, field.name))
            both[field.name] = torch.cat(sides)
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
    """Which of `n` rows step `step` takes, `batch` at a time, reshuffled every epoch from (seed,
    epoch)."""

    n: int
    batch: int
    seed: int

    def rows(self, step: int) -> list[int]:
        """Row indices of a step; a batch may run over the end of an epoch into the next
        permutation."""
        return [
            self._order(at // self.n)[at % self.n]
            for at in range(step * self.batch, (step + 1) * self.batch)
        ]

    def _order(self, epoch: int) -> list[int]:
        cache = self.__dict__.setdefault("_cache", {})
        if epoch not in cache:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            cache.clear()
            cache[epoch] = torch.randperm(self.n, generator=generator).tolist()
        return cache[epoch]
