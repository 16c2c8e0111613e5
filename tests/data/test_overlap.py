"""The check that stops a run whose test prompts were trained on."""

import json
import os
import re
from pathlib import Path

import pytest
from rows_in_files import write

import latlib.data.splits
from latlib.config.profile import load_profile
from latlib.config.sections import DataSettings, ProfileError
from latlib.data.splits import check_overlap
from latlib.text.near_duplicates import overlaps

TRAIN = [
    f"describe the {i} ways to {verb} the {noun} of the old mill"
    for i, (verb, noun) in enumerate(
        # fmt: skip
        [
            ("mend", "wheel"),
            ("paint", "doors"),
            ("sweep", "stairs"),
            ("climb", "ladder"),
            ("guard", "flour"),
        ]
    )
]
OTHERS = [
    "what do owls eat ?",
    "name three rivers",
    "sing me a lullaby about the sea",
    "who keeps the lighthouse ?",
]


def settings_for(folder, test_harmful=None, **changes) -> DataSettings:
    """Distinct prompts; the last harmful one is long, so that one changed word is a
    near-duplicate.
    """
    files = {
        "harmful": [{"goal": text, "target": "yes"} for text in TRAIN],
        "benign": [{"instruction": text} for text in OTHERS],
    }
    if test_harmful:
        files["test_harmful"] = [{"goal": text, "target": "yes"} for text in test_harmful]
    paths = {name: write(folder, f"{name}.json", records) for name, records in files.items()}
    return DataSettings(**{"source": "files", **paths, "near_duplicate": 0.6, **changes})


CLEAN = ["wash the red lantern", "count the crows upon the roof"]


def test_a_clean_test_file_passes(tmp_path):
    assert check_overlap(settings_for(tmp_path, CLEAN)) is None


def test_held_out_prompts_pass_by_construction(tmp_path):
    check_overlap(settings_for(tmp_path, held_out=0.8))


def test_a_shared_row_stops_the_run_and_is_named_but_not_printed(tmp_path):
    settings = settings_for(tmp_path, [*CLEAN, TRAIN[1].upper() + "!"])
    with pytest.raises(ProfileError) as caught:
        check_overlap(settings)
    said = str(caught.value)
    assert (
        "1 training or tuning prompts are equal to a test prompt and 0 more are nearly equal"
        in said
    )
    for part in (
        "harmful-1 (",
        "harmful.json, row 2)",
        "harmful-test-2 (",
        "test_harmful.json, row 3)",
        "1.00",
        "remove",
    ):
        assert part in said
    assert "paint" not in said.lower() and "raise data.near_duplicate" not in said


def test_a_nearly_equal_row_stops_the_run_unless_the_threshold_is_raised(tmp_path):
    close = TRAIN[4].replace("flour", "floor")
    ((_, _, similarity),) = overlaps([close], [TRAIN[4]], 0.6)
    assert 0.6 < similarity < 0.95
    with pytest.raises(
        ProfileError,
        match=r"0 training .* equal .* and 1 more are nearly equal.*raise data.near_dup",
    ):
        check_overlap(settings_for(tmp_path, [*CLEAN, close]))
    check_overlap(settings_for(tmp_path, [*CLEAN, close], near_duplicate=0.95))


@pytest.mark.parametrize("kind, column", [("benign", "instruction"), ("borderline", "prompt")])
def test_every_kind_of_test_prompt_is_compared_with_every_kind_of_training_prompt(
    tmp_path, kind, column
):
    clean = write(tmp_path, "clean.json", [{column: text} for text in CLEAN])
    check_overlap(settings_for(tmp_path, **{f"test_{kind}": clean}))
    for text in (TRAIN[0], OTHERS[2]):
        soiled = write(tmp_path, "soiled.json", [{column: CLEAN[1]}, {column: text}])
        # a test file of the other kinds leaves the whole main files to train and tune
        with pytest.raises(ProfileError, match="equal to a test prompt"):
            check_overlap(
                settings_for(tmp_path, CLEAN[:1], **{f"test_{kind}": soiled}, held_out=0.01)
            )


def test_the_world_is_not_checked():
    assert check_overlap(load_profile("tiny").data) is None


def test_the_answer_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    compared = []
    search = latlib.data.splits.overlaps
    monkeypatch.setattr(
        latlib.data.splits, "overlaps", lambda *args: compared.append(args) or search(*args)
    )
    settings = settings_for(tmp_path, CLEAN)
    check_overlap(settings)
    check_overlap(settings.model_copy())
    assert len(compared) == 1
    settings_for(tmp_path, TRAIN[:1])  # the same path, other rows
    for _ in range(2):
        with pytest.raises(ProfileError, match="equal to a test prompt"):
            check_overlap(settings)
    assert len(compared) == 2


@pytest.fixture(scope="module")
def real_data(root) -> Path:
    """The folder of real prompt sets: $LATLIB_SHARED_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("LATLIB_SHARED_DATA") or root.parent / "shared" / "data")
    for name in (
        "advbench.csv",
        "harmful_test.json",
        "harmless_train.json",
        "harmless_test.json",
        "jailbreakbench.json",
    ):
        if not (folder / name).is_file():
            pytest.skip(
                f"no {name} in {folder}: set LATLIB_SHARED_DATA to the folder that holds it"
            )
    return folder


def real_settings(folder, **changes) -> DataSettings:
    return DataSettings(
        source="files",
        harmful=str(folder / "advbench.csv"),
        benign=str(folder / "harmless_train.json"),
        test_benign=str(folder / "harmless_test.json"),
        test_harmful_columns={"prompt": "instruction"},
        **changes,
    )


def test_a_real_test_file_that_holds_advbench_is_found(real_data):
    with pytest.raises(ProfileError) as caught:
        check_overlap(real_settings(real_data, test_harmful=str(real_data / "harmful_test.json")))
    exact, near = re.search(
        r"(\d+) training or tuning prompts are equal .* and (\d+) more", str(caught.value)
    ).groups()
    records = json.loads((real_data / "harmful_test.json").read_text())
    assert int(exact) >= 30 and int(near) >= 1
    assert not any(record["instruction"] in str(caught.value) for record in records)


def test_real_files_that_are_held_out_of_one_another_pass(real_data):
    settings = real_settings(real_data, near_duplicate=0.9)
    check_overlap(settings.model_copy(update={"test_benign": None}))
