"""Which radii of an attack to look at closely: one at which it succeeds, and one at which it fails.

The rule is the same whatever a run shows, and where it finds no such radius it says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SUCCESS = 0.9  # of the prompts, from which an attack succeeds; it fails at 1 - SUCCESS: our choice


@dataclass(frozen=True)
class TellingRadii:
    """large, small: radii, in the unit of the attack; equal where no smaller one was measured.
    why: sentences, in Markdown, on how they were chosen."""

    large: float
    small: float
    why: str


def telling_radii(
    asr: Mapping[float, float], eps: float | None = None, success: float = SUCCESS
) -> TellingRadii:
    """The smallest radius at which an attack succeeds, or `eps` where one is asked for, and the
    largest below it at which it fails.

    asr: radius -> attack success rate, a share of the prompts. Raises ValueError where `eps` is
    not among them.
    """
    if eps is not None and eps not in asr:
        raise ValueError(f"eps = {eps:g} was not measured: choose one of {sorted(asr)}")
    radii = sorted(asr)
    succeeding = [radius for radius in radii if asr[radius] >= success]
    if eps is not None:
        large, why = eps, "it was asked for"
    elif succeeding:
        large, why = succeeding[0], f"the smallest at which {_percent(success)} or more are won"
    else:
        large, why = radii[-1], f"the largest; {_percent(success)} are won at none"
    below = [radius for radius in radii if radius < large]
    failing = [radius for radius in below if asr[radius] <= 1 - success]
    first = f"Looked at is eps **{large:g}**, where the attack wins {_percent(asr[large])}: {why}."
    if not below:
        return TellingRadii(large, large, f"{first} No smaller radius was measured.")
    if failing:
        small, why = failing[-1], f"the largest at which {_percent(1 - success)} or fewer are won"
    else:
        small, why = below[0], f"the smallest; more than {_percent(1 - success)} are won at all"
    second = (
        f"Beside it stands eps **{small:g}**, where the attack wins {_percent(asr[small])}: {why}."
    )
    return TellingRadii(large, small, f"{first} {second}")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
