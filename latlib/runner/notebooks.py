"""Executes one notebook through papermill, so that only a whole result looks finished.

1. `run_notebook`: papermill, with an engine of ours that keeps hold of the kernel, executes into
   `<run>/notebooks/.unfinished/`; the file moves to `<run>/notebooks/NN_name.ipynb` only when every
   cell has run.
2. A failing notebook is kept as `NN_name.failed.ipynb`, its output and traceback in
   `<run>/logs/NN_name.log`.
3. The kernel is this very Python, whatever kernelspecs the user has installed, in the notebook's
   own folder (as in JupyterLab and nbval), and a signal handler can reach it
   (`latlib.runner.kernel`).
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import nbformat
import papermill
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from latlib.io.files import aside, discard, without_paths
from latlib.io.messages import in_a_line
from latlib.io.progress import Stopped
from latlib.runner import kernel as kernel_process
from latlib.runner.kernel import Kernel

ENGINE = "latlib"
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_REDRAWN = re.compile(r"[^\n]*\r(?=[^\r\n])|\r+(?=\n)")  # a line before it was drawn again


@dataclass(frozen=True)
class Failure:
    """Where a notebook failed. cell: counted from 1 as in the source notebook; 0 where no cell was
    at fault.
    """

    notebook: str
    cell: int
    first_line: str
    error: str
    log: Path

    def __str__(self) -> str:
        where = f"cell {self.cell}: {self.first_line}" if self.cell else "before the first cell"
        return f"failed: {self.notebook}, {where}\n  {self.error}\n  log: {self.log}"


class _ThisPython(KernelSpecManager):
    """Answers every kernel name with this interpreter, whatever kernelspecs the user has
    installed.
    """

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", kernel_process.__name__, "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


class LatlibEngine(Engine):
    """The papermill engine that keeps its kernel where a signal handler can reach it."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
        """See `papermill.engines.Engine`."""
        kernel, log = options["kernel"], options["log_file"]
        sources = [
            i for i, cell in enumerate(nb_man.nb.cells) if "injected-parameters" not in _tags(cell)
        ]
        kernel.cells = len(sources)

        def started(cell: Any, cell_index: int) -> None:
            if kernel.stopping:
                raise Stopped("asked to stop before this cell")
            kernel.cell = sum(i <= cell_index for i in sources)
            kernel.group = manager.provisioner.pgid

        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_ThisPython())
        client = PapermillNotebookClient(
            nb_man,
            km=manager,
            timeout=None,
            startup_timeout=120,  # a cold disk imports slowly
            stdout_file=log,
            stderr_file=log,
            on_cell_execute=started,
        )
        kernel.manager = manager
        try:
            # what the kernel's process and its workers say outside any cell belongs to the log as
            # well
            folder = str(options["kernel_folder"])
            client.execute(cwd=folder, stdout=log, stderr=log, cleanup_kc=True)
        finally:
            kernel.manager = None
            kernel.send(signal.SIGKILL)  # workers that a dead kernel has left behind
            kernel.group = 0


papermill_engines.register(ENGINE, LatlibEngine)


def _tags(cell: Any) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def run_notebook(
    notebook: Path, run_folder: Path, parameters: dict[str, Any], kernel: Kernel
) -> Failure | None:
    """Execute `notebook` into `<run_folder>/notebooks/`; None when every cell has run, else where
    it failed.

    Never raises for what happens inside the notebook. When `kernel.stopping` is set afterwards, it
    was stopped.
    """
    name = notebook.stem
    finished = run_folder / "notebooks" / f"{name}.ipynb"
    failed = finished.with_name(f"{name}.failed.ipynb")
    unfinished = finished.parent / ".unfinished" / finished.name
    log_path = run_folder / "logs" / f"{name}.log"
    for folder in (unfinished.parent, log_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    kernel.cell = kernel.cells = 0
    log_path.unlink(missing_ok=True)
    failure = None
    # append: the kernel's process writes into it too
    with log_path.open("a", encoding="utf-8") as log:
        try:
            _execute(notebook, unfinished, parameters, kernel, log)
        except Exception as error:
            failure = _describe(error, notebook, kernel, log)
    given = [Path(value) for value in parameters.values() if os.path.isabs(str(value))]
    # of a line that was drawn again and again the last state is enough
    text = log_path.read_bytes().decode("utf-8", errors="replace")
    said = without_paths(_REDRAWN.sub("", _ANSI.sub("", text)), run_folder, *given)
    log_path.write_text(said, encoding="utf-8")
    if unfinished.is_file():
        _forget_paths(unfinished, notebook, run_folder, *given)
        if failure is None:
            with aside(finished) as partial:
                os.replace(unfinished, partial)
        elif kernel.stopping:
            unfinished.unlink()
        else:
            # of an earlier run: it would look as if this one had succeeded
            discard(finished)
            os.replace(unfinished, failed)
    return failure


def _execute(
    notebook: Path, target: Path, parameters: dict[str, Any], kernel: Kernel, log: TextIO
) -> None:
    # papermill's own warnings belong to the log, not between progress lines
    handler = logging.StreamHandler(log)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("papermill")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        papermill.execute_notebook(
            str(notebook),
            str(target),
            parameters=parameters,
            engine_name=ENGINE,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            log_file=log,
            kernel=kernel,
            kernel_folder=notebook.parent,
        )
    finally:
        logger.removeHandler(handler)


def _describe(error: Exception, notebook: Path, kernel: Kernel, log: TextIO) -> Failure:
    """Write the traceback to the log and say in one line what went wrong where."""
    if isinstance(error, PapermillExecutionError):
        source, text = error.source, f"{error.ename}: {error.evalue}"
        log.write("\n" + "\n".join(error.traceback) + "\n")
    else:
        cells = nbformat.read(notebook, as_version=4).cells
        source = cells[kernel.cell - 1].source if kernel.cell else ""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, DeadKernelError):
            text = "the kernel died without a traceback; most often the memory has run out"
        log.write("\n" + "".join(traceback.format_exception(error)))
    begins = next(filter(str.strip, source.splitlines()), "").strip()
    said = in_a_line(_ANSI.sub("", text))
    return Failure(notebook.stem, kernel.cell, begins, said, Path(log.name))


def _forget_paths(executed: Path, notebook: Path, run_folder: Path, *given: Path) -> None:
    """Leave no path of this machine in an executed notebook: papermill's metadata, the parameters
    that it injects, what a cell prints."""
    content = nbformat.read(executed, as_version=4)
    content.metadata.get("papermill", {}).update(
        input_path=notebook.name, output_path=notebook.name
    )
    text = without_paths(nbformat.writes(content), run_folder, *given)
    executed.write_text(text, encoding="utf-8")
