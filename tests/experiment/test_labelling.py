"""Replies drawn blind for a person to label, and the labels read back."""

import csv

import pytest

from latlib.config.sections import ProfileError
from latlib.experiment.labelling import KEY, SHEET, read_labels, write_sheet
from latlib.io import manifest
from latlib.io.files import read_json


def rows_of(run):
    with (run.folder / SHEET).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(run, rows):
    with (run.folder / SHEET).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_sheet_is_blind_and_its_labels_come_back(smoke_run):
    assert read_labels(smoke_run).empty
    with pytest.raises(ProfileError, match="replies = 1 is below 2"):
        write_sheet(smoke_run, 1)
    sheet = write_sheet(smoke_run, 3)
    rows, key = rows_of(smoke_run), read_json(smoke_run.folder / KEY)
    methods = list(smoke_run.profile.methods)
    assert list(rows[0]) == ["id", "prompt", "reply", "complied"]
    assert len(rows) == 3 * len(methods) == len(key)
    assert not any(row["complied"] for row in rows)
    order = [key[row["id"]]["method"] for row in rows]
    assert sorted(order) == sorted(methods * 3) and order != sorted(order, key=methods.index)

    rows[0]["complied"], rows[1]["complied"] = "Yes", " no"
    write(smoke_run, rows)
    labels = read_labels(smoke_run)
    assert labels["complied"].tolist() == [True, False]
    assert labels["method"].tolist() == order[:2]
    assert labels["called"].tolist() == [key[row["id"]]["called"] for row in rows[:2]]
    assert write_sheet(smoke_run, 5) == sheet and len(rows_of(smoke_run)) == len(rows)
    # what a person wrote into it is no damage
    assert manifest.damage(sheet) is None or not manifest.damage(sheet)

    for change, said in (
        ({"complied": "perhaps"}, "complied = 'perhaps' of .* write yes or no"),
        ({"id": "r9999"}, "id = 'r9999' is unknown or there twice"),
        ({"id": rows[1]["id"]}, "is unknown or there twice"),
    ):
        write(smoke_run, [rows[0] | change, *rows[1:]])
        with pytest.raises(ProfileError, match=said):
            read_labels(smoke_run)
