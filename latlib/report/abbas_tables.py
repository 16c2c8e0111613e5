"""What the published activations of Llama-2-7B say about the headline of Abbas et al. 2025: tables
beside the paper's, a figure, and a paragraph whose words follow from the numbers.

Every function takes `refusal.abbas.Findings`. Of a made-up stand-in, what is shown says so.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from pandas import DataFrame

from latlib.refusal.abbas import AT, BASELINE, LAT, MASSIVE_DIMENSIONS, MODELS, Findings
from latlib.refusal.massive import DIMENSIONS, LARGEST, MASSIVE, NOTHING, PAIRS
from latlib.report.plots import (
    Drawn,
    axes_of,
    draw_curves,
    every,
    legend_below,
    series_looks,
    words,
)
from latlib.report.refusal_tables import PAPER
from latlib.report.stats import Interval, sizes
from latlib.report.tables import markdown

STAND_IN = "MADE-UP STAND-IN, not the authors' activations"
PAPER_NAMES = {BASELINE: "SSFT", AT: "AT", LAT: "LAT"}
PAPER_BLOCK = 14  # its activations are not published
BESIDE = (12, 16)  # the published blocks around it
NAMED = " and ".join(map(str, MASSIVE_DIMENSIONS))
CONTROL = "LAT without its own largest two"
SERIES = {
    "baseline": (BASELINE, NOTHING),
    "AT": (AT, NOTHING),
    "LAT as published": (LAT, NOTHING),
    f"LAT without dimensions {NAMED}": (LAT, DIMENSIONS),
    "LAT without the pairs these dominate": (LAT, PAIRS),
    CONTROL: (LAT, LARGEST),
}
WITHOUT = {
    DIMENSIONS: f"without dimensions {NAMED}",
    PAIRS: "without the pairs that these dominate",
}


def share_grid(found: Findings, centred: bool = False) -> DataFrame:
    """Share of the first two components by block: a column of intervals for each of `SERIES`."""
    cells = _by_block(found, centred, "share", "low", "high", "pairs")
    return DataFrame({name: cells[of] for name, of in SERIES.items()})


def _by_block(found: Findings, centred: bool, *columns: str) -> DataFrame:
    """The interval that some columns make, a row a block: a column for each model and removal."""
    rows = found.shares[found.shares["centred"] == centred]
    cells = [Interval(*row) for row in rows[[*columns]].itertuples(index=False)]
    wide = rows.assign(cell=cells).pivot(index="block", columns=["model", "removed"], values="cell")
    return wide.loc[rows["block"].unique()]


def shares_markdown(found: Findings, centred: bool = False) -> str:
    """The grid in per cent with its intervals and how many pairs are left; of uncentred shares the
    paper's below it."""
    grid = share_grid(found, centred)
    rows = []
    whole = int(found.shares["pairs"].max())
    for block, cells in grid.iterrows():
        rows.append([str(block), *(_cell(interval, whole) for interval in cells)])
    if not centred:
        paper = [f"{share:.1f}" for share in _papers_shares().values()]
        unknown = [""] * (len(SERIES) - len(paper))
        rows.append([f"{PAPER_BLOCK}, the paper", *paper, *unknown])
    return markdown(["Block", *SERIES], rows)


def _cell(share: Interval, whole: int) -> str:
    """A share in per cent to the tenth with its bounds; the pairs where some of the whole are left
    out.
    """
    low, high = (f"{100 * bound:.1f}" for bound in (share.low, share.high))
    left = "" if share.n == whole else f", {share.n} pairs left"
    return f"{100 * share.estimate:.1f} [{low}, {high}]{left}"


def concentration_figure(found: Findings, mark: str = "") -> Drawn:
    """Shares by block, uncentred and centred, with intervals; the paper's as crosses. mark: stands
    in the figure and its text, such as `STAND_IN`."""
    figure, axes = axes_of(2, 9.5, 5.2, sharey=True)
    texts = []
    panels = {}
    for ax, name in zip(axes[0], ("uncentred", "centred")):
        grid = share_grid(found, name == "centred").drop(columns=CONTROL)
        draw_curves(ax, grid, series_looks(), 0.01)
        ax.set(title=name, xlabel="block", ylim=(0, 104), xticks=grid.index)
        panels[ax] = grid
        texts.append(f"Share of the first two components by block, {name}: {words(grid)}.")
    texts.append(_draw_papers_shares(axes[0, 0]))
    axes[0, 0].set_ylabel("share of the squared singular values (%)")
    if mark:
        figure.suptitle(mark, color="#B00000", fontweight="bold")
        texts.insert(0, f"{mark}.")
    legend_below(figure, axes[0, 0], columns=3)
    what = (
        "Share of the first two components of the paired differences by block; crosses: the paper"
    )
    return Drawn(figure, " ".join(texts), f"{what}. {sizes(every(panels), ' pairs')}.")


def _draw_papers_shares(ax: Axes) -> str:
    """Crosses with names at the paper's block, and what they say."""
    parts = []
    for model, share in _papers_shares().items():
        ax.plot(PAPER_BLOCK, share, "kx", markersize=8, label="_")
        ax.annotate(f"paper: {model}", (PAPER_BLOCK + 0.3, share), fontsize=8)
        parts.append(f"{model} {share:.1f} %")
    return f"The paper at block {PAPER_BLOCK}: {', '.join(parts)}."


def _papers_shares() -> dict[str, float]:
    """The paper's name of a model -> its share in per cent."""
    return {name: sum(PAPER["variance"][name]) for name in PAPER_NAMES.values()}


def excess(found: Findings, removed: str, centred: bool = False) -> dict[int, Interval]:
    """Block -> LAT's share minus the baseline's, under the same removal."""
    cells = _by_block(found, centred, "more", "more_low", "more_high", "pairs")
    return cells[LAT, removed].to_dict()


def paragraph(found: Findings) -> str:
    """What follows for the paper's headline, whatever the numbers show. A difference counts as seen
    where its whole interval lies above 0."""
    sentences = []
    for centred in (False, True):
        published = excess(found, NOTHING, centred)
        counted = "Centred" if centred else "Uncentred, as the paper counts"
        text = f"{counted}, two components hold more of LAT's difference than of the baseline's"
        sentences.append(f"{text} {_seen(published)}.")
        for removed, name in WITHOUT.items():
            left = excess(found, removed, centred)
            sentences.append(f"{name.capitalize()}, they do {_seen(left)}.")
        sentences.append(_conclusion(found, centred))
    return " ".join([*sentences, _rules(found)])


def _seen(excesses: dict[int, Interval]) -> str:
    """At which blocks a difference is seen, and its size beside the paper's block."""
    blocks = [str(block) for block, interval in excesses.items() if interval.low > 0]
    where = f"at block{'s' * (len(blocks) > 1)} {', '.join(blocks)}" if blocks else "at no block"
    sizes = [f"{excesses[block].points} points at block {block}" for block in BESIDE]
    return f"{where} ({', '.join(sizes)})"


def _conclusion(found: Findings, centred: bool) -> str:
    """Whether the excess around the paper's block outlives both removals, one or none."""
    around = f"Around the paper's block ({' and '.join(map(str, BESIDE))})"
    if not _anywhere(found, NOTHING, centred):
        return f"{around} there is no excess to explain."
    outlived = [name for removed, name in WITHOUT.items() if _anywhere(found, removed, centred)]
    if not outlived:
        return f"{around} nothing of the excess can be told from 0 once either is removed."
    return f"{around} some of the excess stays {' and '.join(outlived)}: not all of it is theirs."


def _anywhere(found: Findings, removed: str, centred: bool) -> bool:
    """Whether an excess is seen at a block beside the paper's."""
    excesses = excess(found, removed, centred)
    return any(excesses[block].low > 0 for block in BESIDE)


def _rules(found: Findings) -> str:
    """What the rules for massive activations find in each model."""
    parts = []
    for rule in MASSIVE:
        by_model = [f"{PAPER_NAMES[model]} {_dimensions(found, rule, model)}" for model in MODELS]
        parts.append(f"by {rule} et al.'s rule {', '.join(by_model)}")
    top = found.sizes.loc[found.sizes["times_median"].idxmax()]
    place = f"{PAPER_NAMES[top['model']]}, block {top['block']}"
    size = f"{top['times_median']:.0f} times the median of its stream ({place})"
    text = "; ".join(parts)
    return (
        f"Massive dimensions at the last token, of all blocks: {text}. The largest entry is {size}."
    )


def _dimensions(found: Findings, rule: str, model: str) -> str:
    table = found.massive
    rows = table[(table["rule"] == rule) & (table["model"] == model)]
    return " + ".join(map(str, sorted(set(rows["dimension"])))) or "none"


def massive_by_block(found: Findings) -> DataFrame:
    """By block and model: the largest entry, in multiples of its stream's median too, and by each
    rule the massive dimensions with the number of prompts in which they are."""
    place = ["block", "model"]
    table = found.sizes.set_index(place)
    counts = found.massive["massive_in"].astype(str)
    cells = found.massive["dimension"].astype(str) + " (" + counts + ")"
    rows = found.massive.assign(cell=cells)
    for rule in MASSIVE:
        of_rule = rows[rows["rule"] == rule]
        joined = of_rule.groupby(place)["cell"].agg(", ".join)
        table[f"{rule} et al."] = joined.reindex(table.index).fillna("none")
    return table


def angles_table(found: Findings) -> DataFrame:
    """By block and pair of models: the angle between their differences of means and between their
    first two singular directions, in degrees, with the massive dimensions and without."""
    names = {NOTHING: "as published", DIMENSIONS: f"without {NAMED}"}
    table = found.angles
    pairs = table["a"] + " - " + table["b"]
    means = []
    for row in table.itertuples():
        means.append(f"{row.angle:.0f} [{row.low:.0f}, {row.high:.0f}]")
    planes = table["first"].map("{:.0f}".format) + " and " + table["second"].map("{:.0f}".format)
    wide = DataFrame({"means": means, "two directions": planes})
    keys = [table["block"], pairs.rename("models"), table["removed"].map(names)]
    wide = wide.set_index(keys).unstack(sort=False)
    wide.columns = [f"{what}, {removed}" for what, removed in wide.columns]
    return wide
