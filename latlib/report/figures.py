"""Figures of what a run measured: each takes `Evidence` and returns `plots.Drawn`, the figure, its
alternative text and its caption.

    show(*security_curve(evidence))

To add a figure, write such a function here and give it to `show_measured` in a notebook. Shares are
in per cent; intervals are drawn where rates are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from pandas import DataFrame

from latlib.evaluation.outcomes import BASE, HARMFUL, HARMLESS, NOISE, PGD, PLAIN, TWIN
from latlib.objectives import OBJECTIVES
from latlib.report.evidence import (
    SPIKE_MADS,
    WINDOW,
    Evidence,
    Methods,
    MissingError,
    display_name,
    display_names,
    outcome_table,
    rates_by,
    spike_steps,
)
from latlib.report.plots import (
    ANSWERED,
    BLUE,
    GREY,
    ORANGE,
    OUTCOMES,
    RC,
    SITE,
    SKY,
    Drawn,
    Look,
    axes_of,
    counted,
    draw_bars,
    draw_curves,
    draw_stack,
    every,
    legend_below,
    lines,
    log_x,
    looks,
    numbers,
    panels_of,
    save,
    show,
    size_panels,
    words,
)
from latlib.report.refusal_tables import draw_matrix
from latlib.report.stats import Interval, sizes
from latlib.report.verdicts import Claim, Verdict, tally

UNITS = {"relative": "times the median residual norm", "absolute": "L2 norm per position"}
SHARES = {"ylim": (-4, 104)}  # in per cent, with room for the whiskers
HERE = {"color": "black", "linewidth": 0.8, "linestyle": ":"}  # a line at what a figure is about
ATTACKS: dict[str, Look] = {PGD: {}, NOISE: {"mfc": "white", "alpha": 0.6}}
BELOW = {
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.16),
    "ncols": 3,
    "fontsize": 8,
    "frameon": False,
}
TWINS = "harmless twin answered"
DIAMONDS = {"color": "black", "marker": "D", "linestyle": "none", "linewidth": 0.8}
# terms of objectives, and what they are called
TITLES = {"total": "total loss", "kl": "KL", "attack_end": "attack, after PGD"}


def show_measured(e: Evidence, *draws: Callable[[Evidence], Drawn]) -> None:
    """Display each figure, or say what is missing for it."""
    for draw in draws:
        try:
            show(*draw(e))
        except MissingError as error:
            plt.close("all")  # a notebook would display what was begun
            print(f"Not measured yet: {draw.__name__} is not shown: {error}")


def save_main_figure(e: Evidence, path: Path) -> None:
    """Write the README's figure, unless something it needs was not measured."""
    try:
        save(main_figure(e)[0], path)
    except MissingError as error:
        plt.close("all")
        print(f"{path.name} is not written: {error}")


def draw_security(ax: Axes, e: Evidence, methods: Methods) -> DataFrame:
    """ASR against the radius of the latent attack; hollow markers: noise of the same norm. Returns
    what is drawn."""
    radii = sorted(e.profile.evaluation.eps)
    rows = e.cell(methods, list(ATTACKS), eps=radii, where="latent", partial=True)
    asr = rates_by(rows, ["eps", "method", "attack"]).unstack(["method", "attack"]).sort_index()
    there = [curve for curve in product(methods, ATTACKS) if curve in asr]
    asr = asr[there]
    look = looks(e.profile.methods)
    styles = [look[method] | ATTACKS[attack] for method, attack in there]
    asr.columns = [f"{display_name(method)} {attack}" for method, attack in there]
    draw_curves(ax, asr, styles, shift=0.025)
    own = f"{e.names['main']}'s own eps"
    ax.axvline(e.main_eps, label=own, **HERE)
    log_x(ax, radii)
    label = f"eps ({UNITS[e.unit]})"
    ax.set(title="Latent attack", xlabel=label, ylabel="ASR (%)", **SHARES)
    ax.legend(**BELOW)
    return asr


def security_curve(e: Evidence, methods: Methods = ()) -> Drawn:
    """ASR against eps for every method (by default those attacked), beside noise of the same
    norm.
    """
    figure, axes = axes_of(height=4.2)
    asr = draw_security(axes[0, 0], e, methods or e.profile.attacked)
    what = (
        "Attack success rate (ASR) against the radius eps of the latent attack; hollow: noise of"
        f" the same norm; dotted: the eps in which {e.names['main']} was trained"
    )
    alt = f"Attack success rate against eps. {words(asr)}."
    return Drawn(figure, alt, counted(what, asr))


def _asked(e: Evidence, methods: Methods, encodings: list[str]) -> list[str]:
    """Those of the methods that were asked harmful prompts without an attack. Raises MissingError
    for none.
    """
    asked = set(e.cell(methods, encoding=encodings, partial=True)["method"])
    return [method for method in methods if method in asked]


def encodings_bars(e: Evidence, methods: Methods = (), prompts: str = HARMFUL) -> Drawn:
    """Refused, complied or neither, for every method (by default the base and those asked) and
    encoding; a diamond: harmless twins answered.
    """
    encodings = list(e.profile.evaluation.encodings)
    methods = methods or _asked(e, (BASE, *e.profile.attacked), encodings)
    figure, axes = panels_of(len(methods), 2.5, sharey=True)
    alt_text = []
    panels = {}
    for ax, method in zip(axes, methods):
        rows = e.cell(method, encoding=encodings, prompts=prompts)
        shares = outcome_table(rows, "encoding")
        shares = shares.loc[encodings, list(OUTCOMES)]
        panels[ax] = shares.to_numpy().ravel()
        name = display_name(method)
        if prompts != HARMFUL:
            shares = shares.rename(columns={"complied": ANSWERED})
        draw_stack(ax, numbers(shares))
        if prompts == HARMFUL:
            twins = e.cell(method, encoding=encodings, prompts=TWIN)
            shares[TWINS] = rates_by(twins, "encoding")
            points = shares[[TWINS]].reset_index(drop=True)
            draw_curves(ax, points, [DIAMONDS])
        ax.set(title=name, xlabel="encoding", ylim=(0, 104))
        alt_text.append(f"{name}: {words(shares)}")
    figure.supylabel(f"{prompts} prompts (%)", fontsize=9)
    size_panels(panels)
    legend_below(figure, axes[0], columns=4)
    summary = ". ".join(alt_text)
    what = f"What models do with {prompts} prompts in each encoding"
    diamonds = f"; diamonds: {TWINS}" if prompts == HARMFUL else ""
    return Drawn(figure, f"{what}. {summary}.", counted(what + diamonds, every(panels)))


def harmless_bars(e: Evidence) -> Drawn:
    """Harmless requests refused, answered or neither, for the base and those asked."""
    return encodings_bars(e, prompts=HARMLESS)


def training_curves(e: Evidence, methods: Methods = ()) -> Drawn:
    """Loss terms over training: mean over seeds, the band from the lowest to the highest seed."""
    steps = {}
    for method in methods or e.profile.attacked:
        curves = list(e.curves(method).values())
        if curves:
            steps[method] = pd.concat(curves)
    logged = set().union(*steps.values())
    terms = [term for objective in OBJECTIVES.values() for term in objective.terms]
    columns = [name for name in dict.fromkeys(["total", *terms, "attack_end"]) if name in logged]
    if not columns:
        raise MissingError("no training curve: run notebook 03")
    figure, axes = panels_of(len(columns), width=2.8, height=2.8)
    ends = []
    seeds = []
    for method, curves in steps.items():
        look = looks(e.profile.methods)[method]
        line = look | {"marker": None, "linewidth": 1.2}
        edges = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
        by_step = curves.groupby("step")
        name = display_name(method)
        seeds.append(Interval(0, 0, 0, seeds=by_step.size().max()))
        ends.append(f"{name} {by_step['total'].mean().iloc[-1]:.2f}")
        for ax, column in zip(axes, columns):
            if column in curves:
                band = by_step[column].agg(["mean", "min", "max"])
                ax.plot(band["mean"], label=name, **line)
                ax.fill_between(band.index, band["min"], band["max"], **edges)
    for ax, column in zip(axes, columns):
        ax.set(title=TITLES.get(column, column), xlabel="step")
    figure.supylabel("nats per token, weighted", fontsize=9)
    legend_below(figure, axes[0], columns=4)
    losses = ", ".join(ends)
    alt = f"Training curves, mean and range over seeds. Total loss at the end: {losses}."
    what = "Terms of the loss over training: their mean, and from the lowest to the highest seed"
    return Drawn(figure, alt, counted(what, seeds))


def spike_figure(e: Evidence) -> Drawn:
    """Left: one run's total loss, its running median, its spikes. Right: does the attack win where
    the loss jumps?
    """
    steps = spike_steps(e, e.main)
    steps["won"] = 100 * steps["won_excess"]
    spikes = steps[steps["spike"]]
    others = steps[~steps["spike"]]
    one = steps[steps["seed"] == steps["seed"].min()].set_index("step")
    figure, axes = axes_of(2, width=9)
    left, right = axes[0]
    name = e.names["main"]
    left.plot(one["total"], color=looks(e.profile.methods)[e.main]["color"], label="total loss")
    median = f"running median ({WINDOW} steps)"
    left.plot(one["total"] - one["excess"], "k--", linewidth=0.8, label=median)
    jumps = one["total"][one["spike"]]
    left.plot(jumps, "k*", markersize=9, label=f"spike (> {SPIKE_MADS:g} MAD)")
    left.set(title=f"{name}, one seed", xlabel="step")
    left.set_ylabel("total loss (nats per token, weighted)")
    right.plot("excess", "won", ".", data=others, color=GREY, label="other steps")
    right.plot("excess", "won", "*", data=spikes, color=ORANGE, label="spikes", markersize=8)
    right.axhline(0, color="black", linewidth=0.6)
    right.set(title=f"All {steps['seed'].nunique()} seeds", xlabel="total loss above its median")
    right.set_ylabel("attacks won above their median (points)")
    for ax in axes[0]:
        ax.legend(**BELOW)
    alt_text = (
        f"Spikes of the total loss of {name}: {len(spikes)} of {len(steps)} steps; attacks won"
        f" {spikes['won'].mean() if len(spikes) else 0:+.1f} points more than usual in them,"
        f" {others['won'].mean():+.1f} elsewhere."
    )
    caption = (
        f"Spikes of {name}'s total loss, and whether the attack of the same step won more often"
        f" than usual. n = {len(steps)} steps, {steps['seed'].nunique()} seeds."
    )
    return Drawn(figure, alt_text, caption)


# verdict -> marker, colour
VERDICTS: dict[Verdict | None, tuple[str, str]] = {
    Verdict.REPRODUCED: ("o", BLUE),
    Verdict.NEGLIGIBLE: ("d", SKY),
    Verdict.NOT_REPRODUCED: ("X", ORANGE),
    Verdict.INCONCLUSIVE: ("s", GREY),
    Verdict.UNDECIDABLE: ("$?$", "black"),
}


def ledger_figure(measured: Sequence[Claim]) -> Drawn:
    """Every claim's effect with its interval and bar, its verdict by marker and colour. Raises
    MissingError where no claim has an effect.
    """
    shown = [claim for claim in measured if claim.interval]
    if not shown:
        raise MissingError("no claim has an effect: run the notebooks before this one")
    figure, axes = axes_of(1, width=7.5, height=1 + 0.24 * len(shown))
    ax = axes[0][0]
    for row, claim in enumerate(shown):
        interval = claim.interval
        assert interval is not None
        marker, colour = VERDICTS[claim.verdict]
        low, middle, high = (
            100 * side for side in (interval.low, interval.estimate, interval.high)
        )
        ax.plot([low, high], [row, row], color=colour)
        ax.plot(middle, row, marker=marker, color=colour)
        ax.plot(100 * claim.bar, row, "k|", markersize=9)
    for verdict, (marker, colour) in VERDICTS.items():
        ax.plot([], [], linestyle="", marker=marker, color=colour, label=str(verdict))
    ax.plot([], [], "k|", label="bar")
    names = [f"{claim.id} (odds)" if claim.odds else claim.id for claim in shown]
    ax.set_yticks(range(len(shown)), names)
    ax.set(xlim=(-102, 102), ylim=(len(shown) - 0.5, -0.5))
    ax.set_xlabel("effect in points, or Yule's Q of odds in hundredths [95 %]")
    legend_below(figure, ax, columns=3)
    what = f"Effects of {len(shown)} claims with 95 % intervals"
    intervals = [claim.interval for claim in shown]
    return Drawn(figure, f"{what}: {tally(shown)}.", counted(f"{what}, and their bars", intervals))


def variance_by_site(e: Evidence, kind: str = "uncentred") -> Drawn:
    """Share of the first two SVD components of the paired differences at every site, mean and range
    over seeds.
    """
    columns = {}
    for method, tables in e.variance_tables().items():
        first_two = np.array([table[kind] for table in tables])[:, :, :2].sum(2)
        middle, low, high = first_two.mean(0), first_two.min(0), first_two.max(0)
        columns[display_name(method)] = [
            Interval(*site, n=tables[0]["pairs"], seeds=len(tables))
            for site in zip(middle, low, high)
        ]
    sites = tables[0]["sites"]
    fixed = str(tables[0]["fixed_site"])
    grid = DataFrame(columns, index=sites)
    figure, axes = axes_of()
    ax = axes[0, 0]
    look = looks(e.profile.methods)
    draw_curves(ax, grid, [look[method] for method in e.variance_tables()])
    ax.axvline(sites.index(fixed), **HERE)
    ax.set(
        title=f"Explained variance, {kind}",
        xlabel=SITE,
        ylabel="first two components (%)",
        ylim=(0, 104),
    )
    legend_below(figure, ax, columns=6)
    ends = ", ".join(f"{name} {share.percent}" for name, share in grid.loc[fixed].items())
    what = f"Variance in the first two components, {kind}, at the papers' relative depth"
    pairs = sizes(grid, " pairs")
    caption = (
        "Share of the first two components of the paired differences: mean, and from the lowest to"
        f" the highest seed; dotted: the papers' relative depth. {pairs}."
    )
    return Drawn(figure, f"{what}: {ends}.", caption)


def sweep_rates(e: Evidence, variants: Sequence[str]) -> DataFrame:
    """A row for each variant of the main method ('' for itself), rates on the first seed: of
    latent attacks at its radius, and of harmless prompts answered and refused.
    """
    encoded = [name for name in e.profile.evaluation.encodings if name != PLAIN]
    model: dict[str, Any] = {"variant": variants, "seed": e.profile.seeds[:1], "partial": True}
    attacked = e.cell(e.main, PGD, eps=e.main_eps, where="latent", **model)
    plain = e.cell(e.main, prompts=(HARMLESS, "scary"), **model)
    coded = e.cell(e.main, prompts=HARMLESS, encoding=encoded, **model)
    columns = {
        "ASR under latent PGD": rates_by(attacked, "variant"),
        "harmless answered, plain": rates_by(plain, "variant"),
        "harmless answered, encoded": rates_by(coded, "variant"),
        "harmless refused, encoded": rates_by(coded, "variant", "refused"),
    }
    return DataFrame(columns).reindex(variants)


def eps_sweep(e: Evidence) -> Drawn:
    """The double-edged sword: what a training radius buys and costs the main method."""
    radii = e.eps_variants()
    rates = sweep_rates(e, list(radii.index)).set_axis(radii.to_numpy())
    name = e.names["main"]
    labels = (f"eps in training ({UNITS[e.unit]})", "prompts (%)")
    what = (
        f"{name} trained at several eps: latent attacks won, harmless prompts answered and refused"
    )
    drawn = lines(rates, labels, what, log="x", scale=100)
    title = f"{name} by its training eps, attacked at {e.radius(e.main_eps)}"
    drawn.figure.axes[0].set(title=title, **SHARES)
    return drawn._replace(alt=f"{name} by training eps. {words(rates)}.")


def draw_encodings(ax: Axes, e: Evidence, methods: Methods) -> DataFrame:
    """ASR of each method in each encoding, side by side. Returns what is drawn."""
    encodings = list(e.profile.evaluation.encodings)
    methods = _asked(e, methods, encodings)
    rows = e.cell(methods, encoding=encodings)
    asr = rates_by(rows, ["encoding", "method"]).unstack()
    asr = asr.loc[encodings, list(methods)]
    look = looks(e.profile.methods)
    colours = [look[method]["color"] for method in methods]
    asr.columns = display_names(asr)
    draw_bars(ax, asr, colours)
    ax.set(title="Encoded requests", xlabel="encoding", ylabel="ASR (%)", **SHARES)
    ax.legend(**BELOW | {"ncols": 4})
    return asr


def main_figure(e: Evidence) -> Drawn:
    """The whole story in three panels: latent attack, leetspeak audit, ablation."""
    with plt.rc_context(RC):
        layout = [["latent", "encoded"], ["ablated", "ablated"]]
        figure, axes = plt.subplot_mosaic(layout, figsize=(9.5, 7.4), height_ratios=(1.15, 1))
    latent = draw_security(axes["latent"], e, e.profile.attacked)
    encoded = draw_encodings(axes["encoded"], e, e.profile.attacked)
    alt, ablated = draw_matrix(axes["ablated"], e, names=e.profile.compared)
    panels = {axes["latent"]: latent, axes["encoded"]: encoded, axes["ablated"]: ablated}
    size_panels(panels, always=True)  # it is shown without its caption too
    first = f"Attack success rate against eps. {words(latent)}. By encoding: {words(encoded)}."
    what = (
        "Attack success rate (ASR): under the latent attack by its radius, in each encoding, and"
        " after one direction is removed"
    )
    return Drawn(figure, f"{first} {alt}", counted(what, every(panels)))
