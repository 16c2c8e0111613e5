"""One model that two processes train is the model that one process trains: by DDP and by FSDP2, to
1e-10.

Two processes on this machine do everything once (`findings`), by either mode, and leave what they
found in files.
"""

import os
import signal
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import LAYERS, language_model, noise_like, token_rows

from latlib.config.profile import load_profile
from latlib.config.sections import (
    AttackSettings,
    DefenceSettings,
    ModelSettings,
    ParallelSettings,
    ProfileError,
    TrainSettings,
)
from latlib.distributed import ranks
from latlib.distributed.ranks import adapter_state, wrap
from latlib.evaluation.generate import write
from latlib.experiment import build, jobs
from latlib.experiment import launch as parallel
from latlib.experiment.run import Run
from latlib.io.progress import Stopped, asked_by_signal, saving_on_signals
from latlib.planning import workers
from latlib.train import Trainer

MODES = ("ddp", "fsdp2")
ROWS, STEPS, HALF = 8, 5, 2
LAT = {"attack": {"start": "random"}, "clip": 0.05}
VARIANTS = {  # of one step
    "untargeted": {"attack": {"targeted": False}},
    "one forward, two updates": {"shared_forward": True, "iterations": 2},
    "reference kl": {"defence": {"kl_mode": "reference", "sft": 0.0}},
    "uneven": {"micro_batch": 3},  # three micro-batches alone, four in two processes
    "no benign forward": {"defence": {"kl": 0.0, "sft": 0.0}},
}


def settings_for(attack=None, defence=None, **changes) -> TrainSettings:
    attack = AttackSettings(
        **{"sites": ("embedding", 1, 2), "eps": 1.5, "steps": 2, "rule": "l2", **(attack or {})}
    )
    defence = DefenceSettings(
        **{"toward": 0.5, "away": 0.4, "kl": 0.3, "sft": 0.2, **(defence or {})}
    )
    plain = dict(
        steps=STEPS,
        batch=ROWS,
        benign_batch=ROWS,
        micro_batch=2,
        lr=1e-2,
        lr_warmup=0,
        lr_decay_share=0.0,
    )
    return TrainSettings(
        **{**plain, "clean_share": 0.3, "attack": attack, "defence": defence, **changes}
    )


def trainer_for(mode=None, model=None, rows=3 * ROWS, **changes) -> Trainer:
    lm = model or language_model("auto" if mode else "stock", trained=True)
    lm = wrap(lm, mode) if mode else lm
    return Trainer(lm, token_rows(rows, 2), token_rows(rows, 1), settings_for(**changes), 0)


def steps_of(trainer, steps) -> dict:
    """What so many steps log, and the adapter after them."""
    logged = [trainer.train_step() for _ in range(steps)]
    return {"logged": logged, "adapter": adapter_state(trainer.lm)}


class Numbers:
    """A tokenizer whose words are token ids."""

    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, ids, skip_special_tokens):
        return [" ".join(map(str, row)) for row in ids.tolist()]


def replies_of(trainer) -> list[str]:
    """What the model writes under a perturbation of its prompts."""
    lm = replace(trainer.lm, tokenizer=Numbers())

    def perturb(batch):
        return noise_like(batch, (1,), size=3.0)

    return write(lm, token_rows(4, 1), perturb, size=4, max_new_tokens=3)


def smoke(mode="ddp", count=1):
    profile = load_profile("smoke")
    changes = {"model": profile.model.model_copy(update={"forward": "stock"})}
    return profile.model_copy(
        update={**changes, "parallel": ParallelSettings(processes=count, mode=mode)}
    )


def with_base_of(folder: Path, base: Path, profile) -> Run:
    """A run that has the base model of another, and its residual norms."""
    run = Run(profile, folder)
    name = "residual_norms-seed0.json"
    for own, theirs in (
        ("models/base-seed0", "models/base-seed0"),
        (f"results/{name}", f"results/{name}"),
    ):
        with suppress(FileExistsError):  # the other process may have been faster
            (folder / own).symlink_to(base / theirs)
    return run


# ---- what each of the two processes does
# -----------------------------------------------------------------------------


def findings(mode: str, folder: Path) -> dict:
    """Everything the tests look at."""
    trainer = trainer_for(mode, **LAT)
    first, state = steps_of(trainer, HALF), trainer.state()
    rest, said = steps_of(trainer, STEPS - HALF), replies_of(trainer)
    found = {
        "replies": said,
        "lat": rest | {"logged": first["logged"] + rest["logged"]},
        "spread": spread(trainer),
        "state": state,
    }
    again = trainer_for(mode, model=language_model("auto"), **LAT)
    again.restore(state)
    found |= {"state again": again.state(), "resumed": steps_of(again, STEPS - HALF)}
    again.restore(torch.load(folder / "alone.pt", weights_only=True))
    found |= {"resumed from one": steps_of(again, STEPS - HALF)}
    if ranks.is_main():
        torch.save(state, folder / f"{mode}-state.pt")
        again.lm.model.save_pretrained(
            folder / f"{mode}-adapter", state_dict=found["resumed from one"]["adapter"]
        )
    found |= {name: steps_of(trainer_for(mode, **changes), 1) for name, changes in VARIANTS.items()}
    found |= {
        "refusals": refusals(mode),
        "agreed": [ranks.broadcast(ranks.is_main() == own) for own in (True, False)],
    }
    return found | {"stopped": stopped_after(mode, folder)} | negative_controls(mode)


def spread(trainer) -> dict:
    """name -> (elements, elements here, processes that hold a part), of parameters and of the
    optimiser's state.
    """

    def parts(tensor) -> tuple[int, int, int]:
        if not hasattr(tensor, "full_tensor"):
            return tensor.numel(), tensor.numel(), 1
        return tensor.numel(), tensor.to_local().numel(), tensor.device_mesh.size()

    moments = {
        f"moment {i}": parts(state["exp_avg"])
        for i, state in enumerate(trainer.optimiser.state.values())
    }
    return {name: parts(p) for name, p in trainer.lm.model.named_parameters()} | moments


def refusals(mode: str) -> dict:
    found = {}
    for name, changes in {
        "batch": {"batch": 1},
        "benign_batch": {"benign_batch": 3},
        "benign_batch that plays no part": {"benign_batch": 3, "defence": {"kl": 0.0, "sft": 0.0}},
        "lean": {"model": language_model("lean")},
    }.items():
        try:
            trainer_for(mode, **changes)
        except ProfileError as error:
            found[name] = str(error)
    return found


def stopped_after(mode: str, folder: Path) -> dict:
    """Train an adapter of a run; a stop is asked for after step 3 (process 1 hears one all the
    time), then go on.
    """
    base, found = folder / "base", {}
    run = with_base_of(folder / f"{mode}-run", base, smoke(mode))
    requested, stop = build.stop_requested, run.folder / "STOP"
    if not ranks.is_main():
        build.stop_requested = lambda folder: True

    def on_step(step, total, detail) -> None:
        if step == 3 and ranks.is_main():
            stop.touch()

    try:
        build.make_adapter(run.layout, run.spec("lat"), on_step)
    except Stopped as error:
        found["said"] = str(error)
    build.stop_requested = requested
    ranks.wait()
    stop.unlink(missing_ok=True)
    ranks.wait()
    build.make_adapter(run.layout, run.spec("lat"), lambda step, total, detail: None)
    return found


def negative_controls(mode: str) -> dict:
    """The mistakes that the tests must be able to see."""
    found, trainer = {}, trainer_for(mode, **LAT)
    counts = trainer.objective.counts

    def own_counts(parts):
        own = counts(trainer.processes.own(parts))
        return {name: trainer.processes.world * n for name, n in own.items()}

    trainer.objective.counts = own_counts
    found["a mean for each process"] = steps_of(trainer, HALF)
    if mode == "ddp":
        trainer = trainer_for(mode, **LAT)
        trainer.processes.through = lambda train, call: call()
        found["wrapper bypassed"] = steps_of(trainer, HALF)
    else:
        lm = language_model("auto", trained=True)
        trainer, before = trainer_for(model=lm, **LAT), adapter_state(lm)
        trainer.lm = wrap(lm, mode)
        trainer.processes = trainer.lm.processes
        found["optimiser before spreading"] = steps_of(trainer, HALF) | {"before": before}
    return found


def one_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    try:
        ranks.join_group(ModelSettings(device="cpu"))
        for mode in MODES:
            torch.save(findings(mode, folder), folder / f"{mode}-{rank}.pt")
        ranks.leave()
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)


# ---- the tests
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    run = Run(smoke(), folder / "base")
    run.norms(0)  # makes the base model
    return folder


@pytest.fixture(scope="module")
def alone() -> dict:
    """What one process finds."""
    trainer = trainer_for(**LAT)
    first, state = steps_of(trainer, HALF), trainer.state()
    rest, said = steps_of(trainer, STEPS - HALF), replies_of(trainer)
    found = {
        "replies": said,
        "half": first,
        "state": state,
        "lat": rest | {"logged": first["logged"] + rest["logged"]},
    }
    return found | {name: steps_of(trainer_for(**changes), 1) for name, changes in VARIANTS.items()}


@pytest.fixture(scope="module")
def pair(folder, alone) -> dict:
    """(mode, process) -> its `findings`."""
    torch.save(alone["state"], folder / "alone.pt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        jobs.worker_context().Process(target=one_of_two, args=(rank, port, folder))
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(300)
    finally:
        for process in started:
            process.kill()
    errors = [file.read_text() for file in sorted(folder.glob("error-*.txt"))]
    assert not errors, "\n".join(errors)
    return {
        (m, r): torch.load(folder / f"{m}-{r}.pt", weights_only=False)
        for m in MODES
        for r in (0, 1)
    }


def distance(a: dict, b: dict) -> float:
    """The largest difference between two adapters."""
    assert a["adapter"].keys() == b["adapter"].keys()
    return max((a["adapter"][n] - b["adapter"][n]).abs().max().item() for n in a["adapter"])


@pytest.mark.parametrize("name", ["lat", *VARIANTS])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_what_one_trains(pair, alone, mode, name):
    """Adapter, gradient norms before clipping, every logged loss and what the attack reached, on
    either process.
    """
    logged = alone[name]["logged"]
    if name == "lat":
        assert len(logged) == STEPS and all(step["grad_norm"] > 0.05 for step in logged), (
            "clipping was not at work"
        )
        assert set(logged[0]) >= {
            "total",
            "toward",
            "away",
            "kl",
            "sft",
            "attack_start",
            "attack_end",
            "attack_won",
        }
    for rank in (0, 1):
        found = pair[mode, rank][name]
        assert distance(found, alone[name]) < 1e-10
        for a, b in zip(found["logged"], logged, strict=True):
            assert a == pytest.approx(b, rel=0, abs=1e-10)
    assert pair[mode, 0][name]["logged"] == pair[mode, 1][name]["logged"]


@pytest.mark.parametrize("mode", MODES)
def test_every_process_writes_the_replies_that_one_writes(pair, alone, mode):
    assert len(set(alone["replies"])) > 1
    assert pair[mode, 0]["replies"] == pair[mode, 1]["replies"] == alone["replies"]


def test_under_fsdp2_every_process_holds_a_part_of_every_weight(pair):
    """But of the output matrix; under DDP, which this tells apart, each holds all."""
    mine, theirs = pair["fsdp2", 0]["spread"], pair["fsdp2", 1]["spread"]
    assert sum("lora_" in n for n in mine) == sum("moment" in n for n in mine) == 2 * 7 * LAYERS
    assert sum("base_layer" in n for n in mine) == 7 * LAYERS and any(
        "embed_tokens" in n for n in mine
    )
    for name, (size, here, world) in mine.items():
        if "lm_head" in name:
            assert (here, world) == (size, 1)
            continue
        assert world == theirs[name][2] == 2, name
        assert here + theirs[name][1] == size and 0 < here < size, name
    assert all(
        here == size and world == 1 for size, here, world in pair["ddp", 0]["spread"].values()
    )


@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_whole_and_comes_back_as_it_was(pair, folder, mode):
    found = pair[mode, 0]
    for a, b in ((found["state"], found["state again"]), (found["state"], pair[mode, 1]["state"])):
        assert flat(a).keys() == flat(b).keys()
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(flat(b)[k])) for k, v in flat(a).items()
        )
    adapter = found["resumed from one"]["adapter"]
    file = load_file(folder / f"{mode}-adapter" / "adapter_model.safetensors")
    lm = language_model("stock")
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name in adapter:
                parameter.copy_(adapter[name])
    expected = get_peft_model_state_dict(lm.model)
    assert file.keys() == expected.keys() and all(torch.equal(file[n], expected[n]) for n in file)


def flat(state, prefix="") -> dict:
    """dotted name -> every number or tensor of a state."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, value in items for k, v in flat(value, f"{prefix}.{name}").items()}
    return {} if state is None or isinstance(state, str) else {prefix: state}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_with_another_number_of_processes(pair, alone, folder, mode):
    for rank in (0, 1):
        found = pair[mode, rank]
        assert distance(found["resumed"], found["lat"]) == 0
        assert distance(found["resumed from one"], alone["lat"]) < 1e-10
    state = torch.load(folder / f"{mode}-state.pt", weights_only=True)
    assert flat(state).keys() == flat(alone["state"]).keys()
    trainer = trainer_for(**LAT)
    trainer.restore(state)
    assert distance(steps_of(trainer, STEPS - HALF), alone["lat"]) < 1e-10


def test_a_checkpoint_of_other_rows_is_refused(alone):
    with pytest.raises(
        ValueError,
        match="step 2 was made with other rows than these(?s:.)*delete it to begin again",
    ):
        trainer_for(rows=3 * ROWS - 1, **LAT).restore(alone["state"])


@pytest.mark.parametrize("mode", MODES)
def test_a_mean_for_each_process_would_be_seen(pair, alone, mode):
    found = pair[mode, 0]["a mean for each process"]
    assert distance(found, alone["half"]) > 1e-4
    assert abs(found["logged"][0]["grad_norm"] - alone["half"]["logged"][0]["grad_norm"]) > 1e-4


def test_a_defence_around_the_wrapper_would_be_seen(pair, alone):
    bypassed = [pair["ddp", rank]["wrapper bypassed"] for rank in (0, 1)]
    assert distance(*bypassed) > 1e-3 and distance(bypassed[0], alone["half"]) > 1e-3


def test_an_optimiser_made_before_spreading_would_be_seen(pair, alone):
    found = pair["fsdp2", 0]["optimiser before spreading"]
    assert (
        distance(found, {"adapter": found["before"]}) == 0 and distance(found, alone["half"]) > 1e-3
    )


@pytest.mark.parametrize("mode", MODES)
def test_batches_that_cannot_be_shared_are_refused(pair, mode):
    said = pair[mode, 1]["refusals"]
    assert said.keys() == {"batch", "benign_batch", "lean"}
    assert (
        said["batch"].startswith("train.batch = 1 is too small for 2 processes")
        and "at least 2" in said["batch"]
    )
    assert (
        said["benign_batch"].startswith("train.benign_batch = 3 is too small")
        and "least 4" in said["benign_batch"]
    )
    assert "model.forward = 'lean' runs in one process: set it to 'auto'" in said["lean"]


@pytest.mark.parametrize(
    "world, rows, benign, micro_batch, count", [(1, 8, 8, 3, 3), (2, 8, 8, 3, 4), (4, 9, 9, 2, 8)]
)
def test_the_number_of_micro_batches_is_a_multiple_of_the_processes(
    world, rows, benign, micro_batch, count
):
    trainer = trainer_for(batch=rows, benign_batch=benign, micro_batch=micro_batch)
    trainer.processes = ranks.Processes(0, world)
    parts = trainer._micro_batches(True, torch.Generator())
    assert len(parts) == count and [part.number for part in parts] == list(range(count))
    assert sum(part.attacked.shape[0] for part in parts) == rows
    shares = [ranks.Processes(rank, world).own(parts) for rank in range(world)]
    assert {len(share) for share in shares} == {count // world}
    assert sorted(part.number for share in shares for part in share) == list(range(count))


def test_random_starts_are_of_the_micro_batch():
    """Whoever runs it, after whichever others, and on no step the same."""
    trainer = trainer_for(**LAT)
    parts = trainer._micro_batches(True, torch.Generator().manual_seed(0))
    network = trainer.lm.network()
    first, second = trainer._attack(network, parts[3]), trainer._attack(network, parts[3])
    assert torch.equal(first.deltas[1], second.deltas[1])
    trainer.step += 1
    assert not torch.equal(first.deltas[1], trainer._attack(network, parts[3]).deltas[1])


@pytest.mark.parametrize(
    "changes, forwards", [({}, 8), ({"shared_forward": True}, 4), ({"batch": 9}, 10)]
)
def test_gradients_are_exchanged_once_an_update_in_its_last_backward_pass(changes, forwards):
    seen = []

    class Seen(ranks.Processes):
        def exchange(self, now: bool) -> None:
            self.now = now

        def through(self, train: bool, call):
            if train and torch.is_grad_enabled():
                seen.append(self.now)
            return call()

    trainer_for(model=replace(language_model("stock"), processes=Seen()), **changes).train_step()
    assert seen == [False] * (forwards - 1) + [True]


def test_what_one_process_says_holds_for_all(pair):
    for mode in MODES:
        assert pair[mode, 0]["agreed"] == pair[mode, 1]["agreed"] == [True, False]
        said = [pair[mode, rank]["stopped"]["said"] for rank in (0, 1)]
        assert said == ["lat-seed0: stopped after step 3 with everything saved"] * 2


@pytest.fixture(scope="module")
def trained_alone(folder) -> Run:
    run = with_base_of(folder / "alone", folder / "base", smoke())
    run.ensure([("lat", 0)])
    return run


def assert_equal_runs(run: Run, alone: Run) -> None:
    """An adapter folder and the metrics, up to float32's rounding."""
    folders = [r.layout.model_folder(r.spec("lat")) for r in (run, alone)]
    assert {f.name for f in folders[0].iterdir()} == {f.name for f in folders[1].iterdir()}
    found, expected = (load_file(f / "adapter_model.safetensors") for f in folders)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-5)
    a, b = (r.metrics("lat").drop(columns="seconds") for r in (run, alone))
    assert list(a.columns) == list(b.columns) and a["step"].tolist() == list(range(1, 7))
    assert (a.fillna(-1) - b.fillna(-1)).abs().max().max() < 1e-4
    assert not list((run.folder / "models").glob(".lat*"))


@pytest.mark.parametrize("mode", MODES)
def test_a_stopped_run_goes_on_to_the_adapter_that_one_process_makes(
    pair, folder, trained_alone, mode
):
    assert_equal_runs(Run(smoke(mode), folder / f"{mode}-run"), trained_alone)


def test_a_run_starts_the_processes_its_profile_asks_for(folder, trained_alone):
    run, told = with_base_of(folder / "launched", folder / "base", smoke("ddp", 2)), []
    launch, begun = parallel.launch, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            parallel,
            "launch",
            lambda r, s, on_step: begun.append(s) or launch(r, s, told_by(on_step, told)),
        )
        run.ensure([("lat", 0)])
    assert [spec.folder for spec in begun] == ["lat-seed0"]
    assert told[-1][:2] == (6, 6) and told[-1][2].startswith("loss")
    assert not list((run.folder / "logs").iterdir())
    assert_equal_runs(run, trained_alone)


def told_by(on_step, told):
    def tell(*step) -> None:
        told.append(step)
        on_step(*step)

    return tell


def launch_doing(does, run, monkeypatch, on_step=lambda *_: None):
    """`launch` of processes that do something else: `does(rank, task)`."""
    monkeypatch.setattr(parallel, "_one_of_several", does)
    parallel.launch(run.layout, run.spec("lat"), on_step)


def stopped(rank, task):
    task.said.put(Stopped("why"))


def refused(rank, task):
    """By one of them, while the other waits for it."""
    if rank == 0:
        time.sleep(600)
    task.said.put(ProfileError("why"))
    raise ProfileError("why")


def broken(rank, task):
    if rank == 0:
        time.sleep(600)
    raise OSError("why it broke")


def killed(rank, task):
    if rank == 0:
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "does, error, message",
    [
        (stopped, Stopped, "^why$"),
        (refused, ProfileError, "^why$"),
        (broken, RuntimeError, "lat seed 0: process 1 of 2 failed(?s:.)*OSError: why it broke"),
        (killed, RuntimeError, "lat seed 0: process 1 of 2 failed(?s:.)*SIGKILL"),
    ],
)
def test_what_ended_the_processes_is_raised(folder, monkeypatch, does, error, message):
    monkeypatch.setattr(parallel, "GRACE_SECONDS", 0.5)
    run = Run(smoke("ddp", 2), folder / "launched")
    with pytest.raises(error, match=message):
        launch_doing(does, run, monkeypatch)


def says_who_it_is(rank, task):
    jobs.begin_worker(1, task.layout.folder)
    if rank == 0:
        task.said.put((1, 2, str(os.getpid())))
    time.sleep(600)


def saves_when_asked(rank, task):
    """Long after the parent has been told."""
    with saving_on_signals():
        task.said.put((1, 2, "begun"))
        until = time.monotonic() + 60
        while not asked_by_signal() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(3)
        (task.layout.folder / f"saved-{rank}").touch()
    task.said.put(Stopped("why"))


def test_a_signal_is_passed_on_and_the_step_at_hand_saved(folder, monkeypatch):
    monkeypatch.setattr(parallel, "GRACE_SECONDS", 0.5)
    run = Run(smoke("ddp", 2), folder / "launched")
    run.layout.folder.mkdir(parents=True, exist_ok=True)
    begun = []

    def on_step(*_):
        begun.append(0)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="^why$"):
        launch_doing(saves_when_asked, run, monkeypatch, on_step)
    assert all((run.layout.folder / f"saved-{rank}").exists() for rank in range(2))


def test_processes_end_with_a_launch_that_is_interrupted(folder, monkeypatch):
    run, pids = Run(smoke("ddp", 2), folder / "launched"), []

    def interrupted(step, total, detail) -> None:
        pids.append(int(detail))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_doing(says_who_it_is, run, monkeypatch, interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def launch_and_tell(folder):
    """To be killed in the middle."""

    def tell(step, total, detail) -> None:
        (folder / "writing").write_text(detail)
        (folder / "writing").rename(folder / "pid")

    parallel._one_of_several = says_who_it_is
    run = Run(smoke("ddp", 2), folder / "launched")
    parallel.launch(run.layout, run.spec("lat"), tell)


def test_processes_end_with_a_launch_that_is_killed(folder):
    launching = jobs.worker_context().Process(target=launch_and_tell, args=(folder,))
    launching.start()
    until = time.monotonic() + 60
    while not (folder / "pid").exists() and time.monotonic() < until:
        time.sleep(0.05)
    pid = int((folder / "pid").read_text())
    launching.kill()
    while psutil.pid_exists(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    "device, processes_each, expected",
    [("cpu", 1, 4), ("cpu", 2, 2), ("cpu", 8, 1), ("cuda", 2, 1)],
)
def test_models_do_not_share_the_gpus_of_one(monkeypatch, device, processes_each, expected):
    monkeypatch.setattr(workers, "resolve_device", lambda _: torch.device(device))
    profile = smoke("ddp", processes_each).model_copy(update={"workers": 4})
    assert workers.worker_count(profile, 6) == expected


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr(ranks, "resolve_device", torch.device)
    with pytest.raises(
        ProfileError, match="model.device = 'cuda:1' is one GPU for all processes: set it to 'auto'"
    ):
        ranks.join_group(ModelSettings(device="cuda:1"))
