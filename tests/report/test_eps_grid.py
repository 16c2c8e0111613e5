"""The grid of eps and KL weight: which models belong to it, what is read off them, and a figure
that says it.
"""

import pandas as pd
import pytest
from synthetic import PROFILE, cell, evidence, known

from latlib.report import eps_grid
from latlib.report.evidence import Evidence, MissingError


def test_the_grid_holds_lat_and_the_variants_that_change_eps_or_kl_only():
    cells = eps_grid.grid(evidence(holds=True))
    assert cells.to_dict("index") == {
        "small": {"eps": 0.01, "kl": 0.1},
        "no-kl": {"eps": 0.05, "kl": 0.0},
        "": {"eps": 0.05, "kl": 0.1},
        "large": {"eps": 0.2, "kl": 0.1},
    }
    assert list(cells.index) == ["small", "no-kl", "", "large"]


def test_a_variant_that_changes_something_else_is_left_out():
    sweep = {"variants": {"short": {"steps": 10}, "both": {"attack.eps": 0.2, "defence.kl": 1.0}}}
    profile = PROFILE.model_copy(update={"sweep": type(PROFILE.sweep)(**sweep)})
    assert set(eps_grid.grid(Evidence(profile, evidence(True).outcomes)).index) == {"", "both"}


def test_the_three_numbers_are_those_of_the_table():
    table = eps_grid.measured_grid(known(robust=0.8, answered=0.6)).set_index("variant")
    assert set(table.index) == {"", "small", "large"}, "what was not measured is left out"
    for _, row in table.iterrows():
        assert row["robustness"].estimate == pytest.approx(0.8)
        assert row["robustness"].low <= 0.8 <= row["robustness"].high
        assert row["utility"].estimate == pytest.approx(0.6)
        assert row["over-refusal"].estimate == pytest.approx(0.4)


def test_the_figure_says_every_cell():
    figure, alt, caption = eps_grid.eps_and_kl(known(robust=0.8, answered=0.6))
    assert len(figure.axes) == 3
    for eps in ("0.01", "0.05", "0.2"):
        assert (
            f"eps {eps}, KL 0.1: robustness 80 %" in alt
            and f"eps {eps}, KL 0.1: over-refusal 40 %" in alt
        )


def test_an_empty_run_is_an_error_that_names_the_notebook():
    with pytest.raises(MissingError, match="run notebook 03"):
        eps_grid.measured_grid(Evidence(PROFILE, evidence(True).outcomes.iloc[:0]))


def swept(**shares: dict[int, float]) -> Evidence:
    """variant -> seed -> share of harmful prompts on which the attack wins; all harmless ones are
    answered.
    """
    tables = []
    for variant, by_seed in shares.items():
        for seed, won in by_seed.items():
            model = {"seeds": [seed], "variant": variant}
            tables.append(cell("lat", won, "pgd", eps=0.05, sites="1,3", **model))
            for encoding in PROFILE.evaluation.encodings:
                tables += [
                    cell("lat", 1.0, encoding=encoding, prompts=p, **model)
                    for p in ("harmless", "scary")
                ]
    return Evidence(PROFILE, pd.concat(tables, ignore_index=True))


def test_a_sweeps_models_are_read_off_seed_by_seed_or_pooled():
    small, both = "attack.eps=0.02", "attack.eps=0.2+defence.kl=0.0"
    e = swept(**{small: {0: 0.8, 1: 0.4}, both: {0: 0.2}, "": {0: 0.5}})
    table = eps_grid.sweep_table(e)
    assert table[["label", "eps", "kl", "seed"]].values.tolist() == [
        [f"lat[{small}]", 0.02, PROFILE.train.defence.kl, 0],
        [f"lat[{small}]", 0.02, PROFILE.train.defence.kl, 1],
        [f"lat[{both}]", 0.2, 0.0, 0],
    ]
    assert table["asr"].tolist() == pytest.approx([0.8, 0.4, 0.2])
    assert (table["asr_low"] <= table["asr"]).all() and (table["asr"] <= table["asr_high"]).all()
    assert table["answered"].tolist() == [1.0] * 3 and table["refused"].tolist() == [0.0] * 3
    pooled = eps_grid.sweep_table(e, by_seed=False)
    assert pooled["asr"].tolist() == pytest.approx([0.6, 0.2]) and pooled["seed"].isna().all()


def test_variants_say_what_is_changed():
    assert eps_grid.changes_of("attack.eps=0.1+attack.rule=sign") == {
        "attack.eps": 0.1,
        "attack.rule": "sign",
    }
    assert eps_grid.changes_of("defence.kl=1e-05+steps=10") == {
        "defence.kl": 1e-5,
        "steps": 10,
    }
    assert eps_grid.changes_of("") == eps_grid.changes_of("no-kl") == {}
    with pytest.raises(MissingError, match="no model of a sweep was measured"):
        eps_grid.sweep_table(evidence(True))
