"""The activations of Llama-2-7B that Abbas et al. 2025 published, and what `massive` says of them.

    python -m latlib.refusal.abbas FOLDER results/abbas2025

FOLDER is a checkout of `nlpet/apart-lab-refusal-lat-project`, or holds `baseline.safetensors`,
`at.safetensors` and `lat.safetensors` with tensors `harmful.12`, `harmless.12` and so on. Nobody's
files are kept: the command writes shares, angles and counts. `write_stand_in` makes a folder of the
second kind out of random numbers, for tests and for who has no checkout.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latlib.io.files import write_json
from latlib.refusal.massive import (
    MASSIVE,
    Sides,
    direction_angles,
    massive_record,
    shares_without,
)

SOURCE = "nlpet/apart-lab-refusal-lat-project, commit 6f2343a"
BASELINE, AT, LAT = MODELS = ("baseline", "at", "lat")  # SSFT, AT and LAT of the paper
BLOCKS = (1, 2, 3, 4, 8, 12, 16, 20)  # as the files are numbered; the paper's own, 14, is not there
SIDES = ("harmful", "harmless")
PROMPTS, D_MODEL = 100, 4096  # of each side; of Llama-2-7B
MASSIVE_DIMENSIONS = (1415, 2533)  # of Llama-2-7B: Sun et al. 2024 (arXiv 2402.17762)
CHECKOUT = "data_store/ablated_llama-2-7b/{model}/{side}_layer{block}.pt"

Activations = dict[int, dict[str, Sides]]  # block -> model -> what it is like there


def load_activations(folder: Path) -> Activations:
    """Read a checkout, or a folder of safetensors files, as float64.

    Raises FileNotFoundError naming the file that is missing and what the folder should be, and
    ValueError for a tensor of another shape.
    """
    found: Activations = {block: {} for block in BLOCKS}
    for model in MODELS:
        tensors = _model_tensors(folder, model)
        for block in BLOCKS:
            harmful, harmless = (tensors[f"{side}.{block}"].double() for side in SIDES)
            for side, stream in zip(SIDES, (harmful, harmless)):
                if stream.shape != (PROMPTS, D_MODEL):
                    raise ValueError(
                        f"{side}.{block} of {model} is {list(stream.shape)}, not"
                        f" [{PROMPTS}, {D_MODEL}]: take the files of {SOURCE}"
                    )
            found[block][model] = (harmful, harmless)
    return found


def _model_tensors(folder: Path, model: str) -> dict[str, Tensor]:
    """'harmful.12' -> what was saved."""
    packed = folder / f"{model}.safetensors"
    if packed.is_file():
        return load_file(packed)
    tensors = {}
    for side in SIDES:
        for block in BLOCKS:
            file = folder / CHECKOUT.format(model=model, side=side, block=block)
            if not file.is_file():
                raise FileNotFoundError(
                    f"neither {packed.name} nor {file.relative_to(folder)} in {folder}: give a"
                    f" checkout of {SOURCE}"
                )
            tensors[f"{side}.{block}"] = torch.load(file, map_location="cpu", weights_only=True)
    return tensors


@dataclass(frozen=True)
class Findings:
    """Tables of every block. shares: of `massive.shares_without`, with columns block and centred.
    angles: of `massive.direction_angles`, with block. massive: block, model, rule, dimension, and
    in how many of the `prompts` it is massive. sizes: block, model, largest, times_median.
    """

    shares: pd.DataFrame
    angles: pd.DataFrame
    massive: pd.DataFrame
    sizes: pd.DataFrame


def examine(activations: Activations) -> Findings:
    """Everything that is said about the published activations, in tidy tables."""
    shares, angles, massive, sizes = [], [], [], []
    for block, models in activations.items():
        for centred in (False, True):
            table = shares_without(models, MASSIVE_DIMENSIONS, BASELINE, centred)
            shares.append(table.assign(block=block, centred=centred))
        angles.append(direction_angles(models, MASSIVE_DIMENSIONS).assign(block=block))
        for model, sides in models.items():
            record = massive_record(sides)
            sizes.append([block, model, record["largest"], record["times_median"]])
            for rule in MASSIVE:
                for dimension, count in record[rule].items():
                    massive.append([block, model, rule, int(dimension), count, record["prompts"]])
    columns = ["block", "model", "rule", "dimension", "massive_in", "prompts"]
    return Findings(
        pd.concat(shares, ignore_index=True),
        pd.concat(angles, ignore_index=True),
        pd.DataFrame(massive, columns=columns),
        pd.DataFrame(sizes, columns=["block", "model", "largest", "times_median"]),
    )


def to_record(findings: Findings) -> dict[str, Any]:
    """JSON-ready, rounded to six digits."""
    record: dict[str, Any] = {"source": SOURCE}
    for name, table in vars(findings).items():
        record[name] = table.round(6).to_dict("records")
    return record


def write_stand_in(folder: Path, seed: int = 0) -> None:
    """Write random activations of the published shapes and file names, whose truth is known.

    Each difference is noise around one common direction, the same in all models; before any
    removal, the first two components hold about a half. In LAT, a third of the harmful prompts have
    1415 and 2533 at -15 and 40 beside it, from block 2 on. So without the two dimensions, or
    without those pairs, LAT is what the baseline is.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (PROMPTS, D_MODEL)
    for model in MODELS:
        tensors = {}
        for block in BLOCKS:
            direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed + block))
            harmless, harmful = (0.1 * torch.randn(shape, generator=generator) for _ in SIDES)
            harmful += 0.14 * direction
            if model == LAT and block > 1:
                harmful[: PROMPTS // 3, list(MASSIVE_DIMENSIONS)] = torch.tensor([-15.0, 40.0])
            tensors[f"harmful.{block}"] = harmful.half()
            tensors[f"harmless.{block}"] = harmless.half()
        save_file(tensors, folder / f"{model}.safetensors")


def main(arguments: list[str] | None = None) -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser("python -m latlib.refusal.abbas", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a checkout of the authors' repository")
    parser.add_argument("results", type=Path, help="such as results/abbas2025")
    options = parser.parse_args(arguments)
    findings = examine(load_activations(options.folder))
    write_json(to_record(findings), options.results / "concentration.json")


if __name__ == "__main__":
    main()
