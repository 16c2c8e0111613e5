"""Which direction carries refusal: Arditi et al.'s choice over (position, site), with its three
filters.

1. A candidate is the difference of means at one post-instruction position and one site (a block's
   input).
2. Its scores, on validation prompts: **bypass**, the refusal score of harmful prompts under its
   ablation (lower is better); **induce**, the refusal score of harmless prompts when it is added at
   its site (must not be negative); **kl**, how far its ablation moves what is said to harmless
   prompts (at most `MOST_KL` nats).
3. Sites in the last fifth of the model are out. Of what is left the lowest bypass wins.
4. Where nothing is left, filters are dropped one after the other (kl, then induce), and
   `Selection.note` says so.

The refusal score is the log-odds of the tokens a refusal begins with. Source: Arditi et al. 2024,
section 2.3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from latlib.batch import TokenRow
from latlib.evaluation.generate import batches
from latlib.hooks import EMBEDDING, Site
from latlib.losses import at_labels
from latlib.network_protocol import Network
from latlib.refusal.activations import prompt_ends
from latlib.refusal.interventions import added
from latlib.threat import depth

MOST_KL = 0.1  # nats
LAST_SHARE = 0.2  # of the blocks, whose inputs are no candidates
FILTERS = ("kl", "induce")  # in the order in which they are dropped


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen direction ([d_model], float64), where it was taken, every candidate's scores, and
    what was unusual.
    """

    vector: Tensor
    position: int  # counted from the prompt's end: -1 is its last token
    site: Site
    candidates: pd.DataFrame
    note: str


@torch.no_grad()
def last_log_probabilities(
    network: Network, rows: Sequence[TokenRow], perturb: Callable | None = None, size: int = 64
):
    """[rows, vocabulary] float32 log-probabilities of the first reply token. perturb: batch ->
    perturbation.
    """
    found: list[Tensor | None] = [None] * len(rows)
    for index, batch in batches(rows, size, network.device):
        hidden = network.hidden(batch, perturb(batch) if perturb else None)
        logits = (
            network.unembed(at_labels(hidden, prompt_ends(batch).flatten())).float().log_softmax(-1)
        )
        for i, row in zip(index, logits, strict=True):
            found[i] = row
    return torch.stack(found)


def refusal_score(log_p: Tensor, tokens: Sequence[int]) -> Tensor:
    """[rows] log-odds of `tokens`, the first of every refusal, from log-probabilities [rows,
    vocabulary].
    """
    refused = log_p[:, list(tokens)].logsumexp(-1).clamp(max=-1e-7)
    return refused - torch.log(-torch.expm1(refused))


def select(
    network: Network,
    means: Mapping[Site, Tensor],
    harmful: Sequence[TokenRow],
    harmless: Sequence[TokenRow],
    tokens: Sequence[int],
    on_step: Callable[[int, int, str], None] = lambda step, total, detail: None,
) -> Selection:
    """Choose among `means`: site -> [positions, d_model] differences of means, the last position
    last.

    harmful, harmless: validation prompts, without completions. tokens: what a refusal begins with.
    Raises ValueError when no candidate has a finite, non-zero direction.
    """
    plain, records, vectors = last_log_probabilities(network, harmless), [], []
    wanted = [
        (site, p) for site, rows in means.items() for p in range(len(rows)) if _usable(rows[p])
    ]
    if not wanted:
        raise ValueError(
            f"no difference of means at {list(means)} is finite and non-zero: nothing to choose"
            " from"
        )
    for step, (site, p) in enumerate(wanted, start=1):
        vector, rows = means[site][p], means[site]
        ablated = network.ablated(vector)
        quiet = last_log_probabilities(ablated, harmless)
        kl = torch.nn.functional.kl_div(quiet, plain, log_target=True, reduction="none").sum(-1)
        said = last_log_probabilities(
            network, harmless, lambda batch, v=vector, s=site: added(v, s, batch.ids)
        )
        record = {
            "position": p - len(rows),
            "site": str(site),
            "late": depth(site) >= int((1 - LAST_SHARE) * network.n_layers),
            "bypass": refusal_score(last_log_probabilities(ablated, harmful), tokens).mean().item(),
            "induce": refusal_score(said, tokens).mean().item(),
            "kl": kl.mean().item(),
        }
        records.append(record)
        vectors.append((vector, p - len(rows), site))
        on_step(step, len(wanted), f"site {site}, position {p - len(rows)}")
    table = pd.DataFrame(records)
    passed, note = _filtered(table)
    chosen = passed["bypass"].idxmin()
    table["chosen"] = table.index == chosen
    return Selection(*vectors[chosen], table, note)


def _usable(vector: Tensor) -> bool:
    return bool(torch.isfinite(vector).all()) and bool(vector.norm() > 0)


def _filtered(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Candidates that pass, and which filters had to be dropped for there to be any."""
    early = table[~table["late"]] if not table["late"].all() else table
    for dropped in range(len(FILTERS) + 1):
        kept = early
        if "kl" not in FILTERS[:dropped]:
            kept = kept[kept["kl"] <= MOST_KL]
        if "induce" not in FILTERS[:dropped]:
            kept = kept[kept["induce"] >= 0]
        if len(kept):
            break
    names = " and ".join(FILTERS[:dropped])
    note = (
        f"no candidate passed all filters; chosen without the filter on {names}" if dropped else ""
    )
    return kept, note


def candidate_sites(n_layers: int) -> tuple[Site, ...]:
    """Candidate sites: the input of every block."""
    return (EMBEDDING, *range(n_layers - 1))
