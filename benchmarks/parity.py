"""The authors' attack, losses and training beside ours, on the same tiny Llama in float64.

    git clone https://github.com/aengusl/latent-adversarial-training PATH
    python benchmarks/parity.py --authors PATH

Their code is imported from the checkout and not copied. What it is given so that it runs here:
* the packages that its modules import and that this comparison does not use (`tasks`, from another
  repository; wandb; einops) are empty where they are not installed;
* the perturbation's width, 4096 in their code, is the model's;
* the `breakpoint()` calls that their code contains are passed over.
Both get a model whose norms compute in float64: those of transformers round to float32.

First come the settings where both must agree, to rounding. Then each deliberate deviation
(docs/parity.md) with what it changes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import environment, write
from shapes import Shape, build, rows
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from latlib.attack import Attack, perturbed_positions, pgd
from latlib.batch import Batch, TokenRow, collate
from latlib.config.sections import AttackSettings, DefenceSettings, TrainSettings
from latlib.losses import kl_divergence
from latlib.models import LanguageModel
from latlib.threat import EMBEDDING
from latlib.train import Trainer

# A vocabulary so small that random tokens pass the away loss's floor of log p = -5. One row a step:
# how rows share a batch is one of the differences.
SHAPE = Shape(
    d_model=32,
    layers=4,
    heads=4,
    kv_heads=2,
    ffn=64,
    vocabulary=48,
    batch=1,
    micro_batch=1,
    prompts=(5, 9),
    completions=(6, 6),
    sites=(0.25, 0.75),
    steps=16,
    r=4,
    alpha=8.0,
)
UNEVEN = replace(SHAPE, completions=(3, 12))
SITES = (EMBEDDING, 1, 3)
BLOCKS = "base_model.model.model.layers"
DEFENCE = {"toward": 0.5, "away": 0.5, "sft": 1.5}  # theirs for Llama-2-7B
DEFENCE_KL = {"toward": 0.5, "away": 0.5, "kl": 0.1}  # theirs for Llama-3-8B
NEVER = 1e9  # a norm that no gradient has: no clipping


@dataclass(frozen=True)
class Comparison:
    """What two codes say of the same thing. difference: the greatest absolute one."""

    what: str
    authors: float
    ours: float
    difference: float


def tiny_llama() -> LanguageModel:
    """A random Llama under a random adapter, in float64 throughout."""
    lm = build(SHAPE, torch.float64, "cpu", "stock")
    for module in list(lm.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(SHAPE.d_model, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return lm


# ---- their code ----------------------------------------------------------------------------------


def load_authors(path: Path) -> types.ModuleType:
    """Their `latent_at.lat_methods`. Raises SystemExit where `path` is no checkout of theirs."""
    folder = path / "latent_at"
    if not (folder / "lat_methods.py").is_file():
        raise SystemExit(
            f"--authors {path}: no latent_at/lat_methods.py there; give a checkout of"
            " https://github.com/aengusl/latent-adversarial-training"
        )
    for name in ("wandb", "einops"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    for name in (
        "tasks",
        "tasks.general_capabilities",
        "tasks.general_capabilities.multiple_choice_tasks",
        "tasks.wmdp",
        "tasks.wmdp.WMDP_MCTask",
    ):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tasks.general_capabilities.multiple_choice_tasks"].MMLUTask = None
    sys.modules["tasks.wmdp.WMDP_MCTask"].WMDP_MCTask = None
    # the package without its __init__, which imports its data sets too
    package = types.ModuleType("latent_at")
    package.__path__ = [str(folder)]
    sys.modules["latent_at"] = package
    return importlib.import_module("latent_at.lat_methods")


@contextmanager
def running(authors: types.ModuleType, d_model: int) -> Iterator[None]:
    """Their code made to run on a small model without a debugger."""
    theirs, hook = authors.GDAdversary, sys.breakpointhook

    def adversary(dim: int, **options: Any) -> Any:
        return theirs(dim=d_model, **options)

    authors.GDAdversary = adversary
    sys.breakpointhook = lambda *args, **kwargs: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # autocast without a GPU; kl_div's reduction
            yield
    finally:
        authors.GDAdversary, sys.breakpointhook = theirs, hook


def as_theirs(own: Sequence[TokenRow]) -> dict[str, Tensor]:
    """A batch in their form: one row for each completion, and masks of [rows, seq]."""
    seq = max(len(row.prompt) + max(map(len, row.completions)) for row in own)
    batch: dict[str, list] = {"prompt_mask": []}
    for row in own:
        begin = len(row.prompt)
        batch["prompt_mask"].append([i < begin for i in range(seq)])
        # a benign row has one completion, which they call the defence's
        names = ("adv", "def") if len(row.completions) == 2 else ("def",)
        for name, completion in zip(names, row.completions, strict=True):
            tokens = [*row.prompt, *completion]
            mask = [begin <= i < len(tokens) for i in range(seq)]
            padded = tokens + [0] * (seq - len(tokens))
            batch.setdefault(f"{name}_tokens", []).append(padded)
            batch.setdefault(f"{name}_labels_mask", []).append(mask)
    return {name: torch.tensor(values) for name, values in batch.items()}


def their_attack(
    authors: types.ModuleType, lm: LanguageModel, own: Sequence[TokenRow], attack: AttackSettings
) -> tuple[list[float], dict[Any, Tensor]]:
    """(the loss before each step, site -> [rows, seq, d_model] perturbation)"""
    sites = [site for site in SITES if site != EMBEDDING]
    with running(authors, SHAPE.d_model):
        losses, wrappers = authors.projected_gradient_descent(
            batch=as_theirs(own),
            model=lm.model,
            model_layers_module=BLOCKS,
            layer=[*sites, EMBEDDING],
            epsilon=attack.eps,
            learning_rate=attack.lr,
            pgd_iterations=attack.steps,
            loss_coefs={"toward": attack.toward, "away": attack.away},
            device="cpu",
            return_loss_over_time=True,
            add_completions_pgd=attack.positions != "prompt",
        )
        authors.clear_hooks(lm.model)
    totals = [
        attack.toward * step["adv_toward"] + attack.away * step["adv_away"] for step in losses
    ]
    found = [wrapper.hook_fn.attack.detach() for wrapper in wrappers]
    return totals, dict(zip([*sites, EMBEDDING], found, strict=True))


# ---- the comparisons -----------------------------------------------------------------------------


def our_attack(lm: LanguageModel, batch: Batch, attack: AttackSettings) -> Attack:
    """Ours, with the same settings."""
    threat = attack.threat_model(SHAPE.layers)
    return pgd(lm.network(), batch, threat, attack.search())


def settings(eps: float, lr: float, positions: str = "prompt") -> AttackSettings:
    """An attack at `SITES`."""
    return AttackSettings(sites=SITES, eps=eps, lr=lr, steps=SHAPE.steps, positions=positions)


def attacks(
    authors: types.ModuleType, lm: LanguageModel, own: Sequence[TokenRow], attack: AttackSettings
) -> tuple[Comparison, Comparison]:
    """The losses of an attack, and the perturbation that it found, at the positions of the prompt
    and the first completion, which both have in the same order."""
    theirs, deltas = their_attack(authors, lm, own, attack)
    batch = collate(own)
    found = our_attack(lm, batch, attack)
    ours = found.losses[:-1].mean(1)
    allowed = perturbed_positions(batch, attack.threat_model(SHAPE.layers).positions)
    here = allowed & (batch.segments != 2)[:, :, None]
    seq = max(len(row.prompt) + len(row.completions[0]) - 1 for row in own)
    here = here[:, :seq]
    apart, norms = [], []
    for site, delta in deltas.items():
        masked = delta[:, :seq] * here
        own_delta = found.deltas[site][:, :seq] * here
        apart.append((masked - own_delta).abs().max().item())
        norms.append((masked.norm(dim=-1).max().item(), own_delta.norm(dim=-1).max().item()))
    losses = Comparison(
        "loss after the last step but one",
        theirs[-1],
        ours[-1].item(),
        (torch.tensor(theirs, dtype=ours.dtype) - ours).abs().max().item(),
    )
    largest = [max(each) for each in zip(*norms, strict=True)]
    return losses, Comparison("greatest norm of a perturbation", *largest, max(apart))


def trained(
    authors: types.ModuleType,
    coefficients: Mapping[str, float],
    clip: float = NEVER,
    renewed: bool = True,
    steps: int = 3,
) -> Comparison:
    """The adapter after some steps of LAT, 4 updates each. renewed: ours forgets its optimiser's
    moments before every step, as theirs does."""
    models = [tiny_llama() for _ in range(2)]
    attack = settings(eps=0.05, lr=1e-2)
    scale = sum(coefficients.values())
    weights = {name: value / scale for name, value in coefficients.items()}
    options = TrainSettings(
        steps=steps,
        batch=SHAPE.batch,
        benign_batch=SHAPE.batch,
        micro_batch=SHAPE.micro_batch,
        iterations=4,
        lr=1e-3,
        lr_warmup=0,
        lr_decay_share=0.0,
        weight_decay=0.01,
        fresh_optimiser=renewed,
        clip=clip,
        attack=attack,
        defence=DefenceSettings(**{"kl": 0.0, "kl_mode": "reference", **weights}),
    )
    harmful, benign = rows(SHAPE, 8, 2), rows(SHAPE, 8, 1)
    ours = Trainer(models[0], harmful, benign, options, seed=0)
    theirs = their_trainer(authors, models[1], attack, coefficients, options)
    start = [parameter.detach().clone() for parameter in ours.parameters]
    for step in range(steps):
        picked = [harmful[i] for i in ours.schedules[0].rows(step)]
        others = [benign[i] for i in ours.schedules[1].rows(step)]
        theirs.def_optim = torch.optim.AdamW(models[1].model.parameters(), lr=options.lr)
        with running(authors, SHAPE.d_model):
            theirs.lat_training_step(step, as_theirs(picked), as_theirs(others))
        ours.train_step()
    other = [p for name, p in models[1].model.named_parameters() if "lora_" in name]
    apart = [(a - b).abs().max().item() for a, b in zip(other, ours.parameters, strict=True)]
    return Comparison(
        "how far the adapter moved", moved(other, start), moved(ours.parameters, start), max(apart)
    )


def moved(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """The norm of what changed."""
    changes = [(now - then).flatten() for now, then in zip(parameters, start, strict=True)]
    return torch.cat(changes).norm().item()


def their_trainer(
    authors: types.ModuleType,
    lm: LanguageModel,
    attack: AttackSettings,
    coefficients: Mapping[str, float],
    options: TrainSettings,
) -> Any:
    """Their `ProjectedGradLAT`; its data loaders are not used, since batches are handed to it."""
    sites = [site for site in SITES if site != EMBEDDING]
    loader = torch.utils.data.DataLoader([0], batch_size=1)
    return authors.ProjectedGradLAT(
        model=lm.model,
        dataloader=loader,
        sft_dataloader=loader,
        pgd_layers=[*sites, EMBEDDING],
        model_layers=list(range(SHAPE.layers)),
        epsilon=attack.eps,
        outer_learning_rate=options.lr,
        inner_learning_rate=attack.lr,
        pgd_iterations_per_step=attack.steps,
        model_iterations_per_step=options.iterations,
        model_layers_module=BLOCKS,
        only_train_lora=True,
        adv_loss_coefs={"toward": attack.toward, "away": attack.away},
        def_loss_coefs=dict(coefficients),
        clip_grad=options.clip,
        device="cpu",
    )


@torch.no_grad()
def divergence(authors: types.ModuleType, lm: LanguageModel, shifted: bool) -> Comparison:
    """KL under `kl_mode: reference`, before it is divided by its own value. shifted: ours at the
    positions that predict the labels; False: at the labels' own, as theirs."""
    own = rows(SHAPE, SHAPE.batch, 1)
    theirs: dict[str, float] = {}
    with running(authors, SHAPE.d_model), torch.enable_grad():
        authors.do_defense_step(
            model=lm.model,
            batch=None,
            losses_dict=theirs,
            wrappers=[],
            sft_batch=as_theirs(own),
            coefs={"kl": 1.0},
            device="cpu",
        )
    lm.model.zero_grad()
    # a last token more, so that the last label has a position of its own in the packed row
    batch = collate([TokenRow(row.prompt, ((*row.completions[0], 0),)) for row in own])
    length = SHAPE.completions[0]
    source = batch.source.view(len(own), length + 1)
    index = (source[:, :length] if shifted else source[:, 1:]).flatten()
    student, teacher = lm.network(), lm.network(adapter=False)
    hidden = [net.hidden(batch).flatten(0, 1)[index] for net in (student, teacher)]
    ours = kl_divergence(student.unembed, hidden[0], teacher.unembed, hidden[1], "reference")
    value = ours.mean().item()
    return Comparison("KL", theirs["def_kl"], value, abs(theirs["def_kl"] - value))


def agreements(authors: types.ModuleType, lm: LanguageModel) -> dict[str, Sequence[Comparison]]:
    """Where both must give the same."""
    one = rows(SHAPE, 1, 2)
    return {
        "attack, eps 6 (never binds), Adam 1e-3": attacks(authors, lm, one, settings(6.0, 1e-3)),
        "attack, eps .05 (binds), Adam 1e-2": attacks(authors, lm, one, settings(0.05, 1e-2)),
        "attack, eps 6, Adam 5e-2": attacks(authors, lm, one, settings(6.0, 5e-2)),
        "KL at the authors' positions": [divergence(authors, lm, shifted=False)],
        "attack on prompt and completions (`prompt+shared`)": attacks(
            authors, lm, one, settings(0.05, 1e-2, "prompt+shared")
        ),
        "3 LAT steps of 4 updates: toward, away, sft": [trained(authors, DEFENCE)],
        "3 LAT steps of 4 updates: toward, away, kl": [trained(authors, DEFENCE_KL)],
    }


def deviations(authors: types.ModuleType, lm: LanguageModel) -> dict[str, Sequence[Comparison]]:
    """What is different on purpose, or by a setting, and how much it is."""
    one, two, uneven = rows(SHAPE, 1, 2), rows(SHAPE, 2, 2), rows(UNEVEN, 2, 2)
    everywhere = settings(0.05, 1e-2, "prompt+completion")
    return {
        "rows do not interact (theirs: a mean, which Adam's 1e-8 sees)": attacks(
            authors, lm, two, settings(0.05, 1e-2)
        ),
        "a row's tokens share its weight (theirs: a micro-batch's)": attacks(
            authors, lm, uneven, settings(0.05, 1e-2)
        ),
        "each completion has its own perturbation (`prompt+completion`)": attacks(
            authors, lm, one, everywhere
        ),
        "KL where labels are predicted (`kl_mode: token`)": [divergence(authors, lm, shifted=True)],
        "the optimiser is kept (`fresh_optimiser: false`)": [
            trained(authors, DEFENCE, renewed=False)
        ],
        "the clipped norm is the adapter's (theirs: the perturbations' too)": [
            trained(authors, DEFENCE, clip=1.0)
        ],
    }


def table(title: str, found: Mapping[str, Sequence[Comparison]]) -> str:
    """Comparisons as lines of text."""
    lines = [title]
    for name, comparisons in found.items():
        lines.append(f"  {name}")
        for c in comparisons:
            lines.append(
                f"    {c.what:<34} theirs {c.authors:<12.6g} ours {c.ours:<12.6g}"
                f" greatest difference {c.difference:.1e}"
            )
    return "\n".join(lines)


PAGE = Path(__file__).with_name("parity.template.md")
TABLE = "| | what | theirs | ours | greatest difference |\n|---|---|---|---|---|"


def markdown(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Comparisons as a table, from what was written as JSON."""
    lines = [TABLE]
    for name, comparisons in found.items():
        for c in comparisons:
            numbers = f"{c['authors']:.4g} | {c['ours']:.4g} | {c['difference']:.1e}"
            lines.append(f"| {name} | {c['what']} | {numbers} |")
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """docs/parity.md: its text with the tables of these results."""
    text = PAGE.read_text(encoding="utf-8")
    for title in ("agree", "differ on purpose"):
        text = text.replace(f"{{{{ {title} }}}}", markdown(results[title]))
    return text


def main(argv: Sequence[str] | None = None) -> dict:
    """Compare, print, write; returns what is written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--authors", type=Path, required=True, help="a checkout of their code")
    parser.add_argument("--json", type=Path, help="where results go")
    parser.add_argument("--write", type=Path, help="where the page goes: docs/parity.md")
    arguments = parser.parse_args(argv)
    authors = load_authors(arguments.authors)
    lm = tiny_llama()
    out: dict[str, Any] = {"environment": environment(torch.device("cpu"))}
    for title, compare in (("agree", agreements), ("differ on purpose", deviations)):
        found = compare(authors, lm)
        print(table(title, found), flush=True)
        out[title] = {name: [asdict(c) for c in all_of] for name, all_of in found.items()}
    write(out, arguments.json)
    if arguments.write:
        arguments.write.write_text(page(out), encoding="utf-8")
    return out


if __name__ == "__main__":
    main()
