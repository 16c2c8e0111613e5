"""Load somebody else's causal LM, or a LoRA over one, to judge with (latlib.io.hub opens it).

1. Safetensors only, and none of its code: no setting allows more for a judge.
2. An adapter's folder names the model under it, or the caller does.
3. Errors name the grader's field, the value and the mend.
"""

from __future__ import annotations

from pathlib import Path

from latlib.config.sections import ModelSettings, ProfileError
from latlib.io.hub import (
    Allowed,
    base_of,
    is_adapter,
    located,
    open_adapter,
    open_model,
    open_tokenizer,
    source_file,
)
from latlib.models import LanguageModel, resolve_device, resolve_dtype

_DTYPES = ("auto", "float64", "float32", "bfloat16")


def load_judge(
    source: str | Path, device: str = "auto", dtype: str = "auto", base: str | Path | None = None
) -> LanguageModel:
    """A judge from a folder or hub id; where that holds a LoRA, on top of `base` or of the model
    that it names.

    Raises ProfileError naming grader.source, grader.base, grader.device or grader.dtype.
    """
    if dtype not in _DTYPES:
        raise ProfileError(
            f"grader.dtype = {dtype!r} is unknown: choose one of {', '.join(_DTYPES)}"
        )
    try:
        at = resolve_device(device)
    except (ProfileError, RuntimeError) as error:
        raise ProfileError(
            f"grader.device = {device!r} cannot be used ({error}): set it to 'auto' or 'cpu'"
        ) from None
    precision, nothing = resolve_dtype(dtype, at), Allowed()
    source = located(source, "grader.source")
    adapter = is_adapter(source, "grader.source")
    field = "grader.base" if adapter else "grader.source"
    under = located(base or base_of(source, "grader.source"), field) if adapter else source
    model = open_model(under, field, nothing, precision)
    own = not adapter or source_file(source, "tokenizer_config.json", "grader.source") is not None
    tokenizer = open_tokenizer(source if own else under, "grader.source", nothing)
    if adapter:
        model = open_adapter(model, source, "grader.source", nothing)
    model = model.to(at).eval().requires_grad_(False)
    return LanguageModel(
        model, tokenizer, ModelSettings(device=device, dtype=dtype, forward="stock"), precision
    )
