"""Any Hugging Face decoder as a `Network`: from any site, under a perturbation, up to the hidden
states that predict labels, through the model's own modules.

1. The decoder runs once with blocks that only note how they are called: masks and rotary tables.
2. Then each block is called with these and the stream. A perturbation is added between the blocks
   and not by a `LATHook`, so that gradient checkpointing recomputes the same thing; the sum is the
   one that the hook makes.
3. A packed batch has an attention mask of its own, under which completions do not see each other.
4. Where several processes train the model, its blocks run inside `Processes.through`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from latlib.batch import Batch
from latlib.hooks import Ablate, Capture, CausalLM, blocks_of, decoder_of, orthonormal, project_out
from latlib.losses import Unembed, at_labels
from latlib.model_state import adapter_off, forwards_replaced, frozen
from latlib.network_protocol import Perturbation, Start, check_start, perturbed
from latlib.processes import ALONE, Processes, Result
from latlib.threat import EMBEDDING, Site, depth, resolve_sites

# of each block: the arguments and keyword arguments beside the stream
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


class StockNetwork:
    """Any Hugging Face decoder, through its own modules.

    adapter: False runs a PEFT model with its adapter off (the teacher). train: False freezes the
    weights while it runs. compiled: run the blocks through `torch.compile`, one compilation for all
    of them (not under ablation hooks or gradient checkpointing, which need the modules' own calls).
    processes: those that train the model together."""

    def __init__(
        self,
        model: CausalLM,
        adapter: bool = True,
        train: bool = False,
        directions: Tensor | None = None,
        compiled: bool = False,
        processes: Processes = ALONE,
    ):
        self.model, self.adapter, self.train, self.directions = model, adapter, train, directions
        self.processes = processes
        self.decoder, self.blocks, self.compiled = decoder_of(model), blocks_of(model), compiled
        self.n_layers, self.d_model = model.config.num_hidden_layers, model.config.hidden_size
        weight = model.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        self._calls: WeakKeyDictionary[Batch, Calls] = WeakKeyDictionary()

    @contextmanager
    def frozen_mode(self) -> Iterator[None]:
        with (
            nullcontext() if self.adapter else adapter_off(self.model),
            nullcontext() if self.train else frozen(self.model),
            nullcontext() if self.directions is None else Ablate(self.model, self.directions),
        ):
            yield

    def _through(self, call: Callable[[], Result]) -> Result:
        return self.processes.through(self.train, call)

    def _forward_inputs(self, batch: Batch) -> dict[str, Any]:
        # plain rows are padded on the right, where causal attention never looks
        mask = torch.ones_like(batch.ids)
        if batch.packed:
            seen = batch.attends()[:, None]
            mask = torch.zeros(seen.shape, device=self.device, dtype=self.dtype)
            mask.masked_fill_(~seen, torch.finfo(self.dtype).min)
        return {"position_ids": batch.positions, "attention_mask": mask, "use_cache": False}

    def _calls_of_blocks(self, batch: Batch) -> Calls:
        """The arguments beside the stream that each block receives for this batch (masks, rotary
        tables), made once: the decoder runs with blocks that only note how they are called."""
        if batch not in self._calls:
            try:
                self._calls[batch] = self._noted(batch, lambda stream: stream)
            except _PartOfStreamError:
                self._calls[batch] = self._noted(batch, lambda stream: (stream,))
        return self._calls[batch]

    @torch.no_grad()
    def _noted(self, batch: Batch, returned: Callable[[Tensor], Tensor | tuple[Tensor]]) -> Calls:
        """See `_calls_of_blocks`; the blocks return `returned(stream)`. Raises _PartOfStreamError
        if the decoder took the first row of that: its blocks return tuples."""
        seen: Calls = []

        def note(stream: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            if stream.shape[:-1] != batch.shape:
                raise _PartOfStreamError
            seen.append((args, kwargs))
            return returned(stream)

        with forwards_replaced(list(self.blocks), note, hooks=False):
            self.decoder(batch.ids, **self._forward_inputs(batch))
        return seen

    def capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        with self.frozen_mode():
            return self._through(
                lambda: self._capture(batch, resolve_sites(sites, self.n_layers), index)
            )

    @torch.no_grad()
    def _capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        # so many blocks; at the embedding the first is passed by, not left half-way
        run = depth(sites[-1])
        passed = (
            nullcontext()
            if run
            else forwards_replaced([self.blocks[0]], lambda stream, *_, **__: stream)
        )
        with passed, Capture(self.model, sites) as streams:
            stop = self.blocks[max(run - 1, 0)].register_forward_hook(_raise_enough)
            try:
                self.decoder(batch.ids, **self._forward_inputs(batch))
            except _EnoughError:
                pass
            finally:
                stop.remove()
            return {s: streams[s] if index is None else at_labels(streams[s], index) for s in sites}

    def streams(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        wanted = resolve_sites(sites, self.n_layers)
        with self.frozen_mode():
            return self._through(lambda: self._streams(batch, wanted))

    def _streams(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        found = {}
        for site, stream in self._walk(batch):
            if site in sites:
                found[site] = stream
            if site == sites[-1]:
                break
        return found

    def hidden(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        if start is not None:
            check_start(start[0], deltas)
        if deltas and self.directions is not None:
            basis = orthonormal(self.directions)
            deltas = {s: project_out(delta, basis) for s, delta in deltas.items()}
        with self.frozen_mode():
            return self._through(lambda: self._hidden(batch, deltas, start))

    def _hidden(self, batch: Batch, deltas: Perturbation, start: Start) -> Tensor:
        _, stream = deque(self._walk(batch, deltas, start), maxlen=1)[0]
        return self._final_norm()(stream)

    def _walk(
        self, batch: Batch, deltas: Perturbation = None, start: Start = None
    ) -> Iterator[tuple[Site, Tensor]]:
        """(site, perturbed stream there), block by block."""
        site, stream = start or (EMBEDDING, self._capture(batch, [EMBEDDING])[EMBEDDING])
        calls = self._calls_of_blocks(batch)
        stream = perturbed(site, stream, deltas)
        yield site, stream
        for i in range(depth(site), self.n_layers):
            args, kwargs = calls[i]
            stream = perturbed(i, _tensor(self._runner(i)(stream, *args, **kwargs)), deltas)
            yield i, stream

    def label_rows(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        return at_labels(self.hidden(batch, deltas, start), batch.source)

    def _runner(self, i: int) -> Callable[..., Any]:
        block: Any = self.blocks[i]
        checkpointed = getattr(block, "gradient_checkpointing", False) and block.training
        if not self.compiled or self.directions is not None or checkpointed:
            return block
        if not hasattr(block, "_latlib_compiled"):
            block._latlib_compiled = torch.compile(block.forward)
        return block._latlib_compiled

    def unembed(self, rows: Tensor) -> Tensor:
        with self.frozen_mode():
            logits = self.model.get_output_embeddings()(rows)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if not cap else cap * torch.tanh(logits / cap)

    def unembedding(self) -> Unembed:
        return self.unembed

    def ablated(self, directions: Tensor) -> StockNetwork:
        if self.directions is not None:
            before = torch.atleast_2d(self.directions)
            directions = torch.cat((before, torch.atleast_2d(directions).to(before)))
        return self._with(self.train, directions)

    def frozen(self) -> StockNetwork:
        return self._with(False, self.directions)

    def flush_gradients(self) -> None:
        """See `Network`: gradients are with the parameters already."""

    def _with(self, train: bool, directions: Tensor | None) -> StockNetwork:
        other = StockNetwork(
            self.model, self.adapter, train, directions, self.compiled, self.processes
        )
        other._calls = self._calls  # the same whatever the weights do
        return other

    def _final_norm(self) -> nn.Module:
        for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"):
            if hasattr(self.decoder, name):
                return getattr(self.decoder, name)
        raise ValueError(f"{type(self.decoder).__name__} has no final norm latlib knows")


class _PartOfStreamError(Exception):
    """A block was handed a part of what the one before it returned."""


class _EnoughError(Exception):
    """Ends a forward whose upper blocks nobody needs."""


def _raise_enough(*_: Any) -> None:
    raise _EnoughError


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
