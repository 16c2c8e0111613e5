"""The training loop: the logged total is optimised, every micro-batch is attacked, a resumed run is
the same run.
"""

import math
import weakref
from dataclasses import replace

import pytest
import reference
import torch
from tiny_models import LAYERS, SCALING, D, benign_batch, language_model, token_rows

from latlib import train
from latlib.batch import TokenRow
from latlib.config.sections import AttackSettings, DefenceSettings, TrainSettings
from latlib.experiment.checkpoint import load_checkpoint, save_checkpoint
from latlib.losses import at_labels
from latlib.train import Trainer

METHODS = {
    "ssft": {"attack": {"steps": 0}},
    "at": {"attack": {"sites": ("embedding",)}},
    "lat": {},
    "lat-untargeted": {"attack": {"targeted": False}},
}
ROWS = 6


def settings_for(method="lat", attack=None, defence=None, **changes) -> TrainSettings:
    base = dict(sites=("embedding", 1, 2), eps=1.5, steps=3, rule="l2")
    attack = AttackSettings(**{**base, **METHODS[method].get("attack", {}), **(attack or {})})
    defence = DefenceSettings(
        **{"toward": 0.5, "away": 0.4, "kl": 0.3, "sft": 0.2, **(defence or {})}
    )
    plain = dict(
        steps=3,
        batch=ROWS,
        benign_batch=ROWS,
        micro_batch=ROWS,
        lr=1e-2,
        lr_warmup=0,
        lr_decay_share=0.0,
    )
    return TrainSettings(**{**plain, "clip": 1e9, "attack": attack, "defence": defence, **changes})


def trainer_for(method="lat", kind="lean", trained=True, seed=0, rows=ROWS, **changes) -> Trainer:
    lm = language_model(kind, trained=trained)
    return Trainer(
        lm, token_rows(rows, 2), token_rows(rows, 1), settings_for(method, **changes), seed
    )


def adapter_of(trainer) -> dict:
    return {n: p.detach().clone() for n, p in trainer.lm.model.named_parameters() if "lora_" in n}


def gradients_of(trainer) -> list:
    return [p.grad.clone() for p in trainer.parameters]


def spy_on_terms(trainer) -> list:
    """(micro-batch, deltas, tokens, terms) of every micro-batch that is trained on."""
    seen, forwards_of = [], trainer.objective.forwards

    def spy(part):
        tokens, found = {}, {}
        seen.append((part, part.deltas, tokens, found))

        def noted(run):
            def forward(network, part, counts):
                tokens.update(counts)
                terms, rows = run(network, part, counts)
                found.update({name: term.item() for name, term in terms.items()})
                return terms, rows

            return forward

        return [noted(run) for run in forwards_of(part)]

    trainer.objective.forwards = spy
    return seen


@pytest.mark.parametrize("kind", ["stock", "lean"])
@pytest.mark.parametrize("micro_batch", [ROWS, 2])
def test_steps_equal_the_reference(micro_batch, kind):
    """Attack, objective, clipping and AdamW, two steps, against plain loops over single rows."""
    trainer = trainer_for(
        kind=kind, rows=4, batch=4, benign_batch=4, micro_batch=micro_batch, clip=0.05
    )
    llama = reference.Llama.of(trainer.lm.model, SCALING)
    harmful, benign = (
        [(r.prompt, *r.completions) for r in rows] for rows in (trainer.harmful, trainer.benign)
    )
    leaves = [w for pair in llama.adapter.values() for w in pair]
    optimiser = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.0)
    eps = {"embedding": 1.5, 1: 1.5, 2: 1.5}
    for _ in range(2):
        metrics = trainer.train_step()
        deltas = [reference.pgd(llama, row, eps, D, "l2", steps=3, lr=2 / 3)[0] for row in harmful]
        optimiser.zero_grad()
        total = reference.defence(llama, harmful, deltas, benign, 0.5, 0.4, 0.3, 0.2)
        total.backward()
        norm = sum(w.grad.pow(2).sum() for w in leaves).sqrt().item()
        for w in leaves:
            w.grad *= min(1.0, 0.05 / (norm + 1e-6))
        optimiser.step()
        assert metrics["total"] == pytest.approx(total.item(), abs=1e-10)
        assert metrics["grad_norm"] == pytest.approx(norm, abs=1e-10)
        for name, parameter in trainer.lm.model.named_parameters():
            if "lora_" in name:
                at, which = name.split("model.model.", 1)[1].split(".lora_")
                expected = llama.adapter[at.removeprefix("model.")]["AB".index(which[0])]
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-10)
                torch.testing.assert_close(parameter.detach(), expected.detach(), rtol=0, atol=1e-8)


def test_the_merged_teacher_is_gone_before_the_student_runs():
    """A merged copy of the frozen model beside the student's would be a second model in memory."""
    trainer, teachers, seen = trainer_for(micro_batch=2), [], []
    network_of, forwards_of = trainer.lm.network, trainer.objective.forwards

    def network(adapter=True, train=False):
        found = network_of(adapter=adapter, train=train)
        if not adapter:
            teachers.append(weakref.ref(found.weights.blocks[0].qkv.value))
        return found

    def forwards(part):
        def first(*args):
            seen.append([teacher() for teacher in teachers])
            return run(*args)

        run, *others = forwards_of(part)
        return [first, *others]

    object.__setattr__(trainer.lm, "network", network)
    trainer.objective.forwards = forwards
    trainer.train_step()
    assert seen == [[None]] * 3


@pytest.mark.parametrize("method", METHODS)
def test_the_logged_total_is_the_sum_of_the_logged_terms(method):
    trainer = trainer_for(method, micro_batch=2)
    seen = spy_on_terms(trainer)
    metrics = trainer.train_step()
    terms = {
        name: sum(terms[name] for *_, terms in seen if name in terms)
        for *_, found in seen
        for name in found
    }
    assert {name: metrics[name] for name in terms} == pytest.approx(terms, abs=1e-12)
    assert metrics["total"] == pytest.approx(sum(terms.values()), abs=1e-12)
    assert set(terms) == (
        {"toward", "kl", "sft"} if method == "lat-untargeted" else {"toward", "away", "kl", "sft"}
    )


def test_the_logged_total_is_what_the_gradient_descends():
    """Central difference of the logged total along the gradient = the squared norm of the
    gradient.
    """
    trainer, step = trainer_for("ssft", lr=1e-30, micro_batch=2), 1e-6
    norm = trainer.train_step()["grad_norm"]
    direction, totals = gradients_of(trainer), []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, gradient in zip(trainer.parameters, direction, strict=True):
                parameter += sign * step * gradient
        totals.append(trainer.train_step()["total"])
    assert (totals[0] - totals[1]) / (2 * step) == pytest.approx(norm**2, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_accumulated_micro_batches_equal_one_large_batch(method, micro_batch):
    whole, parts = (
        trainer_for(method, micro_batch=100),
        trainer_for(method, micro_batch=micro_batch),
    )
    seen = spy_on_terms(parts)
    for _ in range(2):
        a, b = whole.train_step(), parts.train_step()
        assert b == pytest.approx(a, abs=1e-9)
        for x, y in zip(gradients_of(whole), gradients_of(parts), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert len(seen) > 2 and all(part.attacked.shape[0] <= micro_batch for part, *_ in seen)


@pytest.mark.parametrize("kind", ["stock", "lean"])
@pytest.mark.parametrize(
    "change", [{"shared_forward": True}, {"pad_to": 16}, {"shared_forward": True, "micro_batch": 2}]
)
def test_layout_changes_no_gradient(kind, change):
    """Harmful and benign rows in one forward or two, whatever the padding."""
    plain, other = trainer_for(kind=kind), trainer_for(kind=kind, **change)
    for _ in range(2):
        assert other.train_step() == pytest.approx(plain.train_step(), abs=1e-9)
        for x, y in zip(gradients_of(plain), gradients_of(other), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["stock", "lean"])
def test_every_micro_batch_is_attacked_and_changed_by_its_own_perturbation(kind):
    trainer = trainer_for(kind=kind, micro_batch=2)
    forwards_of = trainer.objective.forwards
    seen = spy_on_terms(trainer)
    before = adapter_of(trainer)
    trainer.train_step()
    with torch.no_grad():  # the weights the attack saw
        for name, parameter in trainer.lm.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(before[name])
    assert len(seen) == 3
    for part, deltas, tokens, terms in list(seen):
        assert all(d.norm(dim=-1).max() > 0.5 for d in deltas.values())
        plain, calm = replace(part, deltas=None), {}
        for run in forwards_of(plain):
            calm |= run(trainer.lm.network(), plain, tokens)[0]
        assert all(abs(terms[name] - calm[name].item()) > 1e-3 for name in ("toward", "away"))
        # the attack made the rejected completion likelier
        assert terms["away"] > calm["away"].item()
        # benign rows carry no perturbation
        assert terms["kl"] == pytest.approx(calm["kl"].item(), abs=1e-12)


@pytest.mark.parametrize("rows, benign, micro_batch", [(2, 8, 2), (8, 2, 2), (5, 3, 2), (1, 1, 4)])
def test_no_row_is_left_out_whatever_the_micro_batch(rows, benign, micro_batch):
    trainer = trainer_for(batch=rows, benign_batch=benign, micro_batch=micro_batch, rows=8)
    seen = spy_on_terms(trainer)
    trainer.train_step()
    assert sum(part.attacked.shape[0] for part, *_ in seen) == rows
    assert sum(part.benign.shape[0] for part, *_ in seen if part.benign) == benign


@pytest.mark.parametrize("kind", ["stock", "lean"])
def test_kl_is_zero_at_the_start_and_positive_after_a_step(kind):
    trainer = trainer_for(kind=kind, trained=False)
    assert trainer.train_step()["kl"] == pytest.approx(0, abs=1e-14)
    assert trainer.train_step()["kl"] > 1e-6


def test_the_kl_coefficient_is_applied_to_value_and_gradient():
    found = {}
    for kl in (0.0, 0.1, 0.3):
        trainer = trainer_for("ssft", defence={"kl": kl, "sft": 0.0})
        metrics = trainer.train_step()
        found[kl] = metrics.get("kl", 0.0), metrics["total"], gradients_of(trainer)
    assert found[0.1][0] > 0 and found[0.3][0] == pytest.approx(3 * found[0.1][0], rel=1e-10)
    assert found[0.1][1] - found[0.0][1] == pytest.approx(found[0.1][0], rel=1e-10)
    for none, one, three in zip(*(found[kl][2] for kl in (0.0, 0.1, 0.3)), strict=True):
        torch.testing.assert_close(three - none, 3 * (one - none), rtol=0, atol=1e-10)
    assert (
        max(
            (one - none).abs().max() for none, one in zip(found[0.0][2], found[0.1][2], strict=True)
        )
        > 1e-4
    )


def test_kl_alone_pulls_the_student_back_to_its_teacher():
    only_kl = {"toward": 0.0, "away": 0.0, "sft": 0.0, "kl": 1.0}
    trainer = trainer_for("ssft", defence=only_kl, steps=40, lr=2e-2)
    totals = [trainer.train_step()["total"] for _ in range(40)]
    assert totals[-1] < 0.1 * totals[0]


def test_reference_kl_has_a_value_of_one_whatever_its_size():
    found = trainer_for("ssft", micro_batch=2, defence={"kl_mode": "reference"}).train_step()
    # a KL of about .01 is divided by itself and 1e-8
    assert found["kl"] == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("micro_batch", [ROWS, 2])
def test_reference_kl_is_taken_at_the_tokens_themselves(micro_batch):
    """As in the authors' code; with SFT beside it, which is learned where tokens are predicted.
    Two steps: the KL's own value is 1 whatever it is, but its gradient moves the other's."""
    weights = {"kl": 0.3, "sft": 0.2, "toward": 0.0, "away": 0.0, "kl_mode": "reference"}
    changes = {"rows": 4, "batch": 4, "benign_batch": 4, "micro_batch": micro_batch}
    trainer = trainer_for("ssft", defence=weights, **changes)
    llama = reference.Llama.of(trainer.lm.model, SCALING)
    leaves = [w for pair in llama.adapter.values() for w in pair]
    optimiser = torch.optim.AdamW(leaves, lr=1e-2, weight_decay=0.0)
    rows = sorted([(r.prompt, *r.completions) for r in trainer.benign], key=reference.length)
    tokens = sum(len(row[1]) for row in rows)
    for _ in range(2):
        metrics = trainer.train_step()
        optimiser.zero_grad()
        sft = sum(
            sum(reference.toward(reference.log_probabilities(llama, row, 1), row[1]))
            for row in rows
        )
        total = 0.2 * sft / tokens
        for part in (rows[i : i + micro_batch] for i in range(0, 4, micro_batch)):
            values = [v for row in part for v in reference.reverse_kl_at_tokens(llama, row)]
            mean = reference.mean(values)
            total = total + 0.3 * len(values) / tokens * mean / (mean.detach() + 1e-8)
        total.backward()
        optimiser.step()
        assert metrics["total"] == pytest.approx(total.item(), abs=1e-10)


def test_a_fresh_optimiser_forgets_every_step():
    """Adam's first step is the gradient's sign times the rate, whatever came before."""
    trainer = trainer_for(fresh_optimiser=True, lr=1e-3, iterations=1)
    for _ in range(2):
        before = [p.detach().clone() for p in trainer.parameters]
        trainer.train_step()
        for old, new in zip(before, trainer.parameters, strict=True):
            moved = new.grad.abs() > 1e-5
            assert moved.any()
            steps = (new.detach() - old)[moved]
            assert torch.allclose(steps, -1e-3 * new.grad[moved].sign(), rtol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_is_trained_and_the_teacher_stays(method):
    trainer, batch = trainer_for(method), benign_batch()
    before = {n: p.detach().clone() for n, p in trainer.lm.model.named_parameters()}
    teacher = at_labels(trainer.lm.network(adapter=False).hidden(batch), batch.source)
    trainer.run()
    for name, parameter in trainer.lm.model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
        assert parameter.requires_grad == ("lora_" in name)
    again = at_labels(trainer.lm.network(adapter=False).hidden(batch), batch.source)
    assert torch.equal(again, teacher)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method):
    trainer = trainer_for(method, trained=False, steps=30, lr=2e-2)
    totals = []
    trainer.run(lambda step, metrics: totals.append(metrics["toward"]))
    assert len(totals) == 30 == trainer.step
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])


def test_training_against_the_attack_makes_it_lose():
    """LAT lowers what the attack can reach; safety training without an attack does so less."""
    ends = {}
    for method in ("ssft", "lat"):
        trainer = trainer_for(method, trained=False, steps=40, lr=2e-2)
        trainer.run()
        ends[method] = attack_on(trainer).losses[-1].mean().item()
    assert ends["lat"] > ends["ssft"] + 0.15


def attack_on(trainer):
    attack = settings_for("lat").attack
    batch = train.collate(trainer.harmful)
    return train.pgd(trainer.lm.network(), batch, attack.threat_model(LAYERS), attack.search())


@pytest.mark.parametrize("kind", ["stock", "lean"])
@pytest.mark.parametrize("method", ["ssft", "lat", "lat-untargeted"])
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, method, kind):
    changes = dict(
        kind=kind,
        rows=7,
        batch=4,
        benign_batch=3,
        micro_batch=2,
        steps=4,
        clean_share=0.3,
        lr_warmup=3,
        lr_decay_share=0.5,
    )
    if method != "ssft":
        changes |= dict(attack={"start": "random"}, eps_ramp=3, attack_after=1)
    whole, logged = trainer_for(method, **changes), []
    whole.run(lambda step, metrics: logged.append(metrics))
    first, path = trainer_for(method, **changes), tmp_path / "folder" / "checkpoint.pt"
    assert load_checkpoint(first, path) == 0  # nothing there yet
    for _ in range(2):
        first.train_step()
    save_checkpoint(first, path)
    second, resumed = trainer_for(method, trained=False, **changes), []
    assert load_checkpoint(second, path) == 2
    second.run(lambda step, metrics: resumed.append(metrics))
    for name, value in adapter_of(whole).items():
        assert torch.equal(adapter_of(second)[name], value), name
    for a, b in zip(logged[2:], resumed, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    trainer, path = trainer_for("ssft"), tmp_path / "checkpoint.pt"
    trainer.train_step()
    save_checkpoint(trainer, path)
    trainer.train_step()

    def killed(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(trainer, path)
    assert load_checkpoint(trainer, path) == 1


def test_the_seed_decides_everything():
    def after_two_steps(seed):
        trainer = trainer_for(seed=seed, rows=12, batch=3, attack={"start": "random"})
        trainer.train_step(), trainer.train_step()
        return torch.cat([p.detach().flatten() for p in trainer.parameters])

    assert torch.equal(after_two_steps(0), after_two_steps(0))
    assert not torch.equal(after_two_steps(0), after_two_steps(1))


def test_rows_are_reshuffled_every_epoch():
    """A predecessor cycled through the batches of the first epoch for ever."""
    trainer = trainer_for("ssft", rows=12, batch=3, benign_batch=3)
    seen = spy_on_terms(trainer)
    for _ in range(8):
        trainer.train_step()
    batches = [frozenset(tuple(ids) for ids in part.attacked.labels.split(1)) for part, *_ in seen]
    prompts = [frozenset(tuple(row[:3]) for row in part.attacked.ids.tolist()) for part, *_ in seen]
    assert len(batches) == 8
    assert frozenset.union(*prompts[:4]) == frozenset.union(*prompts[4:])
    assert set(prompts[:4]) != set(prompts[4:])


def test_clean_rows_are_trained_without_their_perturbation():
    trainer = trainer_for(clean_share=0.5, micro_batch=3)
    seen = spy_on_terms(trainer)
    trainer.train_step()
    clean = torch.cat([part.clean for part, *_ in seen])
    assert clean.any() and not clean.all()
    for part, deltas, *_ in seen:
        for delta in deltas.values():
            assert torch.equal(delta.flatten(1).norm(dim=-1) == 0, part.clean)


def test_the_attack_begins_late_and_its_radius_grows():
    trainer = trainer_for(attack_after=2, eps_ramp=2, steps=5)
    seen, metrics = spy_on_terms(trainer), []
    trainer.run(lambda step, found: metrics.append(found))
    assert [m["eps_scale"] for m in metrics] == [0, 0, 0.5, 1, 1]
    assert ["attack_end" in m for m in metrics] == [False, False, True, True, True]
    largest = [
        max(d.norm(dim=-1).max().item() for d in deltas.values()) if deltas else 0
        for _, deltas, *_ in seen
    ]
    assert largest == pytest.approx([0, 0, 0.75, 1.5, 1.5], rel=0.02)
    assert all(
        m["attack_end"] < m["attack_start"] and 0 <= m["attack_won"] <= 1 for m in metrics[2:]
    )


def test_one_attack_serves_several_model_updates():
    trainer = trainer_for(iterations=4, defence={"kl": 0.0})
    seen, steps = spy_on_terms(trainer), []
    trainer.optimiser.register_step_post_hook(lambda *_: steps.append(1))
    metrics = trainer.train_step()
    assert len(steps) == len(seen) == 4
    assert all(deltas is seen[0][1] for _, deltas, *_ in seen)
    totals = [sum(terms.values()) for *_, terms in seen]
    assert metrics["total"] == pytest.approx(sum(totals) / 4) and totals[-1] < totals[0]


def test_the_learning_rate_warms_up_and_decays():
    trainer, rates = trainer_for("ssft", steps=10, lr=1.0e-3, lr_warmup=2, lr_decay_share=0.4), []
    trainer.run(lambda step, metrics: rates.append(metrics["lr"]))
    assert rates == pytest.approx([0.0005, *[0.001] * 6, 0.00075, 0.0005, 0.00025])


def test_gradients_are_clipped():
    trainer = trainer_for("ssft", clip=1e-3)
    assert trainer.train_step()["grad_norm"] > 0.1
    assert torch.cat([g.flatten() for g in gradients_of(trainer)]).norm() == pytest.approx(
        1e-3, rel=1e-3
    )


def test_untargeted_training_attacks_benign_rows_too():
    trainer = trainer_for("lat-untargeted", micro_batch=100)
    seen = spy_on_terms(trainer)
    metrics = trainer.train_step()
    ((part, deltas, *_),) = seen
    assert part.attacked.shape[0] == 2 * ROWS and not part.attacked.packed
    assert metrics["attack_end"] < metrics["attack_start"] <= 0  # minus the loss of the response


@pytest.mark.parametrize("harmful, benign", [(0, 3), (3, 0), (0, 0)])
def test_empty_or_one_sided_data_is_refused(harmful, benign):
    rows = token_rows(harmful, 2), token_rows(benign, 1)
    with pytest.raises(
        ValueError, match=f"{harmful} harmful and {benign} benign rows: training needs both"
    ):
        Trainer(language_model(), *rows, settings_for(), 0)


def test_rows_with_the_wrong_number_of_completions_are_refused():
    with pytest.raises(
        ValueError, match=r"harmful row needs \(rejected, chosen\) and a benign row \(response,\)"
    ):
        Trainer(language_model(), token_rows(3, 1), token_rows(3, 1), settings_for(), 0)


def test_a_site_outside_the_model_is_refused_before_training():
    with pytest.raises(ValueError, match=f"site = 31 is outside this model of {LAYERS} blocks"):
        trainer_for(attack={"sites": (31,)})


def test_what_is_not_finite_stops_the_run_in_the_end_and_names_the_step():
    trainer = trainer_for("ssft", skips=2, steps=9)
    trainer.train_step()
    with torch.no_grad():
        trainer.parameters[0].fill_(math.nan)
    before = adapter_of(trainer)
    assert [trainer.train_step()["skipped"] for _ in range(2)] == [1, 1]
    with pytest.raises(FloatingPointError, match="step 4: .*lower train.lr or attack.eps"):
        trainer.train_step()
    for name, parameter in adapter_of(trainer).items():
        assert torch.equal(parameter, before[name]) or parameter.isnan().all()


def test_one_bad_step_is_skipped_however_many_updates_it_has():
    """All of them have the same rows and the same perturbation."""
    trainer = trainer_for("ssft", skips=1, iterations=4)
    weight = trainer.parameters[0]
    before = weight.detach().clone()
    weight.data.fill_(math.nan)
    assert trainer.train_step()["skipped"] == 1
    weight.data.copy_(before)
    assert trainer.train_step()["skipped"] == 0
    weight.data.fill_(math.nan)
    trainer.train_step()
    resumed = trainer_for("ssft", skips=1, iterations=4)
    resumed.restore(trainer.state())  # counts on
    for each in (trainer, resumed):
        with pytest.raises(FloatingPointError, match="step 4: "):
            each.train_step()


@pytest.mark.parametrize("where", ["gradient", "perturbation", "one update of two"])
def test_an_update_that_is_not_finite_is_skipped_and_the_next_is_not(where, monkeypatch):
    """The weights and Adam's moments stay as they were: a spoiled step is as none."""
    trainer = trainer_for(iterations=2 if where.startswith("one") else 1)
    trainer.train_step()
    before, moments = adapter_of(trainer), str(trainer.optimiser.state_dict())
    clip, find = torch.nn.utils.clip_grad_norm_, train.pgd
    calls = []

    def spoiled(parameters, *rest):
        calls.append(0)
        if len(calls) == 1:
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, *rest)

    def found(*args, **kwargs):
        attack = find(*args, **kwargs)
        return replace(attack, deltas={s: d * math.nan for s, d in attack.deltas.items()})

    if where == "perturbation":
        monkeypatch.setattr(train, "pgd", found)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoiled)
    metrics = trainer.train_step()
    assert all(map(math.isfinite, metrics.values()))
    if where.startswith("one"):
        assert metrics["skipped"] == 0.5 and metrics["total"] > 0
        return
    assert metrics["skipped"] == 1 and "total" not in metrics and trainer.step == 2
    after = adapter_of(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert str(trainer.optimiser.state_dict()).split("lr")[0] == moments.split("lr")[0]
    monkeypatch.undo()
    assert trainer.train_step()["skipped"] == 0 and trainer.skipped == 0


def test_attacks_leave_nothing_in_the_weights_gradients(monkeypatch):
    """A predecessor let the attacker's gradients add up in the adapter."""
    trainer, attacked = trainer_for(kind="stock", micro_batch=3), []
    plain = train.pgd

    def spy(*args, **kwargs):
        found = plain(*args, **kwargs)
        attacked.append(all(p.grad is None for p in trainer.lm.model.parameters()))
        return found

    monkeypatch.setattr(train, "pgd", spy)
    trainer.train_step()
    assert attacked == [True, True]


def test_rows_of_one_length_need_no_special_case():
    rows = [TokenRow((1, 2, 3), ((4, 5), (6, 7)))] * 3
    trainer = Trainer(
        language_model(), rows, token_rows(3, 1), settings_for(batch=3, benign_batch=3), 0
    )
    assert math.isfinite(trainer.train_step()["total"])
