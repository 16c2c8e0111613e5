"""What a step takes at sizes this machine cannot hold: a step's allocations on the meta device, where tensors have
shapes and no data.

The whole step runs (every micro-batch's attack, then the defence, forward and backward) under `measure.StorageTracker`.
The engine runs the stock modules, as every model of that size does. Three things differ from a GPU's step:
1. attention is the GPU's memory-efficient kernel (PyTorch would write out the scores on meta);
2. questions about values ("is nothing padded?") are answered with yes;
3. the optimiser does not step: its two moments are added by their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from measure import StorageTracker, bytes_of, flop_counter
from naive import NaiveTrainer, label_tokens, micro_batches
from shapes import Shape, build, computing_in, rows, train_settings
from torch import Tensor

from latlib import attack, train
from latlib.attack import pgd, radii
from latlib.data import Batch, Schedule
from latlib.train import MicroBatch, Trainer


class _Unoptimised(Trainer):
    """A trainer without its optimiser, whose fused kernels know no meta device; batches are made on the CPU."""

    def __init__(self, lm, harmful, benign, settings) -> None:
        self.lm = SimpleNamespace(network=lm.network, device=torch.device("cpu"), n_layers=lm.n_layers)
        self.settings, self.harmful, self.benign, self.step = settings, harmful, benign, 0
        self.schedules = (Schedule(len(harmful), settings.batch, 0), Schedule(len(benign), settings.benign_batch, 1))

    def parts(self) -> list[MicroBatch]:
        """A step's micro-batches."""
        return self._micro_batches(True, torch.Generator().manual_seed(0))


def predict(shape: Shape, dtype: torch.dtype, naive: bool = False) -> dict[str, float]:
    """Bytes of the weights, the adapter, its optimiser, the peak beyond them, their sum; and the FLOPs of a step."""
    lm = computing_in(build(shape, dtype, "meta"), dtype, "stock")
    adapter = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
    data = (rows(shape, shape.batch, 2), rows(shape, shape.batch, 1))
    run = _naive_step if naive else _engine_step
    step, base = run(lm, *data, train_settings(shape))
    with flop_counter() as flops, StorageTracker() as memory:
        step()
    found = {
        "weights_bytes": bytes_of([*lm.model.parameters(), *base]) - bytes_of(adapter),
        "adapter_bytes": bytes_of(adapter),
        "optimiser_bytes": 2 * bytes_of(adapter),
        "peak_bytes": memory.peak,  # activations, perturbations and the adapter's gradients
    }
    return {
        **found,
        "total_bytes": sum(found.values()),
        "flop": flops.get_total_flops(),
        "largest_elements": memory.largest[0],
        "largest_operator": memory.largest[1],
    }


def _engine_step(lm, harmful, benign, settings):
    trainer = _Unoptimised(lm, harmful, benign, settings)
    parts, free = [], {}
    for part in trainer.parts():
        prompt = attack.perturbed_positions(part.attacked, settings.attack.positions).sum().item()
        moved = MicroBatch(part.attacked.to("meta"), part.benign.to("meta"), part.clean.to("meta"))
        parts.append(moved)
        free[moved.attacked] = prompt

    def step() -> None:
        with _on_meta(free):
            taught = trainer._taught(parts)
            network, eps = lm.network(train=True), radii(settings.attack, lm.n_layers)
            attacker, tokens = network.frozen(), train._label_tokens(parts)
            deltas = [pgd(attacker, p.attacked, eps, settings.attack, judged=False).deltas for p in parts]
            for part, delta in zip(taught, deltas, strict=True):
                for terms in trainer.defence_terms(network, part, delta, tokens):
                    torch.stack(list(terms.values())).sum().backward()
                    network.settle()

    return step, []


def _naive_step(lm, harmful, benign, settings):
    trainer = NaiveTrainer(lm.model, harmful, benign, settings, 0, radii(settings.attack, lm.n_layers))
    tokens = label_tokens(harmful, benign)

    def step() -> None:
        with _on_meta({}):
            parts = list(micro_batches(harmful, trainer.micro_batch))
            deltas = [trainer._attack(part) for part in parts]
            for part, delta in zip(parts, deltas, strict=True):
                trainer._harmful_backward(part, delta, tokens)
            for part in micro_batches(benign, trainer.micro_batch):
                trainer._benign_backward(part, tokens)

    return step, list(trainer.teacher.parameters())


@contextmanager
def _on_meta(free: dict[Batch, int]) -> Iterator[None]:
    """What lets a step run without data. free: how many positions each batch's attack perturbs."""
    truth = torch.Tensor.__bool__
    with ExitStack() as changes:
        enter = changes.enter_context
        enter(patch.object(torch.Tensor, "__bool__", lambda t: True if t.is_meta else truth(t)))
        enter(patch.object(F, "scaled_dot_product_attention", _efficient_attention))
        enter(patch("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True))
        enter(patch.object(attack, "perturbed_positions", lambda b, positions: torch.ones(free[b], device="meta")))
        yield


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The GPU's kernel that keeps no scores; q [batch, heads, seq, head_dim], keys repeated where they are fewer."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[0]
