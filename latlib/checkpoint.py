"""Checkpoints of a training run: written aside, then renamed, so that one is whole or absent."""

from __future__ import annotations

from pathlib import Path

import torch

from latlib.train import Trainer


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the trainer's state to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    torch.save(trainer.state(), aside)
    aside.replace(path)


def load_checkpoint(trainer: Trainer, path: Path) -> int:
    """Restore from a checkpoint if there is one; returns the step to go on from."""
    if path.exists():
        trainer.restore(torch.load(path, map_location=trainer.lm.device, weights_only=True))
    return trainer.step
