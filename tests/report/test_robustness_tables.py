"""The tables say what the outcome table holds, per prompt; the figures show it with words, numbers
and pixels.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from synthetic import PROFILE, SEEDS, ablated, attacked, cell, evidence

from latlib.report import attack_checks, figures, plots, robustness_tables
from latlib.report.evidence import Evidence, MissingError
from latlib.report.tables import printed, records

FIGURES = (robustness_tables.heat_map, robustness_tables.transfer_matrix)


@pytest.fixture(scope="module")
def run():
    return attacked({("lat", "pgd-all-sites", 0.2): 0.8, ("lat", "suffix-gcg", 0.2): 0.6})


def without(run, **column):
    """The run without the rows in which every column has the value."""
    rows = run.outcomes
    drop = np.logical_and.reduce([rows[name] == value for name, value in column.items()])
    return Evidence(run.profile, rows[~drop])


@pytest.mark.parametrize("draw", FIGURES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("source", ["attacked", "whole"])
def test_a_figure_has_words_labels_and_pixels(run, draw, source, tmp_path):
    figure, alt, caption = draw(run if source == "attacked" else evidence(True))
    assert len(alt.split()) > 8 and any(c.isdigit() for c in alt) and "nan" not in alt
    for ax in figure.axes:
        assert ax.get_title() and ax.get_xlabel(), "a panel without title or axis label"
    image = Image.open(plots.save(figure, tmp_path / "f.png"))
    assert image.size[0] > 400 and len(np.unique(np.asarray(image.convert("L")))) > 10
    assert (tmp_path / "f.png").stat().st_size < 150_000 and not plt.fignum_exists(figure.number)


def test_the_heat_map_has_a_number_in_every_cell_and_hatches_what_is_missing(run):
    figure, alt, caption = robustness_tables.heat_map(without(run, method="at", attack="system"))
    (ax,), table = figure.axes, robustness_tables.attack_table(run)
    assert (
        len(ax.texts) == table.size - 1 and [p.get_hatch() for p in ax.patches].count("////") == 1
    )
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert (
        len(labels) == len(table)
        and "eps 0.2 absolute: pgd, other sites (n = 200, 1 seed)" in labels
        and "no attack (n = 600, 3 seeds)" in labels
    )
    row = labels.index("eps 0.05 absolute: pgd (n = 600, 3 seeds)")
    texts = {tuple(map(round, t.get_position())): t.get_text() for t in ax.texts}
    assert texts[0, row] == "80 [76, 83]" and texts[2, row] == "0 [0, 9]"
    assert (
        "LAT: eps 0.05 absolute: noise 0 %, eps 0.05 absolute: pgd 0 %" in alt
        and "suffix-gcg 60 %" in alt
    )
    assert alt.count("system 20 %") == 2, "a cell that was not measured is said"
    frames = [p for p in ax.patches if p.get_hatch() is None]
    assert len(frames) == 6, "the worst case of three methods at two radii"
    plt.close(figure)


def test_attacks_of_one_radius_are_compared_on_the_same_seeds(run):
    table = robustness_tables.attack_table(run)
    assert {
        table.loc[("eps 0.2 absolute", a), "lat"].seeds
        for a in ("noise", "pgd", "pgd-sign", "worst case per prompt")
    } == {1}
    assert {
        table.loc[("eps 0.05 absolute", a), "lat"].seeds for a in ("noise", "pgd", "pgd-strong")
    } == {3}


def test_the_transfer_matrix_reads_from_row_to_column(run):
    rows = run.outcomes
    into = (rows["method"] == "at") & (rows["source"] == "lat")
    # seeds on which nothing was transferred
    into |= (rows["attack"] == "noise") & (rows["seed"] > 0)
    figure, alt, caption = robustness_tables.transfer_matrix(
        Evidence(run.profile, rows.assign(outcome=rows["outcome"].mask(into, "complied")))
    )
    assert "AT: from SSFT 40 %, from AT 40 %, from LAT 100 %" in alt
    assert "LAT: from SSFT 40 %, from AT 40 %, from LAT 40 %, noise 0 %" in alt
    texts = {tuple(map(round, t.get_position())): t.get_text() for t in figure.axes[0].texts}
    assert texts[1, 2] == "100 [91, 100]" and texts[2, 1] == "40 [33, 47]" and len(texts) == 12
    corners = sorted(
        (round(p.get_x() + 0.45), round(p.get_y() + 0.45)) for p in figure.axes[0].patches
    )
    assert corners == [(0, 0), (1, 1), (2, 2)], "framed: into the model it was found on"
    plt.close(figure)


def test_a_worst_case_is_of_prompts_and_not_of_means():
    at = np.arange(200)
    tables = []
    for attack, won in {"pgd": at < 80, "pgd-sign": (at >= 40) & (at < 120)}.items():
        rows = cell("lat", 0.0, attack, eps=0.2, sites="1,3", seeds=(0,))
        tables.append(
            rows.assign(
                outcome=np.where(won, "complied", np.where(at >= 180, "neither", "refused"))
            )
        )
    rows = cell("lat", 0.0, "transfer", eps=0.2, sites="1,3", seeds=(0,), source="at")
    tables.append(rows.assign(outcome=np.where((at >= 120) & (at < 140), "complied", "refused")))
    table = robustness_tables.worst_case_table(
        Evidence(PROFILE, pd.concat(tables, ignore_index=True))
    )
    row = table.loc[("main sites, eps 0.2 absolute", "lat")]
    assert [row[o].estimate for o in ("complied", "refused", "neither")] == pytest.approx(
        [0.6, 0.3, 0.1]
    )
    assert (row["attacks"], row["n"], row["seeds"]) == (2, 200, 1)
    everything = table.loc[("any latent attack, eps 0.2 absolute", "lat")]
    assert everything["complied"].estimate == pytest.approx(0.7) and everything["attacks"] == 3


def test_the_worst_case_table_names_every_threat_and_its_seeds(run):
    table = robustness_tables.worst_case_table(run)
    by_threat = {
        threat: part.droplevel("threat").loc["lat"]
        for threat, part in table.groupby(level="threat")
    }
    asr = {threat: row["complied"].estimate for threat, row in by_threat.items()}
    wanted = {
        "main sites, eps 0.05 absolute": 0.0,
        "main sites, eps 0.2 absolute": 1.0,
        "other sites, eps 0.2 absolute": 0.6,
    }
    wanted |= {
        "all sites, eps 0.2 absolute": 0.8,
        "transferred, eps 0.2 absolute": 0.4,
        "any latent attack, eps 0.2 absolute": 1.0,
    }
    wanted |= {
        "embedding, eps 0.1 absolute": 0.4,
        "embedding, eps 0.2 absolute": 0.6,
        "no attack": 0.0,
        "any typed": 0.6,
    }
    wanted |= {
        "prefill": 0.4,
        "many-shot": 0.2,
        "system": 0.2,
        "suffix-random": 0.2,
        "suffix-gcg": 0.6,
    }
    assert asr == pytest.approx(wanted)
    assert (
        by_threat["main sites, eps 0.05 absolute"]["seeds"] == 3
        and by_threat["any typed"]["seeds"] == 1
    )
    assert by_threat["transferred, eps 0.2 absolute"]["attacks"] == 2, (
        "its own perturbation is no transfer"
    )
    wide = robustness_tables.worst_case_wide(table)
    assert wide.loc["suffix-gcg", "LAT"] == "60 [53, 67] (refused 40, neither 0)"
    assert wide.loc["main sites, eps 0.2 absolute", "attacks, rows, seeds"] == "6, 200, 1"


def test_typed_attacks_come_with_what_was_understood():
    rows = cell("lat", 0.4, "suffix-gcg", seeds=(0,))
    broken = rows.assign(outcome="neither", understood=False, attack="suffix-random")
    half = rows.assign(understood=rows["outcome"] == "complied")
    table = robustness_tables.typed_table(
        Evidence(PROFILE, pd.concat([half, broken], ignore_index=True))
    )
    gcg, junk = (table.loc[(attack, "lat")] for attack in ("suffix-gcg", "suffix-random"))
    assert (
        gcg["complied"].estimate == pytest.approx(0.4)
        and gcg["complied, understood"].estimate == 1.0
    )
    assert (
        gcg["twin understood"].estimate == pytest.approx(0.4)
        and gcg["complied, understood"].n == 80
    )
    assert junk["neither"].estimate == 1.0 and junk["complied, understood"] is None
    assert printed(table).loc[("suffix-random", "LAT"), "complied, understood"] == "-"


def test_what_a_defence_takes_off_is_paired_and_over_the_same_attacks(run):
    gain = robustness_tables.gain_table(run)
    assert list(gain) == ["at", "lat"]
    assert gain.loc["main sites, eps 0.05 absolute", "lat"].estimate == pytest.approx(0.8)
    assert gain.loc["main sites, eps 0.05 absolute", "at"].estimate == pytest.approx(0.6)
    assert gain.loc["suffix-gcg", "lat"].estimate == pytest.approx(-0.4)
    text = printed(gain, sign=True)
    assert (
        text.loc["suffix-gcg", "LAT"] == "-40.0 [-52.2, -26.2] points"
        and "+80.0" in text.iloc[0]["LAT"]
    )
    uneven = without(run, method="lat", attack="prefill")
    assert printed(robustness_tables.gain_table(uneven)).loc["prefill", "LAT"] == "-"
    stronger = without(
        attacked({("ssft", "pgd-strong", 0.05): 1.0}), method="lat", attack="pgd-strong"
    )
    gain = robustness_tables.gain_table(stronger)
    assert gain.loc["main sites, eps 0.05 absolute", "lat"].estimate == pytest.approx(0.8), (
        "LAT never faced the longer one"
    )


def test_tables_become_plain_values(run):
    rows = records(robustness_tables.worst_case_table(run))
    assert json.loads(json.dumps(rows)) == rows
    assert rows[0]["threat"] == "main sites, eps 0.05 absolute" and rows[0]["complied"]["n"] == 600
    assert {"low", "high", "estimate", "seeds"} <= set(rows[0]["refused"])


def test_the_panel_is_printed_plainly():
    checks = attack_checks.panel(
        attacked({("lat", "pgd-strong", 0.05): 0.4}, ["lat"]), {"lat": {"1": 0.1}}
    )
    grid = robustness_tables.panel_grid(checks)
    assert (
        grid.loc["more steps, eps 0.05 absolute", "LAT"] == "fail"
        and grid.loc["more steps, eps 0.2 absolute", "LAT"] == "pass"
    )
    assert grid.loc["base", "LAT"] == "" and grid.loc["base", "base"] == "pass"
    assert grid.loc["restarts, eps 0.2 absolute", "AT"] == "not measured"
    text = robustness_tables.panel_findings(checks)
    assert " 1 failed, " in text.splitlines()[0] and text.count("\n* ") == 1
    (failure,) = (check for check in checks if check.status == "fail")
    assert (
        f"**more steps failed on LAT, eps 0.05 absolute**: {failure.measured}. {failure.meaning}"
        in text
    )
    table = robustness_tables.panel_markdown(checks).splitlines()
    assert len(table) == 2 + len(checks)
    assert (
        "| more steps | LAT, eps 0.05 absolute | pgd-strong minus pgd +40.0 [+32.2, +47.3] points;"
        " pgd 0 [0, 9] % | fail |" in table
    )
    assert robustness_tables.rules_markdown(attacked()).count("\n") == 1 + len(attack_checks.RULES)


def test_without_attacks_it_says_which_notebook_to_run(run, capsys):
    nothing = Evidence(run.profile, run.outcomes.iloc[:0])
    for table in ("worst_case_table", "typed_table", "attack_table", "gain_table"):
        with pytest.raises(MissingError, match="run notebook 06"):
            getattr(robustness_tables, table)(nothing)
    figures.show_measured(nothing, *FIGURES)
    said = capsys.readouterr().out
    assert said.count("run notebook 06") == 2 and not plt.get_fignums()
    # a run of before
    old = Evidence(run.profile, cell("lat", 0.2, "pgd", eps=0.05, sites="1,3", seeds=SEEDS))
    assert robustness_tables.worst_case_table(old)["attacks"].tolist() == [1]


def test_who_has_the_weights_can_remove_a_learned_direction(run):
    """A row of its own, said to be that; a search that failed was an attack all the same."""
    tables = [run.outcomes]
    for method, share in {"ssft": 1.0, "at": 0.4, "lat": 0.2}.items():
        found = share > 0.3
        tables.append(ablated(method, share, method, "learned", found=found))
    found = Evidence(PROFILE, pd.concat(tables, ignore_index=True))
    threat = robustness_tables.worst_case_table(found).loc["weights, learned direction removed"]
    assert [threat.loc[m, "complied"].estimate for m in ("ssft", "at", "lat")] == [1.0, 0.4, 0.2]
    grid = robustness_tables.attack_table(found)
    assert grid.loc[("weights", "learned direction removed"), "lat"].estimate == 0.2
    assert grid.loc[("typed", "no attack"), "lat"].estimate == 0.0
    assert "weights" not in robustness_tables.attack_table(run).index.get_level_values("group")
