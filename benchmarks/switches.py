"""The engine with single points turned off, so that what each buys can be measured.

A wrapper takes one away from a `latlib.network_protocol.Network` by doing the slower thing with the
same result; `SwitchedTrainer` trains through any of them:
* packing: prompt and completions in one row (off: `SeparateRows`);
* start: PGD steps run from the lowest perturbed site (off: `FromTheStart`);
* labels: logits at label positions only (off: `AllLogits`);
* frozen: the attack computes no weight gradients (off: `TrainableAttack`);
* sorted: rows of similar length go together (off: micro-batches of rows as they come).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from latlib.batch import Batch
from latlib.hooks import Site
from latlib.losses import Unembed, at_labels
from latlib.network_protocol import Network, Start
from latlib.proof.separate import Around, SeparateRows
from latlib.train import Trainer

Deltas = Mapping[Site, Tensor] | None


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
