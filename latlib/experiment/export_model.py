"""Write a trained model as a standard model folder, its adapter merged into the base's weights.

    .venv/bin/python -m latlib.experiment.export_model --profile tiny --method lat --seed 0 --to
    ~/lat-model

1. The base is opened on the CPU in the precision it is stored in, the adapter is put on it and
   merged.
2. An adapter on an embedding that is the head too makes two matrices of them: the model that was
   trained has one each.
3. Logits of a few tokens before and after are compared: a merge that changes what the model says is
   an error.
4. Weights (safetensors), configuration, generation settings and tokenizer, a model card and the
   record of its making go into a folder aside, which is renamed: the target is there whole or not
   at all. Nothing in it names this machine.
transformers, and whatever else reads such folders, needs neither latlib nor peft for it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import latlib
from latlib.blocks import text_config
from latlib.config.paths import portable
from latlib.config.sections import ModelSettings, ProfileError
from latlib.evaluation.outcomes import BASE
from latlib.experiment.record import model_card, write_record
from latlib.experiment.run import Run
from latlib.experiment.spec import Spec, Variant, spec_parser
from latlib.io.files import folder_aside
from latlib.io.hub import Allowed, located, open_config, quietly
from latlib.models import load_model

PROBE_TOKENS = 32
# largest difference of logits, in their standard deviations: rounding of a merged weight to its
# precision, and no more
CLOSE = {torch.float64: 1e-4, torch.float32: 1e-3}
ROUNDED = 0.25  # in 16 bits


def export(run: Run, method: str, seed: int, to: str | Path, variant: Variant = None) -> Path:
    """Write the model of (method, seed, variant) merged into the folder `to`; returns that folder.

    Raises ProfileError for an unknown model, FileNotFoundError for one that is not trained yet,
    FileExistsError for a folder that holds something, ValueError where the merged model says other
    things than the adapter on its base.
    """
    spec, target = run.spec(method, seed, variant), Path(to).expanduser().absolute()
    if method == BASE or method in run.profile.released:
        raise ProfileError(
            f"method = {method!r} has no adapter of this run to merge: choose one that is trained"
            " here"
        )
    if not run.layout.has(spec):
        raise FileNotFoundError(
            f"{spec.name} is not in {run.folder}: train it first, with ./run_all.sh"
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"{target} holds something already: give another folder with --to, or delete it"
        )
    model, tokenizer, difference = _merged(run, spec)
    record = run.card(method, seed, variant) | {
        "merged_by": latlib.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "largest_logit_difference": difference,
        "settings": portable(run.profile.model_dump(mode="json")),
    }

    with folder_aside(target) as folder:
        with quietly():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_record(folder, record, run.profile, model_card(record, library="transformers"))
        folder.chmod(0o755)  # a folder made aside is its maker's alone
    return target


def _merged(run: Run, spec: Spec) -> tuple[Any, Any, float]:
    """(merged model, tokenizer, largest difference of a logit from the adapter on its base)"""
    base = run.layout.model_folder(spec.base)
    lm = load_model(base, _as_stored(base, run.profile.model), run.layout.model_folder(spec))
    try:
        model, difference = merged(lm.model, lm.dtype)
    except ValueError as error:
        raise ValueError(f"{spec.label} seed {spec.seed}: {error}") from None
    return model, lm.tokenizer, difference


def merged(model: Any, dtype: torch.dtype) -> tuple[Any, float]:
    """(the model with its adapter in its weights, largest difference of a logit). Raises ValueError
    for an adapter that no weights can hold, and where the model then says other things. dtype: of
    the weights."""
    before = _logits(model)
    _untie(model)
    try:
        with quietly():
            alone = model.merge_and_unload(safe_merge=True)
    except RuntimeError as error:
        raise ValueError(f"its adapter cannot be merged ({error})") from error
    difference = (_logits(alone) - before).abs().max().item()
    allowed = CLOSE.get(dtype, ROUNDED) * before.std().item()
    if not difference <= allowed:
        raise ValueError(
            f"merged, it says other things: a logit differs by {difference:.3g}, more than rounding"
            f" ({allowed:.3g}); if lora.targets names a matrix that two layers share, it cannot be"
            " merged"
        )
    return alone, difference


def _untie(model: Any) -> None:
    """Give the head a matrix of its own where it shares the embedding's and an adapter is on one of
    them."""
    base = model.get_base_model()
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    table, head = (getattr(module, "base_layer", module) for module in ends)
    adapted = any(isinstance(module, BaseTunerLayer) for module in ends)
    if not adapted or table.weight is not head.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in (base.config, text_config(base)):
        config.tie_word_embeddings = False
    warnings.warn(
        "embedding and head are one matrix in the base, and the adapter changes one of them: the"
        " export has two",
        stacklevel=3,
    )


def _as_stored(base: Path, settings: ModelSettings) -> ModelSettings:
    """Settings that open a base on the CPU in the precision its file says."""
    field = "model.source"
    allowed = Allowed.by(settings, revision=str(base) == settings.source)
    config = open_config(located(base, field, allowed.revision), field, allowed)
    dtype = str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    # without a date: the exported template writes today's
    changes = {"date": None, "dtype": dtype, "device": "cpu", "forward": "stock", "compile": False}
    return settings.model_copy(update=changes)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """[tokens, vocabulary] for a row of different tokens."""
    vocabulary = len(model.get_input_embeddings().weight)
    ids = torch.arange(PROBE_TOKENS) * (vocabulary // PROBE_TOKENS)
    return model(ids[None]).logits[0].double()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = spec_parser(
        "python -m latlib.experiment.export_model", "Write a trained model, merged."
    )
    parser.add_argument("--to", required=True, help="the folder to write, an empty or a new one")
    options = parser.parse_args(arguments)
    try:
        run = Run(options.profile, options.out)
        method = options.method or run.profile.main
        print(export(run, method, options.seed, options.to, options.variant))
    except (OSError, ValueError) as error:  # a ProfileError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
