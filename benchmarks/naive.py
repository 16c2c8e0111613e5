"""A LAT step as the predecessors compute it: the same mathematics as `latlib.train`, the
straightforward way.

1. Every pair is two rows, [prompt | rejected] and [prompt | chosen], padded, two pairs at a time:
   prompts run twice.
2. Every forward runs all blocks, and gives logits of the whole vocabulary at every position.
3. The attack's `backward()` also computes gradients of the adapter, which are thrown away.
4. The teacher is a second copy of the model.

It is what `lat_step.py` compares the engine with; the tests hold the two equal.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latlib.batch import Schedule, TokenRow
from latlib.blocks import blocks_of
from latlib.config.sections import TrainSettings
from latlib.threat import ADAM_LR, EMBEDDING, Site


class NaiveTrainer:
    """One step at a time; `model` is a PEFT model, its adapter is trained in place.

    eps: site -> radius. Rows as for `latlib.train.Trainer`, and the same rows at the same step and
    seed.
    """

    micro_batch = 2  # the authors' notebooks (docs/sources.md#sheshadri-2024)

    def __init__(
        self,
        model: nn.Module,
        harmful: Sequence[TokenRow],
        benign: Sequence[TokenRow],
        settings: TrainSettings,
        seed: int,
        eps: Mapping[Site, float],
    ) -> None:
        self.model, self.settings, self.eps, self.step = model, settings, dict(eps), 0
        self.teacher = copy.deepcopy(model.get_base_model())
        for module in self.teacher.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(False)
        self.teacher.requires_grad_(False)
        self.harmful, self.benign = list(harmful), list(benign)
        self.schedules = (
            Schedule(len(harmful), settings.batch, 2 * seed),
            Schedule(len(benign), settings.benign_batch, 2 * seed + 1),
        )
        self.parameters = [p for n, p in model.named_parameters() if "lora_" in n]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.lr, weight_decay=settings.weight_decay
        )

    def train_step(self) -> float:
        """One step; returns the total loss."""
        harmful = [self.harmful[i] for i in self.schedules[0].rows(self.step)]
        benign = [self.benign[i] for i in self.schedules[1].rows(self.step)]
        tokens = label_tokens(harmful, benign)
        parts = list(micro_batches(harmful, self.micro_batch))
        deltas = [self._attack(part) for part in parts]
        self.optimiser.zero_grad()
        total = torch.zeros(())
        for part, delta in zip(parts, deltas, strict=True):
            total = total + self._harmful_backward(part, delta, tokens).cpu()
        for part in micro_batches(benign, self.micro_batch):
            total = total + self._benign_backward(part, tokens).cpu()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimiser.step()
        self.step += 1
        return total.item()

    def _attack(self, rows: list[TokenRow]) -> dict[Site, Tensor]:
        settings, attack = self.settings, self.settings.attack
        weight = self.model.get_input_embeddings().weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        longest = max(len(r.prompt) for r in rows)
        free = torch.tensor(
            [[[float(i < len(r.prompt))] for i in range(longest)] for r in rows],
            device=weight.device,
        )
        shape = (len(rows), longest, weight.shape[1])
        deltas = {
            s: torch.zeros(shape, dtype=wide, device=weight.device, requires_grad=True)
            for s in self.eps
        }
        optimiser = torch.optim.AdamW(deltas.values(), lr=attack.lr or ADAM_LR)
        for _ in range(attack.steps):
            optimiser.zero_grad()
            with _added(self.model, deltas):
                toward, _ = self._token_losses(rows, 0, toward=True)
                away, _ = self._token_losses(rows, 1, toward=False)
                loss = attack.toward * _row_mean(toward) + attack.away * _row_mean(away)
                loss.backward()
            for delta in deltas.values():
                delta.grad.mul_(free)
            if attack.rule == "adamw":
                optimiser.step()
            for site, delta in deltas.items():
                _move(delta, attack, self.eps[site])
        self.optimiser.zero_grad()
        assert settings.clean_share == 0.0, "the naive step attacks every row"
        return {s: d.detach() for s, d in deltas.items()}

    def _token_losses(
        self, rows: list[TokenRow], which: int, toward: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Losses of the tokens of one completion, a tensor for each row, and the logits behind
        them.
        """
        logits = self._logits(self.model, rows, which)
        log_p = logits.to(
            torch.float64 if logits.dtype == torch.float64 else torch.float32
        ).log_softmax(-1)
        out = []
        for row, scores in zip(rows, log_p, strict=True):
            first = len(row.prompt) - 1
            completion = row.completions[which]
            own = scores[first : first + len(completion)].gather(
                1, torch.tensor(completion, device=scores.device)[:, None]
            )
            own = own.squeeze(1)
            out.append(-own if toward else torch.where(own < -5, 0.0, -torch.log1p(-own.exp())))
        return out, log_p

    @staticmethod
    def _logits(model: nn.Module, rows: list[TokenRow], which: int) -> Tensor:
        """[batch, seq, vocabulary] of right-padded rows."""
        device = model.get_input_embeddings().weight.device
        ids = []
        for row in rows:
            ids.append(torch.tensor(row.prompt + row.completions[which][:-1]))
        ones = [torch.ones_like(own) for own in ids]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        mask = nn.utils.rnn.pad_sequence(ones, batch_first=True)
        inputs = {"input_ids": padded.to(device), "attention_mask": mask.to(device)}
        return model(**inputs, use_cache=False).logits

    def _harmful_backward(
        self, rows: list[TokenRow], deltas: dict[Site, Tensor], tokens: dict[str, int]
    ) -> Tensor:
        c = self.settings.defence
        with _added(self.model, deltas):
            toward, _ = self._token_losses(rows, 1, toward=True)
            away, _ = self._token_losses(rows, 0, toward=False)
            loss = c.toward * torch.cat(toward).sum() / tokens["chosen"]
            loss = loss + c.away * torch.cat(away).sum() / tokens["rejected"]
            loss.backward()
        return loss.detach()

    def _benign_backward(self, rows: list[TokenRow], tokens: dict[str, int]) -> Tensor:
        c = self.settings.defence
        nll, new = self._token_losses(rows, 0, toward=True)
        with torch.no_grad():
            logits = self._logits(self.teacher, rows, 0)
            old = logits.to(new.dtype).log_softmax(-1)
        kl = F.kl_div(new, old, log_target=True, reduction="none").sum(-1)
        counted = [
            kl[i, len(r.prompt) - 1 : len(r.prompt) - 1 + len(r.completions[0])].sum()
            for i, r in enumerate(rows)
        ]
        loss = (c.kl * sum(counted) + c.sft * torch.cat(nll).sum()) / tokens["benign"]
        loss.backward()
        return loss.detach()


def label_tokens(harmful: list[TokenRow], benign: list[TokenRow]) -> dict[str, int]:
    """Label tokens of the whole batch, by which every sum is divided."""
    return {
        "rejected": sum(len(r.completions[0]) for r in harmful),
        "chosen": sum(len(r.completions[1]) for r in harmful),
        "benign": sum(len(r.completions[0]) for r in benign),
    }


def micro_batches(rows: list[TokenRow], size: int) -> Iterator[list[TokenRow]]:
    """Rows as they come, `size` at a time."""
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def _row_mean(losses: list[Tensor]) -> Tensor:
    """Sum over rows of the mean over each row's tokens."""
    return torch.stack([row.mean() for row in losses]).sum()


@torch.no_grad()
def _move(delta: Tensor, attack, eps: float) -> None:
    """Take the step of `sign` or `l2` (AdamW's is taken), then project every position onto the
    ball.
    """
    length = (attack.lr or 2 / attack.steps) * eps
    gradient = delta.grad
    if attack.rule == "sign":
        delta -= length * gradient.sign() / delta.shape[-1] ** 0.5
    if attack.rule == "l2":
        norm = gradient.norm(dim=-1, keepdim=True)
        delta -= length * gradient / norm.clamp(min=1e-30)
    norm = delta.norm(dim=-1, keepdim=True)
    scale = torch.where(norm > eps, eps / norm, torch.ones_like(norm))
    delta.mul_(scale)


@contextmanager
def _added(model: nn.Module, deltas: Mapping[Site, Tensor]) -> Iterator[None]:
    """Hooks that add each site's delta to the prompt positions of the residual stream."""

    def add(stream: Tensor, delta: Tensor) -> Tensor:
        padding = stream.shape[1] - delta.shape[1]
        return stream + F.pad(delta, (0, 0, 0, padding)).to(stream.dtype)

    handles = []
    for site, delta in deltas.items():
        if site == EMBEDDING:
            hook = model.get_input_embeddings().register_forward_hook(
                lambda _m, _a, out, d=delta: add(out, d)
            )
        else:
            hook = blocks_of(model)[site].register_forward_hook(
                lambda _m, _a, out, d=delta: (
                    (add(out[0], d), *out[1:]) if isinstance(out, tuple) else add(out, d)
                )
            )
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
