"""Cases in which a run is killed, as a whole or one process of it, or gets a signal; then the same
command goes on, and must end with what a run has that nothing disturbed.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
from cases import Command, Place, add, case

RANDOM_KILLS = 20
WAIT_S = 300.0  # for a moment to come, on a busy machine
WHOLE, ONE, SIGNALS = "The whole tree killed", "One process killed", "Signals"

# name -> what every process of the run is doing when it is killed
MOMENTS = {
    "held_in_the_base": "while the base is trained",
    "held_in_a_line_of_the_log": "with half a line of a training's log written",
    "held_in_a_checkpoint": "with half a checkpoint written",
    "held_between_rename_and_prune": "behind a checkpoint's rename, before older ones go",
    "held_in_the_final_folder": "with half of a finished adapter's folder written",
    "held_before_checkpoints_go": "with the adapter in its place and its checkpoints still there",
    "held_in_a_table": "with half an outcome table written",
    "held_in_the_manifest": "with half a line of the manifest written",
    "held_between_notebooks": "with a notebook executed and not yet in its place",
    "held_in_the_report": "while the driver writes report.html",
}


def wait_until(command: Command, come: Callable[[], bool]) -> None:
    """Until a moment has come. Raises AssertionError where the command ends before."""
    until = time.monotonic() + WAIT_S
    while not come():
        assert command.running, "it ended before: " + command.wait().line
        assert time.monotonic() < until, "the moment did not come"
        time.sleep(0.05)


def kill_whole(place: Place, moment: str) -> str:
    """Killed at a moment that an injection holds."""
    command = place.command(inject=moment).start()
    try:
        wait_until(command, place.flag.exists)
    finally:
        killed = command.kill_all()
    command.nobody_is_left()
    return f"{killed} processes killed, {what_is_there(place.run)}; {place.goes_on()}"


def kill_at(place: Place, share: float) -> str:
    """Killed after a share of the processor's time that an undisturbed run takes: how busy the
    machine is changes no moment."""
    place.reference()
    seconds = share * float((place.shared / "seconds").read_text())
    command = place.command().start()
    try:
        wait_until(command, lambda: command.spent() >= seconds)
    finally:
        killed = command.kill_all()
    command.nobody_is_left()
    there = what_is_there(place.run)
    return f"{killed} processes killed after {seconds:.1f} s, {there}; {place.goes_on()}"


def what_is_there(run: Path) -> str:
    """What a killed run has left."""
    models = [path for path in (run / "models").glob("[!.]*") if path.is_dir()]
    tables = list((run / "results" / "outcomes").glob("*.parquet"))
    checkpoints = list((run / "models").glob(".*.checkpoints/step-*.pt"))
    counts = {"models": models, "checkpoints": checkpoints, "tables": tables}
    return "there were " + ", ".join(f"{len(found)} {name}" for name, found in counts.items())


for _moment, _words in MOMENTS.items():
    _name = f"killed {_moment.removeprefix('held_')}"
    add(_name, WHOLE, f"kill -9 of all processes {_words}", partial(kill_whole, moment=_moment))

_draw = random.Random("moments")
for _number in range(RANDOM_KILLS):
    # one in each twentieth of the run; its end varies from run to run
    _share = 0.9 * (_number + _draw.random()) / RANDOM_KILLS
    _words = f"kill -9 of all processes after {_share:.0%} of the processor's time of a run"
    add(f"killed at {_share:.1%}", WHOLE, _words, partial(kill_at, share=_share))


# ---- one process


def kernel_of(command: Command) -> psutil.Process:
    """The notebook's."""
    found = []
    for process in psutil.Process(command.process.pid).children():
        if "latlib.runner.kernel" in process.cmdline():
            found.append(process)
    return found[0]


def in_training(place: Place) -> Command:
    """A run at whose second checkpoint a worker is held, so that the rest is at work."""
    command = place.command(inject="held_in_a_checkpoint").start()
    wait_until(command, place.flag.exists)
    return command


@case(ONE, "kill -9 of the driver while two workers train")
def driver_killed(place: Place) -> str:
    """What the system does that has run out of memory."""
    command = in_training(place)
    below = len(command.alive()) - 1
    command.process.kill()
    command.nobody_is_left()
    return f"its {below} other processes ended within 10 s; {place.goes_on()}"


@case(ONE, "kill -9 of the notebook's kernel while two workers train")
def kernel_killed(place: Place) -> str:
    """The driver says so."""
    command = in_training(place)
    kernel_of(command).kill()
    said = command.wait(60).ended(1, "the kernel died without a traceback")
    command.nobody_is_left()
    return f"{said}; {place.goes_on()}"


@case(ONE, "kill -9 of a worker in its fourth training step")
def worker_killed(place: Place) -> str:
    """Said to be that, with what to do."""
    command = place.command(inject="worker_is_killed").start()
    said = command.wait().ended(1, "a process was killed while it worked on", "set workers to 1")
    command.nobody_is_left()
    return f"{said}; {place.goes_on()}"


# ---- signals, in training steps of 20 s


def signalled(place: Place, numbers: Sequence[signal.Signals], to_all: bool = False) -> str:
    """The signals, three seconds apart, in the middle of slow steps. After a single one, the steps
    at hand must be saved."""
    command = place.command(inject="slow_steps").start()
    wait_until(command, place.flag.exists)
    time.sleep(3)
    began = time.monotonic()
    for number in numbers:
        receivers = command.alive() if to_all else [psutil.Process(command.process.pid)]
        for process in receivers:
            process.send_signal(number)
        time.sleep(3)
    done = command.wait(120)
    took = time.monotonic() - began
    said = done.ended(75, "stopped; what was finished is saved: continue with the same command")
    command.nobody_is_left()
    saved = sorted((place.run / "models").glob(".*.checkpoints/step-*.pt"))
    steps = {file.parent.name: int(file.stem.split("-")[1]) for file in saved}
    if len(numbers) == 1:
        assert took < 60, f"{took:.0f} s"
        assert steps and all(step >= 3 for step in steps.values()), f"saved: {steps}"
    else:
        assert took < 15, f"{took:.0f} s"
    last = ", ".join(f"{name[1:].split('-seed')[0]} {step}" for name, step in steps.items())
    return f"{said}; after {took:.0f} s, saved up to step: {last}; {place.goes_on()}"


for _what, _numbers in {
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGTERM twice": (signal.SIGTERM, signal.SIGTERM),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}.items():
    _words = f"{_what} to the driver, in the middle of training steps of 20 s"
    add(f"{_what} in slow steps", SIGNALS, _words, partial(signalled, numbers=_numbers))

add(
    "SIGTERM to all in slow steps",
    SIGNALS,
    "SIGTERM to every process, as a scheduler sends it, in training steps of 20 s",
    partial(signalled, numbers=[signal.SIGTERM], to_all=True),
)


@case(SIGNALS, "SIGTERM in steps of 20 s, with --grace 5")
def too_little_grace(place: Place) -> str:
    """The step cannot be saved; what was before it is."""
    command = place.command("--grace", "5", inject="slow_steps").start()
    wait_until(command, place.flag.exists)
    command.process.send_signal(signal.SIGTERM)
    said = command.wait(60).ended(75, "continue with the same command")
    command.nobody_is_left()
    return f"{said}; {place.goes_on()}"


@case(SIGNALS, "a file STOP in the run folder while workers train")
def stop_file(place: Place) -> str:
    """Asked without a signal."""
    command = place.command(inject="slow_steps").start()
    wait_until(command, place.flag.exists)
    (place.run / "STOP").touch()
    said = command.wait(120).ended(75, "continue with the same command")
    command.nobody_is_left()
    return f"{said}; {place.goes_on()}"
