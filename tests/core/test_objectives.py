"""What defences minimise, where the training tests do not reach: representation rerouting against
plain loops, and which objective settings ask for.
"""

import pytest
import torch
from tiny_models import LAYERS, language_model, token_rows

from latlib.batch import collate
from latlib.config.profile import validated
from latlib.config.sections import ProfileError, TrainSettings
from latlib.errors import SettingError
from latlib.objectives import OBJECTIVES, RepresentationRerouting
from latlib.train import Trainer

KINDS = ["stock", "lean"]
ROWS = 4


def settings_for(**changes) -> TrainSettings:
    plain = {
        "objective": "rerouting",
        "attack": {"steps": 0},
        "rerouting": {"sites": (1, 2), "alpha": 3.0, "retain": 0.5},
        "steps": 10,
        "batch": ROWS,
        "benign_batch": ROWS,
        "micro_batch": 2,
        "lr": 1e-2,
    }
    return TrainSettings(**{**plain, **changes})


def trainer_for(kind="lean", trained=True, **changes) -> Trainer:
    lm = language_model(kind, trained=trained)
    return Trainer(lm, token_rows(ROWS, 2), token_rows(ROWS, 1), settings_for(**changes), seed=0)


def streams(lm, row, adapter):
    """site -> [positions, d_model] of one unpadded row."""
    found = lm.network(adapter).capture(collate([row]), [1, 2])
    return {site: stream[0] for site, stream in found.items()}


def by_hand(trainer, step) -> dict[str, float]:
    """The two terms, position by position and site by site."""
    turned, moved = [], []
    for row in trainer.harmful:
        row = type(row)(row.prompt, row.completions[:1])
        student, teacher = (streams(trainer.lm, row, adapter) for adapter in (True, False))
        for at in range(len(row.prompt), row.length):
            for site in (1, 2):
                a, b = student[site][at], teacher[site][at]
                turned.append(max(0.0, (a @ b / (a.norm() * b.norm())).item()))
    for row in trainer.benign:
        student, teacher = (streams(trainer.lm, row, adapter) for adapter in (True, False))
        for at in range(row.length):
            moved += [(student[site][at] - teacher[site][at]).norm().item() for site in (1, 2)]
    share = step / 20
    return {
        "rerouting": 3.0 * (1 - share) * sum(turned) / len(turned),
        "retain": 3.0 * 0.5 * share * sum(moved) / len(moved),
    }


@pytest.mark.parametrize("micro_batch", [ROWS, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_rerouting_equals_plain_loops_at_every_step(kind, micro_batch):
    trainer = trainer_for(kind, micro_batch=micro_batch)
    for step in range(3):
        expected = by_hand(trainer, step)
        metrics = trainer.train_step()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, abs=1e-6), (step, name)
        assert metrics["total"] == pytest.approx(metrics["rerouting"] + metrics["retain"])


def test_rerouting_turns_harmful_representations_and_keeps_benign_ones():
    trainer = trainer_for(steps=60, rerouting={"sites": (1, 2), "alpha": 3.0, "retain": 0.1})

    def overlap(rows, first) -> float:
        values = []
        for row in rows:
            row = type(row)(row.prompt, row.completions[:1])
            a, b = (streams(trainer.lm, row, adapter)[2][first(row) :] for adapter in (True, False))
            values.append(torch.cosine_similarity(a, b, dim=-1).mean().item())
        return sum(values) / len(values)

    before = overlap(trainer.harmful, lambda row: len(row.prompt))
    trainer.run()
    after = overlap(trainer.harmful, lambda row: len(row.prompt))
    benign = overlap(trainer.benign, lambda row: 0)
    assert after < 0.6 * before and benign > after + 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_rerouting_leaves_the_refusal_out_and_trains_the_adapter_alone(kind):
    trainer = trainer_for(kind)
    before = [p.detach().clone() for p in trainer.lm.model.parameters()]
    harmful, benign = trainer.objective.rows(trainer.harmful, trainer.benign, False)
    assert [row.completions for row in harmful] == [r.completions[:1] for r in trainer.harmful]
    assert benign == trainer.benign
    trainer.train_step()
    named = zip(before, trainer.lm.model.named_parameters(), strict=True)
    moved = {name: not torch.equal(old, new) for old, (name, new) in named}
    assert any(moved.values()) and all("lora_" in name for name, yes in moved.items() if yes)


def test_rerouting_under_an_attack_is_refused():
    with pytest.raises(SettingError, match="attack.steps = 5: set it to 0"):
        trainer_for(attack={"steps": 5})


def test_settings_choose_the_objective():
    assert type(trainer_for().objective) is RepresentationRerouting
    with pytest.raises(ProfileError, match="objective = 'refusals'"):
        validated(TrainSettings, {"objective": "refusals"})
    allowed = TrainSettings.model_fields["objective"].annotation.__args__
    assert set(allowed) == set(OBJECTIVES)


def test_its_sites_are_of_the_model():
    with pytest.raises(ValueError, match=f"site = 9 is outside this model of {LAYERS} blocks"):
        trainer_for(rerouting={"sites": (9,)}).train_step()
