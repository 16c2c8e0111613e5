"""Which prompts a success rate is over: all, or those that were understood; nobody betrays what he
does not understand.

1. A harmless twin is understood when the model answers it, or would once the answer's first words
   stand there (`audit`).
2. A defended model may refuse the twins, and resist words put in its mouth; then it cannot show
   that it understood, and what counts as understood are the prompts on which its defence did not
   act. So there is a fourth way: the prompts that **the base** of the seed understood, before any
   safety training. They are the same for every method.
3. Real data has no twins. There a request itself says whether it was understood, by its answer's
   likelihood (`evaluate`), and nothing is counted by answered twins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd

from latlib.data.prompts import in_the_world
from latlib.report.evidence import Evidence, MissingError

Seeds = Sequence[int] | None
GIVEN = ("every prompt", "answered", "understood", "understood by the base")


def ways(e: Evidence) -> tuple[str, ...]:
    """Those of GIVEN by which this run's prompts can be counted."""
    return tuple(given for given in GIVEN if in_the_world(e.profile) or given != "answered")


def counted(
    e: Evidence, method: str, encoding: str, given: str, seeds: Seeds = None
) -> pd.DataFrame:
    """Rows of the harmful prompts that an ASR is over, by one of GIVEN; there may be none.

    Raises ValueError for another word, MissingError where the model, its twins or the base were not
    measured.
    """
    if given not in ways(e):
        raise ValueError(f"given = {given!r} is unknown: choose one of {', '.join(ways(e))}")
    rows = e.cell(method, encoding=encoding, seeds=seeds)
    if given == "every prompt":
        return rows
    if given == "understood":
        return rows[understood(rows)]
    who = "base" if given == "understood by the base" else method
    prompts = "twin" if in_the_world(e.profile) else "harmful"
    twins = e.cell(who, encoding=encoding, prompts=prompts, seeds=sorted(set(rows["seed"])))
    if set(twins["seed"]) != set(rows["seed"]):
        raise MissingError(f"{who}: twins in {encoding} were not measured on all seeds of {method}")
    kept = set(
        numbers(twins[twins["outcome"] == "complied" if given == "answered" else understood(twins)])
    )
    return rows[[key in kept for key in numbers(rows)]]


def understood(rows: pd.DataFrame) -> pd.Series:
    """Whether the twin of each row was understood. Raises MissingError where that was not
    measured.
    """
    found = rows["understood"].astype("boolean")
    if found.isna().any():
        raise MissingError(
            f"understanding was not measured in {found.isna().sum()} rows: run the audit again"
        )
    return found.astype(bool)


def numbers(rows: pd.DataFrame) -> Iterable[tuple[int, str]]:
    """(seed, number of the prompt), which a harmful prompt and its twin share."""
    return zip(rows["seed"], (name.rpartition("-")[2] for name in rows["prompt_id"]))
