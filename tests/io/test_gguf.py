"""GGUF: dequantised once into a standard folder that holds every number of the file, or refused."""

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub import constants
from tiny_gguf import TEMPLATE, TEXT, chat_tokenizer, gguf, little_model, write_gguf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

import latlib.io.gguf
import latlib.io.hub
from latlib.config.sections import ModelSettings
from latlib.errors import SettingError
from latlib.io.gguf import NOTE, folder_of
from latlib.io.hub import located
from latlib.models import load_model

CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}


def model_of(architecture="llama", **changes):
    kind, own = CONFIGS[architecture]
    return little_model(kind, **own | changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/latlib/gguf"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def opened(source):
    return load_model(source, ModelSettings(source=str(source), device="cpu", dtype="float32"))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("architecture", CONFIGS)
@torch.no_grad()
def test_what_is_run_is_what_the_file_holds(source, architecture, kind):
    model = model_of(architecture)
    kept = write_gguf(source / "tiny.gguf", model, architecture, kind=kind)
    lm = opened(source)
    found = lm.model.state_dict()
    for name, value in kept.items():
        assert torch.equal(found[name], value), name
    model.load_state_dict(kept, strict=False)
    model.tie_weights()
    ids = torch.arange(40)[None] + 3
    torch.testing.assert_close(lm.model(ids).logits, model(ids).logits)


def test_the_folder_is_a_standard_one_and_says_what_it_was(source, cache):
    write_gguf(source / "tiny.gguf", model_of(), kind="Q4_1")
    lm = opened(source)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert folder == folder_of(source / "tiny.gguf")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(again.config, "quantization_config")
    assert again.generation_config.eos_token_id == lm.tokenizer.eos_token_id == 2
    note = json.loads((folder / NOTE).read_text())
    assert note["file"] == "tiny.gguf" and note["types"] == {"Q4_1": 16, "F32": 5}
    assert note["numbers"] == sum(p.numel() for p in again.parameters())
    assert note["settings"]["general.name"] == "tiny" and len(note["sha256"]) == 64


@pytest.mark.parametrize(("pre", "digits"), [("smollm", True), ("gpt-2", False)])
def test_text_is_split_as_the_file_says(source, pre, digits):
    write_gguf(source / "tiny.gguf", model_of(), pre=pre)
    found, wanted = opened(source).tokenizer, chat_tokenizer(digits)
    assert found(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]
    assert found.decode(found(TEXT)["input_ids"]) == TEXT
    assert found.chat_template == TEMPLATE
    (kept,) = (path for path in folder_of(source / "tiny.gguf").parent.iterdir() if path.is_dir())
    again = AutoTokenizer.from_pretrained(kept)
    assert again(TEXT)["input_ids"] == wanted(TEXT)["input_ids"]


@torch.no_grad()
def test_the_rotations_of_llama_3_1_are_stretched(source):
    stretch = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    stretch |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = model_of(rope_parameters={"rope_theta": 500000.0, **stretch})
    plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq
    assert 7.9 < factors.max() and 1 < factors[4] < 8 and factors[0] < 1.1
    write_gguf(source / "tiny.gguf", model, more={"tensor": {"rope_freqs.weight": factors}})
    ids = torch.arange(200)[None] + 3
    torch.testing.assert_close(opened(source).model(ids).logits, model(ids).logits)


def test_it_is_dequantised_once(source, cache, monkeypatch):
    write_gguf(source / "tiny.gguf", model_of())
    opened(source)
    kept = [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.setattr(latlib.io.gguf, "save_standard", None)
    opened(source)
    opened(source / "tiny.gguf")
    assert [path for path in cache.iterdir() if path.is_dir()] == kept
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HOME", str(cache.parents[1]))
    write_gguf(source / "tiny.gguf", model_of(num_hidden_layers=3))
    assert opened(source).n_layers == 3, "another file of the same name"


def test_one_that_fails_on_the_way_leaves_nothing(source, cache, monkeypatch):
    write_gguf(source / "tiny.gguf", model_of())

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(latlib.io.gguf, "write_json", full)
    with pytest.raises(SettingError, match="model.source.*No space left"):
        opened(source)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("others", [[], ["more.gguf"], ["model.safetensors"]])
def test_a_repository_is_taken_by_its_files(source, tmp_path, monkeypatch, others):
    file = source / "tiny.gguf"
    write_gguf(file, model_of())

    class Hub:
        def list_repo_files(self, source, revision):
            assert (source, revision) == ("owner/name", "v1")
            return ["README.md", "tiny.gguf", *others]

    monkeypatch.setattr(latlib.io.hub, "HfApi", Hub)
    monkeypatch.setattr(
        latlib.io.hub, "hf_hub_download", lambda source, name, **_: str(source_of[name])
    )
    source_of = {"tiny.gguf": file}
    if others == ["more.gguf"]:
        with pytest.raises(SettingError, match="'owner/name' holds several GGUF files, more.gguf"):
            located("owner/name", "model.source", "v1")
        return
    wanted = "owner/name" if others else str(folder_of(file))
    assert located("owner/name", "model.source", "v1") == wanted


def several(folder):
    shutil.copy(folder / "tiny.gguf", folder / "tiny-Q8_0.gguf")


def in_parts(folder):
    (folder / "tiny.gguf").rename(folder / "tiny-00001-of-00002.gguf")


def cut(folder):
    file = folder / "tiny.gguf"
    file.write_bytes(file.read_bytes()[:-3000])


def cut_in_the_header(folder):
    file = folder / "tiny.gguf"
    file.write_bytes(file.read_bytes()[:300])


def pointer(folder):
    (folder / "tiny.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def another_architecture(folder):
    write_gguf(folder / "tiny.gguf", model_of(), "gemma")


def another_setting(folder):
    more = {"llama.attention.sliding_window": (8, gguf.GGUFValueType.UINT32)}
    write_gguf(folder / "tiny.gguf", model_of(), more=more)


def stretched_otherwise(folder):
    tensors = {"rope_freqs.weight": torch.full((8,), 3.0)}
    write_gguf(folder / "tiny.gguf", model_of(), more={"tensor": tensors})


def split_otherwise(folder):
    write_gguf(folder / "tiny.gguf", model_of(), pre="nobody-knows")


def turned_in_part(folder):
    more = {"llama.rope.dimension_count": (8, gguf.GGUFValueType.UINT32)}
    write_gguf(folder / "tiny.gguf", model_of(), more=more)


def a_tensor_too_many(folder):
    tensors = {"blk.0.attn_q_norm.weight": torch.ones(16)}
    write_gguf(folder / "tiny.gguf", model_of(), more={"tensor": tensors})


def a_tensor_lost(folder):
    model = model_of()
    del model.model.layers[1].mlp.up_proj
    write_gguf(folder / "tiny.gguf", model)


BROKEN = {
    several: "several GGUF files, tiny-Q8_0.gguf, tiny.gguf: give the path",
    in_parts: "one of several parts: join them",
    cut: "no GGUF file, or was cut",
    cut_in_the_header: "no GGUF file, or was cut",
    pointer: "no GGUF file, or was cut",
    another_architecture: "a model of architecture 'gemma', and GGUF models of llama,",
    turned_in_part: "turns 8 of 16 dimensions",
    a_tensor_too_many: "numbers, and transformers has a place for",
    a_tensor_lost: "weights lack model.layers.1.mlp.up_proj",
    another_setting: "sets llama.attention.sliding_window = 8, which is not read",
    stretched_otherwise: "stretches its rotations in a way that is not known",
    split_otherwise: "splits text as 'nobody-knows'",
}


@pytest.mark.parametrize("break_it", BROKEN)
def test_what_would_be_another_model_is_refused(source, cache, break_it):
    write_gguf(source / "tiny.gguf", model_of())
    break_it(source)
    with pytest.raises(SettingError, match=f"model.source = .*{BROKEN[break_it]}"):
        opened(source)
    assert not cache.exists() or not [path for path in cache.iterdir() if path.is_dir()]


def test_without_the_package_the_fix_is_said(source, monkeypatch):
    write_gguf(source / "tiny.gguf", model_of())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SettingError, match="package `gguf`, which is not installed: pip install"):
        opened(source)


def test_other_weights_come_first(source):
    write_gguf(source / "tiny.gguf", model_of(num_hidden_layers=3))
    model_of().save_pretrained(source)
    chat_tokenizer().save_pretrained(source)
    assert opened(source).n_layers == 2
    assert isinstance(opened(source).model, LlamaForCausalLM)
