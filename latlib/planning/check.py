"""What a run needs and whether it is there: `./run_all.sh --profile NAME --check`. Asks this
machine only: no download, no network, no GPU-hours, nothing imported from Jupyter.

1. `check` goes through the profile: model and licence, data and packages
   (`latlib.planning.requirements`), sites and LoRA targets, rows, disk, device, memory, hours and
   cost (`latlib.planning.estimate`). Each line is ok, a note, or missing.
2. What is missing stands again at the end with its mend.
3. `main` prints the table or JSON; the exit status is 0, or 3 where something is missing.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.hooks import resolve_sites
from latlib.models import LanguageModel, resolve_dtype
from latlib.planning import estimate
from latlib.planning.estimate import MEASURED_RATE, SHARE, RowLengths, spoken
from latlib.planning.published_configs import config_of
from latlib.planning.requirements import (
    GB,
    MISSING,
    NOTE,
    OK,
    Line,
    Machine,
    data_lines,
    look,
    model_lines,
    row_lengths,
)
from latlib.planning.step_cost import Prediction, meta_model

COMPLETE, INCOMPLETE = 0, 3  # exit status
LARGE = 1_000_000_000  # parameters above which we do not train on a CPU: our choice


def check(
    profile: Profile, folder: Path, machine: Machine | None = None, hours: bool = True
) -> list[Line]:
    """Every line for a run of `profile` in `folder`. machine: instead of this one. hours: also how
    long it takes.
    """
    return list(_lines(profile, machine or look(folder), hours))


def lacking(profile: Profile, folder: Path, machine: Machine | None = None) -> str:
    """What is missing of all that a run needs, each with its mend; '' where nothing is."""
    missing = [
        line for line in check(profile, folder, machine, hours=False) if line.state == MISSING
    ]
    return "\n".join(f"missing: {line.subject}: {line.text}\n  {line.mend}" for line in missing)


def _lines(profile: Profile, machine: Machine, hours: bool) -> Iterator[Line]:
    download = yield from model_lines(profile, machine)
    yield from data_lines(profile, machine)
    try:
        config = config_of(profile.model)
    except ProfileError as error:
        yield Line("shape", MISSING, str(error), "download the model again, or give another folder")
        return
    if config is None:
        mend = f"hf download {profile.model.source} config.json"
        yield Line(
            "shape",
            NOTE,
            "unknown before its config.json is here: no prediction of memory, disk or time",
            mend,
        )
        return
    device = _device(profile, machine)
    sites = list(_sites(profile, config.num_hidden_layers))
    yield from sites
    dtype = resolve_dtype(
        "bfloat16" if profile.model.dtype == "auto" else profile.model.dtype, torch.device("cpu")
    )
    try:
        lm = meta_model(config, dtype, profile.lora)
    except ProfileError as error:
        yield Line(
            "LoRA targets", MISSING, str(error), "name modules of this model in lora.targets"
        )
        return
    yield Line("LoRA targets", OK, ", ".join(profile.lora.targets))
    if any(line.state == MISSING for line in sites):
        return
    try:
        lengths = row_lengths(profile)
    except (ProfileError, ValueError) as error:
        yield Line(
            "rows",
            MISSING,
            str(error).splitlines()[0],
            "mend the data, or the setting that is named",
        )
        return
    yield Line("rows", OK, lengths.source)
    found = estimate.predicted_memory(profile, lm, lengths.longest)
    parameters = sum(p.numel() for n, p in lm.model.named_parameters() if "lora_" not in n)
    yield from _disk(profile, machine, download, lm, parameters)
    yield _device_line(profile, machine, device, parameters)
    fits = yield from _memory(profile, machine, device, found, 2 * parameters)
    if not hours:
        return
    small = profile.model.source == "world"  # and timed in seconds on whatever it runs on
    timed = device if fits and (small or device == "cuda") else None
    yield from _time(
        profile, machine, config, lm, lengths, torch.float32 if device == "cpu" else dtype, timed
    )


def _device(profile: Profile, machine: Machine) -> str:
    asked = profile.model.device
    return asked.split(":")[0] if asked != "auto" else "cuda" if machine.gpus else "cpu"


def _sites(profile: Profile, n_layers: int) -> Iterator[Line]:
    for method in profile.methods:
        try:
            sites = resolve_sites(profile.training(method).attack.sites, n_layers)
        except ValueError as error:
            yield Line(f"sites of {method}", MISSING, str(error), "mend attack.sites")
            continue
        if profile.training(method).attack.steps:
            yield Line(
                f"sites of {method}", OK, f"{', '.join(map(str, sites))} of {n_layers} blocks"
            )


def _disk(
    profile: Profile, machine: Machine, download: int, lm: LanguageModel, parameters: int
) -> Iterator[Line]:
    adapter = sum(
        p.numel() * p.element_size() for n, p in lm.model.named_parameters() if "lora_" in n
    )
    trained = [m for m in profile.methods if m not in profile.released]
    keep = max((profile.training(m).checkpoints_kept for m in trained), default=0)
    # adapter and two moments; one more while it is written
    checkpoints = (keep + 1) * 3 * adapter if trained else 0
    own = checkpoints + len(trained) * len(profile.seeds) * adapter + 2 * parameters
    parts = (
        f"checkpoints and adapters {(own - 2 * parameters) / GB:.1f} GB, one merged export"
        f" {2 * parameters / GB:.1f}"
    )
    for subject, need, free in (
        (("disk", own + download, machine.disk),)
        if machine.one_disk
        else (
            ("disk of the run", own, machine.disk),
            ("disk of the hub cache", download, machine.cache_disk),
        )
    ):
        text = (
            f"{need / GB:.1f} GB needed (download {download / GB:.1f} GB, {parts}), {free / GB:.1f}"
            " GB free"
        )
        mend = (
            ""
            if free >= need
            else "free some, give --out on another disk, or set HF_HOME to another disk"
        )
        yield Line(subject, OK if free >= need else MISSING, text, mend)


def _device_line(profile: Profile, machine: Machine, device: str, parameters: int) -> Line:
    processes = profile.parallel.processes
    if device == "cuda" and len(machine.gpus) < max(1, processes):
        text = f"{len(machine.gpus)} GPU(s) here, parallel.processes = {processes}"
        return Line("device", MISSING, text, "lower parallel.processes, or set model.device: auto")
    if device == "cuda":
        if profile.model.dtype == "bfloat16" and not machine.bf16:
            return Line(
                "device", MISSING, f"{machine.gpu} has no bfloat16", "set model.dtype: float32"
            )
        return Line(
            "device",
            OK,
            f"{len(machine.gpus)} x {machine.gpu}, bfloat16 {'yes' if machine.bf16 else 'no'}",
        )
    if parameters > LARGE and profile.model.source != "world":
        text = f"no GPU here, and {parameters / 1e9:.1f} billion parameters are too many for a CPU"
        return Line("device", MISSING, text, "run it where torch sees a GPU")
    if profile.model.source == "world":
        return Line("device", OK, "CPU: made for it")
    return Line(
        "device", NOTE, f"CPU: no GPU here; {parameters / 1e9:.1f} billion parameters train, slowly"
    )


def _memory(
    profile: Profile, machine: Machine, device: str, found: Prediction | None, weights: int
) -> Iterator[Line]:
    """The memory line; returns whether it fits."""
    need = weights if found is None else found.total
    each = f"each of {profile.parallel.processes} " if profile.parallel.processes > 1 else ""
    asked = estimate.SPARE * need + (estimate.CONTEXT if device == "cuda" else 0)
    free = (
        min(machine.gpus[: profile.parallel.processes], default=0)
        if device == "cuda"
        else machine.ram
    )
    where = "GPU" if device == "cuda" else "RAM"
    if found is None:
        text = f"weights {need / GB:.1f} GB (nothing is trained)"
    else:
        text = (
            f"{each}{need / GB:.1f} GB predicted: weights {found.weights / GB:.1f}, adapter and"
            f" moments {(found.adapter + found.optimiser) / GB:.1f}, activations, perturbations and"
            f" gradients {found.peak / GB:.1f}"
        )
    fits = free >= asked
    text += (
        f"; {asked / GB:.1f} GB asked for, with room for fragments; {free / GB:.1f} GB of {where}"
        " free"
    )
    mend = (
        ""
        if fits
        else (
            "lower train.micro_batch or data.max_tokens, or use parallel.mode: fsdp2 on several"
            " GPUs"
        )
    )
    yield Line("memory", OK if fits else MISSING, text, mend)
    return fits


def _time(
    profile, machine, config, lm, lengths: RowLengths, dtype, timed: str | None
) -> Iterator[Line]:
    """Hours and cost. timed: the device on which steps are timed; None counts FLOPs instead."""
    processes, seeds = profile.parallel.processes, len(profile.seeds)
    if not estimate.phases(profile):
        yield Line("time", OK, "nothing is trained")
        return
    if timed:
        hours = estimate.timed_hours(profile, config, dtype, lengths.mean, timed)
        how = f"steps of each method timed on this {machine.gpu or 'CPU'} with random weights"
    else:
        rate = MEASURED_RATE * SHARE
        flop = estimate.counted_flop(profile, lm, lengths.mean)
        hours = {method: f / rate / 3600 for method, f in flop.items()}
        how = (
            f"estimate, not measured here: {sum(flop.values()):.3g} FLOP counted / ({SHARE:.2f} x "
            f"{MEASURED_RATE / 1e12:.0f} TFLOP/s of an H100)"
        )
    hours = {method: h * seeds / processes for method, h in hours.items()}
    total = sum(hours.values())
    each = ", ".join(f"{method} {spoken(h)}" for method, h in hours.items())
    shared = f", split over {processes} processes without loss" if processes > 1 else ""
    scope = f"training of {seeds} seed(s), without sweeps and evaluations{shared}"
    yield Line("time", NOTE, f"{spoken(total)} ({each}); {scope}; {how}")
    if profile.model.source != "world":
        price = profile.budget.usd_per_hour
        cost = total * processes * price
        yield Line(
            "cost",
            NOTE,
            f"about {cost:.2f} USD: {total * processes:.1f} GPU-hours at budget.usd_per_hour ="
            f" {price:g}",
        )


def table(lines: list[Line], width: int = 120) -> str:
    """The lines, wrapped, and at the end what is missing with its mend."""
    first = max(len(line.subject) for line in lines)
    out = []
    for line in lines:
        head = f"{line.subject:<{first}}  {line.state:<7}  "
        text = textwrap.wrap(
            line.text, width - len(head), break_on_hyphens=False, break_long_words=False
        )
        out += [head + text[0], *(" " * len(head) + more for more in text[1:])]
    missing = [line for line in lines if line.state == MISSING]
    out += ["", f"missing: {len(missing)}" if missing else "everything that a run needs is there"]
    out += [f"  {line.subject}: {line.mend}" for line in missing]
    return "\n".join(out)


def main(
    profile: Profile, folder: Path, as_json: bool = False, machine: Machine | None = None
) -> int:
    """Print the check of `profile`; the exit status."""
    lines = check(profile, folder, machine)
    status = INCOMPLETE if any(line.state == MISSING for line in lines) else COMPLETE
    if as_json:
        print(
            json.dumps(
                {
                    "profile": profile.name,
                    "status": status,
                    "lines": [asdict(line) for line in lines],
                },
                indent=1,
            )
        )
    else:
        print(f"profile {profile.name}: {profile.description}\n\n{table(lines)}")
    return status
