"""Latent attacks, evaluated as an attacker would run them: adaptive, with more steps, restarts,
other rules and sites.

1. An `AttackCell` is one attack at one radius on the same harmful prompts. A row is left alone once
   it is won, so that steps and restarts go to the rows that still hold; noise of the same norm is
   the control.
2. `robustness` is the security curve: PGD at `lat`'s sites over the profile's radii, up to where
   every defence breaks.
3. `attacks` varies one thing at a time at `lat`'s radius and twice that: steps, restarts, rule,
   sites, one single step. Its worst case per prompt is what a defence is worth.
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

import pandas as pd
import torch
from torch import Tensor

from latlib.attack import attack_losses, perturbed_positions, pgd, random_noise
from latlib.batch import Batch
from latlib.config.profile import AttackSettings, validated
from latlib.evaluation.ask import examine, prompt_set, token_rows
from latlib.evaluation.generate import batches
from latlib.evaluation.outcomes import OnStep, Subject, outcome_rows, unseen
from latlib.hooks import EMBEDDING, Site, resolve_sites
from latlib.models import LanguageModel

ONE_STEP = "one-step"


@dataclass(frozen=True)
class AttackCell:
    """One attack at one radius on the first `n` harmful prompts (0: as many as the profile's
    attacks take).

    name: how the outcome table calls it; 'noise' is noise of the same norm, without a gradient.
    """

    settings: AttackSettings
    name: str = "pgd"
    n: int = 0

    def __str__(self) -> str:
        return f"{self.name} at eps {self.settings.eps:g}"

    def digest(self, model: str) -> str:
        """What tells this cell on a model (by its folder's name) from every other one."""
        key = json.dumps(
            [model, self.settings.model_dump(mode="json"), self.name, self.n], sort_keys=True
        )
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def measure(self, lm: LanguageModel, subject: Subject) -> pd.DataFrame:
        """Its outcome rows."""
        evaluation, settings = subject.profile.evaluation, self.settings
        prompts = prompt_set("harmful", subject.profile, self.n or evaluation.pgd_prompts)
        network, threat = lm.network(), settings.threat_model(lm.n_layers, subject.norms)
        search = settings.search()
        generator = torch.Generator().manual_seed(subject.seed)

        def perturb(batch: Batch) -> Mapping[Site, Tensor]:
            if self.name == "noise":
                mask = perturbed_positions(batch, settings.positions)
                noise = threat.radius.items()
                return {site: random_noise(network, mask, r, generator) for site, r in noise}
            return pgd(
                network, batch, threat, search, generator, judged=False, stop_when_won=True
            ).deltas

        found = examine(lm, subject.profile, prompts, network=network, perturb=perturb)
        columns = self.columns(lm.n_layers) | {"texts": found.texts}
        return outcome_rows(subject, "harmful", prompts, found.outcomes, **columns)

    def columns(self, n_layers: int) -> dict:
        """What the outcome table says of the attack."""
        return {
            "attack": self.name,
            "eps": self.settings.eps,
            "sites": resolve_sites(self.settings.sites, n_layers),
        }


def replace_settings(settings: AttackSettings, **changes) -> AttackSettings:
    """`settings` with some fields changed. Raises ProfileError for a bad field or value."""
    return validated(AttackSettings, {**settings.model_dump(), **changes}, "attack")


def base_attack(subject: Subject) -> AttackSettings:
    """`lat`'s attack with the steps of an evaluation: what all cells vary."""
    lat = subject.profile.training("lat").attack
    return replace_settings(
        lat, steps=subject.profile.evaluation.pgd_steps, lr=None if lat.rule != "adamw" else lat.lr
    )


def robustness(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """Security curves: PGD at `lat`'s sites and at the embedding over the profile's radii, noise of
    the same norms, and one attack with many more steps at `lat`'s radius."""
    evaluation, attack = subject.profile.evaluation, base_attack(subject)
    cells = [AttackCell(replace_settings(attack, eps=eps)) for eps in evaluation.eps]
    cells += [
        AttackCell(replace_settings(attack, eps=eps, sites=(EMBEDDING,)))
        for eps in evaluation.embedding_eps
    ]
    cells += [AttackCell(replace_settings(attack, eps=eps), "noise") for eps in evaluation.eps]
    cells.append(AttackCell(replace_settings(attack, steps=evaluation.strong_steps), "pgd-strong"))
    return _measured(lm, subject, cells, on_step)


def attacks(lm: LanguageModel, subject: Subject, on_step: OnStep = unseen) -> pd.DataFrame:
    """Variations of the attack at the radii `evaluation.strong_eps`: twice the steps, restarts,
    other rules, other sites, one step."""
    evaluation, attack = subject.profile.evaluation, base_attack(subject)
    trained = resolve_sites(attack.sites, lm.n_layers)
    # a perturbation behind the last block writes the first token itself
    inner = range(lm.n_layers - 1)
    held_out = tuple(site for site in inner if site not in trained)
    changes: dict[str, dict] = {
        # as long as the radius
        ONE_STEP: {"steps": 1, "lr": None if attack.rule == "adamw" else 1.0},
        "pgd-strong": {"steps": evaluation.strong_steps},
        "pgd-restarts": {"restarts": 1 + evaluation.restarts},
        "pgd-all-sites": {"sites": tuple(inner)},
        "pgd-other-sites": {"sites": held_out or (EMBEDDING,)},
    }
    changes |= {
        f"pgd-{rule}": {"rule": rule, "lr": None}
        for rule in evaluation.rules
        if rule != attack.rule
    }
    cells = []
    for eps in evaluation.strong_eps:
        if eps not in evaluation.eps:  # what is varied is in no security curve
            cells += [
                AttackCell(replace_settings(attack, eps=eps), name) for name in ("pgd", "noise")
            ]
        for name, change in changes.items():
            settings = replace_settings(attack, eps=eps, **change)
            if settings.rule == "adamw" and (attack.rule != "adamw" or name == ONE_STEP):
                settings = replace_settings(settings, lr=_adam_rate(settings, lm, subject))
            if (name, eps) != ("pgd-strong", attack.eps):  # which is part of `robustness`
                cells.append(AttackCell(settings, name))
    return _measured(lm, subject, cells, on_step)


def _adam_rate(settings: AttackSettings, lm: LanguageModel, subject: Subject) -> float:
    """Adam moves every coordinate by about its rate: the one that makes its steps as long as the
    other rules' are, at the median of the sites' radii."""
    limits = settings.threat_model(lm.n_layers, subject.norms).radii
    return 2 / settings.steps * median(limits) / lm.network().d_model ** 0.5


def transfer(
    lm: LanguageModel,
    subject: Subject,
    targets: Mapping[str, LanguageModel],
    on_step: OnStep = unseen,
) -> pd.DataFrame:
    """This model's perturbations, at the radii `evaluation.strong_eps`, put into every target.

    targets: how tables name it -> a model of this seed; this one is a target too. Rows are of the
    target; attack is 'transfer:<this model>'. Perturbations take all their steps, won or not: what
    barely wins at home travels worse.
    """
    evaluation, tables = subject.profile.evaluation, []
    prompts = prompt_set("harmful", subject.profile, evaluation.pgd_prompts)
    targets = {**targets, subject.method: lm}
    networks = {m: target.network() for m, target in targets.items()}
    rows = token_rows(lm, prompts, system_prompt=subject.profile.data.system_prompt)
    for number, eps in enumerate(evaluation.strong_eps, start=1):
        cell = AttackCell(
            replace_settings(base_attack(subject), eps=eps), f"transfer:{subject.method}"
        )
        limits, found = (
            cell.settings.threat_model(lm.n_layers, subject.norms),
            {m: ["neither"] * len(rows) for m in targets},
        )
        generator = torch.Generator().manual_seed(subject.seed)
        for index, batch in batches(rows, evaluation.batch, lm.device):
            deltas = pgd(
                networks[subject.method],
                batch,
                limits,
                cell.settings.search(),
                generator,
                judged=False,
            ).deltas
            for m, target in targets.items():
                asked, given = [prompts[i] for i in index], lambda _, d=deltas: d
                got = examine(
                    target,
                    subject.profile,
                    asked,
                    network=networks[m],
                    perturb=given,
                    size=len(index),
                )
                for i, outcome in zip(index, got.outcomes, strict=True):
                    found[m][i] = outcome
        for m, outcomes in found.items():
            of_target = replace(subject, method=m)
            tables.append(
                outcome_rows(of_target, "harmful", prompts, outcomes, **cell.columns(lm.n_layers))
            )
        on_step(number, len(evaluation.strong_eps), str(cell))
    return pd.concat(tables, ignore_index=True)


def gradient_norms(lm: LanguageModel, subject: Subject, n: int = 64) -> dict[Site, float]:
    """site -> the smallest norm, over n harmful prompts, of the attack loss's gradient in an
    unperturbed prompt.

    Zero would mean that the attack has nothing to follow: gradient masking, or a broken hook.
    """
    attack = base_attack(subject)
    sites, network = resolve_sites(attack.sites, lm.n_layers), lm.network()
    smallest = dict.fromkeys(sites, float("inf"))
    system = subject.profile.data.system_prompt
    rows = token_rows(lm, prompt_set("harmful", subject.profile, n), system_prompt=system)
    for _, batch in batches(rows, subject.profile.evaluation.batch, lm.device):
        shape = (*batch.shape, network.d_model)
        deltas = {
            s: torch.zeros(shape, device=lm.device, dtype=network.dtype, requires_grad=True)
            for s in sites
        }
        with torch.enable_grad(), network.frozen_mode():
            loss = attack_losses(
                network, batch, attack.search(), network.label_rows(batch, deltas)
            ).sum()
            # a site that nothing depends on has gradient 0
            loss = loss + 0.0 * sum(d.sum() for d in deltas.values())
            gradients = torch.autograd.grad(loss, list(deltas.values()))
        for site, gradient in zip(sites, gradients, strict=True):
            inside = gradient.float() * perturbed_positions(batch, attack.positions)
            smallest[site] = min(smallest[site], inside.flatten(1).norm(dim=1).min().item())
    return smallest


def _measured(
    lm: LanguageModel, subject: Subject, cells: Sequence[AttackCell], on_step: OnStep
) -> pd.DataFrame:
    """The cells' rows, with progress."""
    tables = []
    for step, cell in enumerate(cells, start=1):
        tables.append(cell.measure(lm, subject))
        on_step(step, len(cells), str(cell))
    return pd.concat(tables, ignore_index=True)
