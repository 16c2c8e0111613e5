"""Refusal directions of a model, and how they are chosen.

1. A **rule** turns harmful-harmless differences (`activations`) into a direction: `fixed` is the
   difference of means at a fixed relative depth and `svd` the first singular vector there (Abbas et
   al. 2025); `selected` is Arditi et al.'s choice over (position, site) (`selection`); `best` is an
   oracle's, the difference of means whose ablation makes the model comply most on tuning prompts;
   `subspace` is the first singular vectors at the site of `best`.
2. `best` and `subspace` look at outcomes, on prompts that no result is measured on; nothing here
   sees test prompts.

Sources: Abbas et al. 2025, section 3 (site 14 of 32); Arditi et al. 2024.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latlib.config.profile import Profile
from latlib.data.prompts import Prompt
from latlib.evaluation.ask import Wording, token_rows
from latlib.evaluation.examine import examiner_of
from latlib.evaluation.outcomes import BASE, Outcome, Rule
from latlib.hooks import Site
from latlib.io.files import aside
from latlib.models import LanguageModel
from latlib.refusal.activations import (
    differences,
    load_activations,
    paired_prompts,
    post_instruction,
    prompt_rows,
    save_activations,
    sites_of,
)
from latlib.refusal.geometry import top_subspace
from latlib.refusal.selection import Selection, candidate_sites, select

FIXED_DEPTH = 14 / 32  # Abbas et al. 2025, section 3: layer 14 of 32
SUBSPACE = 3  # dimensions
TUNE_PROMPTS = 128  # on which `best` is chosen
SELECTION_PROMPTS = 32  # of each kind: Arditi et al. 2024, section 2.3


@dataclass(frozen=True, eq=False)
class Direction:
    """vector: [d_model], or [k, d_model] for a subspace, float64, in units of the stream. site,
    position: where it was taken; position counts from the prompt's end. note: what was unusual
    about its choice."""

    vector: Tensor
    site: Site
    position: int = -1
    note: str = ""


@dataclass(frozen=True, eq=False)
class Differences:
    """What directions are found from. pairs: site -> [pairs, positions, d_model] harmful minus
    harmless, float64; clusters, prompts: [pairs] what a pair is about, and its id."""

    pairs: Mapping[Site, Tensor]
    clusters: list[str]
    prompts: list[str]

    def save(self, path: Path) -> None:
        """Write a safetensors file, aside first."""
        save_activations(self.pairs, path, clusters=self.clusters, prompts=self.prompts)

    @classmethod
    def load(cls, path: Path) -> Differences:
        """What `save` wrote, at float32's precision."""
        pairs, columns = load_activations(path)
        return cls(pairs, **columns)

    def last(self) -> dict[Site, Tensor]:
        """site -> [pairs, d_model] at the last prompt token."""
        return {site: rows[:, -1] for site, rows in self.pairs.items()}

    def means(self) -> dict[Site, Tensor]:
        """site -> [positions, d_model] differences of means (for equal numbers, the mean of paired
        differences).
        """
        return {site: rows.mean(0) for site, rows in self.pairs.items()}

    def shuffled(self, site: Site, seed: int = 0) -> Tensor:
        """[d_model] mean difference at a site's last token with harmful and harmless swapped in a
        random half of the pairs: what is left where the labels mean nothing."""
        order = torch.randperm(len(self.clusters), generator=torch.Generator().manual_seed(seed))
        signs = torch.ones(len(order), 1, dtype=torch.float64)
        signs[order[: len(order) // 2]] = -1.0
        return (signs * self.pairs[site][:, -1]).mean(0)


def sources(profile: Profile) -> tuple[str, ...]:
    """The models whose directions are tried on every model: the base and what each method made of
    it.
    """
    return (BASE, *profile.methods)


def fixed_site(n_layers: int) -> int:
    """The block at the papers' relative depth, floor(14/32 of the blocks)."""
    return int(FIXED_DEPTH * n_layers)


def paired_differences(lm: LanguageModel, profile: Profile) -> Differences:
    """Differences at every site and post-instruction position, from pairs that the models trained
    on.
    """
    evaluation, system = profile.evaluation, profile.data.system_prompt
    harmful, harmless = paired_prompts(profile, "train", evaluation.pairs)
    rows = (prompt_rows(lm, [p.text for p in side], system) for side in (harmful, harmless))
    count = post_instruction(lm.tokenizer, system)
    pairs = differences(lm.network(), *rows, sites_of(lm.n_layers), count, evaluation.batch)
    ids = [f"{evaluation.pairing}-train-{i:04d}" for i in range(len(harmful))]
    return Differences(pairs, [p.cluster for p in harmful], ids)


def top_direction(difference: Tensor) -> Tensor:
    """[d_model] first right singular vector of the uncentred differences, towards harmful, as long
    as their mean.
    """
    mean, (vector,) = difference.mean(0), top_subspace(difference, 1)
    return vector * torch.sign(vector @ mean) * mean.norm()


def random_directions(d_model: int, n: int, norm: float = 1.0, seed: int = 0) -> Tensor:
    """[n, d_model] directions of one norm, uniform on the sphere: the control. Ablation itself
    ignores the norm.
    """
    rows = torch.randn(
        n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return norm * rows / rows.norm(dim=1, keepdim=True)


def find_directions(
    lm: LanguageModel, profile: Profile, found: Differences
) -> dict[str, Direction]:
    """rule -> direction of one model; see the module's docstring."""
    fixed = fixed_site(lm.n_layers)
    last = found.last()
    means = found.means()
    harmful, harmless = paired_prompts(profile, "tune", min(profile.evaluation.pairs, TUNE_PROMPTS))
    best = best_site(lm, profile, {site: rows[-1] for site, rows in means.items()}, harmful)
    chosen = _selected(
        lm, profile, means, harmful[:SELECTION_PROMPTS], harmless[:SELECTION_PROMPTS]
    )
    return {
        Rule.FIXED.value: Direction(means[fixed][-1], fixed),
        Rule.SVD.value: Direction(top_direction(last[fixed]), fixed),
        Rule.SELECTED.value: Direction(chosen.vector, chosen.site, chosen.position, chosen.note),
        Rule.BEST.value: Direction(means[best][-1], best),
        Rule.SUBSPACE.value: Direction(top_subspace(last[best], SUBSPACE), best),
    }


def _selected(
    lm: LanguageModel,
    profile: Profile,
    means: Mapping[Site, Tensor],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
) -> Selection:
    system = profile.data.system_prompt
    candidates = {site: means[site] for site in candidate_sites(lm.n_layers)}
    (row,) = token_rows(lm, harmful[:1], Wording(system_prompt=system))
    refusal = row.completions[1]
    return select(
        lm.network(),
        candidates,
        prompt_rows(lm, [prompt.text for prompt in harmful], system),
        prompt_rows(lm, [prompt.text for prompt in harmless], system),
        refusal[:1],
    )


def best_site(
    lm: LanguageModel, profile: Profile, means: Mapping[Site, Tensor], tune: Sequence[Prompt]
) -> Site:
    """The site whose direction ([d_model]), ablated, makes the model comply most on `tune`; ties go
    to fewer refusals, then to the earlier site. Sites without a difference are left out. Raises
    ValueError when none has one."""
    examiner = examiner_of(profile)
    scores = {}
    for site, mean in means.items():
        if mean.norm() > 0:
            ablated = lm.network().ablated(mean)
            outcomes = list(examiner.examine(lm, tune, network=ablated).outcomes)
            scores[site] = (outcomes.count(Outcome.COMPLIED), -outcomes.count(Outcome.REFUSED))
    if not scores:
        raise ValueError(
            f"harmful and harmless prompts do not differ at any of the sites {list(means)}"
        )
    return max(scores, key=scores.__getitem__)


def save_directions(found: Mapping[str, Direction], path: Path) -> None:
    """Write directions aside, then rename: workers may find the same ones at the same time."""
    about = {
        rule: {"site": d.site, "position": d.position, "note": d.note} for rule, d in found.items()
    }
    vectors = {
        rule: d.vector.clone(memory_format=torch.contiguous_format) for rule, d in found.items()
    }
    with aside(path) as partial:
        save_file(vectors, partial, {"directions": json.dumps(about)})


def load_directions(path: Path) -> dict[str, Direction]:
    """What `save_directions` wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["directions"])
        return {rule: Direction(file.get_tensor(rule), **fields) for rule, fields in about.items()}
