"""What is said while a training goes wrong, and that nothing is said while it goes well."""

import math

import pytest
import torch
from tiny_models import language_model, token_rows

from latlib.config.sections import AttackSettings, DefenceSettings, TrainSettings
from latlib.experiment.alarms import STILL, Alarms
from latlib.train import Trainer

ROWS = 6


def trained(capsys, steps=12, spoil=None, rows=ROWS, **changes):
    """The lines on stderr of a training. spoil: called before every step. rows: of each kind; more
    than ROWS, and no two steps have the same."""
    settings = TrainSettings(
        steps=steps,
        batch=ROWS,
        benign_batch=ROWS,
        micro_batch=ROWS,
        lr_warmup=0,
        attack=AttackSettings(steps=0),
        defence=DefenceSettings(away=0.0, kl=0.5, sft=0.5),
        **changes,
    )
    lm = language_model()
    trainer = Trainer(lm, token_rows(rows, 2), token_rows(rows, 1), settings, 0)
    alarms = Alarms(trainer, "ssft-seed0")
    for step in range(1, steps + 1):
        if spoil:
            spoil(trainer, step)
        alarms.after(step, trainer.train_step())
    return capsys.readouterr().err.splitlines()


def test_a_training_that_goes_well_is_not_talked_about(capsys):
    assert trained(capsys, lr=1e-2) == []


@pytest.mark.parametrize("lr", [1e3, 1e8])
def test_a_rate_that_breaks_the_model_is_said_once(capsys, lr):
    """As after a warm-up: what it had learned goes."""

    def spoil(trainer, step):
        if step == 60:
            trainer.settings = trainer.settings.model_copy(update={"lr": lr})

    lines = trained(capsys, steps=60 + STILL, lr=3e-2, spoil=spoil)
    (broken,) = [line for line in lines if "the loss on benign rows rose from" in line]
    assert broken.startswith("training: ssft-seed0: ") and broken.endswith("lower train.lr")


def test_a_rise_that_passes_is_not_talked_about(capsys):
    """As in the steps after an attack has begun."""
    before = []

    def spoil(trainer, step):
        if step == 31:
            before.extend(p.detach().clone() for p in trainer.parameters)
        if 31 <= step < 38:
            for parameter in trainer.parameters:
                parameter.data.normal_()
        if step == 38:
            for parameter, earlier in zip(trainer.parameters, before, strict=True):
                parameter.data.copy_(earlier)

    assert trained(capsys, steps=40, lr=3e-2, spoil=spoil) == []


def test_a_loss_that_stays_where_it_is_is_said_once(capsys):
    lines = trained(capsys, steps=2 * STILL, lr=1e-30)
    assert len(lines) == 1 and f"for {STILL} steps: lower train.lr" in lines[0]


def test_a_gradient_that_is_gone_is_said_once(capsys):
    """As at a rate of 1e6 from the first step on: the loss still changes, with the rows."""

    def spoil(trainer, step):
        for parameter in trainer.parameters:
            parameter.data.zero_()

    lines = trained(capsys, steps=2 * STILL, spoil=spoil, rows=3 * ROWS)
    assert len(lines) == 1 and f"the gradient is 0 for {STILL} steps: lower" in lines[0]


def test_a_skipped_step_is_said_with_its_rows(capsys):
    def spoil(trainer, step):
        weight = trainer.parameters[0].data
        weight[0, 0] = math.nan if step == 3 else torch.nan_to_num(weight[0, 0], 0.0)

    (line,) = trained(capsys, steps=5, lr=1e-3, spoil=spoil)
    assert (
        "step 3 was not finite and is skipped: harmful rows [" in line and "benign rows [" in line
    )
    (rows,) = line.split("harmful rows [")[1].split("]")[:1]
    assert sorted(map(int, rows.split(", "))) == list(range(ROWS))
