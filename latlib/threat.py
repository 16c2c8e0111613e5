"""What an adversary may do, and how it searches: plain data, without torch.

1. A **site** is 'embedding' (the residual stream before block 0) or a block index i (the stream
   after block i, 0-based).
2. A `ThreatModel` is a set of sites with the radius of an L2 ball at each: it goes from the profile
   to `attack.pgd` and to every row of the outcome table.
3. A `PGD` is the search within it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

Site = int | Literal["embedding"]
EMBEDDING: Literal["embedding"] = "embedding"
Positions = Literal["prompt", "prompt+completion", "prompt+shared"]
Unit = Literal["absolute", "relative"]
Rule = Literal["adamw", "sign", "l2"]
# Adam's rate in the authors' notebook for Llama-3-8B (5e-2 for Llama-2-7B); docs/sources.md
ADAM_LR = 1e-3


def depth(site: Site) -> int:
    """Blocks that have run when the stream reaches the site: 0 at the embedding, i + 1 at i."""
    return 0 if site == EMBEDDING else int(site) + 1


def resolve_sites(specs: Iterable[int | float | str], n_layers: int) -> tuple[Site, ...]:
    """Sites in order of depth; a fraction f means block floor(f * n_layers), so 15/16 of 32 is 30.

    Raises ValueError for a site outside the model."""
    sites: set[Site] = set()
    for spec in specs:
        site = int(spec * n_layers) if isinstance(spec, float) else spec
        if site != EMBEDDING and not (isinstance(site, int) and 0 <= site < n_layers):
            raise ValueError(
                f"site = {spec!r} is outside this model of {n_layers} blocks: "
                f"give 'embedding', 0..{n_layers - 1}, or a fraction of depth in [0, 1)"
            )
        sites.add(site)
    return tuple(sorted(sites, key=depth))


def check_positions(positions: str) -> None:
    """Raise ValueError for what is none of `Positions`."""
    if positions not in get_args(Positions):
        raise ValueError(f"positions = {positions!r}: choose one of {get_args(Positions)}")


@dataclass(frozen=True)
class ThreatModel:
    """What an adversary may do: perturb the residual stream at some sites, each position within an
    L2 ball.

    sites: lowest first. radii: one a site, in units of the residual stream. eps: the radius in
    `unit`; NaN where sites have radii of their own. unit: 'absolute' (eps is the radius, as in the
    paper), or 'relative' (eps times `norms`, the sites' median residual norms on harmless prompts).
    positions: where delta may be non-zero; with 'prompt+shared' both completions' tokens at a place
    share one, as in the authors' code. Raises ValueError for what is no threat model."""

    sites: tuple[Site, ...]
    radii: tuple[float, ...]
    eps: float = math.nan
    unit: Unit = "absolute"
    norms: tuple[float, ...] | None = None
    positions: Positions = "prompt"

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites = () names no site: an attack needs at least one")
        if list(self.sites) != sorted(set(self.sites), key=depth):
            raise ValueError(f"sites = {self.sites}: name each once, lowest first")
        if len(self.radii) != len(self.sites):
            raise ValueError(f"radii = {self.radii}: give one for each of the sites {self.sites}")
        if any(not radius > 0 for radius in self.radii):
            raise ValueError(f"radii = {self.radii} must be > 0: for no attack take no steps")
        check_positions(self.positions)
        if (self.unit == "relative") != (self.norms is not None):
            raise ValueError(f"unit = {self.unit!r}: norms belong to 'relative', and to it alone")

    @classmethod
    def within(cls, radii: Mapping[Site, float], positions: Positions = "prompt") -> ThreatModel:
        """Absolute radii, site by site."""
        sites = tuple(sorted(radii, key=depth))
        own = tuple(radii[site] for site in sites)
        eps = own[0] if len(set(own)) == 1 else math.nan
        return cls(sites, own, eps, positions=positions)

    @classmethod
    def relative(
        cls, eps: float, norms: Mapping[Site, float], positions: Positions = "prompt"
    ) -> ThreatModel:
        """eps times the median residual norm of each site."""
        radii = {site: eps * norm for site, norm in norms.items()}
        found = cls.within(radii, positions)
        own = tuple(norms[site] for site in found.sites)
        return replace(found, eps=eps, unit="relative", norms=own)

    @property
    def radius(self) -> dict[Site, float]:
        """site -> radius, lowest site first."""
        return dict(zip(self.sites, self.radii, strict=True))

    def scaled(self, factor: float) -> ThreatModel:
        """The same sites with all radii times `factor`."""
        radii = tuple(radius * factor for radius in self.radii)
        return replace(self, radii=radii, eps=self.eps * factor)


@dataclass(frozen=True)
class PGD:
    """How the adversary searches.

    lr: Adam's rate for 'adamw' (default ADAM_LR); for 'sign' and 'l2' a step's length as a share of
    the radius (default 2 / steps); one for all sites, or one a site. start: 'zero', or 'random' in
    the ball; restarts beyond the first are random. toward, away: weights of its loss. targeted:
    make the model write the rejected completion; False: the wanted one unlikely (Casper et al.)."""

    steps: int = 5
    rule: Rule = "adamw"
    lr: float | tuple[float, ...] | None = None
    start: Literal["zero", "random"] = "zero"
    restarts: int = 1
    toward: float = 0.5
    away: float = 0.5
    targeted: bool = True
