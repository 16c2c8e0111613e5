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
from itertools import compress

import torch
from torch import Tensor
from torch.nn import functional as F

from latlib.batch import Batch, TokenRow
from latlib.evaluation.generate import Perturb, TokenRows, batches, of_similar_length
from latlib.network_protocol import Network
from latlib.refusal.geometry import Streams
from latlib.refusal.interventions import Direction, adding
from latlib.text.chat import shared_start
from latlib.threat import depth

MOST_KL = 0.1  # nats
LAST_SHARE = 0.2  # of the blocks, whose inputs are no candidates
TOGETHER = 8  # prompts that share one computation of their beginning: our choice
SHARED = 0.25  # of the longest prompt, from which that is less work: our choice
NOTHING = 1e-6  # of the longest candidate: what is shorter is rounding; our choice


@torch.no_grad()
def last_log_probabilities(
    network: Network, rows: TokenRows, perturb: Perturb | None = None, size: int = 64
) -> Tensor:
    """[rows, vocabulary] float32 log-probabilities of the first reply token, up to `size` prompts
    at a time. perturb: batch -> perturbation. What prompts begin with alike, such as a template's
    words, is computed once for `TOGETHER` of them.
    """
    groups = _groups(rows)
    packs = [_pack([rows[i].prompt for i in group]) for group in groups]
    order = []
    found = []
    for index, batch in batches(packs, max(1, size // len(groups[0])), network.device):
        hidden = network.label_rows(batch, perturb(batch) if perturb else None)
        logits = network.unembed(hidden[_last_labels(batch)])
        found.append(logits.float().log_softmax(-1))
        for group in index:
            order += groups[group]
    return torch.cat(found)[torch.tensor(order).argsort()]


def _groups(rows: TokenRows) -> list[list[int]]:
    """Which prompts are computed together: `TOGETHER` of similar length where enough of them is
    shared, else each alone.
    """
    prompts = [row.prompt for row in rows]
    shared = shared_start(min(prompts), max(prompts))  # of these two, and of all in between
    enough = shared >= SHARED * max(map(len, prompts))
    return list(of_similar_length([*map(len, prompts)], TOGETHER if enough else 1))


def _pack(prompts: Sequence[tuple[int, ...]]) -> TokenRow:
    """Prompts as continuations of what they share. Each ends in a label that stands for the
    reply's first token: its hidden row is the one that predicts it.
    """
    shared = shared_start(min(prompts), max(prompts))
    return TokenRow(prompts[0][:shared], tuple((*prompt[shared:], 0) for prompt in prompts))


def _last_labels(batch: Batch) -> Tensor:
    """[labels] bool: the last label of each completion."""
    completion = torch.stack((batch.label_rows, batch.label_segments))
    changes = (completion.diff(dim=1) != 0).any(0)
    return F.pad(changes, (0, 1), value=True)


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
) -> Direction:
    """The chosen direction among `means`: site -> [positions, d_model] differences of means, the
    last position last.

    harmful, harmless: validation prompts, without completions. tokens: what a refusal begins with.
    A score is computed for those candidates alone that it can still decide about. Raises ValueError
    when no candidate has a finite, non-zero direction.
    """
    scores = Scores(network, harmful, harmless, tokens)
    candidates = _candidates(means)
    early = [c for c in candidates if depth(c.site) < int((1 - LAST_SHARE) * network.n_layers)]
    early = early or candidates
    small = [scores.kl(candidate) <= MOST_KL for candidate in early]
    note, passed = "", [c for c in compress(early, small) if scores.induce(c) >= 0]
    if not passed:  # nor did those induce whose KL is small
        note = "no candidate passed all filters; chosen without the filter on kl"
        large = (not each for each in small)
        passed = [c for c in compress(early, large) if scores.induce(c) >= 0]
    if not passed:
        note += " and induce"
        passed = early
    return replace(min(passed, key=scores.bypass), note=note, found=not note)


def _candidates(means: Streams) -> list[Direction]:
    """Differences of means that are a direction, site by site. Raises ValueError without one."""
    norms = torch.cat([rows.norm(dim=-1) for rows in means.values()])
    least = NOTHING * norms[norms.isfinite()].max() if norms.isfinite().any() else 0.0
    candidates = []
    for site, rows in means.items():
        for position, vector in enumerate(rows, start=-len(rows)):
            if vector.isfinite().all() and vector.norm() > least:
                candidates.append(Direction(vector, site, position))
    if not candidates:
        raise ValueError(
            f"no difference of means at {list(means)} is finite and non-zero: nothing to choose"
            " from"
        )
    return candidates


class Scores:
    """What candidates do to a network; see `select` and the module's docstring."""

    def __init__(
        self, network: Network, harmful: TokenRows, harmless: TokenRows, tokens: Sequence[int]
    ) -> None:
        self.network, self.tokens = network, tokens
        self.harmful, self.harmless = harmful, harmless
        self.plain = last_log_probabilities(network, harmless)

    def kl(self, candidate: Direction) -> float:
        """nats. Of a candidate whose first prompts alone take the mean over `MOST_KL` a lower
        bound: the others are not asked.
        """
        ablated = self.network.ablated(candidate.vector)
        count, total = len(self.harmless), 0.0
        for start in range(0, count, TOGETHER):
            part = slice(start, start + TOGETHER)
            quiet = last_log_probabilities(ablated, self.harmless[part])
            total += F.kl_div(quiet, self.plain[part], log_target=True, reduction="sum").item()
            if total > MOST_KL * count:
                break
        return total / count

    def induce(self, candidate: Direction) -> float:
        """A mean refusal score."""
        added = adding(candidate.vector, candidate.site)
        loud = last_log_probabilities(self.network, self.harmless, added)
        return refusal_score(loud, self.tokens).mean().item()

    def bypass(self, candidate: Direction) -> float:
        """A mean refusal score."""
        ablated = self.network.ablated(candidate.vector)
        quiet = last_log_probabilities(ablated, self.harmful)
        return refusal_score(quiet, self.tokens).mean().item()
