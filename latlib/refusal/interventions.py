"""A direction, and what is done with it besides ablating it as the model runs (`Network.ablated`).

1. `orthogonalised`: a copy of the model whose weights cannot write it. The same function as
   ablation by hooks, and a standard model: it can be saved, merged, generated from.
2. `adding`: the perturbation that adds a vector at a site, at every position; on harmless prompts a
   refusal direction makes the model refuse.

Source: Arditi et al. 2024, section 2.4 and appendix E.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from latlib.batch import Batch
from latlib.blocks import decoder_of, writers_of
from latlib.evaluation.generate import Perturb
from latlib.hooks import orthonormal, project_out
from latlib.models import LanguageModel
from latlib.threat import Site


@dataclass(frozen=True, eq=False)
class Direction:
    """vector: [d_model], or [k, d_model] for a subspace, float64, in units of the stream. site,
    position: where it was taken; position counts from the prompt's end. note: what was unusual
    about its choice. found: whether the search for it found one (`directions.judged`); None where
    nothing was searched. A vector that was not found says nothing about the model."""

    vector: Tensor
    site: Site
    position: int = -1
    note: str = ""
    found: bool | None = None


Directions = dict[str, Direction]  # how a direction was chosen -> it


def adding(vector: Tensor, site: Site, strength: float = 1.0) -> Perturb:
    """The perturbation of a batch that adds `strength` times `vector` ([d_model], units of the
    stream) at a site, at every position."""

    def perturb(batch: Batch) -> dict[Site, Tensor]:
        return {site: (strength * vector).to(batch.ids.device).expand(*batch.shape, -1)}

    return perturb


@torch.no_grad()
def orthogonalised(lm: LanguageModel, directions: Tensor) -> LanguageModel:
    """A copy of the model (its adapter merged) without `directions` ([d_model] or [k, d_model]) in
    what its embedding, attention and MLP write to the residual stream; equal to
    `lm.network().ablated(directions)`.

    Raises ValueError for a family with a norm between these weights and the stream: its gain writes
    the direction again.
    """
    model = copy.deepcopy(lm.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    basis = orthonormal(directions)

    def without(rows: Tensor) -> Tensor:  # [..., d_model], projected in float64
        return project_out(rows.double(), basis).to(rows.dtype)

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:  # the head reads what it read before
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    for table in (m for m in decoder_of(model).children() if isinstance(m, nn.Embedding)):
        table.weight.copy_(without(table.weight))
    for writers in writers_of(model):
        for layer in map(_last_linear, writers):
            layer.weight.copy_(without(layer.weight.T).T)
            if layer.bias is not None:
                layer.bias.copy_(without(layer.bias))
    return replace(lm, model=model)


_LAST = ("o_proj", "out_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "w2")


def _last_linear(writer: nn.Module) -> nn.Linear:
    """The matrix by which an attention or MLP module writes."""
    found = [
        child
        for name, child in writer.named_children()
        if name in _LAST and isinstance(child, nn.Linear)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(writer).__name__} does not write to the stream by one known matrix: use"
            " `lm.network().ablated`"
        )
    return found[0]
