"""Tables and figures of the attacks: worst case per prompt by threat model, a heat map, transfer,
what a defence takes.

1. A threat is what an attacker may do; its rows are those of all attacks of that kind that were
   measured, on the prompts and seeds that all of them were tried on, so that their worst case is
   per prompt.
2. Attacks on typed text come with understanding: the harmless twin under the same attack. A suffix
   that breaks the model without getting the recipe is `neither`.
   Who has the weights can remove a learned refusal direction (`latlib.refusal.learned`): its rows
   come from notebook 04.
3. `panel_grid`, `panel_findings` and `panel_markdown` print the checks of
   `latlib.report.attack_checks`.

Every function takes `Evidence` (of a run whose notebook 06 was run) and raises MissingError for
what was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from pandas import DataFrame, Series

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
    Intervention,
    Rule,
)
from latlib.report.attack_checks import BALL, RULES, Check, Status, in_ball, main_radii
from latlib.report.evidence import (
    Evidence,
    MissingError,
    attacks_in,
    contrast,
    display_name,
    of_common_attacks,
    outcome_table,
    rates_by,
    shared,
    worst,
)
from latlib.report.plots import Drawn, HeatMap, axes_of, counted, frame, words
from latlib.report.stats import sizes
from latlib.report.tables import in_order, markdown, measured, named, none_where_absent

# what somebody can try who only types
TYPED = (PREFILL, MANY_SHOT, SYSTEM, SUFFIX_RANDOM, SUFFIX_GCG)
# what somebody can try who has the weights; only a model's own is ever measured
LEARNED = "learned direction removed"
WEIGHTS = {
    LEARNED: {"intervention": Intervention.ABLATE, "rule": Rule.LEARNED},
    "learned subspace removed": {
        "intervention": Intervention.ABLATE,
        "rule": Rule.LEARNED_SUBSPACE,
    },
}
ELSEWHERE = {PGD_OTHER_SITES: "other sites", PGD_ALL_SITES: "all sites"}
WORST = "worst case per prompt"
ORDER = (NOISE, *BALL, WORST, *ELSEWHERE, NO_ATTACK, *TYPED)  # of attacks in a table
SHOWN_AS = {attack: f"{PGD}, {name}" for attack, name in ELSEWHERE.items()}
SHOWN_AS[NO_ATTACK] = "no attack"
NOT_MEASURED: dict[str, Any] = {"margin": 0, "hatch": "////", "edgecolor": "#999999", "lw": 0}
FRAMED: dict[str, Any] = {"margin": 0.05, "edgecolor": "black", "lw": 1.2, "zorder": 4}
NOTHING_MEASURED = "no attack was measured: run notebook 06"

Threats = dict[str, DataFrame]  # name -> rows of its attacks


def threats(e: Evidence, everywhere_alike: bool = False) -> Threats:
    """What was tried, the weakest attacker last: with the weights, in the residual stream at each
    radius, at the embedding, typed.

    everywhere_alike: only threats that are the same for every model (perturbations found on other
    models are others for each).
    """
    methods = e.attacked
    cell = partial(e.cell, methods, partial=True)
    found: Threats = {}

    def add(threat: str, rows_of: Callable[..., DataFrame], *args: Any, **columns: Any) -> None:
        with suppress(MissingError):
            found[threat] = rows_of(*args, **columns)

    for name, columns in WEIGHTS.items():
        add(f"weights, {name}", cell, **columns)
    for eps in main_radii(e):
        at = e.radius(eps)
        add(f"main sites, {at}", in_ball, e, methods, eps)
        for attack, name in ELSEWHERE.items():
            add(f"{name}, {at}", cell, attack, eps=eps)
        if not everywhere_alike:
            add(f"transferred, {at}", _transferred, e, methods, eps)
            add(f"any latent attack, {at}", _any_latent, e, methods, eps)
    for eps in e.profile.evaluation.embedding_eps:
        add(f"embedding, {e.radius(eps)}", cell, PGD, eps=eps, where="embedding")
    for attack in TYPED:
        add(attack, cell, attack)
    add("any typed", lambda: shared(cell(TYPED)))
    add("no attack", cell)
    return found


def _transferred(e: Evidence, methods: Sequence[str], eps: float) -> DataFrame:
    """Rows of the perturbations of every other method's model, put into some."""
    rows = e.cell(methods, TRANSFER, eps=eps, partial=True)
    return shared(rows[rows["source"] != rows["method"]])


def _any_latent(e: Evidence, methods: Sequence[str], eps: float) -> DataFrame:
    elsewhere = e.cell(methods, (*ELSEWHERE, TRANSFER), eps=eps, partial=True)
    return shared(pd.concat([in_ball(e, methods, eps), elsewhere]))


def worst_case_table(e: Evidence) -> DataFrame:
    """One row for each threat and method: the attacks, n, seeds, and the shares of prompts whose
    worst outcome over those attacks is complied (the ASR), refused or neither, as Intervals."""
    tables = {}
    for threat, rows in threats(e).items():
        table = outcome_table(worst(rows), "method")
        table.insert(0, "attacks", attacks_in(rows).groupby(rows["method"]).nunique())
        tables[threat] = table.loc[[name for name in e.attacked if name in table.index]]
    if not tables:
        raise MissingError(NOTHING_MEASURED)
    return pd.concat(tables, names=["threat"])


def typed_table(e: Evidence) -> DataFrame:
    """One row for each attack on typed text and method: n, seeds, shares complied, refused and
    neither, how many of the harmless twins under the same attack were understood, and the ASR among
    the requests whose twin was (None: none)."""
    by = ["attack", "method"]
    attacks = (NO_ATTACK, *TYPED)
    rows = e.cell(e.attacked, attacks, partial=True)
    knew = rows["understood"].fillna(False).astype(bool)
    table = outcome_table(rows, by)
    twins = rates_by(rows.assign(outcome=knew.map({True: "understood"})), by, "understood")
    table["twin understood"] = twins[twins.map(lambda i: i.estimate > 0)]
    table["complied, understood"] = rates_by(rows[knew], by)
    return none_where_absent(in_order(table, attacks, e.attacked))


def gain_table(e: Evidence) -> DataFrame:
    """What each method takes off the ASR of the undefended twin (its ASR minus the method's own,
    worst case per prompt over the attacks that both faced), as an Interval over the same prompts
    and seeds: a column a method, a row a threat."""
    others = [method for method in e.attacked if method != e.undefended]
    gains = {}
    for threat, rows in threats(e, everywhere_alike=True).items():
        undefended = rows[rows["method"] == e.undefended]
        for method in others:
            with suppress(MissingError):
                sides = of_common_attacks(undefended, rows[rows["method"] == method])
                gains[threat, method] = contrast(*sides)
    if not gains:
        raise MissingError(
            f"no attack was measured on {e.names['undefended']} and on another method: run"
            " notebook 06"
        )
    return _wide(Series(gains)).rename_axis(f"ASR of {e.names['undefended']} minus")


def _wide(cells: Series) -> DataFrame:
    """A column for each method, the last level of the index."""
    return cells.unstack(sort=False).rename_axis(columns="method")


def worst_case_wide(table: DataFrame) -> DataFrame:
    """`worst_case_table` for a page: a column a method, each cell the ASR with its interval and the
    other outcomes in brackets, in per cent."""
    cells = {}
    for key, row in table.iterrows():
        others = [f"{name} {row[name].percent[:-2]}" for name in ("refused", "neither")]
        cells[key] = f"{row['complied'].share} ({', '.join(others)})"
    sizes = table[["attacks", "n", "seeds"]].astype(str)
    sizes = sizes.agg(", ".join, axis=1)
    counts = sizes.groupby("threat").agg(lambda part: " or ".join(dict.fromkeys(part)))
    wide = named(_wide(Series(cells)).rename_axis("ASR (%), worst case per prompt"))
    wide.insert(0, "attacks, rows, seeds", counts)
    return wide.fillna("-")


def attack_table(e: Evidence) -> DataFrame:
    """ASR of every attack by itself: a row (group, attack), a column a method, Intervals or None.
    Attacks of one radius are compared on the same prompts and seeds, and end in their worst case
    per prompt over the main method's sites."""
    methods = e.attacked
    groups = {}
    for eps in main_radii(e):
        with suppress(MissingError):
            groups[e.radius(eps)] = _at_radius(e, methods, eps)
    alone = {"embedding": {"attack": PGD, "where": "embedding"}}
    groups |= measured(e, methods, alone | {"typed": {"attack": (NO_ATTACK, *TYPED)}})
    weights = [rows.assign(attack=name) for name, rows in measured(e, methods, WEIGHTS).items()]
    if weights:
        groups["weights"] = pd.concat(weights)
    if not groups:
        raise MissingError(NOTHING_MEASURED)
    rows = pd.concat(groups, names=["group"]).reset_index("group")
    at = f"{PGD}, " + rows["eps"].map(e.radius)
    rows["attack"] = rows["attack"].where(rows["group"] != "embedding", at)
    table = (
        rates_by(rows, ["group", "attack", "method"]).unstack(sort=False).reindex(columns=methods)
    )
    attacks = dict.fromkeys((*ORDER, *rows["attack"]))
    return none_where_absent(in_order(table, groups, attacks)).rename(index=SHOWN_AS)


def _at_radius(e: Evidence, methods: list[str], eps: float) -> DataFrame:
    """Rows of every attack at a radius, on the seeds that the attacks of the ball share; their
    worst case is an attack called WORST.
    """
    ball = in_ball(e, methods, eps)
    beside: dict[str, Any] = {
        "noise": {"attack": NOISE, "where": "latent"},
        "sites": {"attack": tuple(ELSEWHERE)},
    }
    others = measured(e, methods, {name: cell | {"eps": eps} for name, cell in beside.items()})
    rows = pd.concat([ball, worst(ball).assign(attack=WORST), *others.values()])
    return rows.merge(ball[["method", "seed"]].drop_duplicates())


def _heat(grid: DataFrame, framed: npt.ArrayLike, **labels: str) -> Axes:
    """A heat map of ASR in which every cell has its number and interval; hatched: not measured.
    grid: a column a method. framed: whether a cell is, broadcast to the shape of the grid.
    """
    width = 3.4 + 1.15 * len(grid.columns)
    height = 1.2 + 0.27 * len(grid)
    _, axes = axes_of(width=width, height=height)
    ax = axes[0, 0]
    texts = grid.map(lambda cell: cell.share, na_action="ignore").fillna("")
    HeatMap().draw(ax, grid, texts)
    ax.hlines(np.arange(1, len(grid)) - 0.5, *ax.get_xlim(), color="white", linewidth=1.5)
    frames = np.broadcast_to(framed, grid.shape)
    for marked, style in ((grid.isna(), NOT_MEASURED), (frames, FRAMED)):
        for y, x in np.argwhere(marked):
            frame(ax, x, y, **style)
    ax.set(**labels)
    return ax


def heat_map(e: Evidence) -> Drawn:
    """ASR of attacks on methods, by radius and kind; framed: the worst case per prompt, hatched:
    not measured.
    """
    table = attack_table(e)
    groups = table.index.get_level_values("group")
    attacks = table.index.get_level_values("attack")
    names = np.where(groups == "typed", attacks, groups + ": " + attacks)
    grid = table.set_axis(names).rename(columns=display_name)
    behind = [f"{name} ({sizes(row)})" for name, row in zip(names, grid.to_numpy())]
    framed = (attacks == WORST)[:, None]
    ax = _heat(grid, framed, title="ASR (%) [95 %]", xlabel="method")
    ax.set_yticks(range(len(behind)), behind)
    for y in np.flatnonzero(groups[1:] != groups[:-1]):
        ax.axhline(y + 0.5, color="black", linewidth=1)
    alt = f"Attack success rate by attack and method. {words(grid)}."
    what = "Attack success rate (ASR) of every attack by itself, on each method"
    marks = "; framed: worst case per prompt; hatched: not measured"
    return Drawn(ax.figure, alt, counted(what + marks, grid))


def transfer_matrix(e: Evidence, eps: float | None = None) -> Drawn:
    """ASR of perturbations found on one model (row) and put into another (column); framed: into the
    one they were found on. Beside them noise of the same norm. eps: by default the largest of
    `evaluation.strong_eps`."""
    eps = max(e.profile.evaluation.strong_eps) if eps is None else eps
    methods = e.attacked
    cell = partial(e.cell, methods, eps=eps, partial=True)
    moved = cell(TRANSFER)
    noise = cell(NOISE, where="latent", seed=moved["seed"].unique())
    rows = pd.concat([moved, noise.assign(source=NOISE)])
    grid = rates_by(rows, ["source", "method"]).unstack()
    grid = grid.reindex(index=[*methods, NOISE], columns=methods)
    grid = grid.rename(index={method: f"from {display_name(method)}" for method in methods})
    grid = grid.rename(columns=display_name)
    at = e.radius(eps)
    ax = _heat(
        grid,
        np.eye(*grid.shape),
        title=f"ASR (%) [95 %] at {at}",
        xlabel="put into",
        ylabel="perturbation",
    )
    what = f"Attack success rate of transferred perturbations at {at}"
    alt = f"{what}, by the model they were put into. {words(grid)}."
    caption = counted(f"{what}; framed: put back into the model they were found on", grid)
    return Drawn(ax.figure, alt, caption)


def panel_grid(checks: Sequence[Check]) -> DataFrame:
    """Statuses: a row for each rule and radius, a column for each model; '' where a rule does not
    concern a model.
    """
    cells = {(check.name + check.at, check.method): check.status for check in checks}
    return named(_wide(Series(cells)).fillna("").rename_axis("check"))


def panel_markdown(checks: Sequence[Check]) -> str:
    """Every check as a Markdown table: what was measured, with its interval, and the status."""
    rows = [(c.name, display_name(c.method) + c.at, c.measured, c.status) for c in checks]
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
        on = f"{display_name(c.method)}{c.at}"
        lines.append(f"* **{c.name} failed on {on}**: {c.measured}. {c.meaning}")
    return "\n".join(lines)


def rules_markdown(e: Evidence) -> str:
    """The rules as a Markdown table: what must hold, the rule of the verdict, what a failure would
    mean.
    """
    rows = [(rule.name, rule.statement.format_map(e.names), rule.meaning) for rule in RULES]
    return markdown(["Check", "Must hold", "A failure would mean"], rows)
