"""Muon, the optimiser that pretrains the organism (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), in float32.

1. Momentum, Nesterov's.
2. Its mean is made nearly orthogonal: five Newton-Schulz steps, all matrices of one shape at once.
3. Decoupled weight decay, then a step of lr * sqrt(max(1, rows / columns)).
`torch.optim.Muon` does the second in bfloat16 whatever the processor: where that is emulated, in
most laptops, it takes two thirds of a training step (docs/lab-log.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3, x^5 (Jordan et al.)
ITERATIONS = 5  # (Jordan et al.)
TINY = 1e-7  # norms below are no directions (Jordan et al.)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1 (0.7 to 1.2).

    matrices: [n, rows, columns], of which none is zero. Returns the same shape.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=TINY)
    first, third, fifth = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=third, alpha=fifth), x, beta=first
        )
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices of hidden layers; embedding and head want another optimiser."""

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike[matrix.shape].append(matrix)
            for (rows, columns), matrices in alike.items():
                nudges = [self._nudge(matrix, group["momentum"]) for matrix in matrices]
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, update in zip(
                    matrices, orthogonalise(torch.stack(nudges)), strict=True
                ):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.sub_(update, alpha=rate)

    def _nudge(self, matrix: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum of a gradient, kept from step to step."""
        assert matrix.grad is not None, "asked for matrices with a gradient"
        state = self.state[matrix]
        mean = state.setdefault("momentum", torch.zeros_like(matrix.grad))
        mean.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(mean, momentum)
