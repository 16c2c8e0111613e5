"""Tables and figures of the attacks: worst case per prompt by threat model, a heat map, transfer,
what a defence takes.

1. A `Threat` is what an attacker may do; its rows are those of all attacks of that kind that were
   measured, on the prompts and seeds that all of them were tried on, so that their worst case is
   per prompt.
2. Attacks on typed text come with understanding: the harmless twin under the same attack. A suffix
   that breaks the model without getting the recipe is `neither`.
3. `panel_grid`, `panel_findings` and `panel_markdown` print the checks of
   `latlib.report.attack_checks`.

Every function takes `Evidence` (of a run whose notebook 06 was run) and raises MissingError for
what was not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from latlib.report.attack_checks import (
    BALL,
    RULES,
    VERDICTS,
    Check,
    in_ball,
    shared,
    signed,
    trained_radii,
    worst,
)
from latlib.report.canvas import Drawn, axes_of
from latlib.report.evidence import Evidence, MissingError, contrast, rate
from latlib.report.stats import Interval, cluster_interval

# what somebody can try who only types
TYPED = ("prefill", "many-shot", "system", "suffix-random", "suffix-gcg")
ELSEWHERE = {"pgd-other-sites": "other sites", "pgd-all-sites": "all sites"}
SHOWN = ("complied", "refused", "neither")  # outcomes in the order of tables
DARK = 85  # per cent from which the text of a cell is white
NOTHING_MEASURED = "no attack was measured: run notebook 06"


@dataclass(frozen=True)
class Threat:
    """rows: (evidence, method) -> rows of the attacks of this kind; raises MissingError. compared:
    whether every model faces the same ones (perturbations of other models are others for each)."""

    name: str
    rows: Callable[[Evidence, str], pd.DataFrame]
    compared: bool = True


def threats(e: Evidence) -> list[Threat]:
    """What was tried, the weakest attacker last: in the residual stream at each radius, at the
    embedding, typed.
    """
    found = []
    for eps in trained_radii(e):
        found.append(Threat(f"trained sites, eps {eps:g}", lambda e, m, r=eps: in_ball(e, m, r)))
        for attack, name in ELSEWHERE.items():
            found.append(
                Threat(f"{name}, eps {eps:g}", lambda e, m, r=eps, a=attack: e.cell(m, a, eps=r))
            )
        found.append(
            Threat(f"transferred, eps {eps:g}", lambda e, m, r=eps: transferred(e, m, r), False)
        )
        found.append(
            Threat(f"any latent attack, eps {eps:g}", lambda e, m, r=eps: _anything(e, m, r), False)
        )
    for eps in e.profile.evaluation.embedding_eps:
        found.append(
            Threat(
                f"embedding, eps {eps:g}",
                lambda e, m, r=eps: e.cell(m, "pgd", eps=r, where="embedding"),
            )
        )
    found += [Threat(attack, lambda e, m, a=attack: e.cell(m, a)) for attack in TYPED]
    return [
        *found,
        Threat("any typed", lambda e, m: shared(_all_of(e, m, TYPED, 2))),
        Threat("no attack", lambda e, m: e.cell(m)),
    ]


def transferred(e: Evidence, method: str, eps: float) -> pd.DataFrame:
    """Rows of the perturbations of every other method's model, put into this one. Raises
    MissingError for none.
    """
    return shared(
        _all_of(e, method, [f"transfer:{m}" for m in e.profile.methods if m != method], eps=eps)
    )


def _all_of(
    e: Evidence, method: str, attacks: Sequence[str], least: int = 1, **cell
) -> pd.DataFrame:
    """Rows of the attacks that were measured; raises MissingError for fewer than `least` of
    them.
    """
    tables = []
    for attack in attacks:
        with suppress(MissingError):
            tables.append(e.cell(method, attack, **cell))
    if len(tables) < least:
        raise MissingError(
            f"{len(tables)} of {', '.join(attacks)} on {method}: need {least} or more"
        )
    return pd.concat(tables)


def _anything(e: Evidence, method: str, eps: float) -> pd.DataFrame:
    elsewhere = [*ELSEWHERE, *(f"transfer:{m}" for m in e.profile.methods)]
    return shared(pd.concat([in_ball(e, method, eps), _all_of(e, method, elsewhere, eps=eps)]))


def worst_case_table(e: Evidence, methods: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each threat and method: the attacks, n, seeds, and the shares of prompts whose
    worst outcome over those attacks is complied (the ASR), refused or neither, as Intervals."""
    rows = []
    for threat in threats(e):
        for method in methods or e.profile.methods:
            with suppress(MissingError):
                found = threat.rows(e, method)
                name = {
                    "threat": threat.name,
                    "method": method,
                    "attacks": found["attack"].nunique(),
                }
                rows.append(name | _shares(worst(found)))
    return _indexed(rows, "threat", "method")


def _indexed(rows: list[dict], *keys: str) -> pd.DataFrame:
    if not rows:
        raise MissingError(NOTHING_MEASURED)
    return pd.DataFrame(rows).set_index(list(keys))


def _shares(rows: pd.DataFrame) -> dict[str, Interval | int]:
    """n, seeds, and the three outcomes."""
    shares = {outcome: rate(rows, outcome) for outcome in SHOWN}
    return {"n": shares["complied"].n, "seeds": shares["complied"].seeds, **shares}


def typed_table(e: Evidence, methods: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each attack on typed text and method: n, seeds, shares complied, refused and
    neither, how many of the harmless twins under the same attack were understood, and the ASR among
    the requests whose twin was (None: none)."""
    rows = []
    for attack in ("none", *TYPED):
        for method in methods or e.profile.methods:
            with suppress(MissingError):
                found = e.cell(method, attack)
                knew = found["understood"].fillna(False).astype(bool)
                twins = (
                    cluster_interval(knew, found["cluster"], found["seed"]) if knew.any() else None
                )
                given = {
                    "twin understood": twins,
                    "complied, understood": rate(found[knew]) if knew.any() else None,
                }
                rows.append({"attack": attack, "method": method} | _shares(found) | given)
    return _indexed(rows, "attack", "method")


def gain_table(e: Evidence, against: str = "ssft") -> pd.DataFrame:
    """What each method takes off the ASR of `against` (ASR of `against` minus its own, worst case
    per prompt over the attacks that both faced), as an Interval over the same prompts and seeds: a
    column a method, a row a threat."""
    table: dict[str, dict[str, Interval]] = {}
    for threat in threats(e):
        for method in e.profile.methods:
            if method != against and threat.compared:
                with suppress(MissingError):
                    sides = [threat.rows(e, name) for name in (against, method)]
                    both = set(sides[0]["attack"]) & set(sides[1]["attack"])
                    sides = [worst(side[side["attack"].isin(both)]) for side in sides]
                    table.setdefault(threat.name, {})[method] = contrast(*sides)
    if not table:
        raise MissingError(
            f"no attack was measured on {against} and on another method: run notebook 06"
        )
    return pd.DataFrame.from_dict(table, orient="index").rename_axis(f"ASR of {against} minus")


def worst_case_wide(table: pd.DataFrame) -> pd.DataFrame:
    """`worst_case_table` for a page: a column a method, each cell the ASR with its interval and the
    other outcomes in brackets, in per cent."""
    wide: dict[str, dict[str, str]] = {}
    for threat, part in table.groupby(level="threat", sort=False):
        sizes = part[["attacks", "n", "seeds"]].astype(str).agg(", ".join, axis=1)
        wide[threat] = {"attacks, rows, seeds": " or ".join(dict.fromkeys(sizes))}
        for (_, method), row in part.iterrows():
            asr, rest = (
                row["complied"],
                ", ".join(f"{o} {100 * row[o].estimate:.0f}" for o in SHOWN[1:]),
            )
            wide[threat][method] = (
                f"{100 * asr.estimate:.0f} [{100 * asr.low:.0f}, {100 * asr.high:.0f}] ({rest})"
            )
    return (
        pd.DataFrame.from_dict(wide, orient="index")
        .fillna("-")
        .rename_axis("ASR (%), worst case per prompt")
    )


def printed(table: pd.DataFrame, sign: bool = False) -> pd.DataFrame:
    """A table with its Intervals as text, differences with their sign; a dash where nothing was
    measured.
    """

    def text(value) -> object:
        if isinstance(value, Interval):
            return signed(value) if sign else str(value)
        return "-" if value is None or value != value else value

    return table.astype(object).map(text)


def records(table: pd.DataFrame) -> list[dict]:
    """A table as plain values for a results file, a dictionary a row."""
    rows = table.reset_index().astype(object).to_dict("records")
    return [
        {k: asdict(v) if isinstance(v, Interval) else v for k, v in row.items()} for row in rows
    ]


def attack_table(e: Evidence, methods: Sequence[str] = ()) -> pd.DataFrame:
    """ASR of every attack by itself: a row (group, attack), a column a method, Intervals or None.
    Attacks of one radius are compared on the same prompts and seeds, and end in their worst case
    per prompt over the trained sites."""
    methods, table = list(methods or e.profile.methods), {}
    for method in methods:
        for eps in trained_radii(e):
            with suppress(MissingError):
                for attack, asr in _at_radius(e, method, eps).items():
                    table.setdefault((f"eps {eps:g}", attack), {})[method] = asr
        for eps in e.profile.evaluation.embedding_eps:
            with suppress(MissingError):
                asr = rate(e.cell(method, "pgd", eps=eps, where="embedding"))
                table.setdefault(("embedding", f"pgd, eps {eps:g}"), {})[method] = asr
        for attack in ("none", *TYPED):
            name = "no attack" if attack == "none" else attack
            with suppress(MissingError):
                table.setdefault(("typed", name), {})[method] = rate(e.cell(method, attack))
    if not table:
        raise MissingError(NOTHING_MEASURED)
    groups = [*(f"eps {eps:g}" for eps in trained_radii(e)), "embedding", "typed"]
    order = sorted(table, key=lambda key: groups.index(key[0]))  # stable: attacks stay as they came
    frame = pd.DataFrame({method: [table[key].get(method) for key in order] for method in methods})
    return frame.set_index(pd.MultiIndex.from_tuples(order, names=["group", "attack"]))


def _at_radius(e: Evidence, method: str, eps: float) -> dict[str, Interval]:
    """attack -> ASR, in order of the figure, on the seeds that the attacks of the ball share;
    raises MissingError.
    """
    ball, found = in_ball(e, method, eps), {}
    seeds = sorted(set(ball["seed"]))
    with suppress(MissingError):
        found["noise"] = rate(e.cell(method, "noise", eps=eps, where="latent", seeds=seeds))
    found |= {
        attack: rate(ball[ball["attack"] == attack])
        for attack in BALL
        if attack in set(ball["attack"])
    }
    found["worst case per prompt"] = rate(worst(ball))
    for attack, name in ELSEWHERE.items():
        with suppress(MissingError):
            found[f"pgd, {name}"] = rate(e.cell(method, attack, eps=eps, seeds=seeds))
    return found


def _cells(
    grid: list[list[Interval | None]],
    rows: list[str],
    columns: list[str],
    frame: list[tuple[int, int]],
) -> Axes:
    """A heat map of ASR in which every cell has its number and interval; hatched: not measured."""
    figure, axes = axes_of(width=2.4 + 1.15 * len(columns), height=1.2 + 0.27 * len(rows))
    ax, shades = (
        axes[0, 0],
        [[np.nan if cell is None else 100 * cell.estimate for cell in row] for row in grid],
    )
    ax.imshow(shades, cmap="Oranges", vmin=0, vmax=115, aspect="auto")
    ax.grid(False)
    ax.hlines(
        np.arange(len(rows) - 1) + 0.5, -0.5, len(columns) - 0.5, color="white", linewidth=1.5
    )
    for y, row in enumerate(grid):
        for x, cell in enumerate(row):
            if cell is None:
                ax.add_patch(
                    Rectangle(
                        (x - 0.5, y - 0.5),
                        1,
                        1,
                        fill=False,
                        hatch="////",
                        edgecolor="#999999",
                        lw=0,
                    )
                )
                continue
            percent, low, high = (100 * value for value in (cell.estimate, cell.low, cell.high))
            style = {
                "ha": "center",
                "va": "center",
                "fontsize": 7,
                "color": "white" if percent > DARK else "black",
            }
            ax.text(x, y, f"{percent:.0f} [{low:.0f}, {high:.0f}]", **style)
    for y, x in frame:
        ax.add_patch(
            Rectangle(
                (x - 0.47, y - 0.42), 0.94, 0.84, fill=False, edgecolor="black", lw=1.2, zorder=4
            )
        )
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    return ax


def heat_map(e: Evidence) -> Drawn:
    """ASR of attacks on methods, by radius and kind; framed: the worst case per prompt, hatched:
    not measured.
    """
    table = attack_table(e)
    grid, columns = (
        [[None if pd.isna(cell) else cell for cell in row] for row in table.to_numpy(object)],
        list(table),
    )
    names = [attack if group == "typed" else f"{group}: {attack}" for group, attack in table.index]
    worst_rows = [y for y, (_, attack) in enumerate(table.index) if attack.startswith("worst")]
    ax = _cells(grid, names, columns, [(y, x) for y in worst_rows for x in range(len(columns))])
    for y, ((group, _), (following, _)) in enumerate(itertools.pairwise(table.index)):
        if group != following:
            ax.axhline(y + 0.5, color="black", linewidth=1)
    ax.set(title="ASR (%) [95 %]", xlabel="method")
    said = []
    for method, column in table.items():
        cells = zip(names, column, strict=True)
        said.append(
            f"{method}: "
            + ", ".join(f"{n} {100 * c.estimate:.0f} %" for n, c in cells if not pd.isna(c))
        )
    return ax.figure, "Attack success rate by attack and method. " + ". ".join(said) + "."


def transfer_matrix(e: Evidence, eps: float | None = None) -> Drawn:
    """ASR of perturbations found on one model (row) and put into another (column); framed: into the
    one they were found on. Beside them noise of the same norm. eps: by default the largest of
    `evaluation.strong_eps`."""
    eps, methods = (
        max(e.profile.evaluation.strong_eps) if eps is None else eps,
        list(e.profile.methods),
    )
    attacks = {f"from {m}": (f"transfer:{m}", {}) for m in methods} | {
        "noise": ("noise", {"where": "latent"})
    }
    seeds = sorted(set(e.outcomes.loc[e.outcomes["attack"].str.startswith("transfer:"), "seed"]))
    grid, said = [[None] * len(methods) for _ in attacks], []
    for y, (name, (attack, cell)) in enumerate(attacks.items()):
        for x, target in enumerate(methods):
            with suppress(MissingError):
                grid[y][x] = asr = rate(e.cell(target, attack, eps=eps, seeds=seeds, **cell))
                said.append(f"{name} into {target} {100 * asr.estimate:.0f} %")
    if not any(cell for row in grid[:-1] for cell in row):
        raise MissingError(f"no perturbation was transferred at eps {eps:g}: run notebook 06")
    ax = _cells(grid, list(attacks), methods, [(m, m) for m in range(len(methods))])
    ax.set(title=f"ASR (%) [95 %] at eps {eps:g}", xlabel="put into", ylabel="perturbation")
    return (
        ax.figure,
        f"Attack success rate of transferred perturbations at eps {eps:g}: {', '.join(said)}.",
    )


def panel_grid(checks: Sequence[Check]) -> pd.DataFrame:
    """Verdicts: a row for each rule and radius, a column for each model; '' where a rule does not
    concern a model.
    """
    rows: dict[str, dict[str, str]] = {}
    for check in checks:
        rows.setdefault(check.name + check.at, {})[check.method] = check.verdict
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("check")


def panel_markdown(checks: Sequence[Check]) -> str:
    """Every check as a Markdown table: what was measured, with its interval, and the verdict."""
    lines = ["| Check | Model | Measured [95 %] | Verdict |", "|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {c.name} | {c.method}{c.at} | {c.measured} | {c.verdict} |" for c in checks]
    )


def panel_findings(checks: Sequence[Check]) -> str:
    """As Markdown: how many checks passed, and every one that failed with what that means for the
    claims.
    """
    passed, failed, missing = (
        sum(check.verdict == verdict for check in checks) for verdict in VERDICTS
    )
    lines = [f"{passed} checks passed, {failed} failed, {missing} were not measured.", ""]
    for check in checks:
        if check.verdict == VERDICTS[1]:
            lines.append(
                f"* **{check.name} failed on {check.method}{check.at}**: {check.measured}."
                f" {check.meaning}"
            )
    return "\n".join(lines)


def rules_markdown() -> str:
    """The rules as a Markdown table: what must hold, the rule of the verdict, what a failure would
    mean.
    """
    lines = ["| Check | Must hold | A failure would mean |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {rule.name} | {rule.statement} | {rule.meaning} |" for rule in RULES]
    )
