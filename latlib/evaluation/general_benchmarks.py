"""General ability (MMLU and its like) by EleutherAI's lm-evaluation-harness, an optional extra:
`latlib[eval]`.

1. The model as it is in memory, adapter and all, goes into the harness's own wrapper (HFLM);
   nothing is saved.
2. `simple_evaluate` runs the tasks; what comes back is task -> metric -> number.

Such scores do not show over-refusal: set `latlib.data.benchmarks` beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

from latlib.models import LanguageModel


def lm_eval_scores(
    lm: LanguageModel, tasks: Sequence[str], limit: int | float | None = None, batch: int = 8
) -> dict[str, dict[str, float]]:
    """Scores of `tasks` by the harness's names: {'mmlu': {'acc,none': 0.61, 'acc_stderr,none':
    0.004, ...}, ...}.

    limit: examples of each task (a share of them below 1), None for all; with a limit scores are
    for trying things out only. The harness downloads its tasks' data and seeds the global
    generators of Python, NumPy and torch. Only the first process of several gets scores, the others
    an empty dict. Raises ImportError without the extra, ValueError for no tasks.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks = {tasks!r} is no list of task names: give one such as ['mmlu']")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness is not installed ({error}): run pip install 'latlib[eval]',"
            " which brings it"
        ) from error
    judged = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch)
    results = lm_eval.simple_evaluate(model=judged, tasks=list(tasks), limit=limit)
    if results is None:
        return {}
    return {
        task: {
            metric: float(value)
            for metric, value in scores.items()
            if isinstance(value, (int, float))
        }
        for task, scores in results["results"].items()
    }
