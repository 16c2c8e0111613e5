"""Bytes, hours and money of a profile's training, before anything is downloaded.

1. Rows: their real lengths where data and tokenizer are on this machine, else a stated assumption.
   Time is taken at the mean length, memory at the longest.
2. Memory: `step_cost.predicted_memory` of the method that needs most.
3. Time: on a GPU that holds the model, steps with random weights of the real shape, timed
   (`timed_steps`); else the FLOPs of every method's steps at a stated rate.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from transformers import PretrainedConfig

from latlib.batch import TokenRow
from latlib.config.profile import Profile
from latlib.config.sections import TrainSettings
from latlib.models import LanguageModel
from latlib.planning.step_cost import (
    Lengths,
    Memory,
    has_attack,
    on_each_gpu,
    predicted_flop,
    predicted_memory,
    random_model,
    random_trainer,
)
from latlib.threat import resolve_sites
from latlib.train import Trainer

# FLOP/s of a large bf16 matrix product on an H100 or H200: about four fifths of the datasheet's
# peak of 989e12 (see docs/sources.md).
MEASURED_RATE = 790e12
# of it, for a step: our choice. Full training of a 7B model reaches .46 of the peak (fms-fsdp, see
# docs/sources.md); our micro-batches are smaller and their blocks uncompiled.
SHARE = 0.35
# where no row can be read: the middle of the benchmarks' rows, our choice
ASSUMED_MEAN = Lengths(150, 150)
SPARE = 1.1  # times the prediction, for fragmentation: our choice
CONTEXT = 2**30  # bytes of CUDA's own context: our choice


@dataclass(frozen=True)
class RowLengths:
    """Mean and longest row, and in words where they are from."""

    mean: Lengths
    longest: Lengths
    source: str


def assumed_lengths(max_tokens: int) -> RowLengths:
    """Where rows cannot be read: prompt and completion together have at most `max_tokens`."""
    half = max(1, max_tokens // 2)
    prompt = min(ASSUMED_MEAN.prompt, half)
    completion = min(ASSUMED_MEAN.completion, half)
    longest = Lengths(max(1, max_tokens // 4), max(1, max_tokens - max_tokens // 4))
    source = (
        f"assumed: {prompt} + {completion} tokens on average; at most data.max_tokens ="
        f" {max_tokens}, as {longest.prompt} + {longest.completion}"
    )
    return RowLengths(Lengths(prompt, completion), longest, source)


def lengths_of(harmful: Sequence[TokenRow], benign: Sequence[TokenRow]) -> RowLengths:
    """Of rows that were read; the longest is as long as any row when packed."""
    rows = [*harmful, *benign]
    prompt = mean(len(row.prompt) for row in rows)
    completion = mean(len(tokens) for row in rows for tokens in row.completions)
    middle = Lengths(round(prompt), round(completion))
    long = max(harmful, key=lambda row: row.length)
    both = sum(len(tokens) for tokens in long.completions)
    longest = Lengths(len(long.prompt), math.ceil(both / 2))
    source = (
        f"read: {middle.prompt} + {middle.completion} tokens on average, longest {longest.prompt} +"
        f" two completions of {longest.completion}, {len(rows):,} rows"
    )
    return RowLengths(middle, longest, source)


@dataclass(frozen=True)
class Phase:
    """So many steps of a method that are of one kind: before the attack begins, or with it.
    settings: such that a first step is of this kind.
    """

    method: str
    settings: TrainSettings
    steps: int


def phases(profile: Profile) -> list[Phase]:
    """All that is trained for one seed; released models and sweeps are not in it."""
    found = []
    for method in profile.methods:
        if method in profile.released:
            continue
        settings = profile.training(method)
        plain = settings.steps
        if settings.attack.steps:
            plain = min(settings.attack_after, settings.steps)
        never = settings.model_copy(update={"attack_after": settings.steps + 1})
        at_once = settings.model_copy(update={"attack_after": 0, "eps_ramp": 0})
        found.append(Phase(method, never, plain))
        found.append(Phase(method, at_once, settings.steps - plain))
    return [phase for phase in found if phase.steps]


def heaviest(found: Sequence[Phase], n_layers: int) -> Phase:
    """The phase whose step holds most: the largest micro-batch, then an attack with the most
    sites.
    """

    def weight(phase: Phase) -> tuple[int, bool, int]:
        settings = phase.settings
        sites = resolve_sites(settings.attack.sites, n_layers)
        return settings.micro_batch, has_attack(settings), len(sites)

    return max(found, key=weight)


def training_memory(profile: Profile, lm: LanguageModel, lengths: Lengths) -> Memory | None:
    """What each GPU holds at the worst moment of training (`lm`: a fake model); None where nothing
    is trained.
    """
    found = phases(profile)
    if not found:
        return None
    settings = heaviest(found, lm.n_layers).settings
    processes, mode = profile.parallel.processes, profile.parallel.mode
    return on_each_gpu(predicted_memory(lm, settings, lengths, processes), lm, processes, mode)


def counted_flop(profile: Profile, lm: LanguageModel, lengths: Lengths) -> dict[str, float]:
    """method -> FLOPs of its training, one seed."""

    def of(phase: Phase) -> float:
        return phase.steps * predicted_flop(lm, phase.settings, lengths)

    return _by_method(phases(profile), of)


def _by_method(found: Iterable[Phase], quantity: Callable[[Phase], float]) -> dict[str, float]:
    """method -> the sum over its phases."""
    total: dict[str, float] = defaultdict(float)
    for phase in found:
        total[phase.method] += quantity(phase)
    return dict(total)


def timed_steps(trainer: Trainer, steps: int = 3) -> list[float]:
    """Seconds of each of `steps` steps after one that is not counted."""
    device = trainer.lm.device
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        trainer.train_step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def timed_hours(
    profile: Profile,
    config: PretrainedConfig,
    dtype: torch.dtype,
    lengths: Lengths,
    device: torch.device | str,
) -> dict[str, float]:
    """method -> hours of its training, one seed, on one such device: three timed steps of each
    kind.
    """
    lm = random_model(config, dtype, profile.lora, device, profile.model.forward)

    def of(phase: Phase) -> float:
        seconds = timed_steps(random_trainer(lm, phase.settings, lengths))
        return phase.steps * mean(seconds) / 3600

    return _by_method(phases(profile), of)


def spoken(hours: float) -> str:
    """A duration for a table."""
    if hours < 1 / 60:
        return f"{max(1, math.ceil(3600 * hours))} s"
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h"
