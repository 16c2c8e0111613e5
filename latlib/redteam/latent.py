"""Latent attacks, evaluated as an attacker would run them: adaptive, with more steps, restarts,
other rules and sites.

1. An `AttackCell` is one attack at one radius on the same harmful prompts. A row is left alone once
   it is won, so that steps and restarts go to the rows that still hold; noise of the same norm is
   the control.
2. `robustness` is the security curve: PGD at the main defence's sites over the profile's radii, up
   to where every defence breaks.
3. `attacks` varies one thing at a time at the radii `evaluation.strong_eps`: steps, restarts, rule,
   sites, one single step. Its worst case per prompt is what a defence is worth. A new attack is a
   line of `variations`.
4. `transfer` puts perturbations found on one model into the others: an attacker without access to
   their weights.

Radii, sites and prompts are the same for every model of a seed (relative radii are those of its
base model). Sources: Carlini et al. 2019 (arXiv 1902.06705), Tramer et al. 2020 (arXiv 2002.08347):
what an evaluation must show.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pandas as pd
import torch

from latlib.attack import Deltas, attack_losses, perturbed_positions, pgd, random_noise
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
    PGD_OTHER_SITES,
    PGD_RESTARTS,
    PGD_STRONG,
    TRANSFER,
    Cell,
    Subject,
    outcome_rows,
    pgd_by,
)
from latlib.io.progress import OnStep, unseen, with_progress
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.threat import EMBEDDING, Site, ThreatModel, resolve_sites
from latlib.threat import PGD as Search


@dataclass(frozen=True)
class AttackCell:
    """One attack at one radius on the first `n` harmful prompts (0: as many as the profile's
    attacks take).

    name: how the outcome table calls it; 'noise' is noise of the same norm, without a gradient.
    """

    settings: AttackSettings
    name: str = PGD
    n: int = 0

    def __str__(self) -> str:
        return f"{self.name} at eps {self.settings.eps:g}"

    def digest(self, model: str) -> str:
        """What tells this cell on a model (by its folder's name) from every other one."""
        settings = self.settings.model_dump(mode="json")
        key = json.dumps([model, settings, self.name, self.n], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def measure(self, lm: LanguageModel, subject: Subject) -> pd.DataFrame:
        """Its outcome rows."""
        profile = subject.profile
        prompts = prompt_set(HARMFUL, profile, self.n or profile.evaluation.pgd_prompts)
        network = lm.network()
        threat = self.settings.threat_model(lm.n_layers, subject.norms)
        search = self.settings.search()
        generator = torch.Generator().manual_seed(subject.seed)

        def perturb(batch: Batch) -> Deltas:
            if self.name == NOISE:
                mask, radii = perturbed_positions(batch, threat.positions), threat.radius.items()
                return {site: random_noise(network, mask, r, generator) for site, r in radii}
            options = {"judged": False, "stop_when_won": True}
            return pgd(network, batch, threat, search, generator, **options).deltas

        found = examiner_of(profile, lm, network).examine(prompts, perturb=perturb)
        return outcome_rows(subject, Cell(attack=self.name, threat=threat), prompts, found)


def replace_settings(settings: AttackSettings, **changes: Any) -> AttackSettings:
    """`settings` with some fields changed. Raises ProfileError for a bad field or value."""
    return validated(AttackSettings, {**settings.model_dump(), **changes}, "attack")


def base_attack(profile: Profile) -> AttackSettings:
    """The main defence's attack, the threat model of every evaluation, with the steps of one: what
    all cells vary. A rate that is a share of eps and fits the steps of training is too short or too
    long for others."""
    attack = profile.training(profile.main).attack
    lr = attack.lr if attack.rule == "adamw" else None
    return replace_settings(attack, steps=profile.evaluation.pgd_steps, lr=lr)


def robustness(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """Security curves: PGD at the main defence's sites and at the embedding over the profile's
    radii, noise of the same norms, and one attack with many more steps at the trained radius."""
    evaluation = subject.profile.evaluation
    attack = base_attack(subject.profile)
    curve = [replace_settings(attack, eps=eps) for eps in evaluation.eps]
    cells = [AttackCell(settings) for settings in curve]
    for eps in evaluation.embedding_eps:
        cells.append(AttackCell(replace_settings(attack, eps=eps, sites=(EMBEDDING,))))
    cells += [AttackCell(settings, NOISE) for settings in curve]
    strong = replace_settings(attack, steps=evaluation.strong_steps)
    cells.append(AttackCell(strong, PGD_STRONG))
    return _measured(lm, subject, cells, on_step)


def variations(profile: Profile, n_layers: int) -> dict[str, dict[str, Any]]:
    """Name of an attack -> the one thing that it changes in `base_attack`."""
    evaluation = profile.evaluation
    attack = base_attack(profile)
    trained = resolve_sites(attack.sites, n_layers)
    # a perturbation behind the last block writes the first token itself
    inner = tuple(range(n_layers - 1))
    held_out = tuple(site for site in inner if site not in trained)
    changes: dict[str, dict[str, Any]] = {
        # as long as the radius
        ONE_STEP: {"steps": 1, "lr": None if attack.rule == "adamw" else 1.0},
        PGD_STRONG: {"steps": evaluation.strong_steps},
        PGD_RESTARTS: {"restarts": 1 + evaluation.restarts},
        PGD_ALL_SITES: {"sites": inner},
        PGD_OTHER_SITES: {"sites": held_out or (EMBEDDING,)},
    }
    for rule in evaluation.rules:
        if rule != attack.rule:
            changes[pgd_by(rule)] = {"rule": rule, "lr": None}
    return changes


def attacks(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """`variations` of the attack at the radii `evaluation.strong_eps`."""
    evaluation = subject.profile.evaluation
    attack = base_attack(subject.profile)
    cells = []
    for eps in evaluation.strong_eps:
        if eps not in evaluation.eps:  # what is varied is in no security curve
            usual = replace_settings(attack, eps=eps)
            cells += [AttackCell(usual), AttackCell(usual, NOISE)]
        for name, change in variations(subject.profile, lm.n_layers).items():
            settings = replace_settings(attack, eps=eps, **change)
            if settings.rule == "adamw" and (attack.rule != "adamw" or name == ONE_STEP):
                settings = replace_settings(settings, lr=_adam_rate(settings, lm, subject))
            if (name, eps) != (PGD_STRONG, attack.eps):  # which is part of `robustness`
                cells.append(AttackCell(settings, name))
    return _measured(lm, subject, cells, on_step)


def _adam_rate(settings: AttackSettings, lm: LanguageModel, subject: Subject) -> float:
    """Adam moves every coordinate by about its rate: the one that makes its steps as long as the
    other rules' are, at the median of the sites' radii."""
    threat = settings.threat_model(lm.n_layers, subject.norms)
    length = 2 / settings.steps * median(threat.radii)
    return length / lm.network().d_model ** 0.5


def transfer(
    lm: LanguageModel,
    subject: Subject,
    targets: Mapping[str, LanguageModel],
    on_step: OnStep = unseen,
) -> pd.DataFrame:
    """This model's perturbations, at the radii `evaluation.strong_eps`, put into every target.

    targets: method -> its model of this seed; this model is a target too. Rows are of the target;
    source is this model. Perturbations take all their steps, won or not: what barely wins at home
    travels worse.
    """
    profile = subject.profile
    prompts = prompt_set(HARMFUL, profile, profile.evaluation.pgd_prompts)
    models = {**targets, subject.label: lm}
    examiners = {name: examiner_of(profile, model) for name, model in models.items()}
    network = examiners[subject.label].network
    usual, radii = base_attack(profile), profile.evaluation.strong_eps
    cells = [AttackCell(replace_settings(usual, eps=eps), TRANSFER) for eps in radii]
    tables = []
    for attack in with_progress(cells, on_step):
        threat = attack.settings.threat_model(lm.n_layers, subject.norms)
        cell = Cell(attack=TRANSFER, source=subject.label, threat=threat)
        perturb = _found_once(network, threat, attack.settings.search(), subject.seed)
        for name, examiner in examiners.items():
            own = name == subject.label
            target = subject if own else replace(subject, method=name, variant="")
            found = examiner.examine(prompts, perturb=perturb)
            tables.append(outcome_rows(target, cell, prompts, found))
    return pd.concat(tables, ignore_index=True)


def _found_once(network: Network, threat: ThreatModel, search: Search, seed: int) -> Perturb:
    """Perturbations found on `network`, for every batch once: all targets tokenise alike, so they
    are asked in the same batches."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[bytes, Deltas] = {}

    def perturb(batch: Batch) -> Deltas:
        key = batch.ids.cpu().numpy().tobytes()
        if key not in found:
            found[key] = pgd(network, batch, threat, search, generator, judged=False).deltas
        return found[key]

    return perturb


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


def _measured(
    lm: LanguageModel, subject: Subject, cells: Sequence[AttackCell], on_step: OnStep
) -> pd.DataFrame:
    """The cells' rows, with progress."""
    tables = [cell.measure(lm, subject) for cell in with_progress(cells, on_step)]
    return pd.concat(tables, ignore_index=True)
