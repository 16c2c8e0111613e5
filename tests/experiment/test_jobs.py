"""What is said when workers end in the middle of their work."""

import os
import signal
import subprocess
import sys

import pytest

from latlib.config.profile import load_profile
from latlib.experiment.jobs import Job, work

TWO = load_profile("smoke").model_copy(update={"workers": 2})


def killed(on_step):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_said_to_be_that(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(RuntimeError, match="killed while it worked on .*the memory has run out"):
        work(TWO, tmp_path, [Job("one", killed), Job("two", killed)])


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
