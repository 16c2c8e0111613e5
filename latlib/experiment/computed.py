"""What notebooks compute on a model beside the suites, as records that `Run.computed` keeps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latlib.attack import Deltas, perturbed_positions, pgd, random_noise
from latlib.batch import Batch
from latlib.data.prompts import Prompts, in_the_world
from latlib.evaluation.examine import Examiner, grader_of
from latlib.evaluation.generate import batches, generate
from latlib.evaluation.phrases import redacted
from latlib.evaluation.rule_graders import Grader
from latlib.experiment.run import Run
from latlib.io.files import Json
from latlib.losses import at_labels
from latlib.network_protocol import Network, Perturbation, Start
from latlib.redteam.latent import gradient_norms, training_never_binds
from latlib.threat import PGD, Site, ThreatModel, depth


def plain_outcomes(examiner: Examiner, sets: Mapping[str, Prompts]) -> Json:
    """set -> outcomes of its prompts, as they are."""
    return {name: examiner.examine(prompts).outcomes for name, prompts in sets.items()}


@torch.no_grad()
def first_token(
    network: Network, batch: Batch, deltas: Perturbation = None, start: Start = None
) -> Tensor:
    """[rows, vocabulary] float64 log-probabilities of the token that each reply begins with."""
    counts = torch.bincount(batch.label_rows)
    ends = batch.source[counts.cumsum(0) - counts]
    hidden = network.hidden(batch, deltas, start)
    return network.unembed(at_labels(hidden, ends)).double().log_softmax(-1)


def noise_effects(
    network: Network,
    batch: Batch,
    norms: Mapping[Site, float],
    places: tuple[Sequence[Site], Sequence[float]],
    seed: int,
) -> list[Json]:
    """What noise of length rho times the norm at a site does to the first token of the replies: a
    record for each (site, rho) of `places`, with the KL divergence of each prompt and the share of
    prompts whose most likely token changes."""
    generator = torch.Generator().manual_seed(seed)
    mask = perturbed_positions(batch, "prompt")
    clean = first_token(network, batch)
    with torch.no_grad():
        streams = network.streams(batch, places[0])
    records = []
    for site, rho in itertools.product(*places):
        noise = random_noise(network, mask, rho * norms[site], generator)
        # the blocks before it are not run again
        noisy = first_token(network, batch, {site: noise}, (site, streams[site]))
        kl = (clean.exp() * (clean - noisy)).sum(-1).tolist()
        changed = (clean.argmax(-1) != noisy.argmax(-1)).double().mean().item()
        place = {"site": str(site), "depth": depth(site), "rho": rho}
        records.append({**place, "changed": changed, "kl": kl})
    return records


def attack_curves(
    examiner: Examiner,
    prompts: Prompts,
    attack: tuple[ThreatModel, PGD],
    size: int,
    seed: int,
) -> Json:
    """An attack on prompts, `size` at a time: the attacker's losses [steps + 1, prompts], and the
    outcomes without it (none) and under it (PGD)."""
    threat, search = attack
    network, generator = examiner.lm.network(), torch.Generator().manual_seed(seed)
    losses = np.zeros((search.steps + 1, len(prompts)))
    ends = np.full(len(prompts), "neither", dtype=object)
    for index, batch in batches(examiner.rows(prompts), size, examiner.lm.device):
        found = pgd(network, batch, threat, search, generator)
        losses[:, index] = found.losses.float().cpu().numpy()
        asked, deltas = [prompts[i] for i in index], found.deltas
        ends[index] = examiner.examine(asked, perturb=partial(_same, deltas)).outcomes
    return {"losses": losses, "none": examiner.examine(prompts).outcomes, "PGD": ends}


def _same(deltas: Deltas, _: Batch) -> Deltas:
    return deltas


def graded_replies(
    run: Run,
    model: tuple[str, int],
    texts: Sequence[str],
    prompts: Prompts,
    graders: Mapping[str, Grader],
) -> Json:
    """Replies to `texts`, which are `prompts` in some encoding, redacted outside the made-up world,
    and what the profile's grader (profile) and each of the others make of them."""
    lm, settings = run.model(*model), run.profile.evaluation
    system = run.profile.data.system_prompt
    replies = generate(lm, texts, max_new_tokens=settings.max_new_tokens, system_prompt=system)
    asked = [prompt.text for prompt in prompts]
    outcomes = {}
    for name, grader in {"profile": grader_of(run.profile, prompts), **graders}.items():
        outcomes[name] = [grade.outcome for grade in grader.grade(asked, replies)]
    shown = [redacted(reply, show=in_the_world(run.profile)) for reply in replies]
    return {"reply": shown, **outcomes}


def gradients(run: Run, method: str, seed: int) -> Json:
    """Of the attack on a model: the smallest gradient norm at each site, and why the steps of its
    training never left the ball, '' where they did."""
    lm, subject = run.model(method, seed), run.subject(run.spec(method, seed))
    norms = {str(site): norm for site, norm in gradient_norms(lm, subject).items()}
    return {"norms": norms, "unbound": training_never_binds(lm, subject)}
