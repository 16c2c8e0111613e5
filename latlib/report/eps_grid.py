"""The post-mortem on eps: what a radius and a KL weight of the training buy, and what they cost.

The seed replication blamed its eps for a run that ended at a total loss of 75 and rising. Here LAT
is trained on a grid of radius x KL weight (`sweep.variants` that change nothing else), and three
numbers of every cell stand side by side:
1. **robustness**: share of harmful prompts on which the latent attack at `lat`'s own radius fails;
2. **utility**: share of harmless prompts, plain and encoded, that are answered exactly;
3. **over-refusal**: share of the same prompts that are refused.
A double-edged sword: what raises the first tends to lower the second and raise the third.
`sweep_table` gives the same numbers of the models of a sweep (`latlib.experiment.sweep`), whatever
they change, seed by seed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from latlib.report.canvas import BOX, Drawn, axes_of
from latlib.report.evidence import Evidence, MissingError, rate
from latlib.report.stats import Interval

EPS, KL = "attack.eps", "defence.kl"
# what is drawn -> (what it counts, which end is better, colours in which bright is better)
SIDES = {
    "robustness": ("attacks that fail", "high", "cividis"),
    "utility": ("harmless answered", "high", "cividis"),
    "over-refusal": ("harmless refused", "low", "cividis_r"),
}


def grid(e: Evidence) -> dict[str, tuple[float, float]]:
    """label -> (eps, KL weight) of `lat` and of every variant of it that changes these two only, in
    that order.
    """
    lat = e.profile.training("lat")
    own = {EPS: lat.attack.eps, KL: lat.defence.kl}
    found = {"lat": (own[EPS], own[KL])}
    for name, changes in e.profile.sweep.variants.items():
        if set(changes) <= {EPS, KL}:
            found[f"lat[{name}]"] = tuple({**own, **changes}[field] for field in (EPS, KL))
    return dict(sorted(found.items(), key=lambda item: item[1]))


def measured(e: Evidence, label: str, seeds: Sequence[int] | None = None) -> dict[str, Interval]:
    """The three numbers of one trained model, on the first seed unless `seeds` are given. Raises
    MissingError.
    """
    seeds = e.profile.seeds[:1] if seeds is None else seeds
    attacked = rate(e.cell(label, "pgd", eps=e.lat_eps, where="latent", seeds=seeds))
    prompts = e.cell(
        label, prompts=("harmless", "scary"), encoding=e.profile.evaluation.encodings, seeds=seeds
    )
    held = Interval(
        1 - attacked.estimate,
        1 - attacked.high,
        1 - attacked.low,
        attacked.n,
        attacked.clusters,
        attacked.seeds,
    )
    return {"robustness": held, "utility": rate(prompts), "over-refusal": rate(prompts, "refused")}


def table(e: Evidence) -> pd.DataFrame:
    """A row for each trained cell of the grid: eps, kl, and the three intervals. Raises
    MissingError without any.
    """
    rows = []
    for label, (eps, kl) in grid(e).items():
        try:
            rows.append({"label": label, "eps": eps, "kl": kl, **measured(e, label)})
        except MissingError:
            continue
    if not rows:
        raise MissingError("no cell of the grid of eps and KL weight was measured: run notebook 03")
    return pd.DataFrame(rows)


def sweep_table(e: Evidence, by_seed: bool = True) -> pd.DataFrame:
    """A row for each model of a sweep: label, eps, kl, what else it changes, seed, and three shares
    with their ends.

    asr: of harmful prompts on which the latent attack at `lat`'s own radius wins. answered,
    refused: of harmless ones. Each has _low and _high, of a 95 % interval clustered by prompt pair.
    by_seed=False pools the seeds (seed is None). Raises MissingError where no model of a sweep was
    measured.
    """
    own, rows = e.profile.training("lat"), []
    for label in e.outcomes["method"].unique():
        changes = changes_of(label)
        if not changes:
            continue
        fields = {
            "eps": changes.pop(EPS, own.attack.eps),
            "kl": changes.pop(KL, own.defence.kl),
            **changes,
        }
        found = sorted(e.outcomes.loc[e.outcomes["method"] == label, "seed"].unique())
        for seed in found if by_seed else [None]:
            three = measured(e, label, found if seed is None else [seed])
            held, answered, refused = three["robustness"], three["utility"], three["over-refusal"]
            row = {"asr": 1 - held.estimate, "asr_low": 1 - held.high, "asr_high": 1 - held.low}
            for name, share in (("answered", answered), ("refused", refused)):
                row |= {name: share.estimate, f"{name}_low": share.low, f"{name}_high": share.high}
            rows.append({"label": label, **fields, "seed": seed, **row})
    if not rows:
        raise MissingError(
            "no model of a sweep was measured: run python -m latlib.experiment.sweep"
        )
    return pd.DataFrame(rows).sort_values(["eps", "kl", "seed"], kind="stable", ignore_index=True)


def changes_of(label: str) -> dict[str, Any]:
    """What a label such as 'lat[attack.eps=0.1+defence.kl=0.0]' says is changed; nothing for any
    other label.
    """
    inside = re.fullmatch(r"lat\[(.*=.*)\]", label)
    pairs = (
        [part.partition("=") for part in re.split(r"\+(?=[a-z_.]+=)", inside[1])] if inside else []
    )
    found = {}
    for name, _, text in pairs:
        try:
            found[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            found[name] = text  # a word, such as a rule's name
    return found


def eps_and_kl(e: Evidence) -> Drawn:
    """The three numbers as heat maps of eps x KL weight, each with its interval in the cell; `lat`
    itself is framed.
    """
    found, own = table(e), grid(e)["lat"]
    radii, weights = sorted(set(found["eps"])), sorted(set(found["kl"]))
    figure, axes = axes_of(len(SIDES), width=11, height=1.8 + 0.6 * len(weights))
    said = []
    for ax, (side, (counts, better, colours)) in zip(axes[0], SIDES.items()):
        values = np.full((len(weights), len(radii)), np.nan)
        for row in found.itertuples():
            interval = found.at[row.Index, side]
            y, x = weights.index(row.kl), radii.index(row.eps)
            values[y, x] = 100 * interval.estimate
            text = f"{values[y, x]:.0f}\n[{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
            ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=BOX)
            said.append(f"eps {row.eps:g}, KL {row.kl:g}: {side} {values[y, x]:.0f} %")
        ax.imshow(values, cmap=colours, vmin=0, vmax=100, aspect="auto")
        ax.grid(False)
        frame = Rectangle(
            (radii.index(own[0]) - 0.5, weights.index(own[1]) - 0.5),
            1,
            1,
            fill=False,
            linewidth=2.5,
        )
        ax.add_patch(frame)
        ax.set_xticks(range(len(radii)), [f"{x:g}" for x in radii])
        ax.set_yticks(range(len(weights)), [f"{x:g}" for x in weights])
        ax.set(
            title=f"{side}: {counts} (%)\n{better} is better",
            xlabel="eps in training",
            ylabel="weight of KL",
        )
    return figure, f"LAT trained on a grid of eps and KL weight, first seed. {'; '.join(said)}."
