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

from collections.abc import Sequence

import numpy as np
import pandas as pd

from latlib.config.paths import portable
from latlib.config.profile import Profile
from latlib.data.splits import SPLITS, benign_rows, file_prompts, preference_rows
from latlib.text.chat import Row, fitted, tokenise

_UNBOUNDED = 1 << 60


def data_report(profile: Profile, tokenizer, context: int | None = None) -> pd.DataFrame:
    """One row for each kind and split that has rows.

    Columns: kind, split, source (name of a file or folder, hub id or 'world'), rows, clusters (of
    near-duplicate prompts, or of the world's pairs), prompt_median, prompt_95, prompt_longest,
    completion_median, completion_95, completion_longest (tokens; NaN without completions), over
    (rows longer than data.max_tokens and `context`), dropped, cut (of those, by data.too_long; both
    0 for 'error', which would stop), default_completions (rows whose refusal or response is one of
    the profile's, because the file has none). Raises ProfileError for unusable files.
    """
    limit = min(profile.data.max_tokens, context or _UNBOUNDED)
    return pd.DataFrame([_line(profile, tokenizer, limit, *part) for part in _parts(profile)])


def _parts(profile: Profile) -> list[tuple[str, str, str, list[Row], int]]:
    """(kind, split, source, rows, rows with a default completion) of everything that has rows."""
    data, seed = profile.data, profile.seeds[0]
    if data.source == "world":
        return [
            ("harmful", "train", "world", preference_rows(data, seed), 0),
            ("benign", "train", "world", benign_rows(data, seed), 0),
        ]
    parts = []
    for kind, prompts in file_prompts(data).items():
        for split in SPLITS:
            own = [p for p in prompts if p.split == split]
            if not own:
                continue
            filled = {"harmful": lambda p: p.chosen, "benign": lambda p: p.completion}.get(
                kind, lambda p: True
            )
            default = {"harmful": data.refusals, "benign": data.benign_responses}.get(kind, ("",))[
                0
            ]
            rows = []
            for p in own:
                second = (p.chosen or default,) if kind == "harmful" else ()
                first = p.completion or (default if kind == "benign" else "")
                rows.append(
                    Row(
                        p.row_id,
                        p.prompt,
                        tuple(text for text in (first, *second) if text),
                        p.cluster,
                    )
                )
            parts.append(
                (kind, split, portable(own[0].file), rows, sum(not filled(p) for p in own))
            )
    return parts


def _line(
    profile: Profile,
    tokenizer,
    limit: int,
    kind: str,
    split: str,
    source: str,
    rows: Sequence[Row],
    default: int,
):
    tokens = tokenise(rows, tokenizer, _UNBOUNDED, profile.data.system_prompt)
    over = [row for row in tokens if row.longest > limit]
    after = (
        []
        if profile.data.too_long == "error"
        else [fitted(row, limit, profile.data.too_long) for row in over]
    )
    return {
        "kind": kind,
        "split": split,
        "source": source,
        "rows": len(rows),
        "clusters": len({row.cluster for row in rows}),
        **_lengths("prompt", [len(row.prompt) for row in tokens]),
        **_lengths("completion", [len(c) for row in tokens for c in row.completions]),
        "over": len(over),
        "dropped": sum(row is None for row in after),
        "cut": sum(row is not None for row in after),
        "default_completions": default,
    }


def _lengths(name: str, lengths: list[int]) -> dict[str, float]:
    values = np.array(lengths) if lengths else np.array([np.nan])
    return {
        f"{name}_median": float(np.median(values)),
        f"{name}_95": float(np.percentile(values, 95)),
        f"{name}_longest": float(values.max()),
    }
