"""Residual-stream activations where a chat model decides how to reply, of harmful prompts and of
harmless ones.

1. The positions are the last tokens of the prompt: one (Abbas et al. 2025), or all that the chat
   template puts behind the user's words (`post_instruction`, Arditi et al. 2024).
2. One pass takes every site; the blocks above the deepest one are not run. Values are kept in
   float64.
3. Prompts are paired **matched** (the same words, the verb turned on a foe) or at **random** (any
   harmless prompt of the same split, as with all real data); `differences` subtracts within pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latlib.batch import Batch, TokenRow
from latlib.config.profile import Profile
from latlib.data.prompts import Prompt, prompt_source
from latlib.evaluation.generate import batches
from latlib.hooks import EMBEDDING, Site
from latlib.io.files import aside
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.text.chat import Row, chat_text, tokenise


def sites_of(n_layers: int) -> tuple[Site, ...]:
    """Every site of a model, in order of depth."""
    return (EMBEDDING, *range(n_layers))


def prompt_ends(batch: Batch, count: int = 1) -> Tensor:
    """[batch, count] index into the flattened [batch * seq] of every row's last prompt tokens, in
    their order.

    The very last one is where the first token of the reply is decided. Raises ValueError for a
    shorter prompt.
    """
    prompt = batch.segments == 0
    shortest = int(prompt.sum(1).min())
    if shortest < count:
        raise ValueError(f"positions = {count}: the shortest prompt has {shortest} tokens")
    last = torch.where(prompt, batch.positions, -1).argmax(1)
    rows = batch.shape[1] * torch.arange(batch.shape[0], device=last.device)
    return (last + rows)[:, None] + torch.arange(1 - count, 1, device=last.device)


def post_instruction(tokenizer, system_prompt: str | None = None) -> int:
    """How many tokens the chat template puts behind the user's words; 1 where it puts none."""
    first, second = (
        tokenizer(chat_text(tokenizer, text, system_prompt), add_special_tokens=False)["input_ids"]
        for text in ("Yes", "7, no")
    )
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    return max(1, same)


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
        index = ((batch.segments == 0) & (batch.positions > 0)).flatten().nonzero().squeeze(1)
        for site, rows in network.capture(batch, sites, index).items():
            found[site].append(rows.float().norm(dim=-1))
    return {site: torch.cat(norms).median().item() for site, norms in found.items()}


def prompt_rows(
    lm: LanguageModel, prompts: Sequence[str], system_prompt: str | None = None
) -> list[TokenRow]:
    """Templated prompts without a completion."""
    rows = [Row(str(i), text, ()) for i, text in enumerate(prompts)]
    return tokenise(rows, lm.tokenizer, lm.context, system_prompt)


def activations(
    network: Network,
    rows: Sequence[TokenRow],
    sites: Sequence[Site],
    count: int = 1,
    size: int = 128,
) -> dict[Site, Tensor]:
    """site -> [rows, count, d_model] float64 residual stream at each row's last `count` prompt
    tokens, in the order of `rows`. size: rows of similar length that run together."""
    found: dict[Site, Tensor] = {}
    for index, batch in batches(rows, size, network.device):
        ends = prompt_ends(batch, count)
        for site, stream in network.capture(batch, sites, ends.flatten()).items():
            if site not in found:
                found[site] = torch.empty(len(rows), count, stream.shape[-1], dtype=torch.float64)
            found[site][index] = stream.view(*ends.shape, -1).double().cpu()
    return found


def differences(
    network: Network,
    harmful: Sequence[TokenRow],
    harmless: Sequence[TokenRow],
    sites: Sequence[Site],
    count: int = 1,
    size: int = 128,
) -> dict[Site, Tensor]:
    """site -> [pairs, count, d_model] float64, harmful minus harmless.

    Raises ValueError unless they pair up, two at least.
    """
    if len(harmful) != len(harmless) or len(harmful) < 2:
        raise ValueError(
            f"{len(harmful)} harmful and {len(harmless)} harmless prompts: need as many, and two or"
            " more"
        )
    both = activations(network, [*harmful, *harmless], sites, count, size)
    return {site: rows[: len(harmful)] - rows[len(harmful) :] for site, rows in both.items()}


def paired_prompts(profile: Profile, split: str, n: int) -> tuple[list[Prompt], list[Prompt]]:
    """n harmful prompts of a split (fewer where real data holds fewer) and a harmless one for each;
    see the module's docstring."""
    source = prompt_source(profile)
    harmful = source.ask("directions", split, "harmful", n)
    matched = profile.evaluation.pairing == "matched"
    return harmful, source.counterparts(harmful, "directions", split, matched)


def save_activations(found: Mapping[Site, Tensor], path: Path, **columns: Sequence[str]) -> None:
    """Write site -> [rows, ...] as a float32 safetensors file, aside first, with columns of text
    (the prompts' ids).

    Raises ValueError unless every column has one entry a row.
    """
    rows = {len(values) for values in found.values()}
    for name, column in columns.items():
        if rows != {len(column)}:
            raise ValueError(f"{name} has {len(column)} entries for {sorted(rows)} rows: one a row")
    tensors = {str(site): values.float().contiguous() for site, values in found.items()}
    about = {"sites": json.dumps(list(found)), "columns": json.dumps(columns)}
    with aside(path) as partial:
        save_file(tensors, partial, about)


def load_activations(path: Path) -> tuple[dict[Site, Tensor], dict[str, list[str]]]:
    """What `save_activations` wrote: (site -> rows in float64, the columns)."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        found = {site: file.get_tensor(str(site)).double() for site in json.loads(about["sites"])}
        return found, json.loads(about["columns"])
