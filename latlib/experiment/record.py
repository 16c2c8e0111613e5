"""What stands beside a model about its making: a record, the profile, and a model card.

None of them names a path of this machine.
"""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from latlib.config.paths import portable
from latlib.config.profile import Profile
from latlib.experiment.spec import Spec
from latlib.io.files import Json, write_json
from latlib.text.markdown import verbatim

RECORD = "latlib.json"  # in every model folder: how it was made
PROFILE = "profile.yaml"  # beside it
_TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_TAGS = ["latent-adversarial-training", "safety-research"]
_NO_LOSSES = {"step", "lr", "eps_scale", "grad_norm", "skipped"}


def base_name(profile: Profile, spec: Spec) -> str:
    """How a model's folder calls the base: by its place beside it, its hub id, or its own folder's
    name.
    """
    source = profile.model.source
    return f"../{spec.base.folder}" if source == "world" else portable(source)


def write_record(folder: Path, record: Json, profile: Profile, card: str = "") -> None:
    """Write how a model was made, and the whole profile, into its folder; and its card."""
    write_json(record, folder / RECORD)
    tree = portable(profile.model_dump(mode="json"))
    (folder / PROFILE).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(record: Json, library: str = "peft") -> str:
    """A filled-in model card in Markdown, from the record of an adapter. library: what opens the
    model.
    """
    data = ModelCardData(library_name=library, tags=_TAGS)
    losses = {}
    for name, value in record["last"].items():
        is_loss = name not in _NO_LOSSES and not name.startswith("validation_")
        if is_loss and math.isfinite(value):
            losses[name] = value
    card = ModelCard.from_template(
        data, template_path=str(_TEMPLATE), losses=losses, verbatim=verbatim, **record
    )
    return str(card)
