"""Sites in the residual stream, and the hooks that read or change it there.

1. A **site** is 'embedding' (the residual stream before block 0) or a block index i (the stream
   after block i, 0-based).
2. `LATHook` adds a perturbation at sites; `Capture` reads the stream; `Ablate` removes directions
   from everything that is written to it. All are context managers, removed whatever happens inside.
3. A block may return a tensor or a tuple whose first element is the stream (it depends on family
   and version).
4. Under gradient checkpointing the backward pass runs the blocks again: keep the context open until
   after `backward()`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latlib.blocks import CausalLM, blocks_of, stream_of, text_config, writers_of
from latlib.threat import EMBEDDING, Site, resolve_sites

# what is done with the residual stream at a site: None leaves it as it is
Change = Callable[[Tensor], Tensor | None]


class _Hooks(ABC):
    """Forward hooks that live exactly as long as the `with` block."""

    _installed: ExitStack | None = None

    @abstractmethod
    def _install(self) -> Iterator[Any]:
        """Install the hooks; yields their handles."""

    def __enter__(self) -> Any:
        if self._installed is not None:
            raise RuntimeError(
                f"{type(self).__name__} is already entered: make a second one to nest it"
            )
        with ExitStack() as stack:  # an error takes back what is installed
            for handle in self._install():
                stack.enter_context(handle)
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._installed is not None, "it was entered"
        self._installed.close()
        self._installed = None


def _at(site: Site, model: CausalLM, change: Change) -> Any:
    """Let `change` see the residual stream at a site; returns the hook's handle."""
    (site,) = resolve_sites([site], text_config(model).num_hidden_layers)
    blocks = blocks_of(model)
    return _on_input(blocks[0], change) if site == EMBEDDING else _on_output(blocks[site], change)


def _on_input(block: nn.Module, change: Change) -> Any:
    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        stream = change(args[0] if args else kwargs["hidden_states"])
        if stream is None:
            return None
        if args:
            return (stream, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": stream}

    return block.register_forward_pre_hook(hook, with_kwargs=True)


def _on_output(module: nn.Module, change: Change) -> Any:
    def hook(_module: Any, _args: Any, output: Any) -> Any:
        stream = change(stream_of(output))
        whole = stream is None or not isinstance(output, tuple)
        return stream if whole else (stream, *output[1:])

    return module.register_forward_hook(hook)


class LATHook(_Hooks):
    """Add `deltas[site]` to the residual stream at each site while the context is open.

    deltas: site -> [batch, seq, d_model], in units of the residual stream; gradients flow to them.
    A float32 delta on a bf16 stream is added in bf16. With `decoding=True` the perturbation applies
    to the prefill, and the following calls of one token (cached decoding) pass unchanged. Raises
    ValueError inside the forward when a delta's shape, device or dtype does not fit the stream.
    Source: Casper et al. 2024; Sheshadri et al. 2024, section 3."""

    def __init__(
        self, model: CausalLM, deltas: Mapping[Site, Tensor], decoding: bool = False
    ) -> None:
        self.model, self.deltas, self.decoding = model, dict(deltas), decoding

    def _install(self) -> Iterator[Any]:
        for site, delta in self.deltas.items():
            yield _at(site, self.model, partial(self._add, site, delta))

    def _add(self, site: Site, delta: Tensor, stream: Tensor) -> Tensor | None:
        if self.decoding and stream.shape[1] == 1 and delta.shape[1] > 1:
            return None
        check_delta(site, delta, stream)
        return stream + delta.to(stream.dtype)


def check_delta(site: Site, delta: Tensor, stream: Tensor) -> None:
    """Raise ValueError, naming both sides, unless `delta` fits the residual stream at `site`."""
    if delta.shape != stream.shape:
        raise ValueError(
            f"site {site}: perturbation is {tuple(delta.shape)}, the residual stream is"
            f" {tuple(stream.shape)}: make the perturbation for this batch's length"
        )
    if delta.device != stream.device:
        raise ValueError(
            f"site {site}: perturbation is on {delta.device}, the residual stream on"
            f" {stream.device}"
        )
    if not delta.is_floating_point() or delta.element_size() < stream.element_size():
        raise ValueError(
            f"site {site}: perturbation is {delta.dtype}, the residual stream {stream.dtype}: "
            "keep the perturbation in the stream's precision or higher"
        )


class Capture(_Hooks):
    """Read the residual stream at sites: after the forward, `capture[site]` is [batch, seq,
    d_model], or [batch, len(positions), d_model] when `positions` names token positions (negative
    ones count from the end). graph: gradients flow through what was read."""

    def __init__(
        self,
        model: CausalLM,
        sites: Sequence[Site],
        positions: Sequence[int] | None = None,
        graph: bool = False,
    ) -> None:
        self.graph = graph
        self.model, self.sites, self.positions = model, tuple(sites), positions
        self._streams: dict[Site, Tensor] = {}

    def _install(self) -> Iterator[Any]:
        for site in self.sites:
            yield _at(site, self.model, partial(self._keep, site))

    def _keep(self, site: Site, stream: Tensor) -> None:
        at = stream if self.positions is None else stream[:, list(self.positions)]
        self._streams[site] = at if self.graph else at.detach()

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._streams:
            raise KeyError(
                f"site {site!r} was not captured: name it in `sites` and run a forward in the"
                " context"
            )
        return self._streams[site]


class Ablate(_Hooks):
    """Project directions out of everything written to the residual stream, at every position.

    directions: [d_model] or [k, d_model], any length; they are orthonormalised. Applied to the
    embedding, to the output of every block and of what writes inside it (`blocks.writers_of`), so
    that the stream never holds them. Source: Arditi et al. 2024, section 2.4."""

    def __init__(self, model: CausalLM, directions: Tensor) -> None:
        self.model, self.basis = model, orthonormal(directions)
        self.writers = writers_of(model)  # before any hook of the caller's is in place

    def _install(self) -> Iterator[Any]:
        project = partial(project_out, basis=self.basis)
        for block, writers in zip(blocks_of(self.model), self.writers, strict=True):
            yield _on_input(block, project)
            for module in (*writers, block):
                yield _on_output(module, project)


def project_out(stream: Tensor, basis: Tensor) -> Tensor:
    """`stream` ([..., d_model]) without its part along orthonormal `basis` ([k, d_model])."""
    basis = basis.to(stream.device, stream.dtype)
    return stream - (stream @ basis.T) @ basis


def orthonormal(directions: Tensor) -> Tensor:
    """[rank, d_model] orthonormal rows spanning `directions` ([d_model] or [k, d_model], perhaps
    dependent), differentiable if they are independent and no two of their shares alike.

    Raises ValueError for a zero or non-finite direction."""
    rows = torch.atleast_2d(directions).double()
    norms = rows.norm(dim=-1)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise ValueError(
            f"directions have norms {norms.tolist()}: every one must be finite and non-zero"
        )
    _, sizes, basis = torch.linalg.svd(rows / norms[:, None], full_matrices=False)
    return basis[sizes > 1e-6 * sizes[0]]
