"""Whether weights are whole: before they are loaded, by the headers of their files; and after.

1. An index names files that are all there; each file is safetensors, not the pointer that git
   leaves without its large-file extension, and as long as its header says.
2. Every parameter of the model stands in the files. Names that a family's loader changes on the way
   cannot be told from the headers: there loading itself says what is missing.
3. Quantised weights are refused: gradients through them, and merging into them, are not exact.
4. No loaded weight is NaN or infinite, and every token of the tokenizer has a row in the embedding.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from latlib.errors import SettingError
from latlib.io.files import read_json
from latlib.io.messages import in_a_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_model.safetensors"
POINTER = b"version https://git-lfs"
SHOWN = 3  # names in a message
FLOATS = {"F64", "F32", "F16", "BF16"}
_QUANTISED = (
    "through which latlib computes no exact gradients: give the checkpoint in 16 or 32 bits"
)


def header(path: Path, field: str) -> dict[str, Any]:
    """name -> {dtype, shape, data_offsets} of a safetensors file. Raises SettingError naming the
    file for a pointer, for what is no safetensors, and for a file that was cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if (start + file.read(len(POINTER) - 8)) == POINTER:
            raise SettingError(
                f"{field}: {path} is a pointer of git-lfs, not the weights: fetch them (git lfs"
                " pull), or download the folder again"
            )
        file.seek(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = file.read(length) if length < size else b""
    try:
        found = json.loads(text)
        found.pop("__metadata__", None)
        end = max((each["data_offsets"][1] for each in found.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingError(
            f"{field}: {path} is no safetensors file, or was cut in its header: download it again"
        ) from None
    if size != 8 + length + end:
        raise SettingError(
            f"{field}: {path} is {size} bytes long, and should be {8 + length + end}: download it"
            " again"
        )
    return found


def headers(folder: Path, field: str) -> dict[str, Any]:
    """`header` of all weights of a model folder, {} without safetensors. Raises SettingError for an
    index that names files or tensors which are not there, and for weights in 8 bits or less."""
    found = _headers(folder, field)
    few = [n for n, each in found.items() if n.endswith("weight") and each["dtype"] not in FLOATS]
    if few:
        kind = found[few[0]]["dtype"]
        raise SettingError(f"{field}: {_some(few)} of {folder} are {kind} numbers, {_QUANTISED}")
    return found


def check_values(folder: Path, field: str) -> None:
    """Raise SettingError for a NaN or infinite weight in a folder that `headers` has found whole,
    read tensor by tensor."""
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            each = ((name, tensors.get_tensor(name)) for name in tensors.keys())
            check_finite(each, f"{field}, {file.name}")


def bytes_of_weights(folder: Path) -> int:
    """Of the safetensors that `check_values` reads."""
    return sum(file.stat().st_size for file in _weight_files(folder))


def _weight_files(folder: Path) -> list[Path]:
    for name in (ADAPTER, SINGLE):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX
    names = read_json(index)["weight_map"].values() if index.is_file() else ()
    return [folder / name for name in sorted(set(names))]


def _headers(folder: Path, field: str) -> dict[str, Any]:
    single = folder / SINGLE
    if single.is_file():  # which transformers then reads, whatever an index names
        return header(single, field)
    if not (folder / INDEX).is_file():
        return {}
    try:
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SettingError(f"{field}: {folder / INDEX} is no index: download it again") from None
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise SettingError(
            f"{field}: {folder} lacks {_some(absent)}, which its index names: download the rest"
        )
    found: dict[str, Any] = {}
    for name in files:
        found |= header(folder / name, field)
    lost = [name for name in where if name not in found]
    if lost:
        raise SettingError(
            f"{field}: the files of {folder} lack {_some(lost)}, which its index names: download"
            " the folder again"
        )
    return found


def check_folder(folder: Path, config: PretrainedConfig, field: str) -> None:
    """Raise SettingError for weights that are not whole, told by their headers alone."""
    check_not_quantised(config, field)
    found = headers(folder, field)
    if not found:
        return
    model = skeleton(config, field)
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters()}
    known = [name for name in found if name in wanted]
    every = model.state_dict()
    if any(name not in every for name in found):  # the family's loader gives some other names
        return
    absent = [name for name in wanted if name not in found]
    if absent:
        raise SettingError(
            f"{field}: the weights of {folder} lack {_some(absent)}: download the folder again"
        )
    for name in known:
        shape = tuple(found[name]["shape"])
        if shape != wanted[name]:
            raise SettingError(
                f"{field}: {name} in {folder} is {shape}, and its config says {wanted[name]}:"
                " config and weights are of different models"
            )


def skeleton(config: PretrainedConfig, field: str) -> nn.Module:
    """The model of a config, without data. Raises SettingError for a config that makes none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of a family's own code
        raise SettingError(
            f"{field}: its config makes no model ({type(error).__name__}: {in_a_line(error)}):"
            " correct config.json, or download it again"
        ) from error


def check_not_quantised(config: PretrainedConfig, field: str) -> None:
    """Raise SettingError for a checkpoint whose weights are quantised."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    as_dict = quantised if isinstance(quantised, Mapping) else quantised.to_dict()
    method = as_dict.get("quant_method", "unknown")
    raise SettingError(f"{field}: the weights are quantised ({method}), {_QUANTISED}")


def check_loaded(model: nn.Module, info: Mapping[str, Any], field: str) -> None:
    """Raise SettingError for a model that was loaded in part, or holds NaN. info: transformers'
    `output_loading_info`."""
    absent = sorted(info.get("missing_keys", ()))
    if absent:
        raise SettingError(
            f"{field}: the weights lack {_some(absent)}, which would be random numbers: download"
            " them again"
        )
    check_finite(model.named_parameters(), field)


def check_finite(weights: Iterable[tuple[str, Tensor]], field: str) -> None:
    """Raise SettingError for a weight that is NaN or infinite."""
    for name, weight in weights:
        if not bool(torch.isfinite(weight).all()):
            raise SettingError(f"{field}: {name} holds NaN or infinite weights: download it again")


def check_tokens(tokenizer: Any, rows: int, field: str) -> None:
    """Raise SettingError for a tokenizer with tokens that the embedding has no row for."""
    ids = tokenizer.get_vocab().values()
    # of special tokens, a row need only those that are put into rows
    used = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    unused = set(tokenizer.all_special_ids) - used
    largest = max(set(ids) - unused, default=-1)
    if largest >= rows:
        raise SettingError(
            f"{field}: the tokenizer's largest token id is {largest}, and the model's embedding has"
            f" {rows} rows: they are of different models"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    more = len(names) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
