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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import BASE
from latlib.io.machine import keep_freed_memory, resolve_dtype
from latlib.io.messages import in_a_line
from latlib.io.progress import ExitStatus, spoken
from latlib.models import LanguageModel
from latlib.objectives import OBJECTIVES
from latlib.planning import estimate
from latlib.planning.estimate import MEASURED_RATE, SHARE, RowLengths
from latlib.planning.published_configs import config_of
from latlib.planning.requirements import (
    MISSING,
    NOTE,
    OK,
    Line,
    Machine,
    bytes_to_download,
    data_lines,
    gigabytes,
    look,
    model_lines,
    room_lines,
    row_lengths,
    template_lines,
    tokenizer_of,
)
from latlib.planning.step_cost import adapter_of, bytes_of, fake_model
from latlib.planning.workers import threads_for, worker_count
from latlib.redteam.rounding import ARRIVES, name_of, share_added
from latlib.threat import resolve_sites

# a whole run against its trainings alone, on a CPU: 17.2 of 8.4 minutes in results/tiny; 8.8 of 7.4
# in notebook 00 on a slower processor; 130 of 20 in results/smollm2
WHOLE = {"tiny": 2.0, "glance": 1.2, "smollm2": 6.5}
LARGE = 1_000_000_000  # parameters above which we do not train on a CPU: our choice
Found = TypeVar("Found")


def check(
    profile: Profile, folder: Path, machine: Machine | None = None, hours: bool = True
) -> list[Line]:
    """Every line for a run of `profile` in `folder`. machine: instead of this one. hours: also how
    long it takes.
    """
    lines = []
    if profile.only_a_first_look:
        first = {
            "seeds": profile.seeds[:1],
            "methods": {name: profile.methods[name] for name in profile.contrasted},
            "sweep": profile.sweep.model_copy(update={"variants": {}}),
        }
        profile = profile.model_copy(update=first)
        text = f"a first look alone: {', '.join(profile.methods)} of seed {profile.seeds[0]}"
        lines.append(Line("scope", NOTE, text))
    try:
        for line in _lines(profile, machine or look(folder), hours):
            lines.append(line)
    except _StopError as stop:
        lines.append(stop.args[0])
    return lines


def lacking(profile: Profile, folder: Path, machine: Machine | None = None) -> str:
    """What is missing of all that a run needs, each with its fix; '' where nothing is."""
    missing = _missing(check(profile, folder, machine, hours=False))
    return "\n".join(f"missing: {line.subject}: {line.text}\n  {line.fix}" for line in missing)


def _missing(lines: list[Line]) -> list[Line]:
    return [line for line in lines if line.state == MISSING]


class _StopError(Exception):
    """Ends the check with a line, for nothing further can be said."""


def _found(
    subject: str, fix: str, call: Callable[[], Found], kind: type[Exception] = ProfileError
) -> Found:
    """What `call` gives; what is wrong with the profile ends the check."""
    try:
        return call()
    except kind as error:
        raise _StopError(Line(subject, MISSING, in_a_line(error), fix)) from None


@dataclass(frozen=True)
class _Job:
    """What the lines on disk, device, memory and time are about. tokenizer: None where it is not
    here. parameters: of the model without its adapter. device: cuda or cpu."""

    profile: Profile
    machine: Machine
    tokenizer: Any
    lm: LanguageModel
    lengths: RowLengths
    parameters: int
    device: str


def _lines(profile: Profile, machine: Machine, hours: bool) -> Iterator[Line]:
    yield from model_lines(profile, machine)
    tokenizer = tokenizer_of(profile)
    yield from template_lines(tokenizer)
    yield from data_lines(profile, machine)
    fix = "download the model again, or give another folder"
    config = _found("shape", fix, lambda: config_of(profile.model))
    if config is None:
        text = "unknown before its config.json is here: no prediction of memory, disk or time"
        yield Line("shape", NOTE, text, f"hf download {profile.model.source} config.json")
        return
    sites = list(_sites(profile, config.num_hidden_layers, config.hidden_size))
    yield from sites
    name = profile.model.dtype
    dtype = torch.bfloat16 if name == "auto" else getattr(torch, name)
    yield from _precision(profile, config.hidden_size, dtype)
    fix = "name modules of this model in lora.targets"
    lm = _found("LoRA targets", fix, lambda: fake_model(config, dtype, profile.lora), Exception)
    yield Line("LoRA targets", OK, ", ".join(profile.lora.targets))
    if _missing(sites):
        return
    fix = "correct the data, or the setting that is named"
    lengths = _found("rows", fix, lambda: row_lengths(profile, lm.context, tokenizer), ValueError)
    yield Line("rows", OK, lengths.source)
    try:
        yield from room_lines(profile, lm.context, tokenizer)
    except ValueError as error:
        yield Line("room", MISSING, in_a_line(error), fix)
    weights = lm.model.named_parameters()
    parameters = sum(weight.numel() for name, weight in weights if "lora_" not in name)
    device = profile.model.device.split(":")[0]
    if device == "auto":
        device = "cuda" if machine.gpus else "cpu"
    job = _Job(profile, machine, tokenizer, lm, lengths, parameters, device)
    yield from _disk(job)
    yield _device(job)
    memory = _memory(job)
    yield memory
    if hours and memory.state != NOTE:
        yield from _time(job, fits=memory.state == OK)


def _sites(profile: Profile, n_layers: int, d_model: int) -> Iterator[Line]:
    """Where each method is attacked, and whether its radius matters."""
    for method in profile.methods:
        subject, settings = f"sites of {method}", profile.training(method)
        attack = settings.attack
        try:
            OBJECTIVES[settings.objective](settings)
            sites = resolve_sites(attack.sites, n_layers)
            resolve_sites(settings.rerouting.sites, n_layers)
        except ValueError as error:
            fix = "correct attack.sites, rerouting.sites or the setting that is named"
            yield Line(subject, MISSING, str(error), fix)
            continue
        if not attack.steps:
            continue
        yield Line(subject, OK, f"{', '.join(map(str, sites))} of {n_layers} blocks")
        # a relative radius is not known before the stream is measured
        if attack.eps_mode == "absolute" or attack.rule != "adamw":
            if text := attack.never_binds(attack.eps, d_model):
                fix = "raise attack.lr or attack.steps where eps is to matter"
                yield Line(f"radius of {method}", NOTE, f"{text}: {fix}", fix)


def _precision(profile: Profile, d_model: int, dtype: torch.dtype) -> Iterator[Line]:
    """Whether the smallest relative radius is more than rounding, in a random stream; of absolute
    ones nothing is known before a stream is measured."""
    attacks = [profile.training(method).attack for method in profile.methods]
    relative = [attack.eps for attack in attacks if attack.steps and attack.eps_mode == "relative"]
    if profile.training(profile.main).attack.eps_mode == "relative":
        relative += [*profile.evaluation.eps, *profile.evaluation.embedding_eps]
    if not relative:
        return
    stream = torch.randn(64, d_model, generator=torch.Generator().manual_seed(0))
    stream = (stream / stream.norm(dim=-1, keepdim=True)).to(dtype)
    share = share_added(stream, min(relative))
    if share < ARRIVES:
        text = (
            f"eps = {min(relative):g} of the stream's norm: {name_of(dtype)} adds about {share:.0%}"
            " of so small a perturbation"
        )
        yield Line("precision", NOTE, text, "raise eps, or set model.dtype: float32")


def _disk(job: _Job) -> Iterator[Line]:
    profile, machine = job.profile, job.machine
    download = bytes_to_download(profile)
    trained = [method for method in profile.methods if method not in profile.released]
    kept = [profile.training(method).checkpoints_kept for method in trained]
    # a checkpoint is an adapter and two moments; there is one more while it is written
    copies = len(trained) * len(profile.seeds) + 3 * (max(kept, default=-1) + 1)
    adapters = copies * bytes_of(adapter_of(job.lm))
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
            f"{gigabytes(need)} needed (download {gigabytes(download)}, checkpoints and adapters"
            f" {gigabytes(adapters)}, one merged export {gigabytes(merged)}), {gigabytes(free)}"
            " free"
        )
        fix = "free some, give --out on another disk, or set HF_HOME to another disk"
        yield _room(subject, text, fix, free >= need)


def _room(subject: str, text: str, fix: str, enough: bool) -> Line:
    return Line(subject, OK, text) if enough else Line(subject, MISSING, text, fix)


def _device(job: _Job) -> Line:
    machine, billions = job.machine, job.parameters / 1e9
    processes, n_gpus = job.profile.parallel.processes, len(machine.gpus)
    if job.device == "cuda":
        if n_gpus < processes:
            text = f"{n_gpus} GPU(s) here, parallel.processes = {processes}"
            fix = "lower parallel.processes, or set model.device: auto"
            return Line("device", MISSING, text, fix)
        if job.profile.model.dtype == "bfloat16" and not machine.bf16:
            text = f"{machine.gpu} has no bfloat16"
            return Line("device", MISSING, text, "set model.dtype: float32")
        bf16 = "yes" if machine.bf16 else "no"
        return Line("device", OK, f"{n_gpus} x {machine.gpu}, bfloat16 {bf16}")
    if job.profile.model.source == "world":
        return Line("device", OK, "CPU: made for it")
    if job.parameters > LARGE:
        text = f"no GPU here, and {billions:.1f} billion parameters are too many for a CPU"
        return Line("device", MISSING, text, "run it where torch sees a GPU")
    text = f"CPU: no GPU here; {billions:.1f} billion parameters train, slowly"
    return Line("device", NOTE, text)


def _memory(job: _Job) -> Line:
    processes = job.profile.parallel.processes
    try:
        found = estimate.training_memory(job.profile, job.lm, job.lengths.longest)
    except Exception as error:  # of a family's own code, or of kernels that need data
        kind = job.lm.model.config.model_type
        text = f"no prediction of memory or time for {kind!r} models ({in_a_line(error)})"
        return Line("memory", NOTE, text)
    if found is None:
        need = 2 * job.parameters
        text = f"weights {gigabytes(need)} (nothing is trained)"
    else:
        need = found.total
        each = f"each of {processes} " if processes > 1 else ""
        trained = found.adapter + found.optimiser
        text = (
            f"{each}{gigabytes(need)} predicted: weights {gigabytes(found.weights)}, adapter and"
            f" moments {gigabytes(trained)}, activations, perturbations and gradients"
            f" {gigabytes(found.peak)}"
        )
    asked = estimate.SPARE * need
    free, where = job.machine.ram, "RAM"
    if job.device == "cuda":
        asked += estimate.CONTEXT
        free, where = min(job.machine.gpus[:processes], default=0), "GPU"
    text += f"; {gigabytes(asked)} asked for, with room for fragments;"
    text += f" {gigabytes(free)} of {where} free"
    fix = "lower train.micro_batch or data.max_tokens, or use parallel.mode: fsdp2 on several GPUs"
    return _room("memory", text, fix, free >= asked)


def _time(job: _Job, fits: bool) -> Iterator[Line]:
    """Hours and cost. fits: whether a step has room, so that it can be timed."""
    profile, processes = job.profile, job.profile.parallel.processes
    if not estimate.phases(profile):
        yield Line("time", OK, "nothing is trained")
        return
    of_world, workers = profile.model.source == "world", 1
    # the organism's steps are timed in seconds on whatever it runs on
    if fits and (of_world or job.device == "cuda"):
        one_seed = _timed(job)
        on = job.machine.gpu or "CPU"
        how = f"steps of each model timed on this {on} with random weights"
    else:
        one_seed = estimate.counted_hours(profile, job.lm, job.lengths.mean)
        flop = sum(one_seed.values()) * 3600 * SHARE * MEASURED_RATE
        how = (
            f"estimate, not measured here: {flop:.3g} FLOP counted / ({SHARE:.2f} x"
            f" {MEASURED_RATE / 1e12:.0f} TFLOP/s of an H100)"
        )
    seeds = {model: estimate.seeds_of(profile, model) for model in one_seed}
    if of_world and job.device == "cpu":
        workers = worker_count(profile, sum(seeds.values()))
    total = estimate.elapsed_hours(one_seed, seeds, workers) / processes
    hours = {name: seeds[name] / processes * one for name, one in one_seed.items()}
    known = (BASE, *profile.methods)
    variants = [hours.pop(name) for name in one_seed if name not in known]
    if variants:
        hours[f"{len(variants)} variants of {profile.roles.main}"] = sum(variants)
    each = ", ".join(f"{name} {spoken(own)}" for name, own in hours.items())
    scope = f"training of {len(profile.seeds)} seed(s), without evaluations"
    if workers > 1:
        scope += f", {workers} models side by side"
    if processes > 1:
        scope += f", split over {processes} processes without loss"
    yield Line("time", NOTE, f"{spoken(total)} ({each}); {scope}; {how}")
    if job.device == "cpu":
        yield from _time_here(profile, total)
    if not of_world:
        price, gpu_hours = profile.budget.usd_per_hour, total * processes
        text = (
            f"about {gpu_hours * price:.2f} USD: {gpu_hours:.1f} GPU-hours at budget.usd_per_hour ="
            f" {price:g}"
        )
        yield Line("cost", NOTE, text)


def _time_here(profile: Profile, hours: float) -> Iterator[Line]:
    """On a CPU, whose own hours those of the world's models are; a real model's are an H100's."""
    if profile.model.source != "world":
        dtype = resolve_dtype(profile.model.dtype, torch.device("cpu"))
        rate = estimate.cpu_rate(dtype)
        hours *= SHARE * MEASURED_RATE / (estimate.CPU_SHARE * rate)
        text = (
            f"{spoken(hours)} on this CPU, at {estimate.CPU_SHARE:.2f} of {rate / 1e9:.0f} GFLOP/s"
            f" in {name_of(dtype)} as measured here just now"
        )
        yield Line("time here", NOTE, text)
    if times := WHOLE.get(profile.name):
        text = (
            f"about {spoken(hours * times)} with evaluations: a whole run took {times:g} times as"
            " long as its trainings where that was measured"
        )
        yield Line("time of all", NOTE, text)


def _timed(job: _Job) -> dict[str, float]:
    """model -> hours of its training, one seed, by steps that are timed as a worker takes them."""
    profile, device = job.profile, job.device
    threads = torch.get_num_threads()
    torch.set_num_threads(threads_for(profile))
    keep_freed_memory()
    try:
        hours = estimate.timed_hours(profile, job.lm, job.lengths.mean, device)
        if profile.model.source == "world":
            base = estimate.timed_base_hours(profile, job.tokenizer, device)
            hours = {BASE: base, **hours}
    finally:
        torch.set_num_threads(threads)
    return hours


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
    out += [f"  {line.subject}: {line.fix}" for line in missing]
    return "\n".join(out)


def main(
    profile: Profile, folder: Path, as_json: bool = False, machine: Machine | None = None
) -> ExitStatus:
    """Print the check of `profile`; the exit status."""
    lines = check(profile, folder, machine)
    status = ExitStatus.INCOMPLETE if _missing(lines) else ExitStatus.DONE
    if as_json:
        records = [asdict(line) for line in lines]
        found = {"profile": profile.name, "status": status, "lines": records}
        print(json.dumps(found, indent=1))
    else:
        print(f"profile {profile.name}: {profile.description}\n\n{table(lines)}")
    return status
