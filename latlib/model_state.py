"""What a model does differently for a while: no adapter, no weight gradients, other forwards. All
is undone at the end, whatever happens inside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from latlib.blocks import CausalLM


@contextmanager
def _requires_grad_kept(model: CausalLM) -> Iterator[None]:
    """Whatever happens to requires_grad inside is undone."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def adapter_off(model: CausalLM) -> Iterator[None]:
    """Run a PEFT model as its base. Unlike `disable_adapter()`, keeps every requires_grad."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    with _requires_grad_kept(model), model.disable_adapter():
        yield


@contextmanager
def frozen(model: CausalLM) -> Iterator[None]:
    """No parameter requires grad inside: an attack keeps no inputs of weight gradients and can
    leave none behind."""
    with _requires_grad_kept(model):
        model.requires_grad_(False)
        yield


@contextmanager
def forwards_replaced(
    modules: Sequence[nn.Module], forward: Callable[..., Any], hooks: bool = True
) -> Iterator[None]:
    """Modules whose `forward` is another function inside, whatever wrapped it before. hooks=False:
    and which run no hook, as FSDP2's that gather a block's weights."""
    changes: dict[str, Any] = {"forward": forward}
    if not hooks:
        changes |= {"_forward_pre_hooks": OrderedDict(), "_forward_hooks": OrderedDict()}
    own = [vars(module).copy() for module in modules]
    try:
        for module in modules:
            vars(module).update(changes)
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            del vars(module)["forward"]
            vars(module).update(before)
