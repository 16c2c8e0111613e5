"""What it costs to survive: the share of a training's time that goes into its checkpoints, and into
the finished model with its lines in the manifest.

    python benchmarks/checkpoints.py --json benchmarks/results/checkpoints-cpu.json

Trains the profile's main method anew in a temporary folder, with a checkpoint every so many steps,
and takes the time in both. The base is hardly trained: what it knows changes no time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, write

from latlib.config.profile import Profile, load_profile
from latlib.experiment import build
from latlib.experiment.run import Run
from latlib.io.progress import unseen


def changed(profile: Profile, steps: int, every: int) -> Profile:
    """The profile with so many steps and checkpoints, and hardly a base."""
    train = {"steps": steps, "checkpoint_every": every, "checkpoint_minutes": 1e6}
    settings = profile.train.model_copy(update=train)
    pretrain = profile.pretrain.model_copy(update={"steps": 2})
    tracking = profile.tracking.model_copy(update={"wandb": "disabled"})
    changes = {"train": settings, "pretrain": pretrain, "tracking": tracking}
    return profile.model_copy(update=changes)


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, its times noted."""

    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        found = function(*args, **options)
        seconds.append(time.perf_counter() - began)
        return found

    return call


def measure(profile: Profile, folder: Path) -> dict[str, Any]:
    """Seconds of one training: all of it, in checkpoints, and in the finished model's files."""
    run = Run(profile, folder)
    run.norms(0)
    saved: list[float] = []
    finished: list[float] = []
    for name, seconds in (("save_checkpoint", saved), ("_save", finished)):
        setattr(build, name, timed(getattr(build, name), seconds))
    whole: list[float] = []
    timed(build.make_adapter, whole)(run.layout, run.spec(profile.main, 0), unseen)
    spent = sum(saved) + sum(finished)
    return {
        "profile": profile.name,
        "steps": profile.train.steps,
        "checkpoint_every": profile.train.checkpoint_every,
        "seconds": sum(whole),
        "checkpoints": len(saved),
        "seconds in checkpoints": sum(saved),
        "seconds in the finished model": sum(finished),
        "share": spent / (sum(whole) - spent),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny", help="name, or path of a YAML file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    profile = changed(load_profile(options.profile), options.steps, options.every)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, not in memory
        found = measure(profile, Path(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"environment": environment(device), **found}
    print(f"{found['share']:.2%} of the training's time beside them")
    write(results, options.json)


if __name__ == "__main__":
    main()
