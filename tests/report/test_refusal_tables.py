"""The matrix, the paper beside it, and corrected comparisons, from evidence in which each effect is
known.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from synthetic import PROFILE, SEEDS, ablated, cell, evidence

from latlib.config.profile import Profile
from latlib.report import refusal_tables
from latlib.report.evidence import Evidence, MissingError, not_defended, not_in_vain
from latlib.report.stats import holm

LAT = "lat-untargeted"
UNTARGETED = Profile(
    **PROFILE.model_dump(exclude={"methods"}),
    methods={**PROFILE.methods, LAT: {"attack.targeted": False}},
)


def with_untargeted(refused: dict, plain: float = 0.0) -> Evidence:
    """refused: (target, vector) -> share refused under the rule `fixed`. plain: compliance before
    ablation.
    """
    tables = [
        ablated(target, 1 - share, vector, "fixed") for (target, vector), share in refused.items()
    ]
    tables += [ablated(target, plain, "nothing") for target in ("ssft", "at", LAT)]
    return Evidence(UNTARGETED, pd.concat(tables, ignore_index=True))


def test_targets_come_in_order_and_the_sweep_by_depth():
    assert refusal_tables.targets(evidence(True)) == ["ssft", "at", "lat"]
    figure = refusal_tables.site_sweep(evidence(True)).figure
    assert list(figure.axes[0].lines[0].get_xdata()) == ["embedding", "0", "2", "10"]
    plt.close(figure)


def test_the_matrix_has_every_cell_with_three_outcomes():
    table = refusal_tables.matrix(evidence(True))
    assert set(table.index) == {
        (t, v)
        for t in ("ssft", "at", "lat")
        for v in ("ssft", "at", "lat", "nothing", "random", "shuffled")
    }
    one = table.loc[("at", "ssft")]
    assert one["complied"].estimate == pytest.approx(0.2) and one[
        "refused"
    ].estimate == pytest.approx(0.8)
    assert one["n"] == 600 and one["seeds"] == 3 and one["paper"] == "24.04 (SE 1.87)"
    assert table.loc[("at", "random"), "complied"].estimate == 0.0


def test_a_method_that_was_not_ablated_is_left_out_of_the_matrix():
    # evaluation.sources may name fewer models than are compared
    table = refusal_tables.matrix(evidence(True), names=["ssft", "rt", "lat"])
    assert list(table.unstack(sort=False).index) == ["ssft", "lat"]
    figure, axes = refusal_tables.axes_of()
    alt, _ = refusal_tables.draw_matrix(axes[0, 0], evidence(True), names=["ssft", "rt", "lat"])
    assert "SSFT: " in alt and "RT: " not in alt
    plt.close(figure)


def test_an_undefended_target_is_marked():
    found = evidence(True)
    assert not_defended(found, ["ssft", "lat"]) == []
    half = Evidence(found.profile, ablated("ssft", 0.5, "nothing"))
    assert not_defended(half, ["ssft"]) == ["ssft"]
    sides = {("ssft", "ssft"): 0.5, ("ssft", LAT): 0.2, (LAT, "ssft"): 0.5, (LAT, LAT): 0.2}
    sides |= {("at", "ssft"): 0.5, ("at", LAT): 0.2, ("at", "at"): 0.5}
    table = refusal_tables.comparisons(with_untargeted(sides, plain=0.5))
    assert table["not defended"].str.contains("SSFT").any() and (table["not defended"] != "").all()


def test_comparisons_have_the_sign_of_the_claim_and_are_corrected_together():
    sides = {("ssft", "ssft"): 0.8, ("ssft", LAT): 0.2, (LAT, "ssft"): 1.0, (LAT, LAT): 0.8}
    sides |= {("at", "ssft"): 0.4, ("at", LAT): 0.8, ("at", "at"): 0.8}
    table = refusal_tables.comparisons(with_untargeted(sides)).set_index("claim")
    points = [interval.estimate for interval in table["here"]]
    assert points == pytest.approx([0.6, -0.4, 0.2, 0.0, 0.0])
    assert table["p"].iloc[:3].max() < 1e-3 and table["p"].iloc[3:].tolist() == [1, 1]
    assert table["p, Holm"].tolist() == pytest.approx(holm(table["p"].tolist()))
    assert table["paper"].tolist() == pytest.approx([9.61, 10.39, 5.39, 3.46, 21.16])
    assert table["paper p"].iloc[3] == pytest.approx(0.152, abs=0.001)  # p = .15 in the paper
    assert table["paper p"].iloc[2] == pytest.approx(0.04, abs=0.005)  # p = .04 in the paper
    text = refusal_tables.comparisons_markdown(table.reset_index())
    assert "+3.5 (0.15)" in text and "+60.0 [" in text and text.count("\n") == 6


def test_without_both_sides_there_is_no_comparison():
    with pytest.raises(MissingError, match="both of its sides: run notebook 04"):
        refusal_tables.comparisons(Evidence(PROFILE, ablated("ssft", 0.2, "ssft", "fixed")))
    with pytest.raises(MissingError, match="no outcome"):
        refusal_tables.matrix(Evidence(PROFILE, cell("ssft", 0.2)))


def test_clouds_far_apart_are_said_to_be(monkeypatch):
    rng = np.random.default_rng(0)
    near, far = (torch.tensor(rng.normal(size=(30, 8)) + shift) for shift in (0, 20))
    figure, alt, caption = refusal_tables.scatter(
        {"ssft": ({0: far}, {0: near}), "lat": ({0: near[:15]}, {0: near[15:]})}, [0]
    )
    assert len(figure.axes) == 2 and len(figure.axes[0].lines) == 2
    gaps = [float(part.split("centres ")[1].split()[0]) for part in alt.split(";")]
    assert gaps[0] == pytest.approx(2.0, abs=0.2) and gaps[1] < 1.3


def test_every_seed_counts():
    assert refusal_tables.matrix(evidence(False))["seeds"].eq(len(SEEDS)).all()


def test_by_seed_the_strongest_of_all_vectors_is_named():
    tables = [ablated("ssft", 0.2, "ssft", "best"), ablated("ssft", 1.0, "nothing")]
    tables += [
        ablated("ssft", 0.4, "lat", "best", seeds=(0,)),
        ablated("ssft", 0.4, "random", draw=2, seeds=(1,)),
        ablated("ssft", 0.6, "ssft", "site-sweep", site="3", seeds=(2,)),
    ]
    tables += [cell("ssft", 0.8), ablated("ssft", 0.8, "at", "best", prompts="harmless")]
    evidence = Evidence(PROFILE, pd.concat(tables, ignore_index=True))
    table = refusal_tables.seeds_table(evidence)
    assert table.loc["ssft", "strongest"].tolist() == [
        "lat, best",
        "random 2",
        "ssft, site-sweep 3",
    ]
    assert table["ASR"].tolist() == pytest.approx([0.4, 0.4, 0.6])
    assert table["own, best"].tolist() == pytest.approx([0.2] * 3)


def test_massive_dimensions_of_every_model_that_was_measured():
    e = evidence(True)
    with pytest.raises(MissingError, match="run notebook 04 in a new run folder"):
        refusal_tables.massive_table(e)
    record = {
        "prompts": 200, "largest": 43.72, "times_median": 463.3, "share": [0.746, 0.732],
        "Sun": {}, "share_without_Sun": [0.746, 0.732],
        "Kang": {"1415": 50, "2533": 71}, "share_without_Kang": [0.462, 0.33],
    }  # fmt: skip
    e.variance["lat"]["1"]["massive"] = record
    table = refusal_tables.massive_table(e)
    assert list(table.index) == [("lat", "1")]
    row = table.loc[("lat", "1")]
    assert row["Sun et al."] == "none" and row["Kang et al."] == "1415 (50), 2533 (71)"
    assert row["two components"] == row["without Sun's"] == "74.6; 73.2"
    assert row["without Kang's"] == "46.2; 33.0"
    assert row["largest"] == "43.7" and row["times median"] == "463"


def searched(rule, found: dict, target="ssft", share=0.6):
    """Rows of a target without its own direction. found: seed -> whether there was one."""
    tables = [
        ablated(target, share if there else 0.0, target, rule, seeds=(seed,), found=there)
        for seed, there in found.items()
    ]
    return [*tables, ablated(target, 0.0, "nothing")]


def test_a_vector_that_was_not_found_is_no_weak_one():
    """Its seed counts nowhere; where no seed has one there is no share but the words."""
    tables = searched("best", {0: True, 1: False, 2: True})
    tables += searched("best", dict.fromkeys(SEEDS, False), target="lat")
    found = Evidence(PROFILE, pd.concat(tables, ignore_index=True))
    table = refusal_tables.matrix(found)
    own = table.loc[("ssft", "ssft")]
    assert (own["complied"].estimate, own["seeds"], own["found"]) == (0.6, 2, "2 of 3")
    vain = table.loc[("lat", "lat")]
    assert pd.isna(vain["complied"]) and vain["found"] == "0 of 3"
    figure, alt, caption = refusal_tables.ablation_matrix(found)
    assert [t.get_text() for t in figure.axes[0].texts].count("not\nfound") == 1
    assert "Not found: LAT on LAT." in alt and "nan" not in alt
    plt.close(figure)
    rules = refusal_tables.rules_table(found)
    assert rules.loc[("lat", "best"), "complied"] == "not found"
    assert rules.loc[("ssft", "best"), "complied"].estimate == 0.6
    by_seed = refusal_tables.seeds_table(found)["own, best"]
    assert by_seed["ssft"].round(6).tolist()[0] == 0.6 and by_seed.isna().sum() == 4


def test_where_nothing_was_searched_every_vector_counts():
    old = evidence(True)
    assert old.outcomes["found"].isna().all()
    assert len(not_in_vain(old.outcomes)) == len(old.outcomes)
