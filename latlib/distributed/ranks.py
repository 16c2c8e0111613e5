"""Several processes train one model, a GPU each: who they are, how forwards run, and what is summed
over all of them.

1. `join_group` makes this process one of a group, if torchrun or `accelerate launch` started it
   as one (gloo on a CPU, NCCL on GPUs).
2. `wrap` puts the model under DDP, or spreads it over the processes by FSDP2, block by block. Both
   look at the forward of one module, a `Root`, whose forward is whatever it is asked to call: so
   the engine keeps calling blocks its own way, and `StockNetwork` hands every call to
   `Group.through`.
3. DDP: the defence goes through the wrapper, since calling the inner module lets the processes part
   silently. Attack and teacher leave no gradients in weights and call the inner module. Gradients
   are exchanged once an update.
4. FSDP2: everything goes through the root, which gathers a block's weights before it runs and frees
   them behind it, so that between two calls every parameter is a part (and switching
   `requires_grad` there reaches the whole of it at the next gathering). The output matrix alone
   stays whole everywhere: it is called a chunk of labels at a time, and the processes have
   different numbers of labels, but must gather equally often.
5. Both average gradients over the processes, so a share of a sum over the whole batch is multiplied
   by their number.
6. Tensors leave (`Group.full`) and enter (`Group.sharded`) a training state gathered: what is saved
   knows nothing of processes.

Source: FSDP2, torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from latlib.blocks import CausalLM, blocks_of
from latlib.config.sections import ModelSettings, ProfileError
from latlib.io.hub import quietly
from latlib.io.machine import resolve_device, resolve_dtype
from latlib.models import LanguageModel
from latlib.processes import Processes, Result
from latlib.proof.prove import prove

Mode = Literal["ddp", "fsdp2"]
# others wait while the first process makes a base model or writes a large adapter
PATIENCE = timedelta(hours=2)


def started_as_one_of_many() -> bool:
    """Whether torchrun or `accelerate launch` started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join_group(settings: ModelSettings) -> None:
    """Become one of the processes that the environment tells of; on GPUs, use the one of this
    process's number.

    Raises ProfileError for a device that names one GPU for all of them, or one that this machine
    lacks.
    """
    device, own = resolve_device(settings.device), int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if device.index is not None:
            raise ProfileError(
                f"model.device = {settings.device!r} is one GPU for all processes: set it to 'auto'"
            )
        if own >= torch.cuda.device_count():
            raise ProfileError(
                f"parallel.processes needs a GPU each and there are {torch.cuda.device_count()}:"
                " set it to that or less"
            )
        torch.cuda.set_device(own)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE
    )


def leave() -> None:
    """Leave the group, if this process is in one."""
    if is_distributed():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """Whether this process is the one that logs and writes: the only one, or number 0."""
    return not is_distributed() or dist.get_rank() == 0


def broadcast(value: bool) -> bool:
    """What process 0 has: for what each would find out at another moment (a file, a clock) and all
    must do alike.
    """
    if not is_distributed():
        return value
    tensor = torch.tensor([value])
    dist.broadcast(tensor, 0)
    return bool(tensor)


def wait() -> None:
    """Wait until all processes are here."""
    if is_distributed():
        dist.all_reduce(torch.zeros(1))


class Root(nn.Module):
    """The module whose forward DDP and FSDP2 look at: it calls what it is given."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, which may run any part of the model."""
        return call()


class Group(Processes):
    """Several processes that train one model. root: the model in a `Root` under DDP or FSDP2."""

    def __init__(self, mode: Mode, root: Any) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        self.mode, self.root = mode, root

    def through(self, train: bool, call: Callable[[], Result]) -> Result:
        """See `Processes`: under DDP the defence alone goes through the wrapper."""
        if self.mode == "ddp" and not (train and torch.is_grad_enabled()):
            return call()
        return self.root(call)

    def exchange(self, now: bool) -> None:
        """See `Processes`. FSDP2 exchanges after each backward pass: holding full gradients back is
        what it is there to avoid.
        """
        if self.mode == "ddp":
            self.root.require_backward_grad_sync = now  # all that its `no_sync` does

    def total(self, sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
        """See `Processes`."""
        rows = [[sums.get(name, 0.0), float(name in sums)] for name in names]
        table = torch.tensor(rows, dtype=torch.float64)
        dist.all_reduce(table)
        pairs = zip(names, table.tolist(), strict=True)
        return {name: value for name, (value, present) in pairs if present}

    def mean(self, values: Sequence[Tensor]) -> float | None:
        """See `Processes`."""
        sums = {
            "total": sum(v.double().sum().item() for v in values),
            "count": sum(map(len, values)),
        }
        sums = self.total(sums, list(sums))
        return sums["total"] / sums["count"] if sums["count"] else None

    def full(self, value: Any) -> Any:
        """See `Processes`."""
        return super().full(tree_map_only(DTensor, DTensor.full_tensor, value))

    def sharded(self, value: Any, like: Any) -> Any:
        """See `Processes`; single numbers are whole everywhere."""
        copied = super().sharded(value, like)
        if not isinstance(like, DTensor):
            return copied

        def shared(tensor: Tensor) -> Tensor:
            if not tensor.dim():
                return tensor
            return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)

        return tree_map_only(Tensor, shared, copied)


def load_settings(settings: ModelSettings, mode: Mode) -> ModelSettings:
    """`settings` for a model that is about to be wrapped: one to be spread is loaded into the
    host's memory, in the precision it will have on the GPU, and moved there block by block."""
    device = resolve_device(settings.device)
    if not is_distributed() or mode != "fsdp2" or device.type == "cpu":
        return settings
    dtype = str(resolve_dtype(settings.dtype, device)).removeprefix("torch.")
    return settings.model_copy(update={"device": "cpu", "dtype": dtype})


def wrap(lm: LanguageModel, mode: Mode, device: torch.device | None = None) -> LanguageModel:
    """`lm` with its adapter trainable and its networks running through all processes; as it is
    outside a group.

    It must come before the optimiser, which would otherwise hold parameters that FSDP2 has
    replaced, and train nothing. device: where FSDP2 puts the parts, by default where the weights
    are. Raises ProfileError for settings that several processes cannot follow.
    """
    if not is_distributed():
        return lm
    if lm.settings.forward == "lean":
        raise ProfileError(
            "model.forward = 'lean' runs in one process: set it to 'auto', or parallel.processes"
            " to 1"
        )
    prove(lm.model, lm.dtype)  # before its weights are spread
    for name, parameter in lm.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    root: nn.Module = Root(lm.model)
    if mode == "ddp":
        with quietly():  # newer torch has another name for the option, and says so
            root = nn.parallel.DistributedDataParallel(root, broadcast_buffers=False)
    else:
        _spread(root, lm.model, device or lm.device)
    return replace(lm, processes=Group(mode, root))


def _spread(root: nn.Module, model: CausalLM, device: torch.device) -> None:
    """Make every parameter but the output matrix a part of itself on `device`, by FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    head = model.get_output_embeddings()
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise ProfileError(
            "lora.targets names the output matrix, which fsdp2 does not train: remove it or use"
            " 'ddp'"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    head.to(device)
    fully_shard(root, mesh=mesh, reshard_after_forward=True, ignored_params=set(head.parameters()))


def adapter_state(lm: LanguageModel) -> dict[str, Tensor]:
    """The adapter's parameters, full and on the CPU, for PEFT's
    `save_pretrained(folder, state_dict=...)`. Every process must ask for it."""
    own = {name: p for name, p in lm.model.named_parameters() if "lora_" in name}
    return lm.processes.full(own)
