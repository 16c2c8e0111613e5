"""GGUF files, in which llama.cpp keeps quantised models, as standard model folders.

1. A source whose only weights are one GGUF file is dequantised to float32, in which every value of
   the file is exact, and saved with its tokenizer, its chat template and `gguf.json`: what it was.
2. The folder is kept beside the hub's cache and made once, whole or not at all. Another file at the
   same place, of another size or time, gets a folder of its own.
3. transformers passes over settings, tensors and ways to split text that it does not know, without
   a word: the model would be another one. Here they are set, or the file is refused. So are
   architectures of which no test shows that nothing is lost.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from latlib.errors import SettingError
from latlib.io.files import folder_aside, write_json
from latlib.io.weights import check_loaded

SUFFIX, NOTE = ".gguf", "gguf.json"
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # in llama.cpp's words; Mistral is a llama
WEIGHTS = (".safetensors", ".bin")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
_VISION = "mmproj"  # how files begin that hold what a model sees with
# settings of an architecture that its config takes, or that shapes of tensors say too
_READ = {
    "context_length",
    "block_count",
    "feed_forward_length",
    "embedding_length",
    "rope.freq_base",
    "rope.dimension_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
    "vocab_size",
}
# Llama 3.1 and later keep what stretches their rotations in this tensor: their settings' own form
_STRETCH = "rope_freqs.weight"
_STRETCHED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FACTORS = (8.0, 32.0)
# how byte-level vocabularies split text where transformers sets nothing up, in llama.cpp's names:
# as GPT-2 does, or so and numbers into digits
_AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo"}
_IN_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_KEPT = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "chat_template")


@dataclass(frozen=True)
class Contents:
    """What a GGUF file says of itself. settings: without lists. tokens: how many it knows. types:
    of its tensors, and how many have it. numbers: in all tensors together. stretch: see
    _STRETCH."""

    settings: Mapping[str, Any]
    tokens: int
    types: Mapping[str, int]
    numbers: int
    stretch: Sequence[float]

    @property
    def architecture(self) -> str:
        """In llama.cpp's words."""
        return str(self.settings.get("general.architecture"))

    @property
    def size(self) -> int:
        """Bytes of its weights once they are dequantised."""
        return 4 * self.numbers

    def setting(self, name: str) -> Any:
        """Of the architecture; None where it is not set."""
        return self.settings.get(f"{self.architecture}.{name}")


def gguf_of(source: Path, field: str) -> Path | None:
    """The GGUF file that a source is, or holds in place of other weights. Raises SettingError for a
    folder with several."""
    if source.suffix == SUFFIX and source.is_file():
        return source
    if not source.is_dir():
        return None
    names = [path.name for path in source.iterdir()]
    name = only_one(names, f"{field} = {str(source)!r}")
    return source / name if name else None


def only_one(names: Sequence[str], said: str) -> str | None:
    """Of a source's files the one that is GGUF; None where there is none, or there are other
    weights. Raises SettingError for several."""
    if any(name.endswith(WEIGHTS) for name in names):
        return None
    found = sorted(n for n in names if n.endswith(SUFFIX) and not n.startswith(_VISION))
    if len(found) > 1 and not all(map(_PART.search, found)):
        raise SettingError(
            f"{said} holds several GGUF files, {', '.join(found)}: give the path of the one that is"
            " meant"
        )
    return found[0] if found else None


def folder_of(file: Path) -> Path:
    """Where a file is kept dequantised."""
    path = file.resolve()
    stat = path.stat()
    key = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(constants.HF_HOME) / "latlib" / "gguf" / f"{file.stem}-{digest}"


def dequantised(file: Path, field: str) -> Path:
    """The standard folder of a file, made where it is not there yet. Raises SettingError for a file
    that cannot be read rightly; transformers may raise more."""
    target, said = folder_of(file), f"{field} = {str(file)!r}"
    if target.is_dir():
        return target
    found = contents(file, field)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            with folder_aside(target) as folder:
                save_standard(file, found, folder, said)
    return target


def contents(file: Path, field: str) -> Contents:
    """What a file says of itself. Raises SettingError without the package `gguf`, for a file that
    is not whole, and for one that would not be read rightly."""
    return _read(file, folder_of(file), f"{field} = {str(file)!r}")


@lru_cache(maxsize=8)
def _read(file: Path, kept: Path, said: str) -> Contents:
    """`contents`, once while a file stays as it is. kept: `folder_of` it."""
    try:
        import gguf
    except ImportError:
        raise SettingError(
            f"{said} is read by the package `gguf`, which is not installed: pip install gguf"
        ) from None
    if _PART.search(file.name):
        raise SettingError(
            f"{said} is one of several parts: join them with llama-gguf-split --merge"
        )
    try:
        reader = gguf.GGUFReader(file)
        fields = reader.fields.items()
        settings = {n: f.contents() for n, f in fields if f.types[0] != gguf.GGUFValueType.ARRAY}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise SettingError(
            f"{said} is no GGUF file, or was cut ({error}): download it again"
        ) from None
    tensors = [tensor for tensor in reader.tensors if tensor.name != _STRETCH]
    stretch = [tensor.data.tolist() for tensor in reader.tensors if tensor.name == _STRETCH]
    types = Counter(tensor.tensor_type.name for tensor in tensors)
    numbers = sum(int(tensor.n_elements) for tensor in tensors)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens.data) if tokens else 0
    found = Contents(settings, n_tokens, dict(types), numbers, next(iter(stretch), ()))
    _check_settings(found, said)
    return found


def _check_settings(found: Contents, said: str) -> None:
    """Raise SettingError for what is no model, for an architecture that is not known here and for
    settings that nobody would read."""
    kind = found.settings.get("general.type", "model")
    if kind != "model" or found.architecture not in ARCHITECTURES:
        raise SettingError(
            f"{said} is a {kind} of architecture {found.architecture!r}, and GGUF models of"
            f" {', '.join(ARCHITECTURES)} alone are read: give it as safetensors"
        )
    for name, value in found.settings.items():
        architecture, _, setting = name.partition(".")
        scaled = setting != "rope.scaling.type" or value != "none"
        if architecture == found.architecture and setting not in _READ and scaled:
            raise SettingError(
                f"{said} sets {name} = {value!r}, which is not read from GGUF: give the model as"
                " safetensors"
            )


def read_config(file: Path, found: Contents, said: str) -> PretrainedConfig:
    """The configuration that a file describes."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    turned = found.setting("rope.dimension_count")
    config.head_dim = found.setting("attention.key_length") or turned or config.head_dim
    if turned not in (None, config.head_dim):
        raise SettingError(
            f"{said} turns {turned} of {config.head_dim} dimensions of a head, which is not known"
            " here: give the model as safetensors"
        )
    if len(found.stretch):
        _stretch(config, found.stretch, said)
    return config


def _stretch(config: PretrainedConfig, factors: Sequence[float], said: str) -> None:
    """Set the scaling of Llama 3.1 and later. Raises SettingError where the factors are not
    theirs."""
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    width = config.head_dim
    plain = theta ** (-torch.arange(0, width, 2) / width)
    for factor in _FACTORS:
        config.rope_parameters = {**_STRETCHED, "factor": factor, "rope_theta": theta}
        stretched = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
        if torch.allclose(plain / stretched, torch.tensor(factors), rtol=1e-3):
            return
    raise SettingError(
        f"{said} stretches its rotations in a way that is not known here ({_STRETCH}): give the"
        " model as safetensors"
    )


def read_tokenizer(file: Path, found: Contents, said: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, with its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if found.settings.get("tokenizer.ggml.model") != "gpt2":
        return tokenizer
    plan = json.loads(tokenizer.backend_tokenizer.to_str())
    # transformers adds GPT-2's own where the file has none
    plan["added_tokens"] = [token for token in plan["added_tokens"] if token["id"] < found.tokens]
    way = found.settings.get("tokenizer.ggml.pre")
    known = plan["pre_tokenizer"]["type"] == "Sequence"
    if way in _IN_DIGITS:
        steps = [{"type": "Digits", "individual_digits": True}, plan["pre_tokenizer"]]
        plan["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    elif not known and way not in _AS_GPT2:
        raise SettingError(
            f"{said} splits text as {way!r}, which is not known here: give the model as safetensors"
        )
    backend = Tokenizer.from_str(json.dumps(plan))
    options = {name: tokenizer.init_kwargs.get(name) for name in _KEPT}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def save_standard(file: Path, found: Contents, folder: Path, said: str) -> None:
    """Fill a folder with what a file holds: weights, configuration, tokenizer, NOTE. said: how
    errors name the file."""
    config = read_config(file, found, said)
    tokenizer = read_tokenizer(file, found, said)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    quantised, info = AutoModelForCausalLM.from_pretrained(
        file.parent,
        config=config,
        gguf_file=file.name,
        dtype=torch.float32,
        output_loading_info=True,
    )
    check_loaded(quantised, info, said)
    numbers = sum(parameter.numel() for parameter in quantised.parameters())
    if numbers != found.numbers:
        raise SettingError(
            f"{said} holds {found.numbers} numbers, and transformers has a place for {numbers}:"
            " give the model as safetensors"
        )
    # one that was never quantised: transformers saves no other
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    whole = np.memmap(file, dtype=np.uint8, mode="r")
    note = {
        "file": file.name,
        "sha256": hashlib.sha256(whole.data).hexdigest(),
        "transformers": transformers.__version__,
        "dtype": "float32",
        **asdict(found),
    }
    write_json(note, folder / NOTE)
