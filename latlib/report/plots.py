"""Plain figures of the notebooks, from a tidy table each: lines with intervals, bands over steps,
stacked outcomes.

As in `report`: every function returns (figure, alternative text), both from the same numbers;
series differ in colour, marker and dash; intervals are drawn.

    show(*lines(table, "eps", "estimate", "attack", ("eps", "ASR (%)"), "Success of the attack.",
    percent=True))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from latlib.report.canvas import BOX, EDGE, OUTCOMES, RC, Drawn

# Okabe and Ito, no yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX*<>h", ("-", "--", "-.", ":")


def _look(number: int) -> dict:
    """Colour, marker and dash of the n-th series."""
    looks = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}
    return {name: values[number % len(values)] for name, values in looks.items()} | {
        "markersize": 5
    }


def lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    labels: tuple[str, str],
    what: str,
    log: str = "",
    percent: bool = False,
) -> Drawn:
    """A line for each value of column `by`, with its interval where the table has columns `low` and
    `high`.

    labels: of the axes, with units. what: how the alternative text begins. log: axes on a log scale
    ('', 'x', 'y', 'xy'). percent: shares, drawn as 0 to 100.
    """
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(7, 3.6))
    groups, scale, said = list(table.groupby(by, sort=False)), 100 if percent else 1, []
    for number, (name, rows) in enumerate(groups):
        middle, at = scale * rows[y], number - (len(groups) - 1) / 2
        # intervals must not hide each other
        beside = rows[x] * (1 + 0.02 * at) if "x" in log else rows[x]
        spread = None
        if {"low", "high"} <= set(rows):
            spread = np.clip([middle - scale * rows["low"], scale * rows["high"] - middle], 0, None)
        ax.errorbar(
            beside, middle, spread, capsize=2, elinewidth=0.8, label=str(name), **_look(number)
        )
        ends = [
            f"{middle.iloc[i]:.3g}{' %' if percent else ''} at {rows[x].iloc[i]:g}" for i in (0, -1)
        ]
        said.append(f"{name}: {' to '.join(dict.fromkeys(ends))}")
    if "x" in log:
        ax.set_xscale("log")
        ax.set_xticks(sorted(set(table[x])), [f"{v:g}" for v in sorted(set(table[x]))])
        ax.minorticks_off()
    elif table[x].dtype.kind == "i":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_yscale("log" if "y" in log else "linear")
    if percent:
        ax.set_ylim(-4, 104)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.legend(title=by, fontsize=7, title_fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, f"{what} {labels[1]} by {labels[0]}: {'; '.join(said)}."


def bands(curves: Mapping[str, np.ndarray], labels: tuple[str, str], what: str) -> Drawn:
    """The median over rows, and the middle half of them, of curves [steps, rows]; the first is step
    0.
    """
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(7, 3.2))
    said = []
    for number, (name, values) in enumerate(curves.items()):
        low, middle, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75), axis=1)
        steps = np.arange(len(middle))
        ax.plot(steps, middle, label=name, **_look(number))
        ax.fill_between(
            steps, low, high, color=COLOURS[number % len(COLOURS)], alpha=0.2, linewidth=0
        )
        said.append(f"{name}: {middle[0]:.3g} before, {middle[-1]:.3g} after {steps[-1]} steps")
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.legend(fontsize=8)
    return figure, f"{what} {labels[1]} by {labels[0]}, median and middle half: {'; '.join(said)}."


def outcome_bars(table: pd.DataFrame, rows: Sequence[str], what: str) -> Drawn:
    """Stacked bars of refused, complied and neither, one for each combination of the columns
    `rows`.
    """
    groups = list(table.groupby(list(rows), sort=False))
    names = [", ".join(map(str, key)) for key, _ in groups]
    with plt.rc_context(RC):
        figure, ax = plt.subplots(figsize=(7, 0.9 + 0.36 * len(groups)))
    left, said = np.zeros(len(groups)), {name: [] for name in names}
    for outcome, (colour, hatch) in OUTCOMES.items():
        width = np.array([100 * (part["outcome"] == outcome).mean() for _, part in groups])
        ax.barh(names, width, left=left, color=colour, hatch=hatch, label=outcome, **EDGE)
        for at, (name, size) in enumerate(zip(names, width)):
            said[name].append(f"{outcome} {size:.0f} %")
            if size >= 8:
                ax.text(
                    left[at] + size / 2,
                    at,
                    f"{size:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    bbox=BOX,
                )
        left += width
    ax.invert_yaxis()
    ax.set(xlabel="prompts (%)", xlim=(0, 100))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, f"{what} " + "; ".join(
        f"{name}: {', '.join(parts)}" for name, parts in said.items()
    ) + "."
