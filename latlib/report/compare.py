"""Two runs side by side in one page, what differs first.

    ./run_all.sh --compare results/tiny runs/mine [--out FILE]

1. A and B are run folders or published results that have got as far as their claims. The claims of
   both are measured anew by the rules of this version, whichever made them.
2. The page has the claims by how they differ, attack success over eps in a figure for each method
   that both have, the settings that differ, and what only one has. The terminal gets it in short.
3. The page is one file, `compare-A-B.html` in the current folder unless `--out` names another. It
   ends in its own checksum, and only a file that does so is written over.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from nbconvert.filters import markdown2html
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pandas import DataFrame, Series

from latlib.config.paths import portable
from latlib.config.profile import changed_settings
from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import PGD
from latlib.experiment.layout import fixed_settings
from latlib.io.files import write_text
from latlib.io.progress import ExitStatus
from latlib.report.claims import measure
from latlib.report.evidence import Evidence, MissingError, display_name, rates_by
from latlib.report.figures import SHARES, UNITS
from latlib.report.html import to_html
from latlib.report.plots import (
    Drawn,
    lines,
    numbered,
    numbers,
    png_of,
    width_of,
    words,
)
from latlib.report.stats import sizes
from latlib.report.summary import badge
from latlib.report.tables import markdown
from latlib.report.verdicts import Claim
from latlib.text.markdown import verbatim

# how a claim differs, in the order of the page
VERDICT = "Another verdict"
ONE_SIDED = "Measured in one of them only"
EFFECT = "The same verdict, another effect"
SAME = "The same"
CLAIMS_FILES = ("claims.json", "results/claims.json")  # of published results, of a run folder
# columns of the outcome table whose values one run may have and the other lack
COLUMNS = (
    "method",
    "variant",
    "seed",
    "attack",
    "encoding",
    "prompts",
    "intervention",
    "source",
    "rule",
)
MOST_SETTINGS = 10  # on a terminal
MARK = "\n<!-- latlib.report.compare, sha256 of what stands above: "
Pair = tuple[Claim, Claim]  # the same claim of A and of B


@dataclass(frozen=True)
class Side:
    """One of the two runs. letter: A or B."""

    letter: str
    folder: Path
    evidence: Evidence

    @classmethod
    def load(cls, letter: str, folder: Path) -> Side:
        """Raises MissingError naming the argument, its value and the fix where there is nothing to
        compare.
        """
        argument = f"--compare: {letter} = {str(folder)!r}"
        if not folder.is_dir():
            raise MissingError(f"{argument} is no folder: give a run folder, or published results")
        try:
            evidence = Evidence.load(folder)
        except (MissingError, ProfileError) as error:
            raise MissingError(f"{argument} is no run: {error}") from error
        if not any((folder / name).is_file() for name in CLAIMS_FILES):
            raise MissingError(
                f"{argument} has no claims yet: finish the run with ./run_all.sh --profile"
                f" {evidence.profile.name} --out {folder}"
            )
        return cls(letter, folder, evidence)

    @cached_property
    def claims(self) -> list[Claim]:
        """The whole ledger."""
        return measure(self.evidence)

    @cached_property
    def measured(self) -> dict[str, set[Any]]:
        """Column -> its values in the outcome table; of radii with their unit."""
        rows = self.evidence.rows
        found = {column: set(rows[column].dropna().unique()) for column in COLUMNS}
        return found | {
            "eps": {f"{eps:g} {self.evidence.unit}" for eps in rows["eps"].dropna().unique()}
        }

    def asr(self, method: str) -> Series:
        """Of latent PGD on a method, by eps. Raises MissingError where it was not measured."""
        e = self.evidence
        radii = sorted(e.profile.evaluation.eps)
        try:
            return rates_by(e.cell(method, PGD, where="latent", eps=radii), "eps")
        except MissingError as error:
            raise MissingError(f"no latent PGD of it in {self.letter}") from error


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs."""

    a: Side
    b: Side

    @cached_property
    def claims(self) -> dict[str, list[Pair]]:
        """How it differs -> the claims that do, those first whose effects are furthest apart."""
        found: dict[str, list[Pair]] = {VERDICT: [], ONE_SIDED: [], EFFECT: [], SAME: []}
        for pair in zip(self.a.claims, self.b.claims, strict=True):
            found[_change(*pair)].append(pair)
        return {change: sorted(pairs, key=_effects_apart) for change, pairs in found.items()}

    @cached_property
    def settings(self) -> list[str]:
        """A line 'field: A -> B' for each setting that differs and changes a result."""
        a, b = (side.evidence.profile.model_dump(mode="json") for side in (self.a, self.b))
        return changed_settings(fixed_settings(a), fixed_settings(b))

    @cached_property
    def only_in_one(self) -> list[str]:
        """A line for each column of which one run has values that the other lacks."""
        found = []
        for name, of_a in self.a.measured.items():
            of_b = self.b.measured[name]
            for letter, more in (("A", of_a - of_b), ("B", of_b - of_a)):
                if more:
                    found.append(f"{name} only in {letter}: {', '.join(map(str, sorted(more)))}")
        return found

    @cached_property
    def curves(self) -> tuple[dict[str, DataFrame], list[str]]:
        """Method -> its ASR by eps in A and B, those first whose curves are furthest apart; and why
        methods that both have are not among them.
        """
        units = [side.evidence.unit for side in (self.a, self.b)]
        if units[0] != units[1]:
            return {}, [f"Radii are {units[0]} in A and {units[1]} in B."]
        found = {}
        missing = []
        for method in self.a.evidence.profile.methods:
            if method not in self.b.evidence.profile.methods:
                continue
            try:
                asr = {side.letter: side.asr(method) for side in (self.a, self.b)}
                found[method] = DataFrame(asr).sort_index()
            except MissingError as error:
                missing.append(f"{display_name(method)} is not shown: {error}.")
        order = sorted(found, key=lambda method: -points_apart(found[method]))
        return {method: found[method] for method in order}, missing


def _change(a: Claim, b: Claim) -> str:
    if bool(a.interval) is not bool(b.interval):
        return ONE_SIDED
    if a.verdict is not b.verdict:
        return VERDICT
    return SAME if a.shown == b.shown else EFFECT


def _effects_apart(pair: Pair) -> float:
    """Less the further the effects lie apart."""
    a, b = (claim.interval.estimate if claim.interval else 0.0 for claim in pair)
    return -abs(a - b)


def points_apart(curves: DataFrame) -> float:
    """How far A and B lie apart at the radius where they do most; 0 without a common radius."""
    shares = numbers(curves)
    return float((shares["A"] - shares["B"]).abs().fillna(0).max())


# ---- the page


def page(found: Comparison) -> str:
    """The HTML of a comparison."""
    first = "<br>".join([_about(found.a), _about(found.b), headline(found)])
    cells = [_text("# Where do two runs differ?", first, "## Claims")]
    for change, pairs in found.claims.items():
        cells += [_text(f"### {change}"), _claims(pairs)]
    cells += _curves(found)
    cells.append(_text("## Settings, A -> B", _listed(found.settings)))
    cells.append(_text("## What only one has", _listed(found.only_in_one)))
    return to_html(new_notebook(cells=cells), "compare")


def _about(side: Side) -> str:
    profile = side.evidence.profile
    seeds = ", ".join(map(str, profile.seeds))
    folder = verbatim(portable(str(side.folder)))  # a page is made to be shared
    return f"**{side.letter}** is {folder}: {profile.name}, seeds {seeds}."


def headline(found: Comparison) -> str:
    """How many claims and settings differ."""
    counts = [f"{change}: {len(pairs)}" for change, pairs in found.claims.items()]
    claims = len(found.a.claims)
    return f"{claims} claims. {'; '.join(counts)}. Settings that differ: {len(found.settings)}."


def _claims(pairs: list[Pair]) -> NotebookNode:
    rows = [[_statement(*pair), *map(_outcome, pair)] for pair in pairs]
    table = markdown(["Claim", "A", "B"], rows) if rows else "None."
    return _output({"text/html": markdown2html(table)})  # where coloured words keep their colour


def _curves(found: Comparison) -> list[NotebookNode]:
    curves, missing = found.curves
    cells = [_text("## Attack success over eps", *missing)]
    for number, (method, asr) in enumerate(curves.items(), start=1):
        cells.append(_figure(number, curve_figure(method, asr, found.a.evidence.unit)))
        common = asr.dropna()
        apart = f"at most {points_apart(asr):.0f} points apart at {len(common)} radii"
        said = apart if len(common) else "no radius in common"
        cells.append(_text(f"{display_name(method)}: {said}."))
    return cells


def _text(*parts: str) -> NotebookNode:
    return new_markdown_cell("\n\n".join(parts))


def _listed(texts: list[str]) -> str:
    """Lines in which anybody's text may stand."""
    return "\n".join(f"* {verbatim(text)}" for text in texts) or "Nothing."


def _output(data: dict[str, str], **metadata: Any) -> NotebookNode:
    output = new_output("display_data", data, metadata=metadata)
    return new_code_cell("", outputs=[output])


def _figure(number: int, drawn: Drawn) -> NotebookNode:
    data = base64.b64encode(png_of(drawn.figure)).decode()
    look = {"alt": drawn.alt, "width": width_of(drawn.figure)}
    plt.close(drawn.figure)
    cell = _output({"image/png": data}, **{"image/png": look})
    caption = {"text/markdown": numbered(number, drawn.caption)}
    cell.outputs.append(new_output("display_data", caption))
    return cell


def curve_figure(method: str, asr: DataFrame, unit: str) -> Drawn:
    """Attack success over eps in both runs."""
    name = display_name(method)
    what = f"Attack success rate (ASR) of {name} by eps in both runs"
    names = []
    for letter, column in asr.items():
        names.append(f"{letter} ({sizes(column.dropna())})")
    labels = (f"eps ({UNITS[unit]})", "ASR (%)")
    drawn = lines(asr.set_axis(names, axis=1), labels, what, log="x", scale=100)
    (ax,) = drawn.figure.axes
    ax.set(title=f"{name} under latent PGD", **SHARES)
    return drawn._replace(alt=f"{what}. {words(asr)}.")


def _statement(a: Claim, b: Claim) -> str:
    """Once, where both say it of the same methods."""
    if a.statement == b.statement:
        return a.statement
    return f"A: {a.statement}<br>B: {b.statement}"


def _outcome(claim: Claim) -> str:
    """Verdict and effect, and what they are of."""
    assert claim.verdict is not None  # measured
    said = [badge(claim.verdict), claim.shown, claim.why]
    if claim.interval:
        said.append(sizes(claim.interval))
    if claim.doubts:
        said.append(f"in doubt: {len(claim.doubts)} of its checks failed")
    return "<br>".join(filter(None, said))


def save_page(html: str, target: Path) -> None:
    """Write a page. Raises FileExistsError for a file that was not written here, or was changed
    since.
    """
    if os.path.lexists(target) and not _is_ours(target):
        raise FileExistsError(
            f"--out = {str(target)!r} is there and is no page of this command as it was written:"
            " move it away, or give another file"
        )
    # not durable: nothing of a run folder that it may lie in
    write_text(f"{html}{MARK}{_digest(html.encode())} -->\n", target, durable=False)


def _is_ours(file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    html, _, rest = file.read_bytes().rpartition(MARK.encode())
    return rest == f"{_digest(html)} -->\n".encode()


def _digest(html: bytes) -> str:
    return hashlib.sha256(html).hexdigest()


# ---- the command line


def short_text(found: Comparison) -> str:
    """A comparison in a few lines."""
    said = [f"{side.letter}: {side.folder}" for side in (found.a, found.b)]
    said.append(headline(found))
    for pair in found.claims[VERDICT]:
        a, b = (f"{claim.verdict} {claim.shown}".strip() for claim in pair)
        said.append(f"  {pair[0].id}: {a} -> {b}")
    settings = found.settings[:MOST_SETTINGS]
    more = len(found.settings) - len(settings)
    if more:
        settings.append(f"and {more} settings more, in the page")
    said += [f"  {line}" for line in [*settings, *found.only_in_one]]
    return "\n".join(said)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "./run_all.sh --compare", description="Compare two runs.", allow_abbrev=False
    )
    parser.add_argument("a", metavar="A", type=Path, help="run folder, or published results")
    parser.add_argument("b", metavar="B", type=Path, help="another one")
    parser.add_argument("--out", type=Path, help="the page (default: compare-A-B.html)")
    options = parser.parse_args(arguments)
    names = [folder.resolve().name for folder in (options.a, options.b)]
    target = options.out or Path(f"compare-{'-'.join(names)}.html")
    try:
        found = Comparison(Side.load("A", options.a), Side.load("B", options.b))
        save_page(page(found), target)
    except (MissingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitStatus.USAGE
    print(f"{short_text(found)}\npage: {target}")
    return ExitStatus.DONE


if __name__ == "__main__":
    sys.exit(main())
