"""What is said while a model trains and something is wrong with the training itself. (A model that
refuses or babbles is seen by `validation`.)

Each is one line on stderr:
1. A skipped update, every time, with the rows of its step: their loss or gradient was not finite.
2. Once, a loss that does not change over STILL steps, or no gradient in any of them: nothing is
   learned any more.
3. Once, benign rows on which the loss has risen from its lowest by half of what a guess among all
   tokens costs, and stayed there for STILL steps: the model is broken. (Where an attack begins, it
   may rise as far for a few steps.)
"""

from __future__ import annotations

import math
import sys
from collections import deque

from latlib.train import Metrics, Trainer

STILL = 10  # steps
SAME = 1e-6  # relative: a loss that moves less does not change


class Alarms:
    """Looks at what every step logs. name: of the model."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self.trainer, self.name = trainer, name
        self.totals: deque[float] = deque(maxlen=STILL)
        self.gradients: deque[float] = deque(maxlen=STILL)  # norms
        self.guess = math.log(len(trainer.lm.model.get_input_embeddings().weight))
        self.benign: deque[float] = deque(maxlen=STILL)  # nats a token
        self.lowest = math.inf  # of them
        self.said: set[str] = set()

    def after(self, step: int, metrics: Metrics) -> None:
        """Say what is wrong after a step."""
        if metrics["skipped"]:
            self._say("skipped", f"step {step} was not finite and is skipped: {self._rows(step)}")
        if "total" not in metrics:
            return
        self.totals.append(metrics["total"])
        middle = abs(self.totals[0])
        still = max(self.totals) - min(self.totals) <= SAME * middle
        if still and len(self.totals) == STILL:
            self._say("still", f"the loss is {middle:.3g} for {STILL} steps: lower train.lr")
        self.gradients.append(metrics["grad_norm"])
        if len(self.gradients) == STILL and not any(self.gradients):
            self._say("still", f"the gradient is 0 for {STILL} steps: lower train.lr")
        nats = self._benign(metrics)
        self.benign.append(nats)
        self.lowest = min(self.lowest, nats)
        if min(self.benign) > self.lowest + self.guess / 2:
            change = f"from {self.lowest:.1f} to {nats:.1f} nats a token"
            self._say("worse", f"the loss on benign rows rose {change}: lower train.lr")

    def _benign(self, metrics: Metrics) -> float:
        """Nats a benign token, of the terms that are in nats."""
        defence = self.trainer.settings.defence
        terms = {"sft": defence.sft}
        if defence.kl_mode == "token":
            terms["kl"] = defence.kl
        found = [metrics[name] / weight for name, weight in terms.items() if name in metrics]
        return max(found, default=0.0)

    def _rows(self, step: int) -> str:
        names = ("harmful", "benign")
        schedules = zip(names, self.trainer.schedules, strict=True)
        return ", ".join(f"{name} rows {own.rows(step - 1)}" for name, own in schedules)

    def _say(self, kind: str, text: str) -> None:
        if kind not in self.said or kind == "skipped":
            print(f"training: {self.name}: {text}", file=sys.stderr, flush=True)
        self.said.add(kind)
