"""Faults that are put into the processes of a run from within, once in a whole run.

`cases.Place` starts Python with a `sitecustomize` that imports this module: as soon as the module
that an injection names has been loaded, its names are replaced. Imports nothing heavy, for it runs
in every process before all else.

    LATLIB_INJECT        name of the injection
    LATLIB_INJECT_FLAG   file that the first process to get there makes; no other goes on
"""

from __future__ import annotations

import errno
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELD_S = 900  # who is held waits to be killed
SLOW_S = 20.0  # a slow training step
INJECTIONS: dict[str, tuple[str, Callable[[Any], None]]] = {}


def into(module: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function that spoils a module which has just been loaded."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        INJECTIONS[function.__name__] = module, function
        return function

    return register


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `spoil(module)` behind the import of one module."""

    def __init__(self, name: str, spoil: Callable[[Any], None]) -> None:
        self.name, self.spoil = name, spoil

    def find_spec(self, name: str, *_: Any) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        plain = spec.loader.exec_module

        def load(module: Any) -> None:
            plain(module)
            self.spoil(module)

        spec.loader.exec_module = load  # type: ignore[method-assign]
        return spec


def first() -> bool:
    """Whether this process is the first of the run that gets there."""
    flag = os.environ["LATLIB_INJECT_FLAG"]
    try:
        handle = os.open(flag, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    return True


def wait_to_be_killed() -> None:
    """For longer than anybody waits."""
    time.sleep(HELD_S)


def hold() -> None:
    """The same, where nobody was held before."""
    if first():
        wait_to_be_killed()


def before(owner: Any, name: str, act: Callable[[], None], call: int = 1) -> None:
    """Do something when `owner.name` is called for the `call`-th time in a process."""
    plain, calls = getattr(owner, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            act()
        return plain(*args, **options)

    setattr(owner, name, counted)


def in_half_a_checkpoint(checkpoint: Any, act: Callable[[], None]) -> None:
    """Do something with half of the checkpoint of step 4 written."""
    plain = checkpoint.torch.save

    def save(content: Any, file: Path) -> None:
        plain(content, file)
        if content.get("trainer", {}).get("step") == 4 and first():
            os.truncate(file, file.stat().st_size // 2)
            act()

    checkpoint.torch.save = save


def in_half_a_table(frame: Any, act: Callable[[], None]) -> None:
    """Do something with half of a table of outcomes written."""
    plain = frame.DataFrame.to_parquet

    def to_parquet(self: Any, file: Path, *args: Any, **options: Any) -> None:
        plain(self, file, *args, **options)
        if ".audit-" in file.name and first():
            os.truncate(file, file.stat().st_size // 2)
            act()

    frame.DataFrame.to_parquet = to_parquet


def no_space() -> None:
    """What the system says where nothing fits any more."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk() -> None:
    """The same, once."""
    if first():
        no_space()


def end() -> None:
    """This process is killed."""
    if first():
        os.kill(os.getpid(), signal.SIGKILL)


# ---- moments at which a run is killed


@into("latlib.experiment.checkpoint")
def held_in_a_checkpoint(checkpoint: Any) -> None:
    in_half_a_checkpoint(checkpoint, wait_to_be_killed)


@into("latlib.experiment.checkpoint")
def held_between_rename_and_prune(checkpoint: Any) -> None:
    before(checkpoint, "_prune", hold, 2)


@into("latlib.world.organism")
def held_in_the_base(organism: Any) -> None:
    before(organism, "_backward", hold, 5)


@into("latlib.experiment.build")
def held_in_the_final_folder(build: Any) -> None:
    before(build, "_name_base", hold)


@into("latlib.experiment.build")
def held_before_checkpoints_go(build: Any) -> None:
    before(build.shutil, "rmtree", hold)


@into("latlib.experiment.tracking")
def held_in_a_line_of_the_log(tracking: Any) -> None:
    plain = tracking.Tracker.log

    def log(self: Any, step: int, **metrics: Any) -> None:
        if step == 5 and "lat" in self.name and first():
            self._file.write('{"step": 5, "tot')
            self._file.flush()
            time.sleep(HELD_S)
        plain(self, step, **metrics)

    tracking.Tracker.log = log


@into("pandas.core.frame")
def held_in_a_table(frame: Any) -> None:
    in_half_a_table(frame, wait_to_be_killed)


@into("latlib.io.manifest")
def held_in_the_manifest(manifest: Any) -> None:
    plain = manifest.record

    def record(root: Path, target: Path, written: Path) -> None:
        if target.suffix == ".parquet" and first():
            size = os.path.getsize(root / manifest.NAME)
            plain(root, target, written)
            os.truncate(root / manifest.NAME, size + 40)
            wait_to_be_killed()
        plain(root, target, written)

    manifest.record = record


@into("latlib.runner.notebooks")
def held_between_notebooks(notebooks: Any) -> None:
    before(notebooks, "_forget_paths", hold)


@into("latlib.report.html")
def held_in_the_report(html: Any) -> None:
    before(html, "to_html", hold)


# ---- one process ends, steps are slow


@into("latlib.train")
def worker_is_killed(train: Any) -> None:
    before(train.Trainer, "train_step", end, 4)


@into("latlib.train")
def slow_steps(train: Any) -> None:
    plain = train.Trainer.train_step

    def train_step(self: Any) -> Any:
        if self.step >= 2:
            first()
            until = time.monotonic() + SLOW_S
            while time.monotonic() < until:  # no sleep, which a signal would end
                sum(range(20_000))
        return plain(self)

    train.Trainer.train_step = train_step


# ---- what a disk does


@into("latlib.experiment.checkpoint")
def disk_full_in_a_checkpoint(checkpoint: Any) -> None:
    in_half_a_checkpoint(checkpoint, no_space)


@into("pandas.core.frame")
def disk_full_in_a_table(frame: Any) -> None:
    in_half_a_table(frame, no_space)


@into("latlib.io.manifest")
def disk_full_in_the_manifest(manifest: Any) -> None:
    plain = manifest.record

    def record(root: Path, target: Path, written: Path) -> None:
        if target.suffix == ".parquet":
            full_disk()
        plain(root, target, written)

    manifest.record = record


@into("latlib.experiment.build")
def disk_full_in_the_final_folder(build: Any) -> None:
    before(build, "_name_base", full_disk)


@into("fcntl")
def no_locks(fcntl: Any) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = flock


# ---- numbers that go wrong


@into("latlib.train")
def nan_in_the_perturbation(train: Any) -> None:
    plain = train.Trainer._attack

    def attack(self: Any, *args: Any) -> Any:
        found = plain(self, *args)
        if first():
            for delta in found.deltas.values():
                delta[0].fill_(float("nan"))
        return found

    train.Trainer._attack = attack


@into("latlib.train")
def nan_in_the_gradient(train: Any) -> None:
    plain = train.torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, *rest: Any) -> Any:
        if first():
            next(p for p in parameters if p.grad is not None).grad.fill_(float("nan"))
        return plain(parameters, *rest)

    train.torch.nn.utils.clip_grad_norm_ = clip


@into("latlib.objectives")
def nan_in_the_loss(objectives: Any) -> None:
    plain = objectives.kl_divergence

    def kl_divergence(*args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        return found * float("nan") if first() else found

    objectives.kl_divergence = kl_divergence


@into("latlib.train")
def nan_for_ever(train: Any) -> None:
    plain = train.torch.nn.utils.clip_grad_norm_

    def clip(parameters: Any, *rest: Any) -> Any:
        return plain(parameters, *rest) * float("nan")

    train.torch.nn.utils.clip_grad_norm_ = clip


@into("latlib.train")
def out_of_memory(train: Any) -> None:
    plain = train.pgd

    def pgd(*args: Any, **options: Any) -> Any:
        if first():
            raise train.torch.OutOfMemoryError("out of memory")
        return plain(*args, **options)

    train.pgd = pgd


@into("latlib.experiment.validation")
def refuses_everything(validation: Any) -> None:
    plain = validation._share

    def share(outcomes: Any, which: str) -> float:
        return plain(["refused"] * len(outcomes), which)

    validation._share = share


def install() -> None:
    """Apply the injection that the environment names, once its module is there."""
    module, spoil = INJECTIONS[os.environ["LATLIB_INJECT"]]
    if module in sys.modules:
        spoil(sys.modules[module])
    else:
        sys.meta_path.insert(0, _AfterImport(module, spoil))


if "LATLIB_INJECT" in os.environ:
    install()
