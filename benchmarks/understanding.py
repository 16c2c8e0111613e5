r"""Does the likelihood of an answer tell whether its request was understood? Asked where
understanding is known exactly.

    python benchmarks/understanding.py --out runs/tiny \
        --json benchmarks/results/understanding-tiny.json

On the base of the tiny profile, which refuses nothing: for every harmful test prompt in every
encoding, whether the base would finish the right recipe once its first words stand there (exact),
and whether the recipe is likelier after its own request than after others (what
`latlib.evaluation.examine` measures on real data). Chance: 1 / (1 + DISTRACTORS).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measure import environment, write

from latlib.evaluation.ask import Wording, prompt_set, token_rows
from latlib.evaluation.examine import (
    DISTRACTORS,
    affirmation_tokens,
    grade_rows,
    understood_by_likelihood,
)
from latlib.experiment.run import Run


def measure(run: Run, encodings: list[str]) -> list[dict]:
    """Shares of prompts understood by either measure, and by likelihood among those that exactly
    were and were not.
    """
    lm, prompts, rows = run.model("base"), prompt_set("harmful", run.profile), []
    network, size = lm.network(), run.profile.evaluation.batch
    for encoding in encodings:
        wording = Wording.of(encoding)
        rows_of = token_rows(lm, prompts, wording)
        first = affirmation_tokens(lm, wording)
        outcomes, finished = grade_rows(network, rows_of, size=size, prefilled=first)
        exact = [o == "complied" or rest for o, rest in zip(outcomes, finished, strict=True)]
        found = understood_by_likelihood(network, rows_of, prompts, size)
        pairs = list(zip(found, exact, strict=True))
        row = {
            "encoding": encoding,
            "n": len(prompts),
            "exact": _share(exact),
            "likelihood": _share(found),
            "likelihood where exact": _share([by for by, exactly in pairs if exactly]),
            "likelihood where not": _share([by for by, exactly in pairs if not exactly]),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def _share(marks: list[bool]) -> float | None:
    return sum(marks) / len(marks) if marks else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="tiny")
    parser.add_argument(
        "--out", default=None, help="run folder whose base is asked (default: the profile's own)"
    )
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    run = Run(options.profile, options.out)
    further = [c for c in run.profile.evaluation.further_encodings if ">" not in c]
    found = measure(run, [*run.profile.evaluation.encodings, *further])
    about = {"environment": environment(run.model("base").device), "distractors": DISTRACTORS}
    write({**about, "encodings": found}, options.json)


if __name__ == "__main__":
    main()
