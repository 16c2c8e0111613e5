"""Which architectures latlib runs rightly: small random models of each, beside their own forward.

    python benchmarks/models.py --write docs/models.md

For every architecture of `architectures.py` and every use, what latlib says is compared with what
the model's own modules say, on other rows than those `latlib.proof` looked at:
* plain: a prompt and a completion, in a padded batch;
* packed: a prompt and two completions;
* long: the same, longer than any window of the model;
* perturbed: `packed` under a perturbation of two sites, run from the lowest;
* generation: replies to prompts of different length, beside a loop over the whole forward;
* ablation: what every module reads of the stream, whose part along the direction must be gone;
* adapter: `packed` with LoRA on every linear layer, and the frozen teacher beside it;
* merge: the adapter merged into the weights.
"right": equal, by the fast way. "general": equal, by a slower way (docs/method.md). "refused": an
error says why. "WRONG": neither, which a test forbids.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES, VOCABULARY, random_model
from peft import LoraConfig, get_peft_model
from torch import Tensor

from latlib.batch import Batch, TokenRow, collate
from latlib.blocks import blocks_of, text_config
from latlib.config.sections import ModelSettings
from latlib.evaluation.generate import write
from latlib.experiment.export_model import merged
from latlib.hooks import Ablate, LATHook
from latlib.models import LanguageModel
from latlib.threat import EMBEDDING

USES = ("plain", "packed", "long", "perturbed", "generation", "ablation", "adapter", "merge")
SHORT, LONG = ((4, 2, 1), (7, 3, 4), (11, 5, 2)), ((4, 2, 3), (70, 4, 9))
CLOSE = 2e-3  # nats: rounding of float32 over all blocks
NEW_TOKENS = 5


class Ids:
    """A tokenizer that writes token ids."""

    pad_token_id, eos_token_id = 0, None

    @staticmethod
    def batch_decode(rows: Tensor, skip_special_tokens: bool) -> list[str]:
        """Ids, separated by spaces."""
        return [" ".join(map(str, row)) for row in rows.tolist()]


@dataclass
class Subject:
    """A random model of an architecture, as latlib opens it."""

    lm: LanguageModel
    generator: torch.Generator

    @classmethod
    def of(cls, model: Any) -> Subject:
        """With what a small model's settings are by default."""
        settings = ModelSettings(device="cpu", dtype="float32")
        lm = LanguageModel(model, Ids(), settings, torch.float32)
        return cls(lm, torch.Generator().manual_seed(7))

    def rows(self, lengths: Sequence[Sequence[int]]) -> list[TokenRow]:
        """Rows of random tokens: (prompt, completions ...)."""
        found = []
        for row in lengths:
            prompt, *completions = (self._tokens(n) for n in row)
            found.append(TokenRow(prompt, tuple(completions)))
        return found

    def _tokens(self, n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (n,), generator=self.generator).tolist())

    def noise(self, *shape: int) -> Tensor:
        """Of the stream's width."""
        return torch.randn(*shape, text_config(self.lm.model).hidden_size, generator=self.generator)


@torch.no_grad()
def own_log_p(model: Any, row: TokenRow, completion: Sequence[int], deltas: Any = None) -> Tensor:
    """[completion, vocabulary], by the model's own forward."""
    ids = torch.tensor([[*row.prompt, *completion]])
    padded = {}
    for site, delta in (deltas or {}).items():
        padded[site] = torch.zeros(1, ids.shape[1], delta.shape[-1])
        padded[site][0, : len(delta)] = delta
    with LATHook(model, padded):
        logits = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    first = len(row.prompt) - 1
    return logits[first : first + len(completion)].log_softmax(-1)


def _error(subject: Subject, rows: list[TokenRow], deltas: list[dict] | None = None) -> float:
    """The greatest difference of a log-probability."""
    model = subject.lm.model
    expected = [
        own_log_p(model, row, completion, deltas[i] if deltas else None)
        for i, row in enumerate(rows)
        for completion in row.completions
    ]
    network, batch = subject.lm.network(), collate(rows)
    joined, start = None, None
    if deltas:
        joined = {site: _batched([delta[site] for delta in deltas], batch) for site in deltas[0]}
        start = EMBEDDING, network.capture(batch, [EMBEDDING])[EMBEDDING]
    with torch.no_grad():
        found = network.unembed(network.label_rows(batch, joined, start)).log_softmax(-1)
    return (found - torch.cat(expected)).abs().max().item()


def _batched(deltas: Sequence[Tensor], batch: Batch) -> Tensor:
    out = torch.zeros(*batch.shape, deltas[0].shape[-1])
    for row, delta in enumerate(deltas):
        out[row, : len(delta)] = delta
    return out


def plain(subject: Subject) -> float:
    """See the module's docstring."""
    return _error(subject, subject.rows([row[:2] for row in SHORT]))


def packed(subject: Subject) -> float:
    """See the module's docstring."""
    return _error(subject, subject.rows(SHORT))


def long(subject: Subject) -> float:
    """See the module's docstring."""
    return _error(subject, subject.rows(LONG))


def perturbed(subject: Subject) -> float:
    """See the module's docstring."""
    rows = subject.rows(SHORT)
    sites = (EMBEDDING, subject.lm.n_layers // 2)
    deltas = [{site: subject.noise(len(row.prompt)) for site in sites} for row in rows]
    return _error(subject, rows, deltas)


@torch.no_grad()
def generation(subject: Subject) -> float:
    """0 where all replies are equal, else 1; see the module's docstring."""
    model, rows = subject.lm.model, subject.rows([row[:2] for row in SHORT])
    found = write(subject.lm, rows, max_new_tokens=NEW_TOKENS)
    for row, reply in zip(rows, found, strict=True):
        ids = list(row.prompt)
        for token in map(int, reply.split()):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            if logits.max() - logits[token] > CLOSE:
                return 1.0
            ids.append(token)
            if token == model.generation_config.eos_token_id:
                break
    return 0.0


@torch.no_grad()
def ablation(subject: Subject) -> float:
    """The greatest part along the direction of what a module reads of the stream."""
    model, direction = subject.lm.model, subject.noise(1)
    ids = torch.tensor([subject._tokens(12)])
    readers = _readers(model, ids)
    parts: list[float] = []

    def look(_module: Any, args: Any, kwargs: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        parts.append((stream @ direction[0]).abs().max().item() / direction.norm().item())

    with Ablate(model, direction):
        handles = [r.register_forward_pre_hook(look, with_kwargs=True) for r in readers]
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    assert parts, "a block reads its stream"
    return max(parts)


def _readers(model: Any, ids: Tensor) -> list[Any]:
    """Modules whose input is the stream as it is when a block begins, or with what the block's
    modules have added by then."""
    looks = [_Readers(block) for block in blocks_of(model)]
    model(ids, use_cache=False)
    for look in looks:
        for handle in look.handles:
            handle.remove()
    return [module for look in looks for module in look.found]


class _Readers:
    """Those of one block, while hooks are on it."""

    def __init__(self, block: Any) -> None:
        self.before, self.outputs, self.found = torch.empty(0), [], []
        self.handles = [block.register_forward_pre_hook(self._enter, with_kwargs=True)]
        for child in block.children():
            self.handles.append(child.register_forward_pre_hook(self._read, with_kwargs=True))
        for name, module in block.named_modules():
            if name:
                self.handles.append(module.register_forward_hook(self._note))

    def _enter(self, _module: Any, args: Any, kwargs: Any) -> None:
        self.before = args[0] if args else kwargs["hidden_states"]

    def _read(self, module: Any, args: Any, kwargs: Any) -> None:
        value = args[0] if args else kwargs.get("hidden_states")
        fits = torch.is_tensor(value) and value.shape == self.before.shape
        if fits and _is_stream(value, self.before, self.outputs):
            self.found.append(module)

    def _note(self, _module: Any, _args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(value) and value.numel() == self.before.numel():
            self.outputs.append(value.reshape(self.before.shape))


def _is_stream(value: Tensor, before: Tensor, outputs: Sequence[Tensor]) -> bool:
    added = (value - before).flatten().double()
    outputs = [output for output in outputs if not torch.equal(output, value)]
    if not outputs:
        return bool(added.abs().max() < 1e-6)
    columns = torch.stack([output.flatten() for output in outputs], 1).double()
    weights = torch.linalg.lstsq(columns, added[:, None], driver="gelsd").solution
    return bool((columns @ weights - added[:, None]).abs().max() < 1e-5)


def _with_adapter(subject: Subject) -> Subject:
    """LoRA on every linear layer but the head, with weights that write something."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(subject.lm.model, config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=subject.generator))
    return Subject.of(model)


def adapter(subject: Subject) -> float:
    """See the module's docstring."""
    adapted = _with_adapter(subject)
    rows = adapted.rows(SHORT)
    with adapted.lm.model.disable_adapter(), torch.no_grad():
        expected = [own_log_p(adapted.lm.model, r, c) for r in rows for c in r.completions]
    network, batch = adapted.lm.network(adapter=False), collate(rows)
    with torch.no_grad():
        teacher = network.unembed(network.label_rows(batch)).log_softmax(-1)
    apart = (teacher - torch.cat(expected)).abs().max().item()
    return max(apart, _error(adapted, rows))


@torch.no_grad()
def merge(subject: Subject) -> float:
    """See the module's docstring."""
    adapted = _with_adapter(subject)
    _ = adapted.lm.paths  # refuses what cannot be run at all
    row = adapted.rows(SHORT[-1:])[0]
    before = own_log_p(adapted.lm.model, row, row.completions[0])
    alone, _ = merged(adapted.lm.model, torch.float32)  # an error where it says other things
    return (own_log_p(alone, row, row.completions[0]) - before).abs().max().item()


CHECKS: dict[str, Callable[[Subject], float]] = {
    "plain": plain,
    "packed": packed,
    "long": long,
    "perturbed": perturbed,
    "generation": generation,
    "ablation": ablation,
    "adapter": adapter,
    "merge": merge,
}


@dataclass(frozen=True)
class Found:
    """cells: use -> right, general, refused or WRONG. note: why."""

    architecture: str
    cells: dict[str, str]
    note: str


def look_at(name: str, uses: Sequence[str] = USES) -> Found:
    """All uses of an architecture; each has a model of its own."""
    cells, notes = {}, []
    for use in uses:
        model = random_model(name)
        subject = Subject.of(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                general = bool(subject.lm.paths.note)
                error = CHECKS[use](subject)
            notes.append(subject.lm.paths.note)
            cells[use] = "WRONG" if not error < CLOSE else "general" if general else "right"
        except ValueError as refusal:
            cells[use] = "refused"
            notes.append(str(refusal))
    lines = (" ".join(note.split()) for note in notes if note)
    return Found(name, cells, "; ".join(dict.fromkeys(lines)))


def table(found: Sequence[Found]) -> str:
    """Markdown."""
    lines = [
        f"| architecture | {' | '.join(USES)} | how |",
        f"|{'---|' * (len(USES) + 2)}",
    ]
    for each in found:
        cells = " | ".join(each.cells[use] for use in USES)
        lines.append(f"| {each.architecture} | {cells} | {each.note} |")
    return "\n".join(lines)


PAGE = """# Models

{what}

Made by `python benchmarks/models.py --write docs/models.md` with transformers {version}: {count}
architectures, random weights.

{table}
"""


def main(argv: Sequence[str] | None = None) -> list[Found]:
    """Look, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="architectures; without any: all")
    parser.add_argument("--write", type=Path, help="the page")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    found = []
    for name in arguments.names or ARCHITECTURES:
        found.append(look_at(name))
        print(found[-1].architecture, *found[-1].cells.values(), found[-1].note, flush=True)
    if arguments.write:
        what = str(__doc__).split("\n\n", 2)[2].strip()
        page = PAGE.format(
            what=what, version=transformers.__version__, count=len(found), table=table(found)
        )
        arguments.write.write_text(page, encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
