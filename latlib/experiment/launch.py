r"""Start the processes that train one adapter together: from a notebook, or by hand under torchrun.

From a notebook nothing changes: with `parallel: {processes: 4, mode: ddp}` in the profile,
`run.ensure` comes here.
1. `launch` starts the processes (`torch.multiprocessing`). Each joins the group and makes the model
   as one process would (`build`); process 0 logs, writes and reports progress, which `launch`
   passes on. A file STOP in the run folder stops all of them after the same step.
2. What ends one of them, an error or a stop, is raised again here, and ends the others. If `launch`
   itself is interrupted, or dies, its processes go with it.

By hand, on one machine or (with torchrun's own options) on several that share the run folder:

    torchrun --nproc-per-node 2 -m latlib.experiment.launch \
        --profile my.yaml --method lat --seed 0 --out runs/mine
    accelerate launch --multi_gpu --num_processes 2 -m latlib.experiment.launch \
        --profile my.yaml --method lat --seed 0

The mode is the profile's `parallel.mode`; the number of processes is what was started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue

import torch
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import ProcessContext, ProcessException, start_processes

from latlib.config.profile import load_profile, run_folder
from latlib.distributed import ranks
from latlib.errors import SettingError
from latlib.experiment import build
from latlib.experiment.jobs import HELD, begin_worker, prepare_process, worker_context
from latlib.experiment.layout import Layout
from latlib.experiment.responses import make_responses
from latlib.experiment.spec import Spec, find_spec, spec_parser
from latlib.io.progress import (
    OnStep,
    Progress,
    Stopped,
    asked_by_signal,
    saving_on_signals,
    unseen,
)
from latlib.planning.workers import threads_for

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # for processes that are asked to end, before they are killed
HOST = "127.0.0.1"


@dataclass(frozen=True)
class _Task:
    """What the processes do. port: where they meet. said: takes the steps of process 0, for
    `on_step`, and the error that `launch` raises."""

    layout: Layout
    spec: Spec
    port: int
    said: SimpleQueue[tuple[int, int, str] | Exception]


def launch(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    """Train the adapter of `spec` in `profile.parallel.processes` processes; its base must be
    there.

    on_step(step, total, detail) as in `build.make_adapter`. Raises `Stopped` when all have saved
    and left, SettingError for settings that several processes cannot follow, RuntimeError with the
    traceback of the first that has failed.
    """
    count = layout.profile.parallel.processes
    context = worker_context()
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    task = _Task(layout, spec, store.port, context.SimpleQueue())
    method = context.get_start_method()
    processes = start_processes(_one_of_several, (task,), count, join=False, start_method=method)
    try:
        with saving_on_signals():
            ended = _followed(processes, task, on_step)
    finally:
        _end(processes)
    if ended:
        raise ended


def _followed(processes: ProcessContext, task: _Task, on_step: OnStep) -> Exception | None:
    """Pass on what the processes say, and a signal to them, until they have left; returns what
    ended them."""
    ended: Exception | None = None
    told = over = False
    while not over:
        if asked_by_signal() and not told:
            told = True
            for process in processes.processes:
                process.terminate()  # in training they save first
        try:
            over = processes.join(POLL_SECONDS, GRACE_SECONDS)
        except ProcessException as error:
            over = True
            which = f"process {error.error_index} of {len(processes.processes)}"
            # what the process itself has said of it may have come before
            ended = ended or RuntimeError(f"{task.spec.name}: {which} failed: {error}")
        while not task.said.empty():
            said = task.said.get()
            if isinstance(said, Exception):
                ended = said
            else:
                on_step(*said)
    return ended


def _end(processes: ProcessContext) -> None:
    """Let nothing outlive this."""
    for process in processes.processes:
        process.terminate()
    for process in processes.processes:
        process.join(GRACE_SECONDS)
        process.kill()


# ---- in one of the processes


def _one_of_several(rank: int, task: _Task) -> None:
    """What `launch` starts."""
    count = task.layout.profile.parallel.processes
    begin_worker(threads_for(task.layout.profile, count), task.layout.folder)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR=HOST,
        MASTER_PORT=str(task.port),
        TORCHELASTIC_USE_AGENT_STORE="True",  # the store is there: rank 0 makes none
    )
    try:
        _train(task.layout, task.spec, lambda *step: task.said.put(step))
    except Stopped as stopped:  # of all of them, and each has to finish what it is at
        task.said.put(stopped)
    except SettingError as error:
        task.said.put(error)
        raise
    ranks.leave()


def _train(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    """Make the model as one of the processes of the environment; the first reports its steps."""
    if ranks.started_as_one_of_many():
        ranks.join_group(layout.profile.model)
    if ranks.is_main():
        layout.claim()  # makes the folder, before the others look
    ranks.wait()
    layout.claim()
    prepare_process(min(torch.get_num_threads(), threads_for(layout.profile)))
    if ranks.is_main():
        if not layout.has(spec.base):
            build.make_base(layout, spec.base, unseen)
        make_responses(layout, unseen)
    ranks.wait()
    if not ranks.broadcast(layout.has(spec)):
        build.make_adapter(layout, spec, on_step if ranks.is_main() else unseen)


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the processes that torchrun has started; see the module's docstring."""
    parser = spec_parser(
        "torchrun -m latlib.experiment.launch", "Train one adapter in several processes."
    )
    options = parser.parse_args(arguments)
    profile = load_profile(options.profile)
    layout = Layout(profile, run_folder(profile.name, options.out)).completed()
    method = options.method or profile.main
    spec = find_spec(profile, method, options.seed, options.variant)
    if os.environ.get("RANK", "0") != "0":
        os.environ[HELD] = str(layout.folder)  # by the first process, for all
    try:
        with layout.locked():
            _train(layout, spec, Progress(layout.folder, spec.name, 1).on_step)
    except Stopped as stopped:
        if ranks.is_main():
            print(stopped, file=sys.stderr, flush=True)
    ranks.leave()


if __name__ == "__main__":
    main()
