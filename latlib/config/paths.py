"""Paths in a profile: where a relative one leads, and what is left of one that leaves this machine.

1. A notebook runs in another folder than whoever started it, so a relative path cannot be left to
   the working folder: `absolute` looks from the profile's own folder, then from the repository.
2. What is in neither place stays as it is: it is a hub id, or a path that only makes sense where
   one happens to be.
3. `portable` keeps the last part of an absolute path, for what is shared and for comparing settings
   between machines.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# the settings that may be paths; * is any name
_PATHS = (
    "model.source",
    "data.harmful",
    "data.benign",
    "data.test_harmful",
    "data.test_benign",
    "data.test_borderline",
    "evaluation.grader.source",
    "evaluation.grader.base",
    "evaluation.grader.template",
    "released.*",
)


def absolute(tree: dict[str, Any], bases: Sequence[Path]) -> dict[str, Any]:
    """A profile's plain values with every relative path that exists under one of `bases` made
    absolute.
    """
    out = copy.deepcopy(tree)
    for section, name, value in named_paths(tree):
        node_of(out, section)[name] = _found(value, bases)
    return out


def from_home(tree: dict[str, Any]) -> dict[str, Any]:
    """A profile's plain values with what lies in the user's home as `~/...`: whoever opens a path
    expands it, and nobody's name stands in it."""
    out = copy.deepcopy(tree)
    home = Path.home()
    for section, name, value in named_paths(tree):
        if Path(value).is_relative_to(home):
            inside = Path(value).relative_to(home)
            node_of(out, section)[name] = f"~/{inside.as_posix()}"
    return out


def named_paths(tree: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(section, field, value) of every path or hub id in a profile's plain values."""
    for dotted in _PATHS:
        section, _, field = dotted.rpartition(".")
        for name, value in node_of(tree, section).items():
            # 'world' is no folder of that name
            if field in (name, "*") and isinstance(value, str) and value != "world":
                yield section, name, value


def node_of(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    """A section of plain values by its dotted name, '' for all; an empty one where there is
    none."""
    node: Any = tree
    for name in filter(None, dotted.split(".")):
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _found(path: str, bases: Sequence[Path]) -> str:
    for base in bases:
        if (base / path).exists():
            return str(base / path)
    return path


def portable(value: Any) -> Any:
    """Settings without paths of this machine: of an absolute one, or one of someone's home, the
    last part is left.
    """
    if isinstance(value, dict):
        return {name: portable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
