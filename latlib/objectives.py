"""What a defence minimises: one class a defence.

To add one, subclass `Objective` and name it in `OBJECTIVES`; settings of its own are a section in
`config.sections`, and a method of a profile says `objective: NAME`. A step of training:
1. `rows` says which of the step's rows carry the perturbation and which are benign.
2. `with_teacher` adds what the frozen model says to them, before the student runs.
3. `losses` gives weighted terms, one dictionary a forward. Each is a sum over a micro-batch divided
   by a count over the whole batch (`counts`), so that micro-batches change nothing.

Sources: Sheshadri et al. 2024, section 3; Casper et al. 2024; Zou et al. 2024, algorithm 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latlib.attack import Deltas
from latlib.batch import PADDING, Batch, TokenRow, join
from latlib.errors import SettingError
from latlib.losses import Unembed, kl_divergence, normalised, token_losses
from latlib.network_protocol import Model, Network
from latlib.threat import Site

Terms = dict[str, Tensor]
Rows = list[TokenRow]
Counts = Mapping[str, int]
Options = Any  # a `config.sections.TrainSettings`, or anything with its fields


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. attacked: rows that carry delta. benign: rows with
    delta = 0. clean: [rows of attacked] bool, rows whose delta is put back to zero. number: its
    place in the step's list, whichever process runs it. teacher: see `Objective.with_teacher`."""

    attacked: Batch
    benign: Batch | None
    clean: Tensor
    number: int = 0
    teacher: Any = None


# is shown the attacked rows' `label_rows` under the perturbation
Observe = Callable[[MicroBatch, Tensor], None]


def ignore(part: MicroBatch, rows: Tensor) -> None:
    """An `Observe` that does nothing."""


class Objective(ABC):
    """Base of every defence; see the module's docstring. terms: names that `losses` may give."""

    terms: ClassVar[tuple[str, ...]]

    def __init__(self, settings: Options) -> None:
        self.settings = settings
        self.step = 0  # which step is trained; for terms whose weight follows a schedule

    @property
    @abstractmethod
    def uses_benign(self) -> bool:
        """Whether benign rows play a part."""

    def rows(self, harmful: Rows, benign: Rows, attacked: bool) -> tuple[Rows, Rows]:
        """(rows that carry the perturbation, benign rows) of a step."""
        return harmful, benign

    def with_teacher(self, lm: Model, parts: list[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches with what the frozen model says to them."""
        return parts

    @abstractmethod
    def counts(self, parts: Sequence[MicroBatch]) -> dict[str, int]:
        """What sums are divided by, over the whole batch."""

    @abstractmethod
    def forwards(self, part: MicroBatch) -> int:
        """How many dictionaries `losses` gives for a micro-batch."""

    @abstractmethod
    def losses(
        self,
        network: Network,
        part: MicroBatch,
        deltas: Deltas | None,
        counts: Counts,
        observe: Observe = ignore,
    ) -> Iterator[Terms]:
        """Weighted terms, scalars that sum to the objective: one dictionary for each forward, whose
        backward pass belongs before the next is asked for, so that one graph exists at a time."""


class Teacher(NamedTuple):
    """All that KL needs of the frozen model: its output matrix, and its `label_rows` of a benign
    batch."""

    unembed: Unembed
    rows: Tensor


class SafetyTraining(Objective):
    """Refuse harmful requests under the perturbation, stay useful without it: toward * CE(chosen |
    delta) + away * away(rejected | delta) + kl * KL(teacher || student) + sft * CE(benign).

    One objective for methods that differ in their adversary: safety training has none, adversarial
    training one at the embedding, LAT one in the residual stream; an untargeted one raises the loss
    of wanted completions, of harmful and of benign rows alike (Casper et al. 2024)."""

    terms = ("toward", "away", "kl", "sft")

    @property
    def uses_benign(self) -> bool:
        return bool(self.settings.defence.kl or self.settings.defence.sft)

    def rows(self, harmful: Rows, benign: Rows, attacked: bool) -> tuple[Rows, Rows]:
        """See `Objective`. The rejected completion plays no part in plain steps before an attack,
        nor without an away term."""
        attack, away = self.settings.attack, self.settings.defence.away
        if attacked and not attack.targeted:
            return wanted_only(harmful) + benign, benign
        if not attacked and (attack.steps or not away):
            harmful = wanted_only(harmful)
        return harmful, benign

    def with_teacher(self, lm: Model, parts: list[MicroBatch]) -> list[MicroBatch]:
        """See `Objective`: a `Teacher` for each micro-batch with benign rows, where there is KL."""
        if not self.settings.defence.kl:
            return parts
        network = lm.network(adapter=False)
        unembed = network.unembedding()
        ready = []
        with torch.no_grad():
            for part in parts:
                if part.benign is not None:
                    teacher = Teacher(unembed, network.label_rows(part.benign))
                    part = replace(part, teacher=teacher)
                ready.append(part)
        return ready

    def counts(self, parts: Sequence[MicroBatch]) -> dict[str, int]:
        """See `Objective`: label tokens."""
        first = sum(len(part.attacked.label_index(1)) for part in parts)
        second = sum(len(part.attacked.label_index(2)) for part in parts)
        benign = sum(len(part.benign.labels) for part in parts if part.benign is not None)
        if any(part.attacked.packed for part in parts):
            return {"toward": second, "away": first, "benign": benign}
        return {"toward": first, "away": 0, "benign": benign}

    def forwards(self, part: MicroBatch) -> int:
        apart = self.uses_benign and part.benign is not None and not self.settings.shared_forward
        return 2 if apart else 1

    def losses(
        self,
        network: Network,
        part: MicroBatch,
        deltas: Deltas | None,
        counts: Counts,
        observe: Observe = ignore,
    ) -> Iterator[Terms]:
        benign = part.benign if self.uses_benign else None
        if benign is not None and self.settings.shared_forward:
            yield self._together(network, part, deltas, counts, observe)
            return
        rows = network.label_rows(part.attacked, deltas)
        observe(part, rows)
        yield self._harmful(network, rows, part.attacked, counts)
        if benign is not None:
            yield self._benign(network, network.label_rows(benign), part, counts)

    def _together(
        self,
        network: Network,
        part: MicroBatch,
        deltas: Deltas | None,
        counts: Counts,
        observe: Observe,
    ) -> Terms:
        """Harmful and benign rows in one forward."""
        assert part.benign is not None, "there are benign rows"
        both = join(part.attacked, part.benign)
        padded_deltas = {site: padded(delta, both) for site, delta in (deltas or {}).items()}
        rows = network.label_rows(both, padded_deltas)
        n = len(part.attacked.labels)
        observe(part, rows[:n])
        harmful = self._harmful(network, rows[:n], part.attacked, counts)
        return harmful | self._benign(network, rows[n:], part, counts)

    def _harmful(self, network: Network, rows: Tensor, batch: Batch, counts: Counts) -> Terms:
        weights = self.settings.defence
        rejected = batch.label_segments == 1 if batch.packed else None
        losses = token_losses(network.unembed, rows, batch.labels, away=rejected)
        # a row with one completion has only the wanted one
        chosen = batch.label_index(2 if batch.packed else 1)
        terms = {"toward": weights.toward * losses[chosen].sum() / counts["toward"]}
        if weights.away and batch.packed:
            away = losses[batch.label_index(1)].sum()
            terms["away"] = weights.away * away / counts["away"]
        return terms

    def _benign(self, network: Network, rows: Tensor, part: MicroBatch, counts: Counts) -> Terms:
        weights, terms = self.settings.defence, {}
        if weights.kl:
            unembed, frozen = part.teacher
            kl = kl_divergence(network.unembed, rows, unembed, frozen, weights.kl_mode)
            if weights.kl_mode == "token":
                total = kl.sum()
            else:
                total = normalised(kl.mean()) * len(kl)
            terms["kl"] = weights.kl * total / counts["benign"]
        if weights.sft:
            assert part.benign is not None, "there are benign rows"
            sft = token_losses(network.unembed, rows, part.benign.labels).sum()
            terms["sft"] = weights.sft * sft / counts["benign"]
        return terms


class RepresentationRerouting(Objective):
    """Circuit breakers: what the model represents while it writes a harmful reply is turned away
    from what the frozen model represents there; on benign rows it stays where it was.

    rerouting: relu(cosine(student, teacher)) at the positions of rejected completions; retain:
    ||student - teacher|| at all positions of benign rows, both a mean over positions and sites. At
    step t of T their weights are alpha (1 - t / 2T) and alpha * retain * t / 2T. Both gradients are
    zero where training begins, and rounding leads away from there. Nobody learns to refuse.
    Source: Zou et al. 2024 (arXiv 2406.04313), algorithm 1.
    """

    terms = ("rerouting", "retain")
    uses_benign = True

    def __init__(self, settings: Options) -> None:
        super().__init__(settings)
        if settings.attack.steps:
            raise SettingError(
                "objective = 'rerouting' trains without an attack, not with attack.steps ="
                f" {settings.attack.steps}: set it to 0"
            )

    def rows(self, harmful: Rows, benign: Rows, attacked: bool) -> tuple[Rows, Rows]:
        return [TokenRow(row.prompt, row.completions[:1]) for row in harmful], benign

    def with_teacher(self, lm: Model, parts: list[MicroBatch]) -> list[MicroBatch]:
        frozen = lm.network(adapter=False)
        with torch.no_grad():
            return [replace(part, teacher=self._streams(frozen, part)) for part in parts]

    def _streams(self, network: Network, part: MicroBatch) -> list[dict[Site, Tensor]]:
        batches = [part.attacked] if part.benign is None else [part.attacked, part.benign]
        return [network.streams(batch, self.settings.rerouting.sites) for batch in batches]

    def counts(self, parts: Sequence[MicroBatch]) -> dict[str, int]:
        rerouted = sum(int((part.attacked.segments == 1).sum()) for part in parts)
        benign = [part.benign for part in parts if part.benign is not None]
        retained = sum(int((batch.segments != PADDING).sum()) for batch in benign)
        return {"rerouting": rerouted, "retain": retained}

    def forwards(self, part: MicroBatch) -> int:
        return 1 if part.benign is None else 2

    def losses(
        self,
        network: Network,
        part: MicroBatch,
        deltas: Deltas | None,
        counts: Counts,
        observe: Observe = ignore,
    ) -> Iterator[Terms]:
        options, progress = self.settings.rerouting, self.step / (2 * self.settings.steps)
        harmful = network.streams(part.attacked, options.sites)
        where = part.attacked.segments == 1
        turned = _over_sites(harmful, part.teacher[0], where, _overlap)
        yield {"rerouting": options.alpha * (1 - progress) * turned / counts["rerouting"]}
        if part.benign is not None:
            benign = network.streams(part.benign, options.sites)
            where = part.benign.segments != PADDING
            moved = _over_sites(benign, part.teacher[1], where, _distance)
            weight = options.alpha * options.retain * progress
            yield {"retain": weight * moved / counts["retain"]}


def _over_sites(
    student: Deltas, teacher: Deltas, where: Tensor, compare: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The sum over positions, and the mean over sites, of a comparison of two streams."""
    values = [compare(student[site][where], teacher[site][where]).sum() for site in student]
    return torch.stack(values).mean()


def _overlap(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_similarity(student, teacher, dim=-1, eps=1e-12).relu()


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    # the norm has no gradient at 0, where training begins
    return ((student - teacher).square().sum(-1) + 1e-12).sqrt()


OBJECTIVES: dict[str, type[Objective]] = {
    "safety-training": SafetyTraining,
    "rerouting": RepresentationRerouting,
}


def wanted_only(rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Preference rows without their rejected completion."""
    return [TokenRow(row.prompt, row.completions[1:]) for row in rows]


def padded(delta: Tensor, batch: Batch) -> Tensor:
    """A perturbation of the first rows of a joined batch, zero on all others."""
    n, seq, _ = delta.shape
    return F.pad(delta, (0, 0, 0, batch.shape[1] - seq, 0, batch.shape[0] - n))
