"""The verdict of every claim follows the data: made to hold, made to fail, and left undecided."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from ledger_evidence import PROFILE, ledger
from synthetic import PROMPTS, SEEDS, attacked, cell, curve, evidence

from latlib.report import claims
from latlib.report.evidence import Evidence, MissingError, contrast, display_name, rate, spikes
from latlib.report.run_checks import floor_table
from latlib.report.stats import Interval
from latlib.report.summary import in_short
from latlib.report.tables import between_markers
from latlib.report.verdicts import (
    Effect,
    Verdict,
    decide,
    tally,
    to_markdown,
    to_readme,
    to_records,
)

TESTABLE = [c for c in claims.CLAIMS if c.effect]


@pytest.fixture(scope="module", params=[True, False], ids=["holds", "fails"])
def measured(request):
    return request.param, {c.id: c for c in claims.measure(ledger(request.param))}


@pytest.mark.parametrize("name", [c.id for c in TESTABLE])
def test_a_claim_that_holds_is_reproduced_and_one_without_effect_is_not(measured, name):
    holds, found = measured
    expected = Verdict.REPRODUCED if holds else Verdict.NOT_REPRODUCED
    assert found[name].verdict == expected, found[name]
    assert found[name].interval.n >= 150 and found[name].note


def test_of_one_seed_no_claim_is_decided():
    run = ledger(True)
    one = replace(
        run,
        outcomes=run.outcomes[run.outcomes["seed"] == SEEDS[0]],
        metrics={name: curve for name, curve in run.metrics.items() if name == "lat-seed0"},
        variance={method: {"0": tables["0"]} for method, tables in run.variance.items()},
    )
    for claim in claims.measure(one):
        assert claim.verdict is Verdict.UNDECIDABLE
        assert "one seed" in claim.why or not claim.effect


def test_without_data_no_claim_is_decided_and_each_says_what_is_missing():
    empty = Evidence(PROFILE, ledger(True).outcomes.iloc[:0])
    for claim in claims.measure(empty):
        assert claim.verdict is Verdict.UNDECIDABLE
        assert claim.why.startswith("not measured: ") or not claim.effect


def test_no_claim_rests_on_a_direction_that_was_not_found():
    """A failed search would else count as a weak vector."""
    run = ledger(True)
    lat = run.profile.roles.untargeted
    rows = run.outcomes.copy()
    of_main = (rows["source"] == lat) & (rows["rule"] == "best")
    rows["found"] = pd.array([None] * len(rows), dtype="boolean")
    rows.loc[of_main, "found"] = False
    found = {c.id: c for c in claims.measure(replace(run, outcomes=rows))}
    for name in ("strongest-vector", "weaker-to-own"):
        assert found[name].interval is None
        assert f"found no direction of {display_name(lat)}" in found[name].why
    assert found["resists-reference"].interval
    rows.loc[of_main & (rows["seed"] > 0), "found"] = True
    some = {c.id: c for c in claims.measure(replace(run, outcomes=rows))}
    assert some["strongest-vector"].interval.seeds == len(set(rows["seed"])) - 1


def test_no_claim_about_refusal_rests_on_a_model_that_does_not_refuse():
    run = ledger(True)
    roles = run.profile.roles
    for method in (roles.untargeted, roles.untargeted_rival, run.reference):
        rows = run.outcomes.copy()
        rows.loc[(rows["method"] == method) & (rows["source"] == "nothing"), "outcome"] = "complied"
        found = {c.id: c for c in claims.measure(replace(run, outcomes=rows))}
        of_abbas = [c for c in found.values() if c.source == claims.ABBAS]
        assert len(of_abbas) == 4
        for claim in of_abbas:
            assert claim.verdict is Verdict.UNDECIDABLE and claim.interval
            assert claim.why.endswith(f"less than 80 %, by {display_name(method)}")
        assert "with a model that does not refuse" in in_short(run, list(found.values()), [])


def test_two_clusters_decide_nothing():
    few = ledger(False)
    few = Evidence(PROFILE, few.outcomes[few.outcomes["cluster"] < 2])
    found = {c.id: c.verdict for c in claims.measure(few) if c.interval}
    del found["attack-breaks-undefended"]
    assert len(found) >= 15
    assert set(found.values()) <= {Verdict.INCONCLUSIVE, Verdict.UNDECIDABLE}


def interval(low, high, se=0.01, **counts):
    usual = {"n": 200, "clusters": 40, "seeds": 3} | counts
    return Interval((low + high) / 2, low, high, **usual, se=se, df=10.0, half=1.0)


@pytest.mark.parametrize(
    ("low", "high", "more", "verdict"),
    [
        (0.01, 0.2, {}, "reproduced"),
        (0.01, 0.02, {}, "real but negligible"),
        (-0.2, 0.09, {}, "not reproduced"),
        (-0.2, -0.1, {}, "not reproduced"),
        (-0.1, 0.3, {}, "inconclusive"),
        (0.3, 0.45, {"bar": 0.5, "least": 0.5}, "not reproduced"),
        (0.51, 0.6, {"bar": 0.5, "least": 0.5}, "reproduced"),
        (0.4, 0.6, {"bar": 0.5, "least": 0.5}, "inconclusive"),
        (-0.09, 0.02, {"bar": -0.1, "least": -0.1}, "reproduced"),
        (-0.3, -0.11, {"bar": -0.1, "least": -0.1}, "not reproduced"),
        (-0.2, 0.02, {"bar": -0.1, "least": -0.1}, "inconclusive"),
    ],
)
def test_the_rule_says_one_thing_of_every_interval(low, high, more, verdict):
    assert decide(Effect([interval(low, high)], ""), **more)[0] == verdict


def test_what_could_not_have_come_out_is_not_decided():
    small = Effect([interval(-0.02, 0.02)], "", ceiling=0.05)
    verdict, why = decide(small)
    assert verdict is Verdict.UNDECIDABLE and "room for 5.0 points" in why
    weak = Effect([interval(-0.5, 0.7, se=0.3)], "", ceiling=0.6)
    verdict, why = decide(weak)
    assert verdict is Verdict.UNDECIDABLE
    needed = 100 * weak.detectable
    assert (
        why
        == f"at most 60 points could be seen; to show more than 0, so many seeds need {needed:.0f}"
    )
    over = decide(Effect([interval(0.4, 0.7, se=0.1)], "", ceiling=0.6), bar=0.5, least=0.5)[1]
    assert "to show more than 50" in over and int(over.split()[-1]) > 60
    one = Effect([interval(0.5, 0.7, seeds=1)], "")
    assert decide(one)[0] is Verdict.UNDECIDABLE


def test_of_several_comparisons_the_weakest_decides():
    effect = Effect([interval(0.3, 0.5), interval(-0.1, 0.3, se=0.1)], "")
    assert (effect.interval.low, effect.interval.high) == (-0.1, 0.3)
    assert effect.p_value(0.0) == interval(-0.1, 0.3, se=0.1).p_value() > 0.05
    assert decide(effect)[0] is Verdict.INCONCLUSIVE


def test_holm_is_over_the_whole_ledger_whatever_is_asked_for():
    run = ledger(True)
    every = {c.id: c for c in claims.measure(run)}
    (one,) = claims.measure(run, ["leet-gap"])
    assert one.p_holm == every["leet-gap"].p_holm > one.p
    assert sum(c.p is not None for c in every.values()) >= 18


def test_what_fails_in_the_panel_stands_beside_the_claims_that_rest_on_it():
    broken = attacked({("ssft", "pgd", 0.05): 0.0, ("ssft", "pgd-strong", 0.05): 0.0})
    found = {c.id: c for c in claims.measure(broken)}
    doubts = found["attack-breaks-undefended"].doubts
    assert any(doubt.startswith("undefended twin (SSFT") for doubt in doubts)
    for table in (to_markdown, to_readme):
        assert "in doubt: " in table([found["attack-breaks-undefended"]])
    whole = {c.id: c for c in claims.measure(attacked())}
    assert not any("twin" in doubt for doubt in whole["attack-breaks-undefended"].doubts)


def test_every_claim_states_test_rule_and_source_and_recalled_figures_are_absent():
    assert len({c.id for c in claims.CLAIMS}) == len(claims.CLAIMS)
    assert len(TESTABLE) >= 18
    for claim in claims.CLAIMS:
        assert claim.source and claim.test and claim.rule and "recall" not in (claim.paper or "")
        assert claim.control or not claim.effect
        assert claim.roles or not claim.effect


def test_markdown_and_json_carry_every_claim():
    found = claims.measure(ledger(True))
    table = to_markdown(found)
    assert (
        len(table.splitlines()) == 2 + len(found)
        and len({line.count(" | ") for line in table.splitlines()[2:]}) == 1
    )
    read = json.loads(json.dumps(to_records(found)))
    assert [r["id"] for r in read] == [c.id for c in claims.CLAIMS]
    assert read[0]["interval"]["low"] > 0.5 and read[0]["interval"]["seeds"] == 3
    assert read[0]["verdict"] == "reproduced" and "{" not in read[1]["test"] + read[1]["control"]
    assert f"{len(TESTABLE)} reproduced" in tally(found)


def test_the_readme_table_stands_between_its_markers():
    begin, end = "<!-- claims:begin -->", "<!-- claims:end -->"
    readme = f"before {begin}\nold | \\1 table\n{end} after"
    once = between_markers(readme, "claims", "| new \\1 |")
    assert once == f"before {begin}\n| new \\1 |\n{end} after"
    assert once == between_markers(once, "claims", "| new \\1 |")
    with pytest.raises(ValueError, match="needs the markers"):
        between_markers("no markers", "claims", "table")


def test_readme_holds_the_table_of_the_committed_results(root):
    results, readme = root / "results" / "tiny-many", root / "README.md"
    if not results.is_dir() or not readme.is_file():
        pytest.skip("results/tiny-many or README.md is not there yet: nothing to compare")
    try:
        measured = claims.measure(Evidence.load(results))
    except MissingError as error:
        pytest.skip(f"the committed results are older than this code: {error}")
    text = readme.read_text(encoding="utf-8")
    assert between_markers(text, "claims", to_readme(measured)) == text, (
        "run: python -m latlib.report.claims --results results/tiny-many --readme README.md"
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


def verdict_of(name, expected=Verdict.REPRODUCED):
    return lambda found: found[name].verdict == expected


# What the README says did not hold, and what of the committed results has to be so for it.
DIRECTIONS = ("concentrates", "strongest-vector", "resists-reference", "weaker-to-own")
SAID = {
    "the away loss's and not the attack's": verdict_of("away-resists-prefill"),
    "without any attack nothing gets through either": lambda f: (
        f["attack-resists-prefill"].ceiling < 0.01
    ),
    "at least half of LAT's gain over plain fine-tuning": lambda f: (
        f["away-lowers-asr"].interval.estimate >= f["attack-lowers-asr"].interval.estimate
    ),
    "LAT with a radius of nothing gives more of it": lambda f: (
        f["radius-matters"].interval.estimate < f["attack-lowers-asr"].interval.estimate
    ),
    "only the rest is due to the radius": verdict_of("radius-matters"),
    "LAT leaks more than AT at other sites": verdict_of("rival-other-sites"),
    "at the embedding and in encodings": lambda f: (
        verdict_of("rival-embedding")(f) and verdict_of("rival-encodings")(f)
    ),
    "keeps more encoded harmless answers": verdict_of("rival-answers-encoded"),
    "leetspeak gets through it": verdict_of("leet-gap"),
    "costs no answers to plain or harmful-sounding requests": lambda f: (
        verdict_of("eps-too-large-plain", Verdict.NOT_REPRODUCED)(f)
        and verdict_of("eps-too-large-scary", Verdict.NOT_REPRODUCED)(f)
    ),
    "only to encoded ones": verdict_of("eps-too-large-encoded"),
    "Of the four claims on refusal directions none is reproduced": lambda f: (
        not any(verdict_of(name)(f) for name in DIRECTIONS)
    ),
    "the concentration in two components is real and small": verdict_of(
        "concentrates", Verdict.NEGLIGIBLE
    ),
    "open too few models": lambda f: any(
        "own direction" in doubt for name in DIRECTIONS for doubt in f[name].doubts
    ),
}


@pytest.fixture(scope="module")
def committed(root):
    measured = claims.measure(Evidence.load(root / "results" / "tiny-many"))
    return {claim.id: claim for claim in measured}


@pytest.mark.parametrize("words", SAID)
def test_what_the_readme_says_did_not_hold_is_what_the_committed_results_say(
    root, committed, words
):
    text = " ".join((root / "README.md").read_text(encoding="utf-8").split())
    start, end = text.index("**What did not hold.**"), text.index("<!-- claims:begin -->")
    assert words in text[start:end]
    assert SAID[words](committed)
