"""A training killed by SIGKILL at any moment and started again ends bit for bit where an
uninterrupted one does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latlib import train
from latlib.config.profile import load_profile
from latlib.experiment import build, checkpoint
from latlib.experiment.jobs import worker_context
from latlib.experiment.run import Run
from latlib.experiment.tracking import Tracker

# smoke's training has 6 steps, the first 2 of them plain, and a checkpoint after 2 and 4
FILES = ("adapter_model.safetensors", "adapter_config.json", "profile.yaml")
MODELS = {"last": [("lat", 0)], "best": [("lat", 0, {"evaluate_every": 1, "keep": "best"})]}


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, call):
    """Die when `owner.name` is called for the `call`-th time."""
    plain, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        return die() if len(calls) == call else plain(*args, **kwargs)

    setattr(owner, name, counted)


def in_the_middle_of_writing():
    def half(content, file):
        plain(content, file)
        if content.get("trainer", {}).get("step") == 4:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            die()

    plain, torch.save = torch.save, half


def in_the_middle_of_a_line_of_the_log():
    def log(self, step, **metrics):
        if step == 5:
            self._file.write('{"step": 5, "tot')
            self._file.flush()
            die()
        plain(self, step, **metrics)

    plain, Tracker.log = Tracker.log, log


MOMENTS = {
    "in the first step": lambda: before(train.Trainer, "_update", 1),
    "in a later step": lambda: before(train.Trainer, "_update", 6),
    "between a logged step and its checkpoint": lambda: before(build, "save_checkpoint", 2),
    "in the middle of writing a checkpoint": in_the_middle_of_writing,
    "right after a checkpoint's rename": lambda: before(checkpoint, "_prune", 2),
    "in the middle of a line of the log": in_the_middle_of_a_line_of_the_log,
    "in the middle of the final folder": lambda: before(build, "_name_base", 1),
    "before the checkpoints are deleted": lambda: before(shutil, "rmtree", 1),
}


def child(folder, models, moment):
    MOMENTS[moment]()
    Run("smoke", folder).ensure(models)


@pytest.fixture(scope="module")
def base(smoke_base):
    """A run folder with the base model and nothing else."""
    return smoke_base


def result(run, model):
    """What a training leaves: files of the adapter but for the time they took, and the log without
    it.
    """
    spec = run.spec(*model)
    folder = run.layout.model_folder(spec)
    found = {name: (folder / name).read_bytes() for name in FILES}
    record = json.loads((folder / "latlib.json").read_text())
    record.pop("seconds")
    lines = [json.loads(line) for line in run.layout.metrics_file(spec).read_text().splitlines()]
    return found | {
        "record": record,
        "log": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
    }


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    found = {}
    for keep, models in MODELS.items():
        folder = tmp_path_factory.mktemp(keep) / "run"
        shutil.copytree(base, folder)
        run = Run("smoke", folder)
        run.ensure(models)
        found[keep] = result(run, models[0])
    return found


def killed(folder, models, moment):
    process = worker_context().Process(target=child, args=(folder, models, moment))
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize(
    ("moment", "keep"),
    [
        *((moment, "best") for moment in MOMENTS),
        ("between a logged step and its checkpoint", "last"),
    ],
)
def test_killed_and_started_again_it_ends_the_same(base, uninterrupted, tmp_path, moment, keep):
    folder, models = tmp_path / "run", MODELS[keep]
    shutil.copytree(base, folder)
    assert killed(folder, models, moment) == -signal.SIGKILL
    made = Run("smoke", folder).layout.has(Run("smoke", folder).spec(*models[0]))
    assert made == (moment == "before the checkpoints are deleted")
    saved = list((folder / "models").glob(".*.checkpoints/step-*.pt"))
    # and they stay until the adapter is in its place
    assert bool(saved) == (moment != "in the first step")
    run = Run("smoke", folder)
    run.ensure(models)
    assert result(run, models[0]) == uninterrupted[keep]
    assert [line["step"] for line in result(run, models[0])["log"]] == [1, 2, 3, 4, 5, 6]
    left = {p.name for p in (folder / "models").iterdir() if not p.name.startswith(".plain-")}
    assert made or left == {"base-seed0", run.spec(*models[0]).folder}, "leavings"


def test_the_runs_differ_where_they_should(uninterrupted):
    """The best step is not the last step, or the test above would say nothing of it."""
    best = uninterrupted["best"]["record"]["validation"]
    assert best["kept_step"] == best["best"]["step"] < 6
    assert uninterrupted["best"][FILES[0]] != uninterrupted["last"][FILES[0]]
    assert uninterrupted["last"]["log"][-1]["step"] == 6


COMMAND = """
import os, signal
from latlib.experiment import build
from latlib.experiment.run import Run
saved = build.save_checkpoint
def save_and_die(*args, **kwargs):
    saved(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
if {dies}:
    build.save_checkpoint = save_and_die
Run("smoke", {folder!r}).ensure([("lat", 0)])
"""


def test_the_same_command_goes_on(base, uninterrupted, tmp_path, root):
    """The same in processes of its own, killed twice; each attempt gets further."""
    folder = tmp_path / "run"
    shutil.copytree(base, folder)
    for dies in (True, False):
        command = [sys.executable, "-c", COMMAND.format(dies=dies, folder=str(folder))]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
        assert done.returncode == (-signal.SIGKILL if dies else 0), done.stderr
    run = Run(load_profile("smoke"), folder)
    assert result(run, ("lat", 0)) == uninterrupted["last"]
    assert not list(Path(folder, "models").glob(".lat-seed0*"))
