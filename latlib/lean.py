"""The Llama family over merged weights: the same function as the stock modules, in a fraction of the kernels.

A model of a few million parameters is bound by the number of kernels. Here, once per step:
1. the adapter is merged, W + (alpha / r) B A, differentiably when training;
2. every RMSNorm's gain is folded into the matrices that read it, and q, k, v and gate, up are stacked;
3. directions to be ablated are projected out of the matrices that write to the stream (equal to ablation by hooks);
so that a block is eleven kernels and a perturbation is one addition.

Tested equal to the stock modules (which compute norms in float32 whatever the dtype). It applies to `LlamaForCausalLM`
without biases and to plain LoRA; `fits` says so, and everything else takes `forward.StockNetwork`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latlib.data import Batch
from latlib.forward import Start, check_start
from latlib.hooks import EMBEDDING, Site, check_delta, decoder_of, depth, orthonormal, project_out, resolve_sites
from latlib.losses import at_labels

LEAN_LIMIT = 50_000_000  # parameters; above it arithmetic decides and a merged copy costs too much memory


def fits(model: nn.Module) -> bool:
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


def _plain_lora(layer: nn.Module) -> bool:
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


def _weight(layer: nn.Module, adapter: bool) -> Tensor:
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
    """Merged matrices: embed, head [vocabulary, d_model]; per block qkv, out, gate_up, down as [out, in]."""

    embed: Tensor
    head: Tensor
    qkv: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]

    def map(self, function) -> Weights:
        """Apply a function to every matrix."""
        return Weights(
            *(function(self.embed), function(self.head)),
            *(tuple(map(function, group)) for group in (self.qkv, self.out, self.gate_up, self.down)),
        )


def merge(model: nn.Module, adapter: bool) -> Weights:
    """Merged weights of a (PEFT) Llama, in its own dtype, differentiable in whatever requires grad."""
    decoder = decoder_of(model)

    def stack(gain: Tensor, *layers: nn.Module) -> Tensor:
        matrix = (
            torch.cat([_weight(layer, adapter) for layer in layers]) if len(layers) > 1 else _weight(layers[0], adapter)
        )
        return matrix * gain

    qkv, out, gate_up, down = [], [], [], []
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        qkv.append(stack(block.input_layernorm.weight, attention.q_proj, attention.k_proj, attention.v_proj))
        out.append(_weight(attention.o_proj, adapter))
        gate_up.append(stack(block.post_attention_layernorm.weight, mlp.gate_proj, mlp.up_proj))
        down.append(_weight(mlp.down_proj, adapter))
    head = stack(decoder.norm.weight, model.get_output_embeddings())
    groups = (tuple(qkv), tuple(out), tuple(gate_up), tuple(down))
    return Weights(model.get_input_embeddings().weight, head, *groups)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) without a gain: the backward pass needs only the output and the scale."""

    @staticmethod
    def forward(ctx, x: Tensor, eps: float) -> Tensor:
        mean_square = (
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide_of(x.dtype)).square().div_(x.shape[-1])
        )
        scale = mean_square.add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-y.shape[-1])
        return torch.addcmul(grad, y, along).mul_(scale), None


def _wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class LeanNetwork:
    """A `forward.Network` over merged weights.

    model: a (PEFT) Llama that `fits`. train: keep the graph from the merged weights to the adapter. dtype: compute
    dtype.
    """

    def __init__(self, model: nn.Module, adapter: bool = True, train: bool = False, dtype: torch.dtype | None = None):
        config = model.config
        with torch.set_grad_enabled(train):
            weights = merge(model, adapter)
            self.dtype = dtype or weights.embed.dtype
            self.weights = weights.map(lambda w: w.to(self.dtype))
        self.n_layers, self.d_model, self.device = config.num_hidden_layers, config.hidden_size, weights.embed.device
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or self.d_model // self.heads
        self.eps = config.rms_norm_eps
        self._rotary = decoder_of(model).rotary_emb
        self._ablated: Tensor | None = None  # [k, d_model] orthonormal
        self._context: tuple[Batch, tuple[Tensor, Tensor, Tensor]] | None = None

    def _tables(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """cos, sin [1 or batch, seq, 1, head_dim]; additive mask [batch * heads or 1, seq, seq]; once per batch."""
        if self._context is None or self._context[0] is not batch:
            packed, seq = batch.packed, batch.shape[1]
            positions = batch.positions if packed else torch.arange(seq, device=self.device)[None]
            cos, sin = self._rotary(torch.empty(0, device=self.device, dtype=_wide_of(self.dtype)), positions)
            half = self.head_dim // 2
            cos, sin = cos.unsqueeze(2), torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(2)
            seen = batch.attends() if packed else torch.ones(1, seq, seq, dtype=torch.bool, device=self.device).tril()
            bias = torch.zeros(seen.shape, device=self.device).masked_fill(~seen, torch.finfo(torch.float32).min / 2)
            if packed:
                bias = bias.repeat_interleave(self.heads, 0)
            self._context = (batch, (cos.to(self.dtype), sin.to(self.dtype), bias.to(self.dtype)))
        return self._context[1]

    def _block(self, x: Tensor, i: int, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        w, (n, seq, _), hd = self.weights, x.shape, self.head_dim
        heads, kv = self.heads, self.kv_heads
        qkv = F.linear(_RMSNorm.apply(x, self.eps), w.qkv[i]).view(n, seq, heads + 2 * kv, hd)
        qk, v = qkv.split((heads + kv, kv), 2)
        qk = torch.addcmul(qk * cos, qk.roll(hd // 2, -1), sin)
        q, k = qk.split((heads, kv), 2)
        if kv != heads:
            k, v = (t.repeat_interleave(heads // kv, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2).reshape(n * heads, seq, hd) for t in (q, k, v))
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=hd**-0.5).softmax(-1)
        mixed = torch.bmm(scores, v).view(n, heads, seq, hd).transpose(1, 2).reshape(n, seq, heads * hd)
        x = x + F.linear(mixed, w.out[i])
        gate, up = F.linear(_RMSNorm.apply(x, self.eps), w.gate_up[i]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w.down[i])

    def capture(self, batch: Batch, sites: Sequence[Site], index: Tensor | None = None) -> dict[Site, Tensor]:
        """See `forward.Network`."""
        found, sites = {}, resolve_sites(sites, self.n_layers)
        with torch.no_grad():
            stream = F.embedding(batch.ids, self.weights.embed)
            for at in range(depth(sites[-1]) + 1):
                site = EMBEDDING if at == 0 else at - 1
                if at > 0:
                    stream = self._block(stream, at - 1, *self._tables(batch))
                if site in sites:
                    found[site] = stream if index is None else at_labels(stream, index)
        return found

    def hidden(self, batch: Batch, deltas: Mapping[Site, Tensor] | None = None, start: Start | None = None) -> Tensor:
        """See `forward.Network`."""
        deltas = {} if deltas is None else deltas
        if self._ablated is not None:
            deltas = {s: project_out(delta, self._ablated) for s, delta in deltas.items()}
        site, stream = start or (EMBEDDING, F.embedding(batch.ids, self.weights.embed))
        check_start(site, deltas)
        for at in range(depth(site), self.n_layers + 1):
            here = EMBEDDING if at == 0 else at - 1
            if at > depth(site):
                stream = self._block(stream, at - 1, *self._tables(batch))
            if here in deltas:
                check_delta(here, deltas[here], stream)
                stream = stream + deltas[here].to(stream.dtype)
        return _RMSNorm.apply(stream, self.eps)

    def unembed(self, rows: Tensor) -> Tensor:
        """See `forward.Network`."""
        return F.linear(rows, self.weights.head)

    def held(self) -> AbstractContextManager[None]:
        """See `forward.Network`: merged weights are a network's own, so there is nothing to hold."""
        return nullcontext()

    def ablated(self, directions: Tensor) -> LeanNetwork:
        """See `forward.Network`. The directions leave every matrix that writes to the stream (Arditi et al. 2024)."""
        if self._ablated is not None:
            directions = torch.cat((self._ablated, torch.atleast_2d(directions.detach()).to(self._ablated)))
        basis = orthonormal(directions).to(self.device)

        def writes(matrix: Tensor) -> Tensor:  # [d_model, in]
            wide = matrix.double()
            return (wide - basis.T @ (basis @ wide)).to(matrix.dtype)

        w = self.weights
        clean = replace(w, embed=writes(w.embed.T).T, out=tuple(map(writes, w.out)), down=tuple(map(writes, w.down)))
        other = object.__new__(LeanNetwork)
        other.__dict__.update(self.__dict__, weights=clean, _ablated=basis, _context=None)
        return other
