"""What attack, losses, training and evaluation ask of a model: a `Network`.

There are two, equal up to rounding: `network.StockNetwork` runs any Hugging Face decoder through
its own modules, `fused.llama.LeanNetwork` runs the Llama family over merged weights.

1. `capture` runs the blocks up to the last of some sites, once, without a graph: nothing below the
   first perturbed site depends on the perturbation. `hidden` runs on from there.
2. `label_rows` is `hidden` at the positions that predict a label, and leaves out what only others
   need; `unembed` gives logits of selected rows. Callers never ask for all positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from latlib.batch import Batch
from latlib.hooks import check_delta
from latlib.losses import Unembed
from latlib.threat import Site, depth

Start = tuple[Site, Tensor] | None  # where a forward begins; None: at the embedding
Perturbation = Mapping[Site, Tensor] | None  # site -> [batch, seq, d_model]


# what training asks for its weights and for networks over them: a `models.LanguageModel`
Model = Any


class Network(Protocol):
    """See the module's docstring."""

    n_layers: int
    d_model: int
    dtype: torch.dtype
    device: torch.device
    directions: Tensor | None  # what is ablated

    def capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        """site -> [batch, seq, d_model] residual stream, unperturbed, without a graph; with `index`
        ([n] into the flattened [batch * seq]) site -> [n, d_model]. Blocks above the deepest site
        are not run."""

    def streams(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """`capture` with a graph, for objectives on the stream itself."""

    def hidden(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """[batch, seq, d_model] after the final norm. deltas: site -> [batch, seq, d_model]."""

    def label_rows(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """[labels, d_model]: `hidden` at `batch.source`, the positions that predict the labels."""

    def unembed(self, rows: Tensor) -> Tensor:
        """[n, vocabulary] logits of hidden rows [n, d_model]."""

    def unembedding(self) -> Unembed:
        """`unembed` for a caller that is done with the rest: it keeps no copy of the other weights
        alive."""

    def frozen_mode(self) -> AbstractContextManager[None]:
        """Keep weights frozen and adapter switched as this network runs them while the context is
        open. A backward pass with gradient checkpointing runs the blocks again: it belongs inside,
        or it runs another network."""

    def ablated(self, directions: Tensor) -> Network:
        """The same network with directions ([d_model] or [k, d_model]) removed from all that is
        written to the stream."""

    def frozen(self) -> Network:
        """The same weights as they are now, without gradients: what an attack runs on."""

    def flush_gradients(self) -> None:
        """Hand gradients that backward passes left with the network on to the model's parameters:
        once after several passes, or after each, which takes a little longer and holds less
        memory."""


def check_start(site: Site, deltas: Perturbation) -> None:
    """Raise ValueError for a perturbation below the site a forward starts at: it would not be
    run."""
    below = [s for s in deltas or () if depth(s) < depth(site)]
    if below:
        raise ValueError(
            f"start is site {site} but site {below[0]} is perturbed: start at the lowest one"
        )


def perturbed(site: Site, stream: Tensor, deltas: Perturbation) -> Tensor:
    """The stream at a site, with the perturbation there added in the stream's precision."""
    if not deltas or site not in deltas:
        return stream
    check_delta(site, deltas[site], stream)
    return stream + deltas[site].to(stream.dtype)
