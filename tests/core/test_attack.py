"""PGD: inside the ball, off the padding, downhill, equal to the slow reference, and without a trace
on the weights.
"""

from dataclasses import replace
from typing import get_args

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    LAYERS,
    SCALING,
    VOCABULARY,
    D,
    benign_batch,
    language_model,
    preference_batch,
    token_rows,
)

from latlib import attack
from latlib.attack import (
    Attack,
    _better,
    attack_losses,
    greedy_matches,
    perturbed_positions,
    project_l2,
    random_noise,
)
from latlib.batch import TokenRow, collate
from latlib.config.sections import AttackSettings
from latlib.hooks import EMBEDDING
from latlib.refusal.activations import residual_norms
from latlib.threat import PGD, Positions, ThreatModel

KINDS = ["stock", "lean"]
RULES = ["adamw", "sign", "l2"]
EPS = {EMBEDDING: 0.7, 1: 1.5, 2: 2.0}
POSITIONS = get_args(Positions)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def settings_for(rule="l2", **changes):
    lr = 0.3 if rule == "adamw" else None  # large enough that the projection has something to do
    return PGD(**{"rule": rule, "lr": lr, "steps": 4, **changes})


def pgd(network, batch, radii, search, *rest, positions="prompt", **more):
    """`attack.pgd` within balls of these radii, given site by site."""
    return attack.pgd(network, batch, ThreatModel.within(radii, positions), search, *rest, **more)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    st.sampled_from(DTYPES),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.sampled_from([1, 2, 16, 768, 4096]),
    st.integers(0, 1000),
)
def test_projected_norms_are_within_eps(dtype, eps, size, d, seed):
    delta = (size * torch.randn(2, 3, d, generator=seeded(seed))).to(dtype)
    found = project_l2(delta, eps)
    assert found.dtype == dtype and found.shape == delta.shape
    assert (found.double().norm(dim=-1) <= eps).all()


@given(st.sampled_from(DTYPES), st.integers(0, 1000))
def test_projection_keeps_directions_and_leaves_the_inside_alone(dtype, seed):
    delta = torch.randn(4, 8, generator=seeded(seed)).to(dtype)
    assert torch.equal(project_l2(delta, 100.0), delta)
    assert torch.equal(project_l2(torch.zeros_like(delta), 0.1), torch.zeros_like(delta))
    found, eps = project_l2(delta, 0.1).double(), torch.finfo(dtype).eps
    torch.testing.assert_close(
        found.norm(dim=-1), torch.full((4,), 0.1, dtype=torch.float64), rtol=20 * eps, atol=0
    )
    assert (torch.cosine_similarity(found, delta.double()) > 1 - 4 * eps).all()


def test_each_position_has_a_ball_of_its_own():
    delta = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    torch.testing.assert_close(project_l2(delta, 1.0), torch.tensor([[[0.6, 0.8], [0.3, 0.4]]]))


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_a_ball_without_radius_is_refused(eps):
    with pytest.raises(ValueError, match=f"eps = {eps} must be > 0: for no attack take no steps"):
        project_l2(torch.ones(1, 2), eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rule", RULES)
def test_pgd_equals_the_reference(rule, positions, kind):
    lm, rows = language_model(kind, trained=True), token_rows(3, 2)
    settings = settings_for(rule, toward=0.7, away=0.4)
    found = pgd(lm.network(), collate(rows, pad_to=16), EPS, settings, positions=positions)
    llama = reference.Llama.of(lm.model, SCALING)
    for n, row in enumerate(rows):
        expected, losses = reference.pgd(
            llama,
            (row.prompt, *row.completions),
            EPS,
            D,
            rule,
            steps=4,
            lr=settings.lr or 0.5,
            c_toward=0.7,
            c_away=0.4,
            completions=positions != "prompt",
            shared=positions == "prompt+shared",
        )
        torch.testing.assert_close(
            found.losses[:, n], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10
        )
        for site, delta in expected.items():
            torch.testing.assert_close(
                found.deltas[site][n, : row.length], delta, rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("rule", RULES)
def test_each_site_may_have_a_rate_of_its_own(rule):
    network, batch = language_model(trained=True).network(), preference_batch()
    lr = (0.002, 0.004, 0.001)
    found = pgd(network, batch, EPS, settings_for(rule, lr=lr, steps=1)).deltas
    inside = perturbed_positions(batch, "prompt").squeeze(-1)
    for (site, delta), rate in zip(found.items(), lr, strict=True):
        # Adam moves every coordinate by its rate; a share of the radius
        length = rate * (D**0.5 if rule == "adamw" else EPS[site])
        expected = torch.full_like(delta[inside].norm(dim=-1), length)
        torch.testing.assert_close(delta[inside].norm(dim=-1), expected, rtol=0.02, atol=0)
    same, one = (
        pgd(network, batch, EPS, settings_for(rule, lr=lr)).deltas for lr in ((0.01,) * 3, 0.01)
    )
    for site in EPS:
        torch.testing.assert_close(same[site], one[site], rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_untargeted_pgd_equals_the_reference(rule):
    lm, (row,) = language_model(trained=True), token_rows(1, 1)
    found = pgd(lm.network(), collate([row]), EPS, settings_for(rule, targeted=False))
    expected, losses = reference.pgd(
        reference.Llama.of(lm.model, SCALING),
        (row.prompt, *row.completions),
        EPS,
        D,
        rule,
        steps=4,
        lr=0.3 if rule == "adamw" else 0.5,
        targeted=False,
    )
    torch.testing.assert_close(
        found.losses[:, 0], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10
    )
    for site, delta in expected.items():
        torch.testing.assert_close(found.deltas[site][0], delta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", ["zero", "random"])
def test_perturbations_stay_in_the_ball_and_off_the_padding(start, rule, kind, dtype):
    network = language_model(kind, dtype).network()
    for positions in POSITIONS:
        batch = preference_batch()
        found = pgd(
            network, batch, EPS, settings_for(rule, start=start), seeded(), positions=positions
        )
        allowed = batch.segments == 0 if positions == "prompt" else batch.segments >= 0
        assert (~allowed).any() and set(found.deltas) == set(EPS)
        for site, delta in found.deltas.items():
            norms = delta.double().norm(dim=-1)
            assert (norms <= EPS[site]).all()
            assert (norms[~allowed] == 0).all() and (norms[batch.segments == 0] > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_ball_is_used_up_and_the_loss_falls(rule):
    settings = settings_for(rule, steps=12, lr=0.05 if rule == "adamw" else None)
    found = pgd(language_model().network(), preference_batch(8), EPS, settings)
    assert found.losses.shape == (13, 8)
    assert (found.losses[-1] < found.losses[0] - 0.1).all()
    assert found.losses.mean(1).diff().max() < 0.05
    assert all(found.deltas[s].norm(dim=-1).max() > 0.95 * eps for s, eps in EPS.items())


def test_more_budget_gives_a_lower_loss_and_noise_does_not():
    network, batch = language_model().network(), preference_batch(8)
    settings = settings_for(steps=20)
    ends = [
        pgd(network, batch, {1: eps}, settings).losses[-1].mean().item() for eps in (0.3, 1.0, 3.0)
    ]
    assert ends[0] > ends[1] > ends[2]
    noise = {1: random_noise(network, perturbed_positions(batch, "prompt"), 3.0, seeded())}
    with torch.no_grad():
        assert (
            attack_losses(network, batch, settings, network.label_rows(batch, noise)).mean()
            > ends[2] + 0.5
        )


def test_an_untargeted_attack_raises_the_loss_of_the_response():
    found = pgd(
        language_model().network(), benign_batch(6), EPS, settings_for(steps=8, targeted=False)
    )
    assert (found.losses[-1] < found.losses[0] - 0.1).all() and (found.losses <= 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_an_attack_leaves_no_trace_on_the_weights(kind, adapter, trainable):
    lm = language_model(kind, trained=True)
    lora = [p.requires_grad_(trainable) for n, p in lm.model.named_parameters() if "lora_" in n]
    lora[0].grad = torch.full_like(lora[0], 7.0)
    kept, flags = lora[0].grad, [p.requires_grad for p in lm.model.parameters()]
    weights = [p.detach().clone() for p in lm.model.parameters()]
    pgd(lm.network(adapter), preference_batch(), EPS, settings_for(start="random"), seeded())
    assert lora[0].grad is kept and (kept == 7.0).all()
    assert all(p.grad is None for p in lm.model.parameters() if p is not lora[0])
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(weights, lm.model.parameters(), strict=True))


def test_an_attack_works_where_gradients_are_off():
    with torch.no_grad():
        found = pgd(language_model().network(), preference_batch(), EPS, settings_for())
    assert (found.losses[-1] < found.losses[0]).all()


@pytest.mark.parametrize("rule", RULES)
def test_a_row_is_attacked_the_same_alone_and_in_company(rule):
    network, rows = language_model().network(), token_rows(4, 2)
    together = pgd(network, collate(rows), EPS, settings_for(rule))
    for n, row in enumerate(rows):
        alone = pgd(network, collate([row]), EPS, settings_for(rule))
        torch.testing.assert_close(together.losses[:, n], alone.losses[:, 0], rtol=0, atol=1e-10)
        torch.testing.assert_close(
            together.deltas[1][n, : row.length], alone.deltas[1][0], rtol=0, atol=1e-10
        )


def test_every_site_is_attacked_within_its_own_radius():
    found = pgd(
        language_model().network(),
        preference_batch(),
        {2: 0.1, EMBEDDING: 5.0},
        settings_for(steps=10),
    )
    assert found.threat.radius == {2: 0.1, EMBEDDING: 5.0}
    assert (
        0.05
        < found.deltas[2].norm(dim=-1).max()
        <= 0.1
        < found.deltas[EMBEDDING].norm(dim=-1).max()
        <= 5.0
    )


@pytest.mark.parametrize("steps", [1, 5])
def test_the_model_is_run_once_for_each_step_and_once_at_the_end(steps):
    """A predecessor's five steps were four."""
    network, batch = language_model().network(), preference_batch()
    calls, run = [], network.label_rows
    network.label_rows = lambda *args: calls.append(args) or run(*args)
    found = pgd(network, batch, EPS, settings_for(steps=steps))
    assert len(calls) == steps + 1 == len(found.losses)
    assert all(site == EMBEDDING and not stream.requires_grad for _, _, (site, stream) in calls)


def test_restarts_keep_the_best_of_each_row():
    network, batch = language_model().network(), preference_batch(8)
    settings = settings_for(steps=2, start="random")
    one = pgd(network, batch, EPS, settings, seeded())
    many = pgd(network, batch, EPS, replace(settings, restarts=6), seeded())
    assert (many.losses[-1] <= one.losses[-1]).all() and (many.losses[-1] < one.losses[-1]).any()
    with torch.no_grad():
        again = attack_losses(network, batch, settings, network.label_rows(batch, many.deltas))
    torch.testing.assert_close(again, many.losses[-1], rtol=0, atol=1e-10)


def test_restarts_after_a_zero_start_are_random():
    network, batch = language_model().network(), preference_batch(8)
    zero, more = (
        pgd(network, batch, EPS, settings_for(steps=1, restarts=r), seeded()) for r in (1, 8)
    )
    assert (more.losses[-1] < zero.losses[-1]).any()


def test_random_starts_come_from_the_generator():
    network, batch, settings = (
        language_model().network(),
        preference_batch(),
        settings_for(start="random"),
    )
    a, b, c = (pgd(network, batch, EPS, settings, seeded(s)).deltas[1] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_noise_has_the_asked_norm_at_the_asked_positions():
    network, batch = language_model(dtype=torch.float32).network(), preference_batch()
    mask = perturbed_positions(batch, "prompt")
    norms = random_noise(network, mask, 2.0, seeded()).norm(dim=-1)
    torch.testing.assert_close(norms, 2.0 * mask.squeeze(-1))
    lengths = torch.rand(*mask.shape, generator=seeded(), dtype=torch.float64)
    norms = random_noise(network, mask, lengths, seeded()).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(norms, (lengths * mask).float(), rtol=1e-5, atol=0)
    shape = (*mask.shape[:2], D)
    inside = attack._noise(shape, network, 2.0, seeded(), inside=True).norm(dim=-1)
    assert (inside <= 2.0).all() and inside[mask.squeeze(-1)].std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_won_means_greedy_decoding_writes_the_wanted_completion(kind):
    lm, batch = language_model(kind), preference_batch(6)
    network = lm.network()
    found = pgd(network, batch, {EMBEDDING: 8.0, 1: 12.0, 3: 20.0}, settings_for(steps=60))
    rows = network.label_rows(batch, found.deltas)
    logits = network.unembed(rows)
    right = logits.argmax(-1) == batch.labels
    expected = [
        bool(right[(batch.label_rows == n) & (batch.label_segments == 1)].all()) for n in range(6)
    ]
    assert found.won.tolist() == expected
    assert any(expected)
    weak = pgd(network, batch, {1: 1e-6}, settings_for())
    assert not weak.won.any()


def test_an_untargeted_attack_wins_where_the_response_is_no_longer_written():
    """The response is what the model writes by itself, so that a tiny attack loses and a large one
    wins.
    """
    network, (row,) = language_model().network(), token_rows(1, 1)
    for k in range(len(row.completions[0])):
        batch = collate([row])
        best = network.unembed(network.hidden(batch).flatten(0, 1)[batch.source]).argmax(-1)
        completion = (*row.completions[0][:k], int(best[k]), *row.completions[0][k + 1 :])
        row = type(row)(row.prompt, (completion,))
    batch = collate([row])
    assert greedy_matches(network, batch, network.label_rows(batch), 1).all()
    assert not pgd(network, batch, {1: 1e-6}, settings_for(targeted=False)).won.any()
    assert pgd(network, batch, {1: 30.0}, settings_for(targeted=False, steps=20)).won.all()


def test_greedy_match_is_false_for_a_completion_that_is_not_there():
    network, batch = language_model().network(), benign_batch()
    assert not greedy_matches(network, batch, network.label_rows(batch), 2).any()


def test_relative_radii_follow_the_median_norm_of_each_site():
    network, batches = language_model().network(), [preference_batch(4, seed) for seed in (1, 2)]
    norms = residual_norms(network, batches, [EMBEDDING, 2])
    for site in norms:
        found = []
        for batch in batches:
            stream = network.capture(batch, [site])[site].norm(dim=-1)
            found += [
                stream[n, i].item() for n, i in (batch.segments == 0).nonzero().tolist() if i > 0
            ]
        assert norms[site] == pytest.approx(torch.tensor(found).median().item(), rel=1e-5)
    settings = AttackSettings(sites=("embedding", 2), eps=0.1, eps_mode="relative")
    assert settings.threat_model(LAYERS, norms).radius == {
        s: pytest.approx(0.1 * norms[s]) for s in norms
    }
    with pytest.raises(ValueError, match="'relative' needs the median residual norms"):
        settings.threat_model(LAYERS)


def test_absolute_radii_are_the_same_at_every_site():
    assert AttackSettings(sites=(0.75, "embedding", 1), eps=6.0).threat_model(LAYERS).radius == {
        EMBEDDING: 6.0,
        1: 6.0,
        3: 6.0,
    }
    with pytest.raises(ValueError, match="site = 4 is outside this model of 4 blocks"):
        AttackSettings(sites=(4,)).threat_model(LAYERS)


def test_an_attack_without_sites_or_with_unknown_positions_is_refused():
    network, batch = language_model().network(), preference_batch()
    with pytest.raises(ValueError, match="sites = .. names no site"):
        pgd(network, batch, {}, settings_for())
    with pytest.raises(ValueError, match="'completion': choose one of .'prompt', 'prompt.comple"):
        perturbed_positions(batch, "completion")


@pytest.mark.parametrize("adapter", [True, False])
def test_an_attack_on_a_model_that_trains_under_gradient_checkpointing(adapter):
    found = []
    for checkpointing in (False, True):
        lm = language_model("stock", trained=True)
        if checkpointing:
            lm.model.train()
            lm.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        lora = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
        found.append(pgd(lm.network(adapter), preference_batch(), EPS, settings_for()).deltas[1])
        assert all(p.grad is None for p in lora)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)


def greedy_reply(network, prompt, n, begun=()):
    """The n tokens that the model writes behind a prompt and the first tokens of a reply."""
    reply = tuple(begun)
    for _ in range(n):
        batch = collate([TokenRow(tuple(prompt), ((*reply, 1),))])
        reply += (int(network.unembed(network.label_rows(batch))[-1].argmax()),)
    return reply


def watched(network):
    """What `label_rows` is asked for from here on: a list of (batch, deltas, which rows of it are
    won).
    """
    calls, run = [], network.label_rows

    def label_rows(batch, deltas=None, start=None):
        rows = run(batch, deltas, start)
        placed = {site: delta.detach().clone() for site, delta in (deltas or {}).items()}
        calls.append((batch, placed, greedy_matches(network, batch, rows.detach(), 1)))
        return rows

    network.label_rows = label_rows
    return calls


STRONG = {site: 3 * eps for site, eps in EPS.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("rule", RULES)
def test_a_row_is_attacked_as_ever_until_it_is_won_and_then_left_alone(rule, positions, kind):
    """Against a run that goes on, of which every step's perturbation is known."""
    lm, batch, steps = (
        language_model(kind, trained=True),
        preference_batch(8),
        14 if positions == "prompt" else 8,
    )
    settings = settings_for(rule, steps=steps, lr=0.3 if rule == "adamw" else 0.15)
    network = lm.network()
    trail = watched(network)
    free = pgd(network, batch, STRONG, settings, positions=positions)
    network = lm.network()
    calls = watched(network)
    found = pgd(network, batch, STRONG, settings, stop_when_won=True, positions=positions)
    won_at = [next((k for k, (_, _, won) in enumerate(trail) if won[n]), None) for n in range(8)]
    assert None in won_at and len({k for k in won_at if k is not None}) > 2, "nothing to tell apart"
    assert (
        found.won.tolist() == [k is not None for k in won_at]
        and found.losses.shape == free.losses.shape
    )
    for n, k in enumerate(won_at):
        k = steps if k is None else k
        for site in STRONG:
            torch.testing.assert_close(
                found.deltas[site][n], trail[k][1][site][n], rtol=0, atol=1e-10
            )
        torch.testing.assert_close(
            found.losses[: k + 1, n], free.losses[: k + 1, n], rtol=0, atol=1e-10
        )
        later = found.losses[k, n].expand(steps - k)
        torch.testing.assert_close(found.losses[k + 1 :, n], later, rtol=0, atol=1e-10)
    # Each forward holds the rows that were still open, and the last one all.
    still = [sum(k is None or k >= step for k in won_at) for step in range(steps)]
    assert [call[0].shape[0] for call in calls] == [*still, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_perturbations_that_won_are_in_the_ball_and_off_the_padding(rule, dtype):
    network, batch = language_model(dtype=dtype).network(), preference_batch(8)
    found = pgd(
        network,
        batch,
        STRONG,
        settings_for(rule, steps=14, restarts=2),
        seeded(),
        stop_when_won=True,
    )
    assert found.won.any() and not found.won.all()
    for site, delta in found.deltas.items():
        norms = delta.double().norm(dim=-1)
        assert (norms <= STRONG[site]).all()
        assert (norms[batch.segments != 0] == 0).all() and (norms[batch.segments == 0] > 0).all()


def test_restarts_go_to_rows_that_are_open_and_lose_none_that_is_won():
    lm, batch = language_model(trained=True), preference_batch(8)
    settings = settings_for(steps=8, start="random")
    one = pgd(lm.network(), batch, STRONG, settings, seeded(), stop_when_won=True)
    network = lm.network()
    calls = watched(network)
    many = pgd(network, batch, STRONG, replace(settings, restarts=4), seeded(), stop_when_won=True)
    assert one.won.any() and not many.won.all() and (many.won & ~one.won).any()
    assert many.won[one.won].all() and (many.losses[-1] <= one.losses[-1])[~many.won].all()
    assert (many.losses[-1] < one.losses[-1])[~many.won].any()
    torch.testing.assert_close(many.losses[:, one.won], one.losses[:, one.won], rtol=0, atol=0)
    for site in STRONG:
        assert torch.equal(many.deltas[site][one.won], one.deltas[site][one.won])
    # The first restart ends with a judgement of all rows, each further one begins with those that
    # were open then.
    sizes = [call[0].shape[0] for call in calls]
    behind = sizes[len(sizes) - sizes[::-1].index(8) :]
    assert behind[0] == max(behind) == int((~one.won).sum()) and min(behind) == int(
        (~many.won).sum()
    )
    # What is reported is what the perturbation does.
    network = lm.network()
    rows = network.label_rows(batch, many.deltas)
    assert torch.equal(greedy_matches(network, batch, rows, 1), many.won)
    torch.testing.assert_close(
        attack_losses(network, batch, settings, rows), many.losses[-1], rtol=0, atol=1e-10
    )


def test_a_restart_takes_a_row_by_winning_it_or_by_a_lower_loss():
    """Rows 1, 3 and 4 of five were attacked again: lost twice, won now at a higher loss, lost
    twice.
    """
    won, losses = (
        torch.tensor([True, False, True, False, False]),
        torch.tensor([[9.0, 9, 9, 9, 9], [1.0, 2, 3, 4, 5]]),
    )
    first = Attack({1: torch.zeros(5, 2, D)}, losses, won, ThreatModel.within({1: 1.0}))
    again = torch.tensor([[8.0, 8, 8], [1.5, 4.5, 5.5]])
    second = Attack(
        {1: torch.ones(3, 2, D)}, again, torch.tensor([False, True, False]), first.threat
    )
    found = _better(first, second, torch.tensor([1, 3, 4]))
    assert found.won.tolist() == [True, False, True, True, False]
    assert found.losses.tolist() == [[9, 8, 9, 8, 9], [1, 1.5, 3, 4.5, 5]]
    assert found.deltas[1].amax((1, 2)).tolist() == [0, 1, 0, 1, 0]
    assert not first.deltas[1].any() and first.won.tolist() == won.tolist()


@pytest.mark.parametrize("stop", [True, False])
def test_restarts_are_judged_even_where_nobody_asks(stop):
    network, batch = language_model().network(), preference_batch(8)
    settings = settings_for(steps=8, restarts=2)
    asked, unasked = (
        pgd(network, batch, STRONG, settings, seeded(), j, stop) for j in (True, False)
    )
    assert torch.equal(asked.losses, unasked.losses) and torch.equal(asked.won, unasked.won)
    assert all(torch.equal(asked.deltas[site], unasked.deltas[site]) for site in STRONG)


def own_replies(network, n, seed=0):
    """Packed rows whose first completion the model writes by itself."""
    rows = token_rows(n, 2, seed)
    return [
        TokenRow(r.prompt, (greedy_reply(network, r.prompt, 3), r.completions[1])) for r in rows
    ]


@pytest.mark.parametrize("judged", [True, False])
def test_rows_that_are_won_from_the_start_are_never_touched(judged):
    network = language_model().network()
    batch = collate(own_replies(network, 3))
    calls = watched(network)
    found = pgd(network, batch, EPS, settings_for(steps=5), judged=judged, stop_when_won=True)
    assert len(calls) == 1 + judged and found.losses.shape == (5 + judged, 3)
    assert all(
        (delta == 0).all() and delta.shape == (*batch.shape, D) for delta in found.deltas.values()
    )
    torch.testing.assert_close(
        found.losses, found.losses[:1].expand_as(found.losses), rtol=0, atol=1e-10
    )
    assert found.won.all() if judged else found.won is None
    again = pgd(
        network, batch, EPS, settings_for(steps=5, restarts=4), seeded(), stop_when_won=True
    )
    assert again.won.all() and all((delta == 0).all() for delta in again.deltas.values())
    assert len(calls) == 1 + judged + 2  # no restart for rows that are won


def test_an_attack_ends_when_its_last_row_is_won():
    """Two rows that are won at different steps, and one that was won before it began, in this
    order.
    """
    lm = language_model(trained=True)
    network, rows = lm.network(), token_rows(8, 2)
    batch = collate([rows[7], rows[4], *own_replies(network, 1, seed=5)])
    calls = watched(network)
    settings = settings_for(steps=40, lr=0.15)
    found = pgd(network, batch, STRONG, settings, stop_when_won=True)
    assert found.won.all() and found.losses.shape == (41, 3)
    sizes = [call[0].shape[0] for call in calls]
    assert sizes[:2] == [3, 2] and 1 in sizes and sizes[-1] == 3 and len(sizes) < 40
    assert [bool(found.deltas[1][n].any()) for n in range(3)] == [True, True, False]
    alone = pgd(lm.network(), collate([rows[4]]), STRONG, settings, stop_when_won=True)
    torch.testing.assert_close(found.losses[:, 1], alone.losses[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        found.deltas[2][1, : rows[4].length], alone.deltas[2][0], rtol=0, atol=1e-10
    )


def test_an_untargeted_attack_leaves_a_row_alone_whose_response_is_gone():
    network, (written,) = language_model().network(), token_rows(1, 1)
    written = TokenRow(written.prompt, (greedy_reply(network, written.prompt, 3),))
    batch = collate([token_rows(2, 1)[1], written])
    found = pgd(
        network, batch, {1: 30.0}, settings_for(targeted=False, steps=20), stop_when_won=True
    )
    assert found.won.all() and not found.deltas[1][0].any() and found.deltas[1][1].any()
    assert found.losses[-1, 1] < found.losses[0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_that_stops_leaves_no_trace_on_the_weights(kind):
    lm = language_model(kind, trained=True)
    lora = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
    lora[0].grad = torch.full_like(lora[0], 7.0)
    kept, flags = lora[0].grad, [p.requires_grad for p in lm.model.parameters()]
    found = pgd(
        lm.network(),
        preference_batch(8),
        STRONG,
        settings_for(steps=14, restarts=2),
        seeded(),
        stop_when_won=True,
    )
    assert found.won.any()
    assert lora[0].grad is kept and (kept == 7.0).all()
    assert all(p.grad is None for p in lm.model.parameters() if p is not lora[0])
    assert [p.requires_grad for p in lm.model.parameters()] == flags
    assert (
        not any(delta.requires_grad for delta in found.deltas.values())
        and not found.losses.requires_grad
    )


def test_an_attack_that_wins_nothing_is_the_same_with_and_without_stop():
    network, batch = language_model().network(), preference_batch()
    settings = settings_for(steps=3, restarts=3)
    plain, stop = (
        pgd(network, batch, {1: 1e-3}, settings, seeded(), stop_when_won=s) for s in (False, True)
    )
    assert not plain.won.any() and torch.equal(plain.losses, stop.losses)
    assert torch.equal(plain.deltas[1], stop.deltas[1])


@pytest.mark.parametrize("begun", [0, 1, 2, 3, 4, 9])
def test_a_begun_reply_is_judged_as_if_its_beginning_were_in_the_prompt(begun):
    """Rows that the model would finish from token 0, 1, 2 and 3 on, one it never finishes, and
    shorter ones.
    """
    network, (row,) = language_model().network(), token_rows(1, 1)
    own = greedy_reply(network, row.prompt, 4)
    replies = [own, own[:2]]
    for right in (1, 2, 3):  # the token before it is not what the model would write
        start = (*own[: right - 1], own[right - 1] % (VOCABULARY - 1) + 1)
        replies.append(greedy_reply(network, row.prompt, 4 - right, start))
    replies.append((*own[:3], own[3] % (VOCABULARY - 1) + 1))
    batch = collate([TokenRow(row.prompt, (reply, row.completions[0])) for reply in replies])
    found = greedy_matches(network, batch, network.label_rows(batch), 1, begun).tolist()
    expected = []
    for reply in replies:
        rest = reply[begun:]
        alone = collate([TokenRow((*row.prompt, *reply[:begun]), (rest,))]) if rest else None
        expected.append(
            bool(rest) and bool(greedy_matches(network, alone, network.label_rows(alone), 1))
        )
    assert found == expected
    assert begun > 3 or sum(expected) == 1 + (begun < 2) + begun
