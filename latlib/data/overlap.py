"""No prompt that is trained or chosen on may come back, equal or nearly so, among the prompts that
results are for.

1. Training and tuning prompts are the `train` and `tune` rows of the harmful and the benign files;
   test prompts are the `test` rows of both and the borderline ones (latlib.data.splits).
2. Every training prompt is compared with every test prompt (latlib.text.near_duplicates). Held-out
   prompts pass by construction, since whole clusters are dealt; test files pass only if they are
   clean.
3. An overlap stops the run. It is named by file and row, never by the prompt's text, which may be
   harmful.
"""

from __future__ import annotations

from latlib.config.profile import Profile
from latlib.config.sections import DataSettings, ProfileError
from latlib.data.splits import FilePrompt, file_prompts
from latlib.text.near_duplicates import clusters, normalised, overlaps

__all__ = ["check_overlap", "clusters", "overlaps"]

_NAMED = 3  # overlaps that an error lists
# settings -> the prompts that were compared (the same object as long as the files are the same) and
# what was said
_FOUND: dict[str, tuple[object, str]] = {}
_KEPT = 4


def check_overlap(settings: DataSettings | Profile) -> None:
    """Raises ProfileError if a training or tuning prompt is equal or nearly equal to a test prompt.
    Cached.

    Nearly: Jaccard similarity of 5-letter shingles of data.near_duplicate or more. The world has no
    files, so nothing is checked; its splits share no pair of verb and target.
    """
    data = settings.data if isinstance(settings, Profile) else settings
    if data.source == "world":
        return
    prompts, key = file_prompts(data), data.model_dump_json()
    if key not in _FOUND or _FOUND[key][0] is not prompts:
        while len(_FOUND) >= _KEPT:
            _FOUND.pop(next(iter(_FOUND)))
        _FOUND[key] = prompts, _said(data, [p for rows in prompts.values() for p in rows])
    if _FOUND[key][1]:
        raise ProfileError(_FOUND[key][1])


def _said(data: DataSettings, prompts: list[FilePrompt]) -> str:
    train, test = (
        [p for p in prompts if (p.split == "test") == tested] for tested in (False, True)
    )
    pairs = overlaps([p.prompt for p in train], [p.prompt for p in test], data.near_duplicate)
    if not pairs:
        return ""
    exact = {i for i, j, _ in pairs if normalised(train[i].prompt) == normalised(test[j].prompt)}
    near = {i for i, _, _ in pairs} - exact
    named = "; ".join(
        f"{_where(train[i])} and {_where(test[j])}: similarity {s:.2f}"
        for i, j, s in pairs[:_NAMED]
    )
    mend = "remove those rows from the training or the test file"
    if near:
        mend += ", or raise data.near_duplicate knowing why they differ enough"
    return (
        f"data.near_duplicate = {data.near_duplicate}: {len(exact)} training or tuning prompts are"
        f" equal to a test prompt and {len(near)} more are nearly equal"
        f" ({named}{'; ...' if len(pairs) > _NAMED else ''}): {mend}"
    )


def _where(prompt: FilePrompt) -> str:
    return f"{prompt.row_id} ({prompt.file}, row {prompt.number})"
