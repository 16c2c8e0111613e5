"""Directions found by gradient: the gradient is that of the loss, one planted direction is found, and
nothing but the seed decides.
"""

from dataclasses import replace

import pytest
import tiny_models as tiny
import torch

from latlib.batch import TokenRow, collate
from latlib.losses import token_losses
from latlib.network import StockNetwork
from latlib.refusal import learned
from latlib.refusal.learned import Goals, learn

ROWS = [TokenRow(row.prompt, ((5, 9, 3),)) for row in tiny.prompt_rows(12)]
REFUSED = [TokenRow(row.prompt, ((7, 3),)) for row in ROWS]
GOALS = Goals(ROWS[:6], ROWS[6:], REFUSED[6:], 1, 1.0)


def networks():
    lm = tiny.language_model(trained=True)
    lm = replace(lm, model=lm.model.double(), dtype=torch.float64)
    return {"lean": lm.network(), "stock": StockNetwork(lm.model)}


@pytest.mark.parametrize("kind", ["lean", "stock"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_gradient_is_that_of_finite_differences(kind, rank):
    """On a small model in float64, against the loss a little further on each side: also through
    the embedding, and for a span whose directions are removed together."""
    network = networks()[kind]
    batch = collate(ROWS[:4])
    rows = torch.randn(rank, tiny.D, generator=torch.Generator().manual_seed(0)).double()

    def loss(rows):
        ablated = network.ablated(rows)
        return token_losses(ablated.unembed, ablated.label_rows(batch), batch.labels).mean()

    rows.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(rows), rows)
    step = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        slope = (loss(rows + 1e-5 * step) - loss(rows - 1e-5 * step)) / 2e-5
    assert (gradient * step).sum().item() == pytest.approx(slope.item(), rel=1e-4)


def wanted(network, rows):
    """How far answers to harmful prompts are without the directions, in nats."""
    batch = collate(GOALS.harmful)
    ablated = network.ablated(rows)
    return token_losses(ablated.unembed, ablated.label_rows(batch), batch.labels).mean()


def retained(network, rows):
    """How far what is said to harmless prompts moves without them."""
    batch = collate(GOALS.harmless)
    before = network.unembed(network.label_rows(batch)).log_softmax(-1)
    after = network.ablated(rows).label_rows(batch)
    after = network.unembed(after).log_softmax(-1)
    return (before.exp() * (before - after)).sum(-1).mean()


def added(network, rows):
    """How far refusals of harmless prompts are where the first direction is added."""
    batch = collate(GOALS.refused)
    deltas = {GOALS.site: (GOALS.length * rows[0]).expand(*batch.shape, -1)}
    states = network.label_rows(batch, deltas)
    return token_losses(network.unembed, states, batch.labels).mean()


@pytest.mark.parametrize("goal", ["ABLATION", "RETAIN", "ADDITION"])
def test_learning_serves_each_goal(monkeypatch, goal):
    """With one weight alone, what that weighs falls well below where it began."""
    network = networks()["lean"]
    monkeypatch.setattr(learned, "STEPS", 30)
    for name in {"ABLATION", "RETAIN", "ADDITION"} - {goal}:
        monkeypatch.setattr(learned, name, 0.0)
    measure = {"ABLATION": wanted, "RETAIN": retained, "ADDITION": added}[goal]
    found = measure(network, learn(network, GOALS, 1)).item()
    monkeypatch.setattr(learned, "TRAVEL", 0.0)
    start = measure(network, learn(network, GOALS, 1)).item()
    assert found < start - 0.05 * abs(start)


def test_the_seed_decides_and_directions_are_of_length_one(monkeypatch):
    network = networks()["lean"]
    monkeypatch.setattr(learned, "STEPS", 6)
    one, again, other = (learn(network, GOALS, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(3).double())
    assert all(p.grad is None for p in network.model.parameters())
