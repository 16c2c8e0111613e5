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
        """Whether the next forward is the last of an update, whose backward pass exchanges all
        gradients."""

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


ALONE = Processes()


def full(value: Any) -> Any:
    """A copy on the CPU of tensors, also in dictionaries and lists, gathered where they are
    sharded. Every process must ask for the same."""

    def gathered(tensor: Any) -> Tensor:
        tensor = tensor.detach()
        if hasattr(tensor, "full_tensor"):
            tensor = tensor.full_tensor()
        return tensor.to("cpu", copy=True)

    return tree_map_only(Tensor, gathered, value)


def sharded(value: Any, like: Any) -> Any:
    """A copy of full tensors, also in dictionaries and lists, on the device of a parameter, sharded
    as that is (single numbers are not). All processes have the same: none is sent."""

    def shared(tensor: Tensor) -> Tensor:
        tensor = tensor.to(like.device, copy=True)
        if not tensor.dim() or not hasattr(like, "full_tensor"):
            return tensor
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

    return tree_map_only(Tensor, shared, value)
