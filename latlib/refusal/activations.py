"""Residual-stream activations where a chat model decides how to reply, of harmful prompts and of
harmless ones.

1. The positions are the last tokens of the prompt: one (Abbas et al. 2025), or all that the chat
   template puts behind the user's words (`post_instruction`, Arditi et al. 2024).
2. One pass takes every site; the blocks above the deepest one are not run. Values are kept in
   float64.
3. Prompts are paired **matched** (the same words, the verb turned on a foe) or at **random** (any
   harmless prompt of the same split, as with all real data); `activation_differences` subtracts
   within pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latlib.batch import Batch, TokenRow
from latlib.config.profile import Profile
from latlib.data.prompts import Prompt, Prompts, prompt_source
from latlib.data.splits import Split
from latlib.evaluation.generate import TokenRows, batches
from latlib.evaluation.outcomes import HARMFUL
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.refusal.geometry import Streams
from latlib.text.chat import Row, chat_text, shared_end, token_ids, tokenise
from latlib.threat import EMBEDDING, Site


def sites_of(n_layers: int) -> tuple[Site, ...]:
    """Every site of a model, in order of depth."""
    return (EMBEDDING, *range(n_layers))


def prompt_ends(batch: Batch, count: int = 1) -> Tensor:
    """[batch, count] index into the flattened [batch * seq] of every row's last prompt tokens, in
    their order.

    The very last one is where the first token of the reply is decided. Raises ValueError for a
    shorter prompt.
    """
    n, seq = batch.shape
    lengths = (batch.segments == 0).sum(1)  # the prompt comes first in its row
    shortest = int(lengths.min())
    if shortest < count:
        raise ValueError(f"positions = {count}: the shortest prompt has {shortest} tokens")
    device = lengths.device
    ends = seq * torch.arange(n, device=device) + lengths
    return ends[:, None] + torch.arange(-count, 0, device=device)


def post_instruction(tokenizer: Any, system_prompt: str | None = None) -> int:
    """How many tokens the chat template puts behind the user's words; 1 where it puts none."""
    chats = [chat_text(tokenizer, text, system_prompt) for text in ("Yes", "7, no")]
    return max(1, shared_end(*token_ids(tokenizer, chats)))


def residual_norms(
    network: Network, batches: Sequence[Batch], sites: Sequence[Site]
) -> dict[Site, float]:
    """site -> median L2 norm of the residual stream over all prompt positions but the first of each
    row.

    The first position is left out: it is an attention sink in many models, with a norm unlike all
    others.
    """
    found: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for batch in batches:
        later = (batch.segments == 0) & (batch.positions > 0)
        index = later.flatten().nonzero().squeeze(1)
        streams = network.capture(batch, sites, index)
        for site, rows in streams.items():
            found[site].append(rows.float().norm(dim=-1))
    return {site: torch.cat(norms).median().item() for site, norms in found.items()}


def prompt_rows(
    lm: LanguageModel, prompts: Prompts, system_prompt: str | None = None
) -> list[TokenRow]:
    """Templated prompts without a completion."""
    rows = [Row(str(i), prompt.text, ()) for i, prompt in enumerate(prompts)]
    return tokenise(rows, lm.tokenizer, lm.context, system_prompt)


def activations(
    network: Network,
    rows: TokenRows,
    sites: Sequence[Site],
    count: int = 1,
    size: int = 128,
) -> Streams:
    """site -> [rows, count, d_model] float64 residual stream at each row's last `count` prompt
    tokens, in the order of `rows`. size: rows of similar length that run together."""
    shape = (len(rows), count, network.d_model)
    found: Streams = {site: torch.empty(shape, dtype=torch.float64) for site in sites}
    for index, batch in batches(rows, size, network.device):
        ends = prompt_ends(batch, count)
        for site, stream in network.capture(batch, sites, ends.flatten()).items():
            found[site][index] = stream.view(*ends.shape, -1).double().cpu()
    return found


def activation_differences(
    network: Network,
    harmful: TokenRows,
    harmless: TokenRows,
    sites: Sequence[Site],
    count: int = 1,
    size: int = 128,
) -> Streams:
    """site -> [pairs, count, d_model] float64, harmful minus harmless.

    Raises ValueError unless they pair up, two at least.
    """
    n = len(harmful)
    if n != len(harmless) or n < 2:
        raise ValueError(
            f"{n} harmful and {len(harmless)} harmless prompts: need as many, and two or more"
        )
    both = activations(network, [*harmful, *harmless], sites, count, size)
    return {site: rows[:n] - rows[n:] for site, rows in both.items()}


def paired_prompts(profile: Profile, split: Split, n: int) -> tuple[list[Prompt], list[Prompt]]:
    """n harmful prompts of a split (fewer where real data holds fewer) and a harmless one for each;
    see the module's docstring."""
    source = prompt_source(profile)
    harmful = source.ask("directions", split, HARMFUL, n)
    matched = profile.evaluation.pairing == "matched"
    return harmful, source.counterparts(harmful, "directions", split, matched)


def paired_activations(
    lm: LanguageModel, profile: Profile, sites: Sequence[Site], n: int
) -> tuple[Streams, Streams]:
    """site -> [pairs, d_model] float64 at the last token, of n harmful training prompts and of the
    harmless one that belongs to each."""
    network = lm.network()
    size = profile.evaluation.batch
    found = []
    for side in paired_prompts(profile, "train", n):
        rows = prompt_rows(lm, side, profile.data.system_prompt)
        streams = activations(network, rows, sites, size=size)
        found.append({site: stream[:, -1] for site, stream in streams.items()})
    harmful, harmless = found
    return harmful, harmless
