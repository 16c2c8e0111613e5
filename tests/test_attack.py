"""PGD: inside the ball, off the padding, downhill, equal to the slow reference, and without a trace on the weights."""

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    LAYERS,
    SCALING,
    D,
    benign_batch,
    language_model,
    preference_batch,
    token_rows,
)

from latlib.activations import residual_norms
from latlib.attack import (
    attack_losses,
    greedy_matches,
    perturbed_positions,
    pgd,
    project_l2,
    radii,
    random_noise,
)
from latlib.data import collate
from latlib.hooks import EMBEDDING
from latlib.settings import AttackSettings

KINDS = ["stock", "lean"]
RULES = ["adamw", "sign", "l2"]
EPS = {EMBEDDING: 0.7, 1: 1.5, 2: 2.0}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def settings_for(rule="l2", **changes):
    lr = 0.3 if rule == "adamw" else None  # large enough that the projection has something to do
    return AttackSettings(**{"rule": rule, "lr": lr, "steps": 4, **changes})


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
    torch.testing.assert_close(found.norm(dim=-1), torch.full((4,), 0.1, dtype=torch.float64), rtol=20 * eps, atol=0)
    assert (torch.cosine_similarity(found, delta.double()) > 1 - 4 * eps).all()


def test_each_position_has_a_ball_of_its_own():
    delta = torch.tensor([[[3.0, 4.0], [0.3, 0.4]]])
    torch.testing.assert_close(project_l2(delta, 1.0), torch.tensor([[[0.6, 0.8], [0.3, 0.4]]]))


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_a_ball_without_radius_is_refused(eps):
    with pytest.raises(ValueError, match=f"eps = {eps} must be > 0: for no attack set attack.steps = 0"):
        project_l2(torch.ones(1, 2), eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("completions", [False, True], ids=["prompt", "prompt+completion"])
@pytest.mark.parametrize("rule", RULES)
def test_pgd_equals_the_reference(rule, completions, kind):
    lm, rows = language_model(kind, trained=True), token_rows(3, 2)
    positions = "prompt+completion" if completions else "prompt"
    settings = settings_for(rule, toward=0.7, away=0.4, positions=positions)
    found = pgd(lm.network(), collate(rows, pad_to=16), EPS, settings)
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
            completions=completions,
        )
        torch.testing.assert_close(found.losses[:, n], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10)
        for site, delta in expected.items():
            torch.testing.assert_close(found.deltas[site][n, : row.length], delta, rtol=0, atol=1e-10)


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
    torch.testing.assert_close(found.losses[:, 0], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-10)
    for site, delta in expected.items():
        torch.testing.assert_close(found.deltas[site][0], delta, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("start", ["zero", "random"])
def test_perturbations_stay_in_the_ball_and_off_the_padding(start, rule, kind, dtype):
    network = language_model(kind, dtype).network()
    for positions in ("prompt", "prompt+completion"):
        batch = preference_batch()
        found = pgd(network, batch, EPS, settings_for(rule, start=start, positions=positions), seeded())
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
    ends = [pgd(network, batch, {1: eps}, settings).losses[-1].mean().item() for eps in (0.3, 1.0, 3.0)]
    assert ends[0] > ends[1] > ends[2]
    noise = {1: random_noise(network, perturbed_positions(batch, "prompt"), 3.0, seeded())}
    with torch.no_grad():
        assert attack_losses(network, batch, settings, network.label_rows(batch, noise)).mean() > ends[2] + 0.5


def test_an_untargeted_attack_raises_the_loss_of_the_response():
    found = pgd(language_model().network(), benign_batch(6), EPS, settings_for(steps=8, targeted=False))
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
        torch.testing.assert_close(together.deltas[1][n, : row.length], alone.deltas[1][0], rtol=0, atol=1e-10)


def test_every_site_is_attacked_within_its_own_radius():
    found = pgd(language_model().network(), preference_batch(), {2: 0.1, EMBEDDING: 5.0}, settings_for(steps=10))
    assert found.eps == {2: 0.1, EMBEDDING: 5.0}
    assert 0.05 < found.deltas[2].norm(dim=-1).max() <= 0.1 < found.deltas[EMBEDDING].norm(dim=-1).max() <= 5.0


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
    many = pgd(network, batch, EPS, settings.model_copy(update={"restarts": 6}), seeded())
    assert (many.losses[-1] <= one.losses[-1]).all() and (many.losses[-1] < one.losses[-1]).any()
    with torch.no_grad():
        again = attack_losses(network, batch, settings, network.label_rows(batch, many.deltas))
    torch.testing.assert_close(again, many.losses[-1], rtol=0, atol=1e-10)


def test_restarts_after_a_zero_start_are_random():
    network, batch = language_model().network(), preference_batch(8)
    zero, more = (pgd(network, batch, EPS, settings_for(steps=1, restarts=r), seeded()) for r in (1, 8))
    assert (more.losses[-1] < zero.losses[-1]).any()


def test_random_starts_come_from_the_generator():
    network, batch, settings = language_model().network(), preference_batch(), settings_for(start="random")
    a, b, c = (pgd(network, batch, EPS, settings, seeded(s)).deltas[1] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_noise_has_the_asked_norm_at_the_asked_positions():
    network, batch = language_model(dtype=torch.float32).network(), preference_batch()
    mask = perturbed_positions(batch, "prompt")
    norms = random_noise(network, mask, 2.0, seeded()).norm(dim=-1)
    torch.testing.assert_close(norms, 2.0 * mask.squeeze(-1))
    inside = random_noise(network, mask, 2.0, seeded(), inside=True).norm(dim=-1)
    assert (inside <= 2.0).all() and inside[mask.squeeze(-1)].std() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_won_means_greedy_decoding_writes_the_wanted_completion(kind):
    lm, batch = language_model(kind), preference_batch(6)
    network = lm.network()
    found = pgd(network, batch, {EMBEDDING: 8.0, 1: 12.0, 3: 20.0}, settings_for(steps=60))
    rows = network.label_rows(batch, found.deltas)
    logits = network.unembed(rows)
    right = logits.argmax(-1) == batch.labels
    expected = [bool(right[(batch.label_rows == n) & (batch.label_segments == 1)].all()) for n in range(6)]
    assert found.won.tolist() == expected
    assert any(expected)
    weak = pgd(network, batch, {1: 1e-6}, settings_for())
    assert not weak.won.any()


def test_an_untargeted_attack_wins_where_the_response_is_no_longer_written():
    """The response is what the model writes by itself, so that a tiny attack loses and a large one wins."""
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
            found += [stream[n, i].item() for n, i in (batch.segments == 0).nonzero().tolist() if i > 0]
        assert norms[site] == pytest.approx(torch.tensor(found).median().item(), rel=1e-5)
    settings = AttackSettings(sites=("embedding", 2), eps=0.1, eps_mode="relative")
    assert radii(settings, LAYERS, norms) == {s: pytest.approx(0.1 * norms[s]) for s in norms}
    with pytest.raises(ValueError, match="'relative' needs the median residual norms"):
        radii(settings, LAYERS)


def test_absolute_radii_are_the_same_at_every_site():
    assert radii(AttackSettings(sites=(0.75, "embedding", 1), eps=6.0), LAYERS) == {EMBEDDING: 6.0, 1: 6.0, 3: 6.0}
    with pytest.raises(ValueError, match="site = 4 is outside this model of 4 blocks"):
        radii(AttackSettings(sites=(4,)), LAYERS)


def test_an_attack_without_sites_or_with_unknown_positions_is_refused():
    network, batch = language_model().network(), preference_batch()
    with pytest.raises(ValueError, match="eps names no site"):
        pgd(network, batch, {}, settings_for())
    with pytest.raises(ValueError, match="'completion': choose 'prompt' or 'prompt.completion'"):
        perturbed_positions(batch, "completion")


@pytest.mark.parametrize("adapter", [True, False])
def test_an_attack_on_a_model_that_trains_under_gradient_checkpointing(adapter):
    found = []
    for checkpointing in (False, True):
        lm = language_model("stock", trained=True)
        if checkpointing:
            lm.model.train()
            lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
        found.append(pgd(lm.network(adapter), preference_batch(), EPS, settings_for()).deltas[1])
        assert all(p.grad is None for p in lora)
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
