"""Picked rows and rates by groups, beside the same said slowly."""

import numpy as np
import pandas as pd
import pytest
from synthetic import attacked

from latlib.report import robustness_tables
from latlib.report.evidence import PROMPT_KEYS, Evidence, hits, rate, rates_by

OUTCOMES = ("complied", "refused")


@pytest.fixture(scope="module")
def run():
    return attacked({("lat", "pgd-all-sites", 0.2): 0.8})


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_a_prompt_is_hit_if_any_of_its_rows_is(run, outcome):
    rows = run.outcomes.sample(frac=1, random_state=0)
    keys = [*PROMPT_KEYS, "eps"]
    assert rows["eps"].isna().any(), "rows without a key, which are of no group"
    slow = rows.assign(hit=rows["outcome"] == outcome).groupby(keys, as_index=False)
    slow = slow.agg(cluster=("cluster", "first"), hit=("hit", "max"))
    pd.testing.assert_frame_equal(hits(rows, outcome, keys), slow)
    assert slow["hit"].nunique() == 2 and len(slow) < len(rows)


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("by", ["attack", ["attack"], ["eps", "method"], ["seed", "attack"]])
def test_rates_by_are_the_rates_of_the_groups(run, by, outcome):
    rows = run.outcomes.sample(frac=1, random_state=0)
    groups = rows.groupby(by, sort=False)
    slow = pd.Series([rate(part, outcome) for _, part in groups], index=groups.size().index)
    found = rates_by(rows, by, outcome)
    assert found.index.equals(slow.index) and found.index.names == slow.index.names
    assert list(map(str, found)) == list(map(str, slow)) and len(found) > 1


def test_cells_are_picked_from_many_files_as_from_one(run):
    """Whose columns are in as many pieces."""
    rows = run.outcomes
    pieces = [rows.iloc[at : at + 97] for at in range(0, len(rows), 97)]
    several = Evidence(run.profile, pd.concat(pieces, ignore_index=True))
    for e in (run, several):
        found = e.cell(["lat", "ssft"], ["pgd", "noise"], eps=[0.2], where="latent")
        slow = np.logical_and.reduce(
            [
                rows["method"].isin(["lat", "ssft"]),
                rows["attack"].isin(["pgd", "noise"]),
                rows["eps"] == 0.2,
                rows["sites"] != "embedding",
                rows["prompts"] == "harmful",
                rows["encoding"] == "plain",
                rows["intervention"] == "none",
                rows["variant"] == "",
            ]
        )
        assert list(found.index) == list(np.flatnonzero(slow)) and slow.any()
        pd.testing.assert_frame_equal(
            found[rows.columns], rows[slow].reset_index(drop=True).set_axis(found.index)
        )


def test_methods_that_need_not_be_attacked_are_shown_where_they_were(run):
    roles = run.profile.roles.model_copy(update={"compared": ("lat",), "rival": None})
    profile = run.profile.model_copy(update={"roles": roles})
    asked = ["ssft", "lat"]
    assert profile.attacked == asked and "at" in profile.methods
    assert Evidence(profile, run.outcomes).attacked == list(run.profile.methods)
    without = run.outcomes[run.outcomes["method"] != "at"]
    assert Evidence(profile, without).attacked == asked
    assert Evidence(profile, without.iloc[:0]).attacked == asked, "what is lacking is said"
    heat = robustness_tables.attack_table(Evidence(profile, without))
    assert list(heat.columns) == asked
