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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from latlib.config.paths import portable
from latlib.config.profile import Profile
from latlib.config.sections import DataSettings
from latlib.data.splits import SPLITS, FilePrompt, benign_rows, file_prompts, preference_rows
from latlib.text.chat import Row, fitted, tokenise

_UNBOUNDED = 1 << 60


@dataclass(frozen=True)
class _Part:
    """Rows of one kind and split. defaults: how many have a completion of the profile's own."""

    kind: str
    split: str
    source: str
    rows: list[Row]
    defaults: int = 0


def data_report(profile: Profile, tokenizer: Any, context: int | None = None) -> pd.DataFrame:
    """One row for each kind and split that has rows.

    Columns: kind, split, source (name of a file or folder, hub id or 'world'), rows, clusters (of
    near-duplicate prompts, or of the world's pairs), prompt_median, prompt_95, prompt_longest,
    completion_median, completion_95, completion_longest (tokens; NaN without completions), over
    (rows longer than data.max_tokens and `context`), dropped, cut (of those, by data.too_long; both
    0 for 'error', which would stop), default_completions (rows whose refusal or response is one of
    the profile's, because the file has none). Raises ProfileError for unusable files.
    """
    data = profile.data
    limit = min(data.max_tokens, context or _UNBOUNDED)
    if data.source == "world":
        seed = profile.seeds[0]
        parts = [
            _Part("harmful", "train", "world", preference_rows(data, seed)),
            _Part("benign", "train", "world", benign_rows(data, seed)),
        ]
    else:
        parts = [_of_files(data, *part) for part in _by_split(data)]
    return pd.DataFrame([_line(data, part, tokenizer, limit) for part in parts])


def _by_split(data: DataSettings) -> Iterable[tuple[str, str, list[FilePrompt]]]:
    """(kind, split, prompts) of everything in the files."""
    for kind, prompts in file_prompts(data).items():
        for split in SPLITS:
            own = [prompt for prompt in prompts if prompt.split == split]
            if own:
                yield kind, split, own


def _of_files(data: DataSettings, kind: str, split: str, prompts: list[FilePrompt]) -> _Part:
    """The rows of some prompts, with the profile's own completions where a file has none."""
    default = {"harmful": data.refusals[0], "benign": data.benign_responses[0]}
    rows = []
    defaults = 0
    for prompt in prompts:
        *before, last = prompt.completions
        if not last and kind in default:
            last = default[kind]
            defaults += 1
        completions = tuple(text for text in (*before, last) if text)
        rows.append(Row(prompt.row_id, prompt.prompt, completions, prompt.cluster))
    return _Part(kind, split, portable(prompts[0].file), rows, defaults)


def _line(data: DataSettings, part: _Part, tokenizer: Any, limit: int) -> dict[str, Any]:
    tokens = tokenise(part.rows, tokenizer, _UNBOUNDED, data.system_prompt)
    over = [row for row in tokens if row.longest > limit]
    kept = []
    if data.too_long != "error":
        kept = [fitted(row, limit, data.too_long) is not None for row in over]
    return {
        "kind": part.kind,
        "split": part.split,
        "source": part.source,
        "rows": len(part.rows),
        "clusters": len({row.cluster for row in part.rows}),
        **_lengths("prompt", [len(row.prompt) for row in tokens]),
        **_lengths("completion", [len(c) for row in tokens for c in row.completions]),
        "over": len(over),
        "dropped": kept.count(False),
        "cut": kept.count(True),
        "default_completions": part.defaults,
    }


def _lengths(name: str, lengths: Sequence[float]) -> dict[str, float]:
    middle, high, longest = np.percentile(np.array(lengths or [np.nan]), [50, 95, 100])
    return {f"{name}_median": middle, f"{name}_95": high, f"{name}_longest": longest}
