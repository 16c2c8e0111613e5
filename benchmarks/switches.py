"""The engine with single points turned off, so that what each buys can be measured.

The points are those of "What each point buys" in docs/performance.md. A wrapper takes one away
from a `latlib.network.Network` by doing the slower thing with the same result; `SwitchedTrainer`
trains through any of them:
* packing: prompt and completions in one row (off: `SeparateRows`);
* start: PGD steps run from the lowest perturbed site (off: `FromTheStart`);
* labels: logits at label positions only (off: `AllLogits`);
* frozen: the attack computes no weight gradients (off: `TrainableAttack`);
* sorted: rows of similar length go together (off: micro-batches of rows as they come).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from latlib.batch import PADDING, Batch
from latlib.hooks import Site
from latlib.losses import Unembed, at_labels
from latlib.network_protocol import Network, Start
from latlib.train import Trainer

Deltas = Mapping[Site, Tensor] | None


class Around:
    """A network that does what another one does."""

    def __init__(self, inner: Network) -> None:
        self.inner = inner

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def frozen(self) -> Around:
        """See `Network`."""
        return type(self)(self.inner.frozen())

    def ablated(self, directions: Tensor) -> Around:
        """See `Network`."""
        return type(self)(self.inner.ablated(directions))


class FromTheStart(Around):
    """Every forward runs all blocks, and so does every backward pass, down to the embedding.

    `start` is ignored, so captures (which are for nothing else here) are [batch, seq, 0] and cost
    nothing.
    """

    def capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        """See the class."""
        return {
            site: torch.empty(*batch.shape, 0, dtype=self.dtype, device=self.device)
            for site in sites
        }

    def hidden(self, batch: Batch, deltas: Deltas = None, start: Start = None) -> Tensor:
        """See `Network`."""
        return self.inner.hidden(batch, deltas)

    def label_rows(self, batch: Batch, deltas: Deltas = None, start: Start = None) -> Tensor:
        """See `Network`."""
        return self.inner.label_rows(batch, deltas)


class AllLogits(Around):
    """Every position meets the output matrix, forward and backward: "hidden states" are logits
    [..., vocabulary].
    """

    def hidden(self, batch: Batch, deltas: Deltas = None, start: Start = None) -> Tensor:
        """[batch, seq, vocabulary]"""
        hidden = self.inner.hidden(batch, deltas, start)
        return self.inner.unembed(hidden.flatten(0, 1)).view(*batch.shape, -1)

    def label_rows(self, batch: Batch, deltas: Deltas = None, start: Start = None) -> Tensor:
        """[labels, vocabulary]"""
        return at_labels(self.hidden(batch, deltas, start), batch.source)

    def unembed(self, rows: Tensor) -> Tensor:
        """They are logits already."""
        return rows

    def unembedding(self) -> Unembed:
        """See `Network`."""
        return self.unembed


class SeparateRows(Around):
    """A packed batch runs as two padded ones, [prompt | rejected] and [prompt | chosen]."""

    def __init__(self, inner: Network) -> None:
        super().__init__(inner)
        self._split: WeakKeyDictionary[Batch, tuple[tuple[Batch, Tensor], ...]] = (
            WeakKeyDictionary()
        )

    def frozen(self) -> SeparateRows:
        """See `Network`."""
        other = super().frozen()
        other._split = self._split
        return other

    def _parts(self, batch: Batch) -> tuple[tuple[Batch, Tensor], ...]:
        """The two batches, and where in the packed one each of their positions is."""
        if batch not in self._split:
            self._split[batch] = tuple(_with_one_completion(batch, segment) for segment in (1, 2))
        return self._split[batch]

    def label_rows(self, batch: Batch, deltas: Deltas = None, start: Start = None) -> Tensor:
        """See `Network`."""
        if not batch.packed:
            return self.inner.label_rows(batch, deltas, start)
        found = [
            self.inner.label_rows(part, *_gathered(deltas, start, part, index))
            for part, index in self._parts(batch)
        ]
        order = torch.cat([batch.label_index(segment) for segment in (1, 2)])
        return torch.empty_like(torch.cat(found)).index_copy(0, order, torch.cat(found))

    def hidden(self, batch: Batch, deltas: Deltas = None, start: Start = None) -> Tensor:
        """See `Network`; positions of the prompt come from the first batch."""
        if not batch.packed:
            return self.inner.hidden(batch, deltas, start)
        parts = [
            (part, index, self.inner.hidden(part, *_gathered(deltas, start, part, index)))
            for part, index in self._parts(batch)
        ]
        return _scattered(batch, parts)

    def capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        """See `Network`."""
        if not batch.packed:
            return self.inner.capture(batch, sites, index)
        parts = [
            (part, places, self.inner.capture(part, sites)) for part, places in self._parts(batch)
        ]
        whole = {
            site: _scattered(batch, [(part, at, found[site]) for part, at, found in parts])
            for site in sites
        }
        return {
            site: stream if index is None else at_labels(stream, index)
            for site, stream in whole.items()
        }


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
    deltas: Deltas, start: Start, part: Batch, index: Tensor
) -> tuple[Deltas, Start | None]:
    def moved(stream: Tensor) -> Tensor:
        return at_labels(stream, index).view(*part.shape, -1)

    found = None if deltas is None else {site: moved(delta) for site, delta in deltas.items()}
    return found, None if start is None else (start[0], moved(start[1]))


def _scattered(batch: Batch, parts: Sequence[tuple[Batch, Tensor, Tensor]]) -> Tensor:
    """[batch, seq, width] of the packed batch from its two parts; zero on padding."""
    width = parts[0][2].shape[-1]
    out = parts[0][2].new_zeros(batch.ids.numel(), width)
    for number, (part, index, stream) in enumerate(parts):
        wanted = (part.segments != PADDING if number == 0 else part.segments == 1).flatten()
        out = out.index_copy(0, index[wanted], stream.flatten(0, 1)[wanted])
    return out.view(*batch.shape, width)


class TrainableAttack(Around):
    """The attack runs on the network that is trained, and keeps the graph to its weights."""

    def frozen(self) -> TrainableAttack:
        """It is not."""
        return self

    def trained(self) -> list[Tensor]:
        """What a backward pass would give gradients to."""
        weights = getattr(self, "weights", None) or self.model.parameters()
        return [weight for weight in weights if weight.requires_grad]


@contextmanager
def _gradients_too(weights: Sequence[Tensor]) -> Iterator[None]:
    """`torch.autograd.grad` also computes the gradients of `weights` inside, as `backward()` would,
    and drops them.
    """
    own = torch.autograd.grad

    def grad(outputs, inputs, *args, **kwargs):
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        return own(outputs, [*inputs, *weights], *args, **kwargs, allow_unused=True)[: len(inputs)]

    with patch.object(torch.autograd, "grad", grad):
        yield


WRAPPERS = {
    "start": FromTheStart,
    "labels": AllLogits,
    "packing": SeparateRows,
    "frozen": TrainableAttack,
}
POINTS = ("packing", "start", "labels", "frozen", "sorted")


class Switched:
    """A `LanguageModel` whose networks lack some points."""

    def __init__(self, lm, off: Collection[str]) -> None:
        self._lm, self._off = lm, off

    def __getattr__(self, name: str):
        return getattr(self._lm, name)

    def network(self, adapter: bool = True, train: bool = False) -> Network:
        """See `LanguageModel`."""
        network = self._lm.network(adapter, train)
        for point, wrapper in WRAPPERS.items():
            if point in self._off:
                network = wrapper(network)
        return network


class SwitchedTrainer(Trainer):
    """`latlib.train.Trainer` without the points named in `off`."""

    def __init__(
        self, lm, harmful, benign, settings, seed: int, norms=None, off: Collection[str] = ()
    ) -> None:
        unknown = set(off) - set(POINTS)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no points of the engine: choose from {POINTS}")
        super().__init__(Switched(lm, off), harmful, benign, settings, seed, norms)
        self.off = frozenset(off)

    def _attack(self, network, part):
        with _gradients_too(network.trained()) if "frozen" in self.off else nullcontext():
            return super()._attack(network, part)

    def _micro_batches(self, attacked, generator):
        unsorted = patch("latlib.train.sorted", lambda rows, key: list(rows), create=True)
        with unsorted if "sorted" in self.off else nullcontext():
            return super()._micro_batches(attacked, generator)
