"""Is the run sound? What must hold before any comparison of models means something.

1. Each `Requirement` names a cell of the outcome table and a bound; beside it stands what was
   measured, with its interval. They are written down in `requirements.yaml`.
2. The bounds are for the made-up world at the scale of `tiny` (our choice, docs/lab-log.md), and
   are printed whether they hold or not. A line holds when the estimate over all seeds does.
3. What has not been measured is said to be so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pandas import DataFrame

from latlib.evaluation.outcomes import BASE, PLAIN
from latlib.report.evidence import Evidence, MissingError, display_name, rate


def read_yaml(name: str) -> Any:
    """What is written down in a file beside this one."""
    return yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Requirement:
    """One requirement: the share of a cell with an outcome lies in [least, most]. topic: which
    claims stand on it ('': all), see `latlib.report.verdicts`. For the others see
    requirements.yaml.
    """

    who: str
    text: str
    cell: dict[str, Any] = field(default_factory=dict)
    least: float = 0.0
    most: float = 1.0
    outcome: str = "complied"
    topic: str = ""

    @property
    def bound(self) -> str:
        """The bound in words."""
        least, most = 100 * self.least, 100 * self.most
        if self.most == 1.0:
            return f">= {least:g} %"
        return f"{least:g} to {most:g} %" if self.least else f"<= {most:g} %"


def methods_of(e: Evidence, who: str) -> Sequence[str]:
    """Those that a check is put to: 'base', 'attacked' (those whose robustness is measured),
    'main', 'undefended' (its twin, or none), 'undefended or main', 'compared', 'defended' (those
    compared but the twin) or 'embedding' (those attacked there).
    """
    compared = e.profile.compared
    twin = e.profile.undefended
    return {
        "base": [BASE],
        "attacked": e.attacked,
        "main": [e.main],
        "undefended": [twin] if twin else [],
        "undefended or main": [twin or e.main],
        "compared": compared,
        "defended": [method for method in compared if method != twin],
        "embedding": [m for m in compared if e.profile.training(m).attack.at_embedding],
    }[who]


def floor_table(e: Evidence) -> DataFrame:
    """Columns line, bound, measured (share [95 % interval]), n, holds ('yes', 'no' or 'not
    measured').
    """
    return DataFrame(floor_rows(e)).set_index("line").drop(columns=["method", "topic"])


def floor_rows(e: Evidence) -> list[dict[str, Any]]:
    """The rows of `floor_table`, each with its method and topic."""
    lines = []
    for name in e.profile.evaluation.encodings:
        text, topic = f"{name} recipes exact", "" if name == PLAIN else "encoded"
        lines.append(Requirement("base", text, {"encoding": name}, 0.95, topic=topic))
    lines += [Requirement(**line) for line in read_yaml("requirements")]
    return [_row(e, line, method) for line in lines for method in methods_of(e, line.who)]


def _row(e: Evidence, line: Requirement, method: str) -> dict[str, Any]:
    """A requirement put to a method."""
    cell = dict(line.cell)
    text = f"{display_name(method)}: {line.text}"
    if "rule" in cell:
        cell["source"] = method
    if "eps" in cell:
        own = e.profile.training(method if line.who == "embedding" else e.main)
        cell["eps"] *= own.attack.eps
        text = f"{text} at {e.radius(cell['eps'])}"
    row = {"line": text, "method": method, "topic": line.topic, "bound": line.bound}
    try:
        share = rate(e.cell(method, **cell), line.outcome)
    except MissingError:
        return row | {"measured": "", "n": 0, "holds": "not measured"}
    holds = line.least <= share.estimate <= line.most
    return row | {"measured": str(share), "n": share.n, "holds": "yes" if holds else "no"}
