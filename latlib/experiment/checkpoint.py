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
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from latlib.config.profile import changed_settings
from latlib.config.sections import ProfileError, TrainSettings
from latlib.distributed import ranks
from latlib.experiment.validation import Validator
from latlib.io import files
from latlib.train import Trainer

MARK = b"\nsha256 "  # before the checksum; torch reads files with something behind their end
TAIL = len(MARK) + 64 + 1
# settings that change nothing but checkpoints
WHEN = ("checkpoint_every", "checkpoint_minutes", "checkpoints_kept")


class Due:
    """Says after which steps a checkpoint is due. clock: seconds."""

    def __init__(
        self, settings: TrainSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.every, self.seconds = settings.checkpoint_every, 60 * settings.checkpoint_minutes
        self.clock = clock
        self.saved = clock()

    def after(self, step: int) -> bool:
        """Whether one is due after `step` steps; all processes are told what the first one's clock
        says.
        """
        late = self.clock() - self.saved >= self.seconds
        return ranks.broadcast(step % self.every == 0 or late)

    def done(self) -> None:
        """One was saved just now."""
        self.saved = self.clock()


def save_checkpoint(
    trainer: Trainer, folder: Path, validator: Validator | None = None, logs: Iterable[Path] = ()
) -> None:
    """Write the state after `trainer.step` steps to `folder`, then drop checkpoints older than the
    ones to be kept.

    logs: files that must reach the disk before it does, for a resumed run goes on behind their
    lines of its step. Raises OSError where it cannot be written; older checkpoints stay as they
    were.
    """
    content = {
        "made_with": _made_with(trainer),
        "trainer": trainer.state(),
        "random": _random_state(),
        "validation": validator.state() if validator else None,
    }
    if not ranks.is_main():
        return
    for log in logs:
        files.sync(log)
    try:
        write_checked(content, folder / f"step-{trainer.step:08d}.pt")
    except (OSError, RuntimeError) as error:  # torch's own writer raises the second
        raise OSError(
            getattr(error, "errno", None),
            f"the checkpoint of step {trainer.step} cannot be written to {folder}"
            f" ({str(error).splitlines()[0]}); earlier ones are whole: free some space and run the"
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
    for number, file in enumerate(newest_first, start=1):
        content, damage = read_checked(file)
        if content is not None:
            _restore(trainer, validator, content, file)
            break
        after = "training starts anew"
        if number < len(newest_first):
            after = f"{newest_first[number].name} is tried"
        if ranks.is_main():
            line = f"checkpoint: {file.name} in {folder.name} {damage} and is not used; {after}"
            print(line, file=sys.stderr, flush=True)
    return trainer.step


def _restore(
    trainer: Trainer, validator: Validator | None, content: dict[str, Any], file: Path
) -> None:
    if lines := changed_settings(content["made_with"], _made_with(trainer)):
        raise ProfileError(
            f"checkpoint {file} is of another training:\n  "
            + "\n  ".join(lines)
            + f"\ndelete {file.parent} to train anew, or go back to what it was made with"
        )
    trainer.restore(content["trainer"])
    if validator is not None and content["validation"] is not None:
        validator.restore(content["validation"])
    _restore_random(content["random"])


def _made_with(trainer: Trainer) -> dict[str, Any]:
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


def _random_state() -> dict[str, Any]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": on_gpus}


def _restore_random(state: dict[str, Any]) -> None:
    if ranks.is_distributed():  # it is the first process's
        return
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


# ---- files with a checksum


def write_checked(content: dict[str, Any], file: Path) -> None:
    """Write what `torch.save` takes, with its sha256 as the file's last line: on the disk whole, or
    not at all.
    """
    with files.aside(file) as partial:
        torch.save(content, partial)
        with partial.open("r+b") as handle:
            digest = _digest(handle, partial.stat().st_size)
            handle.seek(0, os.SEEK_END)
            handle.write(MARK + digest + b"\n")


def read_checked(file: Path) -> tuple[dict[str, Any] | None, str]:
    """(what `write_checked` wrote, ''), or (None, what is wrong with it). Tensors are on the CPU;
    no code is run.
    """
    try:
        with file.open("rb") as handle:
            size = max(0, file.stat().st_size - TAIL)
            digest = _digest(handle, size)
            tail = handle.read()
        if not tail.startswith(MARK):
            return None, "has no checksum (it was cut short)"
        if tail != MARK + digest + b"\n":
            return None, "does not match its checksum"
        return torch.load(file, map_location="cpu", weights_only=True), ""
    except Exception as error:  # whatever it is, an older checkpoint is better than none
        return None, f"cannot be read ({type(error).__name__})"


def _digest(handle: BinaryIO, size: int) -> bytes:
    """sha256 of the next `size` bytes of a file, as text."""
    digest = hashlib.sha256()
    while size > 0 and (part := handle.read(min(size, 1 << 20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()
