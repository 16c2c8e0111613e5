"""What all figures are drawn with, and plain figures of notebooks from a tidy table each.

1. Colour is never the only cue: methods differ in marker and line too, outcomes in hatching.
2. A figure is a pair, `Drawn`: the figure and its alternative text, both from the same numbers. It
   is shown with that text or not at all.
3. A *grid* is a table of `stats.Interval`s (shares), None where nothing was measured: `words` says
   it, `draw_curves`, `draw_bars` and `HeatMap.draw` draw it, in per cent.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame
from PIL import Image

from latlib.io.files import aside
from latlib.report.stats import Interval

DPI = 110
# Okabe and Ito's colours, which the colour-blind can tell apart; no yellow
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#009E73"
PINK = "#CC79A7"
SKY = "#56B4E9"
GREY = "#777777"
# of the methods of a profile, in their order, and of other series
COLOURS = (ORANGE, BLUE, GREEN, PINK, "#E69F00", SKY, "#000000")
MARKERS = "s^oDPX*<>h"
DASHES = ("--", "-.", "-", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("//", "", "..", "xx", "\\\\", "oo")
# outcome -> colour, hatching
OUTCOMES = {
    "refused": (SKY, ""),
    "complied": (ORANGE, "///"),
    "neither": ("#DDDDDD", "..."),
}
# of harmless requests, for which complying is no harm
ANSWERED = "answered"
SHADES = OUTCOMES | {ANSWERED: (GREEN, "\\\\\\")}
EDGE = {"edgecolor": "black", "linewidth": 0.4}
# behind numbers
BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
}
Drawn = tuple[Figure, str]
Look = dict[str, Any]  # of a line, as matplotlib takes it


def series_looks() -> Iterator[Look]:
    """Looks of as many series as one likes; neighbours differ in colour, marker and dash."""
    for colour, marker, dash in zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES)):
        yield {"color": colour, "marker": marker, "linestyle": dash}


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Method -> its look, by its place in the profile; and that of the base."""
    base = {"color": GREY, "marker": "v", "linestyle": ":"}
    return {"base": base} | dict(zip(methods, series_looks()))


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size of the full one."""
    full = io.BytesIO()
    small = io.BytesIO()
    with plt.rc_context(RC):
        figure.savefig(full, format="png", dpi=DPI)
    reduced = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def show(figure: Figure, alt: str) -> None:
    """Display the figure in a notebook with its alternative text, and close it. Raises ValueError
    for an empty text.
    """
    from IPython import display

    if len(alt.split()) < 5:
        raise ValueError(f"alt = {alt!r}: say in a sentence what the figure shows")
    display.display(display.Image(data=png_of(figure), format="png", alt=alt))
    plt.close(figure)


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG and close it."""
    with aside(path) as partial:
        partial.write_bytes(png_of(figure))
    plt.close(figure)
    return path


def axes_of(
    columns: int = 1, width: float = 7.0, height: float = 3.6, **options: Any
) -> tuple[Figure, np.ndarray]:
    """(figure, [rows, columns] axes) in the common style; sizes in inches. options: of
    `plt.subplots`, such as nrows.
    """
    with plt.rc_context(RC):
        return plt.subplots(ncols=columns, figsize=(width, height), squeeze=False, **options)


def log_x(ax: Axes, values: Sequence[float]) -> None:
    """A log scale with a tick at every value."""
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """One legend for all panels of a figure."""
    entries = ax.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=columns, fontsize=8)


def numbers(grid: DataFrame, side: str = "estimate", scale: float = 100) -> DataFrame:
    """A grid in per cent (or times another scale); NaN where there is nothing. side: 'estimate',
    'low' or 'high' of its intervals.
    """
    values = grid.map(lambda cell: getattr(cell, side, cell), na_action="ignore")
    return scale * values.astype(float)


def words(grid: DataFrame) -> str:
    """Every estimate of a grid in words, column by column."""
    columns = []
    for name, column in grid.items():
        cells = []
        for x, cell in column.dropna().items():
            at = isinstance(x, str)
            cells.append(f"{x} {cell.percent}" if at else f"{cell.percent} at {x:g}")
        columns.append(f"{name}: {', '.join(cells)}")
    return "; ".join(columns)


def _whiskers(grid: DataFrame, scale: float = 100) -> tuple[DataFrame, np.ndarray]:
    """The estimates of a grid, and [2, rows, columns] how far its bounds lie below and above."""
    middle, low, high = (numbers(grid, side, scale) for side in ("estimate", "low", "high"))
    return middle, np.maximum([middle - low, high - middle], 0)


def draw_curves(
    ax: Axes, grid: DataFrame, styles: Iterable[Look], shift: float = 0.0, scale: float = 100
) -> None:
    """A curve with intervals for each column of a grid, against its index. shift: factor between
    neighbouring curves, whose intervals must not hide each other. scale: see `numbers`.
    """
    middle, spread = _whiskers(grid, scale)
    for number, (name, style) in enumerate(zip(grid, styles)):
        known = middle[name].notna()
        y = middle[name][known]
        x = y.index
        if shift:
            x = x * (1 + shift * (number - (len(grid.columns) - 1) / 2))
        ax.errorbar(x, y, spread[:, known, number], capsize=2, markersize=5, label=name, **style)


def draw_bars(
    ax: Axes, grid: DataFrame, colours: Sequence[str], hatches: Sequence[str] = HATCHES
) -> None:
    """Bars with intervals side by side, a colour and hatching for each column of a grid."""
    middle, spread = _whiskers(grid)
    width = 0.8 / len(grid.columns)
    whiskers = {"capsize": 2, "linewidth": 0.8}
    for number, (name, colour, hatch) in enumerate(zip(grid, colours, cycle(hatches))):
        ax.bar(
            np.arange(len(grid)) - 0.4 + width * (number + 0.5),
            middle[name],
            width,
            yerr=spread[:, :, number],
            error_kw=whiskers,
            label=name,
            color=colour,
            hatch=hatch,
            **EDGE,
        )
    ax.set_xticks(range(len(grid)), grid.index)


def draw_stack(ax: Axes, shares: DataFrame, kind: str = "bar") -> None:
    """Stacked bars, one for each row, of shares of outcomes in per cent. kind: 'bar' or 'barh'."""
    colours, hatches = zip(*(SHADES[outcome] for outcome in shares))
    shares.plot(
        kind=kind,
        ax=ax,
        stacked=True,
        width=0.8,
        color=colours,
        rot=0,
        legend=False,
        **EDGE,
    )
    for bars, hatch in zip(ax.containers, hatches):
        plt.setp(bars.patches, hatch=hatch)


@dataclass(frozen=True)
class HeatMap:
    """How a heat map of shares looks. colours: of matplotlib. full: per cent that would have the
    last colour. white_from: per cent from which numbers are white. box: behind numbers.
    """

    colours: str = "Oranges"
    full: float = 115
    white_from: float = 1000
    fontsize: float = 7
    box: Mapping[str, Any] | None = None

    def draw(self, ax: Axes, grid: DataFrame, texts: DataFrame) -> None:
        """texts: what stands in each cell of the grid, a table of the same shape."""
        shades = numbers(grid).to_numpy(float)
        ax.imshow(shades, cmap=self.colours, vmin=0, vmax=self.full, aspect="auto")
        ax.grid(False)
        style = {
            "ha": "center",
            "va": "center",
            "fontsize": self.fontsize,
            "bbox": self.box,
        }
        for (y, x), text in np.ndenumerate(texts.to_numpy(object)):
            colour = "white" if shades[y, x] > self.white_from else "black"
            if text:
                ax.text(x, y, text, color=colour, **style)
        ax.set_xticks(range(len(grid.columns)), map(_tick, grid.columns))
        ax.set_yticks(range(len(grid)), map(_tick, grid.index))


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def frame(ax: Axes, x: float, y: float, margin: float = 0.02, **style: Any) -> None:
    """A frame round the cell of a heat map, or hatching over it."""
    side = 1 - 2 * margin
    corner = (x - side / 2, y - side / 2)
    ax.add_patch(Rectangle(corner, side, side, fill=False, **style))


def lines(
    grid: DataFrame, labels: tuple[str, str], what: str, log: str = "", scale: float = 1
) -> Drawn:
    """A line for each column of a grid of intervals or numbers, against its index.

    labels: of the axes, with units. what: how the alternative text begins. log: axes on a log scale
    ('', 'x', 'y', 'xy'). scale: 100 for shares in per cent.
    """
    x, y = labels
    figure, axes = axes_of()
    ax = axes[0, 0]
    draw_curves(ax, grid, series_looks(), 0.02 if "x" in log else 0, scale)
    ax.set(xlabel=x, ylabel=y, yscale="log" if "y" in log else "linear")
    if "x" in log:
        log_x(ax, grid.index)
    elif grid.index.dtype.kind == "i":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    ax.legend(title=grid.columns.name, fontsize=7, title_fontsize=7, **beside)
    ends = []
    for name, column in numbers(grid, scale=scale).iloc[[0, -1]].items():
        first, last = [f"{value:.3g} at {at:g}" for at, value in column.items()]
        ends.append(f"{name}: {first} to {last}")
    return figure, f"{what} {y} by {x}: {'; '.join(ends)}."


def bands(curves: Mapping[str, np.ndarray], labels: tuple[str, str], what: str) -> Drawn:
    """The median over rows, and the middle half of them, of curves [steps, rows]; the first is step
    0.
    """
    columns = {}
    for name, values in curves.items():
        quartiles = np.quantile(values, (0.5, 0.25, 0.75), axis=1)
        columns[name] = [Interval(*row) for row in quartiles.T]
    return lines(DataFrame(columns), labels, f"{what} Median and middle half:")


def outcome_bars(table: DataFrame, rows: Sequence[str], what: str) -> Drawn:
    """Stacked bars of refused, complied and neither, one for each combination of the columns
    `rows`.
    """
    names = table[list(rows)].astype(str).agg(", ".join, axis=1)
    order = {"index": names.unique(), "columns": list(OUTCOMES)}
    shares = pd.crosstab(names, table["outcome"], normalize="index")
    shares = shares.reindex(**order, fill_value=0.0)
    figure, axes = axes_of(height=0.9 + 0.36 * len(shares))
    ax = axes[0, 0]
    draw_stack(ax, 100 * shares, "barh")
    for bars in ax.containers:
        texts = [f"{size:.0f}" if size >= 8 else "" for size in bars.datavalues]
        ax.bar_label(
            bars,
            texts,
            label_type="center",
            fontsize=8,
            bbox=BOX,
        )
    ax.invert_yaxis()
    ax.set(xlabel="prompts (%)", ylabel="", xlim=(0, 100))
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    exact = shares.T.map(lambda share: Interval(share, share, share))
    return figure, f"{what} {words(exact)}."
