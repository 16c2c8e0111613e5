"""What is said when workers end in the middle of their work."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from latlib.config.profile import load_profile
from latlib.experiment.jobs import Job, work
from latlib.io import progress

TWO = load_profile("smoke").model_copy(update={"workers": 2})


def killed(on_step):
    os.kill(os.getpid(), signal.SIGKILL)


def waits(on_step):
    time.sleep(0.5)  # long enough for the one who follows
    on_step(1, 4, "")
    time.sleep(0.5)


def test_jobs_are_counted_as_jobs_and_nothing_is_left_of_their_bar(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    said = []
    write = progress.Progress._write

    def listen(bar, record):
        said.append([record[name] for name in ("label", "step", "total", "detail")])
        write(bar, record)

    monkeypatch.setattr(progress.Progress, "_write", listen)  # workers have their own
    work(TWO, tmp_path, [Job(name, waits) for name in ("one", "two", "three")])
    labels, steps, totals, details = zip(*said)
    assert set(labels) == {"jobs, 2 at a time"} and set(totals) == {3}
    assert steps[0] == 0 and steps[-1] == 3 and list(steps) == sorted(steps)
    assert any("one 1/4" in detail for detail in details)
    assert progress.read(tmp_path) is None and not list((tmp_path / "logs").iterdir())


THREADS = """
import scipy.linalg
from threadpoolctl import threadpool_info
from latlib.experiment.jobs import prepare_process
prepare_process(1)
print({pool["num_threads"] for pool in threadpool_info()})
"""


def test_a_process_keeps_to_its_threads_in_numpy_too():
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env["OPENBLAS_NUM_THREADS"] = "2"
    said = subprocess.run([sys.executable, "-c", THREADS], env=env, capture_output=True, text=True)
    assert said.stdout == "{1}\n", said.stderr


def test_a_worker_that_is_killed_is_said_to_be_that(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(RuntimeError, match="killed while it worked on .*the memory has run out"):
        work(TWO, tmp_path, [Job("one", killed), Job("two", killed)])


def interrupted(on_step):
    raise KeyboardInterrupt  # as default_int_handler does where no step is to be saved


@pytest.mark.parametrize("names", [["one"], ["one", "two"]], ids=["here", "in workers"])
def test_an_interrupt_without_a_step_to_save_is_a_line_too(tmp_path, names):
    (tmp_path / "logs").mkdir()
    with pytest.raises(progress.Stopped) as stopped:
        work(TWO, tmp_path, [Job(name, interrupted) for name in names])
    said = "interrupted; what was finished is saved; run again to continue"
    assert stopped.value._render_traceback_() == [said]


def test_a_script_that_workers_run_again_is_told_what_it_lacks(tmp_path):
    (tmp_path / "logs").mkdir()
    script = tmp_path / "mine.py"
    script.write_text(
        "from pathlib import Path\n"
        "from latlib.config.profile import load_profile\n"
        "from latlib.experiment.jobs import Job, work\n"
        "two = load_profile('smoke').model_copy(update={'workers': 2})\n"
        f"work(two, Path({str(tmp_path)!r}), [Job('one', print), Job('two', print)])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if "RuntimeError: /" in line]
    assert "mine.py is run again by every worker: put what it does under" in said


WORK = """
import sys, time
from pathlib import Path
from latlib.config.profile import load_profile
from latlib.experiment.jobs import Job, work
from latlib.io import progress

folder, busy = Path(sys.argv[1]), sys.argv[2].split()

def step(name, on_step):
    if name not in busy:
        return  # and its worker is idle
    with progress.saving_on_signals():
        (folder / f"{name} began").touch()
        time.sleep(5)  # a step that no signal may cut short
        while not progress.stop_requested(folder):
            time.sleep(0.1)
        (folder / f"{name} saved").touch()
        raise progress.Stopped(name)

class Step:
    def __init__(self, name): self.name = name
    def __call__(self, on_step): step(self.name, on_step)

if __name__ == "__main__":
    two = load_profile("smoke").model_copy(update={"workers": 2})
    try:
        work(two, folder, [Job(name, Step(name)) for name in ("one", "two")])
    except progress.Stopped:
        print("stopped")
"""


def test_an_interrupt_before_the_server_is_ready_stops_as_any_does(tmp_path):
    """JupyterLab's reaches every process of a kernel, at the first look at a bar too."""
    (tmp_path / "logs").mkdir()
    script = tmp_path / "mine.py"
    script.write_text(WORK)
    command = [sys.executable, str(script), str(tmp_path), "one two"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = psutil.Process(process.pid)
    until = time.monotonic() + 120
    while not (tmp_path / "progress.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    for each in (first, *first.children(recursive=True)):
        each.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[0] == "stopped\n"


@pytest.mark.parametrize("busy", ["one two", "one"])
@pytest.mark.parametrize("to_all", [True, False], ids=["every process", "the first alone"])
def test_signals_let_workers_save(tmp_path, busy, to_all):
    """A scheduler's SIGTERM and the driver's SIGINT reach the server and idle workers, too."""
    (tmp_path / "logs").mkdir()
    script = tmp_path / "mine.py"
    script.write_text(WORK)
    command = [sys.executable, str(script), str(tmp_path), busy]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = psutil.Process(process.pid)
    until = time.monotonic() + 120
    while not all((tmp_path / f"{name} began").exists() for name in busy.split()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    time.sleep(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        for each in (first, *(first.children(recursive=True) if to_all else ())):
            each.send_signal(number)
        time.sleep(1)
    assert process.communicate(timeout=60)[0] == "stopped\n"
    assert all((tmp_path / f"{name} saved").exists() for name in busy.split())
    assert not (tmp_path / "STOP").exists()
