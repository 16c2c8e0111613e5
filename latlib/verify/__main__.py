"""Check a run folder, or published results, byte by byte and claim by claim.

    python -m latlib.verify results/tiny

1. Every file that the manifest lists (`latlib.io.manifest`) is there and has its checksum. Every
   file of published results is listed; of a run's, every one below `models/` and `results/`.
2. The claims are computed anew from the outcome table, and are those of `claims.json`.

Exit status: 0 where all of it is so; 1 where it is not, with a line for each thing that is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from latlib.io import manifest
from latlib.io.files import json_ready, read_json
from latlib.report import claims
from latlib.report.evidence import Evidence, MissingError
from latlib.report.verdicts import to_records

FINISHED = ("models/", "results/")  # in a run folder


def wrong_files(folder: Path) -> list[str]:
    """What is wrong with the files of a run folder, or of published results; a line each."""
    listed = manifest.listed(folder)
    if not listed:
        return [f"{folder} has no {manifest.NAME}: it is neither a run folder nor published"]
    wrong = []
    for name, known in listed.items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif manifest.read_digest(file) not in known:
            wrong.append(f"{name} does not match its checksum")
    of_a_run = (folder / "results").is_dir()
    for file in manifest.files_below(folder):
        name = file.relative_to(folder).as_posix()
        counts = name.startswith(FINISHED) or not of_a_run
        if counts and name not in listed:
            wrong.append(f"{name} is not listed in {manifest.NAME}")
    return wrong


def wrong_claims(folder: Path) -> list[str]:
    """The claims that are not what the outcome table says; a line each."""
    places = [folder / "claims.json", folder / "results" / "claims.json"]
    files = [place for place in places if place.is_file()]
    if not files:
        return ["claims.json is missing: run notebook 99"]
    try:
        kept = {row["id"]: row for row in read_json(files[0])["claims"]}
        measured = to_records(claims.measure(Evidence.load(folder)))
    except (MissingError, ValueError, KeyError, TypeError, OSError) as error:
        return [f"the claims cannot be computed: {error}"]
    found = {row["id"]: row for row in json_ready(measured)}
    wrong = []
    for name in sorted({*kept, *found}):
        if not _same(kept.get(name), found.get(name)):
            wrong.append(f"claims.json: {name} is not what the outcome table says")
    return wrong


def _same(kept: Any, found: Any) -> bool:
    """Equal, numbers to rounding: libraries of another version sum in another order."""
    if isinstance(kept, dict) and isinstance(found, dict):
        return kept.keys() == found.keys() and all(_same(kept[k], found[k]) for k in kept)
    if isinstance(kept, float) and isinstance(found, float):
        return math.isclose(kept, found, rel_tol=1e-9, abs_tol=1e-12)
    return bool(kept == found)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latlib.verify", description="Check a run or published results."
    )
    parser.add_argument("folder", type=Path, help="such as runs/tiny or results/tiny")
    folder = parser.parse_args(arguments).folder
    wrong = wrong_files(folder) or wrong_claims(folder)
    for line in wrong:
        print(line)
    if not wrong:
        count = len(manifest.listed(folder))
        print(f"{folder}: {count} files as written, {len(claims.CLAIMS)} claims as computed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
