"""The blocks of a decoder, and which modules of a block write to the residual stream: found by what
they put out, not by names.

1. The decoder runs once on a few tokens. What a block adds to the stream is a weighted sum of what
   its modules put out: least squares finds which, near the block first.
2. A sum that misses more than rounding is none: what the block writes cannot be told, an error.
Ablated at these modules, and before and behind the block, a direction is nowhere in the stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import compress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# a causal LM of transformers, perhaps inside PEFT: an nn.Module whose parts are named by its family
CausalLM = Any


def text_config(model: CausalLM) -> Any:
    """The config of the language model; of one that also sees or hears, that part of it."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_of(model: CausalLM) -> nn.Module:
    """The stack of blocks inside any wrapping (PEFT, causal-LM head, a model that also sees): the
    module that owns embedding and blocks.

    Raises ValueError when there is no list of `config.num_hidden_layers` blocks."""
    return _decoder_and_blocks(model)[0]


def blocks_of(model: CausalLM) -> nn.ModuleList:
    """The list of decoder blocks, in order. Raises ValueError as `decoder_of` does."""
    return _decoder_and_blocks(model)[1]


def _decoder_and_blocks(model: CausalLM) -> tuple[nn.Module, nn.ModuleList]:
    n = text_config(model).num_hidden_layers
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    for module in inner.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == n:
                return module, child
    raise ValueError(
        f"{type(model).__name__} has no list of {n} blocks: not a decoder latlib knows"
    )


def stream_of(output: Any) -> Any:
    """The residual stream in what a block returns."""
    return output[0] if isinstance(output, tuple) else output


TOKENS = 24  # how many are run to find what writes
# in units of the precision: what rounding may leave unexplained, and the least that a writer adds
ROUNDING, LEAST = 8.0, 0.5
FLOAT32 = 1.2e-7  # in which some families keep the stream, whatever the weights are

_known: WeakKeyDictionary[nn.Module, list[list[nn.Module]]] = WeakKeyDictionary()


def writers_of(model: CausalLM) -> list[list[nn.Module]]:
    """Of each block, the modules whose outputs it adds to the residual stream, such as attention
    and MLP; in families that put a norm behind them these norms.

    Raises ValueError for a block whose sum cannot be told."""
    decoder = decoder_of(model)
    if decoder not in _known:
        table = model.get_input_embeddings().weight
        ids = torch.arange(TOKENS, device=table.device) % len(table)
        seen = [_Seen(block) for block in blocks_of(model)]
        with ExitStack() as hooks, torch.no_grad():
            for each in seen:
                for handle in each.hooks():
                    hooks.enter_context(handle)
            decoder(ids[None], use_cache=False)
        _known[decoder] = [each.writers() for each in seen]
    return _known[decoder]


class _Seen:
    """What a block reads, and what it and its modules put out. outputs: name ('' is the block) ->
    [1, TOKENS, d_model]; None for what is no such stream, or is called at several places."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.before = block, torch.empty(0)
        self.outputs: dict[str, Tensor | None] = {}

    def hooks(self) -> Iterator[Any]:
        """Install what looks; yields the handles."""
        yield self.block.register_forward_pre_hook(self._enter, with_kwargs=True)
        for name, module in self.block.named_modules():
            yield module.register_forward_hook(partial(self._keep, name))

    def _enter(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.before = (args[0] if args else kwargs["hidden_states"]).clone()

    def _keep(self, name: str, _module: Any, _args: Any, output: Any) -> None:
        stream, shape = stream_of(output), self.before.shape
        fits = torch.is_tensor(stream) and stream.numel() == self.before.numel()
        is_stream = fits and stream.shape[-1] == shape[-1] and name not in self.outputs
        self.outputs[name] = stream.clone().view(shape) if is_stream else None

    def writers(self) -> list[nn.Module]:
        """The modules whose outputs add up to what the block writes, as near the block as can
        be."""
        after, kind = self.outputs.pop(""), type(self.block).__name__
        if after is None or self.before.dim() != 3:
            raise ValueError(
                f"{kind} takes {tuple(self.before.shape)}: not one residual stream, so a direction"
                " cannot be ablated there"
            )
        outputs = {name: out for name, out in self.outputs.items() if out is not None}
        for depth in range(1 + max((name.count(".") for name in outputs), default=0)):
            near = {name: out for name, out in outputs.items() if name.count(".") <= depth}
            found = _terms(self.before, after, near)
            if found is not None:
                return [self.block.get_submodule(name) for name in found]
        raise ValueError(
            f"{kind}: what it writes to the residual stream is no sum of what its modules"
            f" {[name for name, _ in self.block.named_children()]} put out, so a direction cannot"
            " be ablated there"
        )


def _terms(before: Tensor, after: Tensor, outputs: Mapping[str, Tensor]) -> list[str] | None:
    """Those of the outputs whose weighted sum leads from one stream to the other, or None."""
    different: dict[str, Tensor] = {}
    for name, output in outputs.items():
        known = different.values()
        if not any(torch.equal(output, other) for other in known):
            different[name] = output
    start = before.double().flatten()
    end = after.double().flatten()
    columns = torch.stack(list(different.values()), -1)
    columns = columns.double().flatten(0, -2)
    parts, size = _fitted(end - start, start.abs() + end.abs(), columns)
    precision = max(torch.finfo(after.dtype).eps, FLOAT32)
    shares = (parts / size[:, None]).norm(dim=0)
    least = LEAST * precision * (end / size).norm()
    counts = shares > least
    missing = end - start - parts[:, counts].sum(1)
    allowed = ROUNDING * precision * size
    if (missing.abs() > allowed).any():
        return None
    return list(compress(different, counts))


def _fitted(written: Tensor, around: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns ([elements, outputs]) times the weights with which they sum to what is written, and
    the size of all that an element adds: rounding goes with it, so elements are weighed by it."""
    parts = columns
    for _ in range(2):  # the second time by the sizes of the parts themselves
        size = (around + parts.abs().sum(1)).clamp(min=1e-300)
        scaled = columns / size[:, None]
        wanted = (written / size)[:, None]
        weights = torch.linalg.lstsq(scaled.cpu(), wanted.cpu(), driver="gelsd").solution
        parts = columns * weights[:, 0].to(columns.device)
    return parts, size
