"""What a training step takes in bytes and FLOPs, before there are weights: the step itself on the
meta device, where tensors have shapes and no data.

1. `meta_model(config, ...)` builds any Hugging Face decoder under its adapter, in no memory.
2. `whole_step` runs `Trainer.train_step` on it under `counters.StepCounter`: what the trainer does
   is what is counted. Three things differ from a GPU's step: attention is the GPU's kernel that
   keeps no scores (PyTorch would write them out on meta), questions about values are answered with
   1 or yes, and the optimiser does not step: its two moments are added by their size. The stock
   modules run, as for every model too large for `lean`.
3. `predicted_step` runs as little of it as says everything, on twins of two and three blocks. All
   micro-batches have one shape, so FLOPs are linear in their number, in the PGD steps, in the
   updates and in the blocks below and above the lowest site; the peak is linear in the blocks, the
   sites and the micro-batches (each keeps its perturbations and the teacher's rows).
4. `on_each_gpu` says what one of several processes holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from latlib import attack
from latlib.batch import Batch, TokenRow
from latlib.config.sections import LoraSettings, ModelSettings, TrainSettings
from latlib.hooks import EMBEDDING, blocks_of, resolve_sites
from latlib.models import LanguageModel, quietly, with_adapter
from latlib.planning.counters import StepCounter, bytes_of
from latlib.threat import depth
from latlib.train import Trainer


@dataclass(frozen=True)
class Prediction:
    """A training step in numbers. weights: bytes of the frozen model (and of further copies of it);
    adapter, optimiser: bytes; peak: bytes beyond these at the step's worst moment (activations,
    perturbations, gradients of the adapter); flop: of matrix products and attention, padding
    included; largest: (elements, operator) of the largest allocation.
    """

    weights: int
    adapter: int
    optimiser: int
    peak: int
    flop: float
    largest: tuple[int, str]

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.adapter + self.optimiser + self.peak


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row's prompt and of each of its completions."""

    prompt: int
    completion: int

    def rows(self, n: int, completions: int) -> list[TokenRow]:
        """`n` rows of this length; which tokens they hold plays no part."""
        completion = tuple(range(1, self.completion + 1))
        return [TokenRow(tuple(range(1, self.prompt + 1)), (completion,) * completions)] * n


def meta_model(config: PretrainedConfig, dtype: torch.dtype, lora: LoraSettings) -> LanguageModel:
    """The model of a config under its adapter, on the meta device. dtype: of the frozen weights;
    the adapter's is peft's choice. Raises ProfileError when a target of the adapter does not
    exist."""
    with torch.device("meta"), quietly():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        return with_adapter(
            LanguageModel(model, None, ModelSettings(forward="stock"), dtype), lora, 0
        )


def whole_step(
    lm: LanguageModel,
    harmful: list[TokenRow],
    benign: list[TokenRow],
    settings: TrainSettings,
    attacked: bool = True,
) -> Prediction:
    """One whole step of `settings.batch` rows on a meta model. attacked=False: a step before
    `attack_after`.
    """
    settings = settings.model_copy(update={"attack_after": 0 if attacked else 1, "eps_ramp": 0})
    # for a relative eps, whose size plays no part
    norms = dict.fromkeys((EMBEDDING, *range(lm.n_layers)), 1.0)
    with patch("torch.optim.AdamW", _NoOptimiser):
        trainer = Trainer(lm, harmful, benign, settings, 0, norms)
    return counted(lm, trainer.train_step)


def counted(
    lm: LanguageModel, step: Callable[[], object], copies: Iterable[Tensor] = ()
) -> Prediction:
    """Run one `step` on a meta model, counting. copies: further weights that it keeps beside the
    model.
    """
    adapter = [p for n, p in lm.model.named_parameters() if "lora_" in n]
    for parameter in adapter:
        parameter.grad = None
    with on_meta(), StepCounter() as found:
        step()
    own = bytes_of(adapter)
    weights = bytes_of([*lm.model.parameters(), *copies]) - own
    return Prediction(weights, own, 2 * own, found.peak, found.flop, found.largest)


def predicted_step(
    lm: LanguageModel,
    settings: TrainSettings,
    lengths: Lengths,
    attacked: bool = True,
    processes: int = 1,
    peak: bool = True,
) -> Prediction:
    """What `whole_step` finds on rows that are all of these lengths, in seconds for a model of any
    depth.

    Of several processes: the peak of one, which runs its share of the micro-batches, and the FLOPs
    of all. attacked: see `whole_step`. peak=False leaves the peak out (0), for the FLOPs alone.
    """
    steps, updates = settings.attack.steps if attacked else 0, settings.iterations
    n, rows, calm = micro_batches(settings, bool(steps), processes)
    sites = resolve_sites(settings.attack.sites, lm.n_layers) if steps else (EMBEDDING,)
    extra = calm if steps and not settings.attack.targeted else 0
    base, taller, own_n = _twin(lm, 2), _twin(lm, 3), n // processes

    def run(
        twin: LanguageModel,
        n: int = 1,
        steps: int = 1,
        updates: int = 1,
        lowest: int = 0,
        sites: int = 1,
    ):
        at = tuple(EMBEDDING if not d else d - 1 for d in range(lowest, lowest + sites))
        pgd = settings.attack.model_copy(
            update={"steps": min(steps, settings.attack.steps), "sites": at}
        )
        changes = {
            "batch": rows * n,
            "benign_batch": calm * n,
            "micro_batch": max(rows + extra, calm),
        }
        few = settings.model_copy(update={**changes, "iterations": updates, "attack": pgd})
        return whole_step(twin, lengths.rows(rows * n, 2), lengths.rows(calm * n, 1), few, attacked)

    def parts(twin: LanguageModel) -> tuple[Prediction, float, float, float]:
        """(a step of a few micro-batches; FLOPs of one micro-batch, of a further update, of a
        further PGD step)
        """
        count = min(own_n, 2) if peak else 1
        few = run(twin, count)
        one = few.flop / count
        again = run(twin, updates=2).flop - one if updates > 1 else 0.0
        return few, one, again, run(twin, steps=2).flop - one if steps > 1 else 0.0

    def of_all(one: float, again: float, further: float) -> float:
        return one + (updates - 1) * again + max(0, steps - 1) * further

    (low, *low_flop), (high, *high_flop) = parts(base), parts(taller)
    below, m = depth(sites[0]), len(sites)
    above = of_all(*high_flop) - of_all(*low_flop)  # FLOPs of one block above the lowest site
    flop = of_all(*low_flop) + (lm.n_layers - below - 2) * above
    if below:  # such a block runs once before the attack, and not in it
        flop += below * (
            run(taller, lowest=1).flop - low_flop[0] + (updates - 1) * (high_flop[1] - low_flop[1])
        )
    most, further = low.peak + (lm.n_layers - 2) * (high.peak - low.peak), max(0, own_n - 2)
    if peak:
        kept = run(base, 3).peak - low.peak if further else 0
        if m > 1:
            two = run(base, min(own_n, 2), sites=2).peak
            most += (m - 1) * (two - low.peak)
            kept += (m - 1) * (run(base, 3, sites=2).peak - two - kept) if further else 0
        most += further * kept
    adapter = [p for name, p in lm.model.named_parameters() if "lora_" in name]
    own = bytes_of(adapter)
    # rows, not micro-batches: the last may be smaller
    flop *= max(settings.batch / rows, settings.benign_batch / calm)
    weights = bytes_of(lm.model.parameters()) - own
    return Prediction(weights, own, 2 * own, most if peak else 0, flop, low.largest)


def micro_batches(
    settings: TrainSettings, attacked: bool = True, processes: int = 1
) -> tuple[int, int, int]:
    """(micro-batches of a step, harmful rows in the largest, benign rows in the largest), as
    `Trainer` cuts them; the benign rows that an untargeted attack perturbs are not counted as
    harmful."""
    harmful = settings.batch + (
        settings.benign_batch if attacked and not settings.attack.targeted else 0
    )
    n = min(-(-max(harmful, settings.benign_batch) // settings.micro_batch), harmful)
    n = -(-n // processes) * processes
    return n, -(-settings.batch // n), -(-settings.benign_batch // n)


def _twin(lm: LanguageModel, blocks: int) -> LanguageModel:
    """The model with fewer blocks."""
    config = copy.deepcopy(lm.model.config)
    config.num_hidden_layers = blocks
    # Gemma 2, Qwen 2: which kind of attention each block has
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]
    own = next(iter(lm.model.peft_config.values()))
    lora = LoraSettings(r=own.r, alpha=float(own.lora_alpha), targets=tuple(own.target_modules))
    return meta_model(config, lm.dtype, lora)


def on_each_gpu(found: Prediction, lm: LanguageModel, processes: int, mode: str) -> Prediction:
    """What one of `processes` holds, from the prediction of its share of the rows. ddp: everything.
    fsdp2: weights, adapter and moments are divided; whole stay the activations and perturbations of
    its own rows, and, gathered while they run, the embedding and output matrices and two blocks
    (one computes, the next is fetched)."""
    if mode != "fsdp2" or processes == 1:
        return found
    blocks = blocks_of(lm.model)
    block = bytes_of(blocks[0].parameters())
    outside = found.weights + found.adapter - sum(bytes_of(b.parameters()) for b in blocks)
    whole = outside + min(2, len(blocks)) * block
    divided = {
        name: -(-getattr(found, name) // processes) for name in ("weights", "adapter", "optimiser")
    }
    return replace(found, **divided, peak=found.peak + whole - whole // processes)


class _NoOptimiser:
    """In place of AdamW, whose fused kernels know no meta device."""

    def __init__(self, parameters, lr: float, **_) -> None:
        self.parameters, self.param_groups = list(parameters), [{"lr": lr}]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        pass


@contextmanager
def on_meta() -> Iterator[None]:
    """What lets a step run without data."""
    tensor, batch_to, bincount, free = (
        torch.Tensor,
        Batch.to,
        torch.bincount,
        attack.perturbed_positions,
    )
    truth, item, tensor_to = tensor.__bool__, tensor.item, tensor.to

    def moved(batch: Batch, device: torch.device | str) -> Batch:
        # how many positions may be perturbed is only known while there is data
        out = batch_to(batch, device)
        out.__dict__["_free"] = {
            p: int(free(batch, p).sum()) for p in ("prompt", "prompt+completion")
        }
        return out

    def stay(value: Tensor, *args, **kwargs) -> Tensor:
        fetched = value.is_meta and "cpu" in map(str, args)  # there is nothing to fetch
        return value if fetched else tensor_to(value, *args, **kwargs)

    def positions(batch: Batch, which: str) -> Tensor:
        return (
            torch.ones(batch.__dict__["_free"][which], device="meta")
            if batch.ids.is_meta
            else free(batch, which)
        )

    def counts(values: Tensor, *args, minlength: int = 0) -> Tensor:
        if values.is_meta:
            return torch.ones(minlength, dtype=torch.long, device="meta")
        return bincount(values, *args, minlength=minlength)

    with ExitStack() as changes:
        enter = changes.enter_context
        enter(patch.object(tensor, "__bool__", lambda t: True if t.is_meta else truth(t)))
        enter(patch.object(tensor, "item", lambda t: 1.0 if t.is_meta else item(t)))
        enter(patch.object(tensor, "to", stay))
        enter(patch.object(torch, "bincount", counts))
        enter(patch.object(F, "scaled_dot_product_attention", _efficient_attention))
        enter(patch("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True))
        enter(patch.object(attack, "perturbed_positions", positions))
        enter(patch.object(Batch, "to", moved))
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
    """The GPU's kernel that keeps no scores; q [batch, heads, seq, head_dim], keys repeated where
    they are fewer.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    bias = None if attn_mask is None else attn_mask.expand(*query.shape[:3], key.shape[2])
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, bias, query.requires_grad, dropout_p, is_causal, scale=scale)[
        0
    ]
