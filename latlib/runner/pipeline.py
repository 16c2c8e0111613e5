"""Runs the notebooks of a profile in order and ends in one report: what `./run_all.sh` calls.

    python -m latlib.runner.pipeline [--profile NAME|FILE] [--only 03,05] [--out DIR] [--fresh]
        [--unchecked] [--grace SECONDS]
    python -m latlib.runner.pipeline [--profile NAME|FILE] [--out DIR] --check [--json]

1. Read the profile, choose the notebooks, check every parameter that will be injected, and for a
   real model whether all it needs is there (`planning.check`): errors before anything runs.
2. Run each notebook through papermill into `<run>/notebooks/`, stopping at the first that fails.
3. Meanwhile draw one line from `<run>/progress.json`: live on a terminal, every ten seconds
   elsewhere.
4. Export `00_glance.ipynb` to `<run>/glance.html` and `99_report.ipynb` to `<run>/report.html`,
   each when it has run; and have the report so far written there after every other notebook, beside
   the next one (`runner.interim`).

Exit status (`io.progress.ExitStatus`): 0 done; 1 a notebook failed (the last lines say which cell,
and where the log is); 2 a wrong option or setting; 3 something a run needs is missing; 75 stopped
by a signal with everything saved: the same command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latlib.config.profile import find_share, load_profile, run_folder
from latlib.config.sections import ProfileError
from latlib.experiment.layout import BEGAN, Layout
from latlib.experiment.record import PROFILE
from latlib.io import manifest, progress
from latlib.io.files import SET_ASIDE, discard, set_aside
from latlib.io.progress import ExitStatus
from latlib.runner.interim import GLANCE, Interim
from latlib.runner.kernel import GRACE_S, Kernel

if TYPE_CHECKING:
    from latlib.runner.notebooks import Failure

REDRAW_S, LINE_S = 0.25, 10.0  # on a terminal; elsewhere
DAY_S = 86_400
REPORT = "99_report"
ON_REQUEST = ("08_your_model",)  # of no run of the suite: about a model of one's own
PAGES = {"00_glance": GLANCE, REPORT: "report.html"}  # notebook -> what it becomes
# what a line of a parameters cell assigns to, annotated or not
_ASSIGNED = re.compile(r"^(\w+)\s*(?::[^=]+)?=(?!=)", re.MULTILINE)


class UsageError(ValueError):
    """Something on the command line cannot be used; the message says what and the fix."""


# ---- which notebooks


def find_notebooks(folder: Path) -> list[Path]:
    """The numbered notebooks NN_name.ipynb of `folder`, in order."""
    found = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not found:
        raise UsageError(f"no notebook NN_name.ipynb in {folder}")
    return found


def choose(notebooks: list[Path], only: list[str]) -> list[Path]:
    """The notebooks named by `only` (`03`, `3`, `03_lat_training` or `lat_training`; commas
    allowed), in run order; where it names none, all but those on request.
    """
    if not only:
        return [notebook for notebook in notebooks if notebook.stem not in ON_REQUEST]
    words = re.findall(r"[^,\s]+", ",".join(only))
    if not words:
        raise UsageError("--only names no notebook: give a number such as 03")
    chosen = set()
    for word in words:
        name = word.removesuffix(".ipynb")
        hits = {n for n in notebooks if name in (n.stem, n.stem[3:]) or name.zfill(2) == n.stem[:2]}
        if not hits:
            there = ", ".join(n.stem for n in notebooks)
            raise UsageError(f"--only {word}: no such notebook; there are {there}")
        chosen |= hits
    return sorted(chosen)


def check_parameters(notebook: Path, names: list[str]) -> None:
    """Raise UsageError unless the notebook's cell tagged `parameters` sets every one of `names`.

    papermill itself only warns about a parameter that does not exist, and the notebook runs with
    its default.
    """
    import nbformat

    known = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            known += _ASSIGNED.findall(cell.source)
    if not known:
        raise UsageError(
            f"{notebook.name} has no parameters: tag the cell that sets {', '.join(names)}"
            " 'parameters'"
        )
    if missing := [name for name in names if name not in known]:
        raise UsageError(
            f"{notebook.name}: parameter {missing[0]!r} is not in its cell tagged 'parameters',"
            f" which has {', '.join(known)}: add it there with a default"
        )


# ---- an empty run folder


# What a run leaves beside what its manifest lists: of what is unfinished, and of W&B.
_UNFINISHED = re.compile(
    r"progress\.json|STOP|logs/[^/]+\.log|logs/\.job-\d+\.json|metrics/[^/]+-seed\d+\.jsonl"
    r"|models/\.[^/]+\.checkpoints/\.?step-[^/]+|models/\.plain-[^/]+\.pt"
    r"|notebooks/\.unfinished/[^/]+\.ipynb|notebooks/[^/]+\.failed\.ipynb|wandb/.+"
    r"|data/\.partial\.json|results/\.unfinished/.+"
    r"|(.+/)?\.[^/]+\.[0-9a-f]{32}(/.+)?"  # written aside, see `io.files.aside`
)
# Tell that a folder is a run's, and with which settings: the last to go.
_LAST = (PROFILE, BEGAN, manifest.NAME)


def check_run_folder(folder: Path) -> None:
    """Raise UsageError where `folder` holds things and no run has begun there."""
    strange = sorted(entry.name for entry in folder.glob("*") if entry.name != ".lock")
    if strange and manifest.NAME not in strange:
        raise UsageError(
            f"--fresh: {folder} is no run folder, or of a version before 0.2.0 (it has no"
            f" {manifest.NAME} but {', '.join(strange[:3])}): empty it yourself"
        )


def empty_run_folder(folder: Path) -> None:
    """Delete what a run made in `folder`, after `check_run_folder`. What it did not make, or what
    was changed since, is set aside.
    """
    check_run_folder(folder)
    kept = (*_LAST, ".lock", SET_ASIDE)
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in kept:
            continue
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):  # it holds something still
                path.rmdir()
        elif _UNFINISHED.fullmatch(name) or (path.is_file() and manifest.is_ours(folder, path)):
            path.unlink()
    for entry in folder.glob("*"):
        if entry.name not in kept:
            set_aside(folder, entry, "holds what no run made")
    for name in _LAST[:-1]:
        discard(folder / name)
    (folder / manifest.NAME).unlink(missing_ok=True)


def _agreed(folder: Path) -> bool:
    """Whether finished work may be deleted: asked where somebody sits at a terminal."""
    made = []
    for name in manifest.listed(folder):
        if name.startswith(("models/", "results/")) and (folder / name).is_file():
            made.append(name)
    if not made or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    question = f"--fresh deletes {len(made)} files of models and results in {folder}."
    answer = input(f"{question} Go on? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


# ---- the line about the notebook at work


class LiveLine(threading.Thread):
    """Draws the state of one notebook until it is closed, and says once where the report so far
    is."""

    def __init__(self, name: str, kernel: Kernel, interim: Interim) -> None:
        super().__init__(daemon=True)
        self.notebook, self.kernel, self.interim = name, kernel, interim
        self.terminal = sys.stdout.isatty()
        self.started = time.monotonic()
        self._closed = threading.Event()

    def run(self) -> None:
        """Draw, and draw again."""
        while not self._closed.wait(REDRAW_S if self.terminal else LINE_S):
            self._say_news()
            record = progress.read(self.kernel.run_folder)
            text = _line(self.notebook, self.started, self.kernel, record)
            width = shutil.get_terminal_size((80, 24)).columns
            self._draw(text[: width - 1] if self.terminal else text + "\n")

    def close(self, outcome: str) -> None:
        """Replace the line by the notebook's summary."""
        self._closed.set()
        self.join()
        self._say_news()
        self._draw(f"{_timed(self.notebook, self.started)}  {outcome}\n")

    def _say_news(self) -> None:
        if news := self.interim.news():
            self._draw(f"{news}\n")

    def _draw(self, text: str) -> None:
        clear = "\r\x1b[2K" if self.terminal else ""
        print(clear + text, end="", flush=True)


def _timed(name: str, started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{name:<20} {minutes:3d}:{seconds:02d}"


def _line(name: str, started: float, kernel: Kernel, record: dict[str, Any] | None) -> str:
    """One line on where a notebook is: time, cell, and the record of progress.json where there is
    one.
    """
    text = _timed(name, started)
    if kernel.cells:
        text += f"  cell {kernel.cell}/{kernel.cells}"
    if kernel.stopping:
        text += "  stopping"
    elif record:
        step, total = record["step"], record["total"]
        bar = "#" * round(12 * min(1.0, step / max(total, 1)))
        text += f"  {record['label']} [{bar:-<12}] {progress.how_far(record)} {record['detail']}"
    return text.rstrip()


# ---- running them


def run_all(notebooks: list[Path], parameters: dict[str, Any], kernel: Kernel) -> ExitStatus:
    """Run `notebooks` into the kernel's run folder, and refresh the pages of those that have one;
    that of the report beside every other notebook, too.
    """
    for notebook in notebooks:
        check_parameters(notebook, list(parameters))
    report = next((notebook for notebook in notebooks if notebook.stem == REPORT), None)
    interim = Interim(report, kernel.run_folder / PAGES[REPORT], parameters)
    try:
        return _run_each(notebooks, parameters, kernel, interim)
    finally:
        interim.stop()


def _run_each(
    notebooks: list[Path], parameters: dict[str, Any], kernel: Kernel, interim: Interim
) -> ExitStatus:
    started = time.monotonic()
    pages = []
    for number, notebook in enumerate(notebooks, start=1):
        if notebook == interim.notebook:
            interim.stop()
        failure = None if kernel.stopping else _run(notebook, parameters, kernel, interim)
        if kernel.stopping:
            print("\nstopped; what was finished is saved: continue with the same command")
            return ExitStatus.STOPPED
        if failure is not None:
            print(f"\n{failure}", flush=True)
            return ExitStatus.FAILED
        if page := PAGES.get(notebook.stem):
            pages.append(kernel.run_folder / page)
            if not _export(kernel.run_folder / "notebooks" / notebook.name, pages[-1]):
                return ExitStatus.FAILED
        interim.refresh(_not_run(notebooks[number:], kernel.run_folder))
    print(f"{_timed('all', started)}  ok", flush=True)
    for written in pages:
        print(f"\nreport: {written}", flush=True)
    return ExitStatus.DONE


def _not_run(notebooks: list[Path], folder: Path) -> list[str]:
    """Those that this run has never finished, without its report."""
    done = {REPORT, *(path.stem for path in (folder / "notebooks").glob("*.ipynb"))}
    return [notebook.stem for notebook in notebooks if notebook.stem not in done]


def _run(
    notebook: Path, parameters: dict[str, Any], kernel: Kernel, interim: Interim
) -> Failure | None:
    """Run one notebook under its line."""
    from latlib.runner.notebooks import run_notebook  # papermill: not before the options are right

    folder = kernel.run_folder
    (folder / "progress.json").unlink(missing_ok=True)
    line = LiveLine(notebook.stem, kernel, interim)
    line.start()
    failure = run_notebook(notebook, folder, parameters, kernel)
    outcome = "ok"
    if failure is not None:
        kernel.stopping |= (folder / "STOP").exists()  # someone may put it there by hand
        outcome = "stopped" if kernel.stopping else "FAILED"
    line.close(outcome)
    return failure


def _export(executed: Path, target: Path) -> bool:
    """Write the page of an executed notebook; False where it cannot be one."""
    from latlib.report.html import ExportError, export_html

    try:
        export_html(executed, target)
    except (ExportError, OSError) as error:
        print(f"\nfailed: {target.name} from {executed}\n{error}", flush=True)
        return False
    return True


def _forget_stop(folder: Path) -> None:
    """Remove what a run leaves that was stopped or killed; left there, a STOP would stop the next
    notebook someone opens by hand.
    """
    (folder / "STOP").unlink(missing_ok=True)
    shutil.rmtree(folder / "notebooks" / ".unfinished", ignore_errors=True)


# ---- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m latlib.runner.pipeline", description="Run the notebooks.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--profile", default="tiny", help="name, or path of a YAML file (default: tiny)")
    add("--only", action="append", default=[], help="notebooks by number or name, with commas")
    add("--out", help="run folder (default: runs/<profile>)")
    add(
        "--fresh", action="store_true", help="delete what was made in the run folder and start anew"
    )
    add("--check", action="store_true", help="say what a run needs and lacks: exit status 0, or 3")
    add("--grace", type=float, default=GRACE_S, help="seconds that a stopped run has to save")
    add("--unchecked", action="store_true", help="run a real model whatever --check misses")
    add("--json", action="store_true", help="with --check: print JSON")
    add("--notebooks", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    os.environ["LATLIB_BATCH"] = "1"  # kernels draw no bars: the line here does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # processes share cores
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # one warning less in every log
    try:
        return _main(options)
    except (ProfileError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    except OSError as error:  # of the folder that is written to: a full disk, say
        print(f"failed: {error}; what was finished is kept: run again once that is put right")
        return ExitStatus.FAILED


def _main(options: argparse.Namespace) -> ExitStatus:
    profile = load_profile(options.profile)
    layout = Layout(profile, run_folder(profile.name, options.out))
    if options.check or options.json:
        if options.fresh or options.only or not options.check:
            raise UsageError(
                "--check goes with --profile, --out and --json, and --json with --check only"
            )
        from latlib.planning.check import main as check  # with torch, which takes seconds

        return check(profile, layout.folder, options.json)
    if not 0 < options.grace <= DAY_S:
        raise UsageError(f"--grace {options.grace:g}: give seconds above 0, at most {DAY_S}")
    there = find_notebooks(options.notebooks or find_share("notebooks"))
    notebooks = choose(there, options.only or list(profile.notebooks))
    if profile.model.source != "world" and not options.unchecked:
        from latlib.planning.check import lacking  # as above

        if lacks := lacking(profile, layout.folder):
            print(f"{lacks}\nprovide it, or run anyway with --unchecked", file=sys.stderr)
            return ExitStatus.INCOMPLETE
    if options.fresh:
        check_run_folder(layout.folder)  # before even a lock is put there
        if not _agreed(layout.folder):
            raise UsageError("nothing was deleted: leave out --fresh to go on with what is there")
    with layout.locked():
        return _run_in(layout, notebooks, options)


def _run_in(layout: Layout, notebooks: list[Path], options: argparse.Namespace) -> ExitStatus:
    """Run the notebooks in a folder that is held."""
    folder = layout.folder
    if options.fresh:
        empty_run_folder(folder)
    layout.claim()
    _forget_stop(folder)
    print(f"profile {layout.profile.name}: {len(notebooks)} notebook(s) into {folder}", flush=True)
    parameters = {"profile": options.profile}
    if Path(options.profile).suffix in (".yaml", ".yml"):
        parameters["profile"] = str(Path(options.profile).resolve())
    # the default is found again by the notebook, and an executed notebook names no one's disk
    if options.out:
        parameters["out"] = str(folder)
    kernel = Kernel(folder, options.grace)
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with progress.handled(ending, lambda *_: kernel.stop()):
        try:
            return run_all(notebooks, parameters, kernel)
        finally:
            _forget_stop(folder)


if __name__ == "__main__":
    sys.exit(main())
