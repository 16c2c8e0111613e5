"""The outcome table: a row for every prompt that a model was asked.

A suite is a function (model, `Subject`, what else it needs) -> outcome table, in `latlib.redteam`
and `latlib.refusal`; `latlib.experiment.run.Run` keeps what they return. No torch is imported here,
so that a report can be made of the table where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from latlib.config.profile import AttackSettings, Profile
from latlib.evaluation.rule_graders import redacted
from latlib.world.grammar import Outcome

if TYPE_CHECKING:
    from latlib.data.prompts import Prompt
    from latlib.hooks import Site

COLUMNS = (
    "method",
    "seed",
    "prompts",
    "attack",
    "encoding",
    "eps",
    "eps_mode",
    "sites",
    "prompt_id",
    "cluster",
    "outcome",
    "exact",
    "understood",
    "text",
)

OnStep = Callable[[int, int, str], None]  # progress: (step, of how many, what was done)


def unseen(step: int, total: int, detail: str) -> None:
    """Progress that nobody follows."""


@dataclass(frozen=True)
class Subject:
    """The model that a suite asks, as the outcome table names it, and the run it belongs to.

    method: how tables name it: a method, or 'lat[no-kl]'. attack: as this model was trained, or as
    `lat` was where it was trained without. norms: site -> median residual norm of the base model of
    this seed, in units of the residual stream.
    """

    profile: Profile
    method: str
    seed: int
    attack: AttackSettings
    norms: Mapping[Site, float]


def outcome_rows(
    subject: Subject,
    prompts_name: str,
    prompts: Sequence[Prompt],
    outcomes: Sequence[Outcome],
    **cell,
) -> pd.DataFrame:
    """Rows of the outcome table of one cell: `cell` gives attack, encoding, eps, sites, understood
    and texts where they apply. `exact` is known in the made-up world only; texts of real models are
    redacted here."""
    unknown = pd.array([None] * len(prompts), dtype="boolean")
    in_the_world = subject.profile.data.source == "world"
    exact = [outcome == "complied" for outcome in outcomes] if in_the_world else unknown
    understood = cell.get("understood")
    texts = cell.get("texts") or [""] * len(prompts)
    table = pd.DataFrame(
        {
            "method": subject.method,
            "seed": subject.seed,
            "prompts": prompts_name,
            "attack": cell.get("attack", "none"),
            "encoding": cell.get("encoding", "plain"),
            "eps": float(cell.get("eps", "nan")),
            "eps_mode": subject.attack.eps_mode if "eps" in cell else "",
            "sites": ",".join(map(str, cell.get("sites", ()))),
            "prompt_id": [f"{prompts_name}-{i:04d}" for i in range(len(prompts))],
            "cluster": [p.cluster for p in prompts],
            "outcome": list(outcomes),
            "exact": exact,
            "understood": pd.array(understood, dtype="boolean") if understood else unknown,
            "text": [redacted(text) if text else "" for text in texts],
        }
    )
    return table[list(COLUMNS)]
