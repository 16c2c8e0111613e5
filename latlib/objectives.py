"""What a defence minimises: one class a defence.

To add one, subclass `Objective` and name it in `OBJECTIVES`; settings of its own are a section in
`config.sections`, and a method of a profile says `objective: NAME`. A step of training:
1. `rows` says which of the step's rows carry the perturbation and which are benign.
2. `with_teacher` adds what the frozen model says to them (`teacher`), before the student runs.
3. `forwards` says what is run: each forward gives weighted terms that sum to the objective, and its
   backward pass comes before the next forward, so that one graph exists at a time. A term is a sum
   over a micro-batch divided by a count over the whole batch (`counts`), so that micro-batches
   change nothing.

Sources: Sheshadri et al. 2024, section 3; Casper et al. 2024; Zou et al. 2024, algorithm 1."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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

Rows = list[TokenRow]
Counts = Mapping[str, int]
Options = Any  # a `config.sections.TrainSettings`, or anything with its fields


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together. attacked: rows that carry a perturbation. benign:
    rows without. clean: [rows of attacked] bool, rows whose perturbation is put back to zero.
    number: its place in the step's list, whichever process runs it. teacher: see
    `Objective.teacher`. deltas: what the attack found."""

    attacked: Batch
    benign: Batch | None
    clean: Tensor
    number: int = 0
    teacher: Any = None
    deltas: Deltas | None = None


# weighted terms, and the attacked rows' `label_rows` under the perturbation where they were run
Losses = tuple[dict[str, Tensor], Tensor | None]
Forward = Callable[[Network, MicroBatch, Counts], Losses]
Compare = Callable[[Tensor, Tensor], Tensor]


class Objective(ABC):
    """Base of every defence; see the module's docstring. terms: names of all that it may give."""

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
        if not self.uses_teacher:
            return parts
        network = lm.network(adapter=False)
        with torch.no_grad():
            return [replace(part, teacher=self.teacher(network, part)) for part in parts]

    @property
    @abstractmethod
    def uses_teacher(self) -> bool:
        """Whether the frozen model plays a part."""

    @abstractmethod
    def teacher(self, network: Network, part: MicroBatch) -> Any:
        """What the frozen model says to a micro-batch; it keeps nothing else of it alive."""

    @abstractmethod
    def counts(self, parts: Sequence[MicroBatch]) -> dict[str, int]:
        """What sums are divided by, over the whole batch."""

    @abstractmethod
    def forwards(self, part: MicroBatch) -> list[Forward]:
        """What a micro-batch takes."""


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
            harmful = _single(harmful, 1) + benign
        elif not attacked and (attack.steps or not away):
            harmful = _single(harmful, 1)
        if self._compares_at_tokens:
            benign = [_with_a_label_more(row) for row in benign]
        return harmful, benign

    @property
    def _compares_at_tokens(self) -> bool:
        """Whether the KL is taken where a response's tokens are, as in the authors' code, and not
        where they are predicted: the last one then needs a label of its own."""
        defence = self.settings.defence
        return bool(defence.kl) and defence.kl_mode == "reference"

    @property
    def uses_teacher(self) -> bool:
        return bool(self.settings.defence.kl)

    def teacher(self, network: Network, part: MicroBatch) -> Teacher | None:
        if part.benign is None:
            return None
        return Teacher(network.unembedding(), network.label_rows(part.benign))

    def counts(self, parts: Sequence[MicroBatch]) -> dict[str, int]:
        """See `Objective`: label tokens."""
        labels = sum(len(part.attacked.labels) for part in parts)
        toward = sum(len(_chosen(part.attacked)) for part in parts)
        own = [part.benign for part in parts if part.benign is not None]
        benign = sum(len(batch.labels) - batch.shape[0] * self._compares_at_tokens for batch in own)
        return {"toward": toward, "away": labels - toward, "benign": benign}

    def forwards(self, part: MicroBatch) -> list[Forward]:
        if part.benign is None or not self.uses_benign:
            return [self._harmful]
        return [self._together] if self.settings.shared_forward else [self._harmful, self._benign]

    def _harmful(self, network: Network, part: MicroBatch, counts: Counts) -> Losses:
        rows = network.label_rows(part.attacked, part.deltas)
        return self._of_harmful(network, rows, part.attacked, counts), rows

    def _benign(self, network: Network, part: MicroBatch, counts: Counts) -> Losses:
        assert part.benign is not None, "there are benign rows"
        rows = network.label_rows(part.benign)
        return self._of_benign(network, rows, part, counts), None

    def _together(self, network: Network, part: MicroBatch, counts: Counts) -> Losses:
        """Harmful and benign rows in one forward."""
        assert part.benign is not None, "there are benign rows"
        both = join(part.attacked, part.benign)
        n, seq = part.attacked.shape
        rows, length = both.shape
        more = (0, 0, 0, length - seq, 0, rows - n)
        deltas = part.deltas or {}
        padded = {site: F.pad(delta, more) for site, delta in deltas.items()}
        hidden = network.label_rows(both, padded)
        labels = len(part.attacked.labels)
        harmful, benign = hidden[:labels], hidden[labels:]
        terms = self._of_harmful(network, harmful, part.attacked, counts)
        return terms | self._of_benign(network, benign, part, counts), harmful

    def _of_harmful(
        self, network: Network, rows: Tensor, batch: Batch, counts: Counts
    ) -> dict[str, Tensor]:
        weights = self.settings.defence
        rejected = batch.label_segments == 1 if batch.packed else None
        losses = token_losses(network.unembed, rows, batch.labels, away=rejected)
        toward = losses[_chosen(batch)].sum()
        terms = {"toward": weights.toward * toward / counts["toward"]}
        if weights.away and batch.packed:
            away = losses[batch.label_index(1)].sum()
            terms["away"] = weights.away * away / counts["away"]
        return terms

    def _of_benign(
        self, network: Network, rows: Tensor, part: MicroBatch, counts: Counts
    ) -> dict[str, Tensor]:
        weights, terms = self.settings.defence, {}
        assert part.benign is not None, "there are benign rows"
        learned: Any = slice(None)
        compared = learned
        if self._compares_at_tokens:
            other_row = part.benign.label_rows.diff() != 0
            learned = ~F.pad(other_row, (0, 1), value=True)  # all but each row's last label
            compared = ~F.pad(other_row, (1, 0), value=True)  # all but its first
        if weights.kl:
            unembed, frozen = part.teacher
            student, frozen = rows[compared], frozen[compared]
            kl = kl_divergence(network.unembed, student, unembed, frozen, weights.kl_mode)
            if weights.kl_mode == "token":
                total = kl.sum()
            else:
                total = normalised(kl.mean()) * len(kl)
            terms["kl"] = weights.kl * total / counts["benign"]
        if weights.sft:
            labels = part.benign.labels[learned]
            sft = token_losses(network.unembed, rows[learned], labels).sum()
            terms["sft"] = weights.sft * sft / counts["benign"]
        return terms


def _with_a_label_more(row: TokenRow) -> TokenRow:
    response = row.completions[0]
    return TokenRow(row.prompt, ((*response, response[-1]),))


def _chosen(batch: Batch) -> Tensor:
    """Indices of the wanted completions' labels: a row with one completion has only that."""
    return batch.label_index(2 if batch.packed else 1)


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
    uses_teacher = True

    def __init__(self, settings: Options) -> None:
        super().__init__(settings)
        if settings.attack.steps:
            raise SettingError(
                "objective = 'rerouting' trains without an attack, not with attack.steps ="
                f" {settings.attack.steps}: set it to 0"
            )

    def rows(self, harmful: Rows, benign: Rows, attacked: bool) -> tuple[Rows, Rows]:
        return _single(harmful, 0), benign

    def teacher(self, network: Network, part: MicroBatch) -> list[dict[Site, Tensor]]:
        """See `Objective`: the streams of the attacked rows, and of the benign ones."""
        batches = [part.attacked] if part.benign is None else [part.attacked, part.benign]
        return [network.capture(batch, self.settings.rerouting.sites) for batch in batches]

    def counts(self, parts: Sequence[MicroBatch]) -> dict[str, int]:
        rerouted = sum(int(_replies(part.attacked).sum()) for part in parts)
        benign = [part.benign for part in parts if part.benign is not None]
        retained = sum(int((batch.segments != PADDING).sum()) for batch in benign)
        return {"rerouting": rerouted, "retain": retained}

    def forwards(self, part: MicroBatch) -> list[Forward]:
        return [self._rerouting] if part.benign is None else [self._rerouting, self._retain]

    def _rerouting(self, network: Network, part: MicroBatch, counts: Counts) -> Losses:
        batch, weight = part.attacked, self.settings.rerouting.alpha * (1 - self._progress())
        turned = self._over_sites(network, batch, part.teacher[0], _replies(batch), _overlap)
        return {"rerouting": weight * turned / counts["rerouting"]}, None

    def _retain(self, network: Network, part: MicroBatch, counts: Counts) -> Losses:
        assert part.benign is not None, "there are benign rows"
        options, batch = self.settings.rerouting, part.benign
        real = batch.segments != PADDING
        moved = self._over_sites(network, batch, part.teacher[1], real, _distance)
        weight = options.alpha * options.retain * self._progress()
        return {"retain": weight * moved / counts["retain"]}, None

    def _progress(self) -> float:
        return self.step / (2 * self.settings.steps)

    def _over_sites(
        self, network: Network, batch: Batch, teacher: Deltas, where: Tensor, compare: Compare
    ) -> Tensor:
        """The sum over positions, and the mean over sites, of a comparison of student and
        teacher."""
        student = network.streams(batch, self.settings.rerouting.sites)
        values = [compare(student[site][where], teacher[site][where]).sum() for site in student]
        return torch.stack(values).mean()


def _replies(batch: Batch) -> Tensor:
    """[batch, seq] bool: positions of the first completions."""
    return batch.segments == 1


def _overlap(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cosine_similarity(student, teacher, dim=-1, eps=1e-12).relu()


def _distance(student: Tensor, teacher: Tensor) -> Tensor:
    # the norm has no gradient at 0, where training begins
    return ((student - teacher).square().sum(-1) + 1e-12).sqrt()


OBJECTIVES: dict[str, type[Objective]] = {
    "safety-training": SafetyTraining,
    "rerouting": RepresentationRerouting,
}


def _single(rows: Rows, number: int) -> Rows:
    """Preference rows with one of their completions."""
    return [TokenRow(row.prompt, (row.completions[number],)) for row in rows]
