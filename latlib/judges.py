"""Load somebody else's causal LM, or a LoRA over one, to judge with: safetensors only, none of its code, clear errors.

1. A source that looks like a path must be a folder; anything else is a hub id, read from the cache or the network.
2. Weights must be there as safetensors before anything is loaded: pickles run code, and the hub's automatic conversion
   would load what a third party uploaded.
3. An adapter's folder names the model under it, or the caller does.
4. Whatever goes wrong is said as field, value and mend: gated without a token, missing, pickles only, foreign code.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from latlib.models import LanguageModel, quietly, resolve_device, resolve_dtype
from latlib.settings import ModelSettings, ProfileError

_DTYPES = ("auto", "float64", "float32", "bfloat16")


def load_judge(
    source: str | Path, device: str = "auto", dtype: str = "auto", base: str | Path | None = None
) -> LanguageModel:
    """A judge from a folder or hub id; where that holds a LoRA, on top of `base` or of the model that it names.

    Raises ProfileError naming grader.source, grader.base, grader.device or grader.dtype.
    """
    if dtype not in _DTYPES:
        raise ProfileError(f"grader.dtype = {dtype!r} is unknown: choose one of {', '.join(_DTYPES)}")
    try:
        at = resolve_device(device)
    except (ProfileError, RuntimeError) as error:
        raise ProfileError(f"grader.device = {device!r} cannot be used ({error}): set it to 'auto' or 'cpu'") from None
    precision = resolve_dtype(dtype, at)
    source = _located(source, "grader.source")
    adapter = _file(source, "adapter_config.json", "grader.source")
    if adapter is None:
        model_source, field = source, "grader.source"
    else:
        _need_safetensors(source, ("adapter_model.safetensors",), "grader.source")
        named = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path")
        field = "grader.base"
        model_source = _located(base or named or "", field)
    _need_config(model_source, field)
    _need_safetensors(model_source, ("model.safetensors.index.json", "model.safetensors"), field)
    try:
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(
                model_source, dtype=precision, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, ImportError) as error:
        raise _said(error, field, model_source) from error
    try:
        with quietly():
            own = adapter is None or _file(source, "tokenizer_config.json", "grader.source") is not None
            tokenizer = AutoTokenizer.from_pretrained(source if own else model_source, trust_remote_code=False)
            if adapter is not None:
                model = PeftModel.from_pretrained(model, source)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise _said(error, "grader.source", source) from error
    model = model.to(at).eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, ModelSettings(device=device, dtype=dtype, forward="stock"), precision)


def _located(source: str | Path, field: str) -> str:
    """The source as transformers wants it. Raises ProfileError for what looks like a path and is no folder."""
    text = str(source)
    folder = Path(text).expanduser()
    if text and folder.is_dir():  # '' would be the working folder
        return str(folder)
    if isinstance(source, Path) or folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ProfileError(f"{field} = {text!r} is not a folder: give a model folder or a hub id such as owner/name")
    return text


def _file(source: str, name: str, field: str) -> str | None:
    """Where a file of a folder or hub repository is on this machine, or None. Raises ProfileError if it cannot tell."""
    if Path(source).is_dir():
        path = Path(source) / name
        return str(path) if path.is_file() else None
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise _said(error, field, source) from error


def _need_config(source: str, field: str) -> None:
    """Without a network a file that is not cached looks like one that does not exist; a model has this one always."""
    if not Path(source).is_dir():
        try:
            cached_file(source, "config.json")
        except (OSError, ValueError) as error:
            raise _said(error, field, source) from error


def _need_safetensors(source: str, names: tuple[str, ...], field: str) -> None:
    if all(_file(source, name, field) is None for name in names):
        raise ProfileError(
            f"{field} = {source!r} holds no {' or '.join(reversed(names))}: pickled weights can run code and are not "
            "read; convert them to safetensors, or choose a source that has them"
        )


def _said(error: Exception, field: str, source: str) -> ProfileError:
    """`error` as field, value and mend."""
    chain, at = [], error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    if any(isinstance(e, GatedRepoError) for e in chain):
        mend = (
            "is gated: accept its terms on its page and set HF_TOKEN (or run `hf auth login`), or give a local folder"
        )
    elif any(isinstance(e, RepositoryNotFoundError) for e in chain):
        mend = "is neither a folder nor a model on the hub: check the name, or log in if it is private"
    elif any("trust_remote_code" in str(e) for e in chain):
        mend = "needs code of its own, which latlib never runs: choose a model that transformers knows"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        mend = f"cannot be loaded ({lines[0]}): check the folder or the network, or download it and give the folder"
    return ProfileError(f"{field} = {source!r} {mend}")
