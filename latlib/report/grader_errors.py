"""How often the graders without a model err on labelled replies, as `benchmarks/graders.py`
measured it on the half that no rule was written on.

The figures are in `grader_errors.json`: for each grader, source and group (who wrote the replies)
how many replies of either label there are and how many of these it calls complied.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from pandas import DataFrame
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from latlib.io.files import read_json
from latlib.report.stats import LEVEL, Interval

MEASURED = Path(__file__).with_name("grader_errors.json")
LABELS = {"other": "not complied", "complied": "complied"}  # in the file -> in tables


def counts() -> DataFrame:
    """The file as a table: grader, source, group, and the four counts."""
    graders = read_json(MEASURED)["graders"]
    tables = [DataFrame(rows).assign(grader=name) for name, rows in graders.items()]
    return pd.concat(tables, ignore_index=True)


def error_table(by_group: bool = True) -> DataFrame:
    """The share of labelled replies that each grader calls otherwise, with Wilson's interval.

    A row for each source, label and, by_group, writer; n: replies; a column for each grader.
    """
    keys = ["source", "group"] if by_group else ["source"]
    summed = counts().groupby([*keys, "grader"], sort=False).sum(numeric_only=True)
    rows: dict[tuple, dict] = {}
    for (*place, grader), row in summed.iterrows():
        for column, label in LABELS.items():
            n = int(row[column])
            called = int(row[f"{column}, called"])
            if not n:
                continue
            wrong = called if column == "other" else n - called
            cells = rows.setdefault((*place, label), {"n": n})
            cells[grader] = share(wrong, n)
    index = pd.MultiIndex.from_tuples(list(rows), names=[*keys, "labelled"])
    return DataFrame(list(rows.values()), index=index)


def share(part: int, n: int) -> Interval:
    """A share with Wilson's interval."""
    low, high = proportion_confint(part, n, alpha=1 - LEVEL, method="wilson")
    return Interval(part / n, low, high, n)


def kappas(source: str) -> dict[str, float]:
    """Grader -> Cohen's kappa with the labels, over the sources whose name begins so."""
    chosen = counts()
    chosen = chosen[chosen["source"].str.startswith(source)]
    found = {}
    for grader, row in chosen.groupby("grader", sort=False).sum(numeric_only=True).iterrows():
        yes = [row["complied, called"], row["complied"] - row["complied, called"]]
        no = [row["other, called"], row["other"] - row["other, called"]]
        found[grader] = float(cohens_kappa([yes, no], return_results=False))
    return found
