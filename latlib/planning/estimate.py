"""Bytes, hours and money of a profile's training, before anything is downloaded.

1. Rows: their real lengths where data and tokenizer are on this machine, else a stated assumption.
   Time is taken at the mean length, memory at the longest.
2. Memory: `memory.predicted_step` of the method that needs most.
3. Time: on a GPU that holds the model, steps with random weights of the real shape, timed
   (`timed_steps`); else the FLOPs of every method's steps at a stated rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from latlib.batch import TokenRow
from latlib.config.profile import Profile
from latlib.config.sections import LoraSettings, ModelSettings, TrainSettings
from latlib.hooks import EMBEDDING, resolve_sites
from latlib.models import LanguageModel, quietly, with_adapter
from latlib.planning.step_cost import Lengths, Prediction, on_each_gpu, predicted_step
from latlib.train import Trainer

# FLOP/s of a large bf16 matrix product on an H100 or H200 (section 7 of our notes of facts)
MEASURED_RATE = 790e12
# of it, for a step: our assumption; 7B full training reaches .46 of the peak of 989e12 (fms-fsdp),
# our
SHARE = 0.35
# micro-batches are smaller and their blocks uncompiled
# where no row can be read: the middle of the benchmarks' rows, our choice
ASSUMED_MEAN = Lengths(150, 150)
# of the prediction, for fragmentation; bytes, for CUDA's own context. Our choice
SPARE, CONTEXT = 1.1, 2**30


@dataclass(frozen=True)
class RowLengths:
    """Mean and longest row, and in words where they are from."""

    mean: Lengths
    longest: Lengths
    source: str


def assumed_lengths(max_tokens: int) -> RowLengths:
    """Where rows cannot be read: prompt and completion together have at most `max_tokens`."""
    prompt, completion = (
        min(ASSUMED_MEAN.prompt, max_tokens // 2),
        min(ASSUMED_MEAN.completion, max_tokens // 2),
    )
    longest = Lengths(max(1, max_tokens // 4), max(1, max_tokens - max_tokens // 4))
    said = (
        f"assumed: {prompt} + {completion} tokens on average; at most data.max_tokens ="
        f" {max_tokens}, as {longest.prompt} + {longest.completion}"
    )
    return RowLengths(Lengths(max(1, prompt), max(1, completion)), longest, said)


def lengths_of(harmful: Sequence[TokenRow], benign: Sequence[TokenRow]) -> RowLengths:
    """Of rows that were read; the longest is as long as any row when packed."""
    rows = [*harmful, *benign]
    completions = [len(c) for row in rows for c in row.completions]
    middle = Lengths(round(mean(len(row.prompt) for row in rows)), max(1, round(mean(completions))))
    long = max(harmful, key=lambda row: row.length)
    longest = Lengths(
        len(long.prompt), max(1, -(-sum(map(len, long.completions)) // len(long.completions)))
    )
    said = (
        f"read: {middle.prompt} + {middle.completion} tokens on average, longest {longest.prompt} +"
        " two completions"
    )
    return RowLengths(middle, longest, f"{said} of {longest.completion}, {len(rows):,} rows")


@dataclass(frozen=True)
class Phase:
    """Steps of one kind of one method: before the attack begins, or with it."""

    method: str
    settings: TrainSettings
    attacked: bool
    steps: int


def phases(profile: Profile) -> list[Phase]:
    """All that is trained for one seed; released models and sweeps are not in it."""
    out = []
    for method in profile.methods:
        if method in profile.released:
            continue
        settings = profile.training(method)
        attacks = settings.attack.steps > 0
        plain = min(settings.attack_after, settings.steps) if attacks else settings.steps
        for attacked, steps in ((False, plain), (True, settings.steps - plain)):
            if steps:
                out.append(Phase(method, settings, attacked, steps))
    return out


def heaviest(found: Sequence[Phase], n_layers: int) -> Phase:
    """The phase whose step holds most: the largest micro-batch, then an attack with the most
    sites.
    """
    return max(
        found,
        key=lambda p: (
            p.settings.micro_batch,
            p.attacked,
            len(resolve_sites(p.settings.attack.sites, n_layers)),
        ),
    )


def predicted_memory(profile: Profile, lm: LanguageModel, lengths: Lengths) -> Prediction | None:
    """What each GPU holds at the worst moment of training (`lm`: on meta); None where nothing is
    trained.
    """
    found = phases(profile)
    if not found:
        return None
    worst, parallel = heaviest(found, lm.n_layers), profile.parallel
    step = predicted_step(lm, worst.settings, lengths, worst.attacked, parallel.processes)
    return on_each_gpu(step, lm, parallel.processes, parallel.mode)


def counted_flop(profile: Profile, lm: LanguageModel, lengths: Lengths) -> dict[str, float]:
    """method -> FLOPs of its training, one seed."""
    out: dict[str, float] = {}
    for p in phases(profile):
        step = predicted_step(
            lm, p.settings, lengths, p.attacked, profile.parallel.processes, peak=False
        )
        out[p.method] = out.get(p.method, 0.0) + p.steps * step.flop
    return out


def random_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    lora: LoraSettings,
    device: torch.device | str,
    forward: str = "stock",
) -> LanguageModel:
    """The model of a config with random weights under a new adapter, made where it stays."""
    with torch.random.fork_rng(), torch.device(device), quietly():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        return with_adapter(
            LanguageModel(model, None, ModelSettings(forward=forward), dtype), lora, 0
        )


def random_trainer(
    lm: LanguageModel, settings: TrainSettings, lengths: Lengths, attacked: bool = True
) -> Trainer:
    """A trainer at `settings` on rows of these lengths and random tokens."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, completions: int) -> list[TokenRow]:
        def tokens(count: int) -> tuple[int, ...]:
            return tuple(
                torch.randint(1, lm.model.config.vocab_size, (count,), generator=generator).tolist()
            )

        made = (tuple(tokens(lengths.completion) for _ in range(completions)) for _ in range(n))
        return [TokenRow(tokens(lengths.prompt), own) for own in made]

    own = settings.model_copy(
        update={"attack_after": 0 if attacked else settings.steps + 1, "eps_ramp": 0}
    )
    # of a relative eps: its size takes no time
    norms = dict.fromkeys((EMBEDDING, *range(lm.n_layers)), 1.0)
    return Trainer(lm, rows(settings.batch, 2), rows(settings.benign_batch, 1), own, 0, norms)


def timed_steps(trainer: Trainer, steps: int = 3) -> list[float]:
    """Seconds of each of `steps` steps after one that is not counted."""
    cuda, times = trainer.lm.device.type == "cuda", []
    for _ in range(steps + 1):
        began = time.perf_counter()
        trainer.train_step()
        if cuda:
            torch.cuda.synchronize(trainer.lm.device)
        times.append(time.perf_counter() - began)
    return times[1:]


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
    lm, out = random_model(config, dtype, profile.lora, device, profile.model.forward), {}
    for p in phases(profile):
        seconds = mean(timed_steps(random_trainer(lm, p.settings, lengths, p.attacked)))
        out[p.method] = out.get(p.method, 0.0) + p.steps * seconds / 3600
    return out


def spoken(hours: float) -> str:
    """A duration for a table."""
    if hours < 1 / 60:
        return f"{max(1, math.ceil(3600 * hours))} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h"
