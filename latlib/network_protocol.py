"""What attack, losses, training and evaluation ask of a model: a `Network`.

There are two, equal up to rounding: `network.StockNetwork` runs any Hugging Face decoder through
its own modules, `fused.llama.LeanNetwork` runs the Llama family over merged weights.

1. `capture` runs the blocks up to the last of some sites, once, without a graph: nothing below the
   first perturbed site depends on the perturbation. `hidden` runs on from there.
2. `label_rows` is `hidden` at the positions that predict a label, and leaves out what only others
   need; `unembed` gives logits of selected rows. Callers never ask for all positions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor

from latlib.batch import Batch
from latlib.blocks import CausalLM, text_config
from latlib.hooks import check_delta, project_out
from latlib.losses import Unembed, at_labels
from latlib.processes import Result
from latlib.threat import EMBEDDING, Site, depth, resolve_sites

Start = tuple[Site, Tensor] | None  # where a forward begins; None: at the embedding
Perturbation = Mapping[Site, Tensor] | None  # site -> [batch, seq, d_model]

# what training asks for its weights and for networks over them: a `models.LanguageModel`
Model = Any


class Network(ABC):
    """See the module's docstring. directions: what is ablated, [d_model] or [k, d_model]; basis:
    orthonormal rows that span it."""

    def __init__(self, model: CausalLM, train: bool, dtype: torch.dtype | None = None) -> None:
        self.model, self.train = model, train
        config = text_config(model)
        self.n_layers, self.d_model = config.num_hidden_layers, config.hidden_size
        weight = model.get_input_embeddings().weight
        self.dtype, self.device = dtype or weight.dtype, weight.device
        self.directions: Tensor | None = None
        self.basis: Tensor | None = None

    def capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        """site -> [batch, seq, d_model] residual stream, unperturbed, without a graph; with `index`
        ([n] into the flattened [batch * seq]) site -> [n, d_model]. Blocks above the deepest site
        are not run."""
        with torch.no_grad():
            found = self.streams(batch, sites)
        if index is None:
            return found
        return {site: at_labels(stream, index) for site, stream in found.items()}

    def streams(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """`capture` with a graph, for objectives on the stream itself."""
        wanted = resolve_sites(sites, self.n_layers)
        return self._run(lambda: self._streams(batch, wanted))

    def hidden(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """[batch, seq, d_model] after the final norm. deltas: site -> [batch, seq, d_model]."""
        last, outside = self.n_layers - 1, self._outside(deltas)
        return self._run(lambda: self._norm(self._streams(batch, [last], outside, start)[last]))

    def label_rows(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """[labels, d_model]: `hidden` at `batch.source`, the positions that predict the labels."""
        return at_labels(self.hidden(batch, deltas, start), batch.source)

    @abstractmethod
    def unembed(self, rows: Tensor) -> Tensor:
        """[n, vocabulary] logits of hidden rows [n, d_model]."""

    def unembedding(self) -> Unembed:
        """`unembed` for a caller that is done with the rest: it keeps no copy of the other weights
        alive."""
        return self.unembed

    def frozen_mode(self) -> AbstractContextManager[None]:
        """Keep weights frozen and adapter switched as this network runs them while the context is
        open. A backward pass with gradient checkpointing runs the blocks again: it belongs inside,
        or it runs another network."""
        return nullcontext()

    @abstractmethod
    def ablated(self, directions: Tensor) -> Network:
        """The same network with directions ([d_model] or [k, d_model]) nowhere in the stream."""

    @abstractmethod
    def frozen(self) -> Network:
        """The same weights as they are now, without gradients: what an attack runs on."""

    @abstractmethod
    def flush_gradients(self) -> None:
        """Hand gradients that backward passes left with the network on to the model's parameters:
        once after several passes, or after each, which takes a little longer and holds less
        memory."""

    @abstractmethod
    def _embedded(self, batch: Batch) -> Tensor:
        """[batch, seq, d_model]: the stream at the embedding."""

    @abstractmethod
    def _block(self, stream: Tensor, i: int, batch: Batch) -> Tensor:
        """The stream after block i, from the one before it."""

    @abstractmethod
    def _norm(self, stream: Tensor) -> Tensor:
        """The final norm."""

    def _run(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, which runs the model."""
        return call()

    def _streams(
        self, batch: Batch, sites: Sequence[Site], deltas: Perturbation = None, start: Start = None
    ) -> dict[Site, Tensor]:
        """site -> stream there, perturbed; of sites in order of depth. Raises ValueError for a
        perturbation below the start: it would not be run."""
        site, stream = start or (EMBEDDING, self._embedded(batch))
        below = [other for other in deltas or () if depth(other) < depth(site)]
        if below:
            raise ValueError(
                f"start is site {site} but site {below[0]} is perturbed: start at the lowest one"
            )
        stream = perturbed(site, stream, deltas)
        found = {site: stream} if site in sites else {}
        for i in range(depth(site), depth(sites[-1])):
            stream = perturbed(i, self._block(stream, i, batch), deltas)
            if i in sites:
                found[i] = stream
        return found

    def _outside(self, deltas: Perturbation) -> Perturbation:
        """A perturbation without its part along what is ablated."""
        if not deltas or self.basis is None:
            return deltas
        return {site: project_out(delta, self.basis) for site, delta in deltas.items()}

    def _and(self, directions: Tensor) -> Tensor:
        """All that is ablated, these too."""
        if self.directions is None:
            return directions
        before = torch.atleast_2d(self.directions)
        return torch.cat((before, torch.atleast_2d(directions.detach()).to(before)))

    def _with(self, **changes: Any) -> Any:
        """A copy that differs in these attributes."""
        other = copy(self)
        vars(other).update(changes)
        return other


def perturbed(site: Site, stream: Tensor, deltas: Perturbation) -> Tensor:
    """The stream at a site, with the perturbation there added in the stream's precision."""
    if not deltas or site not in deltas:
        return stream
    check_delta(site, deltas[site], stream)
    return stream + deltas[site].to(stream.dtype)
