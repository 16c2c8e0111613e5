"""Tables as text: for a page, as Markdown, for a results file, and between the markers of a README.

A table's cells are `stats.Interval`s, numbers, words, or None for what was not measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from latlib.report.stats import Interval

ABSENT = "-"


def printed(table: pd.DataFrame, sign: bool = False) -> pd.DataFrame:
    """A table with its intervals and p-values as text, differences with their sign; '-' where
    nothing was measured.
    """

    def text(value: Any) -> Any:
        if isinstance(value, Interval):
            return value.signed if sign else str(value)
        if pd.isna(value):
            return ABSENT
        return f"{value:.4f}" if isinstance(value, float) else value

    return table.astype(object).map(text)


def plain(value: Any) -> Any:
    """An interval as a dictionary; every other value as it is."""
    return asdict(value) if isinstance(value, Interval) else value


def records(table: pd.DataFrame) -> list[dict]:
    """A table as plain values for a results file, a dictionary a row; a named index is kept."""
    named = table.reset_index() if table.index.names != [None] else table
    return named.astype(object).map(plain).to_dict("records")


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
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the README needs the markers {begin} and {end}, once each")
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    return f"{before}{begin}\n{new}\n{end}{after}"
