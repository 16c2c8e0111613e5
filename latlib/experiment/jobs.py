"""Do jobs side by side: models to be trained, suites to be measured, each in a process of its own.

`planning.workers` says how many at a time. A single job runs here.

A job waits for the model it stands on. The first error stops everything that has not begun and is
raised with the job's name; what was finished stays finished.

A scheduler sends its signal to every process at once. The server and idle workers pass it by, or
the pool would break and end workers that are saving; a wish to stop that reached this process alone
is handed on as the file STOP.

Workers are forked from a server, a process that has imported everything and uses no thread. The
imports take as long as a notebook's own, so the kernel starts the server before them
(`start_server`), and the two run side by side. For that this module itself loads no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, get_all_start_methods, get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path

from latlib.config.profile import Profile
from latlib.io import progress
from latlib.io.machine import keep_freed_memory
from latlib.io.progress import OnStep
from latlib.planning.workers import threads_for, worker_count

# environment: the run folders that this process, or the one that started it, holds for writing
HELD = "LATLIB_HELD"
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Job:
    """One piece of work.

    name: in progress lines and errors. call: does it; another process may be the one that calls.
    after: the name of another job that must be done before.
    """

    name: str
    call: Callable[[OnStep], None]
    after: str = ""


def prepare_process(threads: int) -> None:
    """Let this process use so many threads from now on, in numpy and scipy too, and keep the memory
    that it frees.
    """
    import torch
    from threadpoolctl import threadpool_limits

    keep_freed_memory()
    threadpool_limits(threads)
    torch.set_num_threads(threads)


def begin_worker(threads: int, folder: Path) -> None:
    """Be a process that works for the one that started it: in the run folder that it holds, and not
    longer than it lives."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ[HELD] = str(folder)
    _heed_signals(True)
    prepare_process(threads)


def _begin_idle_worker(threads: int, folder: Path) -> None:
    begin_worker(threads, folder)
    _heed_signals(False)


def _heed_signals(heeded: bool) -> None:
    """Whether SIGINT and SIGTERM end this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler if heeded else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL if heeded else signal.SIG_IGN)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(profile: Profile, folder: Path, jobs: Sequence[Job]) -> None:
    """Do all jobs of a run folder, those first that others wait for.

    Raises the first job's error; `Stopped` when asked to stop, and in place of KeyboardInterrupt.
    """
    if not jobs:
        return
    count = worker_count(profile, len(jobs))
    try:
        if count > 1:
            _in_processes(folder, jobs, count, threads_for(profile, count))
        else:
            _one_by_one(folder, jobs)
    except KeyboardInterrupt:  # of what has no step to save, here or in a worker
        raise progress.Stopped("interrupted; what was finished is saved") from None


def _one_by_one(folder: Path, jobs: Sequence[Job]) -> None:
    for number, job in enumerate(jobs, start=1):
        label = f"{job.name} ({number} of {len(jobs)})" if len(jobs) > 1 else job.name
        with progress.Progress(folder, label, 1) as bar:
            job.call(bar.on_step)


def _in_processes(folder: Path, jobs: Sequence[Job], count: int, threads: int) -> None:
    # spinning barriers are ruinous on shared cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start_server()
    pool = ProcessPoolExecutor(
        count,
        mp_context=worker_context(),
        initializer=_begin_idle_worker,
        initargs=(threads, folder),
    )
    running: dict[Future[None], Job] = {}
    with _handing_on(folder / "STOP") as stopping:
        try:
            _follow(pool, folder, jobs, count, running, stopping)
        except BrokenProcessPool as error:
            raise RuntimeError(_why_broken(list(running.values()))) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for file in (folder / "logs").glob(".job-*.json"):
                file.unlink(missing_ok=True)


@contextmanager
def _handing_on(stop: Path) -> Iterator[Callable[[], bool]]:
    """A function that says whether a signal has asked this process to stop, and hands that on to
    its workers as a file, which goes with them."""
    made = False

    def asked() -> bool:
        nonlocal made
        if progress.asked_by_signal() and not stop.exists():
            made = True
            stop.touch()
        return progress.asked_by_signal()

    with progress.saving_on_signals():
        try:
            yield asked
        finally:
            if made:
                stop.unlink(missing_ok=True)


def _follow(
    pool: ProcessPoolExecutor,
    folder: Path,
    jobs: Sequence[Job],
    count: int,
    running: dict[Future[None], Job],
    stopping: Callable[[], bool],
) -> None:
    """Hand out jobs until all are done or one fails. running: is kept up to date."""
    label = f"jobs, {count} at a time"
    files = {job: folder / "logs" / f".job-{i}.json" for i, job in enumerate(jobs)}
    waiting = list(jobs)
    done = 0
    with progress.Progress(folder, label, len(jobs)) as bar:
        while waiting or running:
            if stopping():
                waiting.clear()
            for job in _ready(waiting, running.values())[: count - len(running)]:
                waiting.remove(job)
                running[pool.submit(_perform, job, files[job])] = job
            finished, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                if error := future.exception():
                    if hasattr(error, "add_note"):
                        error.add_note(f"while working on {job.name}")
                    raise error
                done += 1
            bar.update(done, *_at_work([files[job] for job in running.values()]))
    if stopping():
        raise progress.Stopped("asked to stop; what was finished is saved")


def _why_broken(jobs: Sequence[Job]) -> str:
    """What to do about workers that ended in the middle of their work."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    script = Path(file).read_text("utf-8") if file and Path(file).is_file() else "__main__"
    if "__main__" not in script:
        return (
            f"{file} is run again by every worker: put what it does under"
            " `if __name__ == '__main__':`, or set workers to 1"
        )
    return (
        f"a process was killed while it worked on {' and '.join(job.name for job in jobs)}: most"
        " often the memory has run out. What was finished is kept: set workers to 1, or"
        " train.micro_batch or evaluation.batch lower, and run again"
    )


def _ready(waiting: Sequence[Job], running: Iterable[Job]) -> list[Job]:
    """Jobs that wait for none which is waiting or being done."""
    unfinished = {job.name for job in (*waiting, *running)}
    return [job for job in waiting if job.after not in unfinished]


def _perform(job: Job, file: Path) -> None:
    """Do a job in a worker, with a progress file of its own."""
    _heed_signals(True)
    try:
        with progress.Progress(file, job.name, 1) as bar:
            job.call(bar.on_step)
    finally:
        _heed_signals(False)


def _at_work(files: Iterable[Path]) -> tuple[str, float]:
    """How far the running jobs are, each and in all, in jobs."""
    records = list(filter(None, map(progress.read, files)))
    said = [f"{record['label']} {record['step']}/{record['total']}" for record in records]
    return " | ".join(said), sum(record["step"] / max(record["total"], 1) for record in records)


# ---- the server that workers are forked from


def worker_context() -> BaseContext:
    """How workers are started here: forked from the server, or anew where the platform has none."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    # by name: the server imports it, and this process need not
    context.set_forkserver_preload(["latlib.experiment.run"])
    return context


def start_server() -> None:
    """Start the server, where there is one, without waiting for it. It ignores SIGTERM and, also
    while it imports, SIGINT, as what it was started with; only a main thread can see to that."""
    if worker_context().get_start_method() != "forkserver":
        return
    if threading.current_thread() is not threading.main_thread():
        forkserver.ensure_running()
        return
    with progress.handled((signal.SIGTERM, signal.SIGINT), signal.SIG_IGN):
        forkserver.ensure_running()
