"""The post-mortem on eps: what a radius and a KL weight of the training buy, and what they cost.

The seed replication blamed its eps for a run that ended at a total loss of 75 and rising. Here the
main method is trained on a grid of radius x KL weight (`sweep.variants` that change nothing else),
and three numbers of every cell stand side by side:
1. **robustness**: share of harmful prompts on which the latent attack at the main method's own
   radius fails;
2. **utility**: share of harmless prompts, plain and encoded, that are answered exactly;
3. **over-refusal**: share of the same prompts that are refused.
A double-edged sword: what raises the first tends to lower the second and raise the third.
`sweep_table` gives the same numbers of the models of a sweep (`latlib.experiment.sweep`), whatever
they change, seed by seed.
"""

from __future__ import annotations

import ast
import re
from functools import partial
from typing import Any

from pandas import DataFrame

from latlib.evaluation.outcomes import HARMLESS, PGD
from latlib.experiment.spec import Spec
from latlib.report.evidence import Evidence, MissingError, rates_by
from latlib.report.plots import Drawn, HeatMap, axes_of, counted, every, frame, size_panels
from latlib.report.tables import two_lines

EPS = "attack.eps"
KL = "defence.kl"
# what is drawn -> (what it counts, which end is better, colours in which bright is better)
SIDES = {
    "robustness": ("attacks that fail", "high", "cividis"),
    "utility": ("harmless answered", "high", "cividis"),
    "over-refusal": ("harmless refused", "low", "cividis_r"),
}


def _own(e: Evidence) -> dict[str, float]:
    """The main method's radius and KL weight."""
    main = e.profile.training(e.main)
    return {EPS: main.attack.eps, KL: main.defence.kl}


def grid(e: Evidence) -> DataFrame:
    """A row for the main method ('') and every variant that changes its radius and KL weight only:
    eps, kl, in that order.
    """
    variants: dict[str, dict[str, Any]] = {"": {}, **e.profile.sweep.variants}
    own = _own(e)
    cells = {name: own | changes for name, changes in variants.items() if set(changes) <= set(own)}
    table = DataFrame(cells).T.rename(columns={EPS: "eps", KL: "kl"})
    return table.sort_values(["eps", "kl"])


def _measured(e: Evidence, by: str | list[str], **cell: Any) -> DataFrame:
    """The three numbers of models of the main method as Intervals, indexed by `by`."""
    rows = partial(e.cell, e.main, partial=True, **cell)
    attacked = rows(attack=PGD, eps=e.main_eps, where="latent")
    harmless = rows(prompts=(HARMLESS, "scary"), encoding=e.profile.evaluation.encodings)
    columns = {
        "robustness": rates_by(attacked, by).map(lambda asr: asr.complement),
        "utility": rates_by(harmless, by),
        "over-refusal": rates_by(harmless, by, "refused"),
    }
    return DataFrame(columns).dropna()


def measured_grid(e: Evidence) -> DataFrame:
    """A row for each trained cell of the grid, on the first seed: variant, eps, kl, and the three
    intervals. Raises MissingError without any.
    """
    cells = grid(e)
    found = _measured(e, "variant", variant=list(cells.index), seed=e.profile.seeds[:1])
    return cells.join(found, how="inner").rename_axis("variant").reset_index()


def sweep_table(e: Evidence, by_seed: bool = True) -> DataFrame:
    """A row for each model of a sweep: label, eps, kl, what else it changes, seed, and three shares
    with their ends.

    asr: of harmful prompts on which the latent attack at the main method's own radius wins.
    answered, refused: of harmless ones. Each has _low and _high, of a 95 % interval clustered by
    prompt pair. by_seed=False pools the seeds (seed is None). Raises MissingError where no model of
    a sweep was measured.
    """
    variants = [variant for variant in e.outcomes["variant"].unique() if changes_of(variant)]
    if not variants:
        raise MissingError(
            "no model of a sweep was measured: run python -m latlib.experiment.sweep"
        )
    found = _measured(e, ["variant", "seed"] if by_seed else "variant", variant=variants)
    rows = []
    for row in found.reset_index().to_dict("records"):
        changes = _own(e) | changes_of(row["variant"])
        line = {"label": Spec(e.main, 0, variant=row["variant"]).label}
        line |= {"eps": changes.pop(EPS), "kl": changes.pop(KL), **changes, "seed": row.get("seed")}
        shares = (row["robustness"].complement, row["utility"], row["over-refusal"])
        for name, share in zip(("asr", "answered", "refused"), shares):
            line |= {name: share.estimate, f"{name}_low": share.low, f"{name}_high": share.high}
        rows.append(line)
    return DataFrame(rows).sort_values(["eps", "kl", "seed"], kind="stable", ignore_index=True)


def changes_of(variant: str) -> dict[str, Any]:
    """What a variant of a sweep such as 'attack.eps=0.1+defence.kl=0.0' changes; nothing for any
    other.
    """
    changes: dict[str, Any] = {}
    for name, text in re.findall(r"([a-z_.]+)=(.+?)(?=\+[a-z_.]+=|$)", variant):
        try:
            changes[name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            changes[name] = text  # a word, such as a rule's name
    return changes


def eps_and_kl(e: Evidence) -> Drawn:
    """The three numbers as heat maps of eps x KL weight, each with its interval in the cell; the
    main method itself is framed.
    """
    cells = measured_grid(e).set_index(["kl", "eps"])
    figure, axes = axes_of(len(SIDES), width=10, height=1.8 + 0.6 * cells.index.levshape[0])
    own = _own(e)
    alt_text = []
    panels = {}
    for ax, (side, (counts, better, colours)) in zip(axes[0], SIDES.items()):
        shares = cells[side].unstack()
        texts = shares.map(two_lines, absent="")
        HeatMap(colours, full=100).draw(ax, shares, texts)
        at = (shares.columns.get_loc(own[EPS]), shares.index.get_loc(own[KL]))
        frame(ax, *at, margin=0, linewidth=2.5)
        ax.set(
            title=f"{side}: {counts} (%)\n{better} is better",
            xlabel=f"eps in training ({e.unit})",
            ylabel="weight of KL",
        )
        panels[ax] = shares
        for (kl, eps), share in cells[side].items():
            alt_text.append(f"eps {eps:g}, KL {kl:g}: {side} {share.percent}")
    size_panels(panels)
    what = f"{e.names['main']} trained on a grid of eps and KL weight"
    caption = counted(f"{what}; framed: as it is elsewhere", every(panels))
    return Drawn(figure, f"{what}. {'; '.join(alt_text)}.", caption)
