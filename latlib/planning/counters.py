"""Bytes and FLOPs of whatever runs inside a context, on any device and on the meta device too.

1. `StorageTracker` follows every storage that an operator allocates until it is freed: bytes now
   and at most.
2. `flop_counter` is torch's FLOP counter for the total alone, with the CPU's fused attention
   counted as the GPU's is.
3. `StepCounter` is both at once by the same formulas, several times as fast: for steps of models
   with many blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper


class StorageTracker(TorchDispatchMode):
    """Follows the storages that operators allocate inside the context, until each is freed.

    live, peak: bytes now and at most. largest: (elements, operator) of the largest single
    allocation. What operators allocate and free within themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.largest: tuple[int, str] = (0, "nothing")
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if made:
            given = {
                t.untyped_storage()._cdata
                for t in tree_leaves((args, kwargs))
                if isinstance(t, Tensor)
            }
            for tensor in made:
                self._note(tensor, given, func)
        return out

    def _note(self, tensor: Tensor, given: set[int], operator) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        # followed already, or a view or in-place change of something older
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        if size // tensor.element_size() > self.largest[0]:
            self.largest = (size // tensor.element_size(), str(operator))
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _attention(queries, keys, values, *args, **kwargs) -> int:
    (n, heads, seq, width), value_width = queries, values[-1]
    return 2 * n * heads * seq * keys[-2] * (width + value_width)


def _attention_backward(grad, queries, keys, values, *args, **kwargs) -> int:
    (n, heads, seq, width), value_width = queries, values[-1]
    # the scores again, and four gradients
    return 2 * n * heads * seq * keys[-2] * (3 * width + 2 * value_width)


# torch counts the GPU's fused attention but not the CPU's: these are torch's own formulas for the
# others.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _NoModules:
    """In place of the FLOP counter's module tracker, whose hooks fail where a forward takes
    gradients of its own.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    """torch's FLOP counter, for the total alone."""
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    counter.mod_tracker = _NoModules()
    return counter


class StepCounter(StorageTracker):
    """A `StorageTracker` that also adds up the FLOPs of matrix products and attention, as `flop`.

    torch's counter asks every operator without a formula for its parts; here such an operator
    counts nothing, for autograd has taken composite operators apart before a mode sees them.
    """

    _formulas = flop_registry | {operator: shape_wrapper(f) for operator, f in _UNCOUNTED.items()}

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out
