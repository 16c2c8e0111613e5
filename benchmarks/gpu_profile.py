"""What `--check` predicts beside what a GPU shows: random weights of the real shape, no download.

    python benchmarks/gpu_profile.py --profile llama3-8b-seed --steps 20
    python benchmarks/gpu_profile.py --config config.json --device cpu --steps 4    any model

1. Memory and FLOPs of a step of the profile's method are predicted without data.
2. A child process makes the model on the device, takes the steps on random tokens of the stated
   lengths, and writes seconds and peak bytes after each. In the middle it saves a checkpoint and is
   killed (SIGKILL).
3. A second child loads the checkpoint, goes on, and takes the rest.
4. Predicted and measured bytes, seconds a step, the hours they mean for the whole run, GPU,
   versions and commit go to benchmarks/results/gpu_profile-<profile>-<device>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from measure import environment, seconds_of, write
from transformers import AutoConfig, PretrainedConfig

from latlib.config.profile import Profile, load_profile
from latlib.config.sections import ProfileError, TrainSettings
from latlib.experiment.checkpoint import load_checkpoint, save_checkpoint
from latlib.io.machine import resolve_device
from latlib.io.progress import spoken
from latlib.planning import estimate
from latlib.planning.published_configs import config_of
from latlib.planning.step_cost import (
    Lengths,
    fake_model,
    predicted_flop,
    predicted_memory,
    random_model,
    random_trainer,
)

RESULTS = Path(__file__).resolve().parent / "results"


def model_config(profile: Profile, file: Path | None) -> PretrainedConfig:
    """The config file's model, else the profile's. Raises ProfileError where neither says what the
    model is.
    """
    config = config_of(profile.model) if file is None else AutoConfig.from_pretrained(file)
    if config is None:
        raise ProfileError(
            f"model.source = {profile.model.source!r}: its shape is not known here: give --config"
            " FILE"
        )
    return config


@dataclass(frozen=True)
class Job:
    """What is predicted and measured: the step with the attack of a method of a profile."""

    profile: Profile
    method: str
    config: PretrainedConfig
    device: torch.device
    lengths: Lengths

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Job:
        """What the command line asks for."""
        profile = load_profile(arguments.profile)
        return cls(
            profile=profile,
            method=arguments.method or profile.main,
            config=model_config(profile, arguments.config),
            device=resolve_device(arguments.device),
            lengths=Lengths(arguments.prompt, arguments.completion),
        )

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def settings(self) -> TrainSettings:
        """Such that the first step attacks."""
        settings = self.profile.training(self.method)
        return settings.model_copy(update={"attack_after": 0, "eps_ramp": 0})


def work(arguments: argparse.Namespace) -> None:
    """A child: take steps from the checkpoint on, a line of JSON for each; the first child dies in
    the middle.
    """
    job = Job.of(arguments)
    lm = random_model(job.config, job.dtype, job.profile.lora, job.device)
    trainer = random_trainer(lm, job.settings, job.lengths)
    resumed = load_checkpoint(trainer, arguments.checkpoint)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    while trainer.step < arguments.steps:
        metrics: dict = {}
        seconds = seconds_of(
            lambda metrics=metrics: metrics.update(trainer.train_step()), job.device
        )
        record = {"step": trainer.step, "resumed": resumed, "seconds": seconds}
        record["total"] = metrics["total"]
        if job.device.type == "cuda":
            record["peak"] = torch.cuda.max_memory_allocated(job.device)
            record["reserved"] = torch.cuda.max_memory_reserved(job.device)
        print(json.dumps(record), flush=True)
        if not resumed and trainer.step == arguments.steps // 2:
            save_checkpoint(trainer, arguments.checkpoint)
            os.kill(os.getpid(), signal.SIGKILL)


def measured(arguments: argparse.Namespace) -> list[dict]:
    """Every step of both children. Raises RuntimeError with a child's last words if one does not
    end as it should.
    """
    command = [sys.executable, __file__]
    for name in ("profile", "method", "config", "device", "steps", "prompt", "completion"):
        value = getattr(arguments, name)
        if value is not None:
            command.append(f"--{name}={value}")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        command.append(f"--checkpoint={Path(folder) / 'checkpoints'}")
        for expected in (-signal.SIGKILL, 0):
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode != expected:
                raise RuntimeError(
                    f"the child ended with {child.returncode}:\n{child.stderr[-3000:]}"
                )
            lines = child.stdout.splitlines()
            records += [json.loads(line) for line in lines if line.startswith("{")]
    return records


def profiled(arguments: argparse.Namespace) -> dict:
    """Predict, measure, compare."""
    job = Job.of(arguments)
    lm = fake_model(job.config, job.dtype, job.profile.lora)
    memory = predicted_memory(lm, job.settings, job.lengths)
    flop = predicted_flop(lm, job.settings, job.lengths)
    steps = measured(arguments)
    # a process's first step warms up
    first = (1, arguments.steps // 2 + 1)
    seconds = median(step["seconds"] for step in steps if step["step"] not in first)
    peak = max((step["peak"] for step in steps if "peak" in step), default=None)
    reserved = max((step["reserved"] for step in steps if "reserved" in step), default=None)
    return {
        "profile": job.profile.name,
        "method": job.method,
        "config": None if arguments.config is None else str(arguments.config),
        "lengths": asdict(job.lengths),
        "dtype": str(job.dtype).removeprefix("torch."),
        "environment": environment(job.device),
        "predicted": {
            **asdict(memory),
            "total": memory.total,
            "flop": flop,
            "seconds_at_stated_rate": flop / (estimate.MEASURED_RATE * estimate.SHARE),
        },
        "measured": {
            "peak_bytes": peak,
            "reserved_bytes": reserved,
            "seconds_per_step": seconds,
            "flop_per_second": flop / seconds,
        },
        "predicted_over_measured_bytes": None if peak is None else memory.total / peak,
        "hours_of_the_run": seconds * job.settings.steps / 3600,
        "resumed_at": steps[-1]["resumed"],
        "steps": steps,
    }


def main(argv: Sequence[str] | None = None) -> dict | None:
    """The command line; returns what is written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile",
        default="llama3-8b-seed",
        help="whose settings, and whose model without --config",
    )
    parser.add_argument("--config", type=Path, help="a Hugging Face config file: another model")
    parser.add_argument("--method", help="default: the profile's main one")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--steps", type=int, default=20, help="at least 4; half of them before the kill"
    )
    parser.add_argument("--prompt", type=int, default=150, help="tokens of every prompt")
    parser.add_argument("--completion", type=int, default=150, help="tokens of every completion")
    parser.add_argument("--json", type=Path, help="where the result goes instead")
    # given to the children only
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.steps < 4:
        parser.error(
            "--steps: a median needs at least 4 steps, for the first after each start is left out"
        )
    if arguments.checkpoint is not None:
        work(arguments)
        return None
    out = profiled(arguments)
    kind = resolve_device(arguments.device).type
    write(out, arguments.json or RESULTS / f"gpu_profile-{out['profile']}-{kind}.json")
    shown, where = out["measured"]["peak_bytes"], out["environment"]["gpu"] or "CPU"
    print(
        f"{out['profile']} {out['method']} on {where}: {out['predicted']['total'] / 1e9:.2f} GB"
        f" predicted, {'not counted on a CPU' if shown is None else f'{shown / 1e9:.2f} GB shown'};"
        f" {out['measured']['seconds_per_step']:.3f} s a step,"
        f" {spoken(out['hours_of_the_run'])} for the whole run; killed and resumed at step"
        f" {out['resumed_at']}"
    )
    return out


if __name__ == "__main__":
    main()
