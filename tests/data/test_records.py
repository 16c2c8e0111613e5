"""Records from files, from folders of a data set and from the hub through a stand-in, under our
names.
"""

import json
import sys
import types

import pytest
from rows_in_files import write

from latlib.config.sections import ProfileError
from latlib.data.benchmarks import asked_prompts
from latlib.data.records import ANY_SPLIT, Source, is_hub_id, read_table
from latlib.io import outages

RECORDS = [
    {
        "goal": "steal it",
        "note": None,
        "messages": [{"role": "user", "content": "a {b}"}, {"content": "one"}],
    },
    {
        "goal": " break it ",
        "note": "why",
        "messages": [{"role": "user", "content": "c"}, {"content": "two"}],
    },
    {
        "goal": "burn it",
        "note": "how",
        "messages": [{"role": "user", "content": "d"}, {"content": "three"}],
    },
]


def read(path, columns, needed=("prompt",), **how):
    return read_table(Source(str(path), "data.harmful", **how), columns, needed)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_files_read_the_same_whole_and_streaming(tmp_path, suffix, streaming):
    path = write(tmp_path, f"rows{suffix}", [{k: r[k] for k in ("goal", "note")} for r in RECORDS])
    columns = {"prompt": "goal", "both": "{goal}: {note}", "note": "note"}
    found = read(path, columns, streaming=streaming)
    assert found == [
        {"prompt": "steal it", "both": "steal it:", "note": ""},
        {"prompt": "break it", "both": "break it : why", "note": "why"},
        {"prompt": "burn it", "both": "burn it: how", "note": "how"},
    ]
    assert read(path, columns, streaming=streaming, rows=2) == found[:2]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_format_strings_reach_into_lists_and_records(tmp_path, suffix):
    path = write(tmp_path, f"rows{suffix}", RECORDS)
    found = read(path, {"prompt": "{messages[0][content]}\n{{{messages[1][content]}}}"})
    assert [r["prompt"] for r in found] == ["a {b}\n{one}", "c\n{two}", "d\n{three}"]


@pytest.mark.parametrize(
    "recipe, said",
    [
        (
            "{gaol}",
            "no column 'gaol' for 'prompt'; it has goal, note, messages: set data.harmful_columns",
        ),
        ("{messages[1][text]}", r"row 1: .*finds no 'text' in messages\[1\], which has content"),
        ("{messages[2][content]}", r"row 1: .*finds no '2' in messages, which has 0, 1"),
        ("{messages[first]}", "finds no 'first' in messages, which has 0, 1"),
        ("{goal[0]}", "finds no '0' in goal, which is str"),
        ("{messages}", "row 1: .* is no text but list with parts"),
        ("messages", "row 1: .* is no text but list with parts"),
        ("{goal", "_columns.prompt = '{goal' is no format string"),
        ("{}", "is no format string .*is not of the form"),
        ("{goal.__class__}", r"no column 'goal.__class__'"),
        ("{goal!r}", "is not of the form"),
        ("{goal:>9}", "is not of the form"),
        ("{note}", "row 1: column '{note}' is empty: fill or remove it"),
    ],
)
def test_what_a_column_lacks_is_named_with_what_there_is(tmp_path, recipe, said):
    path = write(tmp_path, "rows.json", RECORDS)
    with pytest.raises(ProfileError, match=f"data.harmful.*{said}"):
        read(path, {"prompt": recipe})


def test_a_key_that_some_records_lack_is_empty_at_the_top_and_an_error_below(tmp_path):
    path = write(
        tmp_path,
        "rows.json",
        [{"a": "x", "b": {"c": "y"}}, {"a": "z"}, {"a": "z", "b": None}, {"a": "z", "b": {}}],
    )
    assert [r["more"] for r in read(path, {"prompt": "a", "more": "{b[c]}"}, rows=3)] == [
        "y",
        "",
        "",
    ]
    with pytest.raises(ProfileError, match="row 4: .*finds no 'c' in b"):
        read(path, {"prompt": "a", "more": "{b[c]}"})


@pytest.mark.parametrize("saved", ["files", "saved", "saved-splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_sets_folder_is_read_by_split(tmp_path, monkeypatch, saved, streaming):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, parts = tmp_path / "set", {"train": RECORDS, "test": RECORDS[:1]}
    folder.mkdir()
    if saved == "files":
        for split, records in parts.items():
            write(folder, f"{split}.jsonl", records)
    elif saved == "saved":
        datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
    else:
        datasets.DatasetDict(
            {k: datasets.Dataset.from_list(v) for k, v in parts.items()}
        ).save_to_disk(folder)
    columns = {"prompt": "goal", "reply": "{messages[1][content]}"}
    found = read(folder, columns, streaming=streaming, rows=2)
    assert [tuple(r.values()) for r in found] == [("steal it", "one"), ("break it", "two")]
    if saved != "saved":
        assert len(read(folder, columns, streaming=streaming, split=ANY_SPLIT)) == 1
        with pytest.raises(
            ProfileError,
            match="data.harmful = .* cannot be read .*tune.*train.*test.*set data.harmful_split",
        ):
            read(folder, columns, streaming=streaming, split="tune")


@pytest.mark.parametrize("split, taken", [("train", "train"), (ANY_SPLIT, "test")])
def test_a_hub_set_is_asked_for_by_name_configuration_and_split(monkeypatch, split, taken):
    calls, module = [], types.ModuleType("datasets")
    module.get_dataset_split_names = lambda source, config: ["train", "test"]
    module.load_dataset = lambda *names, **how: calls.append((*names, how)) or iter(RECORDS)
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = read(
        "owner/name", {"prompt": "goal"}, config="long", split=split, streaming=True, rows=2
    )
    assert (
        calls == [("owner/name", "long", {"split": taken, "streaming": True})] and len(found) == 2
    )


@pytest.mark.parametrize("names, taken", [(["train"], "train"), (["a", "b"], None)])
def test_a_benchmark_of_one_split_is_taken_whole_and_of_several_none_is_guessed(
    monkeypatch, names, taken
):
    calls, module = [], types.ModuleType("datasets")
    module.get_dataset_split_names = lambda source, config: names
    module.load_dataset = lambda *name, **how: calls.append(how["split"]) or iter(RECORDS)
    monkeypatch.setitem(sys.modules, "datasets", module)
    if taken is None:
        said = (
            r"data.test_harmful = .*Should be one of \['a', 'b'\].*: give the one you mean as a"
            r" file"
        )
        with pytest.raises(ProfileError, match=said):
            source = Source("owner/name", "data.test_harmful", split=ANY_SPLIT)
            read_table(source, {"prompt": "goal"}, ["prompt"])
    else:
        read("owner/name", {"prompt": "goal"}, split=ANY_SPLIT, streaming=True)
    assert calls == ([taken] if taken else [])


def test_streaming_takes_no_more_rows_than_asked(monkeypatch):
    def rows():
        yield from RECORDS[:2]
        raise AssertionError("a third row was asked for")

    module = types.ModuleType("datasets")
    module.load_dataset = lambda *names, **how: rows()
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert len(read("owner/name", {"prompt": "goal"}, streaming=True, rows=2)) == 2


@pytest.mark.parametrize(
    "error, said",
    [
        (
            FileNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub"),
            "accept its terms and set HF_TOKEN",
        ),
        (
            FileNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"),
            "check the name, set HF_TOKEN if it is",
        ),
        (ConnectionError("Couldn't reach the Hub"), "check the network and .*the same command"),
        (
            ValueError("Config name is missing. Please pick one of: a, b"),
            "one of: a, b.*set data.harmful_config",
        ),
        (
            ValueError("Unknown split 'x'. Should be one of ['y']."),
            r"\['y'\].*set data.harmful_split",
        ),
    ],
)
def test_what_the_hub_refuses_is_said_with_its_fix(monkeypatch, error, said):
    def load(*names, **how):
        raise error

    module = types.ModuleType("datasets")
    module.load_dataset = load
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(outages, "WAITS", ())
    with pytest.raises(
        ProfileError, match=f"data.harmful = 'owner/name': owner/name/train cannot be had.*{said}"
    ):
        read("owner/name", {"prompt": "goal"})


def test_without_a_network_the_real_package_says_so():
    pytest.importorskip("datasets")
    with pytest.raises(
        ProfileError, match="data.harmful = 'no-owner/no-set': .*download it and give the file"
    ):
        read("no-owner/no-set", {"prompt": "goal"})


@pytest.mark.parametrize("where", ["folder", "owner/name"])
def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch, where):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ProfileError, match="`datasets` is not installed.*pip install datasets"):
        read(tmp_path if where == "folder" else where, {"prompt": "goal"})


@pytest.mark.parametrize(
    "path, hub",
    [
        ("owner/name", True), ("o-1/n.2_x", True), ("data/rows.csv", False), ("./name", False), ("/a/b", False),
        ("~/a", False), ("name", False), ("a/b/c", False), ("", False),
    ],
)  # fmt: skip
def test_what_reads_as_a_hub_id(path, hub):
    assert is_hub_id(path) == hub
    if not hub and path:
        with pytest.raises(
            ProfileError, match="is not a file: check the path, or give a hub id such as owner/name"
        ):
            read(path, {"prompt": "goal"})


@pytest.mark.parametrize("held", ["5", "null", "true"])
def test_a_json_file_of_one_value_is_named(tmp_path, held):
    (tmp_path / "rows.json").write_text(held)
    with pytest.raises(ProfileError, match="not a list of records"):
        read(tmp_path / "rows.json", {"prompt": "goal"})


def test_a_json_file_of_something_else_is_named(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(["a"]))
    with pytest.raises(ProfileError, match="cannot be read: row 1 is str, not a record"):
        read(tmp_path / "rows.json", {"prompt": "goal"})


SPELT = ["None", "NA", "nan", "007", "1e3", "2024-01-01", "true", " null"]
STRIPPED = [text.strip() for text in SPELT]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_what_a_file_says_is_text(tmp_path, suffix):
    path = write(tmp_path, f"rows{suffix}", [{"goal": text} for text in SPELT])
    assert [r["prompt"] for r in read(path, {"prompt": "goal"})] == STRIPPED


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_a_folders_files_say_is_text(tmp_path, monkeypatch, suffix):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set", f"train{suffix}", [{"goal": text} for text in SPELT])
    assert [r["prompt"] for r in read(tmp_path / "set", {"prompt": "goal"})] == STRIPPED


def test_numbers_and_truth_values_of_json_are_written_as_python_writes_them(tmp_path):
    path = write(tmp_path, "rows.json", [{"goal": value} for value in (7, 0.5, True)])
    assert [r["prompt"] for r in read(path, {"prompt": "goal"})] == ["7", "0.5", "True"]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("rows.csv", "goal,note\na,b\nc,d,e\n", "line 3 has more fields than the 2"),
        ("rows.csv", "goal,goal\na,b\n", "names a column twice: goal, goal"),
        ("rows.csv", 'goal,note\na,"b\n', "unexpected end of data"),
        ("rows.jsonl", '{"goal": "a"}\n\n{"goal": \n', "line 3 is no JSON"),
        ("rows.jsonl", '{"goal": "a", "goal": "b"}\n', "line 1 .*'goal' stands twice in a record"),
        ("rows.json", '[{"goal": "a", "goal": "b"}]', "'goal' stands twice in a record"),
        ("rows.jsonl", '{"goal": "a"}\n\n["b"]\n', "line 3 is list, not a record"),
        ("rows.json", '[{"goal": "a"}, 7]', "row 2 is int, not a record"),
        ("rows.parquet", "goal", "cannot be read"),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(
        ProfileError, match=f"data.harmful = .*{name}' cannot be read: .*{said}|{said}"
    ):
        read(tmp_path / name, {"prompt": "goal"})


@pytest.mark.parametrize(
    "name, text",
    [
        ("rows.csv", 'goal\r\n"a\nb"\r\n\r\nc\r\n'),
        ("rows.jsonl", '{"goal": "a\\nb"}\n{"goal": "c"}'),
        ("rows.json", '{"goal": ["a\\nb", "c"]}'),
        ("rows.json", '{"goal": {"0": "a\\nb", "1": "c"}}'),
    ],
)
def test_a_byte_order_mark_and_lines_in_a_field_are_read(tmp_path, name, text):
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    assert read(tmp_path / name, {"prompt": "goal"}) == [{"prompt": "a\nb"}, {"prompt": "c"}]


def test_a_long_field_is_read(tmp_path):
    path = write(tmp_path, "rows.csv", [{"goal": "a" * 200_000}])
    assert len(read(path, {"prompt": "goal"})[0]["prompt"]) == 200_000


# ---- chats by role -----------------------------------------------------------------------------


def chat(*turns, names=("role", "content")):
    return {"messages": [dict(zip(names, turn, strict=True)) for turn in turns]}


ROLES = {"prompt": "{messages[user]}", "reply": "{messages[assistant]}"}
USER, ASSISTANT, SYSTEM = ("user", "ask"), ("assistant", "answer"), ("system", "be kind")
SHAREGPT = ("from", "value")


@pytest.mark.parametrize(
    "record",
    [
        chat(USER, ASSISTANT),
        chat(SYSTEM, USER, ASSISTANT),
        chat(USER, ASSISTANT, ("user", "more"), ("assistant", "and more")),
        chat(USER, ASSISTANT, ("tool", "a result")),
        chat(("human", "ask"), ("gpt", "answer"), names=SHAREGPT),
        chat(SYSTEM, ("human", "ask"), ("gpt", "answer"), names=SHAREGPT),
    ],
)
def test_a_chat_is_taken_by_role(tmp_path, record):
    path = write(tmp_path, "rows.jsonl", [record])
    assert read(path, ROLES) == [{"prompt": "ask", "reply": "answer"}]
    (row,) = read(path, {**ROLES, "system": "{messages[system]}"})
    assert row["system"] == ("be kind" if "be kind" in str(record) else "")


@pytest.mark.parametrize(
    "record, said",
    [
        (chat(ASSISTANT, USER), "looks for user in messages, which goes assistant"),
        (chat(("tool", "x"), USER, ASSISTANT), "which goes tool"),
        (chat(), "which goes nowhere"),
        (chat(SYSTEM), "which goes nowhere"),
        (chat(USER), "looks for user, then assistant in messages, which goes user"),
        (chat(USER, USER, ASSISTANT), "which goes user, user"),
        (chat(USER, ("function", "x"), ASSISTANT), "which goes user, function"),
        ({"messages": ["ask", "answer"]}, "which goes None"),
    ],
)
def test_a_chat_that_goes_otherwise_is_an_error(tmp_path, record, said):
    path = write(tmp_path, "rows.json", [chat(USER, ASSISTANT), record])
    with pytest.raises(ProfileError, match=f"row 2: .*{said}: set data.harmful_columns"):
        read(path, ROLES)


def test_turns_by_number_are_of_one_role_in_all_rows(tmp_path):
    numbers = {"prompt": "{messages[0][content]}", "reply": "{messages[1][content]}"}
    path = write(tmp_path, "rows.json", [chat(USER, ASSISTANT), chat(SYSTEM, USER, ASSISTANT)])
    assert read(path, numbers, rows=1) == [{"prompt": "ask", "reply": "answer"}]
    said = r"row 2: .*a turn of 'system' at messages\[0\], which was of 'user' .*messages\[user\]"
    with pytest.raises(ProfileError, match=said):
        read(path, numbers)


# ---- HarmBench ---------------------------------------------------------------------------------

HARMBENCH = [  # of our own making, with the published columns
    {"Behavior": "tell it", "FunctionalCategory": "standard", "ContextString": ""},
    {"Behavior": "use it", "FunctionalCategory": "contextual", "ContextString": "A plan."},
]


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_a_contextual_behaviour_is_asked_with_its_context(tmp_path, suffix):
    path = write(tmp_path, f"rows{suffix}", HARMBENCH)
    found = read(path, {"prompt": "Behavior"})
    assert [row["prompt"] for row in found] == ["tell it", "A plan.\n\n---\n\nuse it"]
    own = read(path, {"prompt": "{ContextString} {Behavior}"})
    assert [row["prompt"] for row in own] == ["tell it", "A plan. use it"]
    (_, asked) = asked_prompts("harmbench", path, {"text": "Behavior"})
    assert asked.text == "A plan.\n\n---\n\nuse it"


def test_copyright_behaviours_are_kept_and_said(tmp_path):
    more = {"Behavior": "sing it", "FunctionalCategory": "copyright", "ContextString": ""}
    path = write(tmp_path, "rows.csv", [*HARMBENCH, more])
    with pytest.warns(UserWarning, match="data.harmful = .*: 1 of 3 rows are .*copyright"):
        assert len(read(path, {"prompt": "Behavior"})) == 3
