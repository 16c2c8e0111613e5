"""What a training step takes in bytes and FLOPs, before there are weights: the trainer's own step
on tensors that have shapes and no data.

1. `fake_model(config, ...)` builds any Hugging Face decoder under its adapter from torch's
   FakeTensors, in no memory. Tokens, masks and indices stay real, so that all that depends on them
   is as in a real step.
2. `step_counts` runs `Trainer.train_step` on it under `StepCounter`: what the trainer does is what
   is counted, stage by stage (attack, then each backward pass). The stock modules run, as for every
   model too large for `latlib.fused`, and attention is the CPU's fused kernel, which keeps no
   scores, as the GPU's keeps none.
3. `_counted` says what one micro-batch takes at the model's depth. Where all blocks are of one
   kind, twins of one and two blocks tell: at each stage a block above the lowest site adds what any
   other there adds, so does one below it, where the attack does not go, and so does a further site.
   Only within a stage: which stage holds most depends on the depth.
4. `predicted_memory`: every further micro-batch adds what is kept until the updates (perturbations,
   the teacher's rows), and the gradients of the adapter are there when the second one needs most.
5. `predicted_flop`: every further PGD step adds what the second one adds before the first update;
   every further update takes what the second one takes (the first also judges the attack); a step
   takes so many times what a micro-batch takes.
6. `on_each_gpu` says what one of several processes holds.

The counter is ours and its formulas are torch's, because (torch 2.13; docs/lab-log.md) torch's
`FlopCounterMode` ends in an error where a forward takes gradients of its own, as losses over a
large vocabulary do, and torch's `MemTracker` in one where weights are frozen for a while. Without
its module hooks, which it has no switch for, `MemTracker` finds .6 % more than a CPU allocates.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig

from latlib.batch import TokenRow
from latlib.blocks import blocks_of
from latlib.config.sections import LoraSettings, ModelSettings, TrainSettings
from latlib.fused.products import OPERATOR
from latlib.io.hub import quietly
from latlib.models import LanguageModel, with_adapter
from latlib.network import StockNetwork
from latlib.objectives import OBJECTIVES
from latlib.threat import EMBEDDING, Site, depth, resolve_sites
from latlib.train import Trainer

aten = torch.ops.aten


def _of_linear(x: Tensor, weight: Tensor, *arguments: Any, out_val: Tensor) -> int:
    return 2 * x.numel() * weight.shape[0]


class StepCounter(TorchDispatchMode):
    """Counts what operators inside the context take, on real tensors and on fake ones.

    flop: of matrix products and attention, by the formulas of `torch.utils.flop_counter`. live,
    peak: bytes of the storages that operators allocated, now and at most. largest: (elements,
    operator) of the largest single allocation. What operators allocate and free within themselves
    is not seen. Questions about the values of a fake tensor are answered with 1.
    """

    # torch has no formula for the CPU's fused attention, whose arguments are the GPU's, nor for
    # products by oneDNN
    _formulas = {
        **flop_registry,
        OPERATOR: _of_linear,
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
            aten._scaled_dot_product_flash_attention
        ],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0
        self.live = 0
        self.peak = 0
        self.largest: tuple[int, str] = (0, "nothing")
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:
                return args[0].fake_device
            if func is aten._local_scalar_dense.default:
                return 1.0
            if func is aten.index.Tensor:
                args = (args[0], [_without_mask(index) for index in args[1]])
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            self._note(tensor, (args, kwargs), func)
        return out

    def _note(self, tensor: Tensor, arguments: Any, operator: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        # a view or in-place change of something older than the context
        if any(given.untyped_storage()._cdata == key for given in _tensors(arguments)):
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, (size // tensor.element_size(), str(operator)))
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _without_mask(index: Tensor | None) -> Tensor | None:
    """The positions of a real mask: a fake tensor cannot be indexed by one."""
    if index is None or index.dtype != torch.bool:
        return index
    return index.nonzero().squeeze(1)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Memory:
    """What a training step holds, in bytes. weights: of the frozen model (and of further copies of
    it); optimiser: its moments; peak: beyond these at the step's worst moment (activations,
    perturbations, gradients of the adapter)."""

    weights: int
    adapter: int
    optimiser: int
    peak: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.optimiser + self.peak


def memory_of(lm: LanguageModel, peak: int, copies: Iterable[Tensor] = ()) -> Memory:
    """Of a model whose step has this peak. copies: further weights that are kept beside it."""
    adapter = bytes_of(adapter_of(lm))
    weights = bytes_of([*lm.model.parameters(), *copies]) - adapter
    return Memory(weights, adapter, 2 * adapter, peak)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row's prompt and of each of its completions."""

    prompt: int
    completion: int

    def rows(self, n: int, completions: int, vocabulary: int) -> list[TokenRow]:
        """`n` rows of this length, of random tokens."""
        generator = torch.Generator().manual_seed(0)

        def tokens(*shape: int) -> list[Any]:
            return torch.randint(vocabulary, shape, generator=generator).tolist()

        prompts = tokens(n, self.prompt)
        replies = tokens(n, completions, self.completion)
        return [TokenRow(tuple(p), tuple(map(tuple, own))) for p, own in zip(prompts, replies)]


def random_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    lora: LoraSettings,
    device: torch.device | str,
    forward: Literal["auto", "stock", "lean"] = "stock",
) -> LanguageModel:
    """The model of a config with random weights under a new adapter, made where it stays.

    dtype: of the frozen weights; the adapter's is peft's choice. forward: as in `ModelSettings`.
    Raises SettingError when a target of the adapter does not exist.
    """
    with torch.random.fork_rng(), torch.device(device), quietly():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        lm = LanguageModel(model, None, ModelSettings(forward=forward), dtype)
        return with_adapter(lm, lora, 0)


def fake_model(config: PretrainedConfig, dtype: torch.dtype, lora: LoraSettings) -> LanguageModel:
    """`random_model` without data. Raises SettingError as it does."""
    return without_data(random_model(config, dtype, lora, "meta"))


def without_data(lm: LanguageModel) -> LanguageModel:
    """A model on the meta device, its weights changed to fake ones that say they are on the CPU;
    tied matrices stay tied.
    """
    model: Any = lm.model
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.get_base_model().tie_weights()
    return lm


def adapter_of(lm: LanguageModel) -> list[Tensor]:
    """The weights that are trained."""
    return [weight for name, weight in lm.model.named_parameters() if "lora_" in name]


def random_trainer(lm: LanguageModel, settings: TrainSettings, lengths: Lengths) -> Trainer:
    """A trainer at `settings` on rows of these lengths and random tokens."""
    config: Any = lm.model.config
    harmful = lengths.rows(settings.batch, 2, config.vocab_size)
    benign = lengths.rows(settings.benign_batch, 1, config.vocab_size)
    # of a relative eps: its size plays no part
    norms = dict.fromkeys((EMBEDDING, *range(lm.n_layers)), 1.0)
    return Trainer(lm, harmful, benign, settings, 0, norms)


PEAK, LIVE, FLOP = range(3)  # columns of a step's counts


def step_counts(trainer: Trainer) -> np.ndarray:
    """[stages, 3] counts of one step of a trainer whose model has no data: the peak bytes within
    each stage; bytes held and FLOPs so far at its end. An update begins with a stage of its own.
    """
    optimiser = trainer.optimiser
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()  # the moments are there
    optimiser.zero_grad()
    counter = StepCounter()
    stages: list[tuple[int, int, int]] = []

    def end_stage(*_: Any) -> None:
        stages.append((counter.peak, counter.live, counter.flop))
        counter.peak = counter.live

    def zero_grad() -> None:
        end_stage()
        type(optimiser).zero_grad(optimiser)

    # with the first an update begins, with the second a backward pass ends
    updates = patch.object(optimiser, "zero_grad", zero_grad)
    passes = patch.object(StockNetwork, "flush_gradients", end_stage)
    with updates, passes, counter:
        trainer.train_step()
    end_stage()
    return np.array(stages)


def has_attack(settings: TrainSettings) -> bool:
    """Whether the first step of a training does."""
    return settings.attack.steps > 0 and settings.attack_after == 0


_ROW = TokenRow((1,), ((1,), (1,)))  # stands for any


def micro_batches(settings: TrainSettings, processes: int = 1) -> tuple[int, int, int]:
    """(micro-batches of a first step, harmful rows in the largest, benign rows in the largest), as
    `Trainer` cuts them; benign rows that an attack perturbs are not counted as harmful.
    """
    objective = OBJECTIVES[settings.objective](settings)
    harmful = [_ROW] * settings.batch
    benign = [_ROW] * settings.benign_batch
    attacked, others = objective.rows(harmful, benign, has_attack(settings))
    most = max(len(attacked), len(others))
    count = _quotient(most, settings.micro_batch)
    count = min(count, len(attacked))
    count = _quotient(count, processes) * processes
    largest_harmful = _quotient(settings.batch, count)
    largest_benign = _quotient(settings.benign_batch, count)
    return count, largest_harmful, largest_benign


def _quotient(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def predicted_memory(
    lm: LanguageModel, settings: TrainSettings, lengths: Lengths, processes: int = 1
) -> Memory:
    """What a first step holds on rows that are all of these lengths; see point 4 of the module's
    docstring. Of several processes: one, which runs its share of the micro-batches.
    """
    one = _counted(lm, settings, lengths)
    found = memory_of(lm, int(one[:, PEAK].max()))
    further = micro_batches(settings, processes)[0] // processes - 1
    if not further:
        return found
    gradients, kept = found.adapter, int(one[0, LIVE])
    return replace(found, peak=found.peak + gradients + further * kept)


def predicted_flop(lm: LanguageModel, settings: TrainSettings, lengths: Lengths) -> float:
    """FLOPs of a first step, of all processes, on rows that are all of these lengths; see point 5
    of the module's docstring."""
    # whatever is perturbed above the lowest site takes no matrix product more
    lowest = resolve_sites(settings.attack.sites, lm.n_layers)[:1]
    settings = _changed(settings, lowest)
    iterations = settings.iterations
    one = _counted(lm, settings, lengths, updates=min(2, iterations))[:, FLOP]
    flop = one[-1]
    if iterations > 2:
        second_begins = one[len(one) // 2]
        flop += (iterations - 2) * (one[-1] - second_begins)
    further = settings.attack.steps - 1
    if has_attack(settings) and further:
        two = _counted(lm, settings, lengths, steps=2)[:, FLOP]
        flop += further * (two[0] - one[0])
    _, harmful, benign = micro_batches(settings)
    # rows, not micro-batches: the last may be smaller
    share = min(harmful / settings.batch, benign / settings.benign_batch)
    return float(flop / share)


def _changed(settings: TrainSettings, sites: tuple[Site, ...]) -> TrainSettings:
    attack = settings.attack.model_copy(update={"sites": sites})
    return settings.model_copy(update={"attack": attack})


def _counted(
    lm: LanguageModel, settings: TrainSettings, lengths: Lengths, steps: int = 1, updates: int = 1
) -> np.ndarray:
    """`step_counts` of one micro-batch of a first step, with at most so many PGD steps and so many
    updates; see point 3 of the module's docstring."""
    _, harmful, benign = micro_batches(settings)
    attack = {"steps": min(steps, settings.attack.steps)}
    changes = {
        "batch": harmful,
        "benign_batch": benign,
        "micro_batch": harmful + benign,
        "iterations": updates,
        "attack": settings.attack.model_copy(update=attack),
    }
    few = settings.model_copy(update=changes)
    # sites that are shares of all blocks, and blocks of several kinds, have no twins of few
    if settings.objective == "rerouting" or not _alike(blocks_of(lm.model)):
        return step_counts(random_trainer(lm, few, lengths))

    def twin(below: int, above: int, sites: int = 1) -> np.ndarray:
        depths = range(below, below + sites)
        at: tuple[Site, ...] = tuple(n - 1 if n else EMBEDDING for n in depths)
        return _counts_of_twin(lm, below + above, _changed(few, at), lengths)

    sites: tuple[Site, ...] = (EMBEDDING,)
    if has_attack(settings):
        sites = resolve_sites(settings.attack.sites, lm.n_layers)
    below = depth(sites[0])
    one, two = twin(0, 1), twin(0, 2)
    found = one + (lm.n_layers - below - 1) * (two - one)
    if below:
        found = found + below * (twin(1, 1) - one)
    if len(sites) > 1:
        found = found + (len(sites) - 1) * (twin(0, 2, sites=2) - two)
    return found


def _alike(blocks: Iterable[nn.Module]) -> bool:
    shapes = {tuple(weight.shape for weight in block.parameters()) for block in blocks}
    return len(shapes) == 1


@lru_cache(maxsize=32)
def _counts_of_twin(
    lm: LanguageModel, blocks: int, settings: TrainSettings, lengths: Lengths
) -> np.ndarray:
    """Methods of a profile share what differs in its sites only."""
    return step_counts(random_trainer(_with_blocks(lm, blocks), settings, lengths))


@lru_cache(maxsize=2)
def _with_blocks(lm: LanguageModel, blocks: int) -> LanguageModel:
    """The model with another number of blocks."""
    model: Any = lm.model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = blocks
    # Gemma 2, Qwen 2: which kind of attention each block has
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * blocks)[:blocks]
    own = next(iter(model.peft_config.values()))
    lora = LoraSettings(r=own.r, alpha=float(own.lora_alpha), targets=tuple(own.target_modules))
    return fake_model(config, lm.dtype, lora)


def on_each_gpu(found: Memory, lm: LanguageModel, processes: int, mode: str) -> Memory:
    """What one of `processes` holds, from the prediction of its share of the rows.

    ddp: everything. fsdp2: weights, adapter and moments are divided; full stay the activations and
    perturbations of its own rows, and, gathered while they run, the embedding and output matrices
    and two blocks (one computes, the next is fetched).
    """
    if mode != "fsdp2" or processes == 1:
        return found
    blocks = [bytes_of(block.parameters()) for block in blocks_of(lm.model)]
    gathered = found.weights + found.adapter - sum(blocks[2:])
    return Memory(
        weights=_quotient(found.weights, processes),
        adapter=_quotient(found.adapter, processes),
        optimiser=_quotient(found.optimiser, processes),
        peak=found.peak + gathered - gathered // processes,
    )
