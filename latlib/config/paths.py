"""Paths in a profile: where a relative one leads, and what is left of one that leaves this machine.

1. A notebook runs in another folder than whoever started it, so a relative path cannot be left to
   the working folder: `absolute` looks from the profile's own folder, then from the repository.
2. What is in neither place stays as it is: it is a hub id, or a path that only makes sense where
   one happens to be.
3. `portable` keeps the last part of an absolute path, for what is shared and for comparing settings
   between machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# section -> its fields that may be paths ('' for all of them), or sections that have such
_PLACES = {
    "model": ("source",),
    "data": ("harmful", "benign", "test_harmful", "test_benign", "test_borderline"),
    "evaluation": ("grader",),
    "grader": ("source", "base", "template"),
    "released": ("",),
}


def absolute(
    tree: dict[str, Any], bases: Sequence[Path], section: str | None = None
) -> dict[str, Any]:
    """A profile's plain values with every relative path that exists under one of `bases` made
    absolute.
    """
    own, out = _PLACES.get(section, ()) if section else tuple(_PLACES), dict(tree)
    for name, value in tree.items():
        if isinstance(value, dict) and name in own and name in _PLACES:
            out[name] = absolute(value, bases, name)
        elif isinstance(value, str) and section and (name in own or "" in own) and value != "world":
            found = [base / value for base in bases if (base / value).exists()]
            out[name] = str(found[0]) if found else value
    return out


def portable(value: Any) -> Any:
    """Settings without paths of this machine: of an absolute one, or one of someone's home, the
    last part is left.
    """
    if isinstance(value, dict):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [portable(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
