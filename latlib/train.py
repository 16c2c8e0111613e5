"""One training loop: ssft, at, lat and lat-untargeted are settings of it.

A step:
1. Take the step's harmful and benign rows (`data.Schedule`), in micro-batches of rows of similar
   length.
2. Attack **every** micro-batch with the weights frozen (`attack.pgd`), once `attack_after` steps of
   plain safety training are over; the radius grows over `eps_ramp` steps. A share of rows keeps
   delta = 0.
3. Defend: toward * CE(chosen | delta) + away * away(rejected | delta) + kl * KL(teacher || student)
   + sft * CE(benign), each a mean over the label tokens of the whole batch, so that micro-batches
   change nothing.
4. Clip, AdamW on the adapter, log exactly what was optimised.

Everything random is a function of (seed, step): a checkpoint is the adapter, the optimiser and the
step, and a resumed run ends bit for bit where an uninterrupted one does (on a CPU).

Several processes (`latlib.distributed.ranks`) share the micro-batches of the same batch, and end
where one process does, up to rounding: label tokens are counted over the whole batch, and what is
logged is of all processes.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latlib.attack import Attack, judge, pgd, radii
from latlib.batch import Batch, Schedule, TokenRow, collate, join
from latlib.config.profile import TrainSettings as TrainOptions
from latlib.errors import SettingError
from latlib.hooks import Site
from latlib.losses import kl_divergence, normalised, token_losses
from latlib.micro_batches import Deltas, MicroBatch, Teacher, grown, split, wanted_only, without
from latlib.network_protocol import Model, Network
from latlib.processes import full, sharded

Metrics = dict[str, float]
TERMS = ("toward", "away", "kl", "sft")


Look = Callable[[MicroBatch, Tensor], None]


def _ignore(part: MicroBatch, rows: Tensor) -> None:
    """Look away."""


class Trainer:
    """Trains the adapter of `lm` in place.

    harmful: rows with (rejected, chosen); benign: rows with (response,). norms: site -> median
    residual norm, for a relative eps. Where several processes train it, `lm` comes from
    `processes.wrap`. Raises ValueError for empty or one-sided data, SettingError for batches that
    cannot be shared between the processes.
    """

    def __init__(
        self,
        lm: Model,
        harmful: Sequence[TokenRow],
        benign: Sequence[TokenRow],
        settings: TrainOptions,
        seed: int,
        norms: Mapping[Site, float] | None = None,
    ) -> None:
        if not harmful or not benign:
            raise ValueError(
                f"{len(harmful)} harmful and {len(benign)} benign rows: training needs both"
            )
        if any(len(row.completions) != 2 for row in harmful) or any(
            len(row.completions) != 1 for row in benign
        ):
            raise ValueError("a harmful row needs (rejected, chosen) and a benign row (response,)")
        self.lm, self.settings, self.seed, self.processes = (
            lm,
            settings,
            seed,
            lm.processes,
        )
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
        self.step, self.data = 0, _digest((*self.harmful, *self.benign))
        for attacked in {False, bool(settings.attack.steps)}:
            extra = settings.benign_batch if attacked and not settings.attack.targeted else 0
            self._count(settings.batch + extra, settings.benign_batch)

    def run(self, on_step: Callable[[int, Metrics], None] = lambda step, metrics: None) -> None:
        """Train up to `settings.steps`; `on_step(step, metrics)` after each, `step` counted
        from 1.
        """
        while self.step < self.settings.steps:
            began = time.perf_counter()
            metrics = self.train_step()
            on_step(self.step, {**metrics, "seconds": time.perf_counter() - began})

    def train_step(self) -> Metrics:
        """One step; returns the means over its updates of everything that was optimised, and of the
        attack.
        """
        settings, generator = (
            self.settings,
            torch.Generator().manual_seed(self.seed * 1_000_003 + self.step),
        )
        attacked = self._attacks()
        batch = self._micro_batches(attacked, generator)
        tokens, parts = _label_tokens(batch), self._taught(self.processes.own(batch))
        deltas: list[Deltas | None] = [None] * len(parts)
        network = self.lm.network(train=True)
        judged: dict[str, list[Tensor]] = {"attack_start": [], "attack_end": [], "attack_won": []}
        if attacked:
            found = [self._attack(network.frozen(), part) for part in parts]
            deltas = [without(a.deltas, part.clean) for a, part in zip(found, parts, strict=True)]
            judged["attack_start"] = [
                a.losses[0][~part.clean] for a, part in zip(found, parts, strict=True)
            ]

        def look(part: MicroBatch, rows: Tensor) -> None:
            end, won = judge(network, part.attacked, settings.attack, rows.detach())
            judged["attack_end"].append(end[~part.clean])
            judged["attack_won"].append(won[~part.clean].float())

        rate, scale = self._rate(), self._eps_scale() if attacked else 0.0
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        updates = [self._update(network, parts, deltas, tokens, look if attacked else _ignore)]
        while len(updates) < settings.iterations:
            updates.append(self._update(self.lm.network(train=True), parts, deltas, tokens))
        self.step += 1
        means = {name: sum(u[name] for u in updates) / len(updates) for name in updates[0]}
        ends = (
            {name: self.processes.mean(values) for name, values in judged.items()}
            if attacked
            else {}
        )
        ends = {name: end for name, end in ends.items() if end is not None}
        return {**means, **ends, "eps_scale": scale, "lr": rate}

    def _update(
        self, network: Network, parts: Sequence[MicroBatch], deltas, tokens, look: Look = _ignore
    ) -> Metrics:
        """Forward, backward over all micro-batches, one optimiser step. tokens: the whole batch's
        label counts.
        """
        sums, left = {}, sum(self._forwards(part) for part in parts)
        self.optimiser.zero_grad()
        for part, delta in zip(parts, deltas, strict=True):
            self.processes.exchange(left == 1)
            for terms in self.defence_terms(network, part, delta, tokens, look):
                (self.processes.world * torch.stack(list(terms.values())).sum()).backward()
                network.settle()
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + term.item()
                left -= 1
                self.processes.exchange(left == 1)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        sums = self.processes.total(sums, TERMS)
        metrics = {"total": sum(sums.values()), **sums, "grad_norm": full(norm).item()}
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(
                f"step {self.step + 1}: {metrics}: not finite; lower train.lr or attack.eps"
            )
        return metrics

    def defence_terms(
        self,
        network: Network,
        part: MicroBatch,
        deltas: Deltas | None,
        tokens: Mapping[str, int],
        look: Look = _ignore,
    ) -> Iterator[dict[str, Tensor]]:
        """Weighted terms of the objective, scalars that sum to it: one dictionary for each forward,
        whose backward pass belongs before the next is asked for, so that one graph exists at a
        time.

        tokens: the whole batch's label counts. look: is shown the harmful `label_rows` under the
        perturbation.
        """
        harmful, benign = part.attacked, part.benign if self._uses_benign() else None
        if benign is not None and self.settings.shared_forward:
            both = join(harmful, benign)
            rows = network.label_rows(
                both, {site: grown(delta, both) for site, delta in (deltas or {}).items()}
            )
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

    def _uses_benign(self) -> bool:
        return bool(self.settings.defence.kl or self.settings.defence.sft)

    def _forwards(self, part: MicroBatch) -> int:
        """How many forwards `defence_terms` makes of a micro-batch."""
        return (
            2
            if self._uses_benign() and part.benign is not None and not self.settings.shared_forward
            else 1
        )

    def _harmful_terms(
        self, network: Network, rows: Tensor, batch: Batch, tokens: Mapping[str, int]
    ):
        c, packed = self.settings.defence, batch.packed
        # a row with one completion has only the wanted one
        wanted = batch.label_index(2 if packed else 1)
        losses = token_losses(
            network.unembed, rows, batch.labels, (batch.label_segments == 1) if packed else None
        )
        terms = {"toward": c.toward * losses[wanted].sum() / tokens["toward"]}
        if c.away and packed:
            terms["away"] = c.away * losses[batch.label_index(1)].sum() / tokens["away"]
        return terms

    def _benign_terms(
        self, network: Network, rows: Tensor, part: MicroBatch, tokens: Mapping[str, int]
    ):
        c, terms = self.settings.defence, {}
        if c.kl:
            kl = kl_divergence(network.unembed, rows, *part.teacher, c.kl_mode)
            total = kl.sum() if c.kl_mode == "token" else normalised(kl.mean()) * len(kl)
            terms["kl"] = c.kl * total / tokens["benign"]
        if c.sft:
            terms["sft"] = (
                c.sft
                * token_losses(network.unembed, rows, part.benign.labels).sum()
                / tokens["benign"]
            )
        return terms

    def _taught(self, parts: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with what the frozen model says to them; it is gone before the student
        runs.
        """
        if not self.settings.defence.kl:
            return parts
        network = self.lm.network(adapter=False)
        unembed = network.unembedding()
        with torch.no_grad():
            rows = [None if p.benign is None else network.label_rows(p.benign) for p in parts]
        return [
            p if r is None else replace(p, teacher=Teacher(unembed, r))
            for p, r in zip(parts, rows, strict=True)
        ]

    def _attack(self, network: Network, part: MicroBatch) -> Attack:
        eps = {site: radius * self._eps_scale() for site, radius in self.eps.items()}
        # of the micro-batch, not of the step: whichever process runs it draws the same starts
        seed = (self.seed * 1_000_003 + self.step) * 1_000_003 + 1 + part.number
        generator = torch.Generator().manual_seed(seed)
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
            harmful = wanted_only(harmful) + benign
        # the rejected completion plays no part
        elif not attacked and (s.attack.steps or not s.defence.away):
            harmful = wanted_only(harmful)
        harmful, benign = (sorted(rows, key=lambda r: r.length) for rows in (harmful, benign))
        count, parts = self._count(len(harmful), len(benign)), []
        for rows, calm in zip(split(harmful, count), split(benign, count), strict=True):
            batch = collate(rows, pad_to=s.pad_to, device=self.lm.device)
            clean = torch.rand(len(rows), generator=generator) < s.clean_share
            calm_batch = collate(calm, pad_to=s.pad_to, device=self.lm.device) if calm else None
            parts.append(MicroBatch(batch, calm_batch, clean.to(self.lm.device), len(parts)))
        return parts

    def _count(self, harmful: int, benign: int) -> int:
        """How many micro-batches so many rows make: as many for each process, or they would wait
        for each other.
        """
        # with fewer harmful rows than that, the benign ones share their micro-batches: no row is
        # left out
        count = min(-(-max(harmful, benign) // self.settings.micro_batch), harmful)
        count, world = self.processes.rounded(count), self.processes.world
        for name, rows in (
            ("batch", harmful),
            ("benign_batch", benign if self._uses_benign() else count),
        ):
            if world > 1 and rows < count:
                raise SettingError(
                    f"train.{name} = {getattr(self.settings, name)} is too small for {world}"
                    f" processes: its {rows} rows go in {count} micro-batches, so set it to at"
                    f" least {count}, or raise train.micro_batch"
                )
        return count

    def state(self) -> dict:
        """All that a resumed run needs: the step, the adapter and the optimiser, whole, on the CPU,
        the same for any number of processes, each of which must ask; and a digest of the rows."""
        kept = {"adapter": self.parameters, "optimiser": self.optimiser.state_dict()}
        return {"step": self.step, "data": self.data, **full(kept)}

    def restore(self, state: dict) -> None:
        """Continue from a `state()`, made by as many processes or not. Raises ValueError where the
        rows are others.
        """
        if state.get("data") != self.data:
            raise ValueError(
                f"the checkpoint of step {state['step']} was made with other rows than these: put"
                " the data and the tokenizer back as they were, or delete it to begin again"
            )
        self.step = state["step"]
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["adapter"], strict=True):
                parameter.copy_(sharded(value, parameter))
        moments = {
            i: {
                k: sharded(v, self.parameters[i]) if v.dim() else v.clone()
                for k, v in values.items()
            }
            for i, values in state["optimiser"]["state"].items()
        }
        self.optimiser.load_state_dict({**state["optimiser"], "state": moments})


def _digest(rows: Sequence[TokenRow]) -> str:
    """What tells these rows of token ids, in this order, from any others."""
    return hashlib.sha256(
        repr([(row.prompt, row.completions) for row in rows]).encode()
    ).hexdigest()


def _label_tokens(micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
    """Label tokens of the whole batch, by which every sum is divided."""
    packed = any(part.attacked.packed for part in micro_batches)
    count = {
        name: sum(len(p.attacked.label_index(s)) for p in micro_batches)
        for name, s in (("a", 1), ("b", 2))
    }
    return {
        "toward": count["b"] if packed else count["a"],
        "away": count["a"] if packed else 0,
        "benign": sum(len(p.benign.labels) for p in micro_batches if p.benign is not None),
    }
