"""Checkpoints of a long training run: a killed run goes on from the last good one and ends as if
nothing had happened.

1. A checkpoint holds the adapter, the optimiser, the step, torch's own random numbers, and the best
   validation so far (see `latlib.experiment.validation`). Learning rate, radius, the rows a step
   takes and every random number of the training itself are functions of (seed, step), so that
   nothing of them need be kept.
2. `Due` says when: every `checkpoint_every` steps, and where those take long, every
   `checkpoint_minutes` minutes.
3. It is written aside, with the sha256 of all before as its last line, put on the disk (fsync of
   file and folder), and renamed: a file with the name of a checkpoint is whole, and a full disk or
   a kill costs no older one. The last `checkpoints_kept` stay.
4. The newest whose checksum is right is taken. One that is damaged is named on stderr and the one
   before is used; where there is none, training starts from the beginning.
5. One that was made with other training settings or data is refused.

All processes that train a model together call both functions; the first one writes. Their own
random numbers (of the first only, and only where it is alone) matter to models that draw any, which
none does whose dropout is off.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latlib.config.profile import changed_settings
from latlib.config.sections import WHEN, ProfileError, TrainSettings
from latlib.distributed import ranks
from latlib.experiment.validation import Validator
from latlib.io import files
from latlib.io.files import Json
from latlib.io.messages import in_a_line
from latlib.train import Trainer

MARK = b"\nsha256 "  # before the checksum; torch reads files with something behind their end
TAIL = len(MARK) + 64 + 1


class Due:
    """Says after which steps a checkpoint is due."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.saved = time.monotonic()

    def after(self, step: int) -> bool:
        """Whether one is due after `step` steps; all processes are told what the first one's clock
        says.
        """
        late = time.monotonic() - self.saved >= 60 * self.settings.checkpoint_minutes
        return ranks.broadcast(late or step % self.settings.checkpoint_every == 0)

    def done(self) -> None:
        """One was saved just now."""
        self.saved = time.monotonic()


def save_checkpoint(
    trainer: Trainer, folder: Path, validator: Validator | None = None, log: Path | None = None
) -> None:
    """Write the state after `trainer.step` steps to `folder`, then drop checkpoints older than the
    ones to be kept.

    log: a file that must reach the disk before it does, for a resumed run goes on behind its line
    of this step. Raises OSError where it cannot be written; older checkpoints stay as they were.
    """
    content = {
        "made_with": _made_with(trainer),
        "trainer": trainer.state(),
        "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        "validation": validator.state() if validator else None,
    }
    if not ranks.is_main():
        return
    if log is not None:
        files.sync(log)
    try:
        write_checked(content, folder / f"step-{trainer.step:08d}.pt")
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        raise OSError(
            f"the checkpoint of step {trainer.step} cannot be written to {folder}"
            f" ({in_a_line(error)}); earlier ones are whole: free some space and run the"
            " same command again",
        ) from error
    _prune(folder, trainer.settings.checkpoints_kept)


def load_checkpoint(trainer: Trainer, folder: Path, validator: Validator | None = None) -> int:
    """Restore from the newest good checkpoint in `folder`, if there is one; returns the step to go
    on from.

    Raises ProfileError for a checkpoint of another training (settings, seed or shape of adapter),
    ValueError for one that was made with other rows.
    """
    newest_first = sorted(folder.glob("step-*.pt"), reverse=True)
    for file, older in itertools.zip_longest(newest_first, newest_first[1:]):
        content, damage = read_checked(file)
        if content is not None:
            _restore(trainer, validator, content, file)
            break
        if ranks.is_main():
            after = f"{older.name} is tried" if older else "training starts anew"
            line = f"checkpoint: {file.name} in {folder.name} {damage} and is not used; {after}"
            print(line, file=sys.stderr, flush=True)
    return trainer.step


def _restore(trainer: Trainer, validator: Validator | None, content: Json, file: Path) -> None:
    if lines := changed_settings(content["made_with"], _made_with(trainer)):
        raise ProfileError(
            f"checkpoint {file} is of another training:\n  "
            + "\n  ".join(lines)
            + f"\ndelete {file.parent} to train anew, or go back to what it was made with"
        )
    trainer.restore(content["trainer"])
    if validator is not None and content["validation"] is not None:
        validator.restore(content["validation"])
    if ranks.is_distributed():  # the random numbers are the first process's
        return
    torch.set_rng_state(content["random"]["cpu"])
    on_gpus = content["random"]["cuda"]
    if len(on_gpus) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(on_gpus)


def _made_with(trainer: Trainer) -> Json:
    """What a trainer's result depends on beside the base model and the rows, of which the trainer
    keeps a digest.
    """
    return {
        "train": trainer.settings.model_dump(mode="json", exclude=set(WHEN)),
        "seed": trainer.seed,
        "adapter": str([tuple(p.shape) for p in trainer.parameters]),
    }


def _prune(folder: Path, kept: int) -> None:
    """Drop all but the newest checkpoints, and what killed writers left."""
    old = sorted(folder.glob("step-*.pt"))[:-kept]
    for file in (*old, *folder.glob(".step-*")):
        file.unlink(missing_ok=True)


# ---- files with a checksum


def write_checked(content: Json, file: Path) -> None:
    """Write what `torch.save` takes, with its sha256 as the file's last line: on the disk whole, or
    not at all.
    """
    with files.aside(file) as partial:
        torch.save(content, partial)
        tail = _checksum_line(np.memmap(partial, mode="r"))
        with partial.open("ab") as handle:
            handle.write(tail)


def read_checked(file: Path) -> tuple[Json | None, str]:
    """(what `write_checked` wrote, ''), or (None, what is wrong with it). Tensors are on the CPU;
    no code is run.
    """
    try:
        content = np.memmap(file, mode="r")
        tail = content[-TAIL:].tobytes()
        if not tail.startswith(MARK):
            return None, "has no checksum (it was cut short)"
        if tail != _checksum_line(content[:-TAIL]):
            return None, "does not match its checksum"
        return torch.load(file, map_location="cpu", weights_only=True), ""
    except Exception as error:  # whatever it is, an older checkpoint is better than none
        return None, f"cannot be read ({type(error).__name__})"


def _checksum_line(content: np.ndarray[Any, Any]) -> bytes:
    return MARK + hashlib.sha256(content.data).hexdigest().encode() + b"\n"
