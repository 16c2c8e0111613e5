"""Tables from named cells of the outcome table; and tables as text: for a page, as Markdown, for a
results file, and between the markers of a README.

A table's cells are `stats.Interval`s, numbers, words, or None for what was not measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from typing import Any

import pandas as pd
from pandas import DataFrame

from latlib.io.files import json_ready
from latlib.report.evidence import Evidence, MissingError, Names, display_name, rates_by
from latlib.report.stats import Interval

ABSENT = "-"
# of indexes and columns that hold methods, and what is no method but stays as it is
METHODS = {"method", "target", "vector", "model"}
Cells = Mapping[str, Mapping[str, Any]]  # name -> what `Evidence.cell` is asked for


def measured(e: Evidence, methods: Names, cells: Cells) -> dict[str, DataFrame]:
    """Name -> rows of some methods, of those cells that have any."""
    found = {}
    for name, cell in cells.items():
        with suppress(MissingError):
            found[name] = e.cell(methods, partial=True, **cell)
    return found


def rates_of(e: Evidence, methods: Names, cells: Cells, outcome: str = "complied") -> DataFrame:
    """The share with an outcome: a row a method, a column for each of those cells that has rows."""
    rows = measured(e, methods, cells)
    return DataFrame({name: rates_by(part, "method", outcome) for name, part in rows.items()})


def none_where_absent(table: DataFrame) -> DataFrame:
    """None in place of the NaN that pandas puts where nothing was measured."""
    table = table.astype(object)
    return table.where(table.notna(), None)


def named(table: DataFrame) -> DataFrame:
    """The table with its methods as readers see them: labels of levels of METHODS, and columns of
    that name. Above columns nothing is said of what they are."""
    shown = table.copy()
    for axis, labels in (("index", table.index), ("columns", table.columns)):
        for level in METHODS.intersection(labels.names):
            shown = shown.rename(display_name, axis=axis, level=level)
    for column in METHODS.intersection(table.columns):
        shown[column] = shown[column].map(display_name)
    return shown.rename_axis(columns=[None] * shown.columns.nlevels)


def in_order(table: DataFrame, *levels: Iterable[str]) -> DataFrame:
    """The rows that a table has, in the order of the levels of its index."""
    return table.loc[[key for key in product(*levels) if key in table.index]]


def two_lines(cell: Any, absent: str = ABSENT) -> str:
    """A share in per cent above its bounds, for a heat map."""
    return cell.share.replace(" ", "\n", 1) if isinstance(cell, Interval) else absent


def printed(table: DataFrame, sign: bool = False) -> DataFrame:
    """A table with its methods as readers see them and its intervals and p-values as text: shares
    in per cent, differences in points with their sign; '-' where nothing was measured.
    """

    def text(value: Any) -> Any:
        if isinstance(value, Interval):
            return f"{value.points} points" if sign else str(value)
        if pd.isna(value):
            return ABSENT
        return f"{value:.3g}" if isinstance(value, float) else value

    return named(table).astype(object).map(text)


def records(table: DataFrame) -> list[dict]:
    """A table as plain values for a results file, a dictionary a row; a named index is kept."""
    named = table.reset_index() if table.index.names != [None] else table
    cells = named.astype(object).map(lambda c: asdict(c) if isinstance(c, Interval) else c)
    return json_ready(cells.to_dict("records"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    escaped = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def between_markers(text: str, name: str, new: str) -> str:
    """`text` with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises ValueError unless both markers are there once.
    """
    begin = f"<!-- {name}:begin -->"
    end = f"<!-- {name}:end -->"
    parts = re.split(f"({begin}|{end})", text)
    if parts[1::2] != [begin, end]:
        raise ValueError(f"the README needs the markers {begin} and {end}, once each")
    return f"{parts[0]}{begin}\n{new}\n{end}{parts[-1]}"
