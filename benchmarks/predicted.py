"""What a step takes at sizes this machine cannot hold: `latlib.planning.step_cost` on the
benchmark's shapes, and the naive step under the same counters.
"""

from __future__ import annotations

import torch
from naive import NaiveTrainer, label_tokens, micro_batches
from shapes import Shape, build, computing_in, rows, train_settings

from latlib.planning.step_cost import Prediction, counted, whole_step


def predict(shape: Shape, dtype: torch.dtype, naive: bool = False) -> dict[str, float]:
    """Bytes of the weights, the adapter, its optimiser, the peak beyond them, their sum; and the
    FLOPs of a step.
    """
    lm = computing_in(build(shape, dtype, "meta"), dtype, "stock")
    data, settings = (
        (rows(shape, shape.batch, 2), rows(shape, shape.batch, 1)),
        train_settings(shape),
    )
    found = _naive_step(lm, *data, settings) if naive else whole_step(lm, *data, settings)
    return {
        "weights_bytes": found.weights,
        "adapter_bytes": found.adapter,
        "optimiser_bytes": found.optimiser,
        "peak_bytes": found.peak,  # activations, perturbations and the adapter's gradients
        "total_bytes": found.total,
        "flop": found.flop,
        "largest_elements": found.largest[0],
        "largest_operator": found.largest[1],
    }


def _naive_step(lm, harmful, benign, settings) -> Prediction:
    trainer = NaiveTrainer(
        lm.model, harmful, benign, settings, 0, settings.attack.threat_model(lm.n_layers).radius
    )
    tokens = label_tokens(harmful, benign)

    def step() -> None:
        parts = list(micro_batches(harmful, trainer.micro_batch))
        deltas = [trainer._attack(part) for part in parts]
        for part, delta in zip(parts, deltas, strict=True):
            trainer._harmful_backward(part, delta, tokens)
        for part in micro_batches(benign, trainer.micro_batch):
            trainer._benign_backward(part, tokens)

    return counted(lm, step, trainer.teacher.parameters())
