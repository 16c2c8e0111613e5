r"""Start the processes that train one adapter together: from a notebook, or by hand under torchrun.

From a notebook nothing changes: with `parallel: {processes: 4, mode: ddp}` in the profile,
`run.ensure` comes here.
1. `launch` writes the job to a JSON file and starts torchrun, which starts this module in every
   process.
2. Each joins the group and makes the model as one process would (`build`); process 0 logs, writes
   and reports progress, which `launch` passes on. A file STOP in the run folder stops all of them
   after the same step.
3. What ends them, an error or a stop, is left in another JSON file; `launch` raises it again. If
   `launch` itself is interrupted, or dies, its processes go with it.

By hand, on one machine or (with torchrun's own options) on several that share the run folder:

    torchrun --nproc-per-node 2 -m latlib.experiment.launch \
        --profile my.yaml --method lat --seed 0 --out runs/mine
    accelerate launch --multi_gpu --num_processes 2 -m latlib.experiment.launch \
        --profile my.yaml --method lat --seed 0

The mode is the profile's `parallel.mode`; the number of processes is what was started.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import latlib
from latlib.config.profile import Profile, ProfileError, load_profile, run_folder, validated
from latlib.distributed import ranks
from latlib.experiment import build
from latlib.experiment.jobs import OnStep, prepare_process, threads_for
from latlib.experiment.layout import Layout
from latlib.experiment.spec import Spec, find_spec
from latlib.io.files import write_json
from latlib.io.progress import Progress, Stopped, read

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0  # for processes that are asked to end, before they are killed
LAST_LINES = 30  # of the processes' output, in the error


def launch(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    """Train the adapter of `spec` in `profile.parallel.processes` processes; its base must be
    there.

    on_step(step, total, detail) as in `build.make_model`. Raises `Stopped` when all have saved and
    left, ProfileError for settings that several processes cannot follow, RuntimeError with the last
    lines they wrote when one has failed.
    """
    count, logs = layout.profile.parallel.processes, layout.logs
    job, log = logs / f".parallel-{spec.folder}.json", logs / f"parallel-{spec.folder}.log"
    wanted = {
        "method": spec.method,
        "seed": spec.seed,
        "changes": dict(spec.changes),
        "variant": spec.variant,
    }
    for left in (_beside(job, "progress"), _beside(job, "end")):  # by a launch that was killed
        left.unlink(missing_ok=True)
    write_json(
        {
            "profile": layout.profile.model_dump(mode="json"),
            "folder": str(layout.folder),
            "spec": wanted,
        },
        job,
    )
    threads = threads_for(layout.profile, count)
    paths = [str(Path(latlib.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(threads),
    }
    try:
        with log.open("wb") as output:
            child = subprocess.Popen(
                _command(count, job),
                stdin=subprocess.PIPE,  # never written to: its end is how they learn of ours
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                # an interrupt in a terminal comes here, not to each of them
                start_new_session=True,
            )
            try:
                _relay(child, _beside(job, "progress"), on_step)
            finally:
                _end(child)
        _raise_what_ended_it(
            child.returncode, _beside(job, "end"), log, f"{spec.label} seed {spec.seed}", count
        )
        log.unlink(missing_ok=True)
    finally:
        for file in (job, _beside(job, "progress"), _beside(job, "end")):
            file.unlink(missing_ok=True)


def _command(count: int, job: Path) -> list[str]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    return [*torchrun, "-m", "latlib.experiment.launch", "--job", str(job)]


def _beside(job: Path, what: str) -> Path:
    return job.with_suffix(f".{what}")


def _relay(child: subprocess.Popen, file: Path, on_step: OnStep) -> None:
    told = 0
    while True:
        over = child.poll() is not None
        record = read(file)
        if record and record["step"] > told:
            told = record["step"]
            on_step(told, record["total"], record["detail"])
        if over:
            return
        time.sleep(POLL_SECONDS)


def _end(child: subprocess.Popen) -> None:
    """Let nothing outlive this: torchrun ends its processes when it is asked to end, and they when
    the pipe closes.
    """
    child.stdin.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _raise_what_ended_it(code: int, file: Path, log: Path, label: str, count: int) -> None:
    end = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if end.get("kind") == "Stopped":
        raise Stopped(end["message"])
    if end.get("kind") == "ProfileError":
        raise ProfileError(end["message"])
    if code or end:
        said = end.get("traceback") or log.read_text(encoding="utf-8", errors="replace")
        lines = "\n".join(said.rstrip().splitlines()[-LAST_LINES:])
        who = f"process {end['rank']} of {count}" if end else f"one of {count} processes"
        raise RuntimeError(
            f"{label}: {who} failed (exit code {code}; all they said is in {log}):\n{lines}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the processes; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m latlib.experiment.launch", description="Train one adapter together."
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--method", default="lat")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", help="a name of sweep.variants")
    parser.add_argument("--out", help="the run folder")
    options = parser.parse_args(arguments)
    if options.job is None:
        profile, progress_file = load_profile(options.profile), None
        folder = run_folder(profile.name, options.out)
        wanted = {"method": options.method, "seed": options.seed, "variant": options.variant}
    else:
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        job = json.loads(options.job.read_text(encoding="utf-8"))
        profile, progress_file = (
            validated(Profile, job["profile"]),
            _beside(options.job, "progress"),
        )
        folder, wanted = Path(job["folder"]), job["spec"]
    try:
        _train(profile, folder, wanted, progress_file)
    except BaseException as error:
        if options.job is not None:
            _tell_the_end(error, _beside(options.job, "end"))
        if not isinstance(error, Stopped):
            raise
        if ranks.is_main():
            print(error, file=sys.stderr, flush=True)
    ranks.leave()


def _leave_with_parent() -> None:
    # blocks until whoever launched this closes the pipe, or dies
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def _tell_the_end(error: BaseException, file: Path) -> None:
    """Leave what ended this process; the first to fail is heard, for the others fail of its
    absence.
    """
    end = {"kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
    with suppress(FileExistsError), file.open("x", encoding="utf-8") as handle:
        json.dump({**end, "rank": int(os.environ.get("RANK", "0"))}, handle)


def _train(
    profile: Profile, folder: Path, wanted: dict[str, Any], progress_file: Path | None
) -> None:
    """Make the model as one of the processes of the environment."""
    if ranks.started_as_one_of_many():
        ranks.join(profile.model)
    layout = Layout(profile, folder)
    if ranks.is_main():
        layout.claim()  # makes the folder, before the others look
    ranks.wait()
    layout.claim()
    prepare_process(min(torch.get_num_threads(), threads_for(profile)))
    if "changes" in wanted:
        spec = Spec(**wanted | {"changes": tuple(sorted(wanted["changes"].items()))})
    else:
        spec = find_spec(profile, **wanted)
    if ranks.is_main() and not layout.has(spec.base):
        build.make_model(layout, spec.base, _silent)
    ranks.wait()
    if ranks.broadcast(layout.has(spec)):
        return
    if not ranks.is_main():
        build.make_model(layout, spec, _silent)
        return
    label = f"{spec.label} seed {spec.seed}"
    with Progress(progress_file or layout.folder, label, 1) as bar:
        build.make_model(layout, spec, bar.on_step)


def _silent(step: int, total: int, detail: str) -> None:
    """Report nothing."""


if __name__ == "__main__":
    main()
