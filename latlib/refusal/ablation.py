"""What is left of refusal without a direction: ablation of every source's directions from a target.

1. Each source's directions (`latlib.refusal.directions`) are removed from the target model, which
   is then asked. The target's own are tried by every rule and at every site.
2. Controls stand beside them: nothing removed, random directions, and the mean of differences whose
   labels are shuffled.
3. A direction that carries refusal also induces it: added to harmless prompts, beside a random one.

Sources: Abbas et al. 2025, section 3; Arditi et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pandas as pd
from torch import Tensor

from latlib.evaluation.ask import prompt_set
from latlib.evaluation.examine import examiner_of
from latlib.evaluation.generate import Perturb
from latlib.evaluation.outcomes import (
    CROSS_RULES,
    HARMLESS,
    NOTHING,
    OWN_RULES,
    RANDOM,
    SHUFFLED,
    Cell,
    Intervention,
    Keep,
    Rule,
    Subject,
    anew,
    outcome_rows,
)
from latlib.io.progress import OnStep, unseen, with_progress
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.refusal.directions import Differences, random_directions
from latlib.refusal.interventions import Directions, adding


def ablation(
    lm: LanguageModel,
    subject: Subject,
    directions: Mapping[str, Directions],
    differences: Differences,
    on_step: OnStep = unseen,
    keep: Keep = anew,
) -> pd.DataFrame:
    """Outcome rows of a target model under the directions of every source.

    directions: source -> rule -> direction, the target's own among them. differences: the target's.
    Ablated on harmful prompts; with nothing and by `best` and `learned` also on harmless ones. The
    target's own `best` and one random direction are added on harmless prompts. keep: keeps the rows
    of each cell.
    """
    profile = subject.profile
    network = lm.network()
    best = directions[subject.label][Rule.BEST]
    count = profile.evaluation.random_directions
    randoms = random_directions(network.d_model, count, best.vector.norm(), subject.seed)
    cells = _directed(subject.label, directions, differences)
    for draw, vector in enumerate(randoms):
        cells.append((Cell(source=RANDOM, draw=draw), vector))
    shuffled = differences.shuffled(best.site, subject.seed)
    cells.append((Cell(source=SHUFFLED, site=str(best.site)), shuffled))
    tables = []

    def ask(cell: Cell, network: Network, perturb: Perturb | None = None) -> None:
        tables.append(keep(str(cell), partial(rows_of, cell, network, perturb)))

    def rows_of(cell: Cell, network: Network, perturb: Perturb | None) -> pd.DataFrame:
        prompts = prompt_set(cell.prompts, profile, profile.evaluation.ablation_prompts)
        found = examiner_of(profile, lm, network).examine(prompts, perturb=perturb)
        return outcome_rows(subject, cell, prompts, found)

    for cell, vector in with_progress(
        cells, on_step, lambda item: f"{item[0].source} {item[0].rule}"
    ):
        cell = replace(cell, intervention=Intervention.ABLATE)
        ablated = network if vector is None else network.ablated(vector)
        ask(cell, ablated)
        if cell.source == NOTHING or cell.rule in (Rule.BEST, Rule.LEARNED):
            ask(replace(cell, prompts=HARMLESS), ablated)
    added = Cell(HARMLESS, intervention=Intervention.ADD, site=str(best.site))
    own = replace(added, source=subject.label, rule=Rule.BEST, found=best.found)
    ask(own, network, adding(best.vector, best.site))
    ask(replace(added, source=RANDOM, draw=0), network, adding(randoms[0], best.site))
    return pd.concat(tables, ignore_index=True)


def _directed(
    target: str, directions: Mapping[str, Directions], differences: Differences
) -> list[tuple[Cell, Tensor | None]]:
    """(cell, what is ablated in it): nothing, every source's directions, and the target's own
    difference of means at every site.
    """
    cells: list[tuple[Cell, Tensor | None]] = [(Cell(source=NOTHING), None)]
    for source, by_rule in directions.items():
        for rule in OWN_RULES if source == target else CROSS_RULES:
            found = by_rule[rule]
            cell = Cell(source=source, rule=rule, site=str(found.site), found=found.found)
            cells.append((cell, found.vector))
    for site, means in differences.means().items():
        vector = means[-1]
        if vector.norm() > 0:
            cells.append((Cell(source=target, rule=Rule.SITE_SWEEP, site=str(site)), vector))
    return cells
