"""Any Hugging Face decoder as a `Network`: from any site, under a perturbation, up to the hidden
states that predict labels, through the model's own modules.

1. The decoder runs once with blocks that only note how they are called: masks and rotary tables.
2. Then each block is called with these and the stream. A perturbation is added between the blocks
   and not by a `LATHook`, so that gradient checkpointing recomputes the same thing; the sum is the
   one that the hook makes.
3. A packed batch has an attention mask of its own, under which completions do not see each other.
4. Where several processes train the model, its blocks run inside `Processes.through`.

Steps 1 to 3 are shortcuts, proven by `latlib.proof`; without them the decoder runs whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from latlib.batch import Batch
from latlib.blocks import CausalLM, blocks_of, decoder_of, stream_of
from latlib.hooks import Ablate, Capture, LATHook, orthonormal
from latlib.model_state import adapter_off, forwards_replaced, frozen
from latlib.network_protocol import Network, Perturbation, Start
from latlib.processes import ALONE, Processes, Result
from latlib.threat import EMBEDDING, Site

# of each block: the arguments and keyword arguments beside the stream
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


class StockNetwork(Network):
    """Any Hugging Face decoder, through its own modules.

    adapter: False runs a PEFT model with its adapter off (the teacher). train: False freezes the
    weights while it runs. compiled: run the blocks through `torch.compile`, one compilation for all
    of them (not under ablation hooks or gradient checkpointing, which need the modules' own calls).
    processes: those that train the model together. walks: blocks are called one by one."""

    def __init__(
        self,
        model: CausalLM,
        adapter: bool = True,
        train: bool = False,
        compiled: bool = False,
        processes: Processes = ALONE,
        walks: bool = True,
    ) -> None:
        super().__init__(model, train)
        self.walks = walks
        self.adapter, self.compiled, self.processes = adapter, compiled, processes
        self.decoder, self.blocks = decoder_of(model), blocks_of(model)
        # the same whatever the weights do
        self._calls: WeakKeyDictionary[Batch, Calls] = WeakKeyDictionary()

    @contextmanager
    def frozen_mode(self) -> Iterator[None]:
        with (
            nullcontext() if self.adapter else adapter_off(self.model),
            nullcontext() if self.train else frozen(self.model),
            nullcontext() if self.directions is None else Ablate(self.model, self.directions),
        ):
            yield

    def _run(self, call: Callable[[], Result]) -> Result:
        with self.frozen_mode():
            return self.processes.through(self.train, call)

    def _decode(self, batch: Batch) -> Tensor:
        """[batch, seq, d_model]: the decoder's output, its blocks perhaps others for now."""
        # plain rows are padded on the right, where causal attention never looks
        mask = torch.ones_like(batch.ids)
        if batch.packed:
            seen = batch.attends()[:, None]
            mask = torch.zeros_like(seen, dtype=self.dtype)
            mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
        positions = batch.positions
        inputs = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
        return self.decoder(batch.ids, **inputs)[0]

    def hidden(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """See `Network`."""
        if self.walks:
            return super().hidden(batch, deltas, start)
        outside = self._outside(deltas) or {}
        with LATHook(self.model, outside):  # nothing is perturbed below the start
            return self._run(lambda: self._decode(batch))

    def _streams(
        self, batch: Batch, sites: Sequence[Site], deltas: Perturbation = None, start: Start = None
    ) -> dict[Site, Tensor]:
        if self.walks:
            return super()._streams(batch, sites, deltas, start)
        with Capture(self.model, sites, graph=True) as streams:
            self._decode(batch)
        return {site: streams[site] for site in sites}

    def _calls_of_blocks(self, batch: Batch) -> Calls:
        """The arguments beside the stream that each block receives for this batch (masks, rotary
        tables), made once: the decoder runs with blocks that only note how they are called."""
        if batch not in self._calls:
            noted = self._noted(batch, lambda stream: stream)
            self._calls[batch] = noted or self._noted(batch, lambda stream: (stream,))
        return self._calls[batch]

    @torch.no_grad()
    def _noted(self, batch: Batch, returned: Callable[[Tensor], Tensor | tuple[Tensor]]) -> Calls:
        """See `_calls_of_blocks`; the blocks return `returned(stream)`. Nothing, if the decoder
        took the first row of that: its blocks return tuples."""
        seen: Calls = []

        def note(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            if stream.shape[:-1] != batch.shape:
                seen.clear()
                raise _EnoughError
            seen.append((args, kwargs))
            return returned(stream)

        with forwards_replaced(list(self.blocks), note, hooks=False), suppress(_EnoughError):
            self._decode(batch)
        return seen

    def _embedded(self, batch: Batch) -> Tensor:
        """The stream at the embedding. The first block is passed by, not left half-way, and no
        other is run."""
        first = self.blocks[0]
        with (
            forwards_replaced([first], lambda stream, *_, **__: stream),
            Capture(self.model, [EMBEDDING], graph=True) as streams,
            first.register_forward_hook(_raise_enough),
            suppress(_EnoughError),
        ):
            self._decode(batch)
        return streams[EMBEDDING]

    def _block(self, stream: Tensor, i: int, batch: Batch) -> Tensor:
        args, kwargs = self._calls_of_blocks(batch)[i]
        return stream_of(self._runner(self.blocks[i])(stream, *args, **kwargs))

    def _runner(self, block: Any) -> Callable[..., Any]:
        checkpointed = getattr(block, "gradient_checkpointing", False) and block.training
        if not self.compiled or self.directions is not None or checkpointed:
            return block
        if not hasattr(block, "_latlib_compiled"):
            block._latlib_compiled = torch.compile(block.forward)
        return block._latlib_compiled

    def _norm(self, stream: Tensor) -> Tensor:
        for name in _FINAL_NORMS:
            if hasattr(self.decoder, name):
                return getattr(self.decoder, name)(stream)
        raise ValueError(f"{type(self.decoder).__name__} has no final norm latlib knows")

    def unembed(self, rows: Tensor) -> Tensor:
        # by the model's own forward, whose decoder returns the rows: families scale, cap and shift
        output = _Decoded(last_hidden_state=rows[None])
        ids = torch.zeros(1, len(rows), dtype=torch.long, device=self.device)
        decoded = forwards_replaced([self.decoder], lambda *_, **__: output, hooks=False)
        with self.frozen_mode(), decoded:
            return self.model(ids, use_cache=False).logits[0]

    def ablated(self, directions: Tensor) -> StockNetwork:
        every = self._and(directions)
        return self._with(directions=every, basis=orthonormal(every))

    def frozen(self) -> StockNetwork:
        return self._with(train=False)

    def flush_gradients(self) -> None:
        """See `Network`: gradients are with the parameters already."""


# its name by family; `proof` finds a wrong one
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "embedding_norm")


class _Decoded(BaseModelOutputWithPast):
    """A decoder's output, with nothing in it but the hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _EnoughError(Exception):
    """Ends a forward whose upper blocks nobody needs."""


def _raise_enough(*_: Any) -> None:
    raise _EnoughError
