"""A sweep of the profile's main defence over many machines with Ray: every value of `sweep.grid`
with every other, on every seed.

    python -m latlib.experiment.sweep --profile my.yaml --address auto
    sweep(Run("my.yaml"), address="auto")                                    # in a notebook

1. A **trial** is one point of the grid on one seed. What the run folder holds already is not done
   again.
2. The base of each seed is made once, by a task of its own that its trials wait for. Its files
   and every trial's travel through Ray's object store, so machines share no file system; each
   needs this latlib, and data and models under the profile's names.
3. A trial is an ordinary `Run` in a scratch folder of the machine it runs on
   (`latlib.experiment.sweep_tasks`): it makes the model with the point's changes and measures the
   suite 'variant'. Killed, it is started again: there it finds its checkpoint.
4. The driver alone writes to the run folder, where a `Run` would have put the same files, and the
   table last: a trial is there whole or not at all. `run.outcomes()` shows its rows.
5. A trial that raises an error is not repeated. The others go on, and the summary names it.

Exit status: 0 done; 1 a trial failed; 2 a wrong option or setting; 75 stopped by SIGINT, SIGTERM or
SIGHUP with everything finished saved: the same command continues.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import BASE
from latlib.experiment.run import Run
from latlib.experiment.spec import Spec
from latlib.experiment.sweep_tasks import files_of, packed, perform, unpack
from latlib.io.machine import available_cores
from latlib.io.messages import in_a_line
from latlib.io.progress import ExitStatus, Stopped

RETRIES = 3  # of a trial whose process or machine was lost; an error of its own is not retried
REMIND_S = 60.0  # after which the driver says that it waits
SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # end a sweep as Ctrl-C does


class SweepError(RuntimeError):
    """No trial can be started; the message says why and what to do."""


@dataclass
class Swept:
    """What a sweep did. done: trials made now; kept: trials that were there; failed: trial -> its
    error, one line.
    """

    done: list[Spec] = field(default_factory=list)
    kept: list[Spec] = field(default_factory=list)
    failed: dict[Spec, str] = field(default_factory=dict)


def points(profile: Profile) -> list[dict[str, Any]]:
    """The grid's points as changes of `train` by dotted name. Raises ProfileError for a profile
    without a grid.
    """
    grid = profile.sweep.grid
    if not grid:
        raise ProfileError(
            f"profile {profile.name} has no sweep.grid: add one, such as sweep: {{grid:"
            " {attack.eps: [0.05, 0.1]}}"
        )
    columns = []
    for values in grid.values():
        columns.append([tuple(value) if isinstance(value, list) else value for value in values])
    return [dict(zip(grid, values)) for values in itertools.product(*columns)]


def trials(run: Run) -> list[Spec]:
    """Every trial of the run's grid, seed by seed."""
    profile = run.profile
    grid = points(profile)
    return [run.spec(profile.main, seed, point) for seed in profile.seeds for point in grid]


def sweep(
    run: Run,
    *,
    address: str = "local",
    gpus_per_trial: float | None = None,
    cpus_per_trial: float = 1,
    scratch: str | Path | None = None,
    adapters: bool = False,
    say: Callable[[str], None] = print,
) -> Swept:
    """Make what is missing of the grid; a line a trial goes to `say`.

    address: 'local' starts Ray on this machine, 'auto' joins the cluster it belongs to; a Ray that
    runs in this process is used as it is. gpus_per_trial: a share is possible; None: one per
    process of `parallel`, none where the cluster has none. scratch: folder on every machine, by
    default one of its own under the machine's temporary directory. adapters: bring the trained
    adapters back too.

    Raises SweepError without Ray, a cluster, or a machine big enough for a trial; ProfileError for
    bad settings. KeyboardInterrupt stops the tasks and goes on up; what was finished is kept.
    """
    swept = Swept()
    missing: list[Spec] = []
    for trial in trials(run):
        is_made = all(map(run.layout.whole, files_of(run.layout, trial, adapters)))
        (swept.kept if is_made else missing).append(trial)
    count, there = len(missing) + len(swept.kept), len(swept.kept)
    say(f"{count} trials into {run.folder}: {there} there already, {len(missing)} to make")
    if missing:
        ray = _ray()
        run.ensure([])  # what the base replies: the same for all trials
        with run.layout.locked(), _cluster(ray, address):
            gpus = _gpus(ray, run.profile, gpus_per_trial)
            options = ray.remote(num_cpus=cpus_per_trial, num_gpus=gpus, max_retries=RETRIES)
            task = partial(options(perform).remote, str(scratch or ""), adapters)
            _Driver(ray, run, task, swept, say).work(missing)
    for trial, error in swept.failed.items():
        say(f"failed: {trial.name}: {error}")
    say(f"{len(swept.done)} made, {len(swept.kept)} kept, {len(swept.failed)} failed")
    return swept


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise SweepError(
            "a sweep needs Ray: pip install 'latlib[ray]', or pip install -e '.[ray]' in a checkout"
        ) from None
    return ray


@contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """Ray, begun or joined here unless this process has one; left as it was found."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":  # for this machine only: no dashboard, no other interface
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        options["num_cpus"] = available_cores()
    ours = [number for number in SIGNALS if signal.getsignal(number) is _stop]
    try:
        ray.init(address, **options)
    except ConnectionError as error:
        raise SweepError(
            f"address = {address!r}: no Ray cluster there ({in_a_line(error)}): start one"
            " with ray start --head, or use 'local'"
        ) from None
    for number in ours:
        signal.signal(number, _stop)  # in place of Ray's, which would abort
    try:
        yield
    finally:
        ray.shutdown()


def _gpus(ray: Any, profile: Profile, wanted: float | None) -> float:
    """GPUs of a trial. Raises SweepError where no machine has as many: the trial would wait for
    ever.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max((resources.get("GPU", 0) for resources in alive), default=0)
    if wanted is None:
        wanted = profile.parallel.processes if most and profile.model.device != "cpu" else 0
    if wanted > most:
        raise SweepError(
            f"a trial takes {wanted:g} GPUs and no machine has more than {most:g}: see"
            " --gpus-per-trial"
        )
    return wanted


@dataclass
class _Driver:
    """Hands out tasks and takes in their files."""

    ray: Any
    run: Run
    task: Callable[..., Any]  # starts `perform` for a profile, a model and its base's files
    swept: Swept
    say: Callable[[str], None]
    running: dict[Any, Spec] = field(default_factory=dict)  # Ray's reference -> base or trial

    def work(self, missing: Sequence[Spec]) -> None:
        """Do all of them; what is finished when this is interrupted is kept."""
        bases: dict[Spec, Any] = {}
        try:
            for trial in missing:
                if trial.base not in bases:
                    bases[trial.base] = self._base(trial.base)
                self._start(trial, bases[trial.base])
            while self.running:
                ready, _ = self.ray.wait(list(self.running), timeout=REMIND_S)
                for ref in ready:
                    self._take_in(ref)
                if not ready:
                    machines = sum(node["Alive"] for node in self.ray.nodes())
                    self.say(f"working: {self._left()}, {machines} machines in the cluster")
        except BaseException:
            for ref in self.running:
                self.ray.cancel(ref)
            running = list(self.running)
            finished, _ = self.ray.wait(running, num_returns=len(running), timeout=0)
            for ref in finished:
                with suppress(self.ray.exceptions.RayError):  # cancelled, or lost: made next time
                    unpack(self.run.folder, self.ray.get(ref)[0])
            raise

    def _base(self, base: Spec) -> Any:
        """A reference to a base's files, which Ray has once for all trials on it: those that are
        here, or what a task will make of them.
        """
        paths = files_of(self.run.layout, base)
        files = self.ray.put((packed(self.run.folder, paths), 0.0, ""))
        if all(map(self.run.layout.whole, paths)):
            return files
        return self._start(base, files)

    def _start(self, spec: Spec, files: Any) -> Any:
        ref = self.task(self.run.profile, spec, files)
        self.running[ref] = spec
        return ref

    def _take_in(self, ref: Any) -> None:
        spec = self.running[ref]
        try:
            files, seconds, machine = self.ray.get(ref)
            unpack(self.run.folder, files)
            said = f"{seconds:.0f} s on {machine}"
            if spec.method != BASE:
                self.swept.done.append(spec)
        except self.ray.exceptions.RayError as error:
            said = "FAILED"
            if spec.method != BASE:  # a base's error is that of every trial on it, too
                self.swept.failed[spec] = _reason(error)
        del self.running[ref]
        self.say(f"{spec.name}: {said}, {self._left()}")

    def _left(self) -> str:
        left = sum(spec.method != BASE for spec in self.running.values())
        return f"{left} trials left"


def _reason(error: Exception) -> str:
    """A line on what a task raised, or on what Ray says of its loss."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {in_a_line(cause)}"


# ---- the command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m latlib.experiment.sweep",
        description="Train the main defence on a grid of settings, with Ray.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--profile", default="tiny", help="name of a profile, or path of a YAML file")
    add("--out", help="run folder, by default runs/<profile>")
    add("--address", default="local", help="'local': this machine; 'auto': its Ray cluster")
    add("--gpus-per-trial", type=float, help="a share is possible; by default one, if there is any")
    add("--cpus-per-trial", type=float, default=1, help="cores of a trial")
    add("--scratch", help="folder for unfinished trials on every machine, by default temporary")
    add("--adapters", action="store_true", help="bring the trained adapters back too")
    return parser


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = vars(_parser().parse_args(arguments))
    os.environ["LATLIB_BATCH"] = "1"  # no bars
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # trials share cores
    try:
        run = Run(options.pop("profile"), options.pop("out"))
        failed = sweep(run, **options).failed
        return ExitStatus.FAILED if failed else ExitStatus.DONE
    except (ProfileError, SweepError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    except (KeyboardInterrupt, Stopped):
        print("\nstopped; what was finished is saved: continue with the same command", flush=True)
        return ExitStatus.STOPPED


if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, _stop)
    sys.exit(main())
