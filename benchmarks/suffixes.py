"""GCG against random search: how many requests each opens, one suffix for each request, at equal
numbers of queries.

    python benchmarks/suffixes.py --run runs/tiny --method ssft --json out.json

1. Test prompts are dealt out to the seeds of a finished run. For each, both searches look for a
   suffix under which the model writes the right recipe word for word; they make exactly as many
   queries.
2. Opened means graded: the suffix is put behind the request as text and the reply is compared with
   the recipe.
3. The difference is paired by prompt, its interval over seeds and (verb, target) pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from measure import environment, write

from latlib.evaluation.ask import Wording, prompt_set, token_rows
from latlib.evaluation.examine import grade_rows
from latlib.experiment.run import Run
from latlib.redteam.gcg import SuffixSettings, gcg
from latlib.report.stats import cluster_interval, paired_interval

SEARCHES = {"gcg": True, "random": False}  # whether they follow the gradient
# A hundred or so queries a request: few enough that neither search opens everything. `topk` is
# about a fiftieth of the
# allowed tokens of the world's vocabulary, as little as lets single-token changes matter.
BUDGETS = (3, 10)  # steps
SETTINGS = SuffixSettings(n_tokens=4, candidates=16, topk=16, batch=128)


def opened(
    run: Run, method: str, seed: int, prompts: Sequence, settings: SuffixSettings
) -> tuple[list, list]:
    """(whether each request is opened, the final losses); searches are seeded by the prompt's
    place.
    """
    lm = run.model(method, seed)
    network, won, losses = lm.network(), [], []
    for place, prompt in enumerate(prompts):
        found = gcg(lm, [prompt.text], [prompt.answer], settings, place)
        rows = token_rows(lm, [prompt], Wording(suffix=found.text))
        (outcome,), _ = grade_rows(network, rows)
        won.append(outcome == "complied")
        losses.append(found.loss)
    return won, losses


def measure(run: Run, method: str, n: int, steps: int) -> dict:
    """Both searches on n prompts, dealt out over the run's seeds."""
    seeds, prompts = run.profile.seeds, prompt_set("harmful", run.profile, n)
    settings = SuffixSettings(**{**asdict(SETTINGS), "steps": steps})
    rows = {name: ([], []) for name in SEARCHES}
    clusters, of_seed = [], []
    for i, seed in enumerate(seeds):
        own = prompts[i :: len(seeds)]
        clusters += [p.cluster for p in own]
        of_seed += [seed] * len(own)
        for name, by_gradient in SEARCHES.items():
            how = replace(settings, by_gradient=by_gradient)
            for kept, new in zip(rows[name], opened(run, method, seed, own, how), strict=True):
                kept.extend(new)
    a, b = (np.array(rows[name][0], float) for name in SEARCHES)
    # each prompt belongs to one seed, so pairs are not crossed with seeds: (pair, seed) is the unit
    units = [f"{c}/{s}" for c, s in zip(clusters, of_seed, strict=True)]
    difference = paired_interval(a - b, units)
    return {
        "steps": steps,
        "queries": 1 + steps * (settings.candidates + 1),
        "n": len(a),
        "asr": {name: asdict(cluster_interval(rows[name][0], units)) for name in SEARCHES},
        "loss": {name: sum(rows[name][1]) / len(a) for name in SEARCHES},
        "difference": asdict(difference),
        "p": difference.p_value(),
    }


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print, write; returns what is written."""
    own = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own.add_argument("--run", type=Path, required=True, help="folder of a run that has the models")
    own.add_argument("--method", default="ssft")
    own.add_argument("--prompts", type=int, default=200)
    own.add_argument("--json", type=Path, default=None)
    arguments = own.parse_args(argv)
    run = Run(arguments.run / "profile.yaml", arguments.run)
    found = [measure(run, arguments.method, arguments.prompts, steps) for steps in BUDGETS]
    for record in found:
        shares = ", ".join(
            f"{name} {i['estimate']:.3f} [{i['low']:.3f}, {i['high']:.3f}]"
            for name, i in record["asr"].items()
        )
        gap = record["difference"]
        print(
            f"{record['queries']} queries, n = {record['n']}: {shares}; difference"
            f" {gap['estimate']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], p ="
            f" {record['p']:.3f}"
        )
    lm = run.model(arguments.method, run.profile.seeds[0])
    out = {
        "method": arguments.method,
        "settings": asdict(SETTINGS),
        "results": found,
        "environment": environment(lm.device),
    }
    write(out, arguments.json)
    return out


if __name__ == "__main__":
    main()
