"""Arditi et al.'s selection against its definition, one prompt at a time; filters, and what happens
without any.
"""

import math

import pandas as pd
import pytest
import tiny_models as tiny
import torch

from latlib.hooks import EMBEDDING, Ablate, LATHook
from latlib.refusal import selection

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


@pytest.mark.parametrize("forward", ["lean", "stock"])
def test_scores_equal_plain_loops_over_the_stock_model(forward):
    lm, candidates = tiny.language_model(forward, trained=True), means()
    _, found = selection.select(lm.network(), candidates, HARMFUL, HARMLESS, TOKENS)
    assert len(found) == 8 and list(found["position"]) == [-2, -1] * 4
    with torch.no_grad():
        for record in found.iloc[[0, 3, 6]].itertuples():
            site = record.site if record.site == EMBEDDING else int(record.site)
            vector = candidates[site][record.position]
            clean = [log_p(lm.model, row) for row in HARMLESS]
            with Ablate(lm.model, vector):
                bypass = [odds(log_p(lm.model, row)) for row in HARMFUL]
                moved = [log_p(lm.model, row) for row in HARMLESS]
            kl = [(a.exp() * (a - b)).sum().item() for a, b in zip(clean, moved, strict=True)]
            induced = []
            for row in HARMLESS:
                with LATHook(lm.model, {site: vector.expand(1, len(row.prompt), -1)}):
                    induced.append(odds(log_p(lm.model, row)))
            assert record.bypass == pytest.approx(sum(bypass) / 5, abs=1e-5)
            assert record.induce == pytest.approx(sum(induced) / 5, abs=1e-5)
            assert record.kl == pytest.approx(sum(kl) / 5, abs=1e-5)
            # the input of the last of 4 blocks is the site 2
            assert record.late == (site in (2, 3))


def table(rows):
    return pd.DataFrame(rows, columns=["late", "bypass", "induce", "kl"])


@pytest.mark.parametrize(
    ("rows", "chosen", "said"),
    [
        (
            [(False, -1, 1, 0.05), (False, -9, 1, 0.5), (False, -9, -1, 0.0), (True, -9, 1, 0.0)],
            0,
            "",
        ),
        ([(False, -1, 1, 0.05), (False, -2, 0, 0.1)], 1, ""),
        ([(False, -1, 1, 0.5), (False, -2, -1, 0.5)], 0, "without the filter on kl"),
        (
            [(False, -1, -1, 0.5), (False, -2, -1, 0.5), (True, -9, 1, 0)],
            1,
            "without the filter on kl and induce",
        ),
        ([(True, -1, 1, 0.0), (True, -2, 1, 0.0)], 1, ""),
    ],
)
def test_filters_and_what_happens_when_nothing_passes(rows, chosen, said):
    kept, note = selection._filtered(table(rows))
    assert kept["bypass"].idxmin() == chosen and note.endswith(said) and bool(note) == bool(said)


def test_directions_without_a_value_are_no_candidates():
    lm, candidates = tiny.language_model(), means(positions=1)
    candidates[EMBEDDING] = torch.zeros(1, tiny.D)
    candidates[0] = torch.full((1, tiny.D), math.nan)
    found, table = selection.select(lm.network(), candidates, HARMFUL, HARMLESS, TOKENS)
    assert list(table["site"]) == ["1", "2"] and table["chosen"].sum() == 1
    row = table[table["chosen"]].iloc[0]
    assert (row["site"], row["position"]) == (str(found.site), found.position)
    assert torch.equal(found.vector, candidates[found.site][found.position])
    with pytest.raises(ValueError, match="nothing to choose from"):
        selection.select(lm.network(), {0: torch.zeros(1, tiny.D)}, HARMFUL, HARMLESS, TOKENS)


def test_what_rounding_left_of_nothing_is_no_candidate():
    """Ablating it does nothing: no KL, and whatever the model does to harmless prompts anyway."""
    lm, candidates = tiny.language_model(), means(positions=1)
    candidates[0] = 1e-9 * candidates[0]
    _, table = selection.select(lm.network(), candidates, HARMFUL, HARMLESS, TOKENS)
    assert list(table["site"]) == [EMBEDDING, "1", "2"]


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
