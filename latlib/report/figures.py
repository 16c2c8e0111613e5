"""Figures of what a run measured: each takes `Evidence` and returns (figure, alternative text).

    show(*security_curve(evidence))

Shares are in per cent; intervals are drawn where rates are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from latlib.report.canvas import (
    EDGE,
    OUTCOMES,
    STYLE,
    Drawn,
    axes_of,
    in_words,
    rate_curve,
    save,
    show,
)
from latlib.report.evidence import SPIKE_MADS, WINDOW, Evidence, MissingError, rate, spike_steps
from latlib.report.refusal_tables import draw_matrix
from latlib.report.stats import Interval

METHODS = ("ssft", "at", "lat")


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


def _eps_label(e: Evidence, what: str = "eps") -> str:
    mode = e.profile.training("lat").attack.eps_mode
    return (
        f"{what}"
        f" ({'times the median residual norm' if mode == 'relative' else 'L2 norm per position'})"
    )


def _rates(
    e: Evidence, method: str, attack: str, radii: Sequence[float]
) -> tuple[list[float], list[Interval]]:
    """The radii at which a latent attack was measured, and its rates there."""
    found: dict[float, Interval] = {}
    for eps in sorted(radii):
        with suppress(MissingError):
            found[eps] = rate(e.cell(method, attack, eps=eps, where="latent"))
    return list(found), list(found.values())


def draw_security(ax: Axes, e: Evidence, methods: Sequence[str] = METHODS) -> str:
    """ASR against the radius of the latent attack; hollow markers: noise of the same norm."""
    said = []
    for shift, method in enumerate(methods):
        for attack in ("pgd", "noise"):
            x, intervals = _rates(e, method, attack, e.profile.evaluation.eps)
            if not x:
                continue
            style = STYLE[method] | ({"mfc": "white", "alpha": 0.6} if attack == "noise" else {})
            beside = np.array(x) * (1 + 0.03 * (shift - 1))
            rate_curve(ax, beside, intervals, f"{method.upper()} {attack}", **style)
            said.append(f"{method.upper()} under {attack}: {in_words(intervals, x)}")
    if not said:
        raise MissingError("no latent attack on " + ", ".join(methods))
    ax.axvline(e.lat_eps, color="black", linewidth=0.8, linestyle=":")
    ax.annotate(
        "LAT's training eps", (e.lat_eps, 50), rotation=90, ha="right", va="center", fontsize=7
    )
    ax.set(
        xlabel=_eps_label(e), ylabel="ASR (%)", ylim=(-4, 104), xscale="log", title="Latent attack"
    )
    ax.set_xticks(e.profile.evaluation.eps, [f"{x:g}" for x in e.profile.evaluation.eps])
    ax.minorticks_off()
    ax.legend(fontsize=7, ncols=1 + (len(methods) > 3))
    return "Attack success rate against eps. " + "; ".join(said) + "."


def security_curve(e: Evidence, methods: Sequence[str] = METHODS) -> Drawn:
    """ASR against eps for every method, beside noise of the same norm."""
    figure, axes = axes_of()
    return figure, draw_security(axes[0, 0], e, methods)


def draw_outcomes(ax: Axes, e: Evidence, method: str, prompts: str = "harmful") -> str:
    """Stacked shares of refused, complied and neither for every encoding; a diamond: harmless twins
    understood.
    """
    encodings, bottom, said = e.profile.evaluation.encodings, 0.0, []
    for outcome, (color, hatch) in OUTCOMES.items():
        intervals = [rate(e.cell(method, encoding=c, prompts=prompts), outcome) for c in encodings]
        shares, style = (
            np.array([100 * i.estimate for i in intervals]),
            {"color": color, "hatch": hatch} | EDGE,
        )
        ax.bar(encodings, shares, bottom=bottom, label=outcome, **style)
        bottom = bottom + shares
        said.append(f"{outcome} " + ", ".join(f"{s:.0f} % {c}" for s, c in zip(shares, encodings)))
    if prompts == "harmful":
        understood = [rate(e.cell(method, encoding=c, prompts="twin")) for c in encodings]
        style = {"color": "black", "marker": "D", "linestyle": "none", "linewidth": 0.8}
        rate_curve(ax, range(len(encodings)), understood, "harmless twin answered", **style)
        said.append("harmless twin answered " + in_words(understood))
    ax.set(title=method.upper(), ylim=(0, 104), xlabel="encoding")
    return f"{method.upper()}: " + "; ".join(said)


def encodings_bars(
    e: Evidence, methods: Sequence[str] = ("base", *METHODS), prompts: str = "harmful"
) -> Drawn:
    """Refused, complied or neither, for every method and encoding."""
    figure, axes = axes_of(len(methods), width=2.3 * len(methods) + 0.8, sharey=True)
    said = [draw_outcomes(ax, e, method, prompts) for ax, method in zip(axes[0], methods)]
    axes[0, 0].set_ylabel(f"{prompts} prompts (%)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return (
        figure,
        f"What models do with {prompts} prompts in each encoding. " + ". ".join(said) + ".",
    )


CURVES = {
    "total": "total loss",
    "toward": "toward",
    "away": "away",
    "kl": "KL",
    "attack_end": "attack, after PGD",
}


def training_curves(e: Evidence, methods: Sequence[str] = METHODS) -> Drawn:
    """Loss terms over training: mean over seeds, the band from the lowest to the highest seed."""
    figure, axes = axes_of(len(CURVES), width=13, height=3.0)
    ends = []
    for method in methods:
        curves = [
            curve.assign(seed=seed) for (label, seed), curve in e.metrics.items() if label == method
        ]
        if not curves:
            continue
        by_step = pd.concat(curves).groupby("step")
        ends.append(f"{method.upper()} {by_step['total'].mean().iloc[-1]:.2f}")
        style = STYLE[method] | {"marker": None}
        for ax, column in zip(axes[0], CURVES):
            if column in curves[0]:
                mean, low, high = (getattr(by_step[column], f)() for f in ("mean", "min", "max"))
                ax.plot(mean.index, mean, label=method.upper(), linewidth=1.2, **style)
                ax.fill_between(
                    mean.index, low, high, color=style["color"], alpha=0.15, linewidth=0
                )
    for ax, title in zip(axes[0], CURVES.values()):
        ax.set(title=title, xlabel="step", ylabel="nats per token, weighted")
    axes[0, 0].legend(fontsize=7)
    return (
        figure,
        f"Training curves, mean and range over seeds. Total loss at the end: {', '.join(ends)}.",
    )


def spike_figure(e: Evidence, method: str = "lat") -> Drawn:
    """Left: one run's total loss, its running median, its spikes. Right: does the attack win where
    the loss jumps?
    """
    steps = spike_steps(e.metrics, (method,))
    figure, axes = axes_of(2, width=9)
    (left, right), one = axes[0], steps[steps["seed"] == steps["seed"].min()]
    high = one[one["spike"]]
    left.plot(one["step"], one["total"], color=STYLE[method]["color"], label="total loss")
    left.plot(
        one["step"],
        one["total"] - one["excess"],
        "k--",
        linewidth=0.8,
        label=f"running median ({WINDOW} steps)",
    )
    left.plot(
        high["step"], high["total"], "k*", markersize=9, label=f"spike (> {SPIKE_MADS:g} MAD)"
    )
    left.set(
        xlabel="step",
        ylabel="total loss (nats per token, weighted)",
        title=f"{method.upper()}, one seed",
    )
    left.legend(fontsize=7)
    for spike, marker, color, label in (
        (False, ".", "#777777", "other steps"),
        (True, "*", "#D55E00", "spikes"),
    ):
        part = steps[steps["spike"] == spike]
        right.plot(
            part["excess"],
            100 * part["won_excess"],
            marker,
            color=color,
            label=label,
            markersize=4 + 4 * spike,
        )
    right.axhline(0, color="black", linewidth=0.6)
    right.set(
        title="All seeds",
        xlabel="total loss above its median",
        ylabel="attacks won above their median (points)",
    )
    right.legend(fontsize=7)
    won = 100 * steps.groupby("spike")["won_excess"].mean()
    said = (
        f"attacks won {won.get(True, 0):+.1f} points more than usual in them, {won.get(False):+.1f}"
        " elsewhere"
    )
    count = f"{int(steps['spike'].sum())} of {len(steps)} steps"
    return figure, f"Spikes of the total loss of {method.upper()}: {count}; {said}."


def explained_variance(
    e: Evidence, kind: str = "uncentred", methods: Sequence[str] = tuple(STYLE)
) -> Drawn:
    """Share of the first two SVD components of the paired differences at every site, mean and range
    over seeds.
    """
    figure, axes = axes_of()
    ax, said, table = axes[0, 0], [], None
    for method in methods:
        tables = [t for (m, _), t in sorted(e.variance.items()) if m == method]
        if not tables:
            continue
        table = tables[0]
        shares = 100 * np.array([[sum(row[:2]) for row in t[kind]] for t in tables])
        low, mean, high = shares.min(0), shares.mean(0), shares.max(0)
        ax.errorbar(
            table["sites"],
            mean,
            [mean - low, high - mean],
            capsize=2,
            label=method.upper(),
            **STYLE[method],
        )
        said.append(
            f"{method.upper()} {mean[table['sites'].index(str(table['fixed_site']))]:.0f} %"
        )
    if table is None:
        raise MissingError("no explained variance: run notebook 04")
    ax.axvline(
        table["sites"].index(str(table["fixed_site"])), color="black", linewidth=0.8, linestyle=":"
    )
    ax.set(
        xlabel="site (residual stream after block)",
        ylabel="first two components (%)",
        ylim=(0, 104),
    )
    ax.set_title(f"Explained variance, {kind}; dotted: the papers' relative depth")
    ax.legend(fontsize=8)
    return (
        figure,
        (
            f"Variance in the first two components, {kind}, at the papers' relative depth:"
            f" {', '.join(said)}."
        ),
    )


def draw_sweep(ax: Axes, e: Evidence) -> str:
    """LAT trained at several radii: ASR at LAT's own radius, utility, over-refusal."""
    variants, encoded = (
        e.eps_variants(),
        [c for c in e.profile.evaluation.encodings if c != "plain"],
    )
    cells = {
        "ASR under latent PGD": (
            "complied",
            {"attack": "pgd", "eps": e.lat_eps, "where": "latent"},
        ),
        "harmless answered, plain": ("complied", {"prompts": ("harmless", "scary")}),
        "harmless answered, encoded": ("complied", {"prompts": "harmless", "encoding": encoded}),
        "harmless refused, encoded": ("refused", {"prompts": "harmless", "encoding": encoded}),
    }
    said, looks = (
        [],
        zip(("#D55E00", "#009E73", "#0072B2", "#CC79A7"), "so^v", ("-", "--", "-.", ":")),
    )
    for (label, (outcome, which)), (color, marker, linestyle) in zip(cells.items(), looks):
        # swept on one seed
        rows = (e.cell(name, seeds=e.profile.seeds[:1], **which) for name in variants)
        intervals = [rate(r, outcome) for r in rows]
        rate_curve(
            ax,
            list(variants.values()),
            intervals,
            label,
            color=color,
            marker=marker,
            linestyle=linestyle,
        )
        said.append(f"{label} {in_words(intervals, list(variants.values()))}")
    ax.set(
        xlabel=_eps_label(e, "eps in training"), ylabel="prompts (%)", ylim=(-4, 104), xscale="log"
    )
    ax.set_xticks(list(variants.values()), [f"{x:g}" for x in variants.values()])
    ax.minorticks_off()
    ax.set_title(f"LAT by its training eps, attacked at {e.lat_eps:g}, one seed")
    ax.legend(fontsize=7)
    return "LAT by training eps: " + "; ".join(said) + "."


def eps_sweep(e: Evidence) -> Drawn:
    """The double-edged sword: what a training radius buys and costs."""
    figure, axes = axes_of()
    return figure, draw_sweep(axes[0, 0], e)


def main_figure(e: Evidence) -> Drawn:
    """The whole story in three panels: latent attack, leetspeak audit, ablation."""
    figure, axes = axes_of(3, width=13, height=3.9, width_ratios=(1.1, 1, 1))
    said = [draw_security(axes[0, 0], e)]
    audit, width = axes[0, 1], 0.26
    for at, method in enumerate(METHODS):
        intervals = [rate(e.cell(method, encoding=c)) for c in e.profile.evaluation.encodings]
        x = np.arange(len(intervals)) + width * (at - 1)
        look = {"color": STYLE[method]["color"], "hatch": ("//", "", "..")[at]} | EDGE
        audit.bar(x, [100 * i.estimate for i in intervals], width, label=method.upper(), **look)
        rate_curve(
            audit, x, intervals, "_", color="black", marker="none", linestyle="none", linewidth=0.8
        )
        said.append(f"{method.upper()} by encoding: {in_words(intervals)}")
    audit.set(ylabel="ASR (%)", ylim=(-4, 104), title="Encoded requests", xlabel="encoding")
    audit.set_xticks(range(len(e.profile.evaluation.encodings)), e.profile.evaluation.encodings)
    audit.legend(fontsize=7)
    said.append(draw_matrix(axes[0, 2], e, names=METHODS))
    return figure, " ".join(said)
