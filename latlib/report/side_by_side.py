"""The claims of two runs side by side, such as those on the made-up world and on a real model.

    python -m latlib.report.side_by_side results/tiny-many results/smollm2-many --readme README.md

Claims that neither run measured are left out. Named below the table are those that are decided in
both runs, and otherwise in one than in the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from latlib.report.claims import measure
from latlib.report.evidence import Evidence, MissingError
from latlib.report.tables import between_markers, markdown
from latlib.report.verdicts import Claim, Verdict

OPEN = (Verdict.INCONCLUSIVE, Verdict.UNDECIDABLE)

# name of a run -> its claims, measured
Runs = dict[str, Sequence[Claim]]


def claims_beside(runs: Runs) -> str:
    """A markdown table of the claims that one of two runs measured, and which of them they decide
    otherwise.
    """
    every = [{claim.id: claim for claim in claims} for claims in runs.values()]
    rows = []
    otherwise = []
    for claim in every[0].values():
        found = [claims[claim.id] for claims in every]
        if not any(one.interval for one in found):
            continue
        rows.append([claim.statement, *map(_cell, found)])
        verdicts = {one.verdict for one in found}
        if len(verdicts) > 1 and verdicts.isdisjoint(OPEN):
            otherwise.append(f"* {claim.statement}\n")
    table = markdown(["Claim", *runs], rows)
    if not otherwise:
        return f"{table}\n\nOf the claims that both decide none is decided otherwise."
    return f"{table}\n\nDecided in both, and otherwise:\n\n{''.join(otherwise)}"


def _cell(claim: Claim) -> str:
    """What was measured, the verdict, and why there is none. How to measure what was not is said in
    its run's own report."""
    if claim.interval is None:
        return "not measured"
    return "<br>".join(filter(None, (claim.shown, f"**{claim.verdict}**", claim.why)))


def table_of(folders: Sequence[Path]) -> str:
    """`claims_beside` of two results folders."""
    runs: Runs = {}
    for folder in folders:
        runs[f"`{folder.as_posix()}`, points [95 %]"] = measure(Evidence.load(folder))
    return claims_beside(runs)


def main(arguments: list[str] | None = None) -> None:
    """The command line: print the table, or put it into a README; exits with status 1 and the
    reason where it cannot."""
    parser = argparse.ArgumentParser(
        prog="python -m latlib.report.side_by_side", description="The claims of two runs."
    )
    parser.add_argument("results", type=Path, nargs=2, help="such as results/tiny-many")
    parser.add_argument("--readme", type=Path, help="file whose table is replaced (else: print it)")
    options = parser.parse_args(arguments)
    try:
        table = table_of(options.results)
        if options.readme is None:
            print(table)
            return
        text = options.readme.read_text(encoding="utf-8")
        options.readme.write_text(between_markers(text, "beside", table), encoding="utf-8")
    except (OSError, MissingError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
