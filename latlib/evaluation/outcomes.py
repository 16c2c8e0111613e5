"""The outcome table: one row for every prompt that a model was asked, with all that is said of it.

A suite (in `latlib.redteam`, `latlib.refusal`) is a function (model, `Subject`, what else it needs)
-> outcome table, or a list of attacks of which each is such a function;
`latlib.experiment.run.Run` keeps each piece as soon as it is measured (`Keep`), and every figure,
interval and claim is computed from the table. No column packs two meanings into a string. No torch
is imported here, so that a report can be made of the table where there is none.

The model:
  method, variant, seed: which model; variant is '', or the name of a sweep's variant of the method.
The prompt:
  prompts: the set it is of: harmful, twin, harmless, scary (borderline), law.
  prompt_id: set and number. pair_id: the number; a harmful prompt and its twin share it.
  cluster: its near-duplicates, or in the made-up world its verb: what an interval takes as one
  unit.
How it was asked:
  encoding, reply_encoding: of the request, and the one that the reply was asked for in; 'plain'.
  attack: none, pgd, pgd-strong (many steps), pgd-restarts, pgd-all-sites, pgd-other-sites,
  pgd-as-trained, pgd-<rule>, one-step, noise, transfer (found on another model), prefill,
  many-shot, system, suffix-gcg, suffix-random, or the name of an attack of one's own.
  intervention: none, ablate, add: what was done with a direction (`latlib.refusal.ablation`).
  source: the model whose perturbation (transfer) or direction it was: a method, 'base', a variant's
  label, or one of the controls 'random', 'shuffled', 'nothing'.
  rule, site, draw: how the direction was chosen ('site-sweep': at this site, whatever its worth),
  the site where it was taken and, if added, is added, and which random direction it was.
  found: whether the search for the direction found one, on tuning prompts; NA where nothing was
  searched: no direction, a control, or a rule that takes what is there.
The threat model of a latent attack (`latlib.threat.ThreatModel`):
  eps, eps_unit: the radius as it was set, 'absolute' or 'relative'. sites: comma-joined.
  radii: the absolute radius at each site, in units of the residual stream. norms: the median
  residual norms that a relative eps was taken of, None for an absolute one. positions: where, one
  of `latlib.threat.Positions`. Without such an attack: NaN, '', '', None, None, ''.
  on_ball: of the cell: the share of perturbed positions and sites, in rows that held out to the
  last step, where the perturbation is as long as its radius. NaN: no row did, or nobody looked.
What came out:
  outcome: refused, complied, neither. exact: complied, where the right answer is known, else NA.
  understood: whether the request was understood (`latlib.redteam.audit`), NA where that was not
  asked. text: what `redacted` leaves of a written reply, '' where none was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import pandas as pd

from latlib.config.profile import Profile
from latlib.evaluation.phrases import redacted
from latlib.threat import Site, ThreatModel

if TYPE_CHECKING:
    from latlib.data.prompts import Prompts

COLUMNS = (
    "method",
    "variant",
    "seed",
    "prompts",
    "prompt_id",
    "pair_id",
    "cluster",
    "encoding",
    "reply_encoding",
    "attack",
    "intervention",
    "source",
    "rule",
    "site",
    "draw",
    "found",
    "eps",
    "eps_unit",
    "sites",
    "radii",
    "norms",
    "positions",
    "on_ball",
    "outcome",
    "exact",
    "understood",
    "text",
)


class Word(str, Enum):
    """A text of which there are only some; it prints, formats and is stored as that text."""

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> None:
        names = ", ".join(cls)
        raise ValueError(f"{cls.__name__.lower()} = {value!r} is unknown: choose one of {names}")


class Outcome(Word):
    """What a model did with a request."""

    REFUSED = "refused"
    COMPLIED = "complied"
    NEITHER = "neither"


class Intervention(Word):
    """What was done with a direction while the model ran."""

    NONE = "none"
    ABLATE = "ablate"
    ADD = "add"


class Rule(Word):
    """How a direction was chosen (`latlib.refusal.directions`)."""

    FIXED = "fixed"
    SVD = "svd"
    SELECTED = "selected"
    BEST = "best"
    SUBSPACE = "subspace"
    LEARNED = "learned"
    LEARNED_SUBSPACE = "learned-subspace"
    SITE_SWEEP = "site-sweep"


OWN_RULES = tuple(rule for rule in Rule if rule != Rule.SITE_SWEEP)  # on their own model
CROSS_RULES = (Rule.FIXED, Rule.BEST)  # tried on every model

# names of attacks; others are `pgd_by(rule)` and what people call their own
NO_ATTACK = "none"
PGD = "pgd"
PGD_STRONG = "pgd-strong"
PGD_RESTARTS = "pgd-restarts"
PGD_ALL_SITES = "pgd-all-sites"
PGD_OTHER_SITES = "pgd-other-sites"
PGD_AS_TRAINED = "pgd-as-trained"  # by the training's own steps and rate
ONE_STEP = "one-step"
NOISE = "noise"
TRANSFER = "transfer"
PREFILL = "prefill"
MANY_SHOT = "many-shot"
SYSTEM = "system"
SUFFIX_GCG = "suffix-gcg"
SUFFIX_RANDOM = "suffix-random"

BASE = "base"  # the model before safety training
# controls: sources of a direction that are no model
RANDOM = "random"
SHUFFLED = "shuffled"
NOTHING = "nothing"

PLAIN = "plain"
HARMFUL, TWIN, HARMLESS = "harmful", "twin", "harmless"  # sets of prompts


def pgd_by(rule: str) -> str:
    """What PGD by another rule than the profile's is called."""
    return f"pgd-{rule}"


def split_encoding(name: str) -> tuple[str, str]:
    """(encoding, reply_encoding) of a profile's 'request' or 'request>reply'."""
    request, _, reply = name.partition(">")
    return request, reply or PLAIN


@dataclass(frozen=True)
class Subject:
    """The model that a suite asks, as the outcome table names it, and the run it belongs to.

    variant: '' or the name of a sweep's variant. norms: site -> median residual norm of the base
    model of this seed, in units of the residual stream.
    """

    profile: Profile
    method: str
    seed: int
    norms: Mapping[Site, float]
    variant: str = ""

    @property
    def label(self) -> str:
        """'lat', or 'lat[no-kl]': a source that is a variant is named so."""
        return f"{self.method}[{self.variant}]" if self.variant else self.method


@dataclass(frozen=True)
class Cell:
    """What all prompts of one cell have in common beside the model; see the columns."""

    prompts: str = HARMFUL
    encoding: str = PLAIN
    reply_encoding: str = PLAIN
    attack: str = NO_ATTACK
    intervention: Intervention = Intervention.NONE
    source: str = ""
    rule: str = ""
    site: str = ""
    draw: int | None = None
    found: bool | None = None
    threat: ThreatModel | None = None
    on_ball: float = math.nan


@dataclass(frozen=True)
class Examined:
    """What a model made of prompts, in their order.

    exact: whether right answers are known, so that `complied` is exact. understood, prefilled
    (outcomes with the answer's first words put in its mouth): None where they were not asked for,
    or cannot be had. texts: the replies, None where none were written.
    """

    outcomes: Sequence[Outcome]
    exact: bool
    understood: Sequence[bool] | None = None
    prefilled: Sequence[Outcome] | None = None
    texts: Sequence[str] | None = None


# (name of a piece of a suite, what measures it) -> its rows, measured now or kept from before
Keep = Callable[[str, Callable[[], pd.DataFrame]], pd.DataFrame]


def anew(piece: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Rows of a piece of a suite of which nothing is kept."""
    return measure()


def outcome_rows(subject: Subject, cell: Cell, prompts: Prompts, found: Examined) -> pd.DataFrame:
    """Rows of the outcome table of one cell. Texts are redacted here: no other way leads into the
    table.
    """
    n = len(prompts)
    unknown = pd.array([None] * n, dtype="boolean")
    outcomes = [Outcome(outcome) for outcome in found.outcomes]
    complied = [outcome is Outcome.COMPLIED for outcome in outcomes]
    understood = found.understood
    columns = {
        **vars(cell),
        **_threat_columns(cell.threat, n),
        "method": subject.method,
        "variant": subject.variant,
        "seed": subject.seed,
        "prompt_id": [f"{cell.prompts}-{i:04d}" for i in range(n)],
        "pair_id": range(n),
        "cluster": [prompt.cluster for prompt in prompts],
        "intervention": str(cell.intervention),
        "rule": str(cell.rule),
        "draw": pd.array([cell.draw] * n, dtype="Int64"),
        "found": pd.array([cell.found] * n, dtype="boolean"),
        "outcome": [outcome.value for outcome in outcomes],
        "exact": complied if found.exact else unknown,
        "understood": unknown if understood is None else pd.array(understood, dtype="boolean"),
        "text": [redacted(text) if text else "" for text in found.texts or [""] * n],
    }
    return pd.DataFrame(columns)[list(COLUMNS)]


def _threat_columns(threat: ThreatModel | None, n: int) -> dict[str, object]:
    if threat is None:
        nothing = [None] * n
        texts = dict.fromkeys(("eps_unit", "sites", "positions"), "")
        return {"eps": math.nan, "radii": nothing, "norms": nothing, **texts}
    return {
        "eps": threat.eps,
        "eps_unit": threat.unit,
        "sites": ",".join(map(str, threat.sites)),
        "radii": [list(threat.radii)] * n,
        "norms": [threat.norms and list(threat.norms)] * n,
        "positions": threat.positions,
    }
