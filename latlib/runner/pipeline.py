"""Runs the notebooks of a profile in order and ends in one report: what `./run_all.sh` calls.

    python -m latlib.runner.pipeline [--profile NAME|FILE] [--only 03,05] [--out DIR] [--fresh]
    [--unchecked] python -m latlib.runner.pipeline [--profile NAME|FILE] [--out DIR] --check
    [--json]

1. Read the profile, choose the notebooks, check every parameter that will be injected, and for a
   real model whether all it needs is there (`preflight`): errors before anything runs.
2. Run each notebook through papermill into `<run>/notebooks/`, stopping at the first that fails.
3. Meanwhile draw one line from `<run>/progress.json`: live on a terminal, every ten seconds
   elsewhere.
4. Export `99_report.ipynb` to `<run>/report.html`.

Exit status: 0 done; 1 a notebook failed (the last lines say which cell, and where the log is); 2 a
wrong option or setting; 3 something a run needs is missing; 75 stopped by a signal with everything
saved: the same command continues.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from latlib.config.profile import ProfileError, find_share, load_profile, run_folder
from latlib.experiment.layout import Layout
from latlib.io import progress
from latlib.io.progress import ExitStatus
from latlib.runner.kernel import Kernel

if TYPE_CHECKING:
    from latlib.runner.notebooks import Failure

REDRAW_S, LINE_S = 0.25, 10.0  # on a terminal; elsewhere
# What a run folder may hold; `--fresh` empties no folder that holds anything else and no
# profile.yaml.
RUN_ENTRIES = {"STOP", ".lock", "profile.yaml", "progress.json", "report.html", ".report.html"}
RUN_ENTRIES |= {"models", "metrics", "wandb", "results", "notebooks", "logs"}


class UsageError(ValueError):
    """Something on the command line cannot be used; the message says what and the mend."""


def find_notebooks(folder: Path) -> list[Path]:
    """The numbered notebooks NN_name.ipynb of `folder`, in order."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UsageError(f"no notebook NN_name.ipynb in {folder}")
    return found


def select(notebooks: list[Path], only: list[str]) -> list[Path]:
    """The notebooks named by `only` (`03`, `3`, `03_lat_training` or `lat_training`; commas
    allowed), in run order.
    """
    wanted = [
        word.strip().removesuffix(".ipynb")
        for item in only
        for word in item.split(",")
        if word.strip()
    ]
    if only and not wanted:
        raise UsageError("--only names no notebook: give a number such as 03")
    chosen = set()
    for word in wanted:
        number = word.zfill(2) if word.isdigit() else None
        hits = [n for n in notebooks if word in (n.stem, n.stem[3:]) or number == n.stem[:2]]
        if not hits:
            raise UsageError(
                f"--only {word}: no such notebook; there are {', '.join(n.stem for n in notebooks)}"
            )
        chosen.update(hits)
    return [n for n in notebooks if n in chosen] if wanted else notebooks


def _targets(statement: ast.stmt) -> list[ast.expr]:
    """What an assignment, annotated or not, assigns to."""
    if isinstance(statement, ast.Assign):
        return statement.targets
    return (
        [statement.target]
        if isinstance(statement, ast.AnnAssign) and statement.value is not None
        else []
    )


def check_parameters(notebook: Path, names: list[str]) -> None:
    """Raise UsageError unless the notebook's cell tagged `parameters` sets every one of `names`.

    papermill itself only warns about a parameter that does not exist, and the notebook runs with
    its default.
    """
    import nbformat

    known = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        # read as code: a notebook need not name a kernel
        if "parameters" in cell.metadata.get("tags", []):
            for statement in ast.parse(cell.source).body:
                known += [t.id for t in _targets(statement) if isinstance(t, ast.Name)]
    if not known:
        raise UsageError(
            f"{notebook.name} has no parameters: tag the cell that sets {', '.join(names)}"
            " 'parameters'"
        )
    for name in names:
        if name not in known:
            raise UsageError(
                f"{notebook.name}: parameter {name!r} is not in its cell tagged 'parameters', which"
                f" has {', '.join(known)}: add it there with a default"
            )


def check_run_folder(folder: Path) -> None:
    """Raise UsageError where `folder` holds things no run has put there: `--fresh` would delete
    them.
    """
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if "profile.yaml" not in entries and not entries <= RUN_ENTRIES:
        strange = ", ".join(sorted(entries - RUN_ENTRIES)[:3])
        raise UsageError(
            f"--fresh: {folder} is not a run folder (it has no profile.yaml but {strange}): empty"
            " it yourself"
        )


def empty_run_folder(folder: Path) -> None:
    """Delete what a run left in `folder`, after `check_run_folder`."""
    check_run_folder(folder)
    for entry in folder.iterdir():
        if entry.name == ".lock":
            continue  # held by this process
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _line(name: str, started: float, kernel: Kernel, record: dict[str, Any] | None) -> str:
    """One line on where a notebook is: time, cell, and the record of progress.json where there is
    one.
    """
    parts = [f"{name:<20} {_clock(time.monotonic() - started):>6}"]
    if kernel.cells:
        parts.append(f"cell {kernel.cell}/{kernel.cells}")
    if kernel.stopping:
        parts.append("stopping")
    elif record:
        share = min(1.0, record["step"] / record["total"]) if record["total"] > 0 else 0.0
        bar = "#" * round(12 * share)
        parts.append(
            f"{record['label']} [{bar:-<12}] {record['step']}/{record['total']} {record['detail']}"
        )
    return "  ".join(parts).rstrip()


class LiveLine(threading.Thread):
    """Draws the state of one notebook until it is closed."""

    def __init__(self, name: str, folder: Path, kernel: Kernel, terminal: bool) -> None:
        super().__init__(daemon=True)
        self.notebook, self.folder, self.kernel, self.terminal = name, folder, kernel, terminal
        self.started = time.monotonic()
        self._closed = threading.Event()

    def run(self) -> None:
        while not self._closed.wait(REDRAW_S if self.terminal else LINE_S):
            text = _line(
                self.notebook,
                self.started,
                self.kernel,
                progress.read(self.folder / "progress.json"),
            )
            if self.terminal:
                width = shutil.get_terminal_size((80, 24)).columns
                print("\r\x1b[2K" + text[: width - 1], end="", flush=True)
            else:
                print(text, flush=True)

    def close(self, outcome: str) -> None:
        """Replace the line by the notebook's summary."""
        self._closed.set()
        self.join()
        clear = "\r\x1b[2K" if self.terminal else ""
        print(
            f"{clear}{self.notebook:<20} {_clock(time.monotonic() - self.started):>6}  {outcome}",
            flush=True,
        )


def _say_failure(failure: Failure) -> None:
    where = (
        f"cell {failure.cell}: {failure.first_line}" if failure.cell else "before the first cell"
    )
    print(
        f"\nfailed: {failure.notebook}, {where}\n  {failure.error}\n  log: {failure.log}",
        flush=True,
    )


def run_all(notebooks: list[Path], folder: Path, parameters: dict[str, Any], kernel: Kernel) -> int:
    """Run `notebooks` into `folder`, then refresh report.html if the report was among them; the
    exit status.
    """
    for notebook in notebooks:
        check_parameters(notebook, list(parameters))
    from latlib.runner.notebooks import run_notebook

    started = time.monotonic()
    for notebook in notebooks:
        failure = None
        if not kernel.stopping:
            (folder / "progress.json").unlink(missing_ok=True)
            line = LiveLine(notebook.stem, folder, kernel, sys.stdout.isatty())
            line.start()
            failure = run_notebook(notebook, folder, parameters, kernel)
            if failure is not None and (folder / "STOP").exists():  # someone put it there by hand
                kernel.stopping = True
            line.close("ok" if failure is None else "stopped" if kernel.stopping else "FAILED")
        if kernel.stopping:
            print(
                "\nstopped; what was finished is saved: continue with the same command", flush=True
            )
            return ExitStatus.STOPPED
        if failure is not None:
            _say_failure(failure)
            return ExitStatus.FAILED
    print(f"{'all':<20} {_clock(time.monotonic() - started):>6}  ok", flush=True)
    report = next((n for n in notebooks if n.stem == "99_report"), None)
    if report is not None:
        from latlib.report.html import ExportError, export_html

        executed = folder / "notebooks" / report.name
        try:
            export_html(executed, folder / "report.html")
        except (ExportError, OSError) as error:
            print(f"\nfailed: report.html from {executed}\n{error}", flush=True)
            return ExitStatus.FAILED
        print(f"\nreport: {folder / 'report.html'}", flush=True)
    return ExitStatus.DONE


@contextlib.contextmanager
def _stopping_on_signals(kernel: Kernel) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = {n: signal.signal(n, lambda *_: kernel.stop()) for n in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m latlib.runner.pipeline", description="Run the notebooks.", allow_abbrev=False
    )
    parser.add_argument(
        "--profile",
        default="tiny",
        help="name of a profile, or path of a YAML file (default: tiny)",
    )
    parser.add_argument(
        "--only", action="append", default=[], help="notebooks by number or name, with commas"
    )
    parser.add_argument("--out", default=None, help="run folder (default: runs/<profile>)")
    parser.add_argument(
        "--fresh", action="store_true", help="delete what the run folder holds and start anew"
    )
    parser.add_argument(
        "--check", action="store_true", help="say what a run needs and lacks: exit status 0, or 3"
    )
    parser.add_argument(
        "--unchecked",
        action="store_true",
        help="run a real model although --check misses something",
    )
    parser.add_argument("--json", action="store_true", help="with --check: print JSON")
    parser.add_argument("--notebooks", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


def _check() -> ModuleType:
    """`latlib.planning.check`, loaded where it is asked for: it needs torch, which takes seconds
    that a run of the made-up world's notebooks need not wait.
    """
    from latlib.planning import check

    return check


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    os.environ["LATLIB_BATCH"] = "1"  # kernels draw no bars: the line here does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # processes share cores
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # one warning less in every log
    try:
        profile = load_profile(options.profile)
        is_file = Path(options.profile).suffix in (".yaml", ".yml")
        parameters = {
            "profile": str(Path(options.profile).resolve()) if is_file else options.profile
        }
        folder = run_folder(profile.name, options.out)
        # the default is found again by the notebook, and an executed notebook names no one's disk
        if options.out:
            parameters["out"] = str(folder)
        if options.check or options.json:
            if options.fresh or options.only or not options.check:
                raise UsageError(
                    "--check goes with --profile, --out and --json, and --json with --check only"
                )
            return _check().main(profile, folder, options.json)
        notebooks = select(
            find_notebooks(options.notebooks or find_share("notebooks")), options.only
        )
        if profile.model.source != "world" and not options.unchecked:
            if lacks := _check().lacking(profile, folder):
                print(f"{lacks}\nmend that, or run anyway with --unchecked", file=sys.stderr)
                return ExitStatus.INCOMPLETE
        if options.fresh:
            check_run_folder(folder)  # before even a lock is put there
        layout = Layout(profile, folder)
        with layout.locked():
            if options.fresh:
                empty_run_folder(folder)
            layout.claim()
            # this and the next: left by a run that was killed
            (folder / "STOP").unlink(missing_ok=True)
            shutil.rmtree(folder / "notebooks" / ".unfinished", ignore_errors=True)
            print(f"profile {profile.name}: {len(notebooks)} notebook(s) into {folder}", flush=True)
            kernel = Kernel(folder)
            with _stopping_on_signals(kernel):
                try:
                    return run_all(notebooks, folder, parameters, kernel)
                finally:  # left there, it would stop the next notebook someone opens by hand
                    (folder / "STOP").unlink(missing_ok=True)
                    shutil.rmtree(folder / "notebooks" / ".unfinished", ignore_errors=True)
    except (ProfileError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.USAGE


if __name__ == "__main__":
    sys.exit(main())
