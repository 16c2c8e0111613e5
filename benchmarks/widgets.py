"""How long a reader waits for a widget of notebooks 02, 04 and 05, in the kernel that answers it.

    python benchmarks/widgets.py --run runs/tiny --json benchmarks/results/widgets-tiny.json

1. A widget is made as in its notebook, and shown once: that loads its models.
2. Each of its controls is moved through its choices, a slider through a few places, one control at
   a time and the others as they were. Every move is a call of what the widget calls.
3. What the browser and its connection add is not in it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measure import environment, seconds_of, write

from latlib.experiment import widgets
from latlib.experiment.run import Run
from latlib.redteam.latent import base_attack

STOPS = 6  # places of a slider
MAKERS = {
    "attack (00, 02)": lambda run: widgets.attack_slider(run, base_attack(run.profile).eps),
    "direction (04)": widgets.picker,
    "encoding (05)": widgets.encoding_picker,
}


def places(control: Any) -> list:
    """What a control can be moved to."""
    if options := getattr(control, "options", ()):
        return [option[1] if isinstance(option, tuple) else option for option in options]
    if not hasattr(control, "min"):
        return []
    found = np.linspace(control.min, control.max, STOPS)
    return list(control.base**found if hasattr(control, "base") else found)


def moves(controls: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Values of all controls, one of them moved."""
    usual = {name: control.value for name, control in controls.items()}
    for name, control in controls.items():
        for value in places(control):
            if value != control.value:
                yield usual | {name: value}


def measure(make: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of a widget's first answer, with which it is made, and of every move's."""
    made = []
    first = seconds_of(lambda: made.append(make()), device)
    *controls, _ = made[0].children
    controls = {c.description.removesuffix(" text"): c for c in controls}
    seconds = []
    for move in moves(controls):
        seconds.append(seconds_of(lambda chosen=move: made[0].f(**chosen), device))
    return {"first": first, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print, write; returns what is written."""
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own.add_argument("--run", type=Path, required=True, help="folder of a run that is finished")
    own.add_argument("--json", type=Path, default=None)
    arguments = own.parse_args(argv)
    os.environ.pop("LATLIB_BATCH", None)  # a batch run has no widgets
    run = Run(arguments.run / "profile.yaml", arguments.run)
    device = run.model(run.profile.main, run.profile.seeds[0]).device
    found = {name: measure(partial(make, run), device) for name, make in MAKERS.items()}
    for name, record in found.items():
        seconds = record["seconds"]
        print(
            f"{name}: median {median(seconds):.2f} s, longest {max(seconds):.2f} s of"
            f" {len(seconds)} moves; first {record['first']:.2f} s"
        )
    out = {"profile": run.profile.name, "results": found, "environment": environment(device)}
    write(out, arguments.json)
    return out


if __name__ == "__main__":
    main()
