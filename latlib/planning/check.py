"""What a run needs and whether it is there: `./run_all.sh --profile NAME --check`. Asks this
machine only: no download, no network, no GPU-hours, nothing imported from Jupyter.

1. `check` goes through the profile: model and licence, data (`latlib.planning.requirements`), sites
   and LoRA targets, rows, disk, device, memory, hours and cost (`latlib.planning.estimate`). Each
   line is ok, a note, or missing.
2. What is missing stands again at the end with its fix.
3. `main` prints the table or JSON; the exit status is 0, or 3 where something is missing.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.models import LanguageModel
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
    bytes_to_download,
    data_lines,
    look,
    model_lines,
    row_lengths,
)
from latlib.planning.step_cost import adapter_of, bytes_of, fake_model
from latlib.threat import resolve_sites

COMPLETE, INCOMPLETE = 0, 3  # exit status
LARGE = 1_000_000_000  # parameters above which we do not train on a CPU: our choice


class _StopError(Exception):
    """Ends the check with a line, for nothing further can be said."""

    def __init__(self, *line: str) -> None:
        super().__init__()
        self.line = Line(*line)


def check(
    profile: Profile, folder: Path, machine: Machine | None = None, hours: bool = True
) -> list[Line]:
    """Every line for a run of `profile` in `folder`. machine: instead of this one. hours: also how
    long it takes.
    """
    lines = []
    try:
        for line in _lines(profile, machine or look(folder), hours):
            lines.append(line)
    except _StopError as stop:
        lines.append(stop.line)
    return lines


def lacking(profile: Profile, folder: Path, machine: Machine | None = None) -> str:
    """What is missing of all that a run needs, each with its fix; '' where nothing is."""
    missing = _missing(check(profile, folder, machine, hours=False))
    return "\n".join(f"missing: {line.subject}: {line.text}\n  {line.fix}" for line in missing)


def _missing(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.state == MISSING]


@dataclass(frozen=True)
class _Job:
    """What the lines on disk, device, memory and time are about."""

    profile: Profile
    machine: Machine
    config: PretrainedConfig
    lm: LanguageModel
    lengths: RowLengths

    @property
    def of_world(self) -> bool:
        return self.profile.model.source == "world"

    @property
    def processes(self) -> int:
        return self.profile.parallel.processes

    @property
    def device(self) -> str:
        """cuda or cpu."""
        asked = self.profile.model.device
        if asked == "auto":
            return "cuda" if self.machine.gpus else "cpu"
        return asked.split(":")[0]

    @property
    def parameters(self) -> int:
        """Of the model without its adapter."""
        parameters = self.lm.model.named_parameters()
        return sum(p.numel() for name, p in parameters if "lora_" not in name)


def _lines(profile: Profile, machine: Machine, hours: bool) -> Iterator[Line]:
    yield from model_lines(profile, machine)
    yield from data_lines(profile, machine)
    config = _config(profile)
    sites = list(_sites(profile, config.num_hidden_layers))
    yield from sites
    lm = _language_model(profile, config)
    yield Line("LoRA targets", OK, ", ".join(profile.lora.targets))
    if _missing(sites):
        return
    lengths = _lengths(profile)
    yield Line("rows", OK, lengths.source)
    job = _Job(profile, machine, config, lm, lengths)
    yield from _disk(job)
    yield _device(job)
    memory = _memory(job)
    yield memory
    if hours:
        yield from _time(job, fits=memory.state == OK)


def _config(profile: Profile) -> PretrainedConfig:
    try:
        config = config_of(profile.model)
    except ProfileError as error:
        fix = "download the model again, or give another folder"
        raise _StopError("shape", MISSING, str(error), fix) from None
    if config is None:
        text = "unknown before its config.json is here: no prediction of memory, disk or time"
        raise _StopError("shape", NOTE, text, f"hf download {profile.model.source} config.json")
    return config


def _sites(profile: Profile, n_layers: int) -> Iterator[Line]:
    for method in profile.methods:
        subject, attack = f"sites of {method}", profile.training(method).attack
        try:
            sites = resolve_sites(attack.sites, n_layers)
        except ValueError as error:
            yield Line(subject, MISSING, str(error), "correct attack.sites")
            continue
        if attack.steps:
            yield Line(subject, OK, f"{', '.join(map(str, sites))} of {n_layers} blocks")


def _language_model(profile: Profile, config: PretrainedConfig) -> LanguageModel:
    """The profile's model without its data."""
    name = profile.model.dtype
    dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    try:
        return fake_model(config, dtype, profile.lora)
    except ProfileError as error:
        fix = "name modules of this model in lora.targets"
        raise _StopError("LoRA targets", MISSING, str(error), fix) from None


def _lengths(profile: Profile) -> RowLengths:
    try:
        return row_lengths(profile)
    except (ProfileError, ValueError) as error:
        first = str(error).splitlines()[0]
        fix = "correct the data, or the setting that is named"
        raise _StopError("rows", MISSING, first, fix) from None


def _disk(job: _Job) -> Iterator[Line]:
    profile, machine = job.profile, job.machine
    download = bytes_to_download(profile)
    trained = [method for method in profile.methods if method not in profile.released]
    adapter = bytes_of(adapter_of(job.lm))
    adapters = len(trained) * len(profile.seeds) * adapter
    if trained:
        kept = max(profile.training(method).checkpoints_kept for method in trained)
        # adapter and two moments; one more while it is written
        adapters += (kept + 1) * 3 * adapter
    merged = 2 * job.parameters
    own = adapters + merged
    needs = {"disk": (own + download, machine.disk)}
    if not machine.one_disk:
        needs = {
            "disk of the run": (own, machine.disk),
            "disk of the hub cache": (download, machine.cache_disk),
        }
    for subject, (need, free) in needs.items():
        text = (
            f"{need / GB:.1f} GB needed (download {download / GB:.1f} GB, checkpoints and adapters"
            f" {adapters / GB:.1f} GB, one merged export {merged / GB:.1f}), {free / GB:.1f} GB"
            " free"
        )
        fix = "free some, give --out on another disk, or set HF_HOME to another disk"
        yield _room(subject, text, fix, free >= need)


def _room(subject: str, text: str, fix: str, enough: bool) -> Line:
    return Line(subject, OK, text) if enough else Line(subject, MISSING, text, fix)


def _device(job: _Job) -> Line:
    machine, billions = job.machine, job.parameters / 1e9
    if job.device == "cuda":
        n_gpus = len(machine.gpus)
        if n_gpus < max(1, job.processes):
            text = f"{n_gpus} GPU(s) here, parallel.processes = {job.processes}"
            fix = "lower parallel.processes, or set model.device: auto"
            return Line("device", MISSING, text, fix)
        if job.profile.model.dtype == "bfloat16" and not machine.bf16:
            text = f"{machine.gpu} has no bfloat16"
            return Line("device", MISSING, text, "set model.dtype: float32")
        bf16 = "yes" if machine.bf16 else "no"
        return Line("device", OK, f"{n_gpus} x {machine.gpu}, bfloat16 {bf16}")
    if job.of_world:
        return Line("device", OK, "CPU: made for it")
    if job.parameters > LARGE:
        text = f"no GPU here, and {billions:.1f} billion parameters are too many for a CPU"
        return Line("device", MISSING, text, "run it where torch sees a GPU")
    text = f"CPU: no GPU here; {billions:.1f} billion parameters train, slowly"
    return Line("device", NOTE, text)


def _memory(job: _Job) -> Line:
    found = estimate.training_memory(job.profile, job.lm, job.lengths.longest)
    if found is None:
        need = 2 * job.parameters
        text = f"weights {need / GB:.1f} GB (nothing is trained)"
    else:
        need = found.total
        each = f"each of {job.processes} " if job.processes > 1 else ""
        trained = found.adapter + found.optimiser
        text = (
            f"{each}{need / GB:.1f} GB predicted: weights {found.weights / GB:.1f}, adapter and"
            f" moments {trained / GB:.1f}, activations, perturbations and gradients"
            f" {found.peak / GB:.1f}"
        )
    asked = estimate.SPARE * need
    free, where = job.machine.ram, "RAM"
    if job.device == "cuda":
        asked += estimate.CONTEXT
        free, where = min(job.machine.gpus[: job.processes], default=0), "GPU"
    text += (
        f"; {asked / GB:.1f} GB asked for, with room for fragments; {free / GB:.1f} GB of {where}"
        " free"
    )
    fix = "lower train.micro_batch or data.max_tokens, or use parallel.mode: fsdp2 on several GPUs"
    return _room("memory", text, fix, free >= asked)


def _time(job: _Job, fits: bool) -> Iterator[Line]:
    """Hours and cost. fits: whether a step has room, so that it can be timed."""
    profile, processes = job.profile, job.processes
    if not estimate.phases(profile):
        yield Line("time", OK, "nothing is trained")
        return
    # the organism's steps are timed in seconds on whatever it runs on
    timed = fits and (job.of_world or job.device == "cuda")
    one_seed, how = _timed(job) if timed else _counted(job)
    share = len(profile.seeds) / processes
    hours = {method: share * one for method, one in one_seed.items()}
    total = sum(hours.values())
    each = ", ".join(f"{method} {spoken(own)}" for method, own in hours.items())
    scope = f"training of {len(profile.seeds)} seed(s), without sweeps and evaluations"
    if processes > 1:
        scope += f", split over {processes} processes without loss"
    yield Line("time", NOTE, f"{spoken(total)} ({each}); {scope}; {how}")
    if not job.of_world:
        price, gpu_hours = profile.budget.usd_per_hour, total * processes
        dollars = f"about {gpu_hours * price:.2f} USD"
        at = f"{gpu_hours:.1f} GPU-hours at budget.usd_per_hour = {price:g}"
        yield Line("cost", NOTE, f"{dollars}: {at}")


def _timed(job: _Job) -> tuple[dict[str, float], str]:
    """(method -> hours of its training for one seed in one process, how they are known)"""
    dtype = torch.float32 if job.device == "cpu" else job.lm.dtype
    hours = estimate.timed_hours(job.profile, job.config, dtype, job.lengths.mean, job.device)
    on = job.machine.gpu or "CPU"
    return hours, f"steps of each method timed on this {on} with random weights"


def _counted(job: _Job) -> tuple[dict[str, float], str]:
    """See `_timed`."""
    flop = estimate.counted_flop(job.profile, job.lm, job.lengths.mean)
    rate = MEASURED_RATE * SHARE
    how = (
        f"estimate, not measured here: {sum(flop.values()):.3g} FLOP counted / ({SHARE:.2f} x"
        f" {MEASURED_RATE / 1e12:.0f} TFLOP/s of an H100)"
    )
    return {method: own / rate / 3600 for method, own in flop.items()}, how


def table(lines: list[Line], width: int = 120) -> str:
    """The lines, wrapped, and at the end what is missing with its fix."""
    first = max(len(line.subject) for line in lines)
    out = []
    for line in lines:
        head = f"{line.subject:<{first}}  {line.state:<7}  "
        wrapped = textwrap.fill(
            line.text,
            width,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
            break_long_words=False,
        )
        out.append(wrapped)
    missing = _missing(lines)
    out.append("")
    out.append(f"missing: {len(missing)}" if missing else "everything that a run needs is there")
    for line in missing:
        out.append(f"  {line.subject}: {line.fix}")
    return "\n".join(out)


def main(
    profile: Profile, folder: Path, as_json: bool = False, machine: Machine | None = None
) -> int:
    """Print the check of `profile`; the exit status."""
    lines = check(profile, folder, machine)
    status = INCOMPLETE if _missing(lines) else COMPLETE
    if as_json:
        records = [asdict(line) for line in lines]
        found = {"profile": profile.name, "status": status, "lines": records}
        print(json.dumps(found, indent=1))
    else:
        print(f"profile {profile.name}: {profile.description}\n\n{table(lines)}")
    return status
