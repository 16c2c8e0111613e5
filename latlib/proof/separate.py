"""A packed batch run as rows with one completion each: for models in which completions that share a
row would see each other, whatever the mask says (recurrent layers, windows that count tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from latlib.batch import PADDING, Batch
from latlib.losses import at_labels
from latlib.network_protocol import Network, Perturbation, Start
from latlib.threat import Site

# rows with one completion, and [batch * seq] where in the packed batch each of their positions is
Part = tuple[Batch, Tensor]


class Around:
    """A network that does what another one does."""

    def __init__(self, inner: Network) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def frozen(self) -> Any:
        """See `Network`."""
        return self._around(self.inner.frozen())

    def ablated(self, directions: Tensor) -> Any:
        """See `Network`."""
        return self._around(self.inner.ablated(directions))

    def _around(self, inner: Network) -> Any:
        return type(self)(inner)


class SeparateRows(Around):
    """A packed batch runs as padded ones, [prompt | rejected] and [prompt | chosen] for example.
    longest: rows up to so many tokens stay packed: no window cuts them."""

    def __init__(self, inner: Network, longest: int = 0) -> None:
        super().__init__(inner)
        self.longest = longest
        self._split: WeakKeyDictionary[Batch, tuple[Part, ...]] = WeakKeyDictionary()

    def _around(self, inner: Network) -> SeparateRows:
        other = SeparateRows(inner, self.longest)
        other._split = self._split
        return other

    def _stays(self, batch: Batch) -> bool:
        return not batch.packed or batch.shape[1] <= self.longest

    def _parts(self, batch: Batch) -> tuple[Part, ...]:
        """A batch for each completion, and where in the packed one its positions are."""
        if batch not in self._split:
            segments = batch.label_segments.unique().tolist()
            self._split[batch] = tuple(_with_one_completion(batch, each) for each in segments)
        return self._split[batch]

    def label_rows(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """See `Network`."""
        if self._stays(batch):
            return self.inner.label_rows(batch, deltas, start)
        found = [
            self.inner.label_rows(part, *_gathered(deltas, start, part, index))
            for part, index in self._parts(batch)
        ]
        order = batch.label_segments.argsort(stable=True)
        return torch.cat(found).index_select(0, order.argsort())

    def hidden(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """See `Network`; positions of the prompt come from the first batch."""
        if self._stays(batch):
            return self.inner.hidden(batch, deltas, start)
        found = [
            self.inner.hidden(part, *_gathered(deltas, start, part, index))
            for part, index in self._parts(batch)
        ]
        return self._together(batch, found)

    capture = Network.capture  # by `streams` below, not the inner network's own

    def streams(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """See `Network`."""
        if self._stays(batch):
            return self.inner.streams(batch, sites)
        found = [self.inner.streams(part, sites) for part, _ in self._parts(batch)]
        return {site: self._together(batch, [each[site] for each in found]) for site in found[0]}

    def _together(self, batch: Batch, found: Sequence[Tensor]) -> Tensor:
        """[batch, seq, width] of the packed batch from its parts; zero on padding."""
        width = found[0].shape[-1]
        out = found[0].new_zeros(batch.ids.numel(), width)
        for stream, (part, index) in zip(found, self._parts(batch), strict=True):
            wanted = part.segments == 1
            if stream is found[0]:  # from which the prompt comes
                wanted = part.segments != PADDING
            kept = wanted.flatten()
            values = stream.flatten(0, 1)
            out = out.index_copy(0, index[kept], values[kept])
        return out.view(*batch.shape, width)


def _with_one_completion(batch: Batch, segment: int) -> tuple[Batch, Tensor]:
    """The rows with one of their completions, right-padded, and [batch * seq] the position in the
    flattened packed batch that each of their positions has (padding has some position, which nobody
    reads)."""
    kept = (batch.segments == 0) | (batch.segments == segment)
    seq = int(kept.sum(1).max())
    order = (~kept).to(torch.int8).argsort(dim=1, stable=True)
    columns, first = order[:, :seq], torch.arange(batch.shape[0], device=order.device)[:, None]
    labels = batch.label_index(segment)
    source = batch.source[labels]
    row = source // batch.shape[1]
    segments = (
        batch.segments.gather(1, columns)
        .clamp(max=1)
        .masked_fill(~kept.gather(1, columns), PADDING)
    )
    part = replace(
        batch,
        ids=batch.ids.gather(1, columns),
        positions=batch.positions.gather(1, columns),
        segments=segments,
        source=row * seq + order.argsort(1)[row, source % batch.shape[1]],
        labels=batch.labels[labels],
        label_segments=torch.ones_like(labels),
        label_rows=batch.label_rows[labels],
        packed=False,
    )
    return part, (columns + first * batch.shape[1]).flatten()


def _gathered(
    deltas: Perturbation, start: Start, part: Batch, index: Tensor
) -> tuple[Perturbation, Start]:
    def moved(stream: Tensor) -> Tensor:
        return at_labels(stream, index).view(*part.shape, -1)

    found = None if deltas is None else {site: moved(delta) for site, delta in deltas.items()}
    return found, None if start is None else (start[0], moved(start[1]))
