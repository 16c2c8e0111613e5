"""The outcome table: what each column says, that no column says two things, and that a file keeps it."""

import json

import numpy as np
import pandas as pd
import pytest

from latlib.config.profile import load_profile
from latlib.config.sections import AttackSettings
from latlib.data.prompts import Question
from latlib.evaluation.outcomes import (
    COLUMNS,
    Cell,
    Examined,
    Intervention,
    Outcome,
    Rule,
    Subject,
    outcome_rows,
    split_encoding,
)

PROMPTS = [Question(f"ask {i}", "a", "no", f"c{i // 2}", True) for i in range(3)]
FOUND = Examined([Outcome.COMPLIED, Outcome.REFUSED, Outcome.NEITHER], exact=True)
NORMS = {"embedding": 1.0, 0: 2.0, 1: 4.0}
SUBJECT = Subject(load_profile("smoke"), "lat", 1, NORMS, "no-kl")


def rows_of(cell=Cell(), found=FOUND, subject=SUBJECT):  # noqa: B008
    return outcome_rows(subject, cell, PROMPTS, found)


def test_a_row_says_which_model_which_prompt_and_what_came_out():
    table = rows_of(Cell(prompts="twin", encoding="leet", reply_encoding="rot13"))
    assert tuple(table.columns) == COLUMNS
    first = table.iloc[0]
    assert (first["method"], first["variant"], first["seed"]) == ("lat", "no-kl", 1)
    assert SUBJECT.label == "lat[no-kl]" and Subject(SUBJECT.profile, "lat", 1, {}).label == "lat"
    assert table["prompt_id"].tolist() == ["twin-0000", "twin-0001", "twin-0002"]
    assert table["pair_id"].tolist() == [0, 1, 2] and table["cluster"].tolist() == [
        "c0",
        "c0",
        "c1",
    ]
    assert (first["encoding"], first["reply_encoding"]) == ("leet", "rot13")
    assert table["outcome"].tolist() == ["complied", "refused", "neither"]
    assert table["exact"].tolist() == [True, False, False] and table["understood"].isna().all()
    unattacked = first[["attack", "intervention", "source", "rule", "site"]].tolist()
    assert unattacked == ["none", "none", "", "", ""] and pd.isna(first["draw"])
    assert np.isnan(first["eps"]) and first["radii"] is None and first["norms"] is None
    assert (first["eps_unit"], first["sites"], first["positions"]) == ("", "", "")


@pytest.mark.parametrize("unit", ["absolute", "relative"])
def test_a_radius_is_stored_in_its_own_unit_and_absolutely(unit):
    settings = AttackSettings(sites=("embedding", 1), eps=0.5, eps_mode=unit)
    threat = settings.threat_model(2, NORMS)
    table = rows_of(Cell(attack="pgd", threat=threat))
    assert set(table["eps"]) == {0.5} and set(table["eps_unit"]) == {unit}
    assert set(table["sites"]) == {"embedding,1"} and set(table["positions"]) == {"prompt"}
    absolute = unit == "absolute"
    assert table["radii"].tolist() == [[0.5, 0.5] if absolute else [0.5, 2.0]] * 3
    assert table["norms"].tolist() == [None if absolute else [1.0, 4.0]] * 3


def test_an_intervention_has_a_column_for_each_thing_it_says():
    cell = Cell(intervention=Intervention.ABLATE, source="random", draw=2)
    random = rows_of(cell).iloc[0]
    assert (random["intervention"], random["source"], random["draw"]) == ("ablate", "random", 2)
    cell = Cell(intervention=Intervention.ADD, source="lat", rule=Rule.BEST, site="3")
    added = rows_of(cell).iloc[0]
    assert pd.isna(added["found"]), "nothing was searched"
    searched = [rows_of(Cell(rule=Rule.BEST, found=found)) for found in (True, False)]
    assert pd.concat(searched)["found"].tolist() == [True] * 3 + [False] * 3
    assert (added["intervention"], added["rule"], added["site"]) == ("add", "best", "3")


def test_a_file_keeps_the_table(tmp_path):
    threat = AttackSettings(sites=(0,), eps=2.0).threat_model(2)
    tables = [rows_of(), rows_of(Cell(attack="pgd", threat=threat)), rows_of(Cell(draw=1))]
    table = pd.concat(tables, ignore_index=True)
    table.to_parquet(tmp_path / "table.parquet")
    again = pd.read_parquet(tmp_path / "table.parquet")
    assert list(again["radii"][3]) == [2.0] and again["radii"][0] is None
    plain = [name for name in COLUMNS if name not in ("radii", "norms")]
    pd.testing.assert_frame_equal(again[plain], table[plain], check_dtype=False)


def test_what_nobody_knows_is_missing_and_replies_are_redacted():
    found = Examined(FOUND.outcomes, False, [True, False, True], texts=["do it", "", "I cannot"])
    table = rows_of(found=found)
    assert table["exact"].isna().all() and table["understood"].tolist() == [True, False, True]
    assert table["text"][0].startswith("[5 characters") and table["text"][1] == ""
    assert "begins: i cannot" in table["text"][2]


def test_words_are_the_texts_they_print_as():
    assert f"{Outcome.REFUSED}" == str(Outcome.REFUSED) == "refused" == Outcome("refused")
    assert json.dumps({Rule.SVD: Outcome.NEITHER}) == '{"svd": "neither"}'
    with pytest.raises(ValueError, match="outcome = 'maybe' is unknown: choose one of refused, "):
        Outcome("maybe")


def test_a_profiles_encoding_is_parsed_once():
    assert split_encoding("leet") == ("leet", "plain")
    assert split_encoding("plain>rot13+leet") == ("plain", "rot13+leet")
