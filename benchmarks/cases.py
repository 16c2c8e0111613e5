"""What the cases of `reliability.py` share: their registry, a small night of work, and processes
that can be found and killed whatever became of their parents.

A case is a function under `@case(kind, injected)`: it puts its fault into a real run, asserts what
must hold, and returns what was seen. Its name is the function's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import nbformat
import psutil
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from latlib.config.profile import find_share
from latlib.io import manifest
from latlib.io.files import write_text

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
ORPHANS_S = 10.0  # nobody may be left after so long
MARK = "LATLIB_RELIABILITY"  # environment: by it all processes of a command are found
SITE = f"import sys\nsys.path.append({str(BENCHMARKS)!r})\nimport injections\n"

PARAMETERS = "profile = 'smoke'\nout = None"
NIGHT = {
    "01_train": (
        "from latlib import Run\nrun = Run(profile, out)",
        "run.ensure([(method, 0) for method in run.profile.methods])",
        "run.measure([((method, 0), 'audit') for method in run.profile.methods])",
        "run.find_geometry([(run.profile.main, 0)])\nnorms = run.norms(0)\n"
        "rates = {m: run.metrics(m)['total'].iloc[-1] for m in run.profile.methods}\n"
        "run.save_result('losses', rates)",
    ),
    "99_report": (
        "from latlib.report.evidence import Evidence\nevidence = Evidence.load(out)",
        "print(evidence.rows.groupby(['method', 'encoding', 'outcome']).size().to_string())",
    ),
}
# what the smoke profile is changed to: two methods, one seed, two workers, no more than is needed
SMALL = {
    "name": "night",
    "seeds": [0],
    "workers": 2,
    "sweep": {},
    "evaluation.prompts": 6,
    "evaluation.further_encodings": [],
    "evaluation.pairs": 8,
    "evaluation.max_new_tokens": 8,
}


@dataclass(frozen=True)
class Case:
    """A fault. kind: the page's section. injected: in words. run: see the module's docstring."""

    name: str
    kind: str
    injected: str
    run: Callable[[Place], str]


CASES: dict[str, Case] = {}


def case(kind: str, injected: str) -> Callable[[Callable[[Place], str]], Callable[[Place], str]]:
    """Register a case under its function's name."""

    def register(function: Callable[[Place], str]) -> Callable[[Place], str]:
        add(function.__name__, kind, injected, function)
        return function

    return register


def add(name: str, kind: str, injected: str, run: Callable[[Place], str]) -> None:
    """Register a case under a name of its own."""
    name = name.strip("_").replace("_", " ")
    assert name not in CASES, name
    CASES[name] = Case(name, kind, injected, run)


# ---- commands


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float

    @property
    def line(self) -> str:
        """What the user reads last: the failure, or the error, as a line."""
        failed = self.out.rfind("failed:")
        text = self.out[failed:] if failed >= 0 and self.status == 1 else self.err or self.out
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("error:", "failed:", "missing:"))]
        start = lines.index(errors[0]) if errors else max(0, len(lines) - 1)
        return "; ".join(lines[start : start + 3])

    def ended(self, status: int, *words: str) -> str:
        """'exit <status>: <what was said>', which must be `status` with all `words` in it, and no
        traceback."""
        said = self.out + self.err
        assert self.status == status, f"exit {self.status}, not {status}: {said[-1500:]}"
        assert "Traceback" not in said, said[-1500:]
        for word in words:
            assert word in said, f"{word!r} is not said: {said[-1500:]}"
        return f"exit {status}: {self.line}"


@dataclass
class Command:
    """A command at work, found again by a mark in the environment of all its processes."""

    arguments: Sequence[str]
    folder: Path
    environment: dict[str, str]
    limits: Callable[[], None] | None = None
    mark: str = field(default_factory=lambda: uuid4().hex)
    seconds: dict[int, float] = field(default_factory=dict)  # of the processor, by process

    def start(self) -> Command:
        """In a group of its own."""
        self.began = time.monotonic()
        self.files = [self.folder / f"{self.mark}.{name}" for name in ("out", "err")]
        handles = [file.open("wb") for file in self.files]
        self.process = subprocess.Popen(
            self.arguments,
            cwd=self.folder,
            env=self.environment | {MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=handles[0],
            stderr=handles[1],
            preexec_fn=self.limits,
            start_new_session=True,
        )
        for handle in handles:
            handle.close()
        return self

    def wait(self, seconds: float = 600) -> Done:
        """Until it ends."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"not done after {seconds:.0f} s") from None
        took = time.monotonic() - self.began
        out, err = (file.read_text("utf-8", errors="replace") for file in self.files)
        return Done(status, out, err, took)

    @property
    def running(self) -> bool:
        """Whether the first process is."""
        return self.process.poll() is None

    def spent(self) -> float:
        """Seconds of the processor that all processes have had, as far as they were seen."""
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self.process.pid)
            for process in (first, *first.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self.seconds[process.pid] = times.user + times.system
        return sum(self.seconds.values())

    def alive(self) -> list[psutil.Process]:
        """All processes of the command."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_all(self) -> int:
        """SIGKILL to every process, and to those that began meanwhile; how many there were."""
        killed = set()
        while left := self.alive():
            for process in left:
                killed.add(process.pid)
                process.send_signal(signal.SIGKILL)
            psutil.wait_procs(left, timeout=2)
        self.process.wait()
        return len(killed)

    def nobody_is_left(self) -> None:
        """Within `ORPHANS_S`. Raises AssertionError, after the orphans were killed."""
        until = time.monotonic() + ORPHANS_S
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.2)
        names = [" ".join(process.cmdline())[:80] for process in left if process.is_running()]
        if left:
            self.kill_all()
        assert not names, f"left after {ORPHANS_S:.0f} s: {names}"


# ---- where a case works


@dataclass
class Place:
    """An empty folder of one case. shared: what cases have in common is made there once. cells: of
    the notebooks that are run; {} for the repository's own."""

    folder: Path
    shared: Path
    cells: dict[str, Sequence[str]] = field(default_factory=lambda: NIGHT)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def profile(self, **changes: Any) -> Path:
        """The night's profile, with changes by dotted name (`__` for a dot); None leaves out."""
        file = self.folder / "night.yaml"
        file.parent.mkdir(exist_ok=True)
        dotted = {name.replace("__", "."): value for name, value in changes.items()}
        file.write_text(yaml.safe_dump(changed(dotted)), encoding="utf-8")
        return file

    def notebooks(self) -> Path:
        """A folder of the notebooks `cells`, name -> sources."""
        folder = self.folder / "notebooks"
        folder.mkdir(exist_ok=True)
        for name, sources in self.cells.items():
            cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
            cells += [new_code_cell(source) for source in sources]
            for number, cell in enumerate(cells):
                cell["id"] = f"{name[:2]}-{number}"
            nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
        return folder

    def environment(self, inject: str = "", **more: str) -> dict[str, str]:
        """Of a command that has no network and no account, with a fault in its processes."""
        found = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(spoiled_site(self.shared)), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "LATLIB_INJECT_FLAG": str(self.flag),
            "HF_HOME": str(self.folder / "hub"),
        }
        found.pop("LATLIB_INJECT", None)
        found.pop("LATLIB_HELD", None)
        if inject:
            self.flag.unlink(missing_ok=True)
            found["LATLIB_INJECT"] = inject
        return found | more

    @property
    def flag(self) -> Path:
        """There as soon as the fault has happened."""
        return self.folder / "flag"

    def command(
        self, *options: str, inject: str = "", limits: Callable[[], None] | None = None, **more: str
    ) -> Command:
        """`./run_all.sh` without its shell, on the night's notebooks."""
        if not (self.folder / "night.yaml").exists():
            self.profile()
        fixed = ["--profile", str(self.folder / "night.yaml"), "--out", str(self.run)]
        if self.cells:
            fixed += ["--notebooks", str(self.notebooks())]
        module = [sys.executable, "-m", "latlib.runner.pipeline"]
        environment = self.environment(inject, **more)
        return Command([*module, *fixed, *options], self.folder, environment, limits)

    def pipeline(self, *options: str, **how: Any) -> Done:
        """The same, to its end."""
        return self.command(*options, **how).start().wait()

    def python(self, code: str, *arguments: str, inject: str = "", **more: str) -> Done:
        """A script of the user's."""
        command = [sys.executable, "-c", code, *arguments]
        return Command(command, self.folder, self.environment(inject, **more)).start().wait()

    def made(self) -> Path:
        """The run folder, with the finished night in it."""
        shutil.copytree(self.reference(), self.run)
        shutil.copy(self.shared / "night" / "night.yaml", self.folder / "night.yaml")
        return self.run

    def reference(self) -> Path:
        """The run folder of a night that nothing disturbed."""
        return reference(self.shared)

    def goes_on(self, inject: str = "") -> str:
        """The same command again: it must end well, and with the night's own results."""
        done = self.pipeline(inject=inject)
        done.ended(0)
        same_results(self.reference(), self.run)
        verified(self.run)
        return "the same command again: every file bit for bit"

    def said(self, text: str) -> str:
        """A text without this place's paths."""
        for folder, name in ((self.folder, "."), (self.shared, "shared"), (ROOT, "latlib")):
            text = text.replace(f"{folder}/", "" if name == "." else f"{name}/")
            text = text.replace(str(folder), name)
        return text


def changed(dotted: dict[str, Any]) -> dict[str, Any]:
    """The night's profile as plain values, with changes by dotted name."""
    tree = yaml.safe_load((find_share("profiles") / "smoke.yaml").read_text("utf-8"))
    tree["methods"] = {name: tree["methods"][name] for name in ("ssft", "lat")}
    tree["roles"] = {"undefended": "ssft", "main": "lat"}
    for name, value in (SMALL | dotted).items():
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return tree


_making = threading.Lock()


def spoiled_site(shared: Path) -> Path:
    """A folder for PYTHONPATH, with which Python starts with the injections."""
    file = shared / "site" / "sitecustomize.py"
    if not file.exists():  # written whole: another case may start meanwhile
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(SITE, file, durable=False)
    return file.parent


def reference(shared: Path) -> Path:
    """The undisturbed night's run folder; made where it is not there."""
    place = Place(shared / "night", shared)
    with _making:
        seconds = shared / "seconds"
        if not seconds.exists():
            shutil.rmtree(place.folder, ignore_errors=True)
            place.folder.mkdir(parents=True)
            command = place.command().start()
            while command.running:
                spent = command.spent()
                time.sleep(0.1)
            command.wait().ended(0, "report:")
            seconds.write_text(f"{spent}", encoding="utf-8")
    return place.run


# ---- results


def same_results(first: Path, second: Path) -> None:
    """Every file of models, metrics, results and report of two runs is the same to the bit, but for
    the seconds that something took. Raises AssertionError naming what is not."""
    kept, found = results(first), results(second)
    assert kept, "no results"
    assert kept.keys() == found.keys(), f"not in both: {sorted(kept.keys() ^ found.keys())}"
    other = [name for name, content in kept.items() if found[name] != content]
    assert not other, f"not the same: {other}"


def results(run: Path) -> dict[str, Any]:
    """file -> its content, without seconds."""
    found: dict[str, Any] = {}
    for folder in ("models", "metrics", "results"):
        for file in manifest.files_below(run / folder):
            name = file.relative_to(run).as_posix()
            found[name] = _content(file)
    report = nbformat.read(run / "notebooks" / "99_report.ipynb", as_version=4)
    found["report"] = [cell.get("outputs") for cell in report.cells]
    for outputs in filter(None, found["report"]):
        for output in outputs:
            output.pop("execution_count", None)
    assert (run / "report.html").stat().st_size > 1000, "an empty report.html"
    return found


def _content(file: Path) -> Any:
    if file.name == "README.md":  # a model's card says how many seconds it took
        return None
    if file.suffix not in (".json", ".jsonl"):
        return file.read_bytes()
    records = []
    text = file.read_text("utf-8")
    for line in text.splitlines() if file.suffix == ".jsonl" else [text]:
        record = json.loads(line)
        if isinstance(record, dict):
            record.pop("seconds", None)
        if isinstance(record, dict) and isinstance(record.get("summary"), dict):
            record["summary"].pop("seconds", None)
        records.append(record)
    return records


def verified(run: Path) -> None:
    """Every byte that the manifest lists is as it was written. (The night computes no claims.)"""
    from latlib.verify.__main__ import wrong_files

    wrong = wrong_files(run)
    assert not wrong, wrong


def said_in_logs(run: Path, words: str) -> str:
    """The line with these words in what the notebooks' processes said. Raises AssertionError where
    there is none."""
    for file in sorted((run / "logs").glob("*.log")):
        for line in file.read_text("utf-8", errors="replace").splitlines():
            if words in line:
                return line.strip()
    raise AssertionError(f"{words!r} is in no log")
