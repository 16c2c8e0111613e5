"""Latent attacks, evaluated as an attacker would run them: adaptive, with more steps, restarts,
other rules and sites.

1. An `AttackCell` is one attack at one radius on the same harmful prompts. A row is left alone once
   it is won, so that steps and restarts go to the rows that still hold.
2. Its step grows with the radius, whatever the rule (`search_within`): a curve over radii on which
   the ball never limits the attack is flat by construction.
3. Its control is noise as long as the perturbation that it found, position by position and site by
   site. Where a row was won before all steps were taken, noise is as long as the radius: the attack
   could have gone there.
4. `robustness` is the security curve: PGD at the main defence's sites over the profile's radii, up
   to where every defence breaks.
5. `attacks` varies one thing at a time at the radii `evaluation.strong_eps`: steps, restarts, rule,
   sites, one single step. Its worst case per prompt is what a defence is worth. A new attack is a
   line of `variations`.
6. These and `claimed` are lists of cells, each of which is kept as soon as it is measured.
7. `transfer` puts perturbations found on one model into the others: an attacker without access to
   their weights.

Radii, sites and prompts are the same for every model of a seed (relative radii are those of its
base model). Sources: Carlini et al. 2019 (arXiv 1902.06705), Tramer et al. 2020 (arXiv 2002.08347):
what an evaluation must show.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from latlib.attack import (
    Attack,
    Deltas,
    attack_losses,
    perturbed_positions,
    pgd,
    random_noise,
)
from latlib.batch import Batch
from latlib.config.profile import Profile, validated
from latlib.config.sections import AttackSettings
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.examine import examiner_of
from latlib.evaluation.generate import Perturb, batches
from latlib.evaluation.outcomes import (
    HARMFUL,
    NOISE,
    ONE_STEP,
    PGD,
    PGD_ALL_SITES,
    PGD_AS_TRAINED,
    PGD_OTHER_SITES,
    PGD_RESTARTS,
    PGD_STRONG,
    TRANSFER,
    Cell,
    Keep,
    Subject,
    anew,
    outcome_rows,
    pgd_by,
)
from latlib.io.progress import OnStep, unseen, with_progress
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.redteam.rounding import lost_in_rounding
from latlib.threat import ADAM_LR, EMBEDDING, Site, ThreatModel, resolve_sites
from latlib.threat import PGD as Search

TOUCHES = 0.999  # of the radius: a perturbation that is as long as its ball; our choice


@dataclass(frozen=True)
class AttackCell:
    """One attack at one radius on the first `n` harmful prompts (0: as many as the profile's
    attacks take).

    name: how the outcome table calls it. noise: also measure its control, noise of the norm that it
    reached, without a gradient.
    """

    settings: AttackSettings
    name: str = PGD
    n: int = 0
    noise: bool = False

    def __str__(self) -> str:
        return f"{self.name} at eps {self.settings.eps:g}"

    def digest(self, model: str) -> str:
        """What tells this cell on a model (by its folder's name) from every other one."""
        settings = self.settings.model_dump(mode="json")
        key = json.dumps([model, settings, self.name, self.n, self.noise], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def measure(self, lm: LanguageModel, subject: Subject) -> pd.DataFrame:
        """Its outcome rows, and those of its control."""
        profile = subject.profile
        prompts = prompt_set(HARMFUL, profile, self.n or profile.evaluation.pgd_prompts)
        threat = self.settings.threat_model(lm.n_layers, subject.norms)
        network = lm.network()
        attacker = _Attacker(network, threat, self.settings, subject.seed)
        ask = examiner_of(profile, lm, network).examine
        found = ask(prompts, perturb=attacker.attack)
        cell = Cell(attack=self.name, threat=threat, on_ball=attacker.on_ball)
        rows = outcome_rows(subject, cell, prompts, found)
        if not self.noise:
            return rows
        found = ask(prompts, perturb=attacker.noise)
        control = outcome_rows(subject, Cell(attack=NOISE, threat=threat), prompts, found)
        return pd.concat([rows, control], ignore_index=True)


class _Attacker:
    """Attacks the batches of a cell and remembers how far it went.

    lengths: a batch's token ids -> site -> [batch, seq, 1] float64, how long noise is there."""

    def __init__(
        self, network: Network, threat: ThreatModel, settings: AttackSettings, seed: int
    ) -> None:
        self.network, self.threat = network, threat
        self.search = search_within(settings, threat, network.d_model)
        # a rate of one's own may lead nowhere near the ball
        self.reaches = settings.lr is None
        self.random = torch.Generator().manual_seed(seed)
        self.random_of_noise = torch.Generator().manual_seed(seed)
        self.lengths: dict[bytes, dict[Site, Tensor]] = {}
        self.touching = self.places = 0

    def attack(self, batch: Batch) -> Deltas:
        """PGD that leaves a row alone once it is won."""
        if not self.lengths and (lost := lost_in_rounding(self.network, batch, self.threat)):
            warnings.warn(f"eps = {self.threat.eps:g}: {lost}", stacklevel=2)
        found = pgd(self.network, batch, self.threat, self.search, self.random, stop_when_won=True)
        self.lengths[_key(batch)] = self._measured(batch, found)
        return found.deltas

    def _measured(self, batch: Batch, found: Attack) -> dict[Site, Tensor]:
        """How long noise is, from what the attack found; counts what touches its ball."""
        assert found.won is not None, "it was judged"
        allowed = perturbed_positions(batch, self.threat.positions)
        won = allowed & found.won.view(-1, 1, 1)
        lengths = {}
        for site, radius in self.threat.radius.items():
            length = found.deltas[site].double().norm(dim=-1, keepdim=True)
            touching = allowed & (length >= TOUCHES * radius)
            self.places += int((allowed & ~won).sum())
            self.touching += int((touching & ~won).sum())
            furthest = touching | won if self.reaches else touching
            lengths[site] = length.masked_fill(furthest, radius).cpu()
        return lengths

    @property
    def on_ball(self) -> float:
        """See `latlib.evaluation.outcomes`."""
        return self.touching / self.places if self.places else math.nan

    def noise(self, batch: Batch) -> Deltas:
        """The control, in a batch that was attacked."""
        allowed = perturbed_positions(batch, self.threat.positions)
        lengths = self.lengths[_key(batch)].items()
        random = self.random_of_noise
        found = {site: random_noise(self.network, allowed, n, random) for site, n in lengths}
        if self.threat.positions == "prompt+shared":
            return {site: _shared(noise, batch, allowed) for site, noise in found.items()}
        return found


def _shared(noise: Tensor, batch: Batch, allowed: Tensor) -> Tensor:
    """Noise of which a row's tokens at one place have the first one's, as both completions share
    the attack's perturbation."""
    same = batch.positions[:, :, None] == batch.positions[:, None, :]
    first = same.int().argmax(-1, keepdim=True)
    return noise.gather(1, first.expand_as(noise)) * allowed


def _key(batch: Batch) -> bytes:
    """What tells a batch from others: its token ids."""
    return batch.ids.cpu().numpy().tobytes()


def search_within(settings: AttackSettings, threat: ThreatModel, d_model: int) -> Search:
    """How an evaluation searches. Without a rate of its own every rule takes steps of 2 / steps of
    the radius at each site; Adam moves every coordinate by about its rate, so its rate there is
    that length over the root of the dimensions.

    Adam does not see the scale of a loss, so this is its usual search for perturbations counted in
    radii. One rate for all sites would overshoot where the stream is short and get nowhere where it
    is long.
    """
    search = settings.search()
    if settings.rule != "adamw" or settings.lr is not None:
        return search
    rate = 2 / max(1, settings.steps) / d_model**0.5
    return replace(search, lr=tuple(rate * radius for radius in threat.radii))


def replace_settings(settings: AttackSettings, **changes: Any) -> AttackSettings:
    """`settings` with some fields changed. Raises ProfileError for a bad field or value."""
    return validated(AttackSettings, {**settings.model_dump(), **changes}, "attack")


def base_attack(profile: Profile) -> AttackSettings:
    """The main defence's attack, the threat model of every evaluation, with the steps of one: what
    all cells vary. The rate of training fits its steps and its radius, and no others: see
    `search_within`."""
    attack = profile.training(profile.main).attack
    return replace_settings(attack, steps=profile.evaluation.pgd_steps, lr=None)


def robustness(profile: Profile, n_layers: int) -> list[AttackCell]:
    """Security curves: PGD at the main defence's sites and at the embedding over the profile's
    radii, noise of the norms that it reached, one attack with many more steps at the trained radius
    and, where the ball may not limit the attack of the training, that one as it is."""
    evaluation = profile.evaluation
    attack = base_attack(profile)
    curve = [replace_settings(attack, eps=eps) for eps in evaluation.eps]
    cells = [AttackCell(settings, noise=True) for settings in curve]
    for eps in evaluation.embedding_eps:
        cells.append(AttackCell(replace_settings(attack, eps=eps, sites=(EMBEDDING,))))
    strong = replace_settings(attack, steps=evaluation.strong_steps)
    cells.append(AttackCell(strong, PGD_STRONG))
    trained = profile.training(profile.main).attack
    if trained.steps and trained.rule == "adamw":  # whose rate does not grow with the radius
        own = replace_settings(trained, lr=trained.lr or ADAM_LR)
        cells.append(AttackCell(own, PGD_AS_TRAINED))
    return cells


def claimed(profile: Profile, n_layers: int) -> list[AttackCell]:
    """The latent attacks that the claims ledger reads, and no others: at the main defence's sites
    and radius with the profile's steps and with many, at the radii `evaluation.strong_eps` there
    and at other sites, at the embedding at the rival's radius, and at the largest radius with its
    noise."""
    attack = base_attack(profile)
    others = variations(profile, n_layers)[PGD_OTHER_SITES]
    strong = replace_settings(attack, steps=profile.evaluation.strong_steps)
    cells = [AttackCell(attack), AttackCell(strong, PGD_STRONG)]
    for eps in profile.evaluation.strong_eps:
        cells.append(AttackCell(replace_settings(attack, eps=eps), noise=True))
        cells.append(AttackCell(replace_settings(attack, eps=eps, **others), PGD_OTHER_SITES))
    if profile.roles.rival:
        eps = profile.training(profile.roles.rival).attack.eps
        cells.append(AttackCell(replace_settings(attack, eps=eps, sites=(EMBEDDING,))))
    largest = replace_settings(attack, eps=max(profile.evaluation.eps))
    if largest.eps not in profile.evaluation.strong_eps:
        cells.append(AttackCell(largest, noise=True))
    return cells


def variations(profile: Profile, n_layers: int) -> dict[str, dict[str, Any]]:
    """Name of an attack -> the one thing that it changes in `base_attack`."""
    evaluation = profile.evaluation
    attack = base_attack(profile)
    trained = resolve_sites(attack.sites, n_layers)
    # a perturbation behind the last block writes the first token itself
    inner = tuple(range(n_layers - 1))
    held_out = tuple(site for site in inner if site not in trained)
    changes: dict[str, dict[str, Any]] = {
        ONE_STEP: {"steps": 1},  # cut to the radius
        PGD_STRONG: {"steps": evaluation.strong_steps},
        PGD_RESTARTS: {"restarts": 1 + evaluation.restarts},
        PGD_ALL_SITES: {"sites": inner},
        PGD_OTHER_SITES: {"sites": held_out or (EMBEDDING,)},
    }
    for rule in evaluation.rules:
        if rule != attack.rule:
            changes[pgd_by(rule)] = {"rule": rule}
    return changes


def attacks(profile: Profile, n_layers: int) -> list[AttackCell]:
    """`variations` of the attack at the radii `evaluation.strong_eps`."""
    evaluation = profile.evaluation
    attack = base_attack(profile)
    cells = []
    for eps in evaluation.strong_eps:
        if eps not in evaluation.eps:  # what is varied is in no security curve
            usual = replace_settings(attack, eps=eps)
            cells.append(AttackCell(usual, noise=True))
        for name, change in variations(profile, n_layers).items():
            settings = replace_settings(attack, eps=eps, **change)
            if (name, eps) != (PGD_STRONG, attack.eps):  # which is part of `robustness`
                cells.append(AttackCell(settings, name))
    return cells


def measure_cells(
    cells: Sequence[AttackCell],
    lm: LanguageModel,
    subject: Subject,
    on_step: OnStep = unseen,
    keep: Keep = anew,
) -> pd.DataFrame:
    """Outcome rows of all cells on a model. keep: keeps each cell's."""
    tables = []
    for cell in with_progress(cells, on_step):
        tables.append(keep(repr(cell), partial(cell.measure, lm, subject)))
    return pd.concat(tables, ignore_index=True)


def transfer(
    lm: LanguageModel,
    subject: Subject,
    targets: Mapping[str, LanguageModel],
    on_step: OnStep = unseen,
    keep: Keep = anew,
) -> pd.DataFrame:
    """This model's perturbations, at the radii `evaluation.strong_eps`, put into every target.

    targets: method -> its model of this seed; this model is a target too. Rows are of the target;
    source is this model. Perturbations take all their steps, won or not: what barely wins at home
    travels worse. keep: keeps the rows of each radius.
    """
    profile = subject.profile
    prompts = prompt_set(HARMFUL, profile, profile.evaluation.pgd_prompts)
    models = {**targets, subject.label: lm}
    examiners = {name: examiner_of(profile, model) for name, model in models.items()}
    network = examiners[subject.label].network
    usual, radii = base_attack(profile), profile.evaluation.strong_eps
    cells = [AttackCell(replace_settings(usual, eps=eps), TRANSFER) for eps in radii]

    def of_one(attack: AttackCell) -> pd.DataFrame:
        tables = []
        threat = attack.settings.threat_model(lm.n_layers, subject.norms)
        cell = Cell(attack=TRANSFER, source=subject.label, threat=threat)
        search = search_within(attack.settings, threat, network.d_model)
        perturb = _found_once(network, threat, search, subject.seed)
        for name, examiner in examiners.items():
            own = name == subject.label
            target = subject if own else replace(subject, method=name, variant="")
            found = examiner.examine(prompts, perturb=perturb)
            tables.append(outcome_rows(target, cell, prompts, found))
        return pd.concat(tables, ignore_index=True)

    tables = [keep(str(each), partial(of_one, each)) for each in with_progress(cells, on_step)]
    return pd.concat(tables, ignore_index=True)


def _found_once(network: Network, threat: ThreatModel, search: Search, seed: int) -> Perturb:
    """Perturbations found on `network`, for every batch once: all targets tokenise alike, so they
    are asked in the same batches."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[bytes, Deltas] = {}

    def perturb(batch: Batch) -> Deltas:
        key = _key(batch)
        if key not in found:
            found[key] = pgd(network, batch, threat, search, generator, judged=False).deltas
        return found[key]

    return perturb


def training_never_binds(lm: LanguageModel, subject: Subject) -> str:
    """That the steps of a method's own training do not lead out of its ball, in words; '' where
    they can, or where there was no attack.
    """
    attack = subject.profile.training(subject.method).attack
    radii = attack.threat_model(lm.n_layers, subject.norms).radii
    return attack.never_binds(min(radii), lm.network().d_model)


def gradient_norms(lm: LanguageModel, subject: Subject, n: int = 64) -> dict[Site, float]:
    """site -> the smallest norm, over n harmful prompts, of the attack loss's gradient in an
    unperturbed prompt.

    Zero would mean that the attack has nothing to follow: gradient masking, or a broken hook.
    """
    profile = subject.profile
    attack = base_attack(profile)
    sites = resolve_sites(attack.sites, lm.n_layers)
    examiner = examiner_of(profile, lm)
    network = examiner.network
    found = []
    rows = examiner.rows(prompt_set(HARMFUL, profile, n))
    for _, batch in batches(rows, profile.evaluation.batch, lm.device):
        shape = (*batch.shape, network.d_model)
        nothing = torch.zeros(shape, dtype=network.dtype, device=network.device)
        deltas = {site: nothing.clone().requires_grad_() for site in sites}
        with torch.enable_grad(), network.frozen_mode():
            states = network.label_rows(batch, deltas)
            loss = attack_losses(network, batch, attack.search(), states).sum()
            # a site that nothing depends on has gradient 0
            loss = loss + 0.0 * sum(delta.sum() for delta in deltas.values())
            gradients = torch.autograd.grad(loss, list(deltas.values()))
        mask = perturbed_positions(batch, attack.positions)
        own = [gradient.float() * mask for gradient in gradients]
        found.append(torch.stack(own).flatten(2).norm(dim=2))
    smallest = torch.cat(found, dim=1).amin(1).tolist()  # [sites]
    return dict(zip(sites, smallest, strict=True))
