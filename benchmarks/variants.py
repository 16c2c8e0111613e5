"""The ways to take a LAT step that are compared: naive, the engine, the engine with one point off,
and the path from all points off to the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from naive import NaiveTrainer
from shapes import Shape, build, computing_in, rows, train_settings
from switches import POINTS, SwitchedTrainer
from torch import Tensor

from latlib.models import LanguageModel


@dataclass(frozen=True)
class Variant:
    """off: points of the engine that are turned off. micro_batch: rows at a time (None: the
    shape's). forward: as in `ModelSettings`. compiled: blocks run through torch.compile (stock
    forward only)."""

    name: str
    off: tuple[str, ...] = ()
    micro_batch: int | None = None
    forward: str = "auto"
    shared_forward: bool = False
    compiled: bool = False
    naive: bool = False


NAIVE = Variant("naive", micro_batch=NaiveTrainer.micro_batch, naive=True)
ENGINE = Variant("engine")
EQUAL = Variant("engine at naive's micro-batch", micro_batch=NaiveTrainer.micro_batch)


def alone(lean: bool) -> list[Variant]:
    """The engine with one point off, or one setting changed. lean: whether the engine runs the lean
    forward.
    """
    out = [Variant(f"{point} off", off=(point,)) for point in POINTS]
    out.append(Variant("shared forward", shared_forward=True))
    return (
        [*out, Variant("stock modules", forward="stock")]
        if lean
        else [*out, Variant("compiled", compiled=True)]
    )


def path(lean: bool) -> list[Variant]:
    """From all points off, over the stock modules at naive's micro-batch, to the engine, a point at
    a time.

    Sorting is what lets more rows go together, so the engine's own micro-batch comes with it.
    """
    few = NaiveTrainer.micro_batch
    out = [Variant("all points off", off=POINTS, micro_batch=few, forward="stock")]
    for number, point in enumerate(POINTS[:-1], start=1):
        out.append(Variant(f"+ {point}", off=POINTS[number:], micro_batch=few, forward="stock"))
    return [*out, Variant("+ sorted, micro-batch", forward="stock")] if lean else out


def choose(names: str, lean: bool) -> list[Variant]:
    """Variants by name or group ('all', 'alone', 'path', 'equal'), comma-separated.

    Raises ValueError for a name there is not.
    """
    groups = {"equal": [EQUAL], "alone": alone(lean), "path": path(lean)}
    groups["all"] = [NAIVE, ENGINE, EQUAL, *groups["alone"], *groups["path"]]
    known = {variant.name: [variant] for variant in groups["all"]} | groups
    chosen: dict[Variant, None] = {}  # each once, in order
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"no variant {name!r}: choose from {', '.join(known)}")
        chosen.update(dict.fromkeys(known[name]))
    return list(chosen)


@dataclass
class Bench:
    """One shape on one device: rows, models (one for each dtype of weights, shared by variants),
    and steps to time.
    """

    shape: Shape
    device: torch.device
    seed: int = 0
    _models: dict[torch.dtype, LanguageModel] = field(default_factory=dict)
    _adapters: dict[torch.dtype, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.harmful = rows(self.shape, self.shape.batch, 2, self.seed)
        self.benign = rows(self.shape, self.shape.batch, 1, self.seed)

    def language_model(self, variant: Variant, dtype: torch.dtype) -> LanguageModel:
        """The weights a variant runs on, computing in `dtype`. The lean forward computes in bf16
        over float32 weights, stock modules (naive's too) in the dtype of their weights."""
        forward = "stock" if variant.naive else variant.forward
        stored = dtype if dtype != torch.bfloat16 or not self.lean(forward) else torch.float32
        if stored not in self._models:
            self._models[stored] = build(self.shape, stored, self.device, seed=self.seed)
            self._adapters[stored] = [p.detach().clone() for p in _adapter(self._models[stored])]
        return computing_in(self._models[stored], dtype, forward, variant.compiled)

    def lean(self, forward: str = "auto") -> bool:
        """Whether a variant with this forward runs the lean one (a question of size and family,
        asked on meta).
        """
        key = "_lean_" + forward
        if key not in self.__dict__:
            on_meta = build(self.shape, torch.float32, "meta")
            self.__dict__[key] = computing_in(on_meta, torch.float32, forward).paths.lean
        return self.__dict__[key]

    def trainer(self, variant: Variant, dtype: torch.dtype):
        """A trainer whose `train_step` is what is timed."""
        lm = self.language_model(variant, dtype)
        settings = train_settings(self.shape, variant.micro_batch, variant.shared_forward)
        if variant.naive:
            eps = settings.attack.threat_model(lm.n_layers).radius
            return NaiveTrainer(lm.model, self.harmful, self.benign, settings, self.seed, eps)
        return SwitchedTrainer(lm, self.harmful, self.benign, settings, self.seed, off=variant.off)

    def step(self, trainer) -> Callable[[], float]:
        """The same step each time, from the same adapter; the call returns the total loss."""
        for stored, lm in self._models.items():
            if lm.model is (
                trainer.model if isinstance(trainer, NaiveTrainer) else trainer.lm.model
            ):
                restore = list(zip(_adapter(lm), self._adapters[stored], strict=True))
        with torch.no_grad():
            for parameter, value in restore:
                parameter.copy_(value)
        trainer.optimiser.zero_grad()
        trainer.step = 0

        def run() -> float:
            found = trainer.train_step()
            return found["total"] if isinstance(found, dict) else found

        return run

    def products(self, micro_batch: int) -> list[tuple[int, int, int]]:
        """(tokens, in, out) of one block's matrix products for a packed micro-batch of rows of mean
        length.
        """
        s = self.shape
        size = getattr(s.model_config(), "head_dim", None) or s.d_model // s.heads
        tokens = micro_batch * sum(row.length for row in self.harmful) // len(self.harmful)
        wide = s.heads * size
        return [
            (tokens, s.d_model, wide + 2 * s.kv_heads * size),
            (tokens, wide, s.d_model),
            (tokens, s.d_model, 2 * s.ffn),
            (tokens, s.ffn, s.d_model),
        ]

    @property
    def tokens(self) -> int:
        """Tokens of a step's rows, each prompt once and without padding."""
        return sum(row.length for row in (*self.harmful, *self.benign))


def _adapter(lm: LanguageModel) -> list[Tensor]:
    return [p for n, p in lm.model.named_parameters() if "lora_" in n]


def with_changes(shape: Shape, micro_batch: int | None, steps: int | None) -> Shape:
    """A shape with what the command line changes."""
    changes = {"micro_batch": micro_batch, "steps": steps}
    return replace(shape, **{name: value for name, value in changes.items() if value is not None})
