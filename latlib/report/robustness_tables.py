"""Tables and figures of the attacks: worst case per prompt by threat model, a heat map, transfer,
what a defence takes.

1. A threat is what an attacker may do; its rows are those of all attacks of that kind that were
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

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from latlib.evaluation.outcomes import (
    MANY_SHOT,
    NO_ATTACK,
    NOISE,
    PGD,
    PGD_ALL_SITES,
    PGD_OTHER_SITES,
    PREFILL,
    SUFFIX_GCG,
    SUFFIX_RANDOM,
    SYSTEM,
    TRANSFER,
)
from latlib.report.attack_checks import BALL, RULES, Check, Status, in_ball, main_radii
from latlib.report.evidence import (
    Evidence,
    MissingError,
    Names,
    attacks_in,
    contrast,
    outcome_table,
    rates_by,
    shared,
    worst,
)
from latlib.report.plots import Drawn, HeatMap, axes_of, frame, words
from latlib.report.stats import Interval
from latlib.report.tables import markdown

# what somebody can try who only types
TYPED = (PREFILL, MANY_SHOT, SYSTEM, SUFFIX_RANDOM, SUFFIX_GCG)
ELSEWHERE = {PGD_OTHER_SITES: "other sites", PGD_ALL_SITES: "all sites"}
HEAT = HeatMap(white_from=85)
WORST = "worst case per prompt"
NOTHING_MEASURED = "no attack was measured: run notebook 06"

# name -> rows of its attacks on some methods
Threats = dict[str, Callable[[Sequence[str]], pd.DataFrame]]


def threats(e: Evidence, everywhere_alike: bool = False) -> Threats:
    """What was tried, the weakest attacker last: in the residual stream at each radius, at the
    embedding, typed.

    everywhere_alike: only threats that are the same for every model (perturbations found on other
    models are others for each).
    """
    cell = partial(e.cell, partial=True)
    found: Threats = {}
    for eps in main_radii(e):
        at = e.radius(eps)
        found[f"main sites, {at}"] = partial(in_ball, e, eps=eps)
        for attack, name in ELSEWHERE.items():
            found[f"{name}, {at}"] = partial(cell, attack=attack, eps=eps)
        if not everywhere_alike:
            found[f"transferred, {at}"] = partial(transferred, e, eps=eps)
            found[f"any latent attack, {at}"] = partial(_any_latent, e, eps=eps)
    for eps in e.profile.evaluation.embedding_eps:
        at = e.radius(eps)
        found[f"embedding, {at}"] = partial(cell, attack=PGD, eps=eps, where="embedding")
    for attack in TYPED:
        found[attack] = partial(cell, attack=attack)
    found["any typed"] = lambda methods: shared(cell(methods, TYPED))
    return found | {"no attack": cell}


def transferred(e: Evidence, methods: Names, eps: float) -> pd.DataFrame:
    """Rows of the perturbations of every other method's model, put into some. Raises MissingError
    for none.
    """
    rows = e.cell(methods, TRANSFER, eps=eps, partial=True)
    return shared(rows[rows["source"] != rows["method"]])


def _any_latent(e: Evidence, methods: Names, eps: float) -> pd.DataFrame:
    elsewhere = e.cell(methods, (*ELSEWHERE, TRANSFER), eps=eps, partial=True)
    return shared(pd.concat([in_ball(e, methods, eps), elsewhere]))


def worst_case_table(e: Evidence, methods: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each threat and method: the attacks, n, seeds, and the shares of prompts whose
    worst outcome over those attacks is complied (the ASR), refused or neither, as Intervals."""
    tables = {}
    for threat, rows_of in threats(e).items():
        with suppress(MissingError):
            rows = rows_of(methods or list(e.profile.methods))
            table = outcome_table(worst(rows), "method")
            table.insert(0, "attacks", attacks_in(rows).groupby(rows["method"]).nunique())
            tables[threat] = table.reindex([m for m in e.profile.methods if m in table.index])
    if not tables:
        raise MissingError(NOTHING_MEASURED)
    return pd.concat(tables, names=["threat"])


def typed_table(e: Evidence, methods: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each attack on typed text and method: n, seeds, shares complied, refused and
    neither, how many of the harmless twins under the same attack were understood, and the ASR among
    the requests whose twin was (None: none)."""
    by = ["attack", "method"]
    attacks = (NO_ATTACK, *TYPED)
    methods = list(methods or e.profile.methods)
    rows = e.cell(methods, attacks, partial=True)
    knew = rows["understood"].fillna(False).astype(bool)
    table = outcome_table(rows, by)
    shown = rows.assign(outcome=knew.map({True: "understood", False: ""}))
    twins = rates_by(shown, by, "understood")
    table["twin understood"] = twins.where(twins.map(lambda i: i.estimate > 0), None)
    table["complied, understood"] = rates_by(rows[knew], by)
    order = [key for key in product(attacks, methods) if key in table.index]
    table = table.loc[order].astype(object)
    return table.where(table.notna(), None)


def gain_table(e: Evidence) -> pd.DataFrame:
    """What each method takes off the ASR of the undefended twin (its ASR minus the method's own,
    worst case per prompt over the attacks that both faced), as an Interval over the same prompts
    and seeds: a column a method, a row a threat."""
    others = [method for method in e.profile.methods if method != e.undefended]
    table: dict[str, dict[str, Interval]] = {}
    for threat, rows_of in threats(e, everywhere_alike=True).items():
        for method in others:
            with suppress(MissingError):
                gain = _gain(rows_of([e.undefended]), rows_of([method]))
                table.setdefault(threat, {})[method] = gain
    if not table:
        raise MissingError(
            f"no attack was measured on {e.undefended} and on another method: run notebook 06"
        )
    return pd.DataFrame(table).T.rename_axis(f"ASR of {e.undefended} minus")


def _gain(undefended: pd.DataFrame, defended: pd.DataFrame) -> Interval:
    both = set(undefended["attack"]) & set(defended["attack"])
    sides = [worst(side[side["attack"].isin(both)]) for side in (undefended, defended)]
    return contrast(*sides)


def worst_case_wide(table: pd.DataFrame) -> pd.DataFrame:
    """`worst_case_table` for a page: a column a method, each cell the ASR with its interval and the
    other outcomes in brackets, in per cent."""
    cells = {}
    for key, row in table.iterrows():
        others = [f"{name} {row[name].percent[:-2]}" for name in ("refused", "neither")]
        cells[key] = f"{row['complied'].share} ({', '.join(others)})"
    wide = pd.Series(cells).unstack(sort=False)
    wide = wide.rename_axis("threat")
    sizes = table[["attacks", "n", "seeds"]].astype(str)
    sizes = sizes.agg(", ".join, axis=1).groupby("threat")
    counts = sizes.agg(lambda part: " or ".join(dict.fromkeys(part)))
    wide.insert(0, "attacks, rows, seeds", counts)
    return wide.fillna("-").rename_axis("ASR (%), worst case per prompt")


def attack_table(e: Evidence, methods: Sequence[str] = ()) -> pd.DataFrame:
    """ASR of every attack by itself: a row (group, attack), a column a method, Intervals or None.
    Attacks of one radius are compared on the same prompts and seeds, and end in their worst case
    per prompt over the main method's sites."""
    methods = list(methods or e.profile.methods)
    groups = {}
    for eps in main_radii(e):
        with suppress(MissingError):
            groups[e.radius(eps)] = _at_radius(e, methods, eps)
    with suppress(MissingError):
        rows = e.cell(methods, PGD, where="embedding", partial=True)
        groups["embedding"] = rows.assign(attack=f"{PGD}, " + rows["eps"].map(e.radius))
    for attack in (NO_ATTACK, *TYPED):
        with suppress(MissingError):
            groups[attack] = e.cell(methods, attack, partial=True)
    if not groups:
        raise MissingError(NOTHING_MEASURED)
    by = ["group", "attack", "method"]
    rows = pd.concat(groups, names=["group"]).reset_index("group")
    table = rates_by(rows.replace({"group": dict.fromkeys((NO_ATTACK, *TYPED), "typed")}), by)
    table = table.unstack(sort=False)[methods].rename(index={NO_ATTACK: "no attack"})
    return table.where(table.notna(), None)


def _at_radius(e: Evidence, methods: list[str], eps: float) -> pd.DataFrame:
    """Rows of every attack at a radius, in order of the figure, on the seeds that the attacks of
    the ball share; their worst case is an attack called WORST.
    """
    ball = in_ball(e, methods, eps)
    tables = [ball[ball["attack"] == attack] for attack in BALL]
    tables.append(worst(ball).assign(attack=WORST))
    models = ["method", "seed"]
    for attack, cell in {
        NOISE: {"where": "latent"},
        PGD_OTHER_SITES: {},
        PGD_ALL_SITES: {},
    }.items():
        with suppress(MissingError):
            rows = e.cell(methods, attack, eps=eps, partial=True, **cell)
            rows = rows.merge(ball[models].drop_duplicates(), on=models)
            tables.insert(0 if attack == NOISE else len(tables), rows)
    renamed = {attack: f"{PGD}, {name}" for attack, name in ELSEWHERE.items()}
    return pd.concat(tables).replace({"attack": renamed})


def _heat(grid: pd.DataFrame, framed: Iterable[tuple[int, int]], **labels: str) -> Axes:
    """A heat map of ASR in which every cell has its number and interval; hatched: not measured.
    framed: (row, column).
    """
    width = 2.4 + 1.15 * len(grid.columns)
    height = 1.2 + 0.27 * len(grid)
    _, axes = axes_of(width=width, height=height)
    ax = axes[0, 0]
    texts = grid.map(lambda cell: cell.share, na_action="ignore").fillna("")
    HEAT.draw(ax, grid, texts)
    ax.hlines(np.arange(1, len(grid)) - 0.5, *ax.get_xlim(), color="white", linewidth=1.5)
    for y, x in np.argwhere(grid.isna()):
        frame(ax, x, y, margin=0, hatch="////", edgecolor="#999999", lw=0)
    for y, x in framed:
        frame(ax, x, y, margin=0.05, edgecolor="black", lw=1.2, zorder=4)
    ax.set(**labels)
    return ax


def heat_map(e: Evidence) -> Drawn:
    """ASR of attacks on methods, by radius and kind; framed: the worst case per prompt, hatched:
    not measured.
    """
    table = attack_table(e)
    groups, attacks = zip(*table.index)
    names = []
    for group, attack in table.index:
        names.append(attack if group == "typed" else f"{group}: {attack}")
    grid = table.set_axis(names)
    framed = [(y, x) for y, x in np.ndindex(grid.shape) if attacks[y] == WORST]
    ax = _heat(grid, framed, title="ASR (%) [95 %]", xlabel="method")
    for y in range(1, len(groups)):
        if groups[y] != groups[y - 1]:
            ax.axhline(y - 0.5, color="black", linewidth=1)
    return ax.figure, f"Attack success rate by attack and method. {words(grid)}."


def transfer_matrix(e: Evidence, eps: float | None = None) -> Drawn:
    """ASR of perturbations found on one model (row) and put into another (column); framed: into the
    one they were found on. Beside them noise of the same norm. eps: by default the largest of
    `evaluation.strong_eps`."""
    eps = max(e.profile.evaluation.strong_eps) if eps is None else eps
    methods = list(e.profile.methods)
    cell: dict[str, Any] = {"eps": eps, "partial": True}
    moved = e.cell(methods, TRANSFER, **cell)
    seeds = set(moved["seed"])
    noise = e.cell(methods, NOISE, where="latent", seed=seeds, **cell)
    rows = pd.concat([moved, noise.assign(source=NOISE)])
    grid = rates_by(rows, ["source", "method"]).unstack()
    grid = grid.reindex(index=[*methods, NOISE], columns=methods)
    grid.index = [*(f"from {method}" for method in methods), NOISE]
    diagonal = [(place, place) for place in range(len(methods))]
    ax = _heat(
        grid,
        diagonal,
        title=f"ASR (%) [95 %] at {e.radius(eps)}",
        xlabel="put into",
        ylabel="perturbation",
    )
    what = f"Attack success rate of transferred perturbations at {e.radius(eps)}"
    return ax.figure, f"{what}, by the model they were put into. {words(grid)}."


def panel_grid(checks: Sequence[Check]) -> pd.DataFrame:
    """Statuses: a row for each rule and radius, a column for each model; '' where a rule does not
    concern a model.
    """
    rows: dict[str, dict[str, str]] = {}
    for check in checks:
        rows.setdefault(check.name + check.at, {})[check.method] = check.status
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("check")


def panel_markdown(checks: Sequence[Check]) -> str:
    """Every check as a Markdown table: what was measured, with its interval, and the status."""
    rows = [(c.name, c.method + c.at, c.measured, c.status) for c in checks]
    return markdown(["Check", "Model", "Measured [95 %]", "Verdict"], rows)


def panel_findings(checks: Sequence[Check]) -> str:
    """As Markdown: how many checks passed, and every one that failed with what that means for the
    claims.
    """
    passed, failed, missing = ([c for c in checks if c.status == status] for status in Status)
    lines = [
        f"{len(passed)} checks passed, {len(failed)} failed, {len(missing)} were not measured.",
        "",
    ]
    for c in failed:
        lines.append(f"* **{c.name} failed on {c.method}{c.at}**: {c.measured}. {c.meaning}")
    return "\n".join(lines)


def rules_markdown(e: Evidence) -> str:
    """The rules as a Markdown table: what must hold, the rule of the verdict, what a failure would
    mean.
    """
    rows = [(rule.name, rule.statement.format_map(e.names), rule.meaning) for rule in RULES]
    return markdown(["Check", "Must hold", "A failure would mean"], rows)
