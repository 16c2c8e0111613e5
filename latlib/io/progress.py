"""Progress of a run, where the pipeline, a notebook and a person can all see it.

Whoever works replaces `<run>/progress.json` atomically, at most five times a second:

    {"label": "lat seed 0", "step": 12, "total": 130, "left": 240.0, "detail": "loss 0.71",
     "time": 1760000000.0}

`left` are seconds until the last step at the pace of the last minutes, None before that is known.
The file is gone when the work is over. The pipeline's driver reads it to draw its line. In an
interactive notebook the same updates also draw a bar below the cell; under the pipeline or nbval
(`LATLIB_BATCH=1`) they do not. A file `<run>/STOP` asks the worker to save and leave.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from latlib.io.files import aside, read_json

T = TypeVar("T")
OnStep = Callable[[int, int, str], None]  # progress: (step, of how many, what was done)
MIN_INTERVAL_S = 0.2  # a reader redraws every 0.25 s; writing more often only costs time
PACE_S = (10.0, 300.0)  # of how long a past a pace is told: at least, at most


class ExitStatus(IntEnum):
    """How a command of latlib ends."""

    DONE = 0
    FAILED = 1  # something went wrong on the way
    USAGE = 2  # a wrong option or setting
    INCOMPLETE = 3  # something that a run needs is missing
    STOPPED = 75  # by a signal, everything saved: the same command continues


class Stopped(RuntimeError):
    """The run was asked to stop and has saved its state; the same command continues it."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows of it: nothing is wrong that a traceback would tell."""
        return [f"{self}; run again to continue"]


_asked = threading.Event()  # by a signal, see `saving_on_signals`


def asked_by_signal() -> bool:
    """Whether a signal asked this process to stop."""
    return _asked.is_set()


def stop_requested(run_folder: Path) -> bool:
    """Whether someone put a file `STOP` into the run folder, or a signal asked this process to
    stop."""
    return asked_by_signal() or (run_folder / "STOP").exists()


@contextmanager
def handled(numbers: Iterable[int], handler: Any) -> Iterator[None]:
    """In the main thread: signals have a handler, and in the end those that they had before."""
    before = {number: signal.signal(number, handler) or signal.SIG_DFL for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def saving_on_signals() -> Iterator[None]:
    """Around a loop that looks at `stop_requested` after every step: a first SIGINT or SIGTERM asks
    it to stop, so that the step at hand is saved; a second one of a kind does what it did before.
    Elsewhere than in the main thread, which alone can have handlers, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def ask(number: int, _: Any) -> None:
        if not _asked.is_set():
            print("stopping after this step", file=sys.stderr, flush=True)
        _asked.set()
        signal.signal(number, before[signal.Signals(number)])

    try:
        with handled(numbers, ask):
            yield
    finally:
        _asked.clear()


def in_batch() -> bool:
    """Whether nobody is there to see: under the pipeline or nbval."""
    return os.environ.get("LATLIB_BATCH") == "1"


def unseen(step: int, total: int, detail: str) -> None:
    """Progress that nobody follows."""


def with_progress(
    items: Sequence[T], on_step: OnStep, name: Callable[[T], str] = str
) -> Iterator[T]:
    """The items, one after the other; each is told by its name once it is done with."""
    for step, item in enumerate(items, start=1):
        yield item
        on_step(step, len(items), name(item))


def read(path: Path) -> dict[str, Any] | None:
    """The record at `path` (a file or a run folder), or None where there is none that can be
    read.
    """
    try:
        return read_json(_file(path))
    except (OSError, ValueError):
        return None


def _file(path: Path) -> Path:
    return path / "progress.json" if path.is_dir() else path


def how_far(record: dict[str, Any]) -> str:
    """How far a record is: `12/130, 4 min left`."""
    left = f", {spoken(record['left'] / 3600)} left" if record.get("left") else ""
    return f"{record['step']}/{record['total']}{left}"


def spoken(hours: float) -> str:
    """A duration for a line or a table."""
    if hours < 1 / 60:
        return f"{max(1, math.ceil(3600 * hours))} s"
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h"


class Progress:
    """Counts `total` steps of one piece of work called `label`.

    path: the progress file, or the run folder it lies in.

        with Progress(run_folder, "lat seed 0", total=130) as progress:
            for step in range(130):
                ...
                progress.update(step + 1, f"loss {loss:.3f}")
    """

    def __init__(self, path: Path, label: str, total: int) -> None:
        self.file, self.label, self.total = _file(path), label, total
        self._last_write = float("-inf")  # seconds of time.monotonic
        # (seconds of time.monotonic, steps done) of the last minutes
        self._past: deque[tuple[float, float]] = deque()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if "ipykernel" in sys.modules and not in_batch():
            from IPython.display import display

            # no widget, of which a saved notebook keeps a part that cannot be shown again
            self._bar = display({}, raw=True, display_id=True)
        self.update(0)
        return self

    def update(self, step: int, detail: str = "", started: float = 0.0) -> None:
        """Say that `step` steps are done; started: how much is of others, in steps. The first and
        the last are always written, others at most 5 a second.
        """
        now = time.monotonic()
        if step < self.total and now - self._last_write < MIN_INTERVAL_S:
            return
        self._last_write = now
        self._remember(now, step + started)
        record = {
            "label": self.label,
            "step": step,
            "total": self.total,
            "left": self._left(),
            "detail": detail,
            "time": time.time(),
        }
        self._write(record)
        if self._bar is not None:
            said = f"{self.label} {how_far(record)} {detail}"
            bar = f'<progress value="{step}" max="{self.total}"></progress> {escape(said)}'
            self._bar.update({"text/html": bar, "text/plain": said}, raw=True)

    def on_step(self, step: int, total: int, detail: str) -> None:
        """The same of work that says itself how many steps it has."""
        if total != self.total:
            self._past.clear()
        self.total = total
        self.update(step, detail)

    def _remember(self, now: float, done: float) -> None:
        if self._past and done < self._past[-1][1]:  # other work, that is counted anew
            self._past.clear()
        self._past.append((now, done))
        while now - self._past[0][0] > PACE_S[1] and len(self._past) > 2:
            self._past.popleft()

    def _left(self) -> float | None:
        (start, before), (now, done) = self._past[0], self._past[-1]
        if now - start < PACE_S[0] or done == before:
            return None
        return (self.total - done) * (now - start) / (done - before)

    def _write(self, record: dict[str, Any]) -> None:
        """A full or unwritable disk is no error here: progress is for the eye, and whatever matters
        is saved elsewhere.
        """
        with suppress(OSError), aside(self.file, durable=False) as partial:
            partial.write_text(json.dumps(record), encoding="utf-8")

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what is over is no progress any more
            self.file.unlink(missing_ok=True)
        if self._bar is not None:
            self._bar.update({}, raw=True)
