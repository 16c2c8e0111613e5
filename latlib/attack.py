"""PGD on latent perturbations: how an adversary inside the residual stream is found.

For a packed batch of rows [prompt | rejected | chosen], sites S and radii eps:
1. delta = 0 (or uniform in the ball) at every perturbed position of every site; 0 elsewhere, and on
   padding.
2. The stream at the lowest site is computed once; each step runs from there.
3. loss = toward * CE(rejected | delta) + away * away(chosen | delta), the mean over each row's
   tokens, summed over rows, so that rows do not interact. Untargeted: minus the CE of the response.
4. A step of `adamw` (the paper), `sign` or `l2` (normalised gradient) on all sites at once, then
   every position's delta is projected onto its L2 ball.
5. With restarts, each row keeps the perturbation that won, or else the one with the lowest loss.

Weights are frozen inside: an attack leaves every `parameter.grad` as it was.
Sources: Sheshadri et al. 2024, section 3; Casper et al. 2024 (untargeted).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latlib.batch import PADDING, Batch
from latlib.config.profile import AttackSettings
from latlib.hooks import Site, depth, resolve_sites
from latlib.losses import argmax_matches, row_means, token_losses, wide_of
from latlib.network_protocol import Network


@dataclass(frozen=True)
class Attack:
    """What an attack found.

    deltas: site -> [batch, seq, d_model]. losses: [steps + 1, batch], each row's attack loss before
    every step and at the end, of the restart that was kept. won: [batch] bool, whether the model
    under the final perturbation would write the wanted completion word for word (greedy);
    untargeted, whether it would not. eps: site -> radius used. An attack that was not judged has
    losses [steps, batch] and no `won`.
    """

    deltas: dict[Site, Tensor]
    losses: Tensor
    won: Tensor | None
    eps: dict[Site, float]


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """Project each position's perturbation onto the L2 ball.

    delta: [batch, seq, d_model], in units of the residual stream. eps: radius, > 0. Returns a
    tensor of the same shape and dtype with norm <= eps along d_model, also after rounding to bf16.
    Source: Sheshadri et al. 2024, section 3.
    """
    if eps <= 0:
        raise ValueError(f"eps = {eps} must be > 0: for no attack set attack.steps = 0")
    wide = delta.double() if delta.dtype == torch.float64 else delta.float()
    norm = wide.norm(dim=-1, keepdim=True)
    # A hair inside the ball: the product is rounded to delta's dtype, and the norm is a rounded sum
    # of d_model terms.
    inside = eps * (1 - max(torch.finfo(delta.dtype).eps, 16 * torch.finfo(wide.dtype).eps))
    return torch.where(norm > inside, wide * (inside / norm.clamp(min=1e-30)), wide).to(delta.dtype)


def perturbed_positions(batch: Batch, positions: str) -> Tensor:
    """[batch, seq, 1] bool: where delta may be non-zero ('prompt' or 'prompt+completion'); never on
    padding.
    """
    if positions == "prompt":
        return (batch.segments == 0).unsqueeze(-1)
    if positions == "prompt+completion":
        return (batch.segments != PADDING).unsqueeze(-1)
    raise ValueError(f"positions = {positions!r}: choose 'prompt' or 'prompt+completion'")


def radii(
    settings: AttackSettings, n_layers: int, norms: Mapping[Site, float] | None = None
) -> dict[Site, float]:
    """site -> radius in units of the residual stream, lowest site first.

    norms: site -> median residual norm on harmless prompts, needed for eps_mode 'relative'.
    """
    sites = resolve_sites(settings.sites, n_layers)
    if settings.eps_mode == "absolute":
        return dict.fromkeys(sites, settings.eps)
    if norms is None:
        raise ValueError(
            "eps_mode = 'relative' needs the median residual norms: measure them with"
            " residual_norms()"
        )
    return {site: settings.eps * norms[site] for site in sites}


def attack_losses(network: Network, batch: Batch, settings: AttackSettings, rows: Tensor) -> Tensor:
    """[batch] the adversary's loss of each row, from `network.label_rows` ([labels, d_model]) under
    the perturbation.

    A packed row's first completion is wanted, its second unwanted; a row with one completion has
    only that.
    """
    n = batch.shape[0]
    if not settings.targeted:
        return -row_means(token_losses(network.unembed, rows, batch.labels), batch.label_rows, n)
    wanted, unwanted = batch.label_index(1), batch.label_index(2)
    losses = token_losses(network.unembed, rows, batch.labels, batch.label_segments == 2)
    loss = settings.toward * row_means(losses[wanted], batch.label_rows[wanted], n)
    if len(unwanted):
        loss = loss + settings.away * row_means(losses[unwanted], batch.label_rows[unwanted], n)
    return loss


@torch.no_grad()
def greedy_matches(
    network: Network, batch: Batch, rows: Tensor, segment: int, begun: int = 0
) -> Tensor:
    """[batch] bool: greedy decoding would give completion `segment` word for word (every label is
    the argmax), or what is left of it when its first `begun` tokens stand there. rows:
    `network.label_rows`, [labels, d_model].

    Exact, and one forward: under greedy decoding a reply equals a text iff each of its tokens is
    the argmax given the ones before. False for a row without that completion.
    """
    index, n = batch.label_index(segment), batch.shape[0]
    if begun:
        of = batch.label_rows[index]
        counts = torch.bincount(of, minlength=n)
        index = index[
            torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[of] >= begun
        ]
    right = argmax_matches(network.unembed, rows[index], batch.labels[index])
    of = batch.label_rows[index]
    return (row_means(right.float(), of, n) == 1) & (torch.bincount(of, minlength=n) > 0)


def pgd(
    network: Network,
    batch: Batch,
    eps: Mapping[Site, float],
    settings: AttackSettings,
    generator: torch.Generator | None = None,
    judged: bool = True,
    stop: bool = False,
) -> Attack:
    """Find a perturbation that minimises the adversary's loss; see the module's docstring.

    eps: site -> radius (from `radii`). generator: for random starts. judged=False leaves out the
    last forward, for a caller that runs the perturbation itself and then asks `judge`; restarts are
    always judged. stop=True leaves a row alone once it is won, keeping the perturbation that won
    it, so that steps and restarts go to the others. Raises ValueError for an empty eps, or
    settings.steps = 0 with a zero start (there is nothing to find).
    """
    if not eps:
        raise ValueError("eps names no site: an attack needs at least one")
    lowest = min(eps, key=depth)
    start = (lowest, network.capture(batch, [lowest])[lowest])
    best: Attack | None = None
    judged = judged or settings.restarts > 1
    for restart in range(settings.restarts):
        # a second zero start would find the same thing
        random = settings.start == "random" or restart > 0
        open_rows = torch.arange(batch.shape[0], device=network.device)
        if stop and best is not None:
            open_rows = (~best.won).nonzero().squeeze(1)
            if not len(open_rows):
                break
        part, begin = batch, start
        if len(open_rows) < batch.shape[0]:
            part, begin = batch.select(open_rows), (lowest, start[1][open_rows])
        free = perturbed_positions(part, settings.positions).flatten().nonzero().squeeze(1)
        deltas = {s: _initial(network, len(free), r, random, generator) for s, r in eps.items()}
        found = _descend(network, part, begin, deltas, dict(eps), free, settings, judged, stop)
        best = found if best is None else _better(best, found, open_rows)
    return best


def _initial(
    network: Network, n: int, eps: float, random: bool, generator: torch.Generator | None
) -> Tensor:
    """[n, d_model] starting perturbations, float32 or better."""
    if random:
        return _noise((n, network.d_model), network, eps, generator, inside=True)
    return torch.zeros(n, network.d_model, device=network.device, dtype=wide_of(network.dtype))


def random_noise(
    network: Network,
    mask: Tensor,
    eps: float,
    generator: torch.Generator | None = None,
    inside: bool = False,
) -> Tensor:
    """[batch, seq, d_model] noise of norm eps (inside: uniform in the ball) where mask ([batch,
    seq, 1]) is True.

    The control for every attack: same norm, same positions, no gradient.
    """
    return _noise((*mask.shape[:2], network.d_model), network, eps, generator, inside) * mask


def _noise(shape: tuple[int, ...], network: Network, eps: float, generator, inside: bool) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = noise / noise.norm(dim=-1, keepdim=True)
    if inside:
        noise = noise * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64) ** (
            1 / shape[-1]
        )
    return project_l2((eps * noise).to(network.device, wide_of(network.dtype)), eps)


@dataclass
class _Open:
    """The rows an attack still works on: `rows` [n] of the whole batch, and all that belongs to
    them.

    deltas: site -> [m, d_model], float32 or better, at positions `free` ([m] into the flattened [n
    * seq]).
    """

    rows: Tensor
    batch: Batch
    start: tuple[Site, Tensor]
    free: Tensor
    deltas: dict[Site, Tensor]
    moments: dict[Site, tuple[Tensor, Tensor]]

    def only(self, stay: Tensor) -> _Open:
        """Those of the rows where `stay` ([n] bool) is True."""
        index, seq = stay.nonzero().squeeze(1), self.batch.shape[1]
        own = stay[self.free // seq]
        free = (stay.cumsum(0) - 1)[self.free[own] // seq] * seq + self.free[own] % seq
        deltas = {s: d.detach()[own] for s, d in self.deltas.items()}
        moments = {s: (first[own], second[own]) for s, (first, second) in self.moments.items()}
        start = (self.start[0], self.start[1][index])
        return _Open(self.rows[index], self.batch.select(index), start, free, deltas, moments)

    def placed(self, dtype: torch.dtype) -> dict[Site, Tensor]:
        """site -> [n, seq, d_model] in `dtype`, zero at all other positions."""
        return {s: _placed(d, self.free, self.batch, dtype) for s, d in self.deltas.items()}


def _descend(network, batch, start, deltas, eps, free, settings, judged, stop) -> Attack:
    """One restart; deltas: site -> [m, d_model] where it begins, at positions `free`."""
    moments = {s: (torch.zeros_like(d), torch.zeros_like(d)) for s, d in deltas.items()}
    now = _Open(
        torch.arange(batch.shape[0], device=batch.ids.device), batch, start, free, deltas, moments
    )
    wide, won_with, losses = next(iter(deltas.values())).dtype, [], []
    for step in range(settings.steps):
        now.deltas = {s: d.requires_grad_() for s, d in now.deltas.items()}
        with torch.enable_grad(), network.held():
            rows = network.label_rows(now.batch, now.placed(network.dtype), now.start)
            loss = attack_losses(network, now.batch, settings, rows)
            gradients = dict(
                zip(
                    now.deltas,
                    torch.autograd.grad(loss.sum(), list(now.deltas.values())),
                    strict=True,
                )
            )
        losses.append(
            losses[-1].index_copy(0, now.rows, loss.detach()) if losses else loss.detach()
        )
        with torch.no_grad():
            if stop and (won := _won(network, now.batch, settings, rows)).any():
                won_with.append(
                    (now.rows[won], {s: d.detach()[won] for s, d in now.placed(wide).items()})
                )
                lost = ~won[now.free // now.batch.shape[1]]
                gradients, now = {s: g[lost] for s, g in gradients.items()}, now.only(~won)
                if not len(now.rows):
                    losses += losses[-1:] * (settings.steps - step - 1)
                    break
            for site, gradient in gradients.items():
                moved = _step(
                    now.deltas[site].detach(),
                    gradient,
                    now.moments[site],
                    step,
                    eps[site],
                    settings,
                )
                now.deltas[site] = project_l2(moved, eps[site])
    found = {s: d.detach() for s, d in now.placed(wide).items()}
    if won_with:
        pieces = [*won_with, (now.rows, found)]
        order = torch.cat([rows for rows, _ in pieces]).argsort()
        found = {s: torch.cat([placed[s] for _, placed in pieces])[order] for s in found}
    won = None
    if judged:
        with torch.no_grad():
            end, won = judge(network, batch, settings, network.label_rows(batch, found, start))
        losses.append(end)
    return Attack(found, torch.stack(losses), won, eps)


def _placed(delta: Tensor, free: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    """[batch, seq, d_model] in `dtype`: the rows of delta ([n, d_model]) at positions `free`, zero
    elsewhere.
    """
    full = torch.zeros(batch.ids.numel(), delta.shape[1], dtype=dtype, device=delta.device)
    return full.index_copy(0, free, delta.to(dtype)).view(*batch.shape, delta.shape[1])


@torch.no_grad()
def judge(
    network: Network, batch: Batch, settings: AttackSettings, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """([batch] the adversary's loss, [batch] bool whether it won) from `network.label_rows` under a
    perturbation.
    """
    return attack_losses(network, batch, settings, rows), _won(network, batch, settings, rows)


def _won(network: Network, batch: Batch, settings: AttackSettings, rows: Tensor) -> Tensor:
    matches = greedy_matches(network, batch, rows, 1)
    return matches if settings.targeted else ~matches


ADAM_LR = 1e-3  # FACTS: the authors' inner rate for Llama-3-8B (5e-2 for Llama-2-7B)
# torch.optim.AdamW's defaults, as the authors use
_BETA1, _BETA2, _ADAM_EPS, _WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01


def _step(
    delta: Tensor, gradient: Tensor, moments: tuple, step: int, eps: float, settings: AttackSettings
) -> Tensor:
    """One update of one site's delta, before projection."""
    if settings.rule == "adamw":
        lr, (first, second) = settings.lr or ADAM_LR, moments
        first.lerp_(gradient, 1 - _BETA1)
        second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        scale = (second / (1 - _BETA2 ** (step + 1))).sqrt_().add_(_ADAM_EPS)
        return (delta * (1 - lr * _WEIGHT_DECAY)).addcdiv_(
            first, scale, value=-lr / (1 - _BETA1 ** (step + 1))
        )
    length = (settings.lr or 2 / settings.steps) * eps
    # a sign vector of d coordinates has norm sqrt(d): the step's norm is `length`
    if settings.rule == "sign":
        return delta - length * gradient.sign() / delta.shape[-1] ** 0.5
    return delta - length * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)


def _better(a: Attack, b: Attack, rows: Tensor) -> Attack:
    """Row by row, the attack that won, else the lower final loss; `b` attacked only `rows` ([n]) of
    `a`'s batch.
    """
    b_wins = torch.where(b.won == a.won[rows], b.losses[-1] < a.losses[-1][rows], b.won)
    index = rows[b_wins]
    deltas = {s: d.index_copy(0, index, b.deltas[s][b_wins]) for s, d in a.deltas.items()}
    losses = a.losses.index_copy(1, index, b.losses[:, b_wins])
    return Attack(deltas, losses, a.won.index_copy(0, index, b.won[b_wins]), a.eps)
