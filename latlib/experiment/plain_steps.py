"""Training before the attack begins, done once for all methods that have it in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from latlib.config.sections import TrainSettings
from latlib.distributed.ranks import broadcast, is_main
from latlib.experiment.checkpoint import read_checked, write_checked
from latlib.experiment.layout import Layout
from latlib.io.files import write_text
from latlib.train import Trainer


class PlainSteps:
    """The first steps of a training, which other trainings of the same seed may share.

    Until `attack_after` steps are done, methods that differ in their attack alone do the same, bit
    for bit. Sharing is allowed where everything that those steps depend on is equal: the seed and
    `TrainSettings.plain_steps`. A digest of them is in the file's name.
    """

    def __init__(self, layout: Layout, settings: TrainSettings, seed: int) -> None:
        self.files: dict[int, Path] = {}  # steps -> the state after them, and their log
        self.own: Path | None = None  # the file that this training goes on from
        attacks = settings.attack.steps > 0
        plain = settings.plain_steps()
        if plain is None:
            return
        digest = _digest(plain, seed)
        methods = map(layout.profile.training, layout.profile.methods)
        starts = {settings.attack_after, *(method.attack_after for method in methods)}
        last = settings.attack_after if attacks else settings.steps
        for steps in starts:
            if 0 < steps <= last:
                self.files[steps] = layout.plain_steps(steps, digest)
        if attacks:
            self.own = self.files.get(last)

    def share(self, trainer: Trainer, metrics: Path) -> None:
        """Leave the state for others, where it is one that they can go on from. All processes call
        it alike."""
        file = self.files.get(trainer.step)
        if file is None or not broadcast(not file.exists()):
            return
        state = trainer.state()
        if is_main():
            write_checked({"state": state, "metrics": metrics.read_text(encoding="utf-8")}, file)

    def take(self, trainer: Trainer, metrics: Path) -> int:
        """Go on from the steps that another training has done; returns how many."""
        if self.own is None or not broadcast(self.own.exists()):
            return 0
        kept, _ = read_checked(self.own)
        if kept is None:  # damaged: they are done again
            return 0
        trainer.restore(kept["state"])
        if is_main():
            write_text(kept["metrics"], metrics, durable=False)
        return trainer.step


def _digest(plain: dict[str, Any], seed: int) -> str:
    text = json.dumps([plain, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
