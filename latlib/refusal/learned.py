"""Refusal directions found by gradient: what to remove so that the model complies, learned and not
read from differences of means.

1. Directions begin at random and are trained together; their span is removed.
2. **ablation**: without it the model gives the right answers to harmful prompts.
3. **retain**: without it the model says to harmless prompts what it said before (a KL).
4. **addition**: the first direction, added at a site, makes the model refuse harmless prompts: it
   is one that the model reads.
5. Prompts are those that models were trained on. Whether the search found anything is judged on
   others (`latlib.refusal.directions`).

Source: Wollschlaeger et al. 2025, section 4 (refusal direction optimisation), and the authors'
code. Their cones are of directions that each open the model alone; here several leave together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latlib.batch import TokenRow, collate
from latlib.losses import kl_divergence, token_losses
from latlib.network_protocol import Network
from latlib.refusal.interventions import adding
from latlib.threat import Site

# Weights of the losses, and Adam's: the authors' code (docs/sources.md)
ABLATION, ADDITION, RETAIN = 1.0, 0.2, 1.0
BETAS = (0.9, 0.98)
# Our choice, on tuning prompts (docs/lab-log.md): rows a step of each kind, steps for one
# direction, and the rate times the steps. Theirs: 16 rows, a rate of .01, until the loss stays.
BATCH = 8
STEPS = 40
TRAVEL = 1.2


@dataclass(frozen=True)
class Goals:
    """What directions are learned from; rows have one completion each. harmful: with the answers
    that are wanted without the directions. harmless: with what the model is to go on saying.
    refused: the same prompts with a refusal, wanted where the first direction is added at `site`,
    `length` long in units of the stream."""

    harmful: Sequence[TokenRow]
    harmless: Sequence[TokenRow]
    refused: Sequence[TokenRow]
    site: Site
    length: float


def learn(network: Network, goals: Goals, rank: int, seed: int = 0) -> Tensor:
    """[rank, d_model] directions of length 1, float64, whose removal serves the goals; the first
    one points towards refusal."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rank, network.d_model, generator=generator, dtype=torch.float64)
    rows = _unit(start).requires_grad_()
    steps = STEPS if rank == 1 else STEPS // 2  # several find it sooner
    optimiser = torch.optim.AdamW([rows], TRAVEL / steps, BETAS, weight_decay=0.0, amsgrad=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    order = random.Random(seed)
    for _ in range(steps):
        (rows.grad,) = torch.autograd.grad(_loss(network, goals, rows, order), rows)
        optimiser.step()
        schedule.step()
        with torch.no_grad():  # a step turns a direction as far at any time
            rows.copy_(_unit(rows))
    return rows.detach()


def _loss(network: Network, goals: Goals, rows: Tensor, order: random.Random) -> Tensor:
    """The loss of directions ([rank, d_model]) on prompts that are drawn."""
    harmful = _drawn(goals.harmful, order)
    harmless_twice = zip(goals.harmless, goals.refused, strict=True)
    pairs = _drawn(list(harmless_twice), order)
    harmless, refused = map(list, zip(*pairs, strict=True))
    removal = _removal_loss(network, rows, harmful, harmless)
    added = rows[0] * goals.length
    addition = _addition_loss(network, added, goals.site, refused)
    return removal + ADDITION * addition


def _drawn(population: Sequence[Any], order: random.Random) -> list[Any]:
    """A step's share of some rows."""
    return order.sample(population, min(BATCH, len(population)))


def _removal_loss(
    network: Network, rows: Tensor, harmful: list[TokenRow], harmless: list[TokenRow]
) -> Tensor:
    """What the removal of directions does to answers to harmful prompts, and to what is said to
    harmless ones."""
    before = collate(harmless, device=network.device)
    with torch.no_grad():
        said_before = network.label_rows(before)
    both = collate([*harmful, *harmless], device=network.device)
    ablated = network.ablated(rows)
    # labels come row by row, the harmful rows first
    count = len(both.labels) - len(before.labels)
    wanted, said = ablated.label_rows(both).split((count, len(before.labels)))
    ablation = token_losses(ablated.unembed, wanted, both.labels[:count])
    retain = kl_divergence(ablated.unembed, said, network.unembed, said_before)
    return ABLATION * ablation.mean() + RETAIN * retain.mean()


def _addition_loss(network: Network, added: Tensor, site: Site, refused: list[TokenRow]) -> Tensor:
    """The loss of refusals when a vector ([d_model]) is added at a site."""
    batch = collate(refused, device=network.device)
    rows = network.label_rows(batch, adding(added, site)(batch))
    return token_losses(network.unembed, rows, batch.labels).mean()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
