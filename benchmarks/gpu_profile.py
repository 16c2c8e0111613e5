"""What `--check` predicts beside what a GPU shows: random weights of the real shape, no download.

    python benchmarks/gpu_profile.py --profile llama3-8b-seed --steps 20 python
    benchmarks/gpu_profile.py --config config.json --device cpu --steps 4        any model, anywhere

1. Memory and FLOPs of a step of the profile's method are predicted on the meta device.
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
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from measure import environment, seconds_of, write
from transformers import AutoConfig

from latlib.config.profile import Profile, load_profile
from latlib.config.sections import ProfileError
from latlib.experiment.checkpoint import load_checkpoint, save_checkpoint
from latlib.models import resolve_device
from latlib.planning import estimate
from latlib.planning.published_configs import config_of
from latlib.planning.step_cost import Lengths, meta_model, predicted_step

RESULTS = Path(__file__).resolve().parent / "results"


def model_config(profile: Profile, file: Path | None):
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


def work(arguments: argparse.Namespace) -> None:
    """A child: take steps from the checkpoint on, a line of JSON for each; the first child dies in
    the middle.
    """
    device, profile = resolve_device(arguments.device), load_profile(arguments.profile)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = estimate.random_model(model_config(profile, arguments.config), dtype, profile.lora, device)
    settings = profile.training(arguments.method)
    lengths = Lengths(arguments.prompt, arguments.completion)
    trainer = estimate.random_trainer(lm, settings, lengths)
    begun = load_checkpoint(trainer, arguments.checkpoint)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while trainer.step < arguments.steps:
        record: dict = {"begun": begun}
        metrics: dict = {}
        record["seconds"] = seconds_of(
            lambda metrics=metrics: metrics.update(trainer.train_step()), device
        )
        record |= {"step": trainer.step, "total": metrics["total"]}
        if device.type == "cuda":
            record["peak"] = torch.cuda.max_memory_allocated(device)
            record["reserved"] = torch.cuda.max_memory_reserved(device)
        print(json.dumps(record), flush=True)
        if not begun and trainer.step == arguments.steps // 2:
            save_checkpoint(trainer, arguments.checkpoint)
            os.kill(os.getpid(), signal.SIGKILL)


def measured(arguments: argparse.Namespace) -> list[dict]:
    """Every step of both children. Raises RuntimeError with a child's last words if one does not
    end as it should.
    """
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for expected in (-signal.SIGKILL, 0):
            options = [
                f"--checkpoint={Path(folder) / 'checkpoints'}",
                f"--device={arguments.device}",
            ]
            options += [
                f"--{name}={getattr(arguments, name)}"
                for name in ("profile", "method", "steps", "prompt")
            ]
            options += [f"--completion={arguments.completion}"]
            options += [] if arguments.config is None else [f"--config={arguments.config}"]
            command = [sys.executable, __file__, *options]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode != expected:
                raise RuntimeError(
                    f"the child ended with {child.returncode}:\n{child.stderr[-3000:]}"
                )
            out += [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return out


def profiled(arguments: argparse.Namespace) -> dict:
    """Predict, measure, compare."""
    device, profile = resolve_device(arguments.device), load_profile(arguments.profile)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    settings, lengths = (
        profile.training(arguments.method),
        Lengths(arguments.prompt, arguments.completion),
    )
    lm = meta_model(model_config(profile, arguments.config), dtype, profile.lora)
    predicted = predicted_step(lm, settings, lengths)
    steps = measured(arguments)
    half = arguments.steps // 2
    # a process's first step warms up
    seconds = median(s["seconds"] for s in steps if s["step"] not in (1, half + 1))
    rate = estimate.MEASURED_RATE * estimate.SHARE
    peak = max((s["peak"] for s in steps if "peak" in s), default=None)
    return {
        "profile": profile.name,
        "method": arguments.method,
        "config": None if arguments.config is None else str(arguments.config),
        "lengths": asdict(lengths),
        "dtype": str(dtype).removeprefix("torch."),
        "environment": environment(device),
        "predicted": {
            **asdict(predicted),
            "total": predicted.total,
            "seconds_at_stated_rate": predicted.flop / rate,
        },
        "measured": {
            "peak_bytes": peak,
            "reserved_bytes": max((s["reserved"] for s in steps if "reserved" in s), default=None),
            "seconds_per_step": seconds,
            "flop_per_second": predicted.flop / seconds,
        },
        "predicted_over_measured_bytes": None if peak is None else predicted.total / peak,
        "hours_of_the_run": seconds * settings.steps / 3600,
        "resumed_at": steps[-1]["begun"],
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
    parser.add_argument("--method", default="lat")
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
        f" {estimate.spoken(out['hours_of_the_run'])} for the whole run; killed and resumed at step"
        f" {out['resumed_at']}"
    )
    return out


if __name__ == "__main__":
    main()
