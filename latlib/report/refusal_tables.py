"""Figures and tables of the refusal geometry: the matrix of targets and vectors, its controls, and
the paper's beside.

Every function takes `Evidence` (of a run whose notebook 04 was run) and raises MissingError for
what was not measured. A target is **defended** when it refuses at least `evidence.DEFENDED` of the
harmful prompts before anything is removed; what ablation does to the others says nothing about
refusal. A vector that its search did not **find** (`latlib.refusal.directions`) says nothing
either: it is shown as `not found`, and no share counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from pandas import DataFrame, Series
from scipy.stats import norm
from torch import Tensor

from latlib.evaluation.outcomes import BASE, NOTHING, OWN_RULES, RANDOM, SHUFFLED, Rule
from latlib.refusal.geometry import principal_components
from latlib.refusal.massive import MASSIVE
from latlib.report.evidence import (
    SHOWN,
    Evidence,
    MissingError,
    Names,
    contrast,
    display_name,
    display_names,
    not_defended,
    not_in_vain,
    outcome_table,
)
from latlib.report.plots import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    Drawn,
    HeatMap,
    Look,
    axes_of,
    counted,
    draw_bars,
    draw_curves,
    every,
    frame,
    legend_below,
    panels_of,
    size_panels,
    words,
)
from latlib.report.run_checks import read_yaml
from latlib.report.stats import Interval, holm, sizes
from latlib.report.tables import markdown, named, two_lines
from latlib.threat import Site

NOT_FOUND = "not found"
CONTROLS = (NOTHING, RANDOM, SHUFFLED)  # of several random directions the worst of each prompt
SHADES = ("#08519C", "#4292C6", "#9ECAE1", "#DEEBF7")  # of the components shown as bars
# of prompts in a scatter
CIRCLES: Look = {"color": BLUE, "marker": "o", "linestyle": "", "markersize": 3, "alpha": 0.6}
CROSSES: Look = {"color": ORANGE, "marker": "x", "linestyle": "", "markersize": 4, "alpha": 0.7}
COMPARISON = ["claim", "here", "p", "p, Holm", "paper", "paper p", "not defended"]
PAPER = read_yaml("abbas_2025")
SSFT, AT, LAT = "SSFT", "AT", "LAT"  # as the paper calls its models


def paper_names(e: Evidence) -> dict[str, str]:
    """Method -> what the paper calls a model that was trained that way; others are left out."""
    names = {}
    theirs = e.profile.roles.untargeted_rival  # their AT has no target, as their LAT
    for method in e.profile.methods:
        attack = e.profile.training(method).attack
        if method == e.profile.undefended:
            names[method] = SSFT
        elif attack.at_embedding:
            if theirs in (None, method):
                names[method] = AT
        elif attack.steps and not attack.targeted:
            names[method] = LAT
    return names


def removed(e: Evidence, target: Names, source: Names, rule: Names | None = None) -> DataFrame:
    """Rows of targets without the directions of sources (methods, 'base' or some of CONTROLS),
    chosen by a rule (None: any, or a control).
    """
    return e.cell(target, partial=True, intervention="ablate", source=source, rule=rule)


def targets(e: Evidence) -> list[str]:
    """The models of a run that were put under ablation, the base first. Raises MissingError for
    none.
    """
    names = (BASE, *e.profile.methods)
    ablated = set(e.cell(names, partial=True, intervention="ablate")["method"].unique())
    return [name for name in names if name in ablated]


def _found_table(rows: DataFrame, by: list[str]) -> DataFrame:
    """`outcome_table` of the vectors that were found, with `found`: in how many seeds of those that
    were tried. A row without a share was found in none. Raises MissingError for no row."""
    kept = not_in_vain(rows)
    tried = rows.groupby(by, sort=False)["seed"].nunique()
    seeds = kept.groupby(by)["seed"].nunique().reindex(tried.index, fill_value=0)
    found = seeds.astype(str) + " of " + tried.astype(str)
    if kept.empty:
        return found.to_frame("found").reindex(columns=["n", "seeds", *SHOWN, "found"])
    table = outcome_table(kept, by).reindex(tried.index)
    return table.assign(found=found)


def matrix(e: Evidence, rule: str = Rule.BEST, names: Sequence[str] = ()) -> DataFrame:
    """By target and vector (of those of `names`, or of all, that were measured, and CONTROLS): n,
    seeds, shares complied, refused and neither with their intervals, in how many seeds it was
    found, and the paper's refusals with their standard error, in per cent, where it has the cell.
    """
    measured = targets(e)
    names = [name for name in names or measured if name in measured]
    chosen = removed(e, names, names, rule)
    controls = removed(e, names, CONTROLS)
    table = _found_table(pd.concat([chosen, controls]), ["method", "source"])
    cells = list(product(names, (*names, *CONTROLS)))
    called = paper_names(e)
    papers = []
    for cell in cells:
        refused = _paper(*map(called.get, cell))
        papers.append("{:.2f} (SE {:.2f})".format(*refused) if refused else "")
    table = table.reindex(cells).assign(paper=papers)
    return table.rename_axis(["target", "vector"])


def _paper(target: str | None, vector: str | None) -> tuple[float, ...]:
    """The paper's refusals and their standard error; () where it has no such cell."""
    return tuple(PAPER["refused"].get(target, {}).get(vector, ()))


def _refused_below(cell: Any) -> str:
    return f"\nref. {cell.percent[:-2]}" if isinstance(cell, Interval) else ""


def draw_matrix(
    ax: Axes, e: Evidence, rule: str = Rule.BEST, names: Sequence[str] = ()
) -> tuple[str, DataFrame]:
    """Harmful compliance (and refusals) of targets under vectors and the controls: (alternative
    text, the compliance drawn).
    """
    table = matrix(e, rule, names)
    weak = display_names(not_defended(e, list(table.index.unique("target"))))
    table = named(table)
    complied, refused = (table[name].unstack(sort=False) for name in ("complied", "refused"))
    vain = _in_vain(table).unstack(sort=False)
    texts = complied.map(two_lines).mask(vain, NOT_FOUND.replace(" ", "\n"))
    texts = texts + refused.map(_refused_below)
    HeatMap().draw(ax, complied, texts)
    for y, target in enumerate(complied.index):
        frame(ax, complied.columns.get_loc(target), y, edgecolor="black", linewidth=1.5)
    marks = [f"{name}\n(not defended)" if name in weak else name for name in complied.index]
    ax.set_yticks(range(len(marks)), marks)
    ax.tick_params(axis="x", rotation=20)
    title = f"ASR after ablation (%), rule '{rule}'"
    ax.set(xlabel="vector removed", ylabel="target", title=title)
    alt = (
        f"Harmful compliance after ablation, rule {rule}, target: vector. {words(complied.T)}."
        f" Refused: {words(refused.T)}. Not defended before ablation: {', '.join(weak) or 'none'}."
        f" Not found: {_named(vain) or 'none'}."
    )
    return alt, complied


def _in_vain(table: DataFrame) -> Series:
    """Which rows of a `_found_table` were found in no seed."""
    return table["found"].str.startswith("0 ").fillna(False).astype(bool)


def _named(marked: DataFrame) -> str:
    """The cells of a matrix that are marked, in words."""
    cells = marked.stack()
    return ", ".join(f"{vector} on {target}" for target, vector in cells[cells].index)


def ablation_matrix(e: Evidence, rule: str = Rule.BEST) -> Drawn:
    """Self (framed) and cross ablation, beside the controls."""
    count = len(targets(e))
    figure, axes = axes_of(width=2.4 + 1.05 * (count + 3), height=1.4 + 0.72 * count)
    alt, complied = draw_matrix(axes[0, 0], e, rule)
    what = (
        "Attack success rate (ASR) on harmful prompts after one direction is removed, and the share"
        " refused (ref.); framed: a model's own direction"
    )
    return Drawn(figure, alt, counted(what, complied))


def _own(e: Evidence, rule: Names) -> DataFrame:
    """Rows of every target without its own direction."""
    rows = removed(e, targets(e), targets(e), rule)
    return rows[rows["source"] == rows["method"]]


def rules_table(e: Evidence) -> DataFrame:
    """Complied, refused and neither of every target under its own direction, by rule, as intervals;
    and in how many seeds the rule found one: the others do not count.
    """
    table = _found_table(_own(e, OWN_RULES), ["method", "rule"])
    table = table.loc[targets(e), [*SHOWN, "found"]].rename_axis(["target", "rule"])
    return table.astype(object).fillna(NOT_FOUND)


def seeds_table(e: Evidence) -> DataFrame:
    """By target and seed: ASR under its own directions by the rules `best` and `learned` (NaN where
    the search found none), and under the one direction or subspace, of all that were ablated (any
    source, rule and site), that made it comply most."""
    models = ["method", "seed"]
    ablated = e.cell(targets(e), intervention="ablate")
    ablated = ablated[ablated["source"] != NOTHING]
    complied = ablated["outcome"] == "complied"
    won = ablated.assign(strongest=_vectors(ablated), ASR=complied)
    by_vector = won.groupby([*models, "strongest"])["ASR"].mean()
    asr = by_vector.reset_index("strongest")
    by_strength = asr.sort_values("ASR", ascending=False, kind="stable")
    table = by_strength.groupby(models).first()
    own = not_in_vain(won[won["source"] == won["method"]])
    for place, rule in enumerate((Rule.BEST, Rule.LEARNED)):
        shares = own[own["rule"] == rule].groupby(models)["ASR"].mean()
        table.insert(place, f"own, {rule}", shares)
    return table.loc[targets(e)].rename_axis(["target", "seed"])


def _vectors(rows: DataFrame) -> Series:
    """The direction of each row: 'lat, best', 'lat, site-sweep 3', 'random 0' or 'shuffled'."""
    names = (rows["source"] + ", " + rows["rule"]).str.removesuffix(", ")
    numbers = rows["site"].where(rows["rule"] == Rule.SITE_SWEEP, "")
    numbers = numbers.where(rows["source"] != RANDOM, rows["draw"].astype(str))
    return (names + " " + numbers).str.rstrip()


def site_sweep(e: Evidence) -> Drawn:
    """Shares of harmful replies after ablating the model's own difference of means, by the site it
    was taken at.
    """
    table = outcome_table(_own(e, Rule.SITE_SWEEP), ["method", "site"])
    shares = table[list(SHOWN)]
    names = [target for target in targets(e) if target in shares.index]
    sites = shares.index.unique("site")
    sites = sorted(sites, key=lambda site: -1 if site == "embedding" else int(site))
    figure, axes = panels_of(len(names), 2.6, sharey=True)
    styles = [
        {"color": ORANGE, "marker": "^"},
        {"color": SKY, "marker": "o"},
        {"color": GREY, "marker": "x"},
    ]
    alt_text = []
    panels = {}
    for ax, target in zip(axes, names):
        panels[ax] = curves = shares.loc[target].reindex(sites)
        draw_curves(ax, curves, styles)
        ax.set(title=display_name(target), xlabel="site of the direction", ylim=(-4, 104))
        ax.tick_params(axis="x", rotation=35 if "embedding" in sites else 0)
        shown = curves.rename("site {}".format)
        alt_text.append(f"{display_name(target)}: {words(shown)}")
    size_panels(panels)
    figure.supylabel("harmful prompts (%)", fontsize=9)
    legend_below(figure, axes[0], columns=3)
    what = "Harmful prompts after a model's own difference of means is removed, by the site"
    alt = f"Own difference of means ablated, by site. {'. '.join(alt_text)}."
    return Drawn(figure, alt, counted(f"{what} it was taken at", every(panels)))


def _component(tables: Sequence[Mapping[str, Any]], kind: str, number: int) -> Interval:
    """Share of a component at the fixed site: mean over seeds, between the lowest and the highest
    bound of a seed's interval over pairs.
    """
    first = tables[0]
    fixed = first["sites"].index(str(first["fixed_site"]))
    return Interval(
        estimate=float(np.mean([table[kind][fixed][number] for table in tables])),
        low=min(table[f"{kind}_low"][number] for table in tables),
        high=max(table[f"{kind}_high"][number] for table in tables),
        n=first["pairs"],
        clusters=first["clusters"],
        seeds=len(tables),
    )


def variance_bars(e: Evidence, kind: str = "uncentred") -> Drawn:
    """Share of the first components at the fixed site, by `_component`; the paper's figures as
    crosses.
    """
    shares = {}
    variance = e.variance_tables()
    for name, tables in variance.items():
        for number in range(len(SHADES)):
            component = f"component {number + 1}"
            shares[display_name(name), component] = _component(tables, kind, number)
    grid = Series(shares).unstack(sort=False)
    figure, axes = axes_of(width=1.6 + 1.5 * len(grid))
    ax = axes[0, 0]
    draw_bars(ax, grid, SHADES, hatches=("",))
    if kind == "uncentred":
        _draw_papers_variance(ax, e, list(variance))
    ax.set(xlabel="model", ylabel="share of the squared singular values (%)", ylim=(0, 104))
    ax.set_title(f"Explained variance, {kind}")
    legend_below(figure, ax, columns=5)
    what = f"Explained variance at the papers' relative depth, {kind}"
    alt = f"{what}: {words(grid)}."
    return Drawn(figure, alt, f"{what}; crosses: the paper's. {sizes(grid, ' pairs')}.")


def _draw_papers_variance(ax: Axes, e: Evidence, names: Sequence[str]) -> None:
    """Crosses at the paper's first two components, for the models that it has."""
    called = paper_names(e)
    label = "paper"
    for place, name in enumerate(names):
        if name in called:
            shares = PAPER["variance"][called[name]]
            x = [place + (number - 1.5) * 0.8 / len(SHADES) for number in range(len(shares))]
            ax.plot(x, shares, "kx", markersize=7, label=label)
            label = "_"  # one entry in the legend


def massive_table(e: Evidence) -> DataFrame:
    """By model and seed, at the fixed site: the largest entry of a stream, in multiples of its
    median too; by each rule of `refusal.massive` the massive dimensions, with the number of prompts
    in which they are; and the share of the first two components in per cent, uncentred and centred,
    with all dimensions and without those found.

    Raises MissingError where none was measured.
    """
    rows = {}
    for method in e.variance_tables():
        for seed, table in e.variance[method].items():
            if record := table.get("massive"):  # not in runs that were made before it was measured
                rows[method, seed] = _massive_row(record)
    if not rows:
        raise MissingError("no massive activations: run notebook 04 in a new run folder")
    return DataFrame(rows).T.rename_axis(["method", "seed"])


def _massive_row(record: Mapping[str, Any]) -> dict[str, str]:
    row = {
        "largest": f"{record['largest']:.3g}",
        "times median": f"{record['times_median']:.0f}",
        "two components": _percents(record["share"]),
    }
    for rule in MASSIVE:
        found = [f"{dim} ({count})" for dim, count in record[rule].items()]
        row[f"{rule} et al."] = ", ".join(found) or "none"
        row[f"without {rule}'s"] = _percents(record[f"share_without_{rule}"])
    return row


def _percents(shares: Sequence[float]) -> str:
    """Uncentred and centred."""
    uncentred, centred = (f"{100 * share:.1f}" for share in shares)
    return f"{uncentred}; {centred}"


def scatter(
    clouds: Mapping[str, tuple[Mapping[Site, Tensor], Mapping[Site, Tensor]]], sites: Sequence[Site]
) -> Drawn:
    """Harmful and harmless prompts along the first two principal components, a row of panels for
    each method.

    clouds: method -> (site -> [prompts, d_model] of harmful prompts, the same of harmless ones).
    """
    width = 2.3 * len(sites) + 0.6
    height = 2.1 * len(clouds) + 0.5
    figure, axes = axes_of(len(sites), width, height, nrows=len(clouds))
    alt_text = []
    panels = product(clouds, sites)
    for ax, (method, site) in zip(axes.flat, panels):
        first, second = (side[site] for side in clouds[method])
        both = torch.cat([first, second])
        points, shares = principal_components(both, 2)
        harmful, harmless = np.split(points, [len(first)])
        ax.plot(*harmless.T, label="harmless", **CIRCLES)
        ax.plot(*harmful.T, label="harmful", **CROSSES)
        variance = 100 * shares.sum()
        name = display_name(method)
        ax.set_title(f"{name}, site {site}:\n{variance:.0f} % of variance", fontsize=8)
        ax.set(xticks=[], yticks=[])
        distance = np.linalg.norm(harmful.mean(0) - harmless.mean(0))
        gap = distance / points.std(0).max()
        alt_text.append(f"{name} at site {site}: centres {gap:.1f} standard deviations apart")
    legend_below(figure, axes[0, 0], columns=2)
    summary = "; ".join(alt_text)
    what = "Harmful and harmless prompts along two principal components"
    return Drawn(figure, f"{what}. {summary}.", f"{what}. n = {len(both)} prompts, 1 seed.")


def comparisons(e: Evidence) -> DataFrame:
    """The paper's comparisons, for its untargeted LAT and for this run's main method: difference in
    refusals in points, positive where the claim holds, paired by prompt and seed, with interval and
    p-value, Holm's for all rows together, and the paper's own difference and its unpaired p-value.
    A comparison with an undefended target is marked."""
    called = paper_names(e)
    cast = {paper: method for method, paper in reversed(called.items())} | {SSFT: e.reference}
    measured = targets(e)
    rows = []
    lats = dict.fromkeys((cast.get(LAT, e.main), e.main))
    for lat, compared in product(lats, PAPER["compared"]):
        cast[LAT] = lat
        sides = [[cast.get(paper, "") for paper in side] for side in compared["sides"]]
        if not set(measured).issuperset(chain(*sides)):
            continue
        a, b = (removed(e, target, vector, Rule.FIXED) for target, vector in sides)
        here = contrast(a, b, "refused")
        weak = not_defended(e, sorted({target for target, _ in sides}))
        row = {
            "claim": compared["claim"].format_map({k: display_name(m) for k, m in cast.items()}),
            "here": here,
            "p": here.p_value(),
            "not defended": ", ".join(display_names(weak)),
        }
        if called.get(lat) == LAT:
            row |= _papers(*compared["sides"])
        rows.append(row)
    if not rows:
        raise MissingError("no comparison of the paper has both of its sides: run notebook 04")
    table = DataFrame(rows, columns=COMPARISON)
    table["p, Holm"] = holm(table["p"].tolist())
    return table


def _papers(*sides: Sequence[str]) -> dict[str, float]:
    """The paper's difference in points, and the p-value that its standard errors give, unpaired."""
    (x, y), errors = zip(*(_paper(*side) for side in sides))
    p = 2 * norm.sf(abs(x - y) / np.hypot(*errors))
    return {"paper": x - y, "paper p": float(p)}


def comparisons_markdown(table: DataFrame) -> str:
    """The table of `comparisons` as Markdown."""
    rows = []
    for row in table.to_dict("records"):
        paper = "" if pd.isna(row["paper"]) else f"{row['paper']:+.1f} ({row['paper p']:.2g})"
        p_values = [f"{row[name]:.2g}" for name in ("p", "p, Holm")]
        weak = f"not defended: {row['not defended']}" if row["not defended"] else ""
        rows.append([row["claim"], paper, row["here"].points, *p_values, weak])
    header = ["Claim", "Paper: points (p)", "Here: points [95 %]", "p", "p, Holm", ""]
    return markdown(header, rows)
