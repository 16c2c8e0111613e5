"""The verdict of every claim follows the data: made to hold, made to fail, and left undecided."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from synthetic import PROFILE, PROMPTS, cell, curve, evidence

from latlib.report import claims
from latlib.report.evidence import Evidence, MissingError, contrast, rate, spikes
from latlib.report.run_checks import floor_table
from latlib.report.stats import Interval
from latlib.report.tables import between_markers

TESTABLE = [c for c in claims.CLAIMS if c.effect]


@pytest.fixture(scope="module", params=[True, False], ids=["holds", "fails"])
def measured(request):
    return request.param, {c.id: c for c in claims.measure(evidence(request.param))}


@pytest.mark.parametrize("name", [c.id for c in TESTABLE])
def test_a_claim_that_holds_is_reproduced_and_one_without_effect_is_not(measured, name):
    holds, found = measured
    expected = "reproduced" if holds else "not reproduced"
    assert found[name].verdict == expected, found[name]
    assert found[name].interval.n >= 150 and found[name].note


def test_without_data_every_testable_claim_is_inconclusive_and_says_what_is_missing():
    empty = Evidence(PROFILE, evidence(True).outcomes.iloc[:0])
    for claim in claims.measure(empty):
        assert claim.verdict == ("inconclusive" if claim.effect else "not testable at this scale")
        assert claim.note.startswith("not measured: ") or not claim.effect


def test_no_claim_rests_on_a_direction_that_was_not_found():
    """A failed search would else count as a weak vector."""
    run = evidence(True)
    rows = run.outcomes.copy()
    of_main = (rows["source"] == "lat") & (rows["rule"] == "best")
    rows["found"] = pd.array([None] * len(rows), dtype="boolean")
    rows.loc[of_main, "found"] = False
    found = {c.id: c for c in claims.measure(replace(run, outcomes=rows))}
    for name in ("strongest-vector", "weaker-to-own"):
        assert found[name].interval is None
        assert "found no direction of lat" in found[name].note
    assert found["resists-reference"].interval
    rows.loc[of_main & (rows["seed"] > 0), "found"] = True
    some = {c.id: c for c in claims.measure(replace(run, outcomes=rows))}
    assert some["strongest-vector"].interval.seeds == len(set(rows["seed"])) - 1


def test_two_clusters_decide_nothing():
    few = evidence(False)
    few = Evidence(PROFILE, few.outcomes[few.outcomes["cluster"] < 2])
    found = {c.id: c for c in claims.measure(few) if c.interval}
    assert len(found) >= 9 and {
        m.verdict for n, m in found.items() if n != "attack-breaks-undefended"
    } == {"inconclusive"}


def test_wide_intervals_decide_nothing_and_the_margin_decides_small_ones():
    def interval(low, high):
        return Interval((low + high) / 2, low, high, 200, 40, 3)

    assert claims.decide(interval(-0.1, 0.3)) == "inconclusive"
    assert claims.decide(interval(0.01, 0.02)) == "reproduced"
    assert claims.decide(interval(-0.2, 0.09)) == "not reproduced"
    assert claims.decide(interval(0.3, 0.45), bar=0.5) == "not reproduced"
    assert claims.decide(interval(0.4, 0.6), bar=0.5) == "inconclusive"


def test_every_claim_states_test_rule_and_source_and_recalled_figures_are_absent():
    assert len({c.id for c in claims.CLAIMS}) == len(claims.CLAIMS) >= 12
    for claim in claims.CLAIMS:
        assert claim.source and claim.test and claim.rule and "recall" not in (claim.paper or "")


def test_markdown_and_json_carry_every_claim():
    found = claims.measure(evidence(True))
    table = claims.to_markdown(found)
    assert (
        len(table.splitlines()) == 2 + len(found)
        and len({line.count(" | ") for line in table.splitlines()[2:]}) == 1
    )
    read = json.loads(json.dumps(claims.to_records(found)))
    assert [r["id"] for r in read] == [c.id for c in claims.CLAIMS]
    assert read[0]["interval"]["low"] > 0.5 and read[0]["interval"]["seeds"] == 3
    assert read[0]["verdict"] == "reproduced" and "LAT" in read[1]["statement"]


def test_the_readme_table_stands_between_its_markers():
    begin, end = "<!-- claims:begin -->", "<!-- claims:end -->"
    readme = f"before {begin}\nold | \\1 table\n{end} after"
    once = between_markers(readme, "claims", "| new \\1 |")
    assert once == f"before {begin}\n| new \\1 |\n{end} after"
    assert once == between_markers(once, "claims", "| new \\1 |")
    with pytest.raises(ValueError, match="needs the markers"):
        between_markers("no markers", "claims", "table")


def test_readme_holds_the_table_of_the_committed_results(root):
    results, readme = root / "results" / "tiny", root / "README.md"
    if not results.is_dir() or not readme.is_file():
        pytest.skip("results/tiny or README.md is not there yet: nothing to compare")
    try:
        measured = claims.measure(Evidence.load(results))
    except MissingError as error:
        pytest.skip(f"the committed results are older than this code: {error}")
    text = readme.read_text(encoding="utf-8")
    assert between_markers(text, "claims", claims.to_markdown(measured)) == text, (
        "run: python -m latlib.report.claims --results results/tiny --readme README.md"
    )


def test_the_worst_attack_counts_once_per_prompt_and_unshared_prompts_are_an_error():
    both = pd.concat([cell("lat", 0.2, "pgd"), cell("lat", 0.6, "pgd-strong")])
    assert rate(both).estimate == pytest.approx(0.6) and rate(both).n == 3 * PROMPTS
    with pytest.raises(MissingError, match="share no prompt"):
        contrast(cell("lat", 0.2), cell("lat", 0.2, prompts="harmless"))


def test_spikes_are_found_where_they_were_put():
    found = spikes(curve(0.5, 0))
    assert found.index[found["spike"]].tolist() == [i for i in range(200) if i % 9 == 4]
    assert found.loc[found["spike"], "won_excess"].mean() > 0.4
    with pytest.raises(MissingError, match="no attack"):
        spikes(curve(0.5, 0).drop(columns="attack_won"))


def test_the_floor_says_what_holds_what_fails_and_what_was_not_measured():
    found = floor_table(evidence(True))["holds"]
    assert (
        found["LAT: latent PGD at eps 0.05 absolute"] == "yes"
        and found["LAT: ASR under its own direction"] == "yes"
    )
    assert found["base: plain recipes exact"] == "no"
    assert found["AT: embedding PGD at eps 6 absolute"] == "not measured"
