"""No name of a method means anything: a run of other methods renders the whole report."""

import re

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from synthetic import PROFILE, evidence, variance

from latlib.config.profile import Profile
from latlib.report import (
    attack_checks,
    audit_tables,
    claims,
    eps_grid,
    figures,
    refusal_tables,
    robustness_tables,
    run_checks,
)
from latlib.report.evidence import Evidence, MissingError

NAMES = {"ssft": "plain", "lat": "rr"}
METHODS = {"plain": {"attack.steps": 0}, "rr": {"attack.steps": 0, "attack.eps": 0.05}}
OF_THE_PAPERS = re.compile(r"\b(SSFT|LAT|AT|ssft|lat)\b")
FIGURES = (
    figures.security_curve,
    figures.eps_sweep,
    eps_grid.eps_and_kl,
    figures.encodings_bars,
    figures.harmless_bars,
    audit_tables.encoding_heatmap,
    robustness_tables.heat_map,
    robustness_tables.transfer_matrix,
    figures.training_curves,
    figures.spike_figure,
    figures.variance_by_site,
    refusal_tables.variance_bars,
    refusal_tables.ablation_matrix,
    refusal_tables.site_sweep,
    figures.main_figure,
)
TABLES = (
    run_checks.floor_table,
    robustness_tables.worst_case_table,
    robustness_tables.typed_table,
    robustness_tables.gain_table,
    robustness_tables.attack_table,
    refusal_tables.matrix,
    refusal_tables.rules_table,
    refusal_tables.seeds_table,
    refusal_tables.comparisons,
    audit_tables.leet_gap_table,
    audit_tables.price_table,
)


def other_run(**roles) -> Evidence:
    """The synthetic run without AT, its methods called otherwise; neither trained under attack."""
    fields = PROFILE.model_dump(exclude={"methods", "roles", "sweep"})
    profile = Profile(**fields, methods=METHODS, roles=roles)
    rows = evidence(True).outcomes
    rows = rows[(rows["method"] != "at") & (rows["source"] != "at") & (rows["variant"] == "")]
    rows = rows.assign(method=rows["method"].replace(NAMES), source=rows["source"].replace(NAMES))
    shares = {"plain": 0.5, "rr": 0.7}
    tables = {name: {"0": variance(share)} for name, share in shares.items()}
    curve = pd.DataFrame({"step": range(1, 9), "total": 1.0, "toward": 1.0})
    return Evidence(profile, rows, {"rr-seed0": curve}, tables)


@pytest.fixture(scope="module", params=["a twin", "no twin"])
def run(request):
    return other_run(**({"undefended": "plain"} if request.param == "a twin" else {}))


@pytest.mark.parametrize("make", [*FIGURES, *TABLES], ids=lambda make: make.__name__)
def test_every_figure_and_table_is_made_or_says_what_is_missing(run, make):
    try:
        made = make(run)
    except MissingError as missing:
        made = ("", str(missing))
        assert re.search("notebook|this profile has no|training curve has no", made[1])
    words = made[1] if isinstance(made, tuple) else made.to_string()
    plt.close("all")
    assert not OF_THE_PAPERS.search(words), words


def test_most_figures_are_made(run):
    shown = 0
    for draw in FIGURES:
        try:
            draw(run)
            shown += 1
        except MissingError:
            pass
        plt.close("all")
    assert shown >= len(FIGURES) - 4, "sweep, spikes and what needs them"


def test_claims_are_about_the_roles(run):
    found = {claim.id: claim for claim in claims.measure(run)}
    for claim in found.values():
        if claim.effect:
            text = f"{claim.statement} {claim.test} {claim.control} {claim.note} {claim.why}"
            assert not OF_THE_PAPERS.search(text), text
    twin = run.profile.undefended
    broken = found["attack-breaks-undefended"]
    assert twin or broken.why.endswith("this profile has no roles.undefended: the undefended twin")
    assert twin is None or broken.interval
    assert "this profile has no roles.rival" in found["rival-latent"].why
    assert found["leet-gap"].interval


def test_checks_are_put_to_what_there_is(run):
    checks = attack_checks.panel(run)
    assert {check.method for check in checks} == {"plain", "rr", "base"}
    twin = [check for check in checks if check.name == "undefended twin"]
    assert len(twin) == 1
    if run.profile.undefended is None:
        assert twin[0].measured.startswith("this profile has no roles.undefended")
    text = robustness_tables.rules_markdown(run) + robustness_tables.panel_markdown(checks)
    assert not OF_THE_PAPERS.search(text), text
