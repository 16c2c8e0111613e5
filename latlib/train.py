"""One training loop for every defence; what it minimises is an `objectives.Objective`.

A step:
1. Take the step's harmful and benign rows (`batch.Schedule`), in micro-batches of rows of similar
   length.
2. Attack **every** micro-batch with the weights frozen (`attack.pgd`), once `attack_after` steps of
   plain training are over; the radius grows over `eps_ramp` steps. A share of rows keeps delta = 0.
3. Defend: the objective's terms, each over the label tokens of the whole batch, so that
   micro-batches change nothing.
4. Clip, AdamW on the adapter, log exactly what was optimised; what is not finite is skipped.

Everything random is a function of (seed, step): a checkpoint is the adapter, the optimiser and the
step, and a resumed run ends bit for bit where an uninterrupted one does (on a CPU).

Several processes (`latlib.distributed.ranks`) share the micro-batches of the same batch, and end
where one process does, up to rounding: label tokens are counted over the whole batch, and what is
logged is of all processes."""

from __future__ import annotations

import hashlib
import math
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latlib.attack import Attack, judge, pgd
from latlib.batch import Schedule, TokenRow, collate
from latlib.errors import SettingError
from latlib.network_protocol import Model, Network
from latlib.objectives import OBJECTIVES, Counts, MicroBatch, Options
from latlib.threat import Site

Metrics = dict[str, float]
# how an attack of a step fared, name -> values of rows that kept their perturbation
Noted = dict[str, list[Tensor]]


class Trainer:
    """Trains the adapter of `lm` in place.

    harmful: rows with (rejected, chosen); benign: rows with (response,). settings: a
    `config.sections.TrainSettings`, or anything with its fields. norms: site -> median
    residual norm, for a relative eps. Where several processes train it, `lm` comes from
    `ranks.wrap`. Raises ValueError for empty or one-sided data, SettingError for batches that
    cannot be shared between the processes."""

    def __init__(
        self,
        lm: Model,
        harmful: Sequence[TokenRow],
        benign: Sequence[TokenRow],
        settings: Options,
        seed: int,
        norms: Mapping[Site, float] | None = None,
    ) -> None:
        _check_rows(harmful, benign)
        self.lm, self.processes = lm, lm.processes
        self.settings, self.seed, self.micro_batch = settings, seed, settings.micro_batch
        self.harmful, self.benign = list(harmful), list(benign)
        self.data = _digest((*self.harmful, *self.benign))
        self.step = 0
        self.skipped = 0  # updates in a row
        self.objective = OBJECTIVES[settings.objective](settings)
        attack = settings.attack
        self.threat: Any = None  # without an attack
        if attack.steps:
            self.threat = attack.threat_model(lm.n_layers, norms)
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
        for attacked in {False, self.threat is not None}:
            self._count(*map(len, self._rows(attacked)))

    def run(self, on_step: Callable[[int, Metrics], None] = lambda step, metrics: None) -> None:
        """Train up to `settings.steps`; `on_step(step, metrics)` after each, counted from 1."""
        while self.step < self.settings.steps:
            start = time.perf_counter()
            metrics = self.train_step()
            on_step(self.step, {**metrics, "seconds": time.perf_counter() - start})

    def train_step(self) -> Metrics:
        """One step; returns means over its updates of all that was optimised, and of the attack."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        self.objective.step = self.step
        attacked = self.threat is not None and self.step >= self.settings.attack_after
        batch = self._micro_batches(attacked, generator)
        counts = self.objective.counts(batch)
        parts = self.objective.with_teacher(self.lm, self.processes.own(batch))
        network = self.lm.network(train=True)
        noted: Noted = {}
        if attacked:
            noted = {"attack_start": [], "attack_end": [], "attack_won": []}
            parts = [self._perturbed(network, part, noted) for part in parts]
        if self.settings.fresh_optimiser:
            self.optimiser.state.clear()
        rate = self._rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        updates = [self._update(network, parts, counts, noted)]
        while len(updates) < self.settings.iterations:
            updates.append(self._update(self.lm.network(train=True), parts, counts, {}))
        means = {}
        for name in ChainMap(*updates):
            own = [update[name] for update in updates if name in update]
            means[name] = sum(own) / len(own)
        for name, values in noted.items():
            mean = self.processes.mean(values)
            if mean is not None and math.isfinite(mean):
                means[name] = mean
        scale = self._eps_scale() if attacked else 0.0
        self.step += 1
        return {**means, "eps_scale": scale, "lr": rate}

    def _perturbed(self, network: Network, part: MicroBatch, noted: Noted) -> MicroBatch:
        """The micro-batch under an attack on the weights as they are, and how that began noted."""
        found = self._attack(network.frozen(), part)
        noted["attack_start"].append(found.losses[0][~part.clean])
        clean = part.clean[:, None, None]
        return replace(part, deltas={s: d.masked_fill(clean, 0.0) for s, d in found.deltas.items()})

    def _update(
        self, network: Network, parts: Sequence[MicroBatch], counts: Counts, noted: Noted
    ) -> Metrics:
        """Forward, backward, one optimiser step. noted: gets how the attack ended."""
        self.optimiser.zero_grad()
        sums: dict[str, float] = {}
        work = [(part, run) for part in parts for run in self.objective.forwards(part)]
        for number, (part, run) in enumerate(work, start=1):
            self.processes.exchange(number == len(work))
            terms, rows = run(network, part, counts)
            total = torch.stack(list(terms.values())).sum()
            (self.processes.world * total).backward()
            network.flush_gradients()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.item()
            if noted and rows is not None:  # the attack is judged in the defence's own forward
                search = self.settings.attack.search()
                end, won = judge(network, part.attacked, search, rows.detach())
                noted["attack_end"].append(end[~part.clean])
                noted["attack_won"].append(won[~part.clean].float())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        sums = self.processes.total(sums, self.objective.terms)
        norm = self.processes.full(norm).item()
        metrics = {"total": sum(sums.values()), **sums, "grad_norm": norm}
        if all(map(math.isfinite, metrics.values())):
            self.optimiser.step()
            self.skipped = 0
            return {**metrics, "skipped": 0.0}
        self.skipped += 1
        if self.skipped > self.settings.skips * self.settings.iterations:
            raise FloatingPointError(
                f"step {self.step + 1}: {metrics}: not finite, as {self.skipped} updates in a row,"
                " all of them skipped: lower train.lr or attack.eps"
            )
        return {"skipped": 1.0}

    def _attack(self, network: Network, part: MicroBatch) -> Attack:
        threat = self.threat.scaled(self._eps_scale())
        # of the micro-batch, not of the step: whichever process runs it draws the same starts
        seed = (self.seed * 1_000_003 + self.step) * 1_000_003 + 1 + part.number
        generator = torch.Generator().manual_seed(seed)
        search = self.settings.attack.search()
        return pgd(network, part.attacked, threat, search, generator, judged=False)

    def _eps_scale(self) -> float:
        ramp = self.settings.eps_ramp
        if not ramp:
            return 1.0
        return min(1.0, (self.step - self.settings.attack_after + 1) / ramp)

    def _rate(self) -> float:
        s = self.settings
        warm = min(1.0, (self.step + 1) / s.lr_warmup) if s.lr_warmup else 1.0
        decay = s.steps * s.lr_decay_share
        return s.lr * warm * (min(1.0, (s.steps - self.step) / decay) if decay else 1.0)

    def _micro_batches(self, attacked: bool, generator: torch.Generator) -> list[MicroBatch]:
        every = self._rows(attacked)
        count = self._count(*map(len, every))
        groups = zip(*(_by_length(rows, count) for rows in every), strict=True)
        pack = partial(collate, pad_to=self.settings.pad_to, device=self.lm.device)
        parts = []
        for number, (rows, others) in enumerate(groups):
            chance = torch.rand(len(rows), generator=generator)
            clean = (chance < self.settings.clean_share).to(self.lm.device)
            benign = pack(others) if others else None
            parts.append(MicroBatch(pack(rows), benign, clean, number))
        return parts

    def _rows(self, attacked: bool) -> tuple[list[TokenRow], list[TokenRow]]:
        """The step's rows that carry the perturbation, and its benign ones."""
        of_harmful, of_benign = self.schedules
        harmful = [self.harmful[i] for i in of_harmful.rows(self.step)]
        benign = [self.benign[i] for i in of_benign.rows(self.step)]
        return self.objective.rows(harmful, benign, attacked)

    def _count(self, harmful: int, benign: int) -> int:
        """How many micro-batches so many rows make: as many for each process, or they would wait
        for each other."""
        # with fewer harmful rows than that, benign ones share micro-batches: no row is left out
        count = min(-(-max(harmful, benign) // self.micro_batch), harmful)
        world = self.processes.world
        count = -(-count // world) * world
        sizes = {"batch": harmful}
        if self.objective.uses_benign:
            sizes["benign_batch"] = benign
        for name, rows in sizes.items():
            if world > 1 and rows < count:
                raise SettingError(
                    f"train.{name} = {getattr(self.settings, name)} is too small for {world}"
                    f" processes: its {rows} rows go in {count} micro-batches, so set it to at"
                    f" least {count}, or raise train.micro_batch"
                )
        return count

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: the step, the adapter and the optimiser, full, on the CPU,
        the same for any number of processes, each of which must ask; and a digest of the rows."""
        kept = {"adapter": self.parameters, "optimiser": self.optimiser.state_dict()}
        own = {"step": self.step, "skipped": self.skipped, "data": self.data}
        return own | self.processes.full(kept)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state()` of any number of processes; ValueError for other rows."""
        if state.get("data") != self.data:
            raise ValueError(
                f"the checkpoint of step {state['step']} was made with other rows than these: put"
                " the data and the tokenizer back as they were, or delete it to begin again"
            )
        self.step, self.skipped = state["step"], state["skipped"]
        sharded = self.processes.sharded
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["adapter"], strict=True):
                parameter.copy_(sharded(value, parameter))
        moments = {
            i: sharded(values, self.parameters[i])
            for i, values in state["optimiser"]["state"].items()
        }
        self.optimiser.load_state_dict({**state["optimiser"], "state": moments})


def _by_length(rows: Sequence[TokenRow], count: int) -> list[list[TokenRow]]:
    """`count` runs of nearly equal number, of rows of similar length."""
    ordered = sorted(rows, key=lambda row: row.length)
    bounds = [round(i * len(rows) / count) for i in range(count + 1)]
    return [ordered[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


def _check_rows(harmful: Sequence[TokenRow], benign: Sequence[TokenRow]) -> None:
    if not harmful or not benign:
        raise ValueError(
            f"{len(harmful)} harmful and {len(benign)} benign rows: training needs both"
        )
    counts = {len(row.completions) for row in harmful}, {len(row.completions) for row in benign}
    if counts != ({2}, {1}):
        raise ValueError("a harmful row needs (rejected, chosen) and a benign row (response,)")


def _digest(rows: Sequence[TokenRow]) -> str:
    """What tells these rows of token ids, in this order, from any others."""
    return hashlib.sha256(
        repr([(row.prompt, row.completions) for row in rows]).encode()
    ).hexdigest()
