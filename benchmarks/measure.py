"""Seconds, FLOPs, bytes, and the rate at which this machine multiplies matrices in this very
minute.

1. `MatrixRate` times matrix products: those of the model's blocks at the micro-batch's token count,
   and a large square one. A shared machine's speed drifts by up to 2x, so the rate is taken just
   before and just after every timed run and a run is compared with the mean of its two neighbours.
2. `count` runs once under `StepCounter`: FLOPs, and on a CPU the peak bytes above what was there
   before.
3. `Measurement` keeps all samples; what is reported are medians.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from latlib.io.files import write_json
from latlib.io.machine import available_cores
from latlib.planning.step_cost import StepCounter

# large enough for the best rate, short enough to be timed between runs
SQUARE = {"cpu": 1024, "cuda": 8192}


def wait_for(device: torch.device) -> None:
    """Until the device has done all it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    wait_for(device)
    began = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - began


@dataclass(frozen=True)
class Rate:
    """FLOP/s of matrix products: the best of all that was timed, the large square one, and the
    model's own (one block's products, each at its own best time, taken together)."""

    best: float
    square: float
    own: float


@dataclass(frozen=True)
class MatrixRate:
    """Times products [m, k] x [k, n]. products: the model's own, (m, k, n). seconds: least time
    spent on each.
    """

    products: Sequence[tuple[int, int, int]]
    dtype: torch.dtype
    device: torch.device
    seconds: float = 0.02

    def measure(self) -> Rate:
        """The rate now."""
        size = SQUARE[self.device.type]
        square = 2 * size**3 / self._time(size, size, size)
        flops = [2 * m * k * n for m, k, n in self.products]
        times = [self._time(*product) for product in self.products]
        each = [flop / seconds for flop, seconds in zip(flops, times, strict=True)]
        return Rate(max(square, *each), square, sum(flops) / sum(times))

    def _time(self, m: int, k: int, n: int) -> float:
        a, b = (torch.randn(shape, device=self.device).to(self.dtype) for shape in ((m, k), (n, k)))
        out = torch.empty(m, n, dtype=self.dtype, device=self.device)
        times: list[float] = []
        while sum(times) < self.seconds or len(times) < 3:
            times.append(seconds_of(lambda: torch.mm(a, b.T, out=out), self.device))
        return min(times)


@dataclass(frozen=True)
class Counts:
    """What one call took. flop: of matrix products and attention, padding included. peak: bytes
    beyond what was there before. held: bytes of these that are still there when it returns.
    largest: (elements, operator) of the largest allocation; unknown where the device counts its
    memory."""

    flop: int
    peak: int
    held: int
    largest: tuple[int, str] | None


def count(function: Callable[[], object], device: torch.device) -> Counts:
    """Run once, counting; much slower than without."""
    if device.type != "cuda":
        with StepCounter() as counter:
            function()
        return Counts(counter.flop, counter.peak, counter.live, counter.largest)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with StepCounter() as counter:
        function()
    peak = torch.cuda.max_memory_allocated(device) - before
    held = torch.cuda.memory_allocated(device) - before
    return Counts(counter.flop, peak, held, None)


@dataclass
class Measurement:
    """Timed runs of one thing, each with the matrix rates just before and just after it."""

    seconds: list[float] = field(default_factory=list)
    rates: list[tuple[Rate, Rate]] = field(default_factory=list)

    def add(self, seconds: float, before: Rate, after: Rate) -> None:
        """One run."""
        self.seconds.append(seconds)
        self.rates.append((before, after))

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.seconds)

    def rate(self, which: str) -> float:
        """Median FLOP/s over the runs of one of `Rate`'s fields."""
        return median(self._rates(which))

    def fraction(self, flop: int, which: str) -> float:
        """Median over the runs of what was achieved, as a share of the rate around each run."""
        return median(
            flop / s / rate for s, rate in zip(self.seconds, self._rates(which), strict=True)
        )

    def _rates(self, which: str) -> list[float]:
        return [
            (getattr(before, which) + getattr(after, which)) / 2 for before, after in self.rates
        ]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a run failed because the device or the machine has too little memory."""
    return isinstance(
        error, (torch.OutOfMemoryError, MemoryError)
    ) or "can't allocate memory" in str(error)


def write(results: dict, path: Path | None) -> None:
    """Results as JSON, where somebody asked for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(results, path)


def environment(device: torch.device) -> dict:
    """Where and with what something was measured."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    folder = Path(__file__).resolve().parent
    commit = subprocess.run(
        ("git", "rev-parse", "HEAD"), cwd=folder, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ("git", "status", "--porcelain", "--", "latlib", "benchmarks", ":!benchmarks/results"),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu,
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "commit": commit.stdout.strip() or None,
        "uncommitted_changes": bool(changed.stdout.strip()) if changed.returncode == 0 else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
