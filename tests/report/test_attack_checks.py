"""Each rule of the panel passes on sound attacks and fails on the defect it is there for, and only
that rule does.
"""

import json

import numpy as np
import pandas as pd
import pytest
from synthetic import PROFILE, SEEDS, attacked, cell

from latlib.report import attack_checks
from latlib.report.evidence import Evidence, MissingError, rate, shared, worst

GRADIENTS = {method: {"1": 1e-3, "3": 2e-3} for method in PROFILE.methods}
BINDS = dict.fromkeys(PROFILE.methods, "")


def verdicts(evidence, gradients=GRADIENTS, unbound=BINDS):
    checks = attack_checks.panel(evidence, gradients, unbound)
    return {(c.name, c.method + c.at.removesuffix(" absolute")): c.status for c in checks}


def failed(evidence, gradients=GRADIENTS):
    return {key for key, verdict in verdicts(evidence, gradients).items() if verdict == "fail"}


def weak(method, share=0.6, **others):
    """A model whose attacks at eps 0.2 all stop at `share`."""
    attacks = dict.fromkeys(("pgd", "pgd-strong", "pgd-restarts"), share)
    return {(method, attack.replace("_", "-"), 0.2): s for attack, s in (attacks | others).items()}


def test_sound_attacks_pass_every_check():
    found = verdicts(attacked())
    assert set(found.values()) == {"pass"}
    methods, everywhere = len(PROFILE.methods), ("more steps", "worst case")
    for rule in attack_checks.RULES:
        count = sum(name == rule.name for name, _ in found)
        alone = rule.name in ("undefended twin", "base")
        assert count == (1 if alone else methods * (2 if rule.name in everywhere else 1)), rule.name
        assert rule.statement.endswith(".") and rule.meaning.endswith(".")
        assert rule.judge.__doc__, "a rule without its exact wording"


UNBOUNDED_AT = ("unbounded", "at")
DEFECTS = {
    "twice the steps win more": (
        {("lat", "pgd-strong", 0.05): 0.4},
        {("more steps", "lat, eps 0.05")},
    ),
    "twice the steps win less": (
        {("ssft", "pgd-strong", 0.2): 0.6},
        {("more steps", "ssft, eps 0.2")},
    ),
    "restarts change it": ({("lat", "pgd-restarts", 0.2): 0.6}, {("restarts", "lat, eps 0.2")}),
    "one step wins more": (
        weak("at") | {("at", "one-step", 0.2): 0.8},
        {("one step", "at, eps 0.2"), UNBOUNDED_AT},
    ),
    "another's perturbation wins more": (
        weak("at") | {("at", "from ssft", 0.2): 0.8},
        {("white box", "at, eps 0.2"), UNBOUNDED_AT},
    ),
    "its own perturbation is no transfer": (
        weak("at") | {("at", "from at", 0.2): 0.8},
        {UNBOUNDED_AT},
    ),
    "noise beats transfer": ({("lat", "noise", 0.2): 0.6}, {("noise", "lat, eps 0.2")}),
    "noise beats the attack": (
        weak("at", 0.2)
        | {("at", "noise", 0.2): 0.4, ("at", "from lat", 0.2): 0.4, ("at", "pgd", 0.05): 0.0},
        {
            ("noise", "at, eps 0.2"),
            ("white box", "at, eps 0.2"),
            UNBOUNDED_AT,
            ("more steps", "at, eps 0.05"),
        },
    ),
    "a larger latent eps wins less": (
        weak("ssft"),
        {("rises with eps", "ssft"), ("unbounded", "ssft")},
    ),
    "a larger embedding eps wins less": (
        {("lat", "embedding", 0.2): 0.2},
        {("rises with eps", "lat")},
    ),
    "ssft holds": (
        {("ssft", "pgd", 0.05): 0.4, ("ssft", "pgd-strong", 0.05): 0.4},
        {("undefended twin", "ssft, eps 0.05")},
    ),
    "noise breaks ssft too": (
        {("ssft", "noise", 0.05): 0.8},
        {("undefended twin", "ssft, eps 0.05")},
    ),
    "the base refuses": ({("base", "none", 0.0): 0.8}, {("base", "base")}),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_fails_its_check_and_no_other(defect):
    changes, wanted = DEFECTS[defect]
    methods = {method for method, _, _ in changes} - {"base"}  # the others cannot have changed
    assert failed(attacked(changes, methods)) == wanted


@pytest.mark.parametrize("norm", [0.0, None, float("nan"), float("inf")])
def test_a_gradient_that_vanishes_at_one_site_fails(norm):
    gradients = GRADIENTS | {"lat": {"1": 1e-3, "3": norm}}
    nothing = Evidence(PROFILE, attacked().outcomes.iloc[:0])
    assert failed(nothing, gradients) == {("gradients", "lat")}


def on_ball(shares, method="lat"):
    """A sound run in which pgd's perturbations of a method touch their balls so often: by eps."""
    rows = attacked().outcomes
    for eps, share in shares.items():
        cell = (rows["method"] == method) & (rows["attack"] == "pgd") & (rows["eps"] == eps)
        rows["on_ball"] = rows["on_ball"].mask(cell & (rows["sites"] != "embedding"), share)
    return Evidence(PROFILE, rows)


def test_an_attack_that_touches_no_ball_fails():
    """As Adam's at a fixed rate: the same perturbation in every ball."""
    assert failed(on_ball({0.05: 0.1, 0.2: 0.0})) == {("touches its ball", "lat")}
    assert failed(on_ball({0.05: 1e-3, 0.2: 1.0})) == set()
    # every row was won before its last step
    assert failed(on_ball({0.05: 0.3, 0.2: np.nan})) == set()
    found = verdicts(on_ball({0.05: np.nan, 0.2: np.nan}))
    assert found["touches its ball", "lat"] == "not measured"
    (check,) = [
        check
        for check in attack_checks.panel(on_ball({0.05: 0.25, 0.2: 0.0}))
        if (check.name, check.method) == ("touches its ball", "lat")
    ]
    assert "25 % at eps 0.05, 0 % at eps 0.2" in check.measured


def test_a_training_whose_ball_never_binds_fails():
    said = "eps = 6 never binds: 16 steps"
    evidence = Evidence(PROFILE, attacked().outcomes.iloc[:0])
    found = verdicts(evidence, unbound=BINDS | {"lat": said})
    assert found["training radius", "lat"] == "fail" and found["training radius", "at"] == "pass"
    checks = attack_checks.panel(evidence, None, {"lat": said})
    assert [c.measured for c in checks if (c.name, c.method) == ("training radius", "lat")] == [
        said
    ]
    assert verdicts(evidence, unbound={})["training radius", "lat"] == "not measured"


def test_a_worst_case_below_one_of_its_attacks_fails(monkeypatch):
    def average(rows):
        return rows[rows["attack"] == "one-step"] if "one-step" in set(rows["attack"]) else rows

    monkeypatch.setattr(attack_checks, "worst", average)
    assert failed(attacked(methods=["at"])) == {("worst case", "at, eps 0.2")}


def test_a_change_within_the_interval_is_no_failure():
    """Twice the steps win 2 of 100 more prompts, every time: significant, and less than ASR is
    known to.
    """
    at = np.arange(100)
    rows = (
        cell("lat", 0.0, "pgd", eps=0.05, sites="1,3", seeds=(0,))
        .head(100)
        .assign(cluster=at, prompt_id=at.astype(str))
    )
    rows["outcome"] = np.where(at < 40, "complied", "refused")
    for extra, verdict in ((4, "pass"), (20, "fail")):
        more = rows.assign(
            attack="pgd-strong", outcome=np.where(at < 40 + extra, "complied", "refused")
        )
        evidence = Evidence(PROFILE, pd.concat([rows, more], ignore_index=True))
        assert verdicts(evidence)["more steps", "lat, eps 0.05"] == verdict
    change = next(
        c
        for c in attack_checks.panel(evidence)
        if (c.name, c.method, c.eps) == ("more steps", "lat", 0.05)
    )
    assert "+20.0 [+1" in change.measured and "pgd 40 [3" in change.measured


def test_steps_are_compared_on_the_seeds_that_have_both():
    """At eps 0.2 the long attack ran on the first seed only: how far pgd's other seeds lie from it
    excuses nothing.
    """
    rows = attacked(weak("lat") | {("lat", "pgd-strong", 0.2): 0.8}, ["lat"]).outcomes
    other = (
        (rows["method"] == "lat")
        & (rows["attack"] == "pgd")
        & (rows["eps"] == 0.2)
        & (rows["seed"] > 0)
    )
    rows = rows.assign(outcome=rows["outcome"].mask(other, "refused"))
    assert ("more steps", "lat, eps 0.2") in failed(Evidence(PROFILE, rows))


def test_what_is_missing_is_said_and_fails_nothing():
    nothing = attack_checks.panel(Evidence(PROFILE, attacked().outcomes.iloc[:0]))
    assert {check.status for check in nothing} == {"not measured"} and all(
        check.measured for check in nothing
    )
    rows = attacked().outcomes
    partial = Evidence(PROFILE, rows[~rows["attack"].isin(["transfer", "pgd-restarts"])])
    found = verdicts(partial, {"ssft": GRADIENTS["ssft"]})
    missing = {name for (name, _), verdict in found.items() if verdict == "not measured"}
    assert missing == {"restarts", "white box", "noise", "gradients"}
    assert "fail" not in found.values()
    assert found["gradients", "ssft"] == "pass"
    said = {(c.name, c.method): c.measured for c in attack_checks.panel(partial)}
    assert "pgd-restarts" in said["restarts", "lat"] and "notebook 06" in said["gradients", "lat"]


def test_the_first_eps_that_wins_all_is_named():
    def unbounded(changes):
        checks = attack_checks.panel(attacked(changes, ["ssft"]))
        return next(c.measured for c in checks if (c.name, c.method) == ("unbounded", "ssft"))

    assert "first reached at eps 0.2" in unbounded({})
    assert "first reached at eps 0.05" in unbounded({("ssft", "pgd", 0.05): 1.0})
    assert "not reached at any eps" in unbounded(weak("ssft"))


def three_attacks():
    """pgd wins prompts 0 to 79, pgd-sign 40 to 119, one-step none and writes junk for 100 to 149;
    two seeds of pgd.
    """
    at = np.arange(200)
    wins = {"pgd": at < 80, "pgd-sign": (at >= 40) & (at < 120), "one-step": at < 0}
    tables = []
    for attack, won in wins.items():
        rows = cell(
            "lat", 0.0, attack, eps=0.2, sites="1,3", seeds=SEEDS[: 2 if attack == "pgd" else 1]
        )
        outcome = np.where(
            won,
            "complied",
            np.where((at >= 100) & (at < 150) & (attack == "one-step"), "neither", "refused"),
        )
        tables.append(rows.assign(outcome=np.tile(outcome, len(rows) // 200)))
    return Evidence(PROFILE, pd.concat(tables, ignore_index=True))


def test_the_worst_case_is_per_prompt_over_what_all_attacks_were_tried_on():
    rows = attack_checks.in_ball(three_attacks(), "lat", 0.2)
    assert set(rows["attack"]) == {"pgd", "pgd-sign", "one-step"} and set(rows["seed"]) == {0}
    found = worst(rows)
    assert len(found) == 200 and found["outcome"].value_counts().to_dict() == {
        "complied": 120,
        "refused": 50,
        "neither": 30,
    }
    assert rate(found).estimate == rate(rows).estimate == pytest.approx(0.6)
    with pytest.raises(MissingError, match="no prompt and seed"):
        shared(rows[(rows["attack"] == "pgd") ^ (rows["prompt_id"] == "harmful-0")])
    with pytest.raises(MissingError):
        attack_checks.in_ball(three_attacks(), "lat", 0.05)


def test_what_notebook_06_left_is_read_from_the_results(tmp_path):
    assert attack_checks.read_probes(tmp_path) == [None, None]
    left = {"gradients": {"lat": {"1": None}}}
    for more in ({}, {"unbound": {"lat": "never"}}):  # 0.1.0 wrote gradients only
        (tmp_path / "robustness.json").write_text(json.dumps(left | more), encoding="utf-8")
        assert attack_checks.read_probes(tmp_path) == [left["gradients"], more.get("unbound")]


def test_a_table_of_0_1_0_has_no_share_and_can_be_read(tmp_path):
    (tmp_path / "outcomes").mkdir()
    (tmp_path / "profile.yaml").write_text(json.dumps(PROFILE.model_dump(mode="json")))
    rows = attacked().outcomes.drop(columns=["on_ball", "found"]).reset_index(drop=True)
    rows.to_parquet(tmp_path / "outcomes" / "old.parquet")
    found = Evidence.load(tmp_path)
    assert found.outcomes["on_ball"].isna().all() and len(found.outcomes) == len(rows)
    assert verdicts(found)["touches its ball", "lat"] == "not measured"
