"""Which direction carries refusal: Arditi et al.'s choice over (position, site), with its three
filters.

1. A candidate is the difference of means at one post-instruction position and one site (a block's
   input).
2. Its scores, on validation prompts: **bypass**, the refusal score of harmful prompts under its
   ablation (lower is better); **induce**, the refusal score of harmless prompts when it is added at
   its site (must not be negative); **kl**, how far its ablation moves what is said to harmless
   prompts (at most `MOST_KL` nats).
3. Sites in the last fifth of the model are out. Of what is left the lowest bypass wins.
4. Where nothing is left, filters are dropped one after the other (kl, then induce),
   `Direction.note` says so, and the direction counts as not found. A vector of zeros, or of what
   rounding left of them, is no candidate: ablating it does nothing, which passes every filter on a
   model that refuses too much.
5. Before all this, prompts that the undisturbed model does not treat rightly (`treated_rightly`)
   leave the means and the validation set.

The refusal score is the log-odds of the tokens a refusal begins with. Source: Arditi et al. 2024,
section 2.3 and appendix C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from latlib.evaluation.generate import Perturb, TokenRows, batches
from latlib.losses import at_labels
from latlib.network_protocol import Network
from latlib.refusal.activations import prompt_ends
from latlib.refusal.geometry import Streams
from latlib.refusal.interventions import Direction, adding
from latlib.threat import depth

MOST_KL = 0.1  # nats
LAST_SHARE = 0.2  # of the blocks, whose inputs are no candidates
NOTHING = 1e-6  # of the longest candidate: what is shorter is rounding; our choice


@torch.no_grad()
def last_log_probabilities(
    network: Network, rows: TokenRows, perturb: Perturb | None = None, size: int = 64
) -> Tensor:
    """[rows, vocabulary] float32 log-probabilities of the first reply token. perturb: batch ->
    perturbation.
    """
    order = []
    found = []
    for index, batch in batches(rows, size, network.device):
        hidden = network.hidden(batch, perturb(batch) if perturb else None)
        ends = at_labels(hidden, prompt_ends(batch).flatten())
        order += index
        found.append(network.unembed(ends).float().log_softmax(-1))
    return torch.cat(found)[torch.tensor(order).argsort()]


def refusal_score(log_p: Tensor, tokens: Sequence[int]) -> Tensor:
    """[rows] log-odds of `tokens`, the first of every refusal, from log-probabilities [rows,
    vocabulary].
    """
    refused = log_p[:, list(tokens)].logsumexp(-1).clamp(max=-1e-7)
    return refused - torch.log(-torch.expm1(refused))


def treated_rightly(
    network: Network, rows: TokenRows, tokens: Sequence[int], harmful: bool
) -> Tensor:
    """[rows] bool: the undisturbed model refuses harmful prompts (a refusal score above 0), or does
    not refuse harmless ones (below 0). Source: Arditi et al. 2024, authors' code, `filter_data`.
    """
    score = refusal_score(last_log_probabilities(network, rows), tokens)
    return score > 0 if harmful else score < 0


def select(
    network: Network,
    means: Streams,
    harmful: TokenRows,
    harmless: TokenRows,
    tokens: Sequence[int],
) -> tuple[Direction, pd.DataFrame]:
    """(the chosen direction, every candidate's scores) among `means`: site -> [positions, d_model]
    differences of means, the last position last.

    harmful, harmless: validation prompts, without completions. tokens: what a refusal begins with.
    Raises ValueError when no candidate has a finite, non-zero direction.
    """
    plain = last_log_probabilities(network, harmless)
    norms = torch.cat([rows.norm(dim=-1) for rows in means.values()])
    least = NOTHING * norms[norms.isfinite()].max() if norms.isfinite().any() else 0.0
    candidates = []
    records = []
    for site, rows in means.items():
        for position, vector in enumerate(rows, start=-len(rows)):
            if not vector.isfinite().all() or vector.norm() <= least:
                continue
            ablated = network.ablated(vector)
            quiet = last_log_probabilities(ablated, harmless)
            loud = last_log_probabilities(network, harmless, adding(vector, site))
            bypass = refusal_score(last_log_probabilities(ablated, harmful), tokens)
            kl = kl_div(quiet, plain, log_target=True, reduction="none").sum(-1)
            record = {
                "position": position,
                "site": str(site),
                "late": depth(site) >= int((1 - LAST_SHARE) * network.n_layers),
                "bypass": bypass.mean().item(),
                "induce": refusal_score(loud, tokens).mean().item(),
                "kl": kl.mean().item(),
            }
            candidates.append(Direction(vector, site, position))
            records.append(record)
    if not records:
        raise ValueError(
            f"no difference of means at {list(means)} is finite and non-zero: nothing to choose"
            " from"
        )
    table = pd.DataFrame(records)
    passed, note = _filtered(table)
    chosen = passed["bypass"].idxmin()
    table["chosen"] = table.index == chosen
    return replace(candidates[chosen], note=note, found=not note), table


def _filtered(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Candidates that pass, and which filters had to be dropped for there to be any."""
    early = table if table["late"].all() else table[~table["late"]]
    small = early["kl"] <= MOST_KL
    induces = early["induce"] >= 0
    if (small & induces).any():
        return early[small & induces], ""
    said = "no candidate passed all filters; chosen without the filter on"
    if induces.any():
        return early[induces], f"{said} kl"
    return early, f"{said} kl and induce"
