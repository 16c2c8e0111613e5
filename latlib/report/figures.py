"""Figures of what a run measured: each takes `Evidence` and returns (figure, alternative text).

    show(*security_curve(evidence))

To add a figure, write such a function here and give it to `show_measured` in a notebook. Shares are
in per cent; intervals are drawn where rates are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from latlib.evaluation.outcomes import BASE, HARMFUL, HARMLESS, NOISE, PGD, PLAIN, TWIN
from latlib.objectives import OBJECTIVES
from latlib.report.evidence import (
    SPIKE_MADS,
    WINDOW,
    Evidence,
    MissingError,
    outcome_table,
    rates_by,
    spike_steps,
)
from latlib.report.plots import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    OUTCOMES,
    PINK,
    Drawn,
    Look,
    axes_of,
    draw_bars,
    draw_curves,
    draw_stack,
    legend_below,
    log_x,
    looks,
    numbers,
    save,
    series_look,
    show,
    words,
)
from latlib.report.refusal_tables import draw_matrix

UNITS = {"relative": "times the median residual norm", "absolute": "L2 norm per position"}
SWEEP_COLOURS = (ORANGE, GREEN, BLUE, PINK)
FAINT = {"mfc": "white", "alpha": 0.6}
DIAMONDS = {"color": "black", "marker": "D", "linestyle": "none", "linewidth": 0.8}
# terms of the objective that are drawn, where a method has them
# terms of objectives, and what they are called
TITLES = {"total": "total loss", "kl": "KL", "attack_end": "attack, after PGD"}


def show_measured(e: Evidence, *draws: Callable[[Evidence], Drawn]) -> None:
    """Display each figure, or say what is missing for it."""
    for draw in draws:
        try:
            show(*draw(e))
        except MissingError as error:
            plt.close("all")  # a notebook would display what was begun
            print(f"{draw.__name__} is not shown: {error}")


def save_main_figure(e: Evidence, path: Path) -> None:
    """Write the README's figure, unless something it needs was not measured."""
    try:
        save(main_figure(e)[0], path)
    except MissingError as error:
        plt.close("all")
        print(f"{path.name} is not written: {error}")


def _looks(e: Evidence) -> dict[str, Look]:
    return looks(e.profile.methods)


def draw_security(ax: Axes, e: Evidence, methods: Sequence[str]) -> str:
    """ASR against the radius of the latent attack; hollow markers: noise of the same norm."""
    radii = sorted(e.profile.evaluation.eps)
    grids = []
    styles = []
    for method in methods:
        for attack, extra in {PGD: {}, NOISE: FAINT}.items():
            with suppress(MissingError):
                cell = e.cell(method, attack, eps=radii, where="latent")
                grids.append(rates_by(cell, "eps").rename(f"{method.upper()} {attack}"))
                styles.append(_looks(e)[method] | extra)
    if not grids:
        raise MissingError(f"no latent attack on {', '.join(methods)}: run notebook 06")
    asr = pd.concat(grids, axis=1).sort_index()
    draw_curves(ax, asr, styles, shift=0.015)
    ax.axvline(e.main_eps, color="black", linewidth=0.8, linestyle=":")
    line = f"{e.names['main']}'s own eps"
    ax.annotate(line, (e.main_eps, 50), rotation=90, ha="right", va="center", fontsize=7)
    log_x(ax, radii)
    ax.set(xlabel=f"eps ({UNITS[e.unit]})", ylabel="ASR (%)", ylim=(-4, 104), title="Latent attack")
    ax.legend(fontsize=7, ncols=1 + (len(methods) > 3))
    return f"Attack success rate against eps. {words(asr)}."


def security_curve(e: Evidence, methods: Sequence[str] = ()) -> Drawn:
    """ASR against eps for every method (by default those compared), beside noise of the same
    norm.
    """
    figure, axes = axes_of()
    return figure, draw_security(axes[0, 0], e, methods or e.profile.compared)


def draw_outcomes(ax: Axes, e: Evidence, method: str, prompts: str = HARMFUL) -> str:
    """Stacked shares of refused, complied and neither for every encoding; a diamond: harmless twins
    answered.
    """
    encodings = list(e.profile.evaluation.encodings)
    cell = e.cell(method, encoding=encodings, prompts=prompts)
    shares = outcome_table(cell, "encoding")
    shares = shares.loc[encodings, list(OUTCOMES)]
    draw_stack(ax, numbers(shares))
    if prompts == HARMFUL:
        name = "harmless twin answered"
        twins = e.cell(method, encoding=encodings, prompts=TWIN)
        shares[name] = rates_by(twins, "encoding")
        points = shares[[name]].reset_index(drop=True)
        draw_curves(ax, points, [DIAMONDS])
    ax.set(title=method.upper(), ylim=(0, 104), xlabel="encoding")
    return f"{method.upper()}: {words(shares)}"


def encodings_bars(e: Evidence, methods: Sequence[str] = (), prompts: str = HARMFUL) -> Drawn:
    """Refused, complied or neither, for every method (by default the base and those compared) and
    encoding.
    """
    methods = methods or (BASE, *e.profile.compared)
    width = 2.3 * len(methods) + 0.8
    figure, axes = axes_of(len(methods), width, sharey=True)
    alt_text = []
    for ax, method in zip(axes[0], methods):
        alt_text.append(draw_outcomes(ax, e, method, prompts))
    summary = ". ".join(alt_text)
    axes[0, 0].set_ylabel(f"{prompts} prompts (%)")
    legend_below(figure, axes[0, 0], columns=4)
    return figure, f"What models do with {prompts} prompts in each encoding. {summary}."


def harmless_bars(e: Evidence) -> Drawn:
    """Harmless requests refused, answered or neither, for the base and those compared."""
    return encodings_bars(e, prompts=HARMLESS)


def training_curves(e: Evidence, methods: Sequence[str] = ()) -> Drawn:
    """Loss terms over training: mean over seeds, the band from the lowest to the highest seed."""
    runs = {method: list(e.curves(method).values()) for method in methods or e.profile.compared}
    logged = {name for curves in runs.values() for curve in curves for name in curve}
    terms = [term for objective in OBJECTIVES.values() for term in objective.terms]
    columns = [name for name in dict.fromkeys(["total", *terms, "attack_end"]) if name in logged]
    if not columns:
        raise MissingError("no training curve: run notebook 03")
    figure, axes = axes_of(len(columns), width=2.6 * len(columns), height=3.0)
    ends = []
    for method, curves in runs.items():
        if not curves:
            continue
        by_step = pd.concat(curves).groupby("step")
        ends.append(f"{method.upper()} {by_step['total'].mean().iloc[-1]:.2f}")
        for ax, column in zip(axes[0], columns):
            if column in curves[0]:
                band = by_step[column].agg(["mean", "min", "max"])
                _draw_band(ax, band, method.upper(), _looks(e)[method])
    for ax, column in zip(axes[0], columns):
        title = TITLES.get(column, column)
        ax.set(title=title, xlabel="step", ylabel="nats per token, weighted")
    axes[0, 0].legend(fontsize=7)
    losses = ", ".join(ends)
    return figure, f"Training curves, mean and range over seeds. Total loss at the end: {losses}."


def _draw_band(ax: Axes, band: pd.DataFrame, name: str, style: Look) -> None:
    ax.plot(band["mean"], label=name, **style | {"marker": None, "linewidth": 1.2})
    edges = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
    ax.fill_between(band.index, band["min"], band["max"], **edges)


def spike_figure(e: Evidence) -> Drawn:
    """Left: one run's total loss, its running median, its spikes. Right: does the attack win where
    the loss jumps?
    """
    steps = spike_steps(e, e.main)
    spike = steps["spike"]
    figure, axes = axes_of(2, width=9)
    left, right = axes[0]
    one = steps[steps["seed"] == steps["seed"].min()]
    _draw_spikes(left, one, _looks(e)[e.main]["color"])
    left.set_title(f"{e.names['main']}, one seed")
    won = 100 * steps["won_excess"]
    right.plot(steps["excess"][~spike], won[~spike], ".", color=GREY, label="other steps")
    right.plot(steps["excess"][spike], won[spike], "*", color=ORANGE, label="spikes", markersize=8)
    right.axhline(0, color="black", linewidth=0.6)
    right.set(
        title="All seeds",
        xlabel="total loss above its median",
        ylabel="attacks won above their median (points)",
    )
    for ax in axes[0]:
        ax.legend(fontsize=7)
    alt_text = (
        f"Spikes of the total loss of {e.names['main']}: {spike.sum()} of {len(steps)} steps;"
        f" attacks won {won[spike].mean() if spike.any() else 0:+.1f} points more than usual in"
        f" them, {won[~spike].mean():+.1f} elsewhere."
    )
    return figure, alt_text


def _draw_spikes(ax: Axes, steps: pd.DataFrame, colour: str) -> None:
    """The total loss of one run over its steps."""
    curves = steps.set_index("step")
    total = curves["total"]
    ax.plot(total, color=colour, label="total loss")
    median = f"running median ({WINDOW} steps)"
    ax.plot(total - curves["excess"], "k--", linewidth=0.8, label=median)
    name = f"spike (> {SPIKE_MADS:g} MAD)"
    ax.plot(total[curves["spike"]], "k*", markersize=9, label=name)
    ax.set(xlabel="step", ylabel="total loss (nats per token, weighted)")


def variance_by_site(e: Evidence, kind: str = "uncentred") -> Drawn:
    """Share of the first two SVD components of the paired differences at every site, mean and range
    over seeds.
    """
    by_method = e.variance_tables()
    figure, axes = axes_of()
    ax = axes[0, 0]
    ends = []
    for method, tables in by_method.items():
        sites = tables[0]["sites"]
        fixed = str(tables[0]["fixed_site"])
        first_two = [np.array(table[kind])[:, :2].sum(1) for table in tables]
        shares = 100 * pd.DataFrame(first_two, columns=sites).agg(["mean", "min", "max"])
        mean = shares.loc["mean"]
        spread = [mean - shares.loc["min"], shares.loc["max"] - mean]
        ax.errorbar(sites, mean, spread, capsize=2, label=method.upper(), **_looks(e)[method])
        ends.append(f"{method.upper()} {mean[fixed]:.0f} %")
    ax.axvline(sites.index(fixed), color="black", linewidth=0.8, linestyle=":")
    ax.set(
        title=f"Explained variance, {kind}; dotted: the papers' relative depth",
        xlabel="site (residual stream after block)",
        ylabel="first two components (%)",
        ylim=(0, 104),
    )
    ax.legend(fontsize=8)
    what = f"Variance in the first two components, {kind}, at the papers' relative depth"
    return figure, f"{what}: {', '.join(ends)}."


def sweep_rates(e: Evidence, variants: Sequence[str]) -> pd.DataFrame:
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
    return pd.DataFrame(columns).reindex(variants)


def eps_sweep(e: Evidence) -> Drawn:
    """The double-edged sword: what a training radius buys and costs the main method."""
    variants = e.eps_variants()
    rates = sweep_rates(e, list(variants)).set_axis(list(variants.values()))
    figure, axes = axes_of()
    ax = axes[0, 0]
    draw_curves(ax, rates, [series_look(number, SWEEP_COLOURS, "so^v") for number in range(4)])
    log_x(ax, rates.index)
    name = e.names["main"]
    ax.set(
        title=f"{name} by its training eps, attacked at {e.radius(e.main_eps)}, one seed",
        xlabel=f"eps in training ({UNITS[e.unit]})",
        ylabel="prompts (%)",
        ylim=(-4, 104),
    )
    ax.legend(fontsize=7)
    return figure, f"{name} by training eps. {words(rates)}."


def draw_encodings(ax: Axes, e: Evidence, methods: Sequence[str]) -> str:
    """ASR of each method in each encoding, side by side."""
    encodings = list(e.profile.evaluation.encodings)
    cell = e.cell(methods, encoding=encodings)
    asr = rates_by(cell, ["encoding", "method"]).unstack()
    asr = asr.loc[encodings, list(methods)]
    colours = [_looks(e)[method]["color"] for method in methods]
    draw_bars(ax, asr.rename(columns=str.upper), colours)
    ax.set(ylabel="ASR (%)", ylim=(-4, 104), title="Encoded requests", xlabel="encoding")
    ax.legend(fontsize=7)
    return f"By encoding: {words(asr)}."


def main_figure(e: Evidence) -> Drawn:
    """The whole story in three panels: latent attack, leetspeak audit, ablation."""
    figure, axes = axes_of(3, width=13, height=3.9, width_ratios=(1.1, 1, 1))
    methods = e.profile.compared
    alt_text = [
        draw_security(axes[0, 0], e, methods),
        draw_encodings(axes[0, 1], e, methods),
        draw_matrix(axes[0, 2], e, names=methods),
    ]
    return figure, " ".join(alt_text)
