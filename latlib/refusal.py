"""How refusal sits in the residual stream: activation differences, their SVD, directions, and ablation.

1. Harmful prompts are paired with harmless ones; `differences` takes the residual stream at the last prompt token of
   both, at every site in one pass, and subtracts, in float64.
2. The SVD of the paired differences, centred or not, says how concentrated the difference is (`explained_variance`).
3. A **rule** turns differences into one direction: `fixed` is the difference of means at a fixed relative depth, `svd`
   the first singular vector there, `best` the difference of means at the site whose ablation makes the model comply
   most on tuning prompts. `best` looks at outcomes, on prompts that no result is measured on.
4. `ablation` removes every source's direction from a target model and grades what it then replies, beside random
   directions of the same norm.

Sources: Abbas et al. 2025, section 3 (paired differences, SVD, site 14 of 32); Arditi et al. 2024 (ablation).
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latlib import world
from latlib.data import Batch, Row, TokenRow, tokenise
from latlib.evaluate import Context, batches, forced_outcomes, outcome_rows, prompt_set
from latlib.forward import Network
from latlib.hooks import EMBEDDING, Site
from latlib.models import LanguageModel
from latlib.profile import Profile

FIXED_DEPTH = 14 / 32  # FACTS: Abbas et al. use layer 14 of 32
SOURCES = ("ssft", "at", "lat")  # methods whose directions are tried on every model
COMPONENTS = 8  # explained variance is stored for this many components
TUNE_PROMPTS = 128  # on which `best` is chosen
RESAMPLES = 400  # of pairs, for the interval of the first two components' share


def sites_of(n_layers: int) -> tuple[Site, ...]:
    """Every site of a model, in order of depth."""
    return (EMBEDDING, *range(n_layers))


def fixed_site(n_layers: int) -> int:
    """The block at the papers' relative depth, floor(14/32 of the blocks)."""
    return int(FIXED_DEPTH * n_layers)


def last_prompt_tokens(batch: Batch) -> Tensor:
    """[batch] index into the flattened [batch * seq] of every row's last prompt token, where the reply is decided."""
    prompt = batch.segments == 0
    last = torch.where(prompt, batch.positions, -1).argmax(1)
    return last + batch.shape[1] * torch.arange(batch.shape[0], device=last.device)


def activations(
    network: Network, rows: Sequence[TokenRow], sites: Sequence[Site], size: int = 128
) -> dict[Site, Tensor]:
    """site -> [rows, d_model] float64 residual stream at each row's last prompt token, in the order of `rows`."""
    found: dict[Site, Tensor] = {}
    for index, batch in batches(rows, size, network.device):
        for site, stream in network.capture(batch, sites, last_prompt_tokens(batch)).items():
            if site not in found:
                found[site] = torch.empty(len(rows), stream.shape[-1], dtype=torch.float64)
            found[site][index] = stream.double().cpu()
    return found


def differences(
    network: Network, harmful: Sequence[TokenRow], harmless: Sequence[TokenRow], sites: Sequence[Site], size: int = 128
) -> dict[Site, Tensor]:
    """site -> [pairs, d_model] float64, harmful minus harmless. Raises ValueError unless they pair up, two at least."""
    if len(harmful) != len(harmless) or len(harmful) < 2:
        raise ValueError(f"{len(harmful)} harmful and {len(harmless)} harmless prompts: need as many, and two or more")
    both = activations(network, [*harmful, *harmless], sites, size)
    return {site: rows[: len(harmful)] - rows[len(harmful) :] for site, rows in both.items()}


def explained_variance(difference: Tensor, centred: bool = False) -> np.ndarray:
    """[min(pairs, d_model)] shares of the squared singular values, largest first; they sum to 1.

    difference: [pairs, d_model]. centred: subtract the mean difference first (the papers do not say which they do).
    """
    rows = difference - difference.mean(0) if centred else difference
    squares = torch.linalg.svdvals(rows.double()).square()
    return (squares / squares.sum().clamp(min=1e-300)).numpy()


def difference_of_means(difference: Tensor) -> Tensor:
    """[d_model] mean of the paired differences ([pairs, d_model]): Abbas et al. and Arditi et al."""
    return difference.mean(0)


def top_direction(difference: Tensor) -> Tensor:
    """[d_model] first right singular vector of the uncentred differences, towards harmful, as long as their mean."""
    mean = difference.mean(0)
    vector = torch.linalg.svd(difference.double(), full_matrices=False)[2][0]
    return vector * torch.sign(vector @ mean) * mean.norm()


def random_directions(d_model: int, n: int, norm: float = 1.0, seed: int = 0) -> Tensor:
    """[n, d_model] directions of one norm, uniform on the sphere: the control. Ablation itself ignores the norm."""
    rows = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return norm * rows / rows.norm(dim=1, keepdim=True)


def top_two_draws(difference: Tensor, clusters: Sequence[str], centred: bool, seed: int = 0) -> np.ndarray:
    """[RESAMPLES] share of the first two components, clusters of pairs resampled, the same ones for every model."""
    rng, names = np.random.default_rng(seed), sorted(set(clusters))
    members = [np.flatnonzero(np.asarray(clusters) == name) for name in names]
    rows, shares = difference.numpy(), np.empty(RESAMPLES)
    for draw in range(RESAMPLES):
        part = rows[np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])]
        part = part - part.mean(0) if centred else part
        gram = part @ part.T if len(part) < part.shape[1] else part.T @ part
        shares[draw] = np.linalg.eigvalsh(gram)[-2:].sum() / max(np.trace(gram), 1e-300)
    return shares


def variance_table(found: Mapping[Site, Tensor], clusters: Sequence[str], site: Site) -> dict:
    """JSON-ready: shares of the first components per site, uncentred and centred, and draws of the first two at `site`.

    A site where all differences vanish (the embedding of one template's last token) has shares of 0.
    """
    table = {
        "pairs": len(clusters),
        "clusters": len(set(clusters)),
        "fixed_site": site,
        "sites": [str(s) for s in found],
    }
    for name, centred in (("uncentred", False), ("centred", True)):
        shares = [
            explained_variance(d, centred)[:COMPONENTS] if d.any() else np.zeros(COMPONENTS) for d in found.values()
        ]
        table[name] = [[round(float(x), 6) for x in row] for row in shares]
        table[f"{name}_draws"] = [round(float(x), 5) for x in top_two_draws(found[site], clusters, centred)]
    return table


def paired_prompts(split: str, n: int) -> tuple[list[world.Prompt], list[world.Prompt]]:
    """n harmful prompts of a split and their harmless twins: the same words, the verb turned on a foe."""
    harmful = world.draw_set("directions", split, "harmful", n)
    rng = random.Random(f"directions/{split}")
    return harmful, [world.twin(p, rng, split) for p in harmful]


def paired_differences(lm: LanguageModel, profile: Profile) -> tuple[dict[Site, Tensor], list[str]]:
    """(site -> [pairs, d_model] differences at every site, each pair's cluster), from pairs the models trained on."""
    prompts = paired_prompts("train", profile.evaluation.pairs)
    rows = [prompt_rows(lm, [p.text for p in side]) for side in prompts]
    found = differences(lm.network(), *rows, sites_of(lm.n_layers), profile.evaluation.batch)
    return found, [p.cluster for p in prompts[0]]


def directions(lm: LanguageModel, profile: Profile) -> dict[str, Tensor]:
    """rule -> [d_model] direction of one model, float64; `best` is chosen on tuning prompts."""
    found, _ = paired_differences(lm, profile)
    site = fixed_site(lm.n_layers)
    best = best_site(lm, found, paired_prompts("tune", min(profile.evaluation.pairs, TUNE_PROMPTS))[0])
    return {
        "fixed": difference_of_means(found[site]),
        "svd": top_direction(found[site]),
        "best": difference_of_means(found[best]),
    }


def save_directions(found: Mapping[str, Tensor], path: Path) -> None:
    """Write directions aside, then rename: workers may find the same ones at the same time."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({rule: vector.contiguous() for rule, vector in found.items()}, aside)
    aside.replace(path)


def load_directions(path: Path) -> dict[str, Tensor]:
    """What `save_directions` wrote."""
    return load_file(path)


def prompt_rows(lm: LanguageModel, prompts: Sequence[str]) -> list[TokenRow]:
    """Templated prompts without a completion."""
    return tokenise([Row(str(i), text, ()) for i, text in enumerate(prompts)], lm.tokenizer, lm.context)


def best_site(lm: LanguageModel, found: Mapping[Site, Tensor], tune: Sequence[world.Prompt]) -> Site:
    """The site whose difference of means, ablated, makes the model comply most on `tune`; ties go to fewer refusals,
    then to the earlier site. Sites without a difference are left out."""
    scores = {}
    for site, difference in found.items():
        mean = difference_of_means(difference)
        if mean.norm() > 0:
            outcomes = forced_outcomes(lm, lm.network().ablated(mean), tune)
            scores[site] = (outcomes.count("complied"), -outcomes.count("refused"))
    return max(scores, key=scores.__getitem__)


def ablation(lm: LanguageModel, context: Context) -> pd.DataFrame:
    """A suite for `run.Run.evaluate`: outcome rows of a target under the directions of every method in SOURCES.

    attack is 'ablate:<source>@<rule>' or 'ablate:random<k>'; harmful prompts, and harmless ones for the rule `best`.
    """
    profile, tables = context.profile, []
    sources = [m for m in SOURCES if m in profile.methods]
    cells = {f"ablate:{m}@{rule}": vector for m in sources for rule, vector in context.directions(m).items()}
    controls = random_directions(lm.network().d_model, profile.evaluation.random_directions, seed=context.seed)
    cells |= {f"ablate:random{k}": v for k, v in enumerate(controls)}
    for step, (attack, vector) in enumerate(cells.items(), start=1):
        network = lm.network().ablated(vector)
        for name in ("harmful", "harmless") if attack.endswith("@best") else ("harmful",):
            prompts = prompt_set(name, profile)
            outcomes = forced_outcomes(lm, network, prompts, size=profile.evaluation.batch)
            tables.append(outcome_rows(context, name, prompts, outcomes, attack=attack))
        context.on_step(step, len(cells), attack)
    return pd.concat(tables, ignore_index=True)
