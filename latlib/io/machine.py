"""What this machine offers to a process: cores, memory that stays mapped, devices and precisions.

torch is loaded by what needs it, so that a process which only counts cores starts at once.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from latlib.errors import SettingError
from latlib.io.messages import in_a_line

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)
# times, of two ways to multiply matrices: our choice, far from the ratios seen (docs/lab-log.md),
# so that no noise decides
MUCH_FASTER = 1.5


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Let the C library reuse freed tensors' pages instead of returning them to the system; whether
    it could.

    By default glibc maps every large tensor anew, and the kernel hands out its pages zeroed, one
    fault for each 4 KiB: as long as the arithmetic of a small model takes (docs/lab-log.md). Other
    C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@lru_cache
def can_compile(device: str) -> bool:
    """Whether `torch.compile` works on this kind of device (a CPU needs a C++ compiler, a GPU
    Triton); warns if not.
    """
    import torch

    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing, the same code runs without
        warnings.warn(
            f"torch.compile does not work on {device} here: {in_a_line(error)}; blocks run"
            " uncompiled",
            stacklevel=2,
        )
        return False
    return True


def resolve_device(device: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU. Raises SettingError for a device this
    machine lacks.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SettingError(
            f"model.device = {device!r} but torch sees no GPU: set it to 'auto' or 'cpu'"
        )
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 where the hardware is faster in it: GPUs that know it, CPUs with AMX, and
    those with AVX512_BF16 that multiply faster in it than in float32, which is measured: some take
    twice as long, others a quarter (docs/lab-log.md).
    """
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_prefers_bfloat16() else torch.float32


@lru_cache(maxsize=1)
def _cpu_prefers_bfloat16() -> bool:
    import torch

    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        return True
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return False
    matrices = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    wide, narrow = fastest(*(partial(torch.mm, matrix, matrix) for matrix in matrices))
    return wide > MUCH_FASTER * narrow


def fastest(*ways: Callable[[], object], repeats: int = 8) -> list[float]:
    """The least seconds that each took. In turn, so that what else runs here slows all alike; a
    first call of each, which prepares, does not count."""
    least = [math.inf] * len(ways)
    for repeat in range(repeats + 1):
        for i, way in enumerate(ways):
            start = time.perf_counter()
            way()
            taken = time.perf_counter() - start
            if repeat:
                least[i] = min(least[i], taken)
    return least
