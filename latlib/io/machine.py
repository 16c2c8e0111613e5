"""What this machine offers to a process: cores, and memory that stays mapped."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import lru_cache

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


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
    if not sys.platform.startswith("linux") or not hasattr(
        ctypes.CDLL(None), "gnu_get_libc_version"
    ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


@lru_cache
def can_compile(device: str) -> bool:
    """Whether `torch.compile` works on this kind of device (a CPU needs a C++ compiler, a GPU
    Triton); warns if not.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing, the same code runs without
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"torch.compile does not work on {device} here: {reason}; blocks run uncompiled",
            stacklevel=2,
        )
        return False
    return True
