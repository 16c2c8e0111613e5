"""Progress of a run, where the pipeline, a notebook and a person can all see it.

Whoever works replaces `<run>/progress.json` atomically, at most five times a second:

    {"label": "lat seed 0", "step": 12, "total": 130, "detail": "loss 0.71", "time": 1760000000.0}

The pipeline's driver reads that file to draw its line. In an interactive notebook the same updates
also draw a tqdm bar; under the pipeline or nbval (`LATLIB_BATCH=1`) they do not. A file
`<run>/STOP` asks the worker to save and leave.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

from latlib.io.files import aside

OnStep = Callable[[int, int, str], None]  # progress: (step, of how many, what was done)
MIN_INTERVAL_S = 0.2  # a reader redraws every 0.25 s; writing more often only costs time


class ExitStatus(IntEnum):
    """How a command of latlib ends."""

    DONE = 0
    FAILED = 1  # something went wrong on the way
    USAGE = 2  # a wrong option or setting
    INCOMPLETE = 3  # something that a run needs is missing
    STOPPED = 75  # by a signal, everything saved: the same command continues


class Stopped(RuntimeError):
    """The run was asked to stop and has saved its state; the same command continues it."""


def unseen(step: int, total: int, detail: str) -> None:
    """Progress that nobody follows."""


def in_batch() -> bool:
    """Whether nobody is looking: under the pipeline or nbval."""
    return os.environ.get("LATLIB_BATCH") == "1"


def stop_requested(run_folder: str | os.PathLike[str]) -> bool:
    """Whether someone put a file `STOP` into the run folder."""
    return os.path.exists(os.path.join(run_folder, "STOP"))


def report(
    path: str | os.PathLike[str], label: str, step: int, total: int, detail: str = ""
) -> None:
    """Replace the progress file at `path` (or in the run folder `path`) with one record.

    A full or unwritable disk is not an error here: progress is for the eye, and whatever matters is
    saved elsewhere.
    """
    target = Path(path)
    if target.is_dir():
        target = target / "progress.json"
    record = {
        "label": label,
        "step": int(step),
        "total": int(total),
        "detail": detail,
        "time": time.time(),
    }
    with suppress(OSError), aside(target, durable=False) as partial:
        partial.write_text(json.dumps(record), encoding="utf-8")


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The record at `path` (a file or a run folder), or None where there is none that can be
    read.
    """
    target = Path(path)
    if target.is_dir():
        target = target / "progress.json"
    try:
        record = json.loads(target.read_text(encoding="utf-8"))
        return {
            "label": str(record["label"]),
            "step": int(record["step"]),
            "total": int(record["total"]),
        } | {
            "detail": str(record.get("detail", "")),
            "time": float(record["time"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _interactive() -> bool:
    """Whether a person watches this process in a notebook."""
    if in_batch() or "ipykernel" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


class Progress:
    """Counts `total` steps of one piece of work called `label`.

    path: the progress file, or the run folder it lies in.

        with Progress(run_folder, "lat seed 0", total=130) as progress:
            for step in range(130):
                ...
                progress.update(step + 1, f"loss {loss:.3f}")
    """

    def __init__(self, path: str | os.PathLike[str], label: str, total: int) -> None:
        self.path, self.label, self.total = Path(path), label, int(total)
        self._last_write = float("-inf")  # seconds of time.monotonic
        self._step, self._detail, self._bar = 0, "", None

    def __enter__(self) -> Progress:
        if _interactive():
            from tqdm.auto import tqdm

            self._bar = tqdm(total=self.total, desc=self.label, leave=False)
        self.update(0)
        return self

    def update(self, step: int, detail: str = "") -> None:
        """Say that `step` steps are done. The first and the last are always written, others at most
        5 a second.
        """
        self._step, self._detail = int(step), detail
        now = time.monotonic()
        if step < self.total and now - self._last_write < MIN_INTERVAL_S:
            return
        self._last_write = now
        report(self.path, self.label, step, self.total, detail)
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(step - self._bar.n)

    def on_step(self, step: int, total: int, detail: str) -> None:
        """The same of work that says itself how many steps it has."""
        self.total = total
        self.update(step, detail)

    def __exit__(self, *_: object) -> None:
        report(self.path, self.label, self._step, self.total, self._detail)
        if self._bar is not None:
            self._bar.close()
