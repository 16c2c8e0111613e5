"""A causal LM in parts: from any site, under a perturbation, up to the hidden states that predict labels.

A `Network` is what attack, losses, training and evaluation call. There are two, equal up to rounding:
* `StockNetwork` runs any Hugging Face decoder, block by block, through its own modules. It adds perturbations between
  the blocks and not by hooks, so that gradient checkpointing recomputes the same thing;
* `lean.LeanNetwork` runs the Llama family over merged weights with few kernels, for models so small that the number of
  kernels and not arithmetic decides.

1. `capture(batch, sites)` runs the blocks up to the last of some sites, once, without a graph: nothing below the first
   perturbed site depends on the perturbation.
2. `hidden(batch, deltas, start=(site, stream))` runs from there. Without `start` it runs everything.
3. `unembed(rows)` gives logits of selected rows; callers never ask for all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from latlib.data import Batch
from latlib.hooks import (
    EMBEDDING,
    Ablate,
    Capture,
    Site,
    blocks_of,
    check_delta,
    decoder_of,
    depth,
    orthonormal,
    project_out,
    resolve_sites,
)
from latlib.losses import at_labels

Start = tuple[Site, Tensor]


class Network(Protocol):
    """See the module's docstring."""

    n_layers: int
    d_model: int
    dtype: torch.dtype
    device: torch.device

    def capture(self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None) -> dict[Site, Tensor]:
        """site -> [batch, seq, d_model] residual stream, unperturbed, without a graph; with `index` ([n] into the
        flattened [batch * seq]) site -> [n, d_model]. Blocks above the deepest site are not run."""

    def hidden(self, batch: Batch, deltas: Mapping[Site, Tensor] | None = None, start: Start | None = None) -> Tensor:
        """[batch, seq, d_model] after the final norm. deltas: site -> [batch, seq, d_model]."""

    def unembed(self, rows: Tensor) -> Tensor:
        """[n, vocabulary] logits of hidden rows [n, d_model]."""

    def held(self) -> AbstractContextManager[None]:
        """Keep weights frozen and adapter switched as this network runs them while the context is open. A backward pass
        with gradient checkpointing runs the blocks again: it belongs inside, or it runs another network."""

    def ablated(self, directions: Tensor) -> Network:
        """The same network with directions ([d_model] or [k, d_model]) removed from all that is written to the
        stream."""

    def frozen(self) -> Network:
        """The same weights as they are now, without gradients: what an attack runs on."""

    def settle(self) -> None:
        """Hand gradients that backward passes left with the network on to the model's parameters."""


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run a PEFT model as its base. Unlike `disable_adapter()` alone, leaves every requires_grad as it was."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires grad inside: an attack keeps no inputs of weight gradients and can leave none behind."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, flag in flags:
            if flag:
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class StockNetwork:
    """Any Hugging Face decoder, through its own modules.

    adapter: False runs a PEFT model with its adapter off (the teacher). train: False freezes the weights while it runs.
    """

    def __init__(self, model: nn.Module, adapter: bool = True, train: bool = False, directions: Tensor | None = None):
        self.model, self.adapter, self.train, self.directions = model, adapter, train, directions
        self.decoder, self.blocks = decoder_of(model), blocks_of(model)
        self.n_layers, self.d_model = model.config.num_hidden_layers, model.config.hidden_size
        weight = model.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        self._inputs: tuple[Batch, dict] | None = None
        self._block_kwargs: tuple[Batch, list[dict]] | None = None

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with (
            nullcontext() if self.adapter else adapter_off(self.model),
            nullcontext() if self.train else frozen(self.model),
            nullcontext() if self.directions is None else Ablate(self.model, self.directions),
        ):
            yield

    def held(self) -> AbstractContextManager[None]:
        """See `Network`."""
        return self._mode()

    def _forward_inputs(self, batch: Batch) -> dict:
        if self._inputs is None or self._inputs[0] is not batch:
            inputs = {"position_ids": batch.positions, "use_cache": False}
            if batch.packed:
                bias = torch.zeros(
                    batch.ids.shape[0], 1, *batch.attends().shape[1:], device=self.device, dtype=self.dtype
                )
                inputs["attention_mask"] = bias.masked_fill(~batch.attends()[:, None], torch.finfo(self.dtype).min)
            else:  # plain rows are padded on the right, where causal attention never looks
                inputs["attention_mask"] = torch.ones_like(batch.ids)
            self._inputs = (batch, inputs)
        return self._inputs[1]

    def _kwargs_of_blocks(self, batch: Batch) -> list[dict]:
        """The keyword arguments each block receives for this batch: masks and rotary tables are made once."""
        if self._block_kwargs is None or self._block_kwargs[0] is not batch:
            seen: list[dict] = []

            def keep(_block, args, kwargs):
                seen.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

            handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in self.blocks]
            try:
                with torch.no_grad():
                    self.decoder(batch.ids, **self._forward_inputs(batch))
            finally:
                for handle in handles:
                    handle.remove()
            self._block_kwargs = (batch, seen)
        return self._block_kwargs[1]

    def capture(self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None) -> dict[Site, Tensor]:
        """See `Network`."""
        sites = resolve_sites(sites, self.n_layers)
        last = self.blocks[max(depth(sites[-1]) - 1, 0)]
        with self._mode(), torch.no_grad(), Capture(self.model, sites) as streams:
            stop = last.register_forward_hook(_raise_enough)
            try:
                self.decoder(batch.ids, **self._forward_inputs(batch))
            except _EnoughError:
                pass
            finally:
                stop.remove()
            return {s: streams[s] if index is None else at_labels(streams[s], index) for s in sites}

    def hidden(self, batch: Batch, deltas: Mapping[Site, Tensor] | None = None, start: Start | None = None) -> Tensor:
        """See `Network`."""
        site, stream = start or (EMBEDDING, self.capture(batch, [EMBEDDING])[EMBEDDING])
        check_start(site, deltas)
        if deltas and self.directions is not None:
            basis = orthonormal(self.directions)
            deltas = {s: project_out(delta, basis) for s, delta in deltas.items()}
        with self._mode():
            kwargs = self._kwargs_of_blocks(batch)
            stream = _perturb(site, stream, deltas)
            for i in range(depth(site), self.n_layers):
                stream = _perturb(i, _tensor(self.blocks[i](stream, **kwargs[i])), deltas)
            return self._final_norm()(stream)

    def unembed(self, rows: Tensor) -> Tensor:
        """See `Network`."""
        with self._mode():
            logits = self.model.get_output_embeddings()(rows)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if not cap else cap * torch.tanh(logits / cap)

    def ablated(self, directions: Tensor) -> StockNetwork:
        """See `Network`."""
        if self.directions is not None:
            before = torch.atleast_2d(self.directions)
            directions = torch.cat((before, torch.atleast_2d(directions).to(before)))
        return StockNetwork(self.model, self.adapter, self.train, directions)

    def frozen(self) -> StockNetwork:
        """See `Network`."""
        return StockNetwork(self.model, self.adapter, False, self.directions)

    def settle(self) -> None:
        """See `Network`: gradients are with the parameters already."""

    def _final_norm(self) -> nn.Module:
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
            if hasattr(self.decoder, name):
                return getattr(self.decoder, name)
        raise ValueError(f"{type(self.decoder).__name__} has no final norm latlib knows")


def check_start(site: Site, deltas: Mapping[Site, Tensor] | None) -> None:
    """Raise ValueError for a perturbation below the site a forward starts at: it would not be run."""
    below = [s for s in deltas or () if depth(s) < depth(site)]
    if below:
        raise ValueError(f"start is site {site} but site {below[0]} is perturbed: start at the lowest one")


def _perturb(site: Site, stream: Tensor, deltas: Mapping[Site, Tensor] | None) -> Tensor:
    if not deltas or site not in deltas:
        return stream
    check_delta(site, deltas[site], stream)
    return stream + deltas[site].to(stream.dtype)


class _EnoughError(Exception):
    """Ends a forward whose upper blocks nobody needs."""


def _raise_enough(*_) -> None:
    raise _EnoughError


def _tensor(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
