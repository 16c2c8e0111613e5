"""What the rows of a profile are: counts, clusters, lengths, and what happens to rows that do not
fit.

1. Every kind (harmful, benign, borderline) and split of the files, or the training rows of the
   made-up world.
2. Lengths are in tokens of the model's tokenizer, with its chat template and the profile's system
   prompt.
3. Rows over data.max_tokens are counted, and how many of them data.too_long drops or cuts. Nothing
   is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from pandas import DataFrame

from latlib.config.paths import portable
from latlib.config.profile import Profile
from latlib.config.sections import DataSettings
from latlib.data.splits import (
    SPLITS,
    FilePrompt,
    base_responses,
    benign_rows,
    file_prompts,
    preference_rows,
)
from latlib.text.chat import UNBOUNDED, Row, fitted, tokenise

Part = tuple[str, str, str, list[Row], int]  # kind, split, source, rows, and default_completions


def data_report(profile: Profile, tokenizer: Any) -> DataFrame:
    """One row for each kind and split that has rows.

    Columns: kind, split, source (name of a file or folder, hub id or 'world'), rows, clusters (of
    near-duplicate prompts, or of the world's pairs), prompt_median, prompt_95, prompt_longest,
    completion_median, completion_95, completion_longest (tokens; NaN without completions), over
    (rows longer than data.max_tokens), dropped, cut (of those, by data.too_long; both 0 for
    'error', which would stop), default_completions (rows whose refusal or response is one of the
    profile's, because the file has none). Raises ProfileError for unusable files.
    """
    lines = []
    for kind, split, source, rows, defaults in _parts(profile):
        line = {"kind": kind, "split": split, "source": source}
        line |= _counts(profile.data, rows, tokenizer)
        lines.append(line | {"default_completions": defaults})
    return DataFrame(lines)


def _parts(profile: Profile) -> Iterator[Part]:
    """The rows of each kind and split, with the profile's own completions where a file has none."""
    data = profile.data
    if data.source == "world":
        seed = profile.seeds[0]
        yield "harmful", "train", "world", preference_rows(data, seed), 0
        yield "benign", "train", "world", benign_rows(data, seed), 0
        return
    default = {"harmful": data.refusals[0], "benign": data.default_responses[0]}
    replied = {name: text for name, (text, _) in base_responses(data).items()}
    for (kind, of_kind), split in product(file_prompts(data).items(), SPLITS):
        prompts = [prompt for prompt in of_kind if prompt.split == split]
        if prompts:
            own = default.get(kind, "")
            rows = [_row(prompt, replied.get(prompt.row_id, own)) for prompt in prompts]
            lacking = sum(bool(own) and not prompt.completions[-1] for prompt in prompts)
            yield kind, split, portable(prompts[0].file), rows, lacking


def _row(prompt: FilePrompt, default: str) -> Row:
    *before, last = prompt.completions
    completions = tuple(text for text in (*before, last or default) if text)
    return Row(prompt.row_id, prompt.prompt, completions, prompt.cluster)


def _counts(data: DataSettings, rows: list[Row], tokenizer: Any) -> dict[str, Any]:
    limit = data.max_tokens
    tokens = tokenise(rows, tokenizer, UNBOUNDED, data.system_prompt)
    over = [row for row in tokens if row.longest > limit]
    kept = []
    if data.too_long != "error":
        kept = [fitted(row, limit, data.too_long) is not None for row in over]
    return {
        "rows": len(rows),
        "clusters": len({row.cluster for row in rows}),
        **_lengths("prompt", [len(row.prompt) for row in tokens]),
        **_lengths("completion", [len(c) for row in tokens for c in row.completions]),
        "over": len(over),
        "dropped": kept.count(False),
        "cut": kept.count(True),
    }


def _lengths(name: str, lengths: Sequence[float]) -> dict[str, float]:
    middle, high, longest = np.percentile(np.array(lengths or [np.nan]), [50, 95, 100])
    return {f"{name}_median": middle, f"{name}_95": high, f"{name}_longest": longest}
