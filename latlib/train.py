"""One training loop: ssft, at, lat and lat-untargeted are settings of it.

A step:
1. Take the step's harmful and benign rows (`data.Schedule`), in micro-batches of rows of similar length.
2. Attack **every** micro-batch with the weights frozen (`attack.pgd`), once `attack_after` steps of plain safety
   training are over; the radius grows over `eps_ramp` steps. A share of rows keeps delta = 0.
3. Defend: toward * CE(chosen | delta) + away * away(rejected | delta) + kl * KL(teacher || student) + sft * CE(benign),
   each a mean over the label tokens of the whole batch, so that micro-batches change nothing.
4. Clip, AdamW on the adapter, log exactly what was optimised.

Everything random is a function of (seed, step): a checkpoint is the adapter, the optimiser and the step, and a resumed
run ends bit for bit where an uninterrupted one does (on a CPU).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latlib.attack import Attack, judge, pgd, radii
from latlib.data import Batch, Schedule, TokenRow, collate, join
from latlib.forward import Network
from latlib.hooks import Site
from latlib.losses import Unembed, kl_divergence, normalised, token_losses
from latlib.models import LanguageModel
from latlib.profile import TrainSettings

Metrics = dict[str, float]
Deltas = Mapping[Site, Tensor]


class Teacher(NamedTuple):
    """All that KL needs of the frozen model: its output matrix, and its `label_rows` of a benign batch."""

    unembed: Unembed
    rows: Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. attacked: rows that carry delta; benign: rows with delta = 0."""

    attacked: Batch
    benign: Batch | None
    clean: Tensor  # [rows of attacked] bool: rows whose delta is put back to zero
    teacher: Teacher | None = None  # where the objective has a KL term


Look = Callable[[MicroBatch, Tensor], None]


def _ignore(part: MicroBatch, rows: Tensor) -> None:
    """Look away."""


class Trainer:
    """Trains the adapter of `lm` in place.

    harmful: rows with (rejected, chosen); benign: rows with (response,). norms: site -> median residual norm, for a
    relative eps. Raises ValueError for empty or one-sided data.
    """

    def __init__(
        self,
        lm: LanguageModel,
        harmful: Sequence[TokenRow],
        benign: Sequence[TokenRow],
        settings: TrainSettings,
        seed: int,
        norms: Mapping[Site, float] | None = None,
    ) -> None:
        if not harmful or not benign:
            raise ValueError(f"{len(harmful)} harmful and {len(benign)} benign rows: training needs both")
        if any(len(row.completions) != 2 for row in harmful) or any(len(row.completions) != 1 for row in benign):
            raise ValueError("a harmful row needs (rejected, chosen) and a benign row (response,)")
        self.lm, self.settings, self.seed = lm, settings, seed
        self.harmful, self.benign = list(harmful), list(benign)
        self.parameters = [p for n, p in lm.model.named_parameters() if "lora_" in n]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.schedules = (
            Schedule(len(self.harmful), settings.batch, 2 * seed),
            Schedule(len(self.benign), settings.benign_batch, 2 * seed + 1),
        )
        self.eps = radii(settings.attack, lm.n_layers, norms) if settings.attack.steps else {}
        self.step = 0

    def run(self, on_step: Callable[[int, Metrics], None] = lambda step, metrics: None) -> None:
        """Train up to `settings.steps`; `on_step(step, metrics)` after each, `step` counted from 1."""
        while self.step < self.settings.steps:
            began = time.perf_counter()
            metrics = self.train_step()
            on_step(self.step, {**metrics, "seconds": time.perf_counter() - began})

    def train_step(self) -> Metrics:
        """One step; returns the means over its updates of everything that was optimised, and of the attack."""
        settings, generator = self.settings, torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        attacked = self._attacks()
        parts = self._taught(self._micro_batches(attacked, generator))
        deltas: list[Deltas | None] = [None] * len(parts)
        network = self.lm.network(train=True)
        judged: dict[str, list[Tensor]] = {"attack_start": [], "attack_end": [], "attack_won": []}
        if attacked:
            found = [self._attack(network.frozen(), part, generator) for part in parts]
            deltas = [_without(a.deltas, part.clean) for a, part in zip(found, parts, strict=True)]
            judged["attack_start"] = [a.losses[0][~part.clean] for a, part in zip(found, parts, strict=True)]

        def look(part: MicroBatch, rows: Tensor) -> None:
            end, won = judge(network, part.attacked, settings.attack, rows.detach())
            judged["attack_end"].append(end[~part.clean])
            judged["attack_won"].append(won[~part.clean].float())

        rate, scale = self._rate(), self._eps_scale() if attacked else 0.0
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        updates = [self._update(network, parts, deltas, look if attacked else _ignore)]
        while len(updates) < settings.iterations:
            updates.append(self._update(self.lm.network(train=True), parts, deltas))
        self.step += 1
        means = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        ends = {name: torch.cat(values).mean().item() for name, values in judged.items() if any(map(len, values))}
        return {**means, **ends, "eps_scale": scale, "lr": rate}

    def _update(self, network: Network, parts: Sequence[MicroBatch], deltas, look: Look = _ignore) -> Metrics:
        """Forward, backward over all micro-batches, one optimiser step."""
        tokens, sums = _label_tokens(parts), {}
        self.optimiser.zero_grad()
        for part, delta in zip(parts, deltas, strict=True):
            for terms in self.defence_terms(network, part, delta, tokens, look):
                torch.stack(list(terms.values())).sum().backward()
                network.settle()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + term.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        metrics = {"total": sum(sums.values()), **sums, "grad_norm": norm.item()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(f"step {self.step + 1}: {metrics}: not finite; lower train.lr or attack.eps")
        return metrics

    def defence_terms(
        self,
        network: Network,
        part: MicroBatch,
        deltas: Deltas | None,
        tokens: Mapping[str, int],
        look: Look = _ignore,
    ) -> Iterator[dict[str, Tensor]]:
        """Weighted terms of the objective, scalars that sum to it: one dictionary for each forward, whose backward pass
        belongs before the next is asked for, so that one graph exists at a time.

        tokens: the whole batch's label counts. look: is shown the harmful `label_rows` under the perturbation.
        """
        c, harmful = self.settings.defence, part.attacked
        benign = part.benign if c.kl or c.sft else None
        if benign is not None and self.settings.shared_forward:
            both = join(harmful, benign)
            rows = network.label_rows(both, {site: _grown(delta, both) for site, delta in (deltas or {}).items()})
            n = len(harmful.labels)
            look(part, rows[:n])
            terms = self._harmful_terms(network, rows[:n], harmful, tokens)
            yield terms | self._benign_terms(network, rows[n:], part, tokens)
            return
        rows = network.label_rows(harmful, deltas)
        look(part, rows)
        yield self._harmful_terms(network, rows, harmful, tokens)
        if benign is not None:
            yield self._benign_terms(network, network.label_rows(benign), part, tokens)

    def _harmful_terms(self, network: Network, rows: Tensor, batch: Batch, tokens: Mapping[str, int]):
        c, packed = self.settings.defence, batch.packed
        wanted = batch.label_index(2 if packed else 1)  # a row with one completion has only the wanted one
        losses = token_losses(network.unembed, rows, batch.labels, (batch.label_segments == 1) if packed else None)
        terms = {"toward": c.toward * losses[wanted].sum() / tokens["toward"]}
        if c.away and packed:
            terms["away"] = c.away * losses[batch.label_index(1)].sum() / tokens["away"]
        return terms

    def _benign_terms(self, network: Network, rows: Tensor, part: MicroBatch, tokens: Mapping[str, int]):
        c, terms = self.settings.defence, {}
        if c.kl:
            kl = kl_divergence(network.unembed, rows, *part.teacher, c.kl_mode)
            total = kl.sum() if c.kl_mode == "token" else normalised(kl.mean()) * len(kl)
            terms["kl"] = c.kl * total / tokens["benign"]
        if c.sft:
            terms["sft"] = c.sft * token_losses(network.unembed, rows, part.benign.labels).sum() / tokens["benign"]
        return terms

    def _taught(self, parts: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with what the frozen model says to them; it is gone before the student runs."""
        if not self.settings.defence.kl:
            return parts
        network = self.lm.network(adapter=False)
        unembed = network.unembedding()
        with torch.no_grad():
            rows = [None if p.benign is None else network.label_rows(p.benign) for p in parts]
        return [p if r is None else replace(p, teacher=Teacher(unembed, r)) for p, r in zip(parts, rows, strict=True)]

    def _attack(self, network: Network, part: MicroBatch, generator: torch.Generator) -> Attack:
        eps = {site: radius * self._eps_scale() for site, radius in self.eps.items()}
        return pgd(network, part.attacked, eps, self.settings.attack, generator, judged=False)

    def _attacks(self) -> bool:
        return bool(self.settings.attack.steps) and self.step >= self.settings.attack_after

    def _eps_scale(self) -> float:
        ramp = self.settings.eps_ramp
        return min(1.0, (self.step - self.settings.attack_after + 1) / ramp) if ramp else 1.0

    def _rate(self) -> float:
        s = self.settings
        warm = min(1.0, (self.step + 1) / s.lr_warmup) if s.lr_warmup else 1.0
        decay = s.steps * s.lr_decay_share
        return s.lr * warm * (min(1.0, (s.steps - self.step) / decay) if decay else 1.0)

    def _micro_batches(self, attacked: bool, generator: torch.Generator) -> list[MicroBatch]:
        s = self.settings
        harmful = [self.harmful[i] for i in self.schedules[0].rows(self.step)]
        benign = [self.benign[i] for i in self.schedules[1].rows(self.step)]
        if attacked and not s.attack.targeted:
            harmful = _wanted_only(harmful) + benign
        elif not attacked and (s.attack.steps or not s.defence.away):  # the rejected completion plays no part
            harmful = _wanted_only(harmful)
        harmful, benign = (sorted(rows, key=lambda r: r.length) for rows in (harmful, benign))
        # with fewer harmful rows than that, the benign ones share their micro-batches: no row is left out
        count = min(-(-max(len(harmful), len(benign)) // s.micro_batch), len(harmful))
        parts = []
        for rows, calm in zip(_split(harmful, count), _split(benign, count), strict=True):
            batch = collate(rows, pad_to=s.pad_to, device=self.lm.device)
            clean = torch.rand(len(rows), generator=generator) < s.clean_share
            calm_batch = collate(calm, pad_to=s.pad_to, device=self.lm.device) if calm else None
            parts.append(MicroBatch(batch, calm_batch, clean.to(self.lm.device)))
        return parts

    def state(self) -> dict:
        """All that a resumed run needs: the step, the adapter and the optimiser."""
        return {
            "step": self.step,
            "adapter": [p.detach().cpu() for p in self.parameters],
            "optimiser": self.optimiser.state_dict(),
        }

    def restore(self, state: dict) -> None:
        """Continue from a `state()`."""
        self.step = state["step"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["adapter"], strict=True):
                parameter.copy_(value)
        self.optimiser.load_state_dict(state["optimiser"])


def _split(rows: list, count: int) -> list[list]:
    """`count` runs of nearly equal length."""
    bounds = [round(i * len(rows) / count) for i in range(count + 1)]
    return [rows[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def _wanted_only(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Preference rows without their rejected completion."""
    return [TokenRow(row.prompt, row.completions[1:]) for row in rows]


def _label_tokens(micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Label tokens of the whole batch, by which every sum is divided."""
    packed = any(part.attacked.packed for part in micro_batches)
    count = {name: sum(len(p.attacked.label_index(s)) for p in micro_batches) for name, s in (("a", 1), ("b", 2))}
    return {
        "toward": count["b"] if packed else count["a"],
        "away": count["a"] if packed else 0,
        "benign": sum(len(p.benign.labels) for p in micro_batches if p.benign is not None),
    }


def _grown(delta: Tensor, batch: Batch) -> Tensor:
    """A perturbation of the first rows of a joined batch, zero on all others."""
    n, seq, _ = delta.shape
    return F.pad(delta, (0, 0, 0, batch.shape[1] - seq, 0, batch.shape[0] - n))


def _without(deltas: Deltas, clean: Tensor) -> dict[Site, Tensor]:
    """The perturbations with those of `clean` rows ([batch] bool) put back to zero."""
    return {site: delta.masked_fill(clean[:, None, None], 0.0) for site, delta in deltas.items()}
