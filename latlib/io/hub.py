"""Find and open other people's models: safetensors only, none of their code, clear errors; more
only where allowed.

1. A source that looks like a path must be a folder; anything else is a hub id, read from the cache
   or the network.
2. Weights must be there as safetensors before anything is loaded: pickles can run code, and the
   hub's automatic conversion would load what a third party uploaded. A profile can allow pickles
   (model.allow_pickle).
3. Python files of a model are not run: a model or tokenizer that cannot do without them is refused,
   unless the profile allows them (model.trust_remote_code). One that transformers knows is opened
   with transformers' own code.
4. A source whose weights are a GGUF file is dequantised first (`latlib.io.gguf`).
5. Weights are read in the precision they are wanted in, so that they are in memory once.
6. What is asked of the hub is asked again while it is out (`latlib.io.outages`).
7. Whatever goes wrong is said as field, value and fix: gated without a token, missing, pickles
   only, foreign code.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from latlib.errors import SettingError
from latlib.io.files import read_json
from latlib.io.gguf import (
    SUFFIX,
    WEIGHTS,
    contents,
    dequantised,
    folder_of,
    gguf_of,
    only_one,
    read_config,
    read_tokenizer,
)
from latlib.io.messages import in_a_line
from latlib.io.outages import FIX, causes, is_outage, through_outages
from latlib.io.weights import check_finite, check_loaded, check_not_quantised, headers

# names of weights that are read, and of pickles, which may run code
MODEL_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER_FILES = (("adapter_model.safetensors",), ("adapter_model.bin",))
Files = tuple[tuple[str, ...], tuple[str, ...]]
Found = TypeVar("Found")


Permissions = Any  # a `config.sections.ModelSettings`, or anything with its fields


@dataclass(frozen=True)
class Allowed:
    """What opening a source may do. pickle, code: None where no setting can allow it. revision: of
    a hub id.
    """

    pickle: bool | None = None
    code: bool | None = None
    revision: str | None = None

    @classmethod
    def by(cls, settings: Permissions, revision: bool = True) -> Allowed:
        """What a profile's `model` section allows; its revision is that of model.source only."""
        wanted = settings.revision if revision else None
        return cls(settings.allow_pickle, settings.trust_remote_code, wanted)

    @property
    def options(self) -> dict[str, object]:
        """For transformers' from_pretrained."""
        revision = {"revision": self.revision} if self.revision else {}
        return {"trust_remote_code": bool(self.code), **revision}


@contextmanager
def quietly() -> Iterator[None]:
    """Without the libraries' bars over files and their announcements, which would fill a notebook's
    output.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def located(source: str | os.PathLike[str], field: str, revision: str | None = None) -> str:
    """The source as transformers wants it, dequantised where it is GGUF. revision: of a hub id.
    Raises SettingError for what looks like a path and is no folder, and for GGUF that cannot be
    read rightly.
    """
    text = os.fspath(source)
    place = Path(text).expanduser()
    here = bool(text) and place.exists()  # '' would be the working folder
    file = gguf_of(place, field) if here else None
    if here and place.is_dir() and file is None:
        return str(place)
    if file is None:
        if place.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
            raise SettingError(
                f"{field} = {text!r} is not a folder: give a model folder or a hub id such as"
                " owner/name"
            )
        file = _gguf_on_hub(text, field, revision)
    if file is None:
        return text
    found = file
    allowed = Allowed(revision=revision)
    return str(_explained(lambda: dequantised(found, field), field, text, allowed))


def _gguf_on_hub(source: str, field: str, revision: str | None) -> Path | None:
    """The GGUF file of a repository without other weights, downloaded."""
    cached = _cached(source, revision, "model")
    names = [path.name for path in cached.iterdir()] if cached else []
    if not any(name.endswith((*WEIGHTS, SUFFIX)) for name in names):
        try:
            names = through_outages(
                lambda: HfApi().list_repo_files(source, revision=revision), f"{field} = {source!r}"
            )
        except Exception as error:
            if is_outage(error):
                raise SettingError(f"{field} = {source!r} {_fix(error, Allowed())}") from error
            return None  # said where the source is opened
    name = only_one(names, f"{field} = {source!r}")
    file = source_file(source, name, field, revision) if name else None
    return Path(file) if file else None


def local_folder(source: str, revision: str | None = None, kind: str = "model") -> Path | None:
    """Where a model or data set is on this machine: the folder `source`, or what the hub cache has
    of it; asks nobody. kind: 'model' or 'dataset'. Of GGUF: the folder it is dequantised in, or the
    file, before that. Raises SettingError for a folder with several of these."""
    place = Path(source).expanduser()
    is_here = place.is_dir() or place.suffix == SUFFIX
    found = place if is_here else _cached(source, revision, kind)
    file = gguf_of(found, "model") if found else None
    if file is None:
        return found
    return folder_of(file) if folder_of(file).is_dir() else file


def _cached(source: str, revision: str | None, kind: str) -> Path | None:
    try:
        return Path(
            snapshot_download(source, repo_type=kind, revision=revision, local_files_only=True)
        )
    except (HFValidationError, LocalEntryNotFoundError):  # no hub id, or not here
        return None


def source_file(source: str, name: str, field: str, revision: str | None = None) -> str | None:
    """Where a file of a folder or hub repository is on this machine, or None. Raises SettingError
    if it cannot tell.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    allowed = Allowed(revision=revision)
    return _explained(lambda: _hub_file(source, name, revision), field, source, allowed)


def _hub_file(source: str, name: str, revision: str | None) -> str | None:
    # that it lacks the file is in the cache, too: no reason to wait for a hub that is out
    if try_to_load_from_cache(source, name, revision=revision) is _CACHED_NO_EXIST:
        return None
    try:
        return hf_hub_download(source, name, revision=revision)
    except EntryNotFoundError as error:  # also of what is not cached, while the hub is out
        if is_outage(error):
            raise
        return None


def is_adapter(source: str, field: str, revision: str | None = None) -> bool:
    """Whether a source is a LoRA (or another adapter of peft) rather than a whole model."""
    return source_file(source, "adapter_config.json", field, revision) is not None


def base_of(adapter: str, field: str) -> str:
    """The model that an adapter says it was trained on, '' if it does not."""
    file = source_file(adapter, "adapter_config.json", field)
    config = read_json(Path(file)) if file else {}
    return config.get("base_model_name_or_path") or ""


def open_config(source: str, field: str, allowed: Allowed) -> PretrainedConfig:
    """The configuration of a whole model. Raises SettingError, also for an adapter, under which
    transformers would open whatever model the adapter names."""
    if not source.endswith(SUFFIX) and is_adapter(source, field, allowed.revision):
        raise SettingError(
            f"{field} = {source!r} is an adapter, not a model: give the model under it (its"
            f" adapter_config.json says {base_of(source, field)!r}), and the adapter as a released"
            " model"
        )

    def read() -> PretrainedConfig:
        if not Path(source).is_dir():
            # without a network a file that is not cached looks like one that does not exist; this
            # one always does
            cached_file(source, "config.json", revision=allowed.revision)
        return AutoConfig.from_pretrained(source, **allowed.options)

    def read_gguf() -> PretrainedConfig:
        return read_config(Path(source), contents(Path(source), field), field)

    if source.endswith(SUFFIX):
        return _explained(read_gguf, field, source, allowed)
    config = _explained(read, field, source, allowed)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise SettingError(
            f"{field} = {source!r} is a {config.model_type!r} model, which transformers does not"
            " open as a language model: give one that it does, or the language model in it alone"
        )
    return config


def open_model(source: str, field: str, allowed: Allowed, dtype: torch.dtype) -> nn.Module:
    """A causal LM on the CPU, its weights read in `dtype`. Raises SettingError naming the field."""
    config = open_config(source, field, allowed)
    safe = weights_are_safe(source, field, allowed, MODEL_FILES)
    named = f"{field} = {source!r}"
    check_not_quantised(config, named)
    if Path(source).is_dir():
        headers(Path(source), named)

    def read() -> tuple[nn.Module, dict[str, Any]]:
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=safe,
            output_loading_info=True,
            **allowed.options,
        )

    model, info = _explained(read, field, source, allowed)
    check_loaded(model, info, named)
    # buffers stay: rotary frequencies rounded to bf16 turn far positions by the wrong angle
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def open_tokenizer(source: str, field: str, allowed: Allowed) -> PreTrainedTokenizerBase:
    """The tokenizer of a source. Raises SettingError naming the field."""

    def read() -> PreTrainedTokenizerBase:
        if source.endswith(SUFFIX):
            return read_tokenizer(Path(source), contents(Path(source), field), field)
        tokenizer = AutoTokenizer.from_pretrained(source, **allowed.options)
        tokenizer("A")  # some wrong values are noticed in use only
        return tokenizer

    return _explained(read, f"the tokenizer of {field}", source, allowed)


def open_adapter(model: nn.Module, source: str, field: str, allowed: Allowed) -> PeftModel:
    """`model` with an adapter on it, its weights not copied. Raises SettingError naming the
    field.
    """
    weights_are_safe(source, field, allowed, ADAPTER_FILES)
    check_adapter(open_adapter_config(source, field), model, f"{field} = {source!r}")
    # first what may be downloaded: a model is not wrapped twice
    kept = _explained(lambda: load_peft_weights(source, device="cpu"), field, source, allowed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # missing keys are an error below
        adapted = _explained(
            lambda: PeftModel.from_pretrained(model, source), field, source, allowed
        )
    check_adapter_keys(adapted, kept, f"{field} = {source!r}")
    check_finite(kept.items(), f"{field} = {source!r}")
    return adapted


def open_adapter_config(source: str, field: str) -> PeftConfig:
    """What an adapter says of itself. Raises SettingError for one that adds tokens instead of
    changing the model's layers."""
    config = _explained(lambda: PeftConfig.from_pretrained(source), field, source, Allowed())
    if config.is_prompt_learning:
        raise SettingError(
            f"{field} = {source!r} is a {config.peft_type} adapter, which adds tokens of its own:"
            " give one that changes the model's layers, such as LoRA"
        )
    return config


def check_adapter(config: PeftConfig, model: nn.Module, field: str) -> None:
    """Raise SettingError for an adapter that was trained on another base."""
    base = config.base_model_name_or_path or ""
    own = getattr(getattr(model, "config", None), "_name_or_path", "")
    if _is_hub_id(base) and _is_hub_id(own) and base.lower() != own.lower():
        raise SettingError(
            f"{field} was trained on {base!r}, and is put on {own!r}: set the model to {base!r}"
        )


def check_adapter_keys(adapted: PeftModel, kept: Mapping[str, Any], field: str) -> None:
    """Raise SettingError unless every weight of the adapter has its place, and every place its
    weight, of its shape. kept: the file's, or its header."""
    places = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = set(places)
    whole = {f"base_model.model.{name}" for name, _ in adapted.get_base_model().named_parameters()}
    absent = sorted(wanted - set(kept))
    strange = sorted(set(kept) - wanted - whole)
    for names, said in ((absent, "lacks"), (strange, "has, and the model has no place for,")):
        if names:
            raise SettingError(
                f"{field} {said} {names[0]} and {len(names) - 1} more of its weights: it was made"
                " for another model, or is not whole"
            )
    for name in sorted(wanted):
        place = tuple(places[name].shape)
        own = tuple(kept[name]["shape"] if isinstance(kept[name], Mapping) else kept[name].shape)
        if place != own:
            raise SettingError(
                f"{field}: its {name} is {own}, and the model has a place for {place}: it was made"
                " for another model, or with another r"
            )


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def weights_are_safe(source: str, field: str, allowed: Allowed, files: Files) -> bool:
    """Whether the weights are safetensors, or pickles that are allowed. files: MODEL_FILES or
    ADAPTER_FILES. Raises SettingError where they are neither.
    """
    safe, pickled = files

    def has(names: tuple[str, ...]) -> bool:
        return any(source_file(source, name, field, allowed.revision) for name in names)

    if has(safe):
        return True
    there = has(pickled)
    if there and allowed.pickle:
        return False
    said = f"{field} = {source!r} holds no {' or '.join(safe)}"
    if there and allowed.pickle is not None:
        raise SettingError(
            f"{said}, only pickled weights, which can run any code when they are opened: convert"
            " them to safetensors, or set model.allow_pickle: true if you trust whoever made them"
        )
    raise SettingError(
        f"{said}: pickled weights can run code and are not read; convert them to safetensors, or"
        " choose a source that has them"
    )


def _explained(call: Callable[[], Found], field: str, source: str, allowed: Allowed) -> Found:
    """What `call` gives; whatever libraries, the hub and foreign code raise becomes a SettingError,
    an outage after some tries."""
    try:
        with quietly():
            return through_outages(call, f"{field} = {source!r}")
    except SettingError:
        raise
    except Exception as error:
        raise SettingError(f"{field} = {source!r} {_fix(error, allowed)}") from error


def _fix(error: Exception, allowed: Allowed) -> str:
    """What is wrong with a source, and what to do about it."""
    refusals = {
        GatedRepoError: "is gated: accept its terms on its page and set HF_TOKEN (or run `hf auth"
        " login`), or give a local folder",
        RevisionNotFoundError: f"has no revision {allowed.revision!r}: fix model.revision, or leave"
        " it out",
        RepositoryNotFoundError: "is neither a folder nor a model on the hub: check the name, or"
        " log in if it is private",
    }
    chain = list(causes(error))
    for kind, fix in refusals.items():
        if any(isinstance(cause, kind) for cause in chain):
            return fix
    if any("trust_remote_code" in str(cause) for cause in chain):
        if allowed.code is None:
            return (
                "needs code of its own, which latlib never runs: choose a model that transformers"
                " knows"
            )
        return (
            "needs Python code of its own, which would run with all your rights: read it and set"
            " model.trust_remote_code: true if you trust it, or choose a model that transformers"
            " knows"
        )
    if is_outage(error):
        return f"cannot be had: the hub does not answer ({in_a_line(error)}): {FIX}"
    return (
        f"cannot be loaded ({in_a_line(error)}): check the folder or the network, or download it"
        " and give the folder"
    )
