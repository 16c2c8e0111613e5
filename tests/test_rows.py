"""Training rows: from the world's training pairs, from anyone's files, and, where they are, from real ones."""

import json
import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_models import LORA, model_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from latlib import world
from latlib.data import tokenise
from latlib.models import LanguageModel, with_adapter
from latlib.rows import benign_rows, preference_rows, world_benign_rows, world_preference_rows
from latlib.settings import AttackSettings, DataSettings, DefenceSettings, ModelSettings, ProfileError, TrainSettings
from latlib.train import Trainer

HARMFUL = [{"goal": "steal it", "target": "Sure, first"}, {"goal": "break it", "target": "Sure, take"}]
BENIGN = [{"instruction": "mend it", "category": None}, {"instruction": "bake it", "category": "food"}]


def write(folder, name, records) -> str:
    path = folder / name
    if path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(records).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n\n" for r in records))
    else:
        path.write_text(json.dumps(records))
    return str(path)


def settings_for(folder, harmful=HARMFUL, benign=BENIGN, suffix=".json", **changes) -> DataSettings:
    files = {"harmful": write(folder, f"harmful{suffix}", harmful), "benign": write(folder, f"benign{suffix}", benign)}
    return DataSettings(**{"source": "files", **files, **changes})


def test_rows_of_the_world_are_training_pairs_with_right_answers():
    harmful, benign = world_preference_rows(200, 0), world_benign_rows(200, 0)
    train = {f"{v}+{t}" for v, t in world.PAIRS["train"]}
    assert {row.cluster for row in (*harmful, *benign)} <= train
    assert all(row.completions[1] == world.REFUSAL != row.completions[0] for row in harmful)
    assert all(row.completions[0].startswith(world.AFFIRMATION) for row in harmful)
    assert all(len(row.completions) == 1 and row.completions != (world.REFUSAL,) for row in benign)
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
    assert [r.completions for r in benign_rows(settings, 0)] == [("glue",), settings.benign_responses]


def test_an_optional_column_that_is_named_must_be_there(tmp_path):
    settings = settings_for(tmp_path, benign_columns={"prompt": "instruction", "response": "ansver"})
    with pytest.raises(ProfileError, match="no column 'ansver' for 'response'; it has instruction, category"):
        benign_rows(settings, 0)


def test_no_more_rows_are_read_than_asked(tmp_path):
    settings = settings_for(tmp_path, rows=1)
    assert len(preference_rows(settings, 0)) == len(benign_rows(settings, 0)) == 1


@pytest.mark.parametrize(
    "harmful, said",
    [
        ([], ("data.harmful", "holds no rows")),
        ([{"prompt": "x", "target": "y"}], ("data.harmful", "no column 'goal'", "prompt, target", "harmful_columns")),
        ([{"goal": "x", "target": None}], ("data.harmful", "row 1", "'target' is empty", "fill or remove")),
        ([{"goal": "x", "target": "y"}, {"goal": "  ", "target": "y"}], ("row 2", "'goal' is empty")),
    ],
)
def test_unusable_files_name_the_field_the_row_and_the_mend(tmp_path, harmful, said):
    settings = settings_for(tmp_path, harmful=harmful)
    with pytest.raises(ProfileError) as caught:
        preference_rows(settings, 0)
    for part in (settings.harmful, *said):
        assert part in str(caught.value)


@pytest.mark.parametrize("name, text", [("rows.txt", "x"), ("rows.json", "{broken"), ("rows.csv", "")])
def test_unreadable_files_are_named(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    settings = DataSettings(source="files", harmful=str(path), benign=str(tmp_path / "nowhere.json"))
    with pytest.raises(ProfileError, match=f"data.harmful = .*{name}.* cannot be read"):
        preference_rows(settings, 0)
    with pytest.raises(ProfileError, match="data.benign = .*nowhere.json.* is not a file: check the path"):
        benign_rows(settings, 0)


@pytest.fixture(scope="module")
def real_data(root) -> Path:
    """The folder of real instruction sets: $LATLIB_SHARED_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("LATLIB_SHARED_DATA") or root.parent / "shared" / "data")
    for name in ("advbench.csv", "harmless_train.json"):
        if not (folder / name).is_file():
            pytest.skip(f"no {name} in {folder}: set LATLIB_SHARED_DATA to the folder that holds it")
    return folder


def small_tokenizer(texts) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<user>", "<assistant>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>", chat_template=template)


@pytest.mark.parametrize("method", ["ssft", "lat"])
def test_real_rows_train_and_the_loss_falls(real_data, method):
    data = DataSettings(
        source="files",
        rows=64,
        harmful=str(real_data / "advbench.csv"),
        benign=str(real_data / "harmless_train.json"),
    )
    harmful, benign = preference_rows(data, 0), benign_rows(data, 0)
    assert len(harmful) == len(benign) == 64 and harmful[0].completions[0].startswith("Sure")
    tokenizer = small_tokenizer([text for row in (*harmful, *benign) for text in (row.prompt, *row.completions)])
    model = model_of(
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    lm = with_adapter(LanguageModel(model, tokenizer, ModelSettings(dtype="float32"), torch.float32), LORA, 0)
    rows = [tokenise(part, tokenizer, lm.context) for part in (harmful, benign)]
    attack = AttackSettings(sites=("embedding", 0.5), eps=0.5, steps=0 if method == "ssft" else 2, rule="l2")
    settings = TrainSettings(
        steps=12, batch=8, benign_batch=8, micro_batch=4, lr=5e-2, attack=attack, defence=DefenceSettings(sft=0.5)
    )
    totals = []
    trainer = Trainer(lm, *rows, settings, seed=0)
    trainer.run(lambda step, metrics: totals.append(metrics["total"]))
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])
