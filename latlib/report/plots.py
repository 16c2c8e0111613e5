"""What all figures are drawn with, and plain figures of notebooks from a tidy table each.

1. Colour is never the only cue: methods differ in marker and line too, outcomes in hatching.
2. A figure is `Drawn`: the figure, its alternative text and its caption, all from the same numbers.
   It is shown with that text or not at all, and numbered in the order in which a notebook shows its
   figures.
3. A *grid* is a table of `stats.Interval`s (shares), None where nothing was measured: `words` says
   it, `draw_curves`, `draw_bars` and `HeatMap.draw` draw it, in per cent.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

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
from latlib.report.stats import Interval, sizes

CSS_DPI = 96  # dots of a page that an inch is
DPI = 2 * CSS_DPI  # sharp on screens with two pixels a dot
A_ROW = 3  # panels beside each other: more are not read on a narrow screen
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
SITE = "site: embedding, or the stream after a block"  # of an axis
Look = dict[str, Any]  # of a line, as matplotlib takes it


class Drawn(NamedTuple):
    """caption: what the figure shows and of how many, see `counted`; '' for no caption."""

    figure: Figure
    alt: str
    caption: str = ""


_numbers: dict[str, int] = {}  # caption -> number, in this kernel


def series_looks() -> Iterator[Look]:
    """Looks of as many series as one likes; neighbours differ in colour, marker and dash."""
    for colour, marker, dash in zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES)):
        yield {"color": colour, "marker": marker, "linestyle": dash}


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """Method -> its look, by its place in the profile; and that of the base."""
    base = {"color": GREY, "marker": "v", "linestyle": ":"}
    return {"base": base} | dict(zip(methods, series_looks()))


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size of the full one, with two pixels for
    each dot of a page."""
    full = io.BytesIO()
    small = io.BytesIO()
    with plt.rc_context(RC):
        figure.savefig(full, format="png", dpi=DPI)
    reduced = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    reduced.save(small, format="png", optimize=True)
    return small.getvalue()


def width_of(figure: Figure) -> int:
    """How wide a page shows the figure, in its dots."""
    return round(figure.get_figwidth() * CSS_DPI)


def numbered(number: int, caption: str) -> str:
    """A caption with its number, as Markdown."""
    return f"**Figure {number}.** {caption}"


def counted(what: str, cells: Any) -> str:
    """A caption: what is shown, and how many stand behind a table or list of intervals."""
    counts = sizes(cells, " (prompts \N{MULTIPLICATION SIGN} seeds)")
    return f"{what}. {counts}." if counts else f"{what}."


def show(figure: Figure, alt: str, caption: str = "") -> None:
    """Display the figure in a notebook with its alternative text and its numbered caption, and
    close it. One that is drawn again under the same caption keeps its number. Raises ValueError for
    an empty text.
    """
    from IPython import display

    if len(alt.split()) < 5:
        raise ValueError(f"alt = {alt!r}: say in a sentence what the figure shows")
    width = width_of(figure)
    display.display(display.Image(data=png_of(figure), format="png", alt=alt, width=width))
    plt.close(figure)
    if caption:
        number = _numbers.setdefault(caption, len(_numbers) + 1)
        display.display(display.Markdown(numbered(number, caption)))


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


def panels_of(
    count: int, width: float, height: float = 3.3, **options: Any
) -> tuple[Figure, list[Axes]]:
    """(figure, axes) of some panels, A_ROW of them beside each other; sizes of one, in inches."""
    columns = min(count, A_ROW)
    rows = -(-count // columns)
    size = (width * columns + 0.6, height * rows)
    figure, axes = axes_of(columns, *size, nrows=rows, **options)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def log_x(ax: Axes, values: Sequence[float]) -> None:
    """A log scale with a tick at every value."""
    ax.set_xscale("log")
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """One legend for all panels of a figure."""
    entries = ax.get_legend_handles_labels()
    look = {"fontsize": 8, "frameon": False}
    figure.legend(*entries, loc="outside lower center", ncols=columns, **look)


def size_panels(panels: Mapping[Axes, Any], always: bool = False) -> None:
    """Say n and seeds of each panel under its title, where they differ between panels. panels: to
    the intervals drawn in them. always: also where they do not.
    """
    texts = {ax: sizes(cells) for ax, cells in panels.items()}
    if always or len(set(texts.values())) > 1:
        for ax, text in texts.items():
            ax.set_title(f"{ax.get_title()}\n{text}")


def every(panels: Mapping[Axes, Any]) -> list[Any]:
    """The intervals of all panels."""
    return [cell for cells in panels.values() for cell in np.ravel(cells)]


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


def _ink(colour: Sequence[float]) -> str:
    """Black or white, whichever has more contrast (of WCAG, at least 4.58) with [r, g, b, alpha] on
    white paper."""
    *rgb, alpha = colour
    parts = alpha * np.asarray(rgb) + 1 - alpha
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    return "black" if (luminance + 0.05) ** 2 >= 0.05 * 1.05 else "white"


@dataclass(frozen=True)
class HeatMap:
    """How a heat map of shares looks. colours: of matplotlib. full: per cent that would have the
    last colour. Numbers are black or white, whatever can be read better.
    """

    colours: str = "Oranges"
    full: float = 115
    fontsize: float = 8

    def draw(self, ax: Axes, grid: DataFrame, texts: DataFrame) -> None:
        """texts: what stands in each cell of the grid, a table of the same shape."""
        shades = numbers(grid).to_numpy(float)
        image = ax.imshow(shades, cmap=self.colours, vmin=0, vmax=self.full, aspect="auto")
        behind = image.to_rgba(shades)
        ax.grid(False)
        style = {
            "ha": "center",
            "va": "center",
            "fontsize": self.fontsize,
        }
        for (y, x), text in np.ndenumerate(texts.to_numpy(object)):
            if text:
                ax.text(x, y, text, color=_ink(behind[y, x]), **style)
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

    labels: of the axes, with units. what: a sentence, how the alternative text and the caption
    begin. log: axes on a log scale ('', 'x', 'y', 'xy'). scale: 100 for shares in per cent.
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
    look = {"fontsize": 8, "title_fontsize": 8, "frameon": False}
    ax.legend(title=grid.columns.name, **beside, **look)
    ends = []
    for name, column in numbers(grid, scale=scale).iloc[[0, -1]].items():
        first, last = [f"{value:.3g} at {at:g}" for at, value in column.items()]
        ends.append(f"{name}: {first} to {last}")
    alt = f"{what} {y} by {x}: {'; '.join(ends)}."
    return Drawn(figure, alt, counted(what.rstrip("."), grid))


def bands(curves: Mapping[str, np.ndarray], labels: tuple[str, str], what: str) -> Drawn:
    """The median over rows, and the middle half of them, of curves [steps, rows]; the first is step
    0.
    """
    columns = {}
    for name, values in curves.items():
        quartiles = np.quantile(values, (0.5, 0.25, 0.75), axis=1)
        columns[name] = [Interval(*row) for row in quartiles.T]
    drawn = lines(DataFrame(columns), labels, f"{what} Median and middle half:")
    return drawn._replace(caption=f"{what} Median and middle half.")


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
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    exact = shares.T.map(lambda share: Interval(share, share, share))
    return Drawn(figure, f"{what} {words(exact)}.", what)
