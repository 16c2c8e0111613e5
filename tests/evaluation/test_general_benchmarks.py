"""The lm-evaluation-harness behind its extra: what it is given and what comes back, with a stand-in
for the package.
"""

import sys
import types

import pytest
from tiny_models import language_model

from latlib.evaluation.general_benchmarks import lm_eval_scores

RESULTS = {
    "results": {
        "lore": {"alias": "lore", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "law": {"f1,none": 1},
    }
}


@pytest.fixture
def harness(monkeypatch):
    """A fake lm_eval that keeps what it was called with."""
    calls = types.SimpleNamespace(model=None, evaluate=None, results=RESULTS)

    def hflm(**options):
        calls.model = options
        return "wrapped"

    def simple_evaluate(**options):
        calls.evaluate = options
        return calls.results

    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    package, models, huggingface = (types.ModuleType(name) for name in names)
    package.simple_evaluate, package.models, models.huggingface, huggingface.HFLM = (
        simple_evaluate,
        models,
        huggingface,
        hflm,
    )
    for name, module in zip(names, (package, models, huggingface), strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_harness_gets_the_model_in_memory_and_gives_numbers(harness):
    lm = language_model("stock")
    assert lm_eval_scores(lm, ["lore", "law"], limit=10, batch=4) == {
        "lore": {"acc,none": 0.5},
        "law": {"f1,none": 1.0},
    }
    assert harness.model == {"pretrained": lm.model, "tokenizer": lm.tokenizer, "batch_size": 4}
    assert harness.evaluate == {"model": "wrapped", "tasks": ["lore", "law"], "limit": 10}


def test_other_processes_than_the_first_get_nothing(harness):
    harness.results = None
    assert lm_eval_scores(language_model("stock"), ["lore"]) == {}


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'latlib\[eval\]'"):
        lm_eval_scores(language_model("stock"), ["lore"])


@pytest.mark.parametrize("tasks", ["lore", []])
def test_tasks_are_a_list(harness, tasks):
    with pytest.raises(ValueError, match="tasks = .* is no list of task names"):
        lm_eval_scores(language_model("stock"), tasks)
