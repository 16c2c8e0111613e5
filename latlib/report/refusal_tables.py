"""Figures and tables of the refusal geometry: the matrix of targets and vectors, its controls, and
the paper's beside.

Every function takes `Evidence` (of a run whose notebook 04 was run) and raises MissingError for
what was not measured. A target is **defended** when it refuses at least `DEFENDED` of the harmful
prompts before anything is removed; what ablation does to the others says nothing about refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from scipy.stats import norm
from torch import Tensor

from latlib.evaluation.outcomes import OWN_RULES
from latlib.hooks import Site
from latlib.refusal.directions import sources
from latlib.refusal.geometry import principal_components
from latlib.report.canvas import EDGE, OUTCOMES, RC, Drawn, axes_of, in_words, rate_curve
from latlib.report.evidence import Evidence, MissingError, contrast, p_value, rate
from latlib.report.stats import Interval, holm

NOTHING = "ablate:nothing"
DEFENDED = 0.8  # of harmful prompts refused
SHADES = ("#08519C", "#4292C6", "#9ECAE1", "#DEEBF7")  # of the components shown as bars
# FACTS, Abbas et al. 2025: (target, vector) -> refused after ablation, standard error, both in per
# cent
PAPER = {
    ("ssft", "ssft"): (20.38, 1.77),
    ("ssft", "lat-untargeted"): (10.77, 1.36),
    ("at", "at"): (38.08, 2.13),
    ("at", "ssft"): (24.04, 1.87),
    ("at", "lat-untargeted"): (13.65, 1.50),
    ("lat-untargeted", "lat-untargeted"): (16.92, 1.64),
    ("lat-untargeted", "ssft"): (25.77, 1.91),
}
# components 1 and 2
PAPER_VARIANCE = {"ssft": (49.43, 4.76), "at": (43.76, 4.79), "lat-untargeted": (54.0, 20.0)}
UNTARGETED, TARGETED = "lat-untargeted", "lat"  # the paper's LAT is the first


def targets(e: Evidence) -> list[str]:
    """The models of a run that were put under ablation, the base first."""
    found = set(e.outcomes.loc[e.outcomes["attack"].str.startswith("ablate:"), "method"])
    return [name for name in sources(e.profile) if name in found]


def defended(e: Evidence, target: str) -> bool:
    """Whether a model refuses before anything is removed."""
    return rate(e.cell(target, NOTHING), "refused").estimate >= DEFENDED


def controls(e: Evidence) -> dict[str, list[str]]:
    """Column -> attacks whose worst is shown."""
    return {
        "nothing": [NOTHING],
        "random": [f"ablate:random{k}" for k in range(e.profile.evaluation.random_directions)],
        "shuffled": ["ablate:shuffled"],
    }


def matrix(e: Evidence, rule: str = "best", names: Sequence[str] = ()) -> pd.DataFrame:
    """One row for each target and vector (of `names`, or of all that were measured): n, seeds,
    shares refused, complied and neither with their intervals, whether the target was defended, and
    the paper's refusals with their standard error, in per cent, where it has the cell."""
    names, rows = list(names) or targets(e), []
    if not names:
        raise MissingError("no ablation was measured: run notebook 04")
    for target in names:
        vectors, refuses = (
            {source: [f"ablate:{source}@{rule}"] for source in names} | controls(e),
            defended(e, target),
        )
        for vector, attacks in vectors.items():
            cell = e.cell(target, attacks)
            shares = {outcome: rate(cell, outcome) for outcome in OUTCOMES}
            paper = PAPER.get((target, vector))
            rows.append(
                {
                    **{
                        "target": target,
                        "vector": vector,
                        "n": shares["refused"].n,
                        "seeds": shares["refused"].seeds,
                    },
                    **shares,
                    "defended": refuses,
                    "paper": "" if paper is None else f"{paper[0]:.2f} (SE {paper[1]:.2f})",
                }
            )
    return pd.DataFrame(rows)


def draw_matrix(ax: Axes, e: Evidence, rule: str = "best", names: Sequence[str] = ()) -> str:
    """Harmful compliance (and refusals) of targets under vectors and the controls."""
    table = matrix(e, rule, names)
    rows, columns = list(dict.fromkeys(table["target"])), list(dict.fromkeys(table["vector"]))
    grid, said = np.zeros((len(rows), len(columns))), []
    for cell in table.itertuples():
        at, asr = (rows.index(cell.target), columns.index(cell.vector)), cell.complied
        grid[at] = percent = 100 * asr.estimate
        text = (
            f"{percent:.0f}\n[{100 * asr.low:.0f}, {100 * asr.high:.0f}]\nref."
            f" {100 * cell.refused.estimate:.0f}"
        )
        style = {
            "ha": "center",
            "va": "center",
            "fontsize": 7,
            "color": "white" if percent > 60 else "black",
        }
        ax.text(at[1], at[0], text, **style)
        if cell.target == cell.vector:
            ax.add_patch(_frame(at))
        said.append(
            f"{cell.target} under {cell.vector} {percent:.0f} % ({100 * cell.refused.estimate:.0f}"
            " % refused)"
        )
    ax.imshow(grid, cmap="Oranges", vmin=0, vmax=115, aspect="auto")
    ax.grid(False)
    undefended = list(dict.fromkeys(table.loc[~table["defended"], "target"]))
    ax.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    marks = [f"{target}\n(not defended)" if target in undefended else target for target in rows]
    ax.set_yticks(range(len(rows)), marks)
    ax.set(xlabel="vector removed", ylabel="target", title=f"ASR after ablation (%), rule '{rule}'")
    gate = f" Not defended before ablation: {', '.join(undefended)}." if undefended else ""
    return f"Harmful compliance after ablation, rule {rule}: " + ", ".join(said) + "." + gate


def _frame(at: tuple[int, int]) -> Rectangle:
    return Rectangle(
        (at[1] - 0.48, at[0] - 0.48), 0.96, 0.96, fill=False, edgecolor="black", linewidth=1.5
    )


def ablation_matrix(e: Evidence, rule: str = "best") -> Drawn:
    """Self (framed) and cross ablation, beside the controls."""
    count = len(targets(e))
    figure, axes = axes_of(width=2.4 + 1.05 * (count + 3), height=1.4 + 0.72 * max(count, 1))
    return figure, draw_matrix(axes[0, 0], e, rule)


def rules_table(e: Evidence) -> pd.DataFrame:
    """Refused, complied and neither of every target under its own direction, by rule, with 95 %
    intervals.
    """
    rows = []
    for target in targets(e):
        for rule in OWN_RULES:
            cell = e.cell(target, f"ablate:{target}@{rule}")
            rows.append(
                {
                    "target": target,
                    "rule": rule,
                    **{outcome: str(rate(cell, outcome)) for outcome in OUTCOMES},
                }
            )
    return pd.DataFrame(rows).set_index(["target", "rule"])


def seeds_table(e: Evidence) -> pd.DataFrame:
    """By target and seed: ASR under its own direction by the rule `best`, and under the one
    direction or subspace, of all that were ablated (any source, rule and site), that made it comply
    most."""
    rows = []
    for target in targets(e):
        found = e.outcomes[(e.outcomes["method"] == target) & (e.outcomes["prompts"] == "harmful")]
        found = found[found["attack"].str.startswith("ablate:") & (found["attack"] != NOTHING)]
        for seed, part in found.groupby("seed"):
            asr = (part["outcome"] == "complied").groupby(part["attack"]).mean()
            own, strongest = asr.get(f"ablate:{target}@best"), asr.idxmax()
            name = strongest.removeprefix("ablate:")
            rows.append(
                {
                    "target": target,
                    "seed": seed,
                    "own, best": own,
                    "strongest": name,
                    "ASR": asr.max(),
                }
            )
    return pd.DataFrame(rows).set_index(["target", "seed"])


def site_sweep(e: Evidence) -> Drawn:
    """Shares of harmful replies after ablating the model's own difference of means, by the site it
    was taken at.
    """
    names = [t for t in targets(e) if _sites(e, t)]
    if not names:
        raise MissingError("no sweep over sites: run notebook 04")
    figure, axes = axes_of(len(names), width=2.4 * len(names) + 0.9, sharey=True)
    said = []
    for ax, target in zip(axes[0], names, strict=True):
        sites = _sites(e, target)
        for (outcome, (color, _)), marker in zip(OUTCOMES.items(), "o^x", strict=True):
            found = [
                rate(e.cell(target, f"ablate:{target}@site-{site}"), outcome) for site in sites
            ]
            dark = color if outcome != "neither" else "#777777"
            rate_curve(
                ax, range(len(sites)), found, outcome, color=dark, marker=marker, linewidth=1.2
            )
            said.append(f"{target}, {outcome}: {in_words(found)}")
        ax.set(title=target, xlabel="site of the direction", ylim=(-4, 104))
        ax.set_xticks(range(len(sites)), sites)
    axes[0, 0].set_ylabel("harmful prompts (%)")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    return figure, "Own difference of means ablated, by site. " + "; ".join(said) + "."


def _sites(e: Evidence, target: str) -> list[str]:
    """Sites of a target's sweep, in order of depth."""
    attacks = set(e.outcomes.loc[e.outcomes["method"] == target, "attack"])
    found = [a.partition("@site-")[2] for a in attacks if a.startswith(f"ablate:{target}@site-")]
    return sorted(found, key=lambda site: -1 if site == "embedding" else int(site))


def variance_bars(e: Evidence, kind: str = "uncentred") -> Drawn:
    """Share of the first components at the fixed site: mean over seeds, whiskers from the lowest to
    the highest bound of a seed's 95 % interval over pairs; the paper's figures as crosses."""
    names = [m for m in sources(e.profile) if any(method == m for method, _ in e.variance)]
    if not names:
        raise MissingError("no explained variance: run notebook 04")
    figure, axes = axes_of(width=1.6 + 1.5 * len(names))
    ax, said, width = axes[0, 0], [], 0.8 / len(SHADES)
    for component in range(len(SHADES)):
        means, spread = [], []
        for name in names:
            tables = [t for (m, _), t in e.variance.items() if m == name]
            at = tables[0]["sites"].index(str(tables[0]["fixed_site"]))
            mean = 100 * np.mean([t[kind][at][component] for t in tables])
            low = 100 * min(t[f"{kind}_low"][component] for t in tables)
            high = 100 * max(t[f"{kind}_high"][component] for t in tables)
            means.append(mean)
            spread.append((max(0.0, mean - low), max(0.0, high - mean)))
            if name in PAPER_VARIANCE and component < 2 and kind == "uncentred":
                x = names.index(name) + width * (component - (len(SHADES) - 1) / 2)
                label = "paper" if not said and component == 0 else None
                ax.plot(x, PAPER_VARIANCE[name][component], "kx", markersize=7, label=label)
        x = np.arange(len(names)) + width * (component - (len(SHADES) - 1) / 2)
        look = {"color": SHADES[component], "label": f"component {component + 1}"} | EDGE
        ax.bar(x, means, width, yerr=np.array(spread).T, capsize=2, **look)
        values = ", ".join(f"{n} {m:.0f} %" for n, m in zip(names, means, strict=True))
        said.append(f"component {component + 1}: {values}")
    ax.set_xticks(range(len(names)), names)
    ax.set(xlabel="model", ylabel="share of the squared singular values (%)", ylim=(0, 104))
    ax.set_title(f"Explained variance, {kind}")
    ax.legend(fontsize=7)
    return figure, f"Explained variance at the papers' relative depth, {kind}: {'; '.join(said)}."


def scatter(
    found: Mapping[str, tuple[Mapping[Site, Tensor], Mapping[Site, Tensor]]], sites: Sequence[Site]
) -> Drawn:
    """Harmful and harmless prompts along the first two principal components, a row of panels for
    each method.

    found: method -> (site -> [prompts, d_model] of harmful prompts, the same of harmless ones).
    """
    with plt.rc_context(RC):
        size = (2.3 * len(sites) + 0.6, 2.1 * len(found) + 0.5)
        figure, axes = plt.subplots(len(found), len(sites), figsize=size, squeeze=False)
    said = []
    for row, (method, (harmful, harmless)) in zip(axes, found.items(), strict=True):
        for ax, site in zip(row, sites, strict=True):
            points, shares = principal_components(torch.cat([harmful[site], harmless[site]]), 2)
            n = len(harmful[site])
            ax.plot(*points[n:].T, "o", color="#0072B2", markersize=3, alpha=0.6, label="harmless")
            ax.plot(*points[:n].T, "x", color="#D55E00", markersize=4, alpha=0.7, label="harmful")
            ax.set_title(
                f"{method}, site {site}: {100 * shares.sum():.0f} % of variance", fontsize=7
            )
            ax.set_xticks([])
            ax.set_yticks([])
            gap = np.linalg.norm(points[:n].mean(0) - points[n:].mean(0)) / points.std(0).max()
            said.append(f"{method} at {site}: centres {gap:.1f} standard deviations apart")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    return (
        figure,
        "Harmful and harmless prompts along two principal components. " + "; ".join(said) + ".",
    )


# What the paper compares: (name, target and vector of one side, of the other); positive: more
# refusals on the first
COMPARED = (
    ("LAT's vector breaks SSFT more than SSFT's does", ("ssft", "ssft"), ("ssft", "LAT")),
    ("LAT's vector breaks AT more than SSFT's does", ("at", "ssft"), ("at", "LAT")),
    ("LAT resists SSFT's vector better than SSFT does", ("LAT", "ssft"), ("ssft", "ssft")),
    ("LAT is weaker to its own vector than SSFT to its own", ("ssft", "ssft"), ("LAT", "LAT")),
    ("LAT is weaker to its own vector than AT to its own", ("at", "at"), ("LAT", "LAT")),
)


def comparisons(e: Evidence, rule: str = "fixed") -> pd.DataFrame:
    """The paper's comparisons, for its untargeted LAT and for targeted LAT: difference in refusals
    in points, positive where the claim holds, paired by prompt and seed, with interval and p-value,
    Holm's for all rows together, and the paper's own difference and its unpaired p-value. A
    comparison with an undefended target is marked."""
    rows, names = [], targets(e)
    for lat in (UNTARGETED, TARGETED):
        for text, *sides in COMPARED:
            a, b = ([lat if name == "LAT" else name for name in side] for side in sides)
            if not {*a, *b} <= set(names):
                continue
            cells = [e.cell(target, f"ablate:{vector}@{rule}") for target, vector in (a, b)]
            undefended = [t for t in dict.fromkeys((a[0], b[0])) if not defended(e, t)]
            rows.append(
                {
                    "claim": text.replace("LAT", lat),
                    "here": contrast(*cells, outcome="refused"),
                    "p": p_value(*cells, outcome="refused"),
                    **_papers(tuple(a), tuple(b)),
                    "not defended": ", ".join(undefended),
                }
            )
    if not rows:
        raise MissingError(
            "no comparison of the paper has both of its sides: it needs SSFT, AT and LAT"
        )
    table = pd.DataFrame(rows)
    table.insert(3, "p, Holm", holm(table["p"].tolist()))
    return table


def _papers(a: tuple[str, str], b: tuple[str, str]) -> dict[str, float | None]:
    """The paper's difference in points, and the p-value that its standard errors give, unpaired."""
    if a not in PAPER or b not in PAPER:
        return {"paper": None, "paper p": None}
    (x, se_x), (y, se_y) = PAPER[a], PAPER[b]
    return {"paper": x - y, "paper p": float(2 * norm.sf(abs(x - y) / np.hypot(se_x, se_y)))}


def comparisons_markdown(table: pd.DataFrame) -> str:
    """The table of `comparisons` as Markdown."""
    lines = [
        "| Claim | Paper: points (p) | Here: points [95 %] | p | p, Holm | |",
        "|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        paper = "" if pd.isna(row["paper"]) else f"{row['paper']:+.1f} ({row['paper p']:.2g})"
        lines.append(
            f"| {row['claim']} | {paper} | {_points(row['here'])} | {row['p']:.3f} |"
            f" {row['p, Holm']:.3f} |"
            f" {row['not defended'] and 'not defended: ' + row['not defended']} |"
        )
    return "\n".join(lines)


def _points(interval: Interval) -> str:
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
