"""Metrics of a training run: always a local JSONL, and Weights & Biases when asked.

1. `Tracker.log(step, **metrics)` appends one JSON line and flushes it: that file is what notebooks
   plot.
2. The same record goes into a queue that a background thread empties into wandb, so training never
   waits for it.
3. Leaving the tracker waits for that thread, at most FINISH_WAIT_S in all, and then goes on without
   it.

wandb is offline by default. Online needs the request in the profile, a key, and a server that
answers a TCP connection within TCP_WAIT_S; otherwise the run is recorded offline and one line says
why. Whatever wandb does, the JSONL is whole and nothing is raised. wandb is imported in the
background thread, and only where it is wanted.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pandas as pd

from latlib.io.files import write_text

if TYPE_CHECKING:
    from latlib.config.profile import TrackingSettings

TCP_WAIT_S = 3.0  # a reachable server answers in well under a second
# wandb's own limit for making a run online; left alone it takes 100 s without a network
INIT_WAIT_S = 5.0
# with the line it prints and the exit of wandb's service this stays below 15 s
FINISH_WAIT_S = 12.0


def _finite(value: Any) -> Any:
    """A JSON value: NaN and infinities become None, NumPy and torch scalars plain numbers."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _say(line: str) -> None:
    print(f"tracking: {line}", file=sys.stderr, flush=True)


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(urlsplit(base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def choose_mode(wanted: str, base_url: str) -> tuple[str, str]:
    """The wandb mode to use, and why it is not the wanted one ('' where it is).

    WANDB_MODE=offline or =disabled in the environment holds online back, but nothing raises offline
    to online.
    """
    limit = os.environ.get("WANDB_MODE", "")
    if "disabled" in (wanted, limit):
        return "disabled", ""
    if wanted != "online":
        return "offline", ""
    if limit in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE={limit} is set"
    if not _has_key(base_url):
        return "offline", "no W&B key was found: run `wandb login`"
    address = urlsplit(base_url)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=TCP_WAIT_S).close()
    except OSError as error:
        return "offline", f"{address.hostname}:{port} does not answer ({error})"
    return "online", ""


class _Mirror(threading.Thread):
    """Carries records to one wandb run; every call into wandb happens in this thread."""

    # server -> reason: one wait per process, not one per training run
    unreachable: dict[str, str] = {}

    def __init__(
        self, settings: TrackingSettings, name: str, config: dict[str, Any], folder: Path
    ) -> None:
        # a stuck thread must not keep the process alive
        super().__init__(name="wandb mirror", daemon=True)
        self.settings, self.run_name, self.config, self.folder = settings, name, config, folder
        self.records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.trouble = ""
        self.run_dir: Path | None = None

    def _start_run(self, wandb: Any) -> Any:
        # knows the environment and the user's settings file
        base_url = wandb.setup().settings.base_url
        mode, reason = choose_mode(self.settings.wandb, base_url)
        if mode == "online" and base_url in self.unreachable:
            mode, reason = "offline", self.unreachable[base_url]
        if reason:
            _say(f"W&B stays offline: {reason}")
        if mode == "disabled":
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            return self._init(wandb, mode)
        except Exception as error:
            if mode != "online":
                raise
            self.unreachable[base_url] = f"{type(error).__name__}: {error}".splitlines()[0]
            _say(f"W&B stays offline: {self.unreachable[base_url]}")
            return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        return wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            name=self.run_name,
            config=self.config,
            dir=str(self.folder),
            mode=mode,
            reinit="create_new",  # never touches a run the user has open in the same notebook
            settings=wandb.Settings(
                init_timeout=INIT_WAIT_S,
                finish_timeout=INIT_WAIT_S,
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
                x_save_requirements=False,
                notebook_name=self.run_name,  # otherwise it asks the Jupyter server over HTTP
            ),
        )

    def run(self) -> None:
        try:
            import wandb

            run = self._start_run(wandb)
            if run is None:
                return
            self.run_dir = Path(run.dir).parent
            while (record := self.records.get()) is not None:
                run.log(dict(record), step=record["step"])
            run.finish()
            wandb.teardown()  # finish() returns before the file is flushed
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}".splitlines()[0]
        except SystemExit as error:
            self.trouble = f"wandb wanted to exit with {error.code}"


class Tracker:
    """Records the metrics of one run.

    path: the JSONL file. settings: the profile's `tracking` section. name, config: what W&B shows.
    wandb_dir: the folder in which wandb makes its own. resume_from: lines of `path` with a step >=
    this are dropped, those below are kept (and repeated to wandb); 0 starts anew.

        with Tracker(path, profile.tracking, "lat-seed0", config, run / "wandb", resume_from=start)
        as tracker:
            tracker.log(step, total=1.2, kl=0.01)

    `run_dir` is the folder of the wandb run once the tracker is closed, or None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: TrackingSettings,
        name: str,
        config: dict[str, Any] | None = None,
        wandb_dir: str | os.PathLike[str] | None = None,
        resume_from: int = 0,
    ) -> None:
        self.path, self.settings, self.name, self.config = Path(path), settings, name, config or {}
        self.wandb_dir = Path(wandb_dir) if wandb_dir else self.path.parent
        self.resume_from = int(resume_from)
        self.run_dir: Path | None = None
        self._file: Any = None
        self._mirror: _Mirror | None = None

    def __enter__(self) -> Tracker:
        kept = [record for record in _records(self.path) if record["step"] < self.resume_from]
        write_text("".join(json.dumps(record) + "\n" for record in kept), self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if self.settings.wandb != "disabled":
            # else leaving can hang for half a minute
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            os.environ.setdefault("WANDB_SILENT", "true")
            self._mirror = _Mirror(self.settings, self.name, self.config, self.wandb_dir)
            self._mirror.start()
            for record in kept:
                self._mirror.records.put(record)
        return self

    def log(self, step: int, **metrics: Any) -> None:
        """Append one record; `step` counts from 0 and never falls. Values: numbers, text, booleans
        or None.
        """
        record = {"step": int(step)} | {name: _finite(value) for name, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.records.put(record)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._mirror is None:
            return
        self._mirror.records.put(None)
        started = time.monotonic()
        self._mirror.join(FINISH_WAIT_S)
        self.run_dir = self._mirror.run_dir
        if self._mirror.is_alive():
            waited = time.monotonic() - started
            _say(
                f"W&B did not finish within {waited:.0f} s and is left alone; {self.path.name} is"
                " whole"
            )
        elif self._mirror.trouble:
            _say(f"W&B failed ({self._mirror.trouble}); {self.path.name} is whole")


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole records of a JSONL file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}); delete the file and run again"
                ) from None
    return records


def read_metrics(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The metrics of one JSONL file: a row a record, a column a metric, in the order they were
    logged.

    Raises FileNotFoundError where there is no such file, ValueError where a line other than the
    last is broken.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no metrics at {path}: the run that writes them has not started")
    return pd.DataFrame(_records(Path(path)))


def _inspect(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of an offline wandb run. Raises RuntimeError where wandb cannot read it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_dir)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        raise RuntimeError(f"wandb cannot read {run_dir}: {answer.stderr.strip()}")
    return [json.loads(line) for line in answer.stdout.splitlines()]


def read_offline_run(run_dir: str | os.PathLike[str]) -> pd.DataFrame:
    """The history of an offline wandb run, as `read_metrics` gives it (wandb's own `_...` columns
    left out).

    run_dir: a folder `offline-run-<date>_<id>`. Raises RuntimeError where wandb cannot read it.
    """
    items = [
        record["history"]["item"] for record in _inspect(run_dir) if record.get("type") == "history"
    ]
    return pd.DataFrame(
        [{k: v for k, v in item.items() if not k.startswith("_")} for item in items]
    )


def find_offline_run(folder: str | os.PathLike[str], name: str) -> Path | None:
    """The newest offline wandb run called `name` in a tracker's `wandb_dir`, or None where there is
    none.

    A resumed training makes a second run that repeats the first, so the newest is whole.
    """
    files = Path(folder).glob("wandb/offline-run-*/run-*.wandb")
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        if name.encode() not in file.read_bytes():
            continue  # asking wandb takes half a second a run
        if any(
            record.get("run", {}).get("display_name") == name for record in _inspect(file.parent)
        ):
            return file.parent
    return None
