"""What a run survives: every fault is really put into the real pipeline, and what was seen is
written down.

    python benchmarks/reliability.py                  # the cases that the results lack
    python benchmarks/reliability.py --only driver    # those with this in their name
    python benchmarks/reliability.py --all            # all of them anew: hours on two cores
    python benchmarks/reliability.py --list
    python benchmarks/reliability.py --page           # the page from the results, no case

A run here is a small night: notebooks that train a base and two adapters in two workers, measure
tables and the geometry of activations, and report. Each case puts one fault into it (a kill at a
moment, a full disk, a damaged file, a bad setting), checks what must hold, and notes what a user
sees. It counts as held when all of this is so:

* killed or stopped: no process is left after 10 seconds; the same command again ends well, and
  every file of models, metrics, tables and results is that of the undisturbed run, bit for bit;
* damaged or full: the same, or a line that says what to do;
* bad input: a line that names it, exit status 2 or 3, nothing trained, no traceback.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import damage
import faults
import kills
import torch
from cases import CASES, ROOT, Case, Place, reference
from document import table
from measure import environment, write

from latlib.experiment.record import RECORD
from latlib.io import manifest

REGISTERED = (kills, damage, faults)  # their cases are known once they are imported
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"
LONGEST = 420  # letters of what was seen, on the page
FUZZED = {"profiles": "config.test_any_profile", "data files": "data.test_any_file"}


def perform(case: Case, work: Path) -> dict[str, Any]:
    """Run a case in a folder of its own; what was seen, and whether all that must hold did."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=work))
    place = Place(folder, work / "shared")
    began = time.monotonic()
    try:
        seen, held = case.run(place), True
    except Exception as error:  # whatever it is, the case did not hold
        seen, held = f"{type(error).__name__}: {error}", False
    seconds = round(time.monotonic() - began, 1)
    if held:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "name": case.name,
        "kind": case.kind,
        "injected": case.injected,
        "seen": place.said(seen),
        "held": held,
        "seconds": seconds,
    }


def fuzzed() -> dict[str, int]:
    """What -> how many examples of it the tests make up and try."""
    for folder in ("", "config", "data"):
        sys.path.insert(0, str(ROOT / "tests" / folder))
    found = {}
    for what, name in FUZZED.items():
        module = importlib.import_module(name.split(".")[1])
        found[what] = sum(_examples(test) for test in vars(module).values())
    return found


def _examples(test: Any) -> int:
    """Examples of a test of hypothesis, in all its parameters; 0 of anything else."""
    if not getattr(test, "is_hypothesis_test", False):
        return 0
    count = test._hypothesis_internal_use_settings.max_examples
    for mark in getattr(test, "pytestmark", ()):
        count *= len(mark.args[1]) if mark.name == "parametrize" else 1
    return count


def page(results: dict[str, Any]) -> str:
    """The text of docs/reliability.md."""
    cases = results["cases"]
    about, counts = results["environment"], results["fuzzed"]
    held = sum(case["held"] for case in cases)
    commits = ", ".join(sorted({case["commit"] for case in cases}))
    kinds = list(dict.fromkeys(case.kind for case in CASES.values()))
    sections = []
    for kind in kinds:
        rows = [_row(case) for case in cases if case["kind"] == kind]
        sections.append(f"## {kind}\n\n{table(['case', 'injected', 'seen', 'result'], rows)}")
    what = str(__doc__).split("\n\n", 2)[2].strip()
    return (
        f"# Reliability\n\n{what}\n\n"
        f"Made by `python benchmarks/reliability.py`: {len(cases)} cases, {held} held, among them"
        f" {_count(cases, kills.WHOLE)} kills of the whole tree,"
        f" {_count(cases, kills.ONE)} of one process and {_count(cases, kills.SIGNALS)} signals or"
        f" wishes to stop. {about['cpu']}, {about['cores']} cores; python {about['python']}, torch"
        f" {about['torch']}, transformers {about['transformers']}, peft {about['peft']}; commits"
        f" {commits}; {about['date'][:10]}.\n\n"
        f"Beside these, tests make up {counts['profiles']:,} profiles"
        f" (`tests/config/test_any_profile.py`) and {counts['data files']:,} data files"
        " (`tests/data/test_any_file.py`): each is read, or refused in a line.\n\n"
        + "\n\n".join(sections)
        + "\n"
    )


def _count(cases: Sequence[dict[str, Any]], kind: str) -> int:
    return sum(case["kind"] == kind for case in cases)


def _row(case: dict[str, Any]) -> list[str]:
    seen = " ".join(case["seen"].split())
    if len(seen) > LONGEST:
        seen = f"{seen[: LONGEST // 2]} ... {seen[-LONGEST // 2 :]}"
    cells = [case["name"], case["injected"], seen, "held" if case["held"] else "**not held**"]
    return [_escaped(cell) for cell in cells[:3]] + cells[3:]


def _escaped(text: str) -> str:
    """As plain text in a table."""
    for sign in "\\|<>*_`[]":
        text = text.replace(sign, f"\\{sign}")
    for file in (manifest.NAME, RECORD):  # or it would be read as a module's name
        text = text.replace(file, file.replace(".", "\\."))
    return text


def read() -> dict[str, Any]:
    """The results so far."""
    if not RESULTS.exists():
        return {"cases": []}
    return dict(json.loads(RESULTS.read_text("utf-8")))


def run_cases(chosen: Sequence[Case], work: Path, jobs: int) -> None:
    """Run cases, some at a time, and write the results after each."""
    about = environment(torch.device("cpu"))
    reference(work / "shared")
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(perform, case, work) for case in chosen]):
            case = done.result() | {"commit": about["commit"][:12]}
            found = {
                kept["name"]: kept for kept in read()["cases"]
            }  # another command may write, too
            found[case["name"]] = case
            state = "held" if case["held"] else "NOT HELD"
            print(f"{state:9}{case['seconds']:6.1f} s  {case['name']}: {case['seen']}", flush=True)
            cases = [found[name] for name in CASES if name in found]
            write({"environment": about, "fuzzed": fuzzed(), "cases": cases}, RESULTS)


def main() -> int:
    """The command line; 1 where a case did not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", action="append", default=[], help="cases with this in their name or kind")
    add("--all", action="store_true", help="also those that are held in the results")
    add("--list", action="store_true", help="say which cases there are")
    add("--page", action="store_true", help="write the page from the results")
    add("--jobs", type=int, default=1, help="cases at a time")
    add("--work", type=Path, help="folder to work in, kept; else a temporary one")
    options = parser.parse_args()
    held = {case["name"] for case in read()["cases"] if case["held"]}
    chosen = []
    for name, case in CASES.items():
        named = any(word in f"{name}/{case.kind}" for word in options.only)
        if named or (not options.only and (options.all or name not in held)):
            chosen.append(case)
    if options.list:
        for case in chosen:
            print(f"{case.name}: {case.injected}")
        return 0
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            work = (options.work or Path(folder)).resolve()
            work.mkdir(parents=True, exist_ok=True)
            run_cases(chosen, work, options.jobs)
    results = read()
    PAGE.write_text(page(results), encoding="utf-8")
    return int(not all(case["held"] for case in results["cases"]))


if __name__ == "__main__":
    sys.exit(main())
