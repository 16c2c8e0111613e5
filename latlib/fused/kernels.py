"""The two halves of a Llama block with their backward passes written out, over merged weights.

For models so small that memory traffic and the number of kernels decide, not arithmetic. Compared
with the same lines under autograd there are about half as many passes over memory:
1. the residual is added by the matrix product that produces it;
2. rotary embedding works on two contiguous halves of all heads at once (the rows of the weight are
   ordered so), and its backward pass is the same function with -sin;
3. grouped queries of one key head are one longer list of queries: keys and values are never
   repeated;
4. weight gradients are computed where a weight asks for them, or the factors of its low-rank part
   (`Matrix`), and only what the backward pass reads is kept: not what one pass over memory gives
   again, and in training, whose peak decides how many rows fit, not the attention weights.

Shapes: x [batch, seq, d_model]; q, k, v [batch * kv_heads, rows, head_dim]; a norm has no gain (it
is in the weights)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latlib.fused.products import by_onednn, project, project_each, project_onto
from latlib.losses import wide_of

Tables = tuple[Tensor, Tensor, Tensor]  # cos, sin and bias, see `Attention`


class Matrix(NamedTuple):
    """A merged matrix, [out, in]: it, or a low-rank part of it, is trained.

    left [out, r] and right [r, in]: their product is part of value; None: there is no such part.
    value then needs no gradient, and theirs cost r / in + r / out of its gradient, twice.
    """

    value: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Matrix:
        """Apply a function to every tensor."""
        if self.left is None or self.right is None:
            return Matrix(function(self.value))
        return Matrix(function(self.value), function(self.left), function(self.right))


class Read(NamedTuple):
    """How attention reads the stream, see `Attention`."""

    tables: Tables
    heads: tuple[int, int]
    eps: float
    rows: Tensor | None = None


def _gradients(
    matrix: Matrix,
    wanted: Sequence[bool],
    d_product: Tensor,
    x: Tensor,
    trained: slice | None = None,
) -> list[Tensor | None]:
    """Gradients of a matrix and its factors, where wanted, from that of x @ value.T, [n, out].
    trained: the only rows of the matrix that have one."""
    found: list[Tensor | None] = [None, None, None]
    if wanted[0] and trained is None:
        found[0] = project(d_product.T, x.T)
    elif wanted[0]:
        whole = torch.zeros_like(matrix.value)
        whole[trained] = project(d_product[:, trained].T, x.T)
        found[0] = whole
    if matrix.left is not None and matrix.right is not None and any(wanted[1:]):
        read = project(x, matrix.right)
        found[1] = project(d_product.T, read.T)
        d_read = project(d_product, matrix.left.T)
        found[2] = project(d_read.T, x.T)
    return found


# torch's bf16 softmax on a CPU runs scalar code for what is left of a row beyond a multiple of 32.
# Short rows take a float32 softmax instead, long ones get keys that nobody sees; each is twice as
# fast (docs/lab-log.md).
SHORT_ROW, ROW_MULTIPLE = 128, 32


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x), 1 / rms(x)) with the mean square in float32 or better."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_of(x.dtype)).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
    return x * scale, scale


def _normed_backward(grad: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    along = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(-y.shape[-1])
    return torch.addcmul(grad, y, along).mul_(scale)


class RMSNorm(torch.autograd.Function):
    """x / rms(x) without a gain: the backward pass needs only the output and the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """See the class."""
        y, scale = _normed(x, eps)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """See the class."""
        return _normed_backward(grad, *ctx.saved_tensors), None


def _rotate(pairs: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """pairs [tokens, 2, width]: the two halves of every head; cos, sin [tokens, 1, width]. A
    contiguous copy."""
    out, sin = pairs * cos, sin.squeeze(1)
    sign = 1.0 if inverse else -1.0
    out[:, 0].addcmul_(pairs[:, 1], sin, value=sign)
    out[:, 1].addcmul_(pairs[:, 0], sin, value=-sign)
    return out


def padded_keys(seq: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many keys `Attention` should be given a mask for: seq, or a little more where that is
    faster."""
    fast = device.type != "cpu" or dtype != torch.bfloat16 or seq < SHORT_ROW
    return seq if fast else -(-seq // ROW_MULTIPLE) * ROW_MULTIPLE


def _attention_weights(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    if by_onednn(q):
        scores = project_each(q, k).add_(bias)
    else:
        scores = torch.baddbmm(bias, q, k.mT)
    short = scores.shape[-1] < SHORT_ROW and scores.device.type == "cpu"
    if short and scores.dtype == torch.bfloat16:
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return scores.softmax(-1)


def _with_keys(part: Tensor, keys: int) -> Tensor:
    """[batch, heads, seq, ...] as contiguous [batch * heads, keys, head_dim], zero beyond seq."""
    n, heads, seq = part.shape[:3]
    if keys == seq:
        return part.reshape(n * heads, seq, -1)
    out = part.new_zeros(n, heads, keys, *part.shape[3:])
    out[:, :, :seq] = part
    return out.view(n * heads, keys, -1)


class Attention(torch.autograd.Function):
    """x + out(attention(norm(x))): [batch, seq, d_model], or [n, d_model] at `rows`, [n] into the
    flattened positions.

    matrices: the tensors of `Matrix` qkv and `Matrix` out. qkv [(heads + 2 kv_heads) * head_dim,
    d_model]: the first halves of all heads of q and k, the second halves of the same, then v, with
    1 / sqrt(head_dim) in the rows of q. out [d_model, heads * head_dim]. tables: cos, sin [batch *
    seq, 1, (heads + kv_heads) * head_dim / 2]; bias, additive, [1 or batch * kv_heads, heads /
    kv_heads * seq, `padded_keys(seq)`]. heads: (heads, kv_heads)."""

    @staticmethod
    def forward(
        ctx: Any,
        read_as: Read,
        x: Tensor,
        *matrices: Any,
    ) -> Tensor:
        """See the class."""
        tables, heads, eps, rows = read_as
        qkv, _, _, out, _, _ = matrices
        n, seq, d = x.shape
        flat = x.view(-1, d)
        y, scale = _normed(flat, eps)
        q, k, v = _queries_keys_values(project(y, qkv), (n, seq), heads, tables)
        p = _attention_weights(q, k, tables[2])
        read = project_each(p, v.mT).view(n, heads[0], seq, -1)
        read = read.transpose(1, 2).reshape(n * seq, -1)
        if rows is not None:
            flat = flat.index_select(0, rows)
            read = read.index_select(0, rows)
        kept = (None, read) if any(ctx.needs_input_grad[5:]) else (p, None)
        ctx.save_for_backward(y, scale, q, k, v, *kept, rows, *matrices)
        ctx.tables, ctx.heads, ctx.shape = tables, heads, x.shape
        written = project_onto(flat, read, out)
        return written.view_as(x) if rows is None else written

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        y, scale, q, k, v, p, read, rows, *matrices = ctx.saved_tensors
        qkv = Matrix(*matrices[:3])
        out = Matrix(*matrices[3:])
        wanted = ctx.needs_input_grad
        n, seq, d = ctx.shape
        cos, sin, bias = ctx.tables
        flat = grad.reshape(-1, d)
        d_read = project(flat, out.value.T)
        d_out = _gradients(out, wanted[5:], flat, read)
        if rows is not None:
            flat = _put_back(flat, rows, n * seq)
            d_read = _put_back(d_read, rows, n * seq)
        heads, kv_heads = ctx.heads
        d_read = d_read.view(n, seq, heads, -1)
        d_read = d_read.transpose(1, 2).reshape(q.shape)
        if p is None:
            p = _attention_weights(q, k, bias)
        d_p = project_each(d_read, v)
        d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
        d_q = project_each(d_scores, k.mT)
        d_k = project_each(d_scores.mT, q.mT)
        d_v = project_each(p.mT, d_read.mT)
        d_q = d_q.view(n, heads, seq, -1)
        by_head = (n, kv_heads, k.shape[1], -1)
        d_k, d_v = (d.view(by_head)[:, :, :seq] for d in (d_k, d_v))  # without the padding
        d_mixed = _mixed_gradient(d_q, d_k, d_v, cos, sin)
        d_x = None
        if wanted[1]:
            d_y = project(d_mixed, qkv.value.T)
            d_x = _normed_backward(d_y, y, scale).add_(flat).view(ctx.shape)
        d_qkv = _gradients(qkv, wanted[2:5], d_mixed, y)
        return None, d_x, *d_qkv, *d_out


def _put_back(part: Tensor, rows: Tensor, n: int) -> Tensor:
    """[n, width] with `part` at `rows`, zero elsewhere."""
    return part.new_zeros(n, part.shape[1]).index_add_(0, rows, part)


def _queries_keys_values(
    mixed: Tensor, shape: tuple[int, int], heads: tuple[int, int], tables: Tables
) -> tuple[Tensor, Tensor, Tensor]:
    """q [batch * kv_heads, heads / kv_heads * seq, head_dim] and k, v [batch * kv_heads, keys,
    head_dim] from the product with qkv. shape: (batch, seq)."""
    cos, sin, bias = tables
    n, seq = shape
    queries, keys = heads
    hd = mixed.shape[1] // (queries + 2 * keys)
    end = (queries + keys) * hd
    pairs = mixed[:, :end]
    turned = _rotate(pairs.view(-1, 2, end // 2), cos, sin)
    turned = turned.view(n, seq, 2, -1, hd // 2)
    by_head = turned.permute(0, 3, 1, 2, 4)  # [batch, heads + kv_heads, seq, 2, head_dim / 2]
    q = by_head[:, :queries]
    k = by_head[:, queries:]
    v = mixed[:, end:]
    v = v.view(n, seq, keys, hd)
    v = v.transpose(1, 2)
    padded = bias.shape[-1]
    return q.reshape(n * keys, -1, hd), _with_keys(k, padded), _with_keys(v, padded)


def _mixed_gradient(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of the product with qkv, [batch * seq, (heads + 2 kv_heads) * head_dim], from
    those of queries, keys and values, each [batch, its heads, seq, head_dim]."""
    n, queries, seq, hd = d_q.shape
    keys = d_k.shape[1]
    end = (queries + keys) * hd
    d_turned = d_q.new_empty(n, seq, 2, queries + keys, hd // 2)
    by_head = d_turned.permute(0, 3, 1, 2, 4)  # [batch, heads + kv_heads, seq, 2, head_dim / 2]
    halves = (2, hd // 2)
    by_head[:, :queries] = d_q.unflatten(-1, halves)
    by_head[:, queries:] = d_k.unflatten(-1, halves)
    d_turned = d_turned.view(-1, 2, end // 2)
    turned = _rotate(d_turned, cos, sin, inverse=True)
    d_mixed = d_q.new_empty(n * seq, end + keys * hd)
    d_mixed[:, :end] = turned.view(-1, end)
    d_values = d_mixed[:, end:]
    d_values = d_values.view(n, seq, keys, hd)
    d_values.copy_(d_v.transpose(1, 2))
    return d_mixed


class MLP(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))).

    matrices: the tensors of `Matrix` gate_up, [2 * ffn, d_model], and `Matrix` down, [d_model,
    ffn]. read_as: eps, and the rows of gate_up whose gradient is wanted, where it needs one (an
    adapter often leaves the gate alone)."""

    @staticmethod
    def forward(
        ctx: Any,
        read_as: tuple[float, slice],
        x: Tensor,
        *matrices: Any,
    ) -> Tensor:
        """See the class."""
        eps, trained = read_as
        gate_up, _, _, down, _, _ = matrices
        flat = x.view(-1, x.shape[-1])
        y, scale = _normed(flat, eps)
        both = project(y, gate_up)
        gate, up = both.chunk(2, -1)
        ctx.save_for_backward(y, scale, both, *matrices)
        ctx.shape, ctx.trained = x.shape, trained
        return project_onto(flat, F.silu(gate).mul_(up), down).view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        y, scale, both, *matrices = ctx.saved_tensors
        gate_up = Matrix(*matrices[:3])
        down = Matrix(*matrices[3:])
        wanted = ctx.needs_input_grad
        gate, up = both.chunk(2, -1)
        active = F.silu(gate)
        flat = grad.reshape(-1, ctx.shape[-1])
        d_product = project(flat, down.value.T)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, -1)
        torch.mul(d_product, active, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
        d_x = None
        if wanted[1]:
            d_y = project(d_both, gate_up.value.T)
            d_x = _normed_backward(d_y, y, scale).add_(flat).view(ctx.shape)
        d_gate_up = _gradients(gate_up, wanted[2:5], d_both, y, ctx.trained)
        product = active.mul_(up) if any(wanted[5:]) else active
        d_down = _gradients(down, wanted[5:], flat, product)
        return None, d_x, *d_gate_up, *d_down
