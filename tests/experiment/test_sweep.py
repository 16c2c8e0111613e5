"""A sweep with Ray ends as the same trials done here do, whoever is killed; two machines are two
nodes on this one.
"""

import contextlib
import fcntl
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import yaml

from latlib.config.profile import load_profile
from latlib.config.sections import ProfileError
from latlib.experiment import sweep as sweeping
from latlib.experiment.run import Run
from latlib.experiment.sweep import SweepError, points, sweep
from latlib.report.eps_grid import sweep_table
from latlib.report.evidence import Evidence

STEPS = 24  # of each trial: long enough to be caught in the middle
GRID = {"attack.eps": (0.05, 0.1), "defence.kl": (1.0,)}


def profile_with(grid, **changes):
    profile = load_profile("smoke")
    train = profile.train.model_copy(update={"steps": STEPS})
    evaluation = profile.evaluation.model_copy(update={"encodings": ("plain", "leet")})
    sweep = profile.sweep.model_copy(update={"grid": grid})
    same = {"sweep": sweep, "train": train, "evaluation": evaluation, "workers": 1}
    return profile.model_copy(update=same | changes)


PROFILE = profile_with(GRID)


def started(cluster, settings, tries=3):
    """A further node; Ray gives up after 30 s, which is little on a machine that does ten other
    things.
    """
    try:
        return cluster.add_node(**settings)
    except Exception:
        if tries == 1:
            raise
        return started(cluster, settings, tries - 1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray cluster of two nodes with a core each; this process is its driver."""
    environment = pytest.MonkeyPatch()
    for name, value in {
        # otherwise it binds other interfaces than 127.0.0.1
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # a token would be written into the home folder
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }.items():
        environment.setenv(name, value)
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    before = set(psutil.Process().children(recursive=True))
    health = {
        "health_check_initial_delay_ms": 500,
        "health_check_period_ms": 500,
        "health_check_timeout_ms": 3000,
    }
    node = {
        "num_cpus": 1,
        "object_store_memory": 100 * 2**20,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": False,
    }
    found = Cluster()
    first = started(found, node | {"include_dashboard": False, "_system_config": health})
    second = started(found, node)
    ray.init(
        address=found.address,
        log_to_driver=False,
        logging_level="error",
        _node_ip_address="127.0.0.1",
    )
    yield SimpleNamespace(cluster=found, head=first, second=second)
    ours = set(psutil.Process().children(recursive=True)) - before
    ray.shutdown()
    found.shutdown()
    environment.undo()
    _, alive = psutil.wait_procs(ours, timeout=10)
    assert not alive, f"left behind: {alive}"


def attempts(scratch):
    """trial -> the processes that worked on it, in order."""
    return {
        f.name.removesuffix(".attempts"): list(map(int, f.read_text().split()))
        for f in scratch.glob("*/lat-*.attempts")
    }


def written(metrics):
    """Steps that a trial has logged."""
    return metrics.read_text().count("\n")


class Killer(threading.Thread):
    """Stops the process of a trial in the middle of training, makes sure that it is there, and
    kills it; then, in the middle of another trial, the node `second` with all its processes. Looks
    for them until `ended` is set: on a busy machine the first step of a trial can take minutes."""

    def __init__(self, nodes, scratch):
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self.nodes, self.scratch, self.worker, self.on_node, self.error = (
            nodes,
            scratch,
            "",
            "",
            None,
        )

    def run(self):
        try:
            self.worker = self.catch(self.nodes.head, lambda pid: os.kill(pid, signal.SIGKILL))
            self.on_node = self.catch(self.nodes.second, lambda pid: self.remove_second())
        except BaseException as error:
            self.error = error

    def remove_second(self):
        self.nodes.cluster.remove_node(self.nodes.second, allow_graceful=False)

    def catch(self, node, kill):
        raylet = node.all_processes["raylet"][0].process.pid
        while not self.ended.wait(0.002):
            for trial, pids in attempts(self.scratch).items():
                # done while it was looked at
                with contextlib.suppress(OSError, psutil.NoSuchProcess):
                    metrics = next(self.scratch.glob(f"*/{trial}/metrics/{trial}.jsonl"), None)
                    if (
                        len(pids) != 1
                        or not metrics
                        or not written(metrics)
                        or psutil.Process(*pids).ppid() != raylet
                    ):
                        continue
                    os.kill(*pids, signal.SIGSTOP)
                    try:
                        if metrics.exists() and 0 < written(metrics) < STEPS:
                            kill(*pids)
                            return trial
                    finally:
                        with contextlib.suppress(OSError):
                            os.kill(*pids, signal.SIGCONT)
        raise TimeoutError(f"no trial was seen in the middle: {attempts(self.scratch)}")


@pytest.fixture(scope="module")
def swept(cluster, tmp_path_factory):
    """A whole sweep, in which a worker and a node are killed."""
    run, scratch, lines = (
        Run(PROFILE, tmp_path_factory.mktemp("run")),
        tmp_path_factory.mktemp("scratch"),
        [],
    )
    killer = Killer(cluster, scratch)
    killer.start()
    try:
        result = sweep(run, scratch=scratch, adapters=True, say=lines.append)
    finally:
        killer.ended.set()
        killer.join()
    if killer.error:
        raise killer.error
    return SimpleNamespace(
        run=run, result=result, lines=lines, killer=killer, attempts=attempts(scratch)
    )


@pytest.fixture(scope="module")
def local(swept, tmp_path_factory):
    """The same trials done by a Run in this process."""
    run = Run(PROFILE, tmp_path_factory.mktemp("local"))
    run.measure(
        [(("lat", seed, point), "variant") for seed in PROFILE.seeds for point in points(PROFILE)]
    )
    return run


def test_a_sweep_gives_what_the_same_trials_give_here(swept, local):
    wanted = sweeping.trials(local)
    assert len(wanted) == 4 and set(swept.result.done) == set(wanted) and not swept.result.failed
    for trial in wanted:
        ours, theirs = (run.layout.table_file(trial, "variant") for run in (local, swept.run))
        assert ours.read_bytes() == theirs.read_bytes(), trial.label
        weights = [
            run.layout.model_folder(trial) / "adapter_model.safetensors"
            for run in (local, swept.run)
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes(), trial.label
        curves = [run.metrics("lat", trial.seed, dict(trial.changes)) for run in (local, swept.run)]
        assert list(curves[1]["step"]) == list(range(1, STEPS + 1)) and curves[0]["total"].equals(
            curves[1]["total"]
        )
    table = swept.run.outcomes()
    variants = {"attack.eps=0.05+defence.kl=1.0", "attack.eps=0.1+defence.kl=1.0"}
    assert set(table["method"]) == {"lat"} and set(table["variant"]) == variants


def test_a_killed_worker_and_a_killed_node_are_survived(swept):
    assert (
        swept.killer.worker and swept.killer.on_node and swept.killer.worker != swept.killer.on_node
    )
    tried = {trial: len(pids) for trial, pids in swept.attempts.items()}
    killed = {swept.killer.worker, swept.killer.on_node}
    assert tried == {trial: 2 if trial in killed else 1 for trial in tried} and len(tried) == 4


def test_every_finished_trial_is_a_line_with_what_is_left(swept):
    left = [
        int(line.split(", ")[-1].split()[0])
        for line in swept.lines
        if " s on " in line and "lat[" in line
    ]
    assert left == [3, 2, 1, 0]
    assert swept.lines[-1] == "4 made, 0 kept, 0 failed"


def test_a_second_sweep_and_a_run_here_make_nothing(swept, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)  # not even Ray is needed
    before = {
        f: f.stat().st_mtime_ns
        for f in swept.run.folder.rglob("*")
        if f.is_file() and f.name != ".lock"
    }
    file = swept.run.folder / "profile.yaml"
    assert (
        sweeping.main(["--profile", str(file), "--out", str(swept.run.folder), "--adapters"]) == 0
    )
    monkeypatch.setattr(Run, "_work", lambda self, jobs: jobs and pytest.fail(f"made {jobs}"))
    swept.run.evaluate("lat", 1, "variant", {"attack.eps": 0.1, "defence.kl": 1.0})
    after = {
        f: f.stat().st_mtime_ns
        for f in swept.run.folder.rglob("*")
        if f.is_file() and f.name != ".lock"
    }
    assert after == before


def test_a_trial_that_fails_is_named_and_not_repeated(swept, tmp_path, capsys):
    """That rerouting trains without an attack is said by its objective."""
    profile = profile_with({"objective": ("rerouting", "safety-training")}, seeds=(0,))
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json")))
    out, scratch = tmp_path / "run", tmp_path / "scratch"
    options = ["--profile", str(tmp_path / "my.yaml"), "--out", str(out), "--scratch", str(scratch)]
    assert sweeping.main(options) == 1
    said = capsys.readouterr().out
    assert (
        "lat[objective=rerouting] seed 0: SettingError: objective = 'rerouting' trains" in said
        and "1 made, 0 kept, 1 failed" in said
    )
    assert {trial: len(pids) for trial, pids in attempts(scratch).items()} == {
        "lat-objective=rerouting-seed0": 1,
        "lat-objective=safety-training-seed0": 1,
    }
    assert not list((out / "models").glob("lat*")), (
        "adapters come back only when they are asked for"
    )


def test_what_is_finished_is_kept_when_a_sweep_is_stopped(swept, tmp_path):
    profile = profile_with(GRID, seeds=(0,))
    run, scratch, lines = Run(profile, tmp_path / "run"), tmp_path / "scratch", []

    def interrupt(line):
        lines.append(line)
        if "lat[" in line:
            while not any(map(written, scratch.glob("*/lat-*/metrics/lat-*.jsonl"))):
                time.sleep(0.01)  # until the other one is in the middle
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(run, scratch=scratch, say=interrupt)
    finished = [t for t in sweeping.trials(run) if run.layout.table_file(t, "variant").exists()]
    assert len(finished) == 1 and "1 trials left" in lines[-1]
    (other,) = set(sweeping.trials(run)) - set(finished)
    (lock,) = scratch.glob(f"*/{other.folder}.lock")
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # once it has let go
    assert lock.with_suffix("").is_dir(), "it was not cut short"
    result = sweep(run, scratch=scratch, say=lines.append)
    assert result.kept == finished and result.done == [other]


def test_numbers_of_a_sweep_are_a_table(swept):
    table = sweep_table(Evidence.load(swept.run.folder))
    assert list(table["eps"]) == [0.05, 0.05, 0.1, 0.1] and list(table["seed"]) == [0, 1, 0, 1]
    rows = swept.run.outcomes()
    rows = rows[
        (rows["method"] + "[" + rows["variant"] + "]" == table["label"][2])
        & (rows["seed"] == 0)
        & (rows["attack"] == "pgd")
    ]
    assert len(rows)
    assert table["asr"][2] == pytest.approx((rows["outcome"] == "complied").mean())
    assert (table["asr_low"] <= table["asr"]).all() and (table["asr"] <= table["asr_high"]).all()


# ---- without a cluster
# ---------------------------------------------------------------------------------------------


def test_without_ray_the_error_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"pip install 'latlib\[ray\]'"):
        sweep(Run(PROFILE, tmp_path / "run"), say=lambda line: None)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"attack.eps": [0.1, -1.0]}, r"sweep.grid.attack.eps: methods.lat.attack.eps = -1.0"),
        ({"attack.epz": [0.1]}, r"sweep.grid.attack.epz: .*did you mean 'attack.eps'"),
        ({"attack.eps": ["8e-5"]}, r"sweep.grid.attack.eps: .*is text, not a number"),
        ({"attack.eps": []}, r"sweep.grid.attack.eps = \[\]: give at least one value"),
        ({"attack.eps": [0.1, 0.1]}, r"sweep.grid.attack.eps = \[0.1, 0.1\]: .* each once"),
    ],
)
def test_a_wrong_grid_is_named(tmp_path, grid, message):
    tree = load_profile("smoke").model_dump(mode="json")
    tree["sweep"]["grid"] = grid
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ProfileError, match=message):
        load_profile(tmp_path / "my.yaml")


def test_a_profile_without_a_grid_says_what_to_add(tmp_path, capsys):
    assert sweeping.main(["--profile", "smoke", "--out", str(tmp_path / "run")]) == 2
    assert "profile smoke has no sweep.grid: add one" in capsys.readouterr().err


def test_the_grid_is_crossed():
    profile = profile_with({"attack.eps": (0.1, 0.2), "attack.sites": ([1], [1, 2])})
    assert points(profile)[1:3] == [
        {"attack.eps": 0.1, "attack.sites": (1, 2)},
        {"attack.eps": 0.2, "attack.sites": (1,)},
    ]
