"""A notebook's kernel: how it starts, and how it is stopped so that it can save first. Imports
nothing heavy: signal handlers are set before all else.

`main` is what runs in the kernel's process. It starts the server that workers are forked from
(`latlib.experiment.jobs`), whose imports then run beside the notebook's own.

`Kernel.stop` ends one that is at work:
1. A file `<run>/STOP` asks the loop in the kernel to save and leave
   (`latlib.io.progress.stop_requested`).
2. After SIGINT_AFTER_S a SIGINT goes to the kernel's whole process group: it ends what has nothing
   to save; training takes it as another wish to stop (`latlib.io.progress.saving_on_signals`).
3. After `grace` seconds a SIGKILL goes there: a training step and its checkpoint must fit.
4. Asked a second time, the kernel is killed at once.

Left alone, papermill dies of SIGTERM and its kernel finds out by polling: no handler in it runs,
nothing is saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latlib.experiment.jobs import start_server

SIGINT_AFTER_S = 2.0
# a step of Llama-3-8B takes some 20 s, a checkpoint a few; who wants to wait less asks twice
GRACE_S = 120.0


@dataclass
class Kernel:
    """The kernel at work, shared by the thread that draws, the engine that runs it and the signal
    handlers.
    """

    run_folder: Path
    grace: float = GRACE_S  # seconds from the wish to stop to a SIGKILL
    stopping: bool = False
    cell: int = 0  # position of the running cell in the source notebook, from 1; 0 before the first
    cells: int = 0
    manager: Any = None  # jupyter_client's, while a notebook runs
    # the kernel's process group; outlives the kernel as long as one of its workers does
    group: int = 0
    # a signal may arrive inside stop()
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def send(self, number: int) -> None:
        """Send a signal to the kernel and its workers; nothing happens where there are none."""
        group = getattr(getattr(self.manager, "provisioner", None), "pgid", None) or self.group
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def stop(self) -> None:
        """Ask the kernel to save and leave, and see to it that it does."""
        with self._lock:
            again, self.stopping = self.stopping, True
        if again:
            self.send(signal.SIGKILL)
            return
        with contextlib.suppress(OSError):
            (self.run_folder / "STOP").touch()
        threading.Thread(target=self._escalate, args=(self.manager,), daemon=True).start()

    def _escalate(self, manager: Any) -> None:
        first = min(SIGINT_AFTER_S, self.grace)
        for wait, number in ((first, signal.SIGINT), (self.grace - first, signal.SIGKILL)):
            time.sleep(wait)
            if manager is not None and self.manager is manager:  # still the same notebook
                self.send(number)


def main() -> None:
    """Be a kernel, as `python -m ipykernel_launcher` is, with the workers' server beside it."""
    if sys.path[0] == os.getcwd():
        del sys.path[0]  # the kernel puts it back once it has started
    from ipykernel.kernelapp import IPKernelApp

    kernel = IPKernelApp.instance()
    kernel.initialize()
    start_server()  # now, for what workers print goes where the kernel's output goes
    kernel.start()


if __name__ == "__main__":
    main()
