"""What all figures share: the look of methods and outcomes, PNGs of few bytes, and alternative
texts.

1. Colour is never the only cue: methods differ in marker and line too, outcomes in hatching.
2. A figure is shown with a text that says what it shows, or not at all.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from latlib.report.stats import Interval

DPI = 110
# Okabe and Ito's colours, which the colour-blind can tell apart
STYLE = {
    "base": {"color": "#777777", "marker": "v", "linestyle": ":"},
    "ssft": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "at": {"color": "#0072B2", "marker": "^", "linestyle": "-."},
    "lat": {"color": "#009E73", "marker": "o", "linestyle": "-"},
    "lat-untargeted": {"color": "#CC79A7", "marker": "D", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
OUTCOMES = {
    "refused": ("#56B4E9", ""),
    "complied": ("#D55E00", "///"),
    "neither": ("#DDDDDD", "..."),
}
EDGE = {"edgecolor": "black", "linewidth": 0.4}
# behind numbers
BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
RC = {
    **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True},
    **{
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    },
    **{"hatch.linewidth": 0.6, "figure.facecolor": "white"},
}
Drawn = tuple[Figure, str]


def png_of(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size of the full one."""
    full, small = io.BytesIO(), io.BytesIO()
    with plt.rc_context(RC):
        figure.savefig(full, format="png", dpi=dpi)
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png_of(figure))
    plt.close(figure)
    return path


def axes_of(
    columns: int = 1, width: float = 7.0, height: float = 3.6, **options
) -> tuple[Figure, np.ndarray]:
    """(figure, [1, columns] axes) in the common style; sizes in inches."""
    with plt.rc_context(RC):
        return plt.subplots(1, columns, figsize=(width, height), squeeze=False, **options)


def rate_curve(
    ax: Axes, x: Sequence[float], intervals: Sequence[Interval], label: str, **style
) -> None:
    """Rates in per cent against x, with their intervals."""
    y = np.array([100 * i.estimate for i in intervals])
    low, high = (np.array([100 * getattr(i, side) for i in intervals]) for side in ("low", "high"))
    ax.errorbar(
        x,
        y,
        [np.maximum(y - low, 0), np.maximum(high - y, 0)],
        label=label,
        capsize=2,
        markersize=5,
        **style,
    )


def in_words(intervals: Sequence[Interval], x: Sequence[float] | None = None) -> str:
    """Estimates in per cent, one after the other, each with its x where given."""
    at = [""] * len(intervals) if x is None else [f" at {v:g}" for v in x]
    return ", ".join(f"{100 * i.estimate:.0f} %{where}" for i, where in zip(intervals, at))
