"""The report's first screen: what was asked, what came out, and what did not hold.

1. `in_short` is a tally and three sentences from the results: how often latent attacks succeed;
   which claims failed or could not be decided; which checks failed that the numbers stand on.
2. `claims_table` is a line a claim, its verdict in colour and shape.
3. `ranking` orders the methods by what the worst of each kind of attack gets out of them.
4. `front_page` is all of that for a folder of published results, which a code host shows.

All of it is Markdown, and says so where something was not measured.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from shutil import which

from pandas import DataFrame, Series

from latlib import __version__
from latlib.evaluation.outcomes import HARMLESS, PLAIN
from latlib.report.attack_checks import Status, in_ball
from latlib.report.claims import SCARY, TYPED
from latlib.report.evidence import (
    Evidence,
    MissingError,
    attacks_in,
    display_name,
    rate,
    shared,
)
from latlib.report.publish import timing
from latlib.report.stats import Interval, sizes
from latlib.report.tables import ABSENT, markdown
from latlib.report.verdicts import Claim, Ground, Verdict, grounds_of

# section of the report -> its claims
SECTIONS = {
    "latent": (
        "attack-breaks-undefended",
        "attack-lowers-asr",
        "away-lowers-asr",
        "radius-matters",
        "eps-too-small",
    ),
    "typed": ("attack-resists-prefill", "away-resists-prefill"),
    "cost": (
        "keeps-utility",
        "keeps-borderline",
        "kl-keeps-utility",
        "eps-too-large-plain",
        "eps-too-large-scary",
        "eps-too-large-encoded",
        "general-utility",
        "cheaper-than-r2d2",
    ),
    "encodings": ("leet-gap",),
    "rival": (
        "rival-latent",
        "rival-other-sites",
        "rival-embedding",
        "rival-typed",
        "rival-encodings",
        "rival-refuses",
        "rival-answers-encoded",
    ),
    "training": ("spikes-are-wins",),
    "inside": ("concentrates", "strongest-vector", "resists-reference", "weaker-to-own"),
}
# verdict -> shape, colour behind white letters: a contrast of at least 4.5 in light and dark
BADGES = {
    Verdict.REPRODUCED: ("●", "#00568a"),
    Verdict.NEGLIGIBLE: ("◆", "#1a6a85"),
    Verdict.NOT_REPRODUCED: ("✖", "#a63c00"),
    Verdict.INCONCLUSIVE: ("■", "#5b6169"),
    Verdict.UNDECIDABLE: ("?", "#6a4a8c"),
}
# how the reason of an undecided claim begins -> a few words for it
REASONS = {
    "one seed": "measured on one seed",
    "the control": "whose control left no room",
    "at most": "with too few seeds for what could be seen",
    "too few refusals": "about refusal, with a model that does not refuse",
    "not measured": "not measured yet",
    "no run": "that no run of this suite tests",
}
NAMED = 5  # of a list in a sentence
ARXIV = re.compile(r"\(?arXiv (\d{4}\.\d{5})\)?")


def section(measured: Sequence[Claim], name: str) -> list[Claim]:
    """The claims of a section."""
    return [claim for claim in measured if claim.id in SECTIONS[name]]


# ---- three sentences


def in_short(e: Evidence, measured: Sequence[Claim], found: Sequence[Ground]) -> str:
    """The tally, and three sentences."""
    sentences = (_of_attacks(e), _of_claims(measured), _of_grounds(found))
    return "\n".join([f"{badges(measured)}\n", *(f"* {sentence}" for sentence in sentences)])


def _of_attacks(e: Evidence) -> str:
    """How often latent attacks succeed at the main method's radius, and on it at the largest."""
    roles = e.profile.roles
    largest = max(e.profile.evaluation.eps)
    asked = (
        (e.main, e.main_eps, ""),
        (roles.control, e.main_eps, " (its control)"),
        (roles.undefended, e.main_eps, " (undefended)"),
        (e.main, largest, f" at {e.radius(largest)}"),
    )
    found = {}
    for method, eps, what in asked:
        if method:
            with suppress(MissingError):
                found[f"{display_name(method)}{what}"] = rate(in_ball(e, method, eps))
    if not found:
        return "**Latent attacks were not measured yet**: run notebook 06."
    shares = ", ".join(f"{share.share} % on {whom}" for whom, share in found.items())
    return (
        f"**Latent attacks** at {e.radius(e.main_eps)}, in which {e.names['main']} was trained,"
        f" succeed in {shares} (worst case per prompt; {sizes(list(found.values()))})."
    )


def _of_claims(measured: Sequence[Claim]) -> str:
    """The claims that were not reproduced, by name, and why others could not be decided."""
    failed = [claim for claim in measured if claim.verdict is Verdict.NOT_REPRODUCED]
    names = [f"*{claim.statement.rstrip('.')}*" for claim in failed]
    undecided = decided(measured, False)
    reasons = Counter(_reason(claim.why) for claim in undecided)
    why = [f"{count} {reason}" for reason, count in reasons.most_common()]
    return (
        f"**Of {len(measured)} claims**, not reproduced: {len(failed)}{_in_brackets(names)}; could"
        f" not be decided here: {len(undecided)}{_in_brackets(why)}."
    )


def _reason(why: str) -> str:
    """Why a claim could not be decided, in a few words. Raises LookupError for a new reason."""
    for start, text in REASONS.items():
        if why.startswith(start):
            return text
    raise LookupError(f"{why!r} has no short form in REASONS")


def _of_grounds(found: Sequence[Ground]) -> str:
    """Which checks failed."""
    failed = [ground.text for ground in found if ground.status is Status.FAIL]
    missing = sum(ground.status is Status.NOT_MEASURED for ground in found)
    return (
        f"**Of {len(found)} checks** that these numbers stand on, failed:"
        f" {len(failed)}{_in_brackets(failed)}; not measured: {missing}."
    )


def _in_brackets(texts: Sequence[str]) -> str:
    """The first of them, and how many more there are; '' for none."""
    more = len(texts) - NAMED
    rest = [f"{more} more below"] if more > 0 else []
    return f" ({'; '.join([*texts[:NAMED], *rest])})" if texts else ""


# ---- the claims, a line each


def badge(verdict: Verdict, text: str = "") -> str:
    """A verdict in colour and shape."""
    shape, colour = BADGES[verdict]
    style = f"background:{colour};color:#fff;padding:0.1em 0.45em;border-radius:3px"
    return f'<span style="{style};white-space:nowrap">{shape} {text or verdict}</span>'


def badges(measured: Sequence[Claim]) -> str:
    """How many claims got each verdict."""
    counts = Counter(claim.verdict for claim in measured)
    return " ".join(badge(verdict, f"{counts[verdict]} {verdict}") for verdict in Verdict)


def linked(text: str) -> str:
    """Every paper's number as a link to it."""
    return ARXIV.sub(r"([arXiv \1](https://arxiv.org/abs/\1))", text)


def claims_table(e: Evidence, measured: Sequence[Claim], found: Sequence[Ground]) -> str:
    """A line a claim: its verdict, what came out here, whether the checks hold that it stands on,
    whose it is and what the paper has.
    """
    rows = []
    for claim in measured:
        source, _, _ = claim.source.partition(":")  # whose; the rest stands with its test
        paper = "<br>".join(filter(None, (linked(source), claim.paper)))
        counts = ""
        if claim.interval:
            counts = f"{claim.interval.n}, {claim.interval.seeds}"
        mark = _mark(grounds_of(e, claim, found))
        assert claim.verdict is not None  # measured
        here = "<br>".join(filter(None, (claim.shown, claim.why)))
        rows.append([claim.statement, badge(claim.verdict), here, counts, mark, paper])
    header = ["Claim", "Verdict", "Here: effect [95 %]", "n, seeds", "Its checks", "Source"]
    return markdown(header, rows)


def _mark(found: Sequence[Ground]) -> str:
    """What came of the checks that a claim stands on, in a sign and words."""
    counts = Counter(ground.status for ground in found)
    if not found:
        return ABSENT
    if failed := counts[Status.FAIL]:
        return f"✘ {failed} of {len(found)} failed"
    if missing := counts[Status.NOT_MEASURED]:
        return f"? {missing} of {len(found)} not measured"
    return f"✔ {len(found)} passed"


def decided(measured: Sequence[Claim], yes: bool = True) -> list[Claim]:
    """The claims that could be decided here, or the others."""
    return [claim for claim in measured if (claim.verdict is not Verdict.UNDECIDABLE) is yes]


# ---- the methods, ranked


def ranking(e: Evidence) -> str:
    """A line a method: harmless requests answered, harmless ones that sound harmful refused, and
    the ASR of the worst of the latent, the typed and the encoded attacks on each prompt; the method
    whose largest ASR is smallest first. Raises MissingError where no attack was measured.
    """
    methods = list(e.profile.methods)
    cell = partial(e.cell, methods, partial=True)
    encoded = [name for name in e.profile.evaluation.encodings if name != PLAIN]
    asked = {
        "harmless answered": lambda: _rates(cell(prompts=HARMLESS)),
        "sounds harmful, refused": lambda: _rates(cell(prompts=SCARY), "refused"),
        f"ASR, latent at {e.radius(e.main_eps)}": lambda: _rates(in_ball(e, methods, e.main_eps)),
        "ASR, typed": lambda: _rates(shared(cell(TYPED))),
        "ASR, encoded": lambda: _rates(cell(encoding=encoded)),
    }
    columns = {}
    for name, rates in asked.items():
        with suppress(MissingError):
            columns[name] = rates()
    attacked = {name: rates for name, rates in columns.items() if name.startswith("ASR")}
    if not attacked:
        raise MissingError("no attack was measured: run notebook 06")
    worst = DataFrame(attacked).map(lambda cell: getattr(cell, "estimate", float("nan")))
    table = DataFrame(columns).loc[worst.max(axis=1).sort_values(kind="stable").index]
    header = ["Method", *(_header(columns[name], name) for name in table)]
    rows = []
    for method, row in zip(table.index, table.values):
        rows.append([display_name(method), *map(_share, row)])
    return markdown(header, rows)


def _rates(rows: DataFrame, outcome: str = "complied") -> Series:
    """By method, named by how many attacks or encodings the worst is of. A prompt counts once, in
    however many encodings it was asked.
    """
    keys = ("method", "seed", "prompts", "prompt_id")
    found = {method: rate(part, outcome, keys) for method, part in rows.groupby("method")}
    tried = (attacks_in(rows) + rows["encoding"]).nunique()
    return Series(found, name=f"worst of {tried}, " if tried > 1 else "", dtype=object)


def _header(rates: Series, name: str) -> str:
    """What a column has, and n and seeds of its cells, once where they agree."""
    return f"{name} (%)<br>{rates.name}{sizes(rates)}"


def _share(cell: object) -> str:
    return cell.share if isinstance(cell, Interval) else ABSENT


def if_measured(make: Callable[[Evidence], str], e: Evidence) -> str:
    """What `make` says of a run, or what is missing for it."""
    try:
        return make(e)
    except MissingError as error:
        return f"*Not measured yet:* {error}."


def front_page(
    e: Evidence, measured: Sequence[Claim], found: Sequence[Ground], figure: Path
) -> str:
    """The README.md of published results. figure: the main one, beside it, if it was drawn."""
    answers = [in_short(e, measured, found), if_measured(ranking, e)]
    if figure.is_file():
        answers.append(f"![Latent attack, encoded requests, ablation]({figure.name})")
    return "\n\n".join(
        [
            f"# What `{e.profile.name}` measured",
            e.profile.description,
            *answers,
            claims_table(e, measured, found),
            "The whole report is `report.html`, a page to open from a clone. The"
            " [executed notebooks](notebooks) can be read here; `99_report` is the report.\n",
        ]
    )


# ---- this run


def about(folder: Path) -> str:
    """Code, dates and time of a run, as its folder has them."""
    took = timing(folder)
    sitting = "the last of several sittings" if took["resumed"] else "the one sitting"
    notebooks, training = took["notebooks"], took["training_s"] / 60
    lines = [
        f"Code: latlib {__version__}, commit {_commit()}.",
        f"Dates: settings of {took['began']}, report of {date.today()}.",
        f"Time: {took['models']} models, {training:.1f} minutes of training; {sitting}"
        f" took {sum(notebooks.values()) / 60:.1f} minutes for {len(notebooks)} notebooks.",
    ]
    return "\n".join(f"* {line}" for line in lines)


def _commit() -> str:
    """Of the code that runs, with '-dirty' where it was changed; 'unknown' outside a clone."""
    clone = Path(__file__).parents[2]
    if not ((clone / ".git").exists() and which("git")):
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
