"""Products with float32 matrices on a CPU, by the faster of the two libraries that torch brings.

torch multiplies float32 by MKL, which leaves AVX-512 unused on processors of other makers than
Intel; oneDNN, which torch takes for bfloat16, uses it there and is twice as fast
(docs/lab-log.md). Its operator is the one that torch's own compiler calls for a Linear. It is taken
where it is there, right, and was measured to be much faster; everything else goes torch's usual
way.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from latlib.io.machine import MUCH_FASTER, fastest

OPERATOR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # None: a torch without it
SIDE = 512  # of the matrices that are timed
# multiplications of a group, from which on a call of its own pays (docs/lab-log.md)
WORTH_A_CALL = 1 << 22
SAME = 1e-5  # relative: rounding of float32 over sums of that many products is 1e-7


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, [n, out]: x [n, in], weight [out, in]; not differentiable in float32."""
    if by_onednn(x):
        return _onednn(x, weight)
    return x @ weight.T


def project_onto(stream: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """stream + x @ weight.T, [n, out]: stream [n, out]; else as `project`."""
    if by_onednn(x):
        return _onednn(x, weight).add_(stream)
    return torch.addmm(stream, x, weight.T)


def project_each(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.mT, [groups, n, out]: x [groups, n, in], weight [groups, out, in]; else as
    `project`."""
    groups, n, width = x.shape
    if by_onednn(x) and n * width * weight.shape[1] >= WORTH_A_CALL:
        return torch.stack([_onednn(x[i], weight[i]) for i in range(groups)])
    return torch.bmm(x, weight.mT)


class Linear(torch.autograd.Function):
    """x @ weight.T, differentiable once: x [n, in], weight [out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x, weight)
        return project(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """See the class."""
        x, weight = ctx.saved_tensors
        d_x = project(grad, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = project(grad.T, x.T) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def by_onednn(x: Tensor) -> bool:
    """Whether products with this tensor go by oneDNN's own operator, which refuses empty ones."""
    fits = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    return fits and _onednn_pays()


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. The operator copies a transposed first matrix and takes the second as it lies,
    so what would be the larger copy goes second."""
    copied = 0 if weight.stride(-1) == 1 else weight.numel()
    if x.stride(-1) != 1 and copied < x.numel():
        return _operator(weight, x).T
    return _operator(x, weight)


def _operator(x: Tensor, weight: Tensor) -> Tensor:
    assert OPERATOR is not None
    return OPERATOR(x, weight, None, "none", [], "")


@lru_cache(maxsize=1)
def _onednn_pays() -> bool:
    """Measured once a process, with as many threads as it has when it first multiplies."""
    if OPERATOR is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with torch.no_grad():
        matrix = torch.linspace(-1, 1, SIDE * SIDE).view(SIDE, SIDE)
        try:
            found = _onednn(matrix, matrix)
        except (RuntimeError, TypeError):
            return False  # another version's operator
        right = matrix.double() @ matrix.double().T
        if not torch.linalg.vector_norm(found - right) < SAME * torch.linalg.vector_norm(right):
            return False
        usual, onednn = fastest(lambda: matrix @ matrix.T, lambda: _onednn(matrix, matrix))
    return usual > MUCH_FASTER * onednn
