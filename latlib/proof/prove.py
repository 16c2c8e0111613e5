"""Which shortcuts are a model's own function: its forward on a few rows of tokens, beside latlib's.

What is compared are the log-probabilities of all tokens where a completion is predicted:
1. the reference: every prompt with one completion, alone, through the model's own forward; without
   and with a perturbation (`LATHook`), and with a direction ablated (`Ablate`);
2. rows of different length in one batch, blocks called one by one, or else the decoder as a whole
   (`Paths.walks`);
3. two completions in one row, or else each in a row of its own (`Paths.packed`); rows longer than
   the shortest window of the model are always taken apart;
4. the lean forward, or else the stock one (`Paths.lean`);
5. replies to prompts of different length in one batch, or else in batches of one length
   (`Paths.padded`).
A model for which not even the general way gives the reference is refused.

How much of a difference is rounding, the model itself says: its own forward is run once more with
the stream rounded anew behind every block (noise of one unit of its precision). A perturbation
under which rounding alone would hide what is wrong is halved until it does not.

A new adapter writes nothing yet, which would hide what is wrong with it: it is filled with noise
while it is looked at. A model of the same configuration is not looked at again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from latlib.batch import Batch, TokenRow, collate
from latlib.blocks import (
    CausalLM,
    blocks_of,
    decoder_of,
    stream_of,
    text_config,
    writers_of,
)
from latlib.errors import SettingError
from latlib.fused.llama import LeanNetwork
from latlib.hooks import Ablate, LATHook
from latlib.losses import wide_of
from latlib.model_state import adapter_off
from latlib.network import StockNetwork
from latlib.network_protocol import Network
from latlib.proof.separate import SeparateRows
from latlib.threat import EMBEDDING, Site


@dataclass(frozen=True)
class Paths:
    """Shortcuts that are a model's own function; see the module's docstring.

    lean: `fused.llama` computes it. walks: blocks may be called one by one. packed: the longest
    row, in tokens, in which two completions do not see each other; None for any. padded: prompts of
    different length may be written to together. note: what is not so, in a line."""

    lean: bool = True
    walks: bool = True
    packed: int | None = None
    padded: bool = True
    note: str = ""


# tokens of (prompt, rejected, chosen)
LENGTHS = ((3, 2, 2), (9, 5, 4), (14, 3, 6))
WINDOW = 64  # windows up to so many tokens are looked at with rows beyond them
NOISE = 0.05  # of a new adapter's weights
# a root mean square difference of log-probabilities may be so many times what rounding makes, and
# never more nats than these. Over the architectures of docs/models.md wrong ways came to at least
# 9,000 times it in float32 and to 2.9 times in bfloat16; right ways to 1.0 times in both, and to
# 4.7 times on trained models of the world (docs/lab-log.md)
ROUNDINGS, ROUNDINGS_OF_16_BITS, MOST = 30.0, 2.0, 0.5
HALVINGS = 6  # of the perturbation, at most
FLOAT32 = torch.finfo(torch.float32).eps  # norms compute in it whatever the weights are

# what families call the number of tokens that some of their layers look back
_WINDOWS = ("sliding_window", "attention_window_size", "window_size", "attention_chunk_size")

# what modules raise that are called in a way they are not made for
_FAILURES = (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError)

_kinds: dict[str, Paths] = {}
_known: WeakKeyDictionary[nn.Module, dict[tuple[torch.dtype, bool], Paths]] = WeakKeyDictionary()


def prove(model: CausalLM, dtype: torch.dtype, lean: bool = False) -> Paths:
    """The shortcuts that are `model`'s own function. dtype: what networks compute in. lean: whether
    the lean forward is wanted.

    Raises SettingError naming model.source for a model that cannot be run rightly at all."""
    weight = model.get_input_embeddings().weight
    if weight.is_meta or isinstance(weight, FakeTensor):  # nothing to compare: sizes alone matter
        return Paths(lean=lean)
    known = _known.setdefault(model, {})
    if (dtype, lean) not in known:
        known[dtype, lean] = _proven_kind(model, dtype, lean)
    return known[dtype, lean]


def _proven_kind(model: CausalLM, dtype: torch.dtype, lean: bool) -> Paths:
    key = _kind(model, dtype, lean)
    if key not in _kinds:
        with torch.no_grad(), _adapters_filled(model):
            try:
                proof = _Proof(model, dtype)
            except torch.OutOfMemoryError:
                raise
            except _FAILURES as error:
                raise SettingError(
                    f"model.source: {_name(model)} cannot be run and attacked: {error}"
                ) from error
            _kinds[key] = proof.paths(lean)
    return _kinds[key]


def check_teacher(model: CausalLM) -> None:
    """Raise SettingError where the model with its adapter off is not the base that the adapter was
    made for."""
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "layer_replication", None):
            raise SettingError(
                "the adapter's layer_replication repeats blocks, with the adapter off too: there is"
                " no frozen teacher; choose an adapter without it"
            )
        if getattr(config, "bias", "none") != "none" and _has_bias(model):
            raise SettingError(
                f"the adapter's bias = {config.bias!r} trains biases of the base, which stay when"
                " it is off: there is no frozen teacher; choose an adapter with bias = 'none'"
            )


def check_targets(model: CausalLM, targets: Iterable[str]) -> list[str]:
    """The layers of a part that sees or hears: no target, text does not reach them.

    Raises SettingError for names of `lora.targets` that are no linear layer or embedding of the
    language model: training would leave them out without a word."""
    language = {*decoder_of(model).modules(), model.get_output_embeddings()}
    inside: list[str] = []
    outside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            layers = inside if module in language else outside
            layers.append(f".{name}")
    absent = [t for t in targets if not any(name.endswith(f".{t}") for name in inside)]
    if absent:
        last = sorted({name.rpartition(".")[2] for name in inside})
        raise SettingError(
            f"lora.targets = {list(targets)}: {type(model).__name__} has no {', '.join(absent)};"
            f" its layers are {', '.join(last)}"
        )
    return [name.removeprefix(".") for name in outside]


def _name(model: CausalLM) -> str:
    """What kind of model it is, inside any adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__


def _has_bias(model: CausalLM) -> bool:
    return any(name.endswith("bias") for name, _ in model.named_parameters())


def shortest_window(model: CausalLM) -> int | None:
    """The fewest tokens that some layer looks back; None where all see everything."""
    config = text_config(model)
    found = [getattr(config, name, None) for name in _WINDOWS]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


def _kind(model: CausalLM, dtype: torch.dtype, lean: bool) -> str:
    """What tells models apart whose forwards differ in more than the weights."""
    adapters = getattr(model, "peft_config", {})
    modules = [(name, type(module).__name__) for name, module in model.named_modules()]
    own = {name: config.to_dict() for name, config in adapters.items()}
    weight = model.get_input_embeddings().weight
    return repr(
        (type(model).__name__, model.config.to_json_string(), own, modules, weight.dtype)
        + (weight.device.type, dtype, lean)
    )


@contextmanager
def _adapters_filled(model: CausalLM) -> Iterator[None]:
    """What a new adapter has not changed yet holds noise inside: LoRA that is zero, and all other
    kinds, which begin at ones or at the base's own weights."""
    kept = {}
    if hasattr(model, "get_base_model"):
        for name, parameter in model.named_parameters():
            if _of_adapter(name) and ("lora_" not in name or not parameter.any()):
                kept[parameter] = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in kept:
            noise = NOISE * torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise.to(parameter))
        yield
    finally:
        for parameter, values in kept.items():
            parameter.data.copy_(values)


_OF_ADAPTERS = ("lora_", "ia3_", "oft_", "vera_", "hada_", "modules_to_", "token_adapter")


def _of_adapter(name: str) -> bool:
    of_base = "original_module" in name or "base_layer" in name
    return not of_base and any(mark in name for mark in _OF_ADAPTERS)


class _Proof:
    """The comparisons for one model."""

    def __init__(self, model: CausalLM, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.generator = torch.Generator().manual_seed(0)
        config = text_config(model)
        self.sites: tuple[Site, ...] = (EMBEDDING, config.num_hidden_layers // 2)
        self.rows = [self._row(lengths) for lengths in LENGTHS]
        self.window = shortest_window(model)
        if self.window is not None and self.window <= WINDOW:
            self.rows.append(self._row((self.window, 6, 8)))
        self.direction = torch.randn(config.hidden_size, generator=self.generator)
        norm = self._embedding_norm()
        self.deltas = [self._delta(row, norm) for row in self.rows]
        conditions = self._conditions()
        self.expected = {each: self._reference(*each) for each in conditions}
        with self._rounded_anew():
            self.rounding = {each: self._rounding(each) for each in conditions}
        self._perturb_less()

    def _row(self, lengths: Sequence[int]) -> TokenRow:
        tokens = [
            tuple(torch.randint(0, self.vocabulary, (n,), generator=self.generator).tolist())
            for n in lengths
        ]
        return TokenRow(tokens[0], tuple(tokens[1:]))

    def _embedding_norm(self) -> float:
        ids = torch.tensor(self.rows[0].prompt, device=self.device)
        return self.model.get_input_embeddings()(ids).float().norm(dim=-1).mean().item()

    def _delta(self, row: TokenRow, norm: float) -> dict[Site, Tensor]:
        """site -> [prompt, d_model]"""
        shape = (len(row.prompt), text_config(self.model).hidden_size)
        size = 0.5 * norm / shape[1] ** 0.5
        return {site: size * torch.randn(shape, generator=self.generator) for site in self.sites}

    def _conditions(self) -> list[tuple[bool, str]]:
        """(with the adapter?, what is changed): what latlib runs a model for."""
        conditions = [(True, "plain"), (True, "perturbed")]
        if hasattr(self.model, "get_base_model"):
            conditions.append((False, "plain"))  # the teacher
        try:
            writers_of(self.model)
        except ValueError:  # said where somebody ablates
            return conditions
        return [*conditions, (True, "ablated")]

    # ---- the reference -------------------------------------------------------------------------

    def _reference(self, adapter: bool, what: str) -> Tensor:
        """[labels, vocabulary] log-probabilities, row after row, completion after completion."""
        found = []
        with nullcontext() if adapter else adapter_off(self.model):
            for row, delta in zip(self.rows, self.deltas, strict=True):
                for completion in row.completions:
                    ids = torch.tensor([[*row.prompt, *completion]], device=self.device)
                    with self._changed(what, delta, ids.shape[1]):
                        mask = torch.ones_like(ids)
                        out = self.model(input_ids=ids, attention_mask=mask, use_cache=False)
                    first = len(row.prompt) - 1
                    logits = out.logits[0, first : first + len(completion)]
                    found.append(logits.float().log_softmax(-1))
        return torch.cat(found)

    def _rounding(self, condition: tuple[bool, str]) -> float:
        """The difference that rounding makes; to be asked for while the stream is rounded anew."""
        return _apart(self._reference(*condition), self.expected[condition])

    def _perturb_less(self) -> None:
        """Halve the perturbation while rounding under it makes more than MOST: a trained model may
        be so far from its usual stream there that two right ways are nats apart."""
        perturbed = (True, "perturbed")
        for _ in range(HALVINGS):
            if self._by_rounding(perturbed) <= MOST:
                return
            self.deltas = [{site: delta / 2 for site, delta in d.items()} for d in self.deltas]
            self.expected[perturbed] = self._reference(*perturbed)
            with self._rounded_anew():
                self.rounding[perturbed] = self._rounding(perturbed)

    def _by_rounding(self, condition: tuple[bool, str]) -> float:
        """The difference that several roundings make."""
        times = ROUNDINGS_OF_16_BITS if torch.finfo(self.dtype).bits == 16 else ROUNDINGS
        return times * self.rounding[condition]

    def _allowed(self, condition: tuple[bool, str]) -> float:
        """The greatest difference that is taken for rounding."""
        return min(self._by_rounding(condition), MOST)

    @contextmanager
    def _rounded_anew(self) -> Iterator[None]:
        """The stream times 1 + noise of one unit of its precision, at every site."""
        precision = max(torch.finfo(self.dtype).eps, FLOAT32)

        def shake(_module: Any, _args: Any, output: Any) -> Any:
            stream = stream_of(output)
            noise = torch.randn(stream.shape, generator=self.generator).to(stream.device)
            other = (stream * (1 + precision * noise)).to(stream.dtype)
            return (other, *output[1:]) if isinstance(output, tuple) else other

        with ExitStack() as hooks:
            for module in (self.model.get_input_embeddings(), *blocks_of(self.model)):
                hooks.enter_context(module.register_forward_hook(shake))
            yield

    def _changed(self, what: str, delta: Mapping[Site, Tensor], seq: int) -> Any:
        if what == "perturbed":
            return LATHook(self.model, self._batched([delta], seq))
        return Ablate(self.model, self.direction) if what == "ablated" else nullcontext()

    # ---- latlib's own --------------------------------------------------------------------------

    def paths(self, lean: bool) -> Paths:
        """The first of these that holds, each slower and asking less than the one before."""
        fast = Paths(lean=False, packed=self.window)
        tried = [replace(fast, lean=True, packed=None)] if lean else []
        for walks in (True, False):
            shared = replace(fast, walks=walks)
            tried += [shared, replace(shared, packed=0)]
        paths = next(filter(self._holds, tried), None)
        kind = _name(self.model)
        if paths is None:
            raise SettingError(
                f"model.source: {kind} says other things through latlib than through its own"
                " forward, whichever way it is run: choose another model"
            )
        paths = replace(paths, padded=self._writes_padded())
        return replace(paths, note=_note(kind, paths, lean))

    def _holds(self, paths: Paths) -> bool:
        """Whether a network by these paths gives the reference under every condition."""
        try:
            return all(
                _apart(self._found(paths, *condition), expected) <= self._allowed(condition)
                for condition, expected in self.expected.items()
            )
        except torch.OutOfMemoryError:
            raise
        except _FAILURES:
            return False  # modules that cannot be called this way

    def _found(self, paths: Paths, adapter: bool, what: str) -> Tensor:
        """[labels, vocabulary] log-probabilities, in the reference's order."""
        network = network_of(self.model, self.dtype, paths, adapter)
        if what == "ablated":
            network = network.ablated(self.direction)
        found: dict[int, Tensor] = {}
        for group in self._groups(paths):
            batch = collate([self.rows[i] for i in group], device=self.device)
            deltas, start = None, None
            if what == "perturbed":
                deltas = self._batched([self.deltas[i] for i in group], batch.shape[1])
                start = self._start(network, batch)
            rows = network.label_rows(batch, deltas, start)
            log_p = network.unembed(rows).float().log_softmax(-1)
            for place, number in enumerate(group):
                found[number] = log_p[batch.label_rows == place]
        return torch.cat([found[number] for number in sorted(found)])

    def _groups(self, paths: Paths) -> list[list[int]]:
        """Rows that stay packed, and those that do not."""
        limit = paths.packed
        lengths = [row.length for row in self.rows]
        short = [i for i, n in enumerate(lengths) if limit is None or n <= limit]
        long = [i for i in range(len(lengths)) if i not in short]
        return [group for group in (short, long) if group]

    def _batched(self, deltas: Sequence[Mapping[Site, Tensor]], seq: int) -> dict[Site, Tensor]:
        """site -> [batch, seq, d_model], zero behind the prompts."""
        dtype = wide_of(self.model.get_input_embeddings().weight.dtype)
        padded = {}
        for site in self.sites:
            rows = [F.pad(delta[site], (0, 0, 0, seq - len(delta[site]))) for delta in deltas]
            padded[site] = torch.stack(rows).to(self.device, dtype)
        return padded

    def _start(self, network: Network, batch: Batch) -> tuple[Site, Tensor]:
        lowest = self.sites[0]
        return lowest, network.capture(batch, [lowest])[lowest]

    def _writes_padded(self) -> bool:
        """Whether prompts padded on the left are continued as each alone."""
        prompts = [torch.tensor(row.prompt) for row in self.rows]
        expected, found = [], []
        together = self._written(prompts)
        for prompt, second in zip(prompts, together, strict=True):
            first = self._written([prompt])[0]
            # what comes behind the first new token tells something if that is the same
            same = first[0].argmax() == second[0].argmax()
            steps = 2 if same else 1
            expected.append(first[:steps])
            found.append(second[:steps])
        return _apart(torch.cat(found), torch.cat(expected)) <= self._allowed((True, "plain"))

    def _written(self, prompts: list[Tensor]) -> list[Tensor]:
        """Of each prompt, [2, vocabulary] log-probabilities of the first two new tokens."""
        ids = pad_sequence(prompts, True, padding_side="left")
        seen = [torch.ones_like(prompt) for prompt in prompts]
        mask = pad_sequence(seen, True, padding_side="left")
        with greedy(self.model):
            out: Any = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                min_new_tokens=2,
                max_new_tokens=2,
                do_sample=False,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return list(torch.stack(out.logits, 1).float().log_softmax(-1))


def _apart(found: Tensor, expected: Tensor) -> float:
    """Root mean square difference."""
    return (found - expected).square().mean().sqrt().item()


@contextmanager
def greedy(model: CausalLM) -> Iterator[None]:
    """`model.generate` without what its checkpoint asks for (penalties, beams, suppressed tokens):
    of its own settings only the token ids are left."""
    holders = [model]
    if hasattr(model, "get_base_model"):  # PEFT hands its own settings on
        holders.append(model.get_base_model())
    own = [holder.generation_config for holder in holders]
    ids = {name: getattr(own[0], name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig(**ids)
        yield
    finally:
        for holder, settings in zip(holders, own, strict=True):
            holder.generation_config = settings


def _note(kind: str, paths: Paths, lean: bool) -> str:
    """What is not the fast way, in a line; '' where all is."""
    notes = []
    if lean and not paths.lean:
        notes.append("the stock forward in place of the lean one")
    if not paths.walks:
        notes.append("all blocks in every step")
    if paths.packed == 0:
        notes.append("a row for each completion")
    if not paths.padded:
        notes.append("replies to prompts of one length at a time")
    return f"{kind} runs the general way: {', '.join(notes)}" if notes else ""


def network_of(
    model: CausalLM,
    dtype: torch.dtype,
    paths: Paths,
    adapter: bool = True,
    train: bool = False,
    **options: Any,
) -> Network:
    """A network over `model` by these paths; options: those of `StockNetwork` alone."""
    if paths.lean:
        return LeanNetwork(model, adapter, train, dtype)
    stock = StockNetwork(model, adapter, train, walks=paths.walks, **options)
    return stock if paths.packed is None else cast(Network, SeparateRows(stock, paths.packed))
