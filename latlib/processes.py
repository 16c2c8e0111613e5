"""The processes that train one model, as one of them sees it; here, a process alone.

`distributed.ranks` has the group that sums over several. Training asks only for what stands here,
so that its code is the same for one process and for many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Result = TypeVar("Result")


class Processes:
    """A process alone, which sums nothing. rank: this process's number, of `world`. mode: how the
    model is shared, None for a process alone."""

    mode: str | None = None

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def through(self, train: bool, call: Callable[[], Result]) -> Result:
        """The result of `call`, which runs the model; train: whether weights get gradients of
        it."""
        return call()

    def exchange(self, now: bool) -> None:
        """Whether the next forward is an update's last, whose backward pass exchanges gradients."""

    def own(self, parts: Sequence[Result]) -> list[Result]:
        """This process's share of a list that all have alike."""
        return list(parts[self.rank :: self.world])

    def total(self, sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
        """name -> the sum over all processes, for those of `names` that some process has."""
        return dict(sums)

    def mean(self, values: Sequence[Tensor]) -> float | None:
        """The mean over the elements of all processes' tensors, None where there are none."""
        if not any(map(len, values)):
            return None
        return torch.cat(list(values)).mean().item()

    def full(self, value: Any) -> Any:
        """A copy on the CPU of tensors, also in dictionaries and lists, gathered where they are
        sharded. Every process must ask for the same."""
        return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)

    def sharded(self, value: Any, like: Any) -> Any:
        """A copy of full tensors, also in dictionaries and lists, on the device of a parameter,
        sharded as that is. All processes have the same: none is sent."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(like.device, copy=True), value)


ALONE = Processes()
