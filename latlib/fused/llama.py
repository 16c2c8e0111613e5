"""The Llama family over merged weights: the same function as the stock modules, in a fraction of
the kernels.

A model of a few million parameters is bound by the number of kernels. Here, once per step:
1. the adapter is merged, W + (alpha / r) B A, differentiably when training;
2. every RMSNorm's gain is folded into the matrices that read it, and q, k, v and gate, up are
   stacked;
3. directions to be ablated are projected out of the matrices that write to the stream (equal to
   ablation by hooks);
so that a block is two functions with backward passes of their own (`kernels`) and a perturbation is
one addition.
4. Training runs over leaves that hold the merged values: backward passes add to their gradients,
   and `flush_gradients` takes these through the merge to the adapter.

Tested equal to the stock modules (which compute norms in float32 whatever the dtype). It applies to
`LlamaForCausalLM` without biases and to plain LoRA; `fits` says so, and everything else takes
`network.StockNetwork`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from latlib.batch import Batch
from latlib.fused.kernels import MLP, Attention, RMSNorm, padded_keys
from latlib.hooks import CausalLM, check_delta, decoder_of, orthonormal, project_out
from latlib.losses import Unembed, at_labels, wide_of
from latlib.network_protocol import Perturbation, Start, check_start
from latlib.threat import EMBEDDING, Site, depth, resolve_sites

# parameters; above it arithmetic decides and a merged copy costs too much memory
LEAN_LIMIT = 50_000_000
Tables = tuple[Tensor, Tensor, Tensor]


def fits(model: CausalLM) -> bool:
    """Whether the lean forward computes the same function as this model."""
    config = model.config
    return (
        config.model_type == "llama"
        and not getattr(config, "attention_bias", False)
        and not getattr(config, "mlp_bias", False)
        and config.hidden_act == "silu"
        and getattr(config, "pretraining_tp", 1) == 1
        and all(_plain_lora(m) for m in model.modules() if hasattr(m, "lora_A"))
    )


def runs_lean(model: CausalLM) -> bool:
    """Whether the lean forward fits and pays. An adapter does not count for its size: with and
    without one a model runs the same way."""
    sizes = (p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    return sum(sizes) <= LEAN_LIMIT and fits(model)


def will_run_lean(config: PretrainedConfig) -> bool:
    """The same, told from a configuration without weights."""
    # saves building the others, which may need code of their own
    if type(config) is not LlamaConfig:
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return runs_lean(model)


def _plain_lora(layer: Any) -> bool:
    """LoRA without dropout, DoRA or a merged adapter, one active adapter, on a Linear."""
    name = layer.active_adapters[0] if layer.active_adapters else None
    return (
        len(layer.active_adapters) == 1
        and name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not getattr(layer, "use_dora", {}).get(name, False)
        and not layer.merged
        and isinstance(layer.get_base_layer(), nn.Linear)
    )


def _weight(layer: Any, adapter: bool) -> Tensor:
    """[out, in] weight of a Linear, with its LoRA merged when `adapter`."""
    if not hasattr(layer, "lora_A"):
        return layer.weight
    weight, name = layer.get_base_layer().weight, layer.active_adapters[0]
    if not adapter:
        return weight
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight  # float32 also on a bf16 model
    return torch.addmm(weight.to(b.dtype), b, a, alpha=layer.scaling[name])


@dataclass(frozen=True, eq=False)
class Weights:
    """Merged matrices as [out, in]: embed, head [vocabulary, d_model]; per block qkv (in the order
    and scale of `kernels.Attention`), out, gate_up, down."""

    embed: Tensor
    head: Tensor
    qkv: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Apply a function to every matrix."""
        return Weights(
            *(function(self.embed), function(self.head)),
            *(
                tuple(map(function, group))
                for group in (self.qkv, self.out, self.gate_up, self.down)
            ),
        )

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.embed, self.head, *self.qkv, *self.out, *self.gate_up, *self.down)


def merge(model: CausalLM, adapter: bool) -> Weights:
    """Merged weights of a (PEFT) Llama, in its own dtype, differentiable in whatever requires
    grad."""
    decoder: Any = decoder_of(model)
    config = model.config
    size = head_dim(config)

    # [2, heads * head_dim / 2, d_model]: the two halves of every head
    def pairs(matrix: Tensor) -> Tensor:
        return matrix.view(-1, 2, size // 2, matrix.shape[1]).transpose(0, 1).flatten(1, 2)

    qkv, out, gate_up, down = [], [], [], []
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        q, k, v = (
            _weight(layer, adapter)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turned = torch.cat((pairs(q * size**-0.5), pairs(k)), 1).flatten(0, 1)
        qkv.append(torch.cat((turned, v)) * block.input_layernorm.weight)
        out.append(_weight(attention.o_proj, adapter))
        both = torch.cat((_weight(mlp.gate_proj, adapter), _weight(mlp.up_proj, adapter)))
        gate_up.append(both * block.post_attention_layernorm.weight)
        down.append(_weight(mlp.down_proj, adapter))
    head = _weight(model.get_output_embeddings(), adapter) * decoder.norm.weight
    groups = (tuple(qkv), tuple(out), tuple(gate_up), tuple(down))
    return Weights(model.get_input_embeddings().weight, head, *groups)


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _trained_rows(mlp: Any) -> slice:
    """The rows of the stacked gate and up weights that training changes."""
    ffn = mlp.gate_proj.weight.shape[0]
    gate, up = (any(p.requires_grad for p in m.parameters()) for m in (mlp.gate_proj, mlp.up_proj))
    return slice(0 if gate else ffn, 2 * ffn if up else ffn)


class LeanNetwork:
    """A `network_protocol.Network` over merged weights.

    model: a (PEFT) Llama that `fits`. train: gradients reach the model's parameters by
    `flush_gradients`. dtype: compute dtype."""

    def __init__(
        self,
        model: CausalLM,
        adapter: bool = True,
        train: bool = False,
        dtype: torch.dtype | None = None,
    ):
        config = model.config
        with torch.set_grad_enabled(train):
            merged = merge(model, adapter)
            self.dtype = dtype or merged.embed.dtype
            merged = merged.map(lambda w: w.to(self.dtype))
        self._merged = merged if train else None
        self.weights = (
            merged.map(lambda w: w.detach().requires_grad_(w.requires_grad)) if train else merged
        )
        self.n_layers, self.d_model, self.device = (
            config.num_hidden_layers,
            config.hidden_size,
            merged.embed.device,
        )
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = head_dim(config), config.rms_norm_eps
        decoder: Any = decoder_of(model)
        self._rotary = decoder.rotary_emb
        self._trained = [_trained_rows(block.mlp) for block in decoder.layers]
        self.directions: Tensor | None = None  # [k, d_model] orthonormal, ablated
        self._tables_of: WeakKeyDictionary[Batch, Tables] = WeakKeyDictionary()

    def frozen(self) -> LeanNetwork:
        """See `Network`: the same merged values, without gradients."""
        return self._with(self.weights.map(torch.Tensor.detach), _merged=None)

    def flush_gradients(self) -> None:
        assert self._merged is not None, "a network that trains has merged weights"
        merged, gradients = [], []
        for weight, leaf in zip(self._merged, self.weights, strict=True):
            if leaf.grad is not None:
                merged.append(weight)
                gradients.append(leaf.grad)
        if merged:
            torch.autograd.backward(merged, gradients, retain_graph=True)
        for leaf in self.weights:
            leaf.grad = None

    def _tables(self, batch: Batch) -> Tables:
        """cos, sin and additive mask as `kernels.Attention` takes them; once per batch."""
        if batch not in self._tables_of:
            cos, sin = self._rotary_tables(batch)
            bias = self._bias(batch)
            self._tables_of[batch] = (cos.to(self.dtype), sin.to(self.dtype), bias.to(self.dtype))
        return self._tables_of[batch]

    def _rotary_tables(self, batch: Batch) -> list[Tensor]:
        """cos and sin, [batch * seq, 1, (heads + kv_heads) * head_dim / 2]."""
        n, seq = batch.shape
        positions = batch.positions
        if not batch.packed:
            positions = torch.arange(seq, device=self.device)[None]
        like = torch.empty(0, device=self.device, dtype=wide_of(self.dtype))
        tables = []
        for table in self._rotary(like, positions):
            half = table[..., : self.head_dim // 2]
            rows = half.repeat(n // len(table), 1, self.heads + self.kv_heads)
            tables.append(rows.flatten(0, 1).unsqueeze(1))
        return tables

    def _bias(self, batch: Batch) -> Tensor:
        """[1 or batch * kv_heads, heads / kv_heads * seq, keys], 0 where a key is seen."""
        seq = batch.shape[1]
        if batch.packed:
            seen = batch.attends()
        else:
            seen = torch.ones(1, seq, seq, dtype=torch.bool, device=self.device).tril()
        hidden = torch.finfo(torch.float32).min / 2
        bias = torch.zeros(seen.shape, device=self.device).masked_fill(~seen, hidden)
        more = padded_keys(seq, self.dtype, self.device) - seq
        bias = F.pad(bias, (0, more), value=hidden)
        bias = bias.repeat(1, self.heads // self.kv_heads, 1)
        return bias.repeat_interleave(self.kv_heads, 0) if batch.packed else bias

    def _block(
        self, x: Tensor, i: int, tables: tuple[Tensor, ...], rows: Tensor | None = None
    ) -> Tensor:
        w = self.weights
        x = Attention.apply(
            x, w.qkv[i], w.out[i], *tables, self.heads, self.kv_heads, self.eps, rows
        )
        return MLP.apply(x, w.gate_up[i], w.down[i], self.eps, self._trained[i])

    def capture(
        self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None
    ) -> dict[Site, Tensor]:
        with torch.no_grad():
            found = self.streams(batch, sites)
            if index is None:
                return found
            return {site: at_labels(stream, index) for site, stream in found.items()}

    def streams(self, batch: Batch, sites: Sequence[Site]) -> dict[Site, Tensor]:
        sites = resolve_sites(sites, self.n_layers)
        stream = F.embedding(batch.ids, self.weights.embed)
        found: dict[Site, Tensor] = {EMBEDDING: stream} if EMBEDDING in sites else {}
        for i in range(depth(sites[-1])):
            stream = self._block(stream, i, self._tables(batch))
            if i in sites:
                found[i] = stream
        return found

    def hidden(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        return self._run(batch, deltas, start, None)

    def label_rows(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """See `Network`: behind its attention, the last block runs at these
        positions only."""
        return self._run(batch, deltas, start, batch.source)

    def _run(
        self,
        batch: Batch,
        deltas: Perturbation,
        start: Start,
        rows: Tensor | None,
    ) -> Tensor:
        deltas = {} if deltas is None else deltas
        if self.directions is not None:
            deltas = {s: project_out(delta, self.directions) for s, delta in deltas.items()}
        site, stream = start or (EMBEDDING, F.embedding(batch.ids, self.weights.embed))
        check_start(site, deltas)
        for at in range(depth(site), self.n_layers + 1):
            here, last = EMBEDDING if at == 0 else at - 1, at == self.n_layers
            if here in deltas:
                check_delta(here, deltas[here], stream)
            if at > depth(site):
                stream = self._block(stream, at - 1, self._tables(batch), rows if last else None)
            elif last and rows is not None:
                stream = at_labels(stream, rows)
            if here in deltas:
                delta = deltas[here] if rows is None or not last else at_labels(deltas[here], rows)
                stream = stream + delta.to(stream.dtype)
        return RMSNorm.apply(stream, self.eps)

    def unembed(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self.weights.head)

    def unembedding(self) -> Unembed:
        return partial(F.linear, weight=self.weights.head)

    def frozen_mode(self) -> AbstractContextManager[None]:
        """See `Network`: merged weights are a network's own, so there is
        nothing to hold."""
        return nullcontext()

    def ablated(self, directions: Tensor) -> LeanNetwork:
        """See `Network`. The directions leave every matrix that writes to the stream (Arditi et al.
        2024)."""
        if self.directions is not None:
            directions = torch.cat(
                (self.directions, torch.atleast_2d(directions.detach()).to(self.directions))
            )
        basis = orthonormal(directions).to(self.device)

        def writes(matrix: Tensor) -> Tensor:  # [d_model, in]
            wide = matrix.double()
            return (wide - basis.T @ (basis @ wide)).to(matrix.dtype)

        w = self.weights
        clean = replace(
            w,
            embed=writes(w.embed.T).T,
            out=tuple(map(writes, w.out)),
            down=tuple(map(writes, w.down)),
        )
        return self._with(clean, directions=basis)

    def _with(self, weights: Weights, **changes: Any) -> LeanNetwork:
        """This network over other weights."""
        other = object.__new__(LeanNetwork)
        other.__dict__.update(self.__dict__, weights=weights, **changes)
        return other
