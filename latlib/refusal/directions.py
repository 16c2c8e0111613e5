"""Refusal directions of a model, and how they are chosen.

1. A **rule** turns harmful-harmless differences (`activations`) into a direction: `fixed` is the
   difference of means at a fixed relative depth and `svd` the first singular vector there (Abbas et
   al. 2025); `selected` is Arditi et al.'s choice over (position, site) (`selection`); `best` is an
   oracle's, the difference of means whose ablation makes the model comply most on tuning prompts;
   `subspace` is the first singular vectors at the site of `best`. `learned` and `learned-subspace`
   are found by gradient (`learned`); they are added at the papers' depth.
2. A search can fail, and says so: a direction is **found** when its ablation makes the model comply
   on `MARGIN` more of the tuning prompts than removing nothing or a random direction does, and when
   no filter of its rule had to be dropped. One that was not found is no weak direction.
3. Nothing here sees test prompts.

Sources: Abbas et al. 2025, section 3 (site 14 of 32); Arditi et al. 2024; Wollschlaeger et al.
2025.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latlib.batch import TokenRow
from latlib.config.profile import Profile
from latlib.data.prompts import Prompts
from latlib.evaluation.ask import Wording, answers_only, token_rows
from latlib.evaluation.examine import examiner_of
from latlib.evaluation.outcomes import BASE, Outcome, Rule
from latlib.hooks import orthonormal
from latlib.io.files import aside
from latlib.models import LanguageModel
from latlib.refusal.activations import (
    activation_differences,
    paired_prompts,
    post_instruction,
    prompt_rows,
    sites_of,
)
from latlib.refusal.geometry import Streams, top_subspace
from latlib.refusal.interventions import Direction, Directions
from latlib.refusal.learned import Goals, learn
from latlib.refusal.selection import select, treated_rightly
from latlib.threat import Site

FIXED_DEPTH = 14 / 32  # Abbas et al. 2025, section 3: layer 14 of 32
SUBSPACE = 3  # dimensions; our choice
TUNE_PROMPTS = 128  # on which directions are judged; our choice
MARGIN = 0.1  # of the tuning prompts; our choice
SELECTION_PROMPTS = 32  # of each kind: Arditi et al. 2024, section 2.3


@dataclass(frozen=True, eq=False)
class Differences:
    """What directions are found from. pairs: site -> [pairs, positions, d_model] harmful minus
    harmless, float64; clusters: [pairs] what a pair is about."""

    pairs: Streams
    clusters: list[str]

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        about = {"sites": list(self.pairs), "clusters": self.clusters}
        _save({str(site): rows.float() for site, rows in self.pairs.items()}, about, path)

    @classmethod
    def load(cls, path: Path) -> Differences:
        """What `save` wrote, at float32's precision."""
        tensors, about = _load(path)
        pairs = {site: tensors[str(site)].double() for site in about["sites"]}
        return cls(pairs, about["clusters"])

    def last(self) -> Streams:
        """site -> [pairs, d_model] at the last prompt token."""
        return {site: rows[:, -1] for site, rows in self.pairs.items()}

    def means(self) -> Streams:
        """site -> [positions, d_model] differences of means (for equal numbers, the mean of paired
        differences).
        """
        return {site: rows.mean(0) for site, rows in self.pairs.items()}

    def shuffled(self, site: Site, seed: int = 0) -> Tensor:
        """[d_model] mean difference at a site's last token with harmful and harmless swapped in a
        random half of the pairs: what is left where the labels mean nothing."""
        n = len(self.clusters)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        signs = torch.ones(n, 1, dtype=torch.float64)
        signs[order[: n // 2]] = -1.0
        return (signs * self.pairs[site][:, -1]).mean(0)


def sources(profile: Profile, *targets: str) -> tuple[str, ...]:
    """The models whose directions are tried on every model: the profile's, or the base and what
    each method made of it; and the targets, for each is tried without its own.
    """
    named = profile.evaluation.sources or (BASE, *profile.methods)
    return tuple(dict.fromkeys((*named, *targets)))


def fixed_site(n_layers: int) -> int:
    """The block at the papers' relative depth, floor(14/32 of the blocks)."""
    return int(FIXED_DEPTH * n_layers)


def paired_differences(lm: LanguageModel, profile: Profile) -> Differences:
    """Differences at every site and post-instruction position, from pairs that the models trained
    on.
    """
    evaluation = profile.evaluation
    system = profile.data.system_prompt
    harmful, harmless = paired_prompts(profile, "train", evaluation.pairs)
    pairs = activation_differences(
        lm.network(),
        prompt_rows(lm, harmful, system),
        prompt_rows(lm, harmless, system),
        sites_of(lm.n_layers),
        post_instruction(lm.tokenizer, system),
        evaluation.batch,
    )
    return Differences(pairs, [prompt.cluster for prompt in harmful])


def top_direction(difference: Tensor) -> Tensor:
    """[d_model] first right singular vector of the uncentred differences, towards harmful, as long
    as their mean.
    """
    mean = difference.mean(0)
    vector = top_subspace(difference, 1)[0]
    return vector * torch.sign(vector @ mean) * mean.norm()


def random_directions(d_model: int, n: int, norm: float = 1.0, seed: int = 0) -> Tensor:
    """[n, d_model] directions of one norm, uniform on the sphere: the control. Ablation itself
    ignores the norm.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d_model, generator=generator, dtype=torch.float64)
    return norm * rows / rows.norm(dim=1, keepdim=True)


def find_directions(lm: LanguageModel, profile: Profile, found: Differences) -> Directions:
    """rule -> direction of one model; see the module's docstring."""
    last = found.last()
    ends = {site: rows[-1] for site, rows in found.means().items()}
    n = min(profile.evaluation.pairs, TUNE_PROMPTS)
    harmful, harmless = paired_prompts(profile, "tune", n)
    best = best_site(lm, profile, ends, harmful)
    fixed = fixed_site(lm.n_layers)
    validation = harmful[:SELECTION_PROMPTS], harmless[:SELECTION_PROMPTS]
    length = ends[fixed].norm().item()
    goals = _goals(lm, profile, fixed, length)
    network = lm.network()
    searched: Directions = {
        Rule.SELECTED: _selected(lm, profile, found, *validation),
        Rule.BEST: Direction(ends[best], best),
        Rule.SUBSPACE: Direction(top_subspace(last[best], SUBSPACE), best),
        Rule.LEARNED: Direction(length * learn(network, goals, 1)[0], fixed),
        Rule.LEARNED_SUBSPACE: Direction(orthonormal(learn(network, goals, SUBSPACE)), fixed),
    }
    return {
        Rule.FIXED: Direction(ends[fixed], fixed),
        Rule.SVD: Direction(top_direction(last[fixed]), fixed),
        **judged(lm, profile, searched, harmful),
    }


def _goals(lm: LanguageModel, profile: Profile, site: Site, length: float) -> Goals:
    """What directions are learned from: the pairs that the models trained on. Where a prompt has no
    answer its refusal stands in: then the words behind it are what is to stay as it is."""
    wording = Wording(system_prompt=profile.data.system_prompt)
    pairs = paired_prompts(profile, "train", profile.evaluation.pairs)
    harmful, harmless = (token_rows(lm, prompts, wording) for prompts in pairs)
    refused = [TokenRow(row.prompt, row.completions[-1:]) for row in harmless]
    return Goals(answers_only(harmful), answers_only(harmless), refused, site, length)


def judged(lm: LanguageModel, profile: Profile, searched: Directions, tune: Prompts) -> Directions:
    """The directions with `found`; see the module's docstring. tune: harmful prompts."""
    width, count = lm.network().d_model, profile.evaluation.random_directions
    controls = [None, *random_directions(width, count)]
    by_chance = [_opened(lm, profile, vector, tune)[0] for vector in controls]
    least = max(by_chance) + MARGIN * len(tune)
    found = {}
    for rule, direction in searched.items():
        complied, _ = _opened(lm, profile, direction.vector, tune)
        passed = direction.found is not False
        found[rule] = replace(direction, found=passed and complied >= least)
    return found


def _opened(
    lm: LanguageModel, profile: Profile, vector: Tensor | None, tune: Prompts
) -> tuple[int, int]:
    """How many prompts are complied with when a direction is removed (None: nothing), and minus how
    many are refused."""
    network = lm.network() if vector is None else lm.network().ablated(vector)
    outcomes = examiner_of(profile, lm, network).examine(tune).outcomes
    return outcomes.count(Outcome.COMPLIED), -outcomes.count(Outcome.REFUSED)


def _selected(
    lm: LanguageModel, profile: Profile, found: Differences, harmful: Prompts, harmless: Prompts
) -> Direction:
    """Arditi et al.'s choice. harmful, harmless: validation prompts.

    With `evaluation.filter_prompts` only what the model treats rightly counts: a pair where both of
    its prompts are, a validation prompt by itself. Where nothing would be left, all count;
    `Direction.note` has the numbers."""
    network, system = lm.network(), profile.data.system_prompt
    (row,) = token_rows(lm, harmful[:1], Wording(system_prompt=system))
    tokens = row.completions[1][:1]  # what a refusal begins with
    loud, quiet = (prompt_rows(lm, prompts, system) for prompts in (harmful, harmless))
    pairs, note = found.pairs, ""
    if profile.evaluation.filter_prompts:
        trained = paired_prompts(profile, "train", profile.evaluation.pairs)
        first, second = (prompt_rows(lm, prompts, system) for prompts in trained)
        both = treated_rightly(network, first, tokens, harmful=True)
        both &= treated_rightly(network, second, tokens, harmful=False)
        loudly = treated_rightly(network, loud, tokens, harmful=True)
        quietly = treated_rightly(network, quiet, tokens, harmful=False)
        note = _counted(both, loudly, quietly)
        pairs = {site: rows[_all_if_none(both)] for site, rows in pairs.items()}
        loud = list(compress(loud, _all_if_none(loudly)))
        quiet = list(compress(quiet, _all_if_none(quietly)))
    inputs = sites_of(lm.n_layers - 1)  # of every block
    means = {site: pairs[site].mean(0) for site in inputs}
    selected = select(network, means, loud, quiet, tokens)
    return replace(selected, note="; ".join(filter(None, (note, selected.note))))


def _counted(*kept: Tensor) -> str:
    """What a filter kept of pairs, harmful and harmless validation prompts, in words."""
    counts = [f"{int(own.sum())} of {len(own)}" for own in kept]
    note = "kept {} pairs, {} harmful and {} harmless validation prompts".format(*counts)
    every = all(own.any() for own in kept)
    return note if every else f"{note} (all where none would be left)"


def _all_if_none(kept: Tensor) -> Tensor:
    return kept if kept.any() else ~kept


def best_site(lm: LanguageModel, profile: Profile, means: Streams, tune: Prompts) -> Site:
    """The site whose direction ([d_model]), ablated, makes the model comply most on `tune`; ties go
    to fewer refusals, then to the earlier site. Sites without a difference are left out. Raises
    ValueError when none has one."""
    scores = {}
    for site, mean in means.items():
        if mean.norm() > 0:
            scores[site] = _opened(lm, profile, mean, tune)
    if not scores:
        raise ValueError(
            f"harmful and harmless prompts do not differ at any of the sites {list(means)}"
        )
    return max(scores, key=scores.__getitem__)


def save_directions(found: Directions, path: Path) -> None:
    """Write directions, whole or not at all: workers may find the same ones at the same time."""
    about = {rule: dict(vars(direction)) for rule, direction in found.items()}
    vectors = {rule: fields.pop("vector") for rule, fields in about.items()}
    _save(vectors, about, path)


def load_directions(path: Path) -> Directions:
    """What `save_directions` wrote."""
    vectors, about = _load(path)
    return {rule: Direction(vectors[rule], **fields) for rule, fields in about.items()}


def _save(tensors: Mapping[str, Tensor], about: Any, path: Path) -> None:
    # copies, because safetensors takes no two that share memory
    layout = torch.contiguous_format
    own = {name: tensor.clone(memory_format=layout) for name, tensor in tensors.items()}
    with aside(path) as partial:
        save_file(own, partial, {"about": json.dumps(about)})


def _load(path: Path) -> tuple[dict[str, Tensor], Any]:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    return load_file(path), about
