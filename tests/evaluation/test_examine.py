"""What a model's replies come to."""

from types import SimpleNamespace

from latlib.evaluation import examine
from latlib.evaluation.ask import PLAINLY
from latlib.evaluation.examine import RealExaminer
from latlib.evaluation.outcomes import Outcome
from latlib.evaluation.rule_graders import Grade


class WordGrader:
    """Refused where a reply has a no."""

    @staticmethod
    def grade(prompts, replies):
        assert len(prompts) == len(replies)
        return [Grade(Outcome.REFUSED if "no" in r else Outcome.COMPLIED) for r in replies]


def test_only_what_follows_a_thought_is_graded(monkeypatch):
    replies = ["<think>no, or yes?</think>\nSure.", "<think>no", "no.", "hm</think> no"]
    monkeypatch.setattr(examine, "write", lambda *_: replies)
    monkeypatch.setattr(examine, "grader_of", lambda *_: WordGrader())
    settings = SimpleNamespace(evaluation=SimpleNamespace(batch=2, max_new_tokens=9))
    examiner = RealExaminer(settings, None, SimpleNamespace(directions=None))
    monkeypatch.setattr(examiner, "rows", lambda *_: [])
    found = examiner.examine([SimpleNamespace(text=str(i)) for i in range(4)], PLAINLY)
    assert found.outcomes == [
        Outcome.COMPLIED,
        Outcome.NEITHER,
        Outcome.REFUSED,
        Outcome.REFUSED,
    ]
    assert found.texts == replies, "what was written is kept whole"
