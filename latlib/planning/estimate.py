"""Bytes, hours and money of a profile's training, before anything is downloaded.

1. Rows: their real lengths where data and tokenizer are on this machine, else a stated assumption.
   Time is taken at the mean length, memory at the longest.
2. Memory: `step_cost.predicted_memory` of the step that needs most.
3. Time: on a GPU that holds the model, steps with random weights of the real shape, timed; else the
   FLOPs of every method's steps at a stated rate.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from statistics import mean
from typing import Any

import torch

from latlib.batch import TokenRow
from latlib.config.profile import Profile
from latlib.config.sections import AttackSettings, TrainSettings
from latlib.evaluation.outcomes import BASE
from latlib.fused.products import project
from latlib.io.machine import fastest, resolve_dtype
from latlib.models import LanguageModel
from latlib.planning.step_cost import (
    Lengths,
    Memory,
    on_each_gpu,
    predicted_flop,
    predicted_memory,
    random_model,
    random_trainer,
)
from latlib.world import organism

# FLOP/s of a large bf16 matrix product on an H100 or H200: about four fifths of the datasheet's
# peak of 989e12 (see docs/sources.md).
MEASURED_RATE = 790e12
# of it, for a step: our choice. Full training of a 7B model reaches .46 of the peak (fms-fsdp, see
# docs/sources.md); our micro-batches are smaller and their blocks uncompiled.
SHARE = 0.35
# where no row can be read: the middle of the benchmarks' rows, our choice
ASSUMED_MEAN = Lengths(150, 150)
CPU_SIZE = 1024  # of the matrices whose product tells a CPU's rate: a second at most; our choice
# of it, for a step: 46 (bfloat16) to 56 % (float32) in docs/performance.md
CPU_SHARE = 0.5
SPARE = 1.1  # times the prediction, for fragmentation: our choice
CONTEXT = 2**30  # bytes of CUDA's own context: our choice
TIMED = 2  # steps of each kind, after one that warms up: our choice
TIMED_OF_BASE = 8  # whose rows are of any length: our choice


def cpu_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this CPU, as networks that compute in `dtype` multiply."""
    a = torch.randn(CPU_SIZE, CPU_SIZE).to(dtype)
    with torch.no_grad():
        [seconds] = fastest(lambda: project(a, a), repeats=3)
    return 2 * CPU_SIZE**3 / seconds


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
    """So many steps of a model that are of one kind: before the attack begins, or with it.
    model: a method, or its variant as 'lat[no-kl]'. settings: such that a first step is of this
    kind.
    """

    model: str
    settings: TrainSettings
    steps: int


def phases(profile: Profile) -> list[Phase]:
    """All that is trained for one seed and not released: methods, and the variants of the main one.
    Steps that trainings have in common (`TrainSettings.plain_steps`) are the first one's."""
    trained = {m: profile.training(m) for m in profile.methods if m not in profile.released}
    main = profile.roles.main
    if main in trained:
        for name, changes in profile.sweep.variants.items():
            trained[f"{main}[{name}]"] = profile.training(main, changes)
    found = []
    done: dict[str, int] = {}  # what plain steps depend on -> how many a model before has done
    for model, settings in trained.items():
        attacks = settings.attack.steps > 0
        plain = min(settings.attack_after, settings.steps) if attacks else settings.steps
        common = json.dumps(settings.plain_steps())
        if not attacks:
            found.append(Phase(model, settings, plain))
        else:
            if done.get(common, 0) < plain:
                # nothing of the attack plays a part: methods have the same steps
                before = {"attack": AttackSettings(), "clean_share": 0.0, "eps_ramp": 0}
                before["attack_after"] = settings.steps + 1
                found.append(Phase(model, settings.model_copy(update=before), plain))
            at_once = settings.model_copy(update={"eps_ramp": 0, "attack_after": 0})
            found.append(Phase(model, at_once, settings.steps - plain))
        done[common] = max(plain, done.get(common, 0))
    return [phase for phase in found if phase.steps]


def _as_costly(settings: TrainSettings) -> TrainSettings:
    """One for all settings whose steps take the same time: radii are 1, and weights but zero."""
    tree = settings.defence.model_dump()
    weights = {name: 1.0 for name, weight in tree.items() if isinstance(weight, float) and weight}
    parts = {
        "attack": settings.attack.model_copy(update={"eps": 1.0}),
        "defence": settings.defence.model_copy(update=weights),
    }
    return settings.model_copy(update=parts)


def training_memory(profile: Profile, lm: LanguageModel, lengths: Lengths) -> Memory | None:
    """What each GPU holds at the worst moment of training (`lm`: a fake model); None where nothing
    is trained.
    """
    processes, mode = profile.parallel.processes, profile.parallel.mode
    found = []
    for settings in {_as_costly(phase.settings) for phase in phases(profile)}:
        share = predicted_memory(lm, settings, lengths, processes)
        found.append(on_each_gpu(share, lm, processes, mode))
    return max(found, key=attrgetter("total"), default=None)


def _hours(profile: Profile, seconds: Callable[[TrainSettings], float]) -> dict[str, float]:
    """model -> hours of its training, one seed. seconds: of a step at its settings."""
    seconds = cache(seconds)
    total: dict[str, float] = defaultdict(float)
    for phase in phases(profile):
        total[phase.model] += phase.steps * seconds(_as_costly(phase.settings)) / 3600
    return dict(total)


def counted_hours(profile: Profile, lm: LanguageModel, lengths: Lengths) -> dict[str, float]:
    """model -> hours of its training, one seed, by the FLOPs of a fake model's steps."""
    rate = MEASURED_RATE * SHARE
    return _hours(profile, lambda settings: predicted_flop(lm, settings, lengths) / rate)


def timed_hours(
    profile: Profile, fake: LanguageModel, lengths: Lengths, device: str
) -> dict[str, float]:
    """model -> hours of its training, one seed, on one such device: timed steps of each kind of a
    model with random weights, as `fake` is without any.
    """
    dtype = fake.dtype
    if device == "cpu":
        dtype = resolve_dtype(profile.model.dtype, torch.device(device))
    config: Any = fake.model.config
    lm = random_model(config, dtype, profile.lora, device, profile.model.forward)

    def seconds(settings: TrainSettings) -> float:
        trainer = random_trainer(lm, settings, lengths)
        trainer.train_step()
        began = time.perf_counter()
        for _ in range(TIMED):
            trainer.train_step()  # ends with numbers on the CPU, so it is over
        return (time.perf_counter() - began) / TIMED

    return _hours(profile, seconds)


def timed_base_hours(profile: Profile, tokenizer: Any, device: str) -> float:
    """Hours of the organism's base model, one seed, on one such device: timed steps of it."""
    place = torch.device(device)
    dtype = resolve_dtype(profile.model.dtype, place)
    model = organism.build_model(profile.model, tokenizer, 0).to(place)
    settings, division = profile.pretrain, profile.data.division
    rows = organism.pretraining_rows(tokenizer, settings, 0, division)
    few = settings.model_copy(update={"steps": 1 + TIMED_OF_BASE})
    ends: list[float] = []

    def step_done(step: int, loss: float) -> None:
        ends.append(time.perf_counter())

    organism.pretrain(model, rows, few, dtype, step_done)
    seconds = (ends[-1] - ends[0]) / TIMED_OF_BASE
    return settings.steps * seconds / 3600


def seeds_of(profile: Profile, model: str) -> int:
    """How many seeds a model of `phases` is trained on."""
    is_variant = model not in (BASE, *profile.methods)
    return 1 if is_variant and profile.sweep.seeds == "first" else len(profile.seeds)


def elapsed_hours(one_seed: dict[str, float], seeds: Mapping[str, int], workers: int) -> float:
    """Until all models of all seeds are made, so many side by side; whatever stands on a base waits
    for it. one_seed: model -> hours of its training. seeds: model -> how many it is trained on."""
    longest = max((hours for name, hours in one_seed.items() if name != BASE), default=0.0)
    last = one_seed.get(BASE, 0.0) + longest
    return max(last, sum(seeds[name] * hours for name, hours in one_seed.items()) / workers)
