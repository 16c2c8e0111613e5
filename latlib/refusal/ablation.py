"""What is left of refusal without a direction: ablation of every source's directions from a target.

1. Each source's directions (`directions`) are removed from the target model, which is then asked.
2. Controls stand beside them: nothing removed, random directions, and the mean of differences whose
   labels are shuffled.
3. A direction that carries refusal also induces it: added to harmless prompts, beside a random one.

Sources: Abbas et al. 2025, section 3; Arditi et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from latlib.evaluation.ask import examine, prompt_set
from latlib.evaluation.outcomes import OnStep, Subject, outcome_rows, unseen
from latlib.models import LanguageModel
from latlib.network_protocol import Network
from latlib.refusal.directions import (
    CROSS_RULES,
    OWN_RULES,
    Differences,
    Direction,
    random_directions,
)
from latlib.refusal.interventions import added

NOTHING = "ablate:nothing"


def ablation(
    lm: LanguageModel,
    subject: Subject,
    directions: Mapping[str, Mapping[str, Direction]],
    differences: Differences,
    on_step: OnStep = unseen,
) -> pd.DataFrame:
    """Outcome rows of a target model under the directions of every source.

    directions: source -> rule -> direction, the target's own among them. differences: the target's.
    attack is 'ablate:<source>@<rule>', 'ablate:<target>@site-<site>' (the sweep over sites),
    'ablate:random<k>', 'ablate:shuffled' or 'ablate:nothing', on harmful prompts; with nothing and
    by the rule `best` also on harmless ones. 'add:<target>@best' and 'add:random0' add a vector at
    its site on harmless prompts.
    """
    own = subject.method
    evaluation = subject.profile.evaluation
    network = lm.network()
    best = directions[own]["best"]
    cells = {NOTHING: None}
    for source, by_rule in directions.items():
        rules = OWN_RULES if source == own else CROSS_RULES
        cells |= {f"ablate:{source}@{rule}": by_rule[rule].vector for rule in rules}
    sweep = {site: rows[-1] for site, rows in differences.means().items()}
    cells |= {
        f"ablate:{own}@site-{site}": vector for site, vector in sweep.items() if vector.norm() > 0
    }
    randoms = random_directions(
        network.d_model, evaluation.random_directions, best.vector.norm(), subject.seed
    )
    cells |= {f"ablate:random{k}": vector for k, vector in enumerate(randoms)}
    cells["ablate:shuffled"] = differences.shuffled(best.site, subject.seed)

    def graded(attack: str, prompts_name: str, network: Network, perturb=None) -> pd.DataFrame:
        prompts = prompt_set(prompts_name, subject.profile, evaluation.ablation_prompts)
        found = examine(lm, subject.profile, prompts, network=network, perturb=perturb)
        return outcome_rows(
            subject, prompts_name, prompts, found.outcomes, attack=attack, texts=found.texts
        )

    tables = []
    for step, (attack, vector) in enumerate(cells.items(), start=1):
        ablated = network if vector is None else network.ablated(vector)
        tables.append(graded(attack, "harmful", ablated))
        if attack == NOTHING or attack.endswith("@best"):
            tables.append(graded(attack, "harmless", ablated))
        on_step(step, len(cells), attack)
    for attack, vector in ((f"add:{own}@best", best.vector), ("add:random0", randoms[0])):
        tables.append(
            graded(
                attack, "harmless", network, lambda batch, v=vector: added(v, best.site, batch.ids)
            )
        )
    return pd.concat(tables, ignore_index=True)
