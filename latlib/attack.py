"""PGD on latent perturbations: how an adversary inside the residual stream is found.

A `ThreatModel` (`latlib.threat`) says where the adversary may perturb and how far, a `PGD` how it
searches. For a packed batch of rows [prompt | rejected | chosen]:
1. delta = 0 (or uniform in the ball) at every perturbed position of every site, 0 elsewhere.
2. The stream at the lowest site is computed once; each step runs from there.
3. loss = toward * CE(rejected | delta) + away * away(chosen | delta), the mean over each row's
   tokens, summed over rows, so that rows do not interact. Untargeted: minus the CE of the response.
4. A step of `adamw` (the paper), `sign` or `l2` (normalised gradient) on all sites at once, then
   every position's delta is projected onto its L2 ball.
5. With restarts, each row keeps the perturbation that won, or else the one with the lowest loss.

Weights are frozen inside: an attack leaves every `parameter.grad` as it was.
Sources: Sheshadri et al. 2024, section 3; Casper et al. 2024 (untargeted)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latlib.batch import PADDING, Batch
from latlib.losses import argmax_matches, row_means, token_losses, wide_of
from latlib.network_protocol import Network
from latlib.threat import ADAM_LR, PGD, Positions, Rule, Site, ThreatModel, check_positions

Deltas = Mapping[Site, Tensor]
Random = torch.Generator | None

BETA1, BETA2, ADAM_EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01  # torch's AdamW, as the authors


@dataclass(frozen=True)
class Attack:
    """What an attack found.

    deltas: site -> [batch, seq, d_model]. losses: [steps + 1, batch], each row's attack loss before
    every step and at the end, of the restart that was kept. won: [batch] bool, whether the model
    under the final perturbation would write the wanted completion word for word (greedy);
    untargeted, whether it would not. An attack that was not judged has losses [steps, batch] and no
    `won`. threat: what the adversary was allowed."""

    deltas: dict[Site, Tensor]
    losses: Tensor
    won: Tensor | None
    threat: ThreatModel


def pgd(
    network: Network,
    batch: Batch,
    threat: ThreatModel,
    search: PGD,
    generator: Random = None,
    judged: bool = True,
    stop_when_won: bool = False,
) -> Attack:
    """Find a perturbation that minimises the adversary's loss; see the module's docstring.

    generator: for random starts. judged=False leaves out the last forward, for a caller that runs
    the perturbation itself and then asks `judge`; restarts are always judged. stop_when_won=True
    leaves a row alone once it is won, keeping the perturbation that won it, so that steps and
    restarts go to the others. Raises ValueError for no step from a zero start: nothing to find."""
    if search.steps == 0 and search.start == "zero":
        raise ValueError("steps = 0 from a zero start finds nothing: take steps, or start 'random'")
    every = _Rows.of(network, batch, threat)
    best: Any = None
    for restart in range(search.restarts):
        index = torch.arange(batch.shape[0], device=network.device)
        if stop_when_won and best is not None:
            index = (~best.won).nonzero().squeeze(1)
        if not len(index):
            break
        rows = every.select(index)
        # a second zero start would find the same thing
        random = search.start == "random" or restart > 0
        descent = _Descent(network, rows, search, rows.starts(network, generator, random))
        found = descent.run(judged or search.restarts > 1, stop_when_won)
        best = found if best is None else _better(best, found, index)
    return best


def project_l2(delta: Tensor, eps: float | Tensor) -> Tensor:
    """Project each position's perturbation onto the L2 ball.

    delta: [..., d_model], in units of the residual stream. eps: radius, > 0, or float64 radii that
    broadcast with it. Returns a tensor of the same shape and dtype with norm <= eps along d_model,
    also after rounding to bf16. Source: Sheshadri et al. 2024, section 3."""
    if isinstance(eps, float | int) and eps <= 0:
        raise ValueError(f"eps = {eps} must be > 0: for no attack take no steps")
    wide = delta.to(wide_of(delta.dtype))
    norm = wide.norm(dim=-1, keepdim=True)
    # a hair inside the ball: the product is rounded to delta's dtype, the norm's sum to its own
    rounding = torch.finfo(delta.dtype).eps
    slack = max(rounding, 16 * torch.finfo(wide.dtype).eps)
    inside = eps * (1 - slack)
    inside = torch.as_tensor(inside, dtype=wide.dtype, device=wide.device)
    scale = norm.clamp(min=1e-30).reciprocal() * inside
    projected = torch.where(norm > inside, wide * scale, wide)
    return projected.to(delta.dtype)


def perturbed_positions(batch: Batch, positions: Positions) -> Tensor:
    """[batch, seq, 1] bool: where delta may be non-zero; never on padding."""
    check_positions(positions)
    prompt, anywhere = batch.segments == 0, batch.segments != PADDING
    return (prompt if positions == "prompt" else anywhere).unsqueeze(-1)


def attack_losses(network: Network, batch: Batch, search: PGD, rows: Tensor) -> Tensor:
    """[batch] the adversary's loss of each row, from `network.label_rows` ([labels, d_model]) under
    the perturbation.

    A packed row's first completion is wanted, its second unwanted; a row with one completion has
    only that."""
    unwanted = batch.label_segments == 2 if search.targeted else None
    losses = token_losses(network.unembed, rows, batch.labels, away=unwanted)

    def means(segment: int) -> Tensor:
        index = batch.label_index(segment)
        return row_means(losses[index], batch.label_rows[index], batch.shape[0])

    if not search.targeted:
        return -row_means(losses, batch.label_rows, batch.shape[0])
    loss = search.toward * means(1)
    return loss + search.away * means(2) if batch.packed else loss


@torch.no_grad()
def greedy_matches(
    network: Network, batch: Batch, rows: Tensor, segment: int, prefilled: int = 0
) -> Tensor:
    """[batch] bool: greedy decoding would give completion `segment` word for word (every label is
    the argmax), or what is left of it when its first `prefilled` tokens stand there. rows:
    `network.label_rows`, [labels, d_model].

    Exact, and one forward: under greedy decoding a reply equals a text iff each of its tokens is
    the argmax given the ones before. False for a row without that completion."""
    index = batch.label_index(segment)
    of = batch.label_rows[index]
    if prefilled:
        counts = torch.bincount(of)
        first = (counts.cumsum(0) - counts)[of]  # where the row's labels begin
        place = torch.arange(len(index), device=index.device) - first
        index = index[place >= prefilled]
        of = batch.label_rows[index]
    right = argmax_matches(network.unembed, rows[index], batch.labels[index])
    return row_means(right.float(), of, batch.shape[0]) == 1


@torch.no_grad()
def judge(network: Network, batch: Batch, search: PGD, rows: Tensor) -> tuple[Tensor, Tensor]:
    """([batch] the adversary's loss, [batch] bool whether it won) from perturbed `label_rows`."""
    return attack_losses(network, batch, search, rows), _won(network, batch, search, rows)


def _won(network: Network, batch: Batch, search: PGD, rows: Tensor) -> Tensor:
    return greedy_matches(network, batch, rows, 1) == search.targeted


def random_noise(
    network: Network, mask: Tensor, eps: float | Tensor, generator: Random = None
) -> Tensor:
    """[batch, seq, d_model] noise of norm eps (float64 norms, if they differ) where mask ([batch,
    seq, 1]) is True. The control for every attack: same norm, same positions, no gradient."""
    return _noise((*mask.shape[:2], network.d_model), network, eps, generator) * mask


def _noise(
    shape: tuple[int, ...], network: Network, eps: Any, generator: Random, inside: bool = False
) -> Tensor:
    """Vectors of norm eps; inside: uniform in the ball."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = noise / noise.norm(dim=-1, keepdim=True)
    if inside:
        share = torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
        noise = noise * share ** (1 / shape[-1])
    noise = (eps * noise).to(network.device, wide_of(network.dtype))
    return project_l2(noise, eps)


class _Rows:
    """Rows that are attacked. start: the lowest site and the stream there, [n, seq, d_model].
    allowed: [n, seq, 1] bool, where they may be perturbed. free: [m] int64, these positions among
    the flattened [n * seq]. row: [u] int64, whose each perturbation is, row after row; taken: [m]
    int64, which one a free position takes where completions share them (otherwise u = m).

    Perturbations are [sites, u, d_model], float32 or better."""

    def __init__(
        self, batch: Batch, threat: ThreatModel, start: tuple[Site, Tensor], allowed: Tensor
    ) -> None:
        self.batch, self.threat, self.start, self.allowed = batch, threat, start, allowed
        self.free = allowed.flatten().nonzero().squeeze(1)
        self.row, self.taken = self.free // batch.shape[1], None
        if threat.positions == "prompt+shared":
            place = torch.stack((self.row, batch.positions.flatten()[self.free]))
            places, self.taken = place.unique(dim=1, return_inverse=True)
            self.row = places[0]

    @classmethod
    def of(cls, network: Network, batch: Batch, threat: ThreatModel) -> _Rows:
        """All rows of a batch."""
        lowest = threat.sites[0]
        stream = network.capture(batch, [lowest])[lowest]
        return cls(batch, threat, (lowest, stream), perturbed_positions(batch, threat.positions))

    def select(self, kept: Tensor) -> _Rows:
        """Those at `kept`, [k] ascending int64 into these rows."""
        if len(kept) == self.batch.shape[0]:
            return self
        site, stream = self.start
        start = (site, stream[kept])
        return _Rows(self.batch.select(kept), self.threat, start, self.allowed[kept])

    def starts(self, network: Network, generator: Random, random: bool) -> Tensor:
        """Where a restart begins."""
        shape = (len(self.row), network.d_model)
        if random:
            radii = self.threat.radii
            return torch.stack([_noise(shape, network, r, generator, True) for r in radii])
        wide = wide_of(network.dtype)
        return torch.zeros(len(self.threat.sites), *shape, device=network.device, dtype=wide)

    def scattered(self, deltas: Tensor, dtype: torch.dtype) -> dict[Site, Tensor]:
        """site -> [n, seq, d_model] in `dtype`, zero where nothing is perturbed."""
        return dict(zip(self.threat.sites, map(self._scatter, deltas.to(dtype)), strict=True))

    def _scatter(self, delta: Tensor) -> Tensor:
        d_model = delta.shape[1]
        flat = delta.new_zeros(self.batch.ids.numel(), d_model)
        own = delta if self.taken is None else delta.index_select(0, self.taken)
        return flat.index_copy(0, self.free, own).view(*self.batch.shape, d_model)


class _Descent:
    """One restart. rows: those still attacked, at `index` ([n] int64) of the restart's. deltas:
    their perturbations; moments: Adam's first and second of these. aside: site -> [batch, seq,
    d_model] of all rows when the last of them were won, None before."""

    def __init__(self, network: Network, rows: _Rows, search: PGD, deltas: Tensor) -> None:
        self.network = network
        self.search = search
        self.all_rows = self.rows = rows
        self.index = torch.arange(rows.batch.shape[0], device=deltas.device)
        self.deltas = deltas
        self.moments = deltas.new_zeros(2, *deltas.shape)
        usual = ADAM_LR if search.rule == "adamw" else 2 / max(1, search.steps)
        lr = torch.tensor(search.lr or usual, device=deltas.device, dtype=torch.float64)
        self.lr = lr.view(-1, 1, 1)  # one a site, or one for all
        radii = lr.new_tensor(rows.threat.radii)
        self.radii = radii.view(-1, 1, 1)
        self.losses: list[Tensor] = []
        self.aside: dict[Site, Tensor] | None = None

    def run(self, judged: bool, stop_when_won: bool) -> Attack:
        """Take all steps, or as many as there are rows left for."""
        for step in range(self.search.steps):
            if not len(self.index):
                self.losses.append(self.losses[-1])
                continue
            gradient, hidden = self._gradient()
            if stop_when_won:
                gradient = self._set_won_aside(gradient, hidden)
            self._step(gradient, step)
        return self._result(judged)

    def _gradient(self) -> tuple[Tensor, Tensor]:
        """(the gradient of the summed losses in `deltas`, hidden states at the labels)"""
        network, rows = self.network, self.rows
        leaf = self.deltas.requires_grad_()
        with torch.enable_grad(), network.frozen_mode():
            deltas = rows.scattered(leaf, network.dtype)
            hidden = network.label_rows(rows.batch, deltas, rows.start)
            losses = attack_losses(network, rows.batch, self.search, hidden)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        self.deltas = leaf.detach()
        losses = losses.detach()
        if self.losses:  # a row that is won keeps its last one
            losses = self.losses[-1].index_copy(0, self.index, losses)
        self.losses.append(losses)
        return gradient, hidden

    @torch.no_grad()
    def _set_won_aside(self, gradient: Tensor, hidden: Tensor) -> Tensor:
        """Keep the perturbations of rows that are won, and go on with the others. Returns the
        gradient of these."""
        won = _won(self.network, self.rows.batch, self.search, hidden)
        if not won.any():
            return gradient
        self.aside = self._of_all_rows()
        still = ~won[self.rows.row]
        self.rows = self.rows.select((~won).nonzero().squeeze(1))
        self.index = self.index[~won]
        self.deltas = self.deltas[:, still]
        self.moments = self.moments[:, :, still]
        return gradient[:, still]

    @torch.no_grad()
    def _step(self, gradient: Tensor, step: int) -> None:
        """One update of every site's delta, and its projection."""
        if self.search.rule == "adamw":
            moved = self._adamw(gradient, step)
        else:
            length = (self.lr * self.radii).to(gradient.dtype)
            moved = self.deltas - _along(gradient, self.search.rule, length)
        self.deltas = project_l2(moved, self.radii)

    def _adamw(self, gradient: Tensor, step: int) -> Tensor:
        first, second = self.moments
        first.lerp_(gradient, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        scale = second / (1 - BETA2 ** (step + 1))
        scale.sqrt_().add_(ADAM_EPS)
        along = torch.div(first, scale, out=scale)
        rate = self.lr / (1 - BETA1 ** (step + 1))
        kept = 1 - self.lr * WEIGHT_DECAY
        decayed = self.deltas * kept.to(gradient.dtype)
        return decayed.sub_(along.mul_(rate.to(gradient.dtype)))

    def _of_all_rows(self) -> dict[Site, Tensor]:
        """site -> [batch, seq, d_model]: rows that were set aside as they were then."""
        deltas = self.rows.scattered(self.deltas, wide_of(self.network.dtype))
        if self.aside is None:
            return deltas
        return {s: self.aside[s].index_copy(0, self.index, delta) for s, delta in deltas.items()}

    def _result(self, judged: bool) -> Attack:
        deltas, won, rows = self._of_all_rows(), None, self.all_rows
        if judged:
            with torch.no_grad():
                hidden = self.network.label_rows(rows.batch, deltas, rows.start)
            loss, won = judge(self.network, rows.batch, self.search, hidden)
            self.losses.append(loss)
        return Attack(deltas, torch.stack(self.losses), won, rows.threat)


def _along(gradient: Tensor, rule: Rule, length: Tensor) -> Tensor:
    """Vectors of a length along the gradient ('l2') or its signs ('sign')."""
    if rule == "sign":  # a sign vector of d coordinates has norm sqrt(d)
        return length * gradient.sign() / gradient.shape[-1] ** 0.5
    return length * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def _better(a: Attack, b: Attack, rows: Tensor) -> Attack:
    """Row by row, the attack that won, else the lower final loss; `b` attacked only `rows` ([n]) of
    `a`'s batch."""
    assert a.won is not None and b.won is not None, "restarts are judged"
    before = a.losses[-1]
    lower = b.losses[-1] < before[rows]
    same = b.won == a.won[rows]
    better = torch.where(same, lower, b.won)
    index = rows[better]
    deltas = {}
    for site, delta in a.deltas.items():
        found = b.deltas[site]
        deltas[site] = delta.index_copy(0, index, found[better])
    losses = a.losses.index_copy(1, index, b.losses[:, better])
    won = a.won.index_copy(0, index, b.won[better])
    return replace(a, deltas=deltas, losses=losses, won=won)
