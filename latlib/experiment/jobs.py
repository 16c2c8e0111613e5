"""Do jobs side by side: models to be trained, suites to be measured, each in a process of its own.

On a CPU there is one worker per core, on a GPU there is one. Where several processes train one
model together (`latlib.distributed.launch`), a worker has as many cores, or all the GPUs. A single
job runs here. The organism's kernels are so small that a second thread costs more than it brings
(measured: docs/lab-log.md), so it runs on one thread a process; that also makes its results
independent of who works beside whom.

A job waits for the model it stands on. The first error stops everything that has not begun and is
raised with the job's name; what was finished stays finished.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from latlib.config.profile import Profile
from latlib.experiment import fork_server
from latlib.io import progress
from latlib.io.machine import available_cores, keep_freed_memory
from latlib.models import resolve_device

if TYPE_CHECKING:
    from latlib.experiment.run import Run, Spec
    from latlib.redteam.latent import AttackCell

# a model to make (''), or a suite or an attack to measure on it
Job = tuple["Spec", "str | AttackCell"]
MOST_WORKERS = 8  # each holds its own copy of torch, about 0.5 GiB
POLL_SECONDS = 0.3


def worker_count(profile: Profile, jobs: int) -> int:
    """How many jobs are done side by side."""
    together = profile.parallel.processes
    if resolve_device(profile.model.device).type != "cpu":
        return min(jobs, profile.workers or 1) if together == 1 else 1
    return min(jobs, max(1, (profile.workers or min(available_cores(), MOST_WORKERS)) // together))


def threads_for(profile: Profile, processes: int = 1) -> int:
    """Threads of each of so many processes: one for the organism, an equal share of the cores for
    other models.
    """
    return 1 if profile.model.source == "world" else max(1, available_cores() // processes)


def name_of(job: Job) -> str:
    """How a job is called in progress lines and errors."""
    spec, what = job
    return f"{what} of {spec.label} seed {spec.seed}" if what else f"{spec.label} seed {spec.seed}"


def work(run: Run, jobs: Sequence[Job]) -> None:
    """Do all jobs, bases before what is trained on them. Raises the first job's error; `Stopped`
    when asked to stop.
    """
    if not jobs:
        return
    if worker_count(run.profile, len(jobs)) == 1 or len(jobs) == 1:
        for number, job in enumerate(jobs, start=1):
            label = name_of(job) + (f" ({number} of {len(jobs)})" if len(jobs) > 1 else "")
            with progress.Progress(run.folder, label, 1) as bar:
                run.perform(*job, _counter(bar))
        return
    _in_processes(run, list(jobs))


def _counter(bar: progress.Progress):
    def on_step(step: int, total: int, detail: str) -> None:
        bar.total = total
        bar.update(step, detail)

    return on_step


def _in_processes(run: Run, jobs: list[Job]) -> None:
    count = worker_count(run.profile, len(jobs))
    threads = threads_for(run.profile, count)
    # spinning barriers are ruinous on shared cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder, profile = run.folder, run.profile
    waiting, running, done = list(jobs), {}, 0
    pool = ProcessPoolExecutor(
        count, mp_context=fork_server.context(), initializer=_begin, initargs=(threads,)
    )
    try:
        with progress.Progress(
            folder, f"{len(jobs)} jobs, {count} at a time", 100 * len(jobs)
        ) as bar:
            while waiting or running:
                for job in _ready(waiting, list(running.values()))[: count - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(_perform, profile, folder, job)] = job
                finished, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    _result(future, running.pop(future))
                    done += 1
                share, detail = _progress_of(folder, list(running.values()))
                bar.update(int(100 * (done + share)), detail)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for file in (folder / "logs").glob(".job-*.json"):
            file.unlink(missing_ok=True)


def _ready(waiting: list[Job], running: list[Job]) -> list[Job]:
    """Jobs whose base model is neither waiting nor being made."""
    unmade = {
        spec.seed for spec, suite in [*waiting, *running] if spec.method == "base" and not suite
    }
    return [
        (s, suite)
        for s, suite in waiting
        if s.seed not in unmade or (s.method == "base" and not suite)
    ]


def _result(future: Future, job: Job) -> None:
    try:
        future.result()
    except progress.Stopped:
        raise
    except Exception as error:
        error.add_note(f"while working on {name_of(job)}") if hasattr(error, "add_note") else None
        raise


def _begin(threads: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads)


def _perform(profile: Profile, folder: Path, job: Job) -> None:
    from latlib.experiment.run import Run

    label, file, last = name_of(job), _job_file(folder, job), 0.0

    def on_step(step: int, total: int, detail: str) -> None:
        nonlocal last
        if time.monotonic() - last > progress.MIN_INTERVAL_S or step == total:
            last = time.monotonic()
            progress.report(file, label, step, total, detail)

    Run(profile, folder).perform(*job, on_step)
    file.unlink(missing_ok=True)


def _job_file(folder: Path, job: Job) -> Path:
    spec, what = job
    name = what if isinstance(what, str) else what.digest("")
    return folder / "logs" / f".job-{name}-{spec.folder}.json"


def _progress_of(folder: Path, running: list[Job]) -> tuple[float, str]:
    """(jobs' worth of work done by the running jobs, one line about them)"""
    records = [r for job in running if (r := progress.read(_job_file(folder, job)))]
    share = sum(r["step"] / max(r["total"], 1) for r in records)
    return share, " | ".join(f"{r['label']} {r['step']}/{r['total']}" for r in records)
