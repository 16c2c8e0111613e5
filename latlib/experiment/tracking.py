"""Metrics of a training run: always a local JSONL, and Weights & Biases when asked.

1. `Tracker.log(step, **metrics)` appends one JSON line and flushes it: that file is what notebooks
   plot.
2. The same record goes into a queue that a background thread empties into wandb, so training never
   waits for it.
3. Leaving the tracker waits for that thread, at most FINISH_WAIT_S in all, and then goes on without
   it.

wandb is offline by default. Online needs the request in the profile, a key, and a server that
answers within INIT_WAIT_S; otherwise the run is recorded offline and one line says why. A process
that trains several models waits once: after a server that does not answer all are recorded offline,
after a W&B that hangs none are. Whatever
wandb does, the JSONL is whole and nothing is raised. wandb is imported in the background thread,
and only where it is wanted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import netrc
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

import pandas as pd

from latlib.config.sections import TrackingSettings
from latlib.io.files import Json, json_ready, write_text
from latlib.io.messages import in_a_line

# wandb's own limit for making a run online; left alone it takes 100 s without a network
INIT_WAIT_S = 5.0
# with the line it prints and the exit of wandb's service this stays below 15 s
FINISH_WAIT_S = 12.0


class Tracker:
    """Records the metrics of one run.

    path: the JSONL file, as <run>/metrics/<model>.jsonl; wandb writes below <run>/wandb. settings:
    the profile's `tracking` section. name, config: what W&B shows. resume_from: lines of `path`
    with a step >= this are dropped, those below are kept (and repeated to wandb); 0 starts anew.

        with Tracker(path, profile.tracking, "model-seed0", config) as tracker:
            tracker.log(1, total=1.2, kl=0.01)
    """

    # of this process, which waits for neither a second time
    _unreachable = ""
    _hangs = False

    def __init__(
        self,
        path: Path,
        settings: TrackingSettings,
        name: str,
        config: Json | None = None,
        resume_from: int = 0,
    ) -> None:
        self.path, self.resume_from = path, resume_from
        self.settings, self.name, self.config = settings, name, config or {}
        self._queue: queue.SimpleQueue[Json | None] = queue.SimpleQueue()
        self._trouble = ""
        # all calls into wandb are made there; a stuck thread must not keep the process alive
        self._mirror = threading.Thread(target=self._copy_to_wandb, daemon=True)

    def __enter__(self) -> Tracker:
        kept = [record for record in _records(self.path) if record["step"] < self.resume_from]
        # not finished, so in no manifest yet
        write_text("".join(map(_line, kept)), self.path, durable=False)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        if self.settings.wandb != "disabled" and not Tracker._hangs:
            self._mirror.start()
        for record in kept:
            self._queue.put(record)
        return self

    def log(self, step: int, **metrics: Any) -> None:
        """Append one record; `step` counts from 0 and never falls. Values: numbers, text, booleans
        or None.
        """
        record = json_ready({"step": step} | metrics)
        self._file.write(_line(record))
        self._file.flush()
        if self._mirror.is_alive():
            self._queue.put(record)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._queue.put(None)
        if self._mirror.is_alive():
            self._mirror.join(FINISH_WAIT_S)
        if self._mirror.is_alive():
            Tracker._hangs = True
            self._trouble = f"W&B did not finish within {FINISH_WAIT_S:.0f} s and is left alone"
        if self._trouble:
            _say(f"{self._trouble}; {self.path.name} is whole")

    def _copy_to_wandb(self) -> None:
        # else leaving can hang for half a minute
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            run = self._start_run(wandb)
            if run is None:
                return
            while (record := self._queue.get()) is not None:
                run.log(dict(record), step=record["step"])
            run.finish()
            wandb.teardown()  # finish() returns before the file is flushed
            # a link to wandb's cache in the user's home
            Path(run.dir, "../logs/debug-core.log").unlink(missing_ok=True)
        except (Exception, SystemExit) as error:
            self._trouble = f"W&B failed ({type(error).__name__}: {in_a_line(error)})"

    def _start_run(self, wandb: Any) -> Any:
        """A wandb run in the mode that works, or None where W&B is disabled."""
        # its log lies in the run's folder, and begins with where that is
        logging.getLogger("wandb").setLevel(logging.WARNING)
        # knows the environment and the user's settings file
        mode, reason = choose_mode(self.settings.wandb, wandb.setup().settings.base_url)
        if mode == "disabled":
            return None
        if mode == "online" and not Tracker._unreachable:
            try:
                return self._init(wandb, mode)
            except Exception as error:
                Tracker._unreachable = f"{type(error).__name__}: {in_a_line(error)}"
        reason = reason or Tracker._unreachable
        if reason:
            _say(f"W&B stays offline: {reason}")
        return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        folder = self.path.parent.parent / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(
            project=self.settings.project,
            entity=self.settings.entity,
            name=self.name,
            id=f"{_digest(self.name)}{time.time_ns():x}",  # so that `find_offline_run` knows it
            config=self.config,
            dir=str(folder),
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
                # no path, program or name of this machine or of whoever uses it
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
                notebook_name=self.name,  # otherwise it asks the Jupyter server over HTTP
            ),
        )


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
    if not _has_key(urlsplit(base_url).hostname or ""):
        return "offline", "no W&B key was found: run `wandb login`"
    return "online", ""


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _say(line: str) -> None:
    print(f"tracking: {line}", file=sys.stderr, flush=True)


# ---- what was recorded


def _line(record: Json) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _records(path: Path) -> list[Json]:
    """The whole records of a JSONL file; a last line cut short by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if line.endswith("\n"):
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error}); delete the file and run again"
                ) from None
    return records


def read_metrics(path: Path) -> pd.DataFrame:
    """The metrics of one JSONL file: a row a record, a column a metric, in the order they were
    logged.

    Raises FileNotFoundError where there is no such file, ValueError where a line other than the
    last is broken.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}: the run that writes them has not started")
    return pd.DataFrame(_records(path))


def read_offline_run(run_dir: Path) -> pd.DataFrame:
    """The history of an offline wandb run, as `read_metrics` gives it (wandb's own `_...` columns
    left out).

    run_dir: a folder `offline-run-<date>_<id>`. Raises RuntimeError where wandb cannot read it.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_dir)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        raise RuntimeError(f"wandb cannot read {run_dir}: {answer.stderr.strip()}")
    rows = []
    for record in map(json.loads, answer.stdout.splitlines()):
        if record.get("type") == "history":
            item = record["history"]["item"]
            rows.append({name: v for name, v in item.items() if not name.startswith("_")})
    return pd.DataFrame(rows)


def find_offline_run(folder: Path, name: str) -> Path | None:
    """The newest offline wandb run called `name` in a run's folder `wandb`, or None where there is
    none.

    A resumed training makes a second run that repeats the first, so the newest is whole.
    """
    runs = folder.glob(f"wandb/offline-run-*-{_digest(name)}*")
    return max(runs, default=None)  # their names sort by time


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]
