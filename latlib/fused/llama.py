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
5. A wide model is bound by arithmetic, and a matrix's gradient costs as much as its product. Where
   the adapter's rank is low, the leaves are its factors instead (`kernels.Matrix`).

Tested equal to the stock modules (which compute norms in float32 whatever the dtype). It applies to
`LlamaForCausalLM` without biases and to plain LoRA; `fits` says so, and everything else takes
`network.StockNetwork`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from latlib.batch import Batch
from latlib.blocks import CausalLM, decoder_of
from latlib.fused.kernels import MLP, Attention, Matrix, Read, RMSNorm, Tables, padded_keys
from latlib.fused.products import Linear
from latlib.hooks import check_delta, orthonormal
from latlib.losses import Unembed, at_labels, wide_of
from latlib.network_protocol import Network, Perturbation, Start
from latlib.threat import EMBEDDING, Site

# parameters: the largest model at which it was measured to be faster (benchmarks/lean.py, on a CPU)
LEAN_LIMIT = 163_000_000
# where the model is so many times as wide as the rank, gradients go by factors: our choice; they
# then take at most a quarter of the arithmetic of a [d_model, d_model] matrix's
WIDTHS_A_RANK = 16


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
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # what is wrong with it is said where it is opened
        return False
    return runs_lean(model)


def _plain_lora(layer: Any) -> bool:
    """LoRA without dropout, DoRA or a merged adapter, one active adapter, on a Linear."""
    names = layer.active_adapters
    return (
        len(names) == 1
        and names[0] in layer.lora_A
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and not getattr(layer, "use_dora", {}).get(names[0], False)
        and not layer.merged
        and isinstance(layer.base_layer, nn.Linear)
    )


def merged_linear(layer: Any, adapter: bool, by_factors: bool = False) -> Matrix:
    """A Linear's matrix, with its LoRA merged when `adapter`. by_factors: trained through the
    LoRA's factors, not through the matrix."""
    weight = getattr(layer, "base_layer", layer).weight
    if not adapter or not hasattr(layer, "lora_A"):
        return Matrix(weight)
    name = layer.active_adapters[0]
    scale = layer.scaling[name]
    a = layer.lora_A[name].weight
    b = layer.lora_B[name].weight
    wide = weight.to(b.dtype)  # float32 also on a bf16 model
    if not by_factors:
        return Matrix(torch.addmm(wide, b, a, alpha=scale))
    with torch.no_grad():
        merged = torch.addmm(wide, b, a, alpha=scale)
    return Matrix(merged, b * scale, a)


def trains_by_factors(model: CausalLM) -> bool:
    """Whether nothing but LoRA is trained, of a rank so low that the gradients of its factors cost
    less than those of the merged matrices."""
    d_model = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rank = min(parameter.shape)
            if "lora_" not in name or rank * WIDTHS_A_RANK > d_model:
                return False
    return True


class Block(NamedTuple):
    """A block's merged matrices; qkv in the order and scale of `kernels.Attention`."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        """Apply a function to every tensor."""
        return Block(*(matrix.map(function) for matrix in self))


@dataclass(frozen=True, eq=False)
class Weights:
    """Merged matrices as [out, in]: embed, head [vocabulary, d_model], and those of each block."""

    embed: Tensor
    head: Tensor
    blocks: list[Block]

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Apply a function to every tensor."""
        blocks = [block.map(function) for block in self.blocks]
        return Weights(function(self.embed), function(self.head), blocks)

    def __iter__(self) -> Iterator[Tensor]:
        tensors = chain.from_iterable(chain.from_iterable(self.blocks))
        return chain((self.embed, self.head), (t for t in tensors if t is not None))


def merge(model: CausalLM, adapter: bool, by_factors: bool = False) -> Weights:
    """Merged weights of a (PEFT) Llama, in its own dtype, differentiable in whatever requires
    grad; in a LoRA's factors alone where `by_factors`."""
    decoder: Any = decoder_of(model)
    merged = partial(merged_linear, adapter=adapter, by_factors=by_factors)

    blocks = []
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        in_order = partial(_by_halves, size=attention.head_dim)
        qkv = _stacked(map(merged, projections), block.input_layernorm.weight, in_order)
        both = map(merged, (mlp.gate_proj, mlp.up_proj))
        gate_up = _stacked(both, block.post_attention_layernorm.weight, torch.cat)
        blocks.append(Block(qkv, merged(attention.o_proj), gate_up, merged(mlp.down_proj)))
    head = merged_linear(model.get_output_embeddings(), adapter).value * decoder.norm.weight
    return Weights(model.get_input_embeddings().weight, head, blocks)


def _stacked(
    parts: Iterable[Matrix], gain: Tensor, stack: Callable[[list[Tensor]], Tensor]
) -> Matrix:
    """One matrix of several that read the same input behind a norm with this gain, [in]. stack:
    puts their rows together."""
    parts = list(parts)
    value = stack([part.value for part in parts]) * gain
    rights = [part.right for part in parts if part.right is not None]
    if not rights:
        return Matrix(value)
    right = torch.cat(rights)
    lefts, begin = [], 0
    for part in parts:
        left = part.value.new_zeros(len(part.value), 0) if part.left is None else part.left
        end = begin + left.shape[1]
        lefts.append(F.pad(left, (begin, len(right) - end)))
        begin = end
    return Matrix(value, stack(lefts), right * gain)


def _by_halves(matrices: list[Tensor], size: int) -> Tensor:
    """The rows of q, k and v in the order and scale of `kernels.Attention`, heads of `size`."""
    q, k, v = matrices
    turned = torch.cat((_halves(q * size**-0.5, size), _halves(k, size)), 1)
    return torch.cat((turned.flatten(0, 1), v))


def _halves(matrix: Tensor, size: int) -> Tensor:
    """[2, heads * head_dim / 2, d_model]: the two halves of every head, of `size` rows."""
    return matrix.view(-1, 2, size // 2, matrix.shape[1]).transpose(0, 1).flatten(1, 2)


def _unembedded(rows: Tensor, head: Tensor) -> Tensor:
    return Linear.apply(rows, head)


def _trained_rows(mlp: Any) -> slice:
    """The rows of the stacked gate and up weights that training changes."""
    ffn = mlp.gate_proj.weight.shape[0]
    gate, up = (any(p.requires_grad for p in m.parameters()) for m in (mlp.gate_proj, mlp.up_proj))
    return slice(0 if gate else ffn, 2 * ffn if up else ffn)


class LeanNetwork(Network):
    """A `Network` over merged weights.

    model: a (PEFT) Llama that `fits`. train: gradients reach the model's parameters by
    `flush_gradients`. dtype: compute dtype."""

    def __init__(
        self,
        model: CausalLM,
        adapter: bool = True,
        train: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, train, dtype)
        by_factors = train and adapter and trains_by_factors(model)
        with torch.set_grad_enabled(train):
            self._merged = merge(model, adapter, by_factors).map(lambda w: w.to(self.dtype))
        self.weights = self._merged.map(
            lambda w: w.detach().requires_grad_(train and w.requires_grad)
        )
        decoder: Any = decoder_of(model)
        self._rotary = decoder.rotary_emb
        self._trained = [_trained_rows(block.mlp) for block in decoder.layers]
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self._tables_of: WeakKeyDictionary[Batch, Tables] = WeakKeyDictionary()

    def frozen(self) -> LeanNetwork:
        """See `Network`: the same merged values, without gradients."""
        return self._with(weights=self.weights.map(Tensor.detach))

    def flush_gradients(self) -> None:
        pairs = zip(self._merged, self.weights, strict=True)
        left = [(weight, leaf.grad) for weight, leaf in pairs if leaf.grad is not None]
        if left:
            merged, gradients = zip(*left, strict=True)
            torch.autograd.backward(merged, gradients, retain_graph=True)
        for leaf in self.weights:
            leaf.grad = None

    def _tables(self, batch: Batch) -> Tables:
        """cos, sin and additive mask as `kernels.Attention` takes them; once per batch."""
        if batch not in self._tables_of:
            cos, sin = self._rotary_tables(batch)
            self._tables_of[batch] = (cos, sin, self._bias(batch).to(self.dtype))
        return self._tables_of[batch]

    def _rotary_tables(self, batch: Batch) -> Iterator[Tensor]:
        """cos and sin, [batch * seq, 1, (heads + kv_heads) * head_dim / 2]."""
        n, seq = batch.shape
        positions = batch.positions
        if not batch.packed:
            positions = torch.arange(seq, device=self.device)[None]
        like = torch.empty(0, device=self.device, dtype=wide_of(self.dtype))
        for table in self._rotary(like, positions):
            half = table.chunk(2, -1)[0]
            rows = half.repeat(n // len(table), 1, self.heads + self.kv_heads)
            yield rows.flatten(0, 1).unsqueeze(1).to(self.dtype)

    def _bias(self, batch: Batch) -> Tensor:
        """[1 or batch * kv_heads, heads / kv_heads * seq, keys], 0 where a key is seen."""
        seq = batch.shape[1]
        if batch.packed:
            seen = batch.attends()
        else:
            seen = torch.ones(1, seq, seq, dtype=torch.bool, device=self.device).tril()
        hidden = torch.finfo(torch.float32).min / 2
        more = padded_keys(seq, self.dtype, self.device) - seq
        bias = F.pad(torch.where(seen, 0.0, hidden), (0, more), value=hidden)
        bias = bias.repeat(1, self.heads // self.kv_heads, 1)
        return bias.repeat_interleave(self.kv_heads, 0) if batch.packed else bias

    def _embedded(self, batch: Batch) -> Tensor:
        return F.embedding(batch.ids, self.weights.embed)

    def _block(self, stream: Tensor, i: int, batch: Batch, rows: Tensor | None = None) -> Tensor:
        w, heads = self.weights.blocks[i], (self.heads, self.kv_heads)
        read = Read(self._tables(batch), heads, self.eps, rows)
        x = Attention.apply(read, stream, *w.qkv, *w.out)
        return MLP.apply((self.eps, self._trained[i]), x, *w.gate_up, *w.down)

    def _norm(self, stream: Tensor) -> Tensor:
        return RMSNorm.apply(stream, self.eps)

    def label_rows(self, batch: Batch, deltas: Perturbation = None, start: Start = None) -> Tensor:
        """See `Network`: behind its attention, the last block runs at these positions only."""
        last = self.n_layers - 1
        if start is not None and start[0] == last:
            return super().label_rows(batch, deltas, start)
        below: Site = last - 1 if last else EMBEDDING
        deltas = self._outside(deltas) or {}
        stream = self._streams(batch, [below], deltas, start)[below]
        delta = deltas.get(last)
        if delta is not None:
            check_delta(last, delta, stream)
        stream = self._block(stream, last, batch, batch.source)
        if delta is not None:
            stream = stream + at_labels(delta, batch.source).to(stream.dtype)
        return self._norm(stream)

    def unembed(self, rows: Tensor) -> Tensor:
        return _unembedded(rows, self.weights.head)

    def unembedding(self) -> Unembed:
        return partial(_unembedded, head=self.weights.head)

    def ablated(self, directions: Tensor) -> LeanNetwork:
        """See `Network`. The directions leave every matrix that writes to the stream (Arditi et al.
        2024)."""
        basis = orthonormal(self._and(directions)).to(self.device)

        def writes(matrix: Tensor) -> Tensor:  # [d_model, in]
            wide = matrix.double()
            return (wide - basis.T @ (basis @ wide)).to(matrix.dtype)

        def outside(matrix: Matrix) -> Matrix:
            left = None if matrix.left is None else writes(matrix.left)
            return matrix._replace(value=writes(matrix.value), left=left)

        w = self.weights
        blocks = [
            block._replace(out=outside(block.out), down=outside(block.down)) for block in w.blocks
        ]
        embed = writes(w.embed.T).T
        weights = replace(w, embed=embed, blocks=blocks)
        return self._with(weights=weights, directions=basis, basis=basis)
