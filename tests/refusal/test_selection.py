"""Arditi et al.'s selection against its definition, one prompt at a time; filters, and what happens
without any.
"""

import math

import pytest
import tiny_models as tiny
import torch

from latlib.batch import TokenRow
from latlib.hooks import EMBEDDING, Ablate, LATHook
from latlib.proof.separate import SeparateRows
from latlib.refusal import selection
from latlib.refusal.interventions import Direction, adding

ROWS = tiny.prompt_rows(10)
HARMFUL, HARMLESS = ROWS[:5], ROWS[5:]
TOKENS = (3, 7)


def means(sites=(EMBEDDING, 0, 1, 2), positions=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        s: torch.randn(positions, tiny.D, generator=generator, dtype=torch.float64) for s in sites
    }


def log_p(model, row):
    return model(torch.tensor([row.prompt])).logits[0, -1].log_softmax(-1)


def odds(log_p):
    p = sum(log_p[t].exp() for t in TOKENS)
    return math.log(p / (1 - p))


def select(candidates, lm=None, asked=(HARMFUL, HARMLESS)):
    lm = lm or tiny.language_model()
    return selection.select(lm.network(), candidates, *asked, TOKENS)


@pytest.mark.parametrize("forward", ["lean", "stock"])
def test_scores_equal_plain_loops_over_the_stock_model(forward):
    lm, candidates = tiny.language_model(forward, trained=True), means()
    scores = selection.Scores(lm.network(), HARMFUL, HARMLESS, TOKENS)
    with torch.no_grad():
        for site, position in ((EMBEDDING, -2), (0, -1), (2, -2)):
            vector = candidates[site][position]
            candidate = Direction(vector, site, position)
            clean = [log_p(lm.model, row) for row in HARMLESS]
            with Ablate(lm.model, vector):
                bypass = [odds(log_p(lm.model, row)) for row in HARMFUL]
                moved = [log_p(lm.model, row) for row in HARMLESS]
            kl = [(a.exp() * (a - b)).sum().item() for a, b in zip(clean, moved, strict=True)]
            induced = []
            for row in HARMLESS:
                with LATHook(lm.model, {site: vector.expand(1, len(row.prompt), -1)}):
                    induced.append(odds(log_p(lm.model, row)))
            assert scores.bypass(candidate) == pytest.approx(sum(bypass) / 5, abs=1e-5)
            assert scores.induce(candidate) == pytest.approx(sum(induced) / 5, abs=1e-5)
            assert scores.kl(candidate) == pytest.approx(sum(kl) / 5, abs=1e-5)


@pytest.mark.parametrize("forward", ["lean", "stock", "separate"])
@pytest.mark.parametrize("shared", [1, 6])  # little of a prompt, and most of it
def test_prompts_that_begin_alike_are_as_each_alone(forward, shared, monkeypatch):
    lm = tiny.language_model("lean" if forward == "lean" else "stock", trained=True)
    network = SeparateRows(lm.network()) if forward == "separate" else lm.network()
    begin = ROWS[0].prompt[:shared]
    rows = [TokenRow((*begin, *row.prompt[:5]), ()) for row in ROWS]
    rows[3] = TokenRow((*begin, *ROWS[0].prompt[:2]), ())  # the whole beginning of another
    packs = []
    pack = selection._pack
    monkeypatch.setattr(selection, "TOGETHER", 4)
    monkeypatch.setattr(selection, "_pack", lambda prompts: packs.append(prompts) or pack(prompts))
    vector = means()[0][-1]
    with torch.no_grad():
        found = selection.last_log_probabilities(network, rows, adding(vector, 1), size=6)
        alone = []
        for row in rows:
            with LATHook(lm.model, {1: vector.expand(1, len(row.prompt), -1)}):
                alone.append(log_p(lm.model, row))
    alone = torch.stack(alone).float()
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    assert [len(each) for each in packs] == ([1] * 10 if shared == 1 else [4, 4, 2])


def test_a_candidate_that_moves_too_much_is_not_asked_to_the_end(monkeypatch):
    lm = tiny.language_model(trained=True)
    scores = selection.Scores(lm.network(), HARMFUL, HARMLESS, TOKENS)
    candidate = Direction(means()[0][-1], 0)
    whole = scores.kl(candidate)
    asked = []
    ask = selection.last_log_probabilities

    def counted(network, rows, *rest):
        asked.extend(rows)
        return ask(network, rows, *rest)

    monkeypatch.setattr(selection, "last_log_probabilities", counted)
    monkeypatch.setattr(selection, "TOGETHER", 1)
    monkeypatch.setattr(selection, "MOST_KL", 1.01 * whole)
    assert scores.kl(candidate) == pytest.approx(whole, abs=1e-6)
    assert asked == HARMLESS
    asked.clear()
    monkeypatch.setattr(selection, "MOST_KL", whole / 10)
    assert whole / 10 < scores.kl(candidate) < whole
    assert 0 < len(asked) < len(HARMLESS)


class Known:
    """Scores that are given: site -> (bypass, induce, kl); remembers what was asked of whom."""

    def __init__(self, given):
        self.given, self.asked = given, []

    def __call__(self, *_):
        return self

    def __getattr__(self, name):
        def score(candidate):
            self.asked.append((name, candidate.site))
            return self.given[candidate.site][("bypass", "induce", "kl").index(name)]

        return score


@pytest.mark.parametrize(
    ("scores", "chosen", "said"),
    [
        ({0: (-1, 1, 0.05), 1: (-9, 1, 0.5), 2: (-9, 1, 0.0)}, 0, ""),  # 2: late
        ({0: (-1, 1, 0.05), EMBEDDING: (-9, -1, 0.0)}, 0, ""),
        ({0: (-1, 1, 0.05), 1: (-2, 0, 0.1)}, 1, ""),
        ({0: (-1, 1, 0.5), 1: (-2, -1, 0.5)}, 0, "without the filter on kl"),
        ({0: (-1, 1, 0.5), 1: (-2, -1, 0.05)}, 0, "without the filter on kl"),
        ({0: (-1, -1, 0.5), 1: (-2, -1, 0.05), 2: (-9, 1, 0)}, 1, "filter on kl and induce"),
        ({2: (-2, 1, 0.0)}, 2, ""),
    ],
)
def test_filters_and_what_happens_when_nothing_passes(monkeypatch, scores, chosen, said):
    known = Known(scores)
    monkeypatch.setattr(selection, "Scores", known)
    found = select(means(scores, positions=1))
    assert found.site == chosen and found.found == (not said)
    assert found.note.endswith(said) and bool(found.note) == bool(said)
    assert len(known.asked) == len(set(known.asked)), "no score is computed twice"
    late = ("kl", 2) in known.asked
    assert late == (set(scores) == {2}), "what comes too late is not asked"


def test_directions_without_a_value_are_no_candidates():
    candidates = means(positions=1)
    candidates[EMBEDDING] = torch.zeros(1, tiny.D)
    candidates[0] = torch.full((1, tiny.D), math.nan)
    assert [found.site for found in selection._candidates(candidates)] == [1, 2]
    found = select(candidates)
    assert found.site == 1 and torch.equal(found.vector, candidates[1][found.position])
    with pytest.raises(ValueError, match="nothing to choose from"):
        select({0: torch.zeros(1, tiny.D)})


def test_what_rounding_left_of_nothing_is_no_candidate():
    """Ablating it does nothing: no KL, and whatever the model does to harmless prompts anyway."""
    candidates = means()
    candidates[0] = 1e-9 * candidates[0]
    found = selection._candidates(candidates)
    sites = (EMBEDDING, 1, 2)
    assert [(c.site, c.position) for c in found] == [(s, p) for s in sites for p in (-2, -1)]


@pytest.mark.parametrize("harmful", [True, False])
def test_prompts_are_treated_rightly_by_the_sign_of_their_own_score(harmful):
    lm = tiny.language_model(trained=True)
    with torch.no_grad():
        logits = [log_p(lm.model, row) for row in ROWS]
    # tokens between whose odds the prompts lie on both sides
    order = sum(row.exp() for row in logits).argsort(descending=True).tolist()
    for count in range(1, tiny.VOCABULARY):
        tokens = order[:count]
        p = [sum(row[t].exp().item() for t in tokens) for row in logits]
        if 0 < sum(x > 0.5 for x in p) < len(ROWS):
            break
    found = selection.treated_rightly(lm.network(), ROWS, tokens, harmful)
    assert found.tolist() == [(x > 0.5) == harmful for x in p] and 0 < found.sum() < len(ROWS)


def test_the_refusal_score_is_finite_at_certainty():
    certain = torch.full((2, 9), -60.0)
    certain[0, 3], certain[1, 8] = 0.0, 0.0
    score = selection.refusal_score(certain, TOKENS)
    assert torch.isfinite(score).all() and score[0] > 10 and score[1] < -10
