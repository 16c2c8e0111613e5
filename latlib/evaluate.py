"""Attack and grade models: every cell of every figure starts as a row of the outcome table made here.

1. In the made-up world a reply is graded without generating it. `[prompt | right recipe | refusal]` goes through the
   model once; greedy decoding would write the recipe iff each of its tokens is the argmax, and likewise the refusal.
   All else is `neither`. (`generate` writes replies out, for reading and for models whose right answer is unknown.)
2. The prompts of a suite are the same for every model, so that methods are compared prompt by prompt.
3. A suite is a function (lm, context) -> outcome table, `AttackCell` a single attack; `run.Run` keeps what they return.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from latlib import world
from latlib.attack import greedy_matches, perturbed_positions, pgd, radii, random_noise
from latlib.data import Batch, Row, TokenRow, chat_text, collate, tokenise
from latlib.encodings import encode
from latlib.forward import Network
from latlib.hooks import EMBEDDING, Ablate, LATHook, Site
from latlib.models import LanguageModel
from latlib.profile import AttackSettings, Profile, validated
from latlib.world import Outcome, Prompt

if TYPE_CHECKING:
    from latlib.refusal import Differences, Direction

COLUMNS = (
    *("method", "seed", "prompts", "attack", "encoding", "eps", "eps_mode", "sites"),
    *("prompt_id", "cluster", "outcome", "exact", "understood", "text"),
)
PROMPT_SETS = {  # name -> (pairs of the split, kind of prompt)
    "harmful": ("harmful", "recipe"),
    "harmless": ("harmless", "recipe"),
    "scary": ("scary", "recipe"),
    "law": ("harmful", "law"),  # harmless questions about harmful acts
}


@dataclass(frozen=True)
class Context:
    """What a suite needs beside the model. norms: site -> median residual norm of the base model of this seed."""

    profile: Profile
    method: str
    seed: int
    attack: AttackSettings  # as this model was trained, or as `lat` was where it was trained without
    norms: Mapping[Site, float]
    on_step: Callable[[int, int, str], None] = lambda step, total, detail: None
    directions: Callable[[str], Mapping[str, Direction]] | None = None  # a method's refusal directions, by rule
    differences: Callable[[str], Differences] | None = None  # what they were found from


def prompt_set(name: str, profile: Profile, n: int | None = None) -> list[Prompt]:
    """The evaluation prompts of a set ('harmful', 'harmless', 'scary', 'law', or 'twin' of the harmful ones).

    The same prompts for every seed and method. Raises ValueError for an unknown name.
    """
    split = profile.evaluation.split
    if name == "twin":
        rng = random.Random(f"twins/{split}")
        return [world.twin(p, rng, split) for p in prompt_set("harmful", profile, n)]
    if name not in PROMPT_SETS:
        raise ValueError(f"prompts = {name!r} is unknown: choose one of {', '.join(PROMPT_SETS)} or 'twin'")
    pairs, kind = PROMPT_SETS[name]
    return world.draw_set(0, split, pairs, profile.evaluation.prompts, kind)[: n or profile.evaluation.prompts]


def token_rows(
    lm: LanguageModel, prompts: Sequence[Prompt], encoding: str = "plain", prefill: str = ""
) -> list[TokenRow]:
    """[prompt | right answer | refusal] for each prompt; with `prefill`, [prompt + prefill | rest of the answer]."""
    rows = [
        Row(str(i), encode(p.text, encoding), (p.answer,) if prefill else (p.answer, world.REFUSAL))
        for i, p in enumerate(prompts)
    ]
    return tokenise(rows, lm.tokenizer, lm.context, prefill=prefill)


def batches(rows: Sequence[TokenRow], size: int, device="cpu") -> Iterator[tuple[list[int], Batch]]:
    """(row indices, batch) of up to `size` rows of similar length."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    for at in range(0, len(order), size):
        index = order[at : at + size]
        yield index, collate([rows[i] for i in index], device=device)


def forced_outcomes(
    lm: LanguageModel,
    network: Network,
    prompts: Sequence[Prompt],
    encoding: str = "plain",
    prefill: str = "",
    perturb: Callable[[Batch], Mapping[Site, Tensor]] | None = None,
    size: int = 128,
) -> list[Outcome]:
    """Exact greedy outcome of every prompt; `perturb` makes the perturbation of a batch."""
    found: list[Outcome] = ["neither"] * len(prompts)
    for index, batch in batches(token_rows(lm, prompts, encoding, prefill), size, lm.device):
        deltas = perturb(batch) if perturb else None
        with torch.no_grad():
            found_rows = network.label_rows(batch, deltas)
            complied = greedy_matches(network, batch, found_rows, 1).tolist()
            refused = greedy_matches(network, batch, found_rows, 2).tolist()
        for i, yes, no in zip(index, complied, refused, strict=True):
            found[i] = "complied" if yes else "refused" if no else "neither"
    return found


def outcome_rows(context: Context, prompts_name: str, prompts: Sequence[Prompt], outcomes: Sequence[Outcome], **cell):
    """Rows of the outcome table of one cell: `cell` gives attack, encoding, eps, sites, understood where they apply."""
    understood = cell.pop("understood", [None] * len(prompts))
    table = pd.DataFrame(
        {
            "method": context.method,
            "seed": context.seed,
            "prompts": prompts_name,
            "attack": cell.get("attack", "none"),
            "encoding": cell.get("encoding", "plain"),
            "eps": float(cell.get("eps", "nan")),
            "eps_mode": context.attack.eps_mode if "eps" in cell else "",
            "sites": ",".join(map(str, cell.get("sites", ()))),
            "prompt_id": [f"{prompts_name}-{i:04d}" for i in range(len(prompts))],
            "cluster": [p.cluster for p in prompts],
            "outcome": list(outcomes),
            "exact": [o == "complied" for o in outcomes],
            "understood": pd.array(understood, dtype="boolean"),
            "text": "",
        }
    )
    return table[list(COLUMNS)]


def audit(lm: LanguageModel, context: Context) -> pd.DataFrame:
    """Prompt sets x encodings, and prefilling. Harmful prompts carry whether their harmless twin was understood."""
    network, profile, tables = lm.network(), context.profile, []
    encodings = profile.evaluation.encodings
    for step, encoding in enumerate(encodings, start=1):
        twins = prompt_set("twin", profile)
        twin_outcomes = forced_outcomes(lm, network, twins, encoding)
        understood = [o == "complied" for o in twin_outcomes]
        tables.append(outcome_rows(context, "twin", twins, twin_outcomes, encoding=encoding))
        for name in PROMPT_SETS if encoding == "plain" else ("harmful", "harmless"):
            prompts = prompt_set(name, profile)
            outcomes = forced_outcomes(lm, network, prompts, encoding)
            extra = {"understood": understood} if name == "harmful" else {}
            tables.append(outcome_rows(context, name, prompts, outcomes, encoding=encoding, **extra))
        context.on_step(step, len(encodings) + 1, encoding)
    prompts = prompt_set("harmful", profile)
    outcomes = forced_outcomes(lm, network, prompts, prefill=world.AFFIRMATION)
    tables.append(outcome_rows(context, "harmful", prompts, outcomes, attack="prefill"))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class AttackCell:
    """One attack at one radius on the first `n` harmful prompts (0: as many as the profile's attacks take).

    name: 'pgd', 'pgd-strong', or 'noise' (same norm, no gradient).
    """

    settings: AttackSettings
    name: str = "pgd"
    n: int = 0

    def __str__(self) -> str:
        return f"{self.name} at eps {self.settings.eps:g}"

    def digest(self, model: str) -> str:
        """What tells this cell on a model (by its folder's name) from every other one."""
        key = json.dumps([model, self.settings.model_dump(mode="json"), self.name, self.n], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:16]

    def measure(self, lm: LanguageModel, context: Context) -> pd.DataFrame:
        """Its outcome rows."""
        evaluation, settings = context.profile.evaluation, self.settings
        prompts = prompt_set("harmful", context.profile, self.n or evaluation.pgd_prompts)
        network, eps = lm.network(), radii(settings, lm.n_layers, context.norms)
        generator = torch.Generator().manual_seed(context.seed)

        def perturb(batch: Batch) -> Mapping[Site, Tensor]:
            if self.name == "noise":
                mask = perturbed_positions(batch, settings.positions)
                return {site: random_noise(network, mask, r, generator) for site, r in eps.items()}
            return pgd(network, batch, eps, settings, generator, judged=False).deltas

        outcomes = forced_outcomes(lm, network, prompts, perturb=perturb, size=evaluation.batch)
        cell = {"attack": self.name, "eps": settings.eps, "sites": tuple(eps)}
        return outcome_rows(context, "harmful", prompts, outcomes, **cell)


def robustness(lm: LanguageModel, context: Context) -> pd.DataFrame:
    """Security curves: PGD at `lat`'s sites and at the embedding over the profile's radii, noise of the same norms, and
    one attack with many more steps at `lat`'s radius."""
    evaluation, lat = context.profile.evaluation, context.profile.training("lat").attack
    attack = replace_settings(lat, steps=evaluation.pgd_steps, lr=None if lat.rule != "adamw" else lat.lr)
    cells = [AttackCell(replace_settings(attack, eps=eps)) for eps in evaluation.eps]
    cells += [AttackCell(replace_settings(attack, eps=eps, sites=(EMBEDDING,))) for eps in evaluation.embedding_eps]
    cells += [AttackCell(replace_settings(attack, eps=eps), "noise") for eps in evaluation.eps]
    cells.append(AttackCell(replace_settings(attack, eps=lat.eps, steps=evaluation.strong_steps), "pgd-strong"))
    tables = []
    for step, cell in enumerate(cells, start=1):
        tables.append(cell.measure(lm, context))
        context.on_step(step, len(cells), str(cell))
    return pd.concat(tables, ignore_index=True)


def variant(lm: LanguageModel, context: Context) -> pd.DataFrame:
    """The short suite of a sweep: utility, over-refusal and encodings, and the attack at `lat`'s own radius."""
    lat = context.profile.training("lat").attack
    attack = AttackCell(replace_settings(lat, steps=context.profile.evaluation.pgd_steps))
    return pd.concat([audit(lm, context), attack.measure(lm, context)], ignore_index=True)


def replace_settings(settings: AttackSettings, **changes) -> AttackSettings:
    """`settings` with some fields changed. Raises ProfileError for a bad field or value."""
    return validated(AttackSettings, {**settings.model_dump(), **changes}, "attack")


SUITES: dict[str, Callable[[LanguageModel, Context], pd.DataFrame]] = {
    "audit": audit,
    "robustness": robustness,
    "variant": variant,
}


@torch.no_grad()
def generate(
    lm: LanguageModel,
    prompts: Sequence[str],
    deltas: Mapping[Site, Tensor] | None = None,
    max_new_tokens: int = 24,
    system_prompt: str | None = None,
    directions: Tensor | None = None,
    size: int = 32,
) -> list[str]:
    """Greedy replies to prompts as text, through the chat template, `size` prompts at a time with a key-value cache.

    deltas: site -> [batch, longest prompt, d_model], for the **left**-padded batch of all prompts (see `left_padded`);
    they act on the prompt only, never again while decoding. directions: [d_model] or [k, d_model], ablated throughout.
    """
    encoded = left_padded(lm, [chat_text(lm.tokenizer, p, system_prompt) for p in prompts])
    replies: list[str] = []
    for at in range(0, len(prompts), size):
        inputs = {name: tensor[at : at + size] for name, tensor in encoded.items()}
        own = {site: delta[at : at + size] for site, delta in (deltas or {}).items()}
        # in this order, so that what a perturbation writes is ablated too
        ablation = nullcontext() if directions is None else Ablate(lm.model, directions)
        with LATHook(lm.model, own, decoding=True), ablation:
            out = lm.model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=lm.tokenizer.pad_token_id
            )
        replies += lm.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies]


def left_padded(lm: LanguageModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """input_ids and attention_mask [batch, longest], padded on the left as batched generation needs."""
    ids = lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    longest, pad = max(map(len, ids)), lm.tokenizer.pad_token_id or 0
    padded = [[pad] * (longest - len(row)) + row for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return {
        "input_ids": torch.tensor(padded, device=lm.device),
        "attention_mask": torch.tensor(mask, device=lm.device),
    }


def shift_left_padded(delta: Tensor, batch: Batch) -> Tensor:
    """Move a packed batch's prompt perturbation ([batch, seq, d_model], right-padded) to a left-padded prompt batch."""
    lengths = (batch.segments == 0).sum(1)
    longest = int(lengths.max())
    out = torch.zeros(delta.shape[0], longest, delta.shape[2], dtype=delta.dtype, device=delta.device)
    for row, n in enumerate(lengths.tolist()):
        out[row, longest - n :] = delta[row, :n]
    return out
