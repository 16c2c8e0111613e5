"""The report so far, written after every notebook while the run goes on.

    python -m latlib.runner.interim NOTEBOOK PAGE PARAMETERS

1. `Interim`, which the pipeline has, starts this process when a notebook has run, and tells it by a
   line on its standard input what has not run yet. Lines that come while it writes are one report
   more.
2. The process has a low priority and one thread. It executes the report's notebook in itself,
   without a kernel or workers, and replaces the page when that is whole. An error goes to the log,
   and leaves the page as it was.
3. It ends when its standard input does: when the run's own report is due, or with the pipeline,
   however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from latlib.io.files import without_paths, write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode

LOG = "report_so_far.log"  # in the run's logs
GLANCE = "glance.html"  # what notebook 00 becomes
NICENESS = 5  # a third of what a worker gets that wants as much: our choice
END_S = 2.0  # to take away what is half written
STOP_S = 5.0  # then it is killed
ALONE = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}


class Interim:
    """The process, as the pipeline sees it. notebook: the report's; None for a run that has none.
    page: what is written."""

    def __init__(self, notebook: Path | None, page: Path, parameters: Mapping[str, Any]) -> None:
        self.notebook, self.page = notebook, page
        self._parameters = dict(parameters)
        self._process: subprocess.Popen[str] | None = None
        self._before = _written(page)
        self._told = False

    def refresh(self, lacking: Sequence[str]) -> None:
        """Have the report written of what is there. lacking: the notebooks that have not run; where
        all have, in an earlier sitting, there is nothing new to report."""
        if self.notebook is None or not lacking:
            return
        if self._process is None or self._process.poll() is not None:
            self._process = self._started(self.notebook)
        assert self._process.stdin is not None
        with suppress(OSError):  # it has died: the next notebook starts another
            self._process.stdin.write(" ".join(lacking) + "\n")
            self._process.stdin.flush()

    def _started(self, notebook: Path) -> subprocess.Popen[str]:
        log = self.page.parent / "logs" / LOG
        log.parent.mkdir(parents=True, exist_ok=True)
        given = [str(notebook), str(self.page), json.dumps(self._parameters)]
        with log.open("a", encoding="utf-8") as said:
            return subprocess.Popen(
                [sys.executable, "-m", __name__, *given],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                text=True,
                cwd=notebook.parent,  # as a kernel
                env=os.environ | ALONE,
            )

    def news(self) -> str:
        """Where the first report of this run can be read, said once; '' before and after that."""
        if self._told or self._process is None or _written(self.page) == self._before:
            return ""
        self._told = True
        return f"report so far: {self.page}"

    def stop(self) -> None:
        """End the process, with what it is at."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _written(page: Path) -> int:
    """When a page was written; 0 where there is none."""
    try:
        return page.stat().st_mtime_ns
    except OSError:
        return 0


# ---- in the process


def main(arguments: Sequence[str]) -> None:
    """Write a report for what stands on standard input, until that ends."""
    notebook, page, parameters = Path(arguments[0]), Path(arguments[1]), json.loads(arguments[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have switched it off
    os.nice(NICENESS)  # first: threads have their own
    asked: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    with suppress(KeyboardInterrupt):
        while True:
            lacking = asked.get()
            while not asked.empty():
                lacking = asked.get()
            try:
                write_so_far(notebook, page, parameters, lacking.split())
            except Exception:
                traceback.print_exc()


def _listen(asked: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        asked.put(line)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGINT)
    time.sleep(END_S)
    os._exit(1)


def write_so_far(
    notebook: Path, page: Path, parameters: Mapping[str, Any], lacking: Sequence[str]
) -> None:
    """Execute the report's notebook, and write its page, which says at its top what is lacking."""
    import nbformat  # all of these in the process alone

    from latlib.report.html import to_html

    content = nbformat.read(notebook, as_version=4)
    execute(content, parameters)
    names = ", ".join(f"`{name}`" for name in lacking)
    said = (
        f"**Written at {datetime.now():%H:%M}, while the run went on.** Not run yet: {names}. What"
        " they measure is not here; the page is written anew after every notebook."
    )
    if (page.parent / GLANCE).exists():
        said += f" The first look is in [{GLANCE}]({GLANCE})."
    content.cells.insert(1, nbformat.v4.new_markdown_cell(said))
    html = to_html(content, notebook.stem)
    write_text(without_paths(html, page.parent), page)


def execute(content: NotebookNode, parameters: Mapping[str, Any]) -> None:
    """Run the cells of a notebook in this process, and put their outputs into it. Raises what a
    cell raises."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from nbformat.v4 import new_output
    from traitlets.config import Config

    no_history = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell.instance(config=no_history)
    try:
        for cell in content.cells:
            if cell.cell_type != "code":
                continue
            # the trap first: entered by `run_cell`, it would take the outputs from the capture
            with shell.display_trap, capture_output(stderr=False) as said:
                shell.run_cell(cell.source).raise_error()
            if said.stdout:
                cell.outputs.append(new_output("stream", text=said.stdout))
            for shown in said.outputs:
                both = {"data": shown.data, "metadata": shown.metadata}
                cell.outputs.append(new_output("display_data", **both))
            if "parameters" in cell.metadata.get("tags", []):
                shell.push(dict(parameters))
    finally:
        shell.reset(new_session=False)  # until the next one it holds no table


if __name__ == "__main__":
    main(sys.argv[1:])
