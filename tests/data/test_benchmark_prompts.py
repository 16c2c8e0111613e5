"""Prompts of benchmarks: from files of every kind, from the hub through a stand-in, and, where they
are, real ones.
"""

import os
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from rows_in_files import write

from latlib.config.sections import ProfileError
from latlib.data.benchmarks import SETS, AskedPrompt, asked_prompts
from latlib.data.records import Source

XSTEST = [  # of our own making, with the published columns
    {
        "id": 1,
        "prompt": "how do i kill a dragon in chess ?",
        "type": "figures",
        "label": "safe",
        "note": None,
    },
    {
        "id": 2,
        "prompt": "how do i rob the baker ?",
        "type": "contrast_figures",
        "label": "unsafe",
        "note": "x",
    },
]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_xstest_files_of_every_kind_say_what_should_be_answered(tmp_path, suffix):
    assert asked_prompts("xstest", write(tmp_path, f"xstest{suffix}", XSTEST)) == [
        AskedPrompt("xstest-0000", "how do i kill a dragon in chess ?", "safe", "figures"),
        AskedPrompt("xstest-0001", "how do i rob the baker ?", "unsafe", "contrast_figures"),
    ]


def test_an_xstest_file_without_labels_has_them_in_its_types(tmp_path):
    records = [{"prompt": r["prompt"], "type": r["type"]} for r in XSTEST]
    path = write(tmp_path, "old.csv", records)
    found = asked_prompts("xstest", path, {"text": "prompt", "category": "type"})
    assert [p.label for p in found] == ["safe", "unsafe"]
    with pytest.raises(
        ProfileError, match="file = .*old.csv' has no column 'label' for 'label'.*set file_columns"
    ):
        asked_prompts("xstest", path)


@pytest.mark.parametrize(
    "name, label",
    [
        ("or-bench", "safe"),
        ("or-bench-hard", "safe"),
        ("or-bench-toxic", "unsafe"),
        ("advbench", "unsafe"),
    ],
)
def test_a_set_without_labels_has_one_label(tmp_path, name, label):
    records = [{"prompt": f"ask {i}", "goal": f"ask {i}", "category": "lore"} for i in range(3)]
    found = asked_prompts(name, write(tmp_path, "set.csv", records), n=2)
    category = "" if name == "advbench" else "lore"
    assert found == [AskedPrompt(f"{name}-000{i}", f"ask {i}", label, category) for i in range(2)]


def test_a_column_that_is_mapped_and_empty_is_an_empty_category(tmp_path):
    path = write(
        tmp_path, "set.csv", [{"prompt": "a", "category": None}, {"prompt": "b", "category": "c"}]
    )
    assert [p.category for p in asked_prompts("or-bench", path)] == ["", "c"]


@pytest.mark.parametrize(
    "call, said",
    [
        (
            lambda path: asked_prompts("xtest", path),
            "name = 'xtest' is no set of prompts: choose one of xstest, or-bench",
        ),
        (lambda path: asked_prompts("xstest", path, n=0), "n = 0 asks for no prompts"),
        (
            lambda path: asked_prompts("xstest", path, {"prompt": "prompt"}),
            "file_columns = .* needs 'text'",
        ),
        (
            lambda path: asked_prompts("xstest", path, {"text": "prompt", "kind": "type"}),
            "file_columns = .* takes",
        ),
        (
            lambda path: asked_prompts("xstest", path),
            "file, row 2: label = 'maybe' is neither 'safe' nor 'unsafe'",
        ),
        (lambda path: asked_prompts("xstest", path, n=1), "file, row 2: label = 'maybe'"),
        (
            lambda path: asked_prompts("or-bench", path, {"text": "note"}),
            "file = .*, row 1: column 'note' is empty",
        ),
        (
            lambda path: asked_prompts("xstest", Path(path).parent / "no.csv"),
            "file = .*no.csv' is not a file: check the path",
        ),
        (
            lambda path: asked_prompts("strongreject"),
            "file = None: 'strongreject' is read from a file only",
        ),
    ],
)
def test_unusable_files_and_settings_are_named(tmp_path, call, said):
    path = write(tmp_path, "broken.csv", [XSTEST[0], {**XSTEST[1], "label": "maybe"}])
    with pytest.raises(ProfileError, match=said):
        call(path)


def test_without_datasets_the_error_says_to_download_the_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ProfileError,
        match="`datasets` is not installed: download Paul/XSTest/train .* give the file's",
    ):
        asked_prompts("xstest")


def with_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.mark.parametrize("name", [name for name, known in SETS.items() if known.hub])
def test_the_hubs_copy_is_read_by_repository_configuration_and_split(monkeypatch, name):
    calls, columns = [], SETS[name].columns

    def load(repository, configuration, split):
        calls.append(Source(repository, "the hub's copy", configuration, split))
        record = {
            columns["text"]: "ask",
            columns["category"]: "lore",
            columns.get("label", "x"): "safe",
        }
        return [record]

    with_datasets(monkeypatch, load)
    (found,) = asked_prompts(name)
    assert calls == [SETS[name].hub] and (found.text, found.category) == ("ask", "lore")


def test_what_the_hub_refuses_is_said(monkeypatch):
    def load(*names, **options):
        raise FileNotFoundError("gated")

    with_datasets(monkeypatch, load)
    with pytest.raises(
        ProfileError, match="bench-llm/or-bench/or-bench-80k/train cannot be had .*gated.*HF_TOKEN"
    ):
        asked_prompts("or-bench")


@pytest.fixture(scope="module")
def real_data(root) -> Path:
    """The folder of real prompt sets: $LATLIB_SHARED_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("LATLIB_SHARED_DATA") or root.parent / "shared" / "data")
    for name in ("advbench.csv", "jailbreakbench.json", "strongreject.json", "harmless_test.json"):
        if not (folder / name).is_file():
            pytest.skip(
                f"no {name} in {folder}: set LATLIB_SHARED_DATA to the folder that holds it"
            )
    return folder


RENAMED = {"text": "instruction", "category": "category"}


@pytest.mark.parametrize(
    "name, file, columns, rows, categories",
    [
        ("advbench", "advbench.csv", None, 520, 1),
        ("jailbreakbench", "jailbreakbench.json", RENAMED, 100, 10),
        ("strongreject", "strongreject.json", RENAMED, 313, 6),
        ("jailbreakbench-benign", "harmless_test.json", RENAMED, 2000, 1),
    ],
)
def test_real_files_load_whole(real_data, name, file, columns, rows, categories):
    found = asked_prompts(name, real_data / file, columns)
    assert len({p.prompt_id for p in found}) == len(found) == rows
    assert len(Counter(p.category for p in found)) == categories
    assert {p.label for p in found} == {SETS[name].label}
    assert all(p.text == p.text.strip() != "" for p in found)
