"""Checkpoints: a damaged one is said and passed by, a half one is never there, one that does not
fit is refused.
"""

import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from tiny_models import language_model, token_rows

from latlib.config.sections import AttackSettings, ProfileError, TrainSettings
from latlib.experiment import checkpoint
from latlib.experiment.checkpoint import (
    Due,
    load_checkpoint,
    read_checked,
    save_checkpoint,
    write_checked,
)
from latlib.io import files
from latlib.train import Trainer


def trainer_of(steps=0, folder=None, lm=None, benign=0, seed=0, **changes) -> Trainer:
    """A trainer after so many steps, each saved to `folder`."""
    plain = dict(
        steps=9,
        batch=2,
        benign_batch=2,
        micro_batch=2,
        attack=AttackSettings(steps=0),
        checkpoints_kept=3,
    )
    lm = lm or language_model(trained=True)
    trainer = Trainer(
        lm, token_rows(4, 2), token_rows(4, 1, benign), TrainSettings(**plain | changes), seed
    )
    for _ in range(steps):
        trainer.train_step()
        if folder is not None:
            save_checkpoint(trainer, folder)
    return trainer


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def newest(folder):
    return sorted(folder.glob("step-*.pt"))[-1]


def test_the_newest_are_kept_and_the_last_is_taken(tmp_path):
    trainer = trainer_of(5, tmp_path)
    assert names(tmp_path) == ["step-00000003.pt", "step-00000004.pt", "step-00000005.pt"]
    other = trainer_of()
    assert load_checkpoint(other, tmp_path) == 5
    assert all(torch.equal(a, b) for a, b in zip(other.parameters, trainer.parameters, strict=True))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def without_checksum(file):
    file.write_bytes(file.read_bytes()[: -checkpoint.TAIL])


def wrong_checksum(file):
    file.write_bytes(file.read_bytes()[:-2] + b"?\n")


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip, without_checksum, wrong_checksum, empty])
def test_a_damaged_one_is_said_in_a_line_and_the_one_before_is_used(tmp_path, capsys, damage):
    trainer_of(3, tmp_path)
    damage(newest(tmp_path))
    assert load_checkpoint(trainer_of(), tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("checkpoint: step-00000003.pt in ") and "step-00000002.pt is tried" in line
    )


def test_every_byte_of_a_checkpoint_is_under_its_checksum(tmp_path):
    file = tmp_path / "a.pt"
    write_checked({"a": torch.arange(3)}, file)
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert read_checked(file)[0] is None, at
    file.write_bytes(whole)
    assert torch.equal(read_checked(file)[0]["a"], torch.arange(3))


def test_with_none_that_is_good_training_starts_from_the_beginning_and_says_so(tmp_path, capsys):
    trainer_of(2, tmp_path)
    for file in tmp_path.glob("*.pt"):
        flip(file)
    before = trainer_of()
    after = trainer_of()
    assert load_checkpoint(after, tmp_path) == 0
    assert all(torch.equal(a, b) for a, b in zip(before.parameters, after.parameters, strict=True))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[-1].endswith("training starts anew")
    assert load_checkpoint(after, tmp_path / "nothing") == 0


def test_nothing_in_a_checkpoint_is_run(tmp_path, capsys):
    """weights_only: an object that would run code when it is unpickled is a damaged checkpoint."""

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    trainer_of(1, tmp_path)
    write_checked({"made_with": Evil()}, tmp_path / "step-00000002.pt")
    assert load_checkpoint(trainer_of(), tmp_path) == 1
    assert not (tmp_path / "ran").exists() and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": 0.5}, ProfileError, "train.lr: 0.002 -> 0.5"),
        ({"evaluate_every": 2}, ProfileError, "train.evaluate_every: None -> 2"),
        ({"seed": 1}, ProfileError, "seed: 0 -> 1"),
        ({"benign": 1}, ValueError, "other rows"),
    ],
)
def test_one_of_another_training_is_refused(tmp_path, changes, error, message):
    trainer_of(1, tmp_path)
    with pytest.raises(error, match=message):
        load_checkpoint(trainer_of(**changes), tmp_path)


def test_one_of_another_shape_of_adapter_is_refused(tmp_path):
    trainer_of(1, tmp_path)
    with pytest.raises(ProfileError, match="adapter: "):
        load_checkpoint(trainer_of(lm=language_model(num_hidden_layers=3)), tmp_path)


def test_when_checkpoints_are_made_may_change(tmp_path):
    trainer_of(1, tmp_path)
    assert (
        load_checkpoint(
            trainer_of(checkpoint_every=7, checkpoint_minutes=3.0, checkpoints_kept=1), tmp_path
        )
        == 1
    )


def test_torchs_own_random_numbers_go_on_where_they_were(tmp_path):
    trainer = trainer_of(1)
    torch.manual_seed(5)
    save_checkpoint(trainer, tmp_path)
    drawn = torch.rand(3)
    torch.manual_seed(6)
    load_checkpoint(trainer_of(), tmp_path)
    assert torch.equal(torch.rand(3), drawn)


@contextmanager
def disk_of(size):
    """No file can grow beyond `size` bytes here, as on a full disk."""
    old, handler = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("missing", [1, 20, 5000])  # of the checksum's line, and of the state
def test_a_full_disk_costs_no_older_checkpoint_and_leaves_nothing(tmp_path, missing):
    trainer = trainer_of(2, tmp_path)
    before, size = {f: f.read_bytes() for f in tmp_path.iterdir()}, newest(tmp_path).stat().st_size
    trainer.train_step()
    with (
        disk_of(size - missing),
        pytest.raises(OSError, match="of step 3 cannot be written.*free some space"),
    ):
        save_checkpoint(trainer, tmp_path)
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert load_checkpoint(trainer_of(), tmp_path) == 2
    save_checkpoint(trainer, tmp_path)
    assert load_checkpoint(trainer_of(), tmp_path) == 3


def test_it_is_on_the_disk_before_it_has_its_name_and_behind_its_log(tmp_path, monkeypatch):
    trainer, log, seen = trainer_of(1), tmp_path / "log", []
    log.touch()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(files, "sync", lambda path: seen.append((path.name, names(folder))))
    save_checkpoint(trainer, folder, log=log)
    (first, none), (aside, there), (last, named) = seen
    assert first == "log" and none == []
    assert aside.startswith(".step-00000001.pt.") and there == [aside]
    assert last == "checkpoints" and named == ["step-00000001.pt"]


def test_leavings_of_killed_writers_go(tmp_path):
    (tmp_path / ".step-00000001.pt.123").write_bytes(b"half")
    trainer_of(1, tmp_path)
    assert names(tmp_path) == ["step-00000001.pt"]


def test_due_every_so_many_steps_and_every_so_many_minutes(monkeypatch):
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    due = Due(TrainSettings(checkpoint_every=4, checkpoint_minutes=1.0))
    assert [step for step in range(1, 9) if due.after(step)] == [4, 8]
    now = 59.0
    assert not due.after(9)
    now = 60.0
    assert due.after(9)
    due.done()
    assert not due.after(10) and due.after(12)
    now = 120.0
    assert due.after(13)
