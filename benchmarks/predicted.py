"""What a step takes at sizes this machine cannot hold: `latlib.planning.step_cost` on the
benchmark's shapes, and the naive step under the same counters.
"""

from __future__ import annotations

import torch
from naive import NaiveTrainer, label_tokens, micro_batches
from shapes import Shape, build, computing_in, rows, train_settings

from latlib.planning.step_cost import FLOP, PEAK, StepCounter, memory_of, step_counts, without_data
from latlib.train import Trainer


def predict(shape: Shape, dtype: torch.dtype, naive: bool = False) -> dict[str, float]:
    """Bytes of the weights, the adapter, its optimiser, the peak beyond them, their sum; and the
    FLOPs of a step.
    """
    lm = computing_in(without_data(build(shape, dtype, "meta")), dtype, "stock")
    settings = train_settings(shape)
    harmful = rows(shape, shape.batch, 2)
    benign = rows(shape, shape.batch, 1)
    if naive:
        radius = settings.attack.threat_model(lm.n_layers).radius
        trainer = NaiveTrainer(lm.model, harmful, benign, settings, 0, radius)
        found = naive_step(trainer)
        memory, flop = memory_of(lm, found.peak, copies=trainer.teacher.parameters()), found.flop
    else:
        counts = step_counts(Trainer(lm, harmful, benign, settings, 0))
        memory, flop = memory_of(lm, int(counts[:, PEAK].max())), int(counts[-1, FLOP])
    return {
        "weights_bytes": memory.weights,
        "adapter_bytes": memory.adapter,
        "optimiser_bytes": memory.optimiser,
        "peak_bytes": memory.peak,  # activations, perturbations and the adapter's gradients
        "total_bytes": memory.total,
        "flop": flop,
    }


def naive_step(trainer: NaiveTrainer) -> StepCounter:
    """What a naive step takes, without its optimiser."""
    harmful, benign = trainer.harmful, trainer.benign
    tokens = label_tokens(harmful, benign)
    with StepCounter() as counter:
        parts = list(micro_batches(harmful, trainer.micro_batch))
        deltas = [trainer._attack(part) for part in parts]
        for part, delta in zip(parts, deltas, strict=True):
            trainer._harmful_backward(part, delta, tokens)
        for part in micro_batches(benign, trainer.micro_batch):
            trainer._benign_backward(part, tokens)
    return counter
