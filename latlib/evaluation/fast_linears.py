"""Stock modules whose Linears multiply as the lean forward does: by merged matrices, and by the
faster of torch's two libraries (`fused.products`). Generation needs the stock modules for their
cache of keys and values, and on a CPU spends nearly all of its time in products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from latlib.blocks import CausalLM
from latlib.fused.llama import merged_linear
from latlib.fused.products import project
from latlib.model_state import forwards_replaced


@contextmanager
def fast_linears(model: CausalLM) -> Iterator[None]:
    """Inside, `model`'s Linears multiply so. Hooks on them act as before; weights are those of now.
    For a model that `fused.llama.fits`, without gradients."""
    with ExitStack() as stack:
        for layer in _linears(model):
            stack.enter_context(forwards_replaced([layer], _product_with(layer)))
        yield


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """The Linears within `module`, with the adapters on them."""
    if isinstance(module, nn.Linear) or hasattr(module, "lora_A"):
        yield module
        return
    for child in module.children():
        yield from _linears(child)


def _product_with(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    on = not getattr(layer, "disable_adapters", False)
    weight = merged_linear(layer, adapter=on).value

    def product(x: Tensor) -> Tensor:
        return project(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    return product
