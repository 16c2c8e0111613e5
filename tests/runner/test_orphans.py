"""Whoever kills the driver alone, as the system does that has run out of memory, leaves nobody
behind: kernel and workers end with it.
"""

import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

from latlib.config.profile import find_share

CELLS = ("profile = 'x'\nout = None", "from latlib import Run\nrun = Run(profile, out)")
WORK = "run.ensure([('lat', 0), ('ssft', 0)])"


@pytest.fixture
def command(tmp_path):
    """The pipeline with one notebook, in which two workers train for ever."""
    tree = yaml.safe_load((find_share("profiles") / "smoke.yaml").read_text())
    tree["train"]["steps"] = 10**6
    tree |= {"name": "long", "workers": 2, "seeds": [0]}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(tree))
    cells = [new_code_cell(source) for source in (*CELLS, WORK)]
    cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "01_work.ipynb")
    options = ["--profile", tmp_path / "long.yaml", "--notebooks", tmp_path / "notebooks"]
    options += ["--out", tmp_path / "run"]
    return [sys.executable, "-m", "latlib.runner.pipeline", *map(str, options)]


def wait_for_two(folder, process):
    """Until two models are being trained."""
    until = time.monotonic() + 240
    while time.monotonic() < until:
        logs = [folder / "metrics" / f"{method}-seed0.jsonl" for method in ("lat", "ssft")]
        if all(log.is_file() and log.stat().st_size for log in logs):
            return
        assert process.poll() is None, "the pipeline ended early"
        time.sleep(0.2)
    raise AssertionError("two trainings did not begin")


@pytest.mark.parametrize("killed", ["driver", "kernel"])
def test_nobody_outlives_a_killed_process(command, tmp_path, killed):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    driver = psutil.Process(process.pid)
    below = []
    try:
        wait_for_two(tmp_path / "run", process)
        below = driver.children(recursive=True)
        assert len(below) >= 4, "a kernel, a server and two workers"
        victim = driver if killed == "driver" else driver.children()[0]
        victim.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs([driver, *below], timeout=10)
        assert not alive
    finally:
        for left in (driver, *below):
            if left.is_running():
                left.kill()
        process.wait()
