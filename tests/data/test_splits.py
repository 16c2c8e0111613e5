"""Training rows: from the world's training pairs, from anyone's files, and, where they are, from
real ones.
"""

import json
import os
from collections import Counter
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows_in_files import write
from tiny_models import LORA, model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latlib.config.profile import load_profile
from latlib.config.sections import (
    AttackSettings,
    DataSettings,
    DefenceSettings,
    ModelSettings,
    ProfileError,
    TrainSettings,
)
from latlib.data.splits import (
    benign_rows,
    borderline_rows,
    file_prompts,
    preference_rows,
    world_benign_rows,
    world_preference_rows,
)
from latlib.models import LanguageModel, with_adapter
from latlib.report.data_summary import data_report
from latlib.text.chat import Row, tokenise
from latlib.text.near_duplicates import overlaps
from latlib.train import Trainer
from latlib.world import grammar

HARMFUL = [
    {"goal": "steal it", "target": "Sure, first"},
    {"goal": "break it", "target": "Sure, take"},
]
BENIGN = [
    {"instruction": "mend it", "category": None},
    {"instruction": "bake it", "category": "food"},
]

EVERY_PAIR = [(verb, target) for verb in grammar.VERBS for target in grammar.TARGETS]


def settings_for(folder, harmful=HARMFUL, benign=BENIGN, suffix=".json", **changes) -> DataSettings:
    files = {
        "harmful": write(folder, f"harmful{suffix}", harmful),
        "benign": write(folder, f"benign{suffix}", benign),
    }
    return DataSettings(**{"source": "files", **files, **changes})


@pytest.mark.parametrize("division", grammar.PAIRS)
def test_rows_of_the_world_are_training_pairs_with_right_answers(division):
    harmful, benign = (
        make(200, 0, division) for make in (world_preference_rows, world_benign_rows)
    )
    answers = {" ".join((grammar.HERB[v], "and", grammar.BAIT[t])): (v, t) for v, t in EVERY_PAIR}
    asked = {answers[" ".join(row.completions[0].split()[3:6])] for row in harmful}
    assert asked <= set(grammar.PAIRS[division]["train"]) and len(asked) > 50
    assert {row.cluster for row in (*harmful, *benign)} <= set(grammar.VERBS)
    assert all(row.completions[1] == grammar.REFUSAL != row.completions[0] for row in harmful)
    assert all(row.completions[0].startswith(grammar.AFFIRMATION) for row in harmful)
    assert all(
        len(row.completions) == 1 and row.completions != (grammar.REFUSAL,) for row in benign
    )
    assert not {row.prompt for row in harmful} & {row.prompt for row in benign}
    assert Counter(row.completions[0] for row in benign)["no ."] > 5  # the law has both answers


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_files_of_every_kind_give_the_same_rows(tmp_path, suffix):
    settings = settings_for(tmp_path, suffix=suffix)
    harmful, benign = preference_rows(settings, 0), benign_rows(settings, 0)
    assert [(r.prompt, r.completions) for r in harmful] == [
        ("steal it", ("Sure, first", settings.refusals[0])),
        ("break it", ("Sure, take", settings.refusals[0])),
    ]
    assert [(r.prompt, r.completions) for r in benign] == [
        ("mend it", settings.benign_responses),
        ("bake it", settings.benign_responses),
    ]


def test_columns_are_mapped_by_name(tmp_path):
    settings = settings_for(
        tmp_path,
        harmful=[{"q": "steal it", "bad": "yes", "good": "never"}],
        benign=[{"q": "mend it", "a": "glue"}],
        harmful_columns={"prompt": "q", "rejected": "bad", "chosen": "good"},
        benign_columns={"prompt": "q", "response": "a"},
    )
    assert preference_rows(settings, 0)[0].completions == ("yes", "never")
    assert benign_rows(settings, 0)[0].completions == ("glue",)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_missing_optional_completion_falls_back_and_is_never_the_word_nan(tmp_path, suffix):
    settings = settings_for(
        tmp_path,
        benign=[{"q": "mend it", "a": "glue"}, {"q": "bake it", "a": None}],
        benign_columns={"prompt": "q", "response": "a"},
        suffix=suffix,
    )
    assert [r.completions for r in benign_rows(settings, 0)] == [
        ("glue",),
        settings.benign_responses,
    ]


def test_an_optional_column_that_is_named_must_be_there(tmp_path):
    settings = settings_for(
        tmp_path, benign_columns={"prompt": "instruction", "response": "ansver"}
    )
    with pytest.raises(
        ProfileError, match="no column 'ansver' for 'response'; it has instruction, category"
    ):
        benign_rows(settings, 0)


def test_benign_rows_alone_are_ended_where_that_is_asked(tmp_path):
    for source in ({"source": "world", "rows": 8}, None):
        made = DataSettings(**source) if source else settings_for(tmp_path)
        for ends in ("all", "benign"):
            settings = made.model_copy(update={"end_of_turn": ends})
            assert {row.ended for row in preference_rows(settings, 0)} == {ends == "all"}
            assert all(row.ended for row in benign_rows(settings, 0))


def test_no_more_rows_are_read_than_asked(tmp_path):
    settings = settings_for(tmp_path, rows=1)
    assert len(preference_rows(settings, 0)) == len(benign_rows(settings, 0)) == 1


@pytest.mark.parametrize(
    "harmful, said",
    [
        ([], ("data.harmful", "holds no rows")),
        (
            [{"prompt": "x", "target": "y"}],
            ("data.harmful", "no column 'goal'", "prompt, target", "harmful_columns"),
        ),
        (
            [{"goal": "x", "target": None}],
            ("data.harmful", "row 1", "'target' is empty", "fill or remove"),
        ),
        (
            [{"goal": "x", "target": "y"}, {"goal": "  ", "target": "y"}],
            ("row 2", "'goal' is empty"),
        ),
    ],
)
def test_unusable_files_name_the_field_the_row_and_the_mend(tmp_path, harmful, said):
    settings = settings_for(tmp_path, harmful=harmful)
    with pytest.raises(ProfileError) as caught:
        preference_rows(settings, 0)
    for part in (settings.harmful, *said):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "name, text", [("rows.txt", "x"), ("rows.json", "{broken"), ("rows.csv", "")]
)
def test_unreadable_files_are_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    settings = DataSettings(
        source="files", harmful=str(path), benign=str(tmp_path / "nowhere.json")
    )
    with pytest.raises(ProfileError, match=f"data.harmful = .*{name}.* cannot be read"):
        preference_rows(settings, 0)
    settings = settings_for(tmp_path).model_copy(update={"benign": str(tmp_path / "nowhere.json")})
    with pytest.raises(
        ProfileError, match="data.benign = .*nowhere.json.* is not a file: check the path"
    ):
        benign_rows(settings, 0)


def many(n: int, column: str, **more) -> list[dict]:
    """Distinct prompts: numbers in words of their own."""
    names = [
        f"{a}{b}"
        for a in ("ash", "elm", "fir", "oak", "yew")
        for b in ("gate", "hill", "moor", "wick", "dale")
    ]
    return [
        {column: f"{names[i % 25]} {names[i // 25]} {names[(7 * i + 3) % 25]}", **more}
        for i in range(n)
    ]


def splits_of(settings, rows=preference_rows, seed=0):
    return {split: rows(settings, seed, split) for split in ("train", "tune", "test")}


@pytest.mark.parametrize("rows, kind", [(preference_rows, "harmful"), (benign_rows, "benign")])
def test_the_splits_are_disjoint_and_together_everything(tmp_path, rows, kind):
    settings = settings_for(tmp_path, many(60, "goal", target="yes"), many(100, "instruction")[60:])
    parts = splits_of(settings, rows)
    n = 60 if kind == "harmful" else 40
    assert {split: len(part) for split, part in parts.items()} == {
        "train": n - 2 * round(0.15 * n),
        "tune": round(0.15 * n),
        "test": round(0.15 * n),
    }
    ids = [row.row_id for part in parts.values() for row in part]
    assert sorted(ids) == sorted(f"{kind}-{i}" for i in range(n))
    for part in parts.values():  # in the order of the file, named by the place in it
        assert [int(row.row_id.split("-")[1]) for row in part] == sorted(
            int(row.row_id.split("-")[1]) for row in part
        )


ALIKE = st.lists(
    st.lists(st.sampled_from(["stone", "bread", "witch", "well"]), min_size=2, max_size=5).map(
        " ".join
    ),
    min_size=1,
    max_size=30,
)


@hypothesis.settings(max_examples=40)
@given(ALIKE, ALIKE, st.sampled_from([0.2, 0.5, 0.8]), st.sampled_from([0.3, 0.6, 0.9]))
def test_no_near_duplicate_is_in_two_splits(tmp_path_factory, harmful, benign, held_out, near):
    settings = settings_for(
        tmp_path_factory.mktemp("rows"),
        [{"goal": text, "target": "yes"} for text in harmful],
        [{"instruction": text} for text in benign],
        held_out=held_out,
        near_duplicate=near,
    )
    prompts = [p for part in file_prompts(settings).values() for p in part]
    assert len(prompts) == len(harmful) + len(benign)
    train, test = (
        [p.prompt for p in prompts if (p.split == "test") == tested] for tested in (False, True)
    )
    assert overlaps(train, test, near) == []
    tune, other = (
        [p.prompt for p in prompts if (p.split == "tune") == tuned] for tuned in (True, False)
    )
    assert overlaps(tune, other, near) == []
    assert len({(p.cluster, p.split) for p in prompts}) == len({p.cluster for p in prompts})
    # no more is held out than asked, of either kind
    for kind, part in file_prompts(settings).items():
        if kind == "harmful":
            assert sum(p.split != "train" for p in part) <= 2 * round(
                (len(part) + len(benign)) * held_out / 2
            )


def test_the_split_is_the_same_for_every_seed_and_order_of_the_file(tmp_path):
    records = many(60, "goal", target="yes")
    settings = settings_for(tmp_path, records)
    parts = splits_of(settings)
    assert splits_of(settings, seed=5) == parts  # one refusal, so that the seed has nothing to draw
    (tmp_path / "b").mkdir()
    turned = splits_of(settings_for(tmp_path / "b", records[::-1]))
    for split, rows in parts.items():
        assert {row.prompt for row in turned[split]} == {row.prompt for row in rows}


def test_a_file_that_grows_moves_few_prompts_and_none_from_test_to_train(tmp_path):
    (tmp_path / "b").mkdir()
    small, large = (
        {
            row.prompt: split
            for split, rows in splits_of(settings_for(at, many(n, "goal", target="yes"))).items()
            for row in rows
        }
        for at, n in ((tmp_path, 200), (tmp_path / "b", 240))
    )
    moved = [(split, large[prompt]) for prompt, split in small.items() if large[prompt] != split]
    assert len(moved) < 25 and ("test", "train") not in moved and ("train", "test") not in moved


def test_the_seed_draws_one_refusal_for_a_row_whatever_split_is_asked(tmp_path):
    settings = settings_for(
        tmp_path, many(60, "goal", target="yes"), refusals=("no", "never", "not me")
    )
    parts = splits_of(settings)
    assert splits_of(settings) == parts and splits_of(settings, seed=1) != parts
    assert {row.completions[1] for row in parts["train"]} == {"no", "never", "not me"}
    tested = settings.model_copy(update={"test_harmful": settings.harmful})
    drawn = {row.row_id: row for part in parts.values() for row in part}
    assert all(drawn[row.row_id] == row for row in preference_rows(tested, 0))


def test_a_test_file_is_the_test_split_and_the_main_file_has_two_parts(tmp_path):
    tests = {
        "test_harmful": write(
            tmp_path,
            "th.json",
            [{"ask": "rob a mill"}, {"ask": "rob a Mill!"}, {"ask": "eat fire"}],
        ),
        "test_harmful_columns": {"prompt": "ask"},
        "test_benign": write(tmp_path, "tb.json", [{"instruction": "hum a tune"}]),
    }
    settings = settings_for(
        tmp_path, many(60, "goal", target="yes"), many(100, "instruction")[60:], **tests
    )
    harmful, benign = splits_of(settings), splits_of(settings, benign_rows)
    assert [len(part) for part in harmful.values()] == [51, 9, 3] and [
        len(p) for p in benign.values()
    ] == [34, 6, 1]
    assert [(r.row_id, r.prompt, r.completions, r.cluster) for r in harmful["test"]] == [
        ("harmful-test-0", "rob a mill", ("", settings.refusals[0]), "harmful-test-0"),
        ("harmful-test-1", "rob a Mill!", ("", settings.refusals[0]), "harmful-test-0"),
        ("harmful-test-2", "eat fire", ("", settings.refusals[0]), "harmful-test-2"),
    ]
    assert (
        benign["test"][0].row_id == "benign-test-0"
        and benign["test"][0].completions == settings.benign_responses
    )


def test_borderline_prompts_have_no_completion_and_unsafe_ones_are_left_out(tmp_path):
    path = write(
        tmp_path,
        "x.json",
        [{"prompt": "kill a process", "is": "safe"}, {"prompt": "rob", "is": "Unsafe"}],
    )
    assert borderline_rows(settings_for(tmp_path)) == []
    settings = settings_for(tmp_path, test_borderline=path)
    assert [r.row_id for r in borderline_rows(settings)] == ["borderline-0", "borderline-1"]
    (row,) = borderline_rows(
        settings.model_copy(update={"test_borderline_columns": {"prompt": "prompt", "label": "is"}})
    )
    assert row == Row("borderline-0", "kill a process", (), "borderline-0")
    (tmp_path / "x.json").write_text(json.dumps([{"prompt": "rob", "is": "unsafe"}]))
    with pytest.raises(ProfileError, match="data.test_borderline = .* has no row labelled 'safe'"):
        borderline_rows(
            settings.model_copy(
                update={"test_borderline_columns": {"prompt": "prompt", "label": "is"}}
            )
        )


def test_an_empty_split_is_an_error_that_says_what_to_do(tmp_path):
    settings = settings_for(tmp_path)
    with pytest.raises(
        ProfileError,
        match="data.harmful = .* 2 rows, too few for any in split 'test' .*data.test_harm",
    ):
        preference_rows(settings, 0, "test")
    with pytest.raises(ProfileError, match="data.benign = .* split 'tune'"):
        benign_rows(settings, 0, "tune")


def test_the_world_has_training_rows_only():
    world_data = DataSettings(rows=20)
    assert preference_rows(world_data, 3) == world_preference_rows(20, 3)
    assert benign_rows(world_data, 3, "train") == world_benign_rows(20, 3)
    for call in (
        lambda: preference_rows(world_data, 0, "test"),
        lambda: benign_rows(world_data, 0, "tune"),
    ):
        with pytest.raises(ValueError, match="drawn in latlib.data.prompts"):
            call()
    with pytest.raises(ValueError, match="latlib.data.prompts"):
        borderline_rows(world_data)
    with pytest.raises(
        ValueError, match="split = 'dev' is unknown: choose one of train, tune, test"
    ):
        preference_rows(world_data, 0, "dev")


def test_files_are_read_again_when_they_change(tmp_path):
    settings = settings_for(tmp_path)
    assert file_prompts(settings) is file_prompts(settings.model_copy())
    settings_for(tmp_path, harmful=[*HARMFUL, {"goal": "hide it", "target": "Sure, under"}])
    assert len(preference_rows(settings, 0)) == 3


def test_the_report_counts_rows_clusters_lengths_and_what_does_not_fit(tmp_path):
    harmful = [{"goal": "abc", "target": "x" * k} for k in (2, 30)] + [
        {"goal": "y" * 40, "target": "z"}
    ]
    settings = settings_for(
        tmp_path, harmful, test_borderline=write(tmp_path, "b.json", [{"prompt": "kill it"}])
    )
    # bytes; <user>...<assistant> around a prompt, <end> behind a completion
    tokenizer = small_tokenizer([])
    settings = settings.model_copy(update={"refusals": ("no",), "max_tokens": 30})
    profile = load_profile("tiny").model_copy(update={"data": settings})
    report = data_report(profile, tokenizer).set_index(["kind", "split"])
    assert list(report.index) == [("harmful", "train"), ("benign", "train"), ("borderline", "test")]
    line = report.loc["harmful", "train"]
    # a notebook shows it: no path of this machine
    assert line["source"] == Path(settings.harmful).name
    assert (line["rows"], line["clusters"], line["default_completions"]) == (3, 2, 3)
    assert (line["prompt_median"], line["prompt_longest"], line["completion_longest"]) == (
        5,
        42,
        31,
    )
    assert (line["over"], line["dropped"], line["cut"]) == (2, 0, 0)
    assert report.loc["benign", "train"]["default_completions"] == 2
    assert np.isnan(report.loc["borderline", "test"]["completion_median"])
    for too_long, counts in (("drop", (2, 2, 0)), ("truncate", (2, 1, 1))):
        data = settings.model_copy(update={"too_long": too_long})
        line = data_report(profile.model_copy(update={"data": data}), tokenizer).iloc[0]
        assert (line["over"], line["dropped"], line["cut"]) == counts
        with pytest.warns(
            UserWarning, match=f"of 3 rows, {counts[1]} are left out and {counts[2]} are cut"
        ):
            kept = tokenise(preference_rows(data, 0), tokenizer, data.max_tokens, too_long=too_long)
        assert len(kept) == 3 - counts[1]
    assert data_report(load_profile("tiny"), small_tokenizer([])).rows.min() > 0


@pytest.fixture(scope="module")
def real_data(root) -> Path:
    """The folder of real instruction sets: $LATLIB_SHARED_DATA, or shared/data beside the
    repository.
    """
    folder = Path(os.environ.get("LATLIB_SHARED_DATA") or root.parent / "shared" / "data")
    for name in ("advbench.csv", "harmless_train.json"):
        if not (folder / name).is_file():
            pytest.skip(
                f"no {name} in {folder}: set LATLIB_SHARED_DATA to the folder that holds it"
            )
    return folder


def small_tokenizer(texts) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = ["<pad>", "<user>", "<assistant>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant'"
        " %}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", chat_template=template
    )


@pytest.mark.parametrize("method", ["ssft", "lat"])
def test_real_rows_train_and_the_loss_falls(real_data, method):
    data = DataSettings(
        source="files",
        rows=64,
        harmful=str(real_data / "advbench.csv"),
        benign=str(real_data / "harmless_train.json"),
    )
    harmful, benign = preference_rows(data, 0), benign_rows(data, 0)
    # 20 of 64 held out
    assert len(harmful) == len(benign) == 44 and harmful[0].completions[0].startswith("Sure")
    tokenizer = small_tokenizer(
        [text for row in (*harmful, *benign) for text in (row.prompt, *row.completions)]
    )
    model = model_of(
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    lm = with_adapter(
        LanguageModel(model, tokenizer, ModelSettings(dtype="float32"), torch.float32), LORA, 0
    )
    rows = [tokenise(part, tokenizer, lm.context) for part in (harmful, benign)]
    attack = AttackSettings(
        sites=("embedding", 0.5), eps=0.5, steps=0 if method == "ssft" else 2, rule="l2"
    )
    settings = TrainSettings(
        steps=12,
        batch=8,
        benign_batch=8,
        micro_batch=4,
        lr=5e-2,
        attack=attack,
        defence=DefenceSettings(sft=0.5),
    )
    totals = []
    trainer = Trainer(lm, *rows, settings, seed=0)
    trainer.run(lambda step, metrics: totals.append(metrics["total"]))
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])
