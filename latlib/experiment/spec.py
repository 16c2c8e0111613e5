"""Which model of a run is meant: a method, a seed, and what is changed in the method's settings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from latlib.config.profile import Profile
from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import BASE

Variant = str | Mapping[str, Any] | None  # a name of `sweep.variants`, or changes by dotted name
_NO_NAME = re.compile(r"[^A-Za-z0-9._=+-]+")  # what a folder's name does without


@dataclass(frozen=True)
class Spec:
    """One model of a run: a method, a seed, and what it changes in the method's training
    settings. variant: what the changes are called, '' without any.
    """

    method: str
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()
    variant: str = ""

    @property
    def label(self) -> str:
        """How tables name it: 'lat', or 'lat[no-kl]'."""
        return f"{self.method}[{self.variant}]" if self.variant else self.method

    @property
    def name(self) -> str:
        """How progress lines and errors name it: 'lat[no-kl] seed 0'."""
        return f"{self.label} seed {self.seed}"

    @property
    def folder(self) -> str:
        """How folders name it: 'lat-seed0', or 'lat-no-kl-seed0'."""
        variant = _NO_NAME.sub("-", f"-{self.variant}") if self.variant else ""
        return f"{self.method}{variant}-seed{self.seed}"

    @property
    def base(self) -> Spec:
        """The model that it is trained on."""
        return Spec(BASE, self.seed)


def spec_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A command line that names a profile, a run folder and one model of the run."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    add = parser.add_argument
    add("--profile", default="tiny", help="name of a profile, or a YAML file")
    add("--method", help="such as lat; by default the profile's main one")
    add("--seed", type=int, default=0)
    add("--variant", help="a name of sweep.variants")
    add("--out", help="the run folder, if it is not the profile's own")
    return parser


def find_spec(profile: Profile, method: str, seed: int = 0, variant: Variant = None) -> Spec:
    """The model of a run that (method, seed, variant) means.

    Raises ProfileError for an unknown method, seed, variant or field.
    """
    if type(seed) is not int or seed < 0:
        raise ProfileError(f"seed = {seed!r}: give a whole number >= 0")
    known, variant = profile.sweep.variants, variant or {}
    if isinstance(variant, str) and variant not in known:
        raise ProfileError(
            f"variant = {variant!r} is unknown: choose one of {', '.join(known) or 'none'}"
        )
    if isinstance(variant, str):
        changes, name = known[variant], variant
    else:
        changes = dict(variant)
        name = "+".join(f"{field}={value}" for field, value in sorted(changes.items()))
    if changes and method == BASE:
        raise ProfileError(f"variant = {variant!r}: the base model has none")
    if changes and method in profile.released:
        raise ProfileError(
            f"variant = {variant!r}: {method} is released.{method}, which is not trained here"
        )
    if method != BASE:
        profile.training(method, changes)
    return Spec(method, seed, tuple(sorted(changes.items())), name)
