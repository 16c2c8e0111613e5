"""Weights that are not whole, of another model, quantised or NaN are found before anything is
trained on them, and named.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from broken_weights import (
    cut,
    cut_in_the_header,
    emptied,
    pointer,
    shard,
    without_a_layer,
    without_a_shard,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import world_tokenizer
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from architectures import random_model

from latlib.config.sections import LoraSettings, ModelSettings
from latlib.errors import SettingError
from latlib.io.weights import INDEX, check_folder
from latlib.models import load_model, with_adapter

SHAPE = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(folder, max_shard_size="100KB")
    world_tokenizer().save_pretrained(folder)
    assert (folder / INDEX).is_file()
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def opened(folder: Path, **options):
    return load_model(
        folder, ModelSettings(source=str(folder), device="cpu", dtype="float32"), **options
    )


def a_tensor_lost(folder: Path) -> None:
    path = shard(folder)
    kept = dict(list(load_file(path).items())[1:])
    save_file(kept, path, metadata={"format": "pt"})


def of_another_width(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    added = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}
    (folder / "config.json").write_text(json.dumps(config | added))


def index_broken(folder: Path) -> None:
    (folder / INDEX).write_text("{")


BROKEN = {
    without_a_shard: "lacks model-00002",
    cut: "bytes long, and should be",
    cut_in_the_header: "no safetensors file, or was cut in its header",
    emptied: "no safetensors file",
    pointer: "pointer of git-lfs",
    without_a_layer: r"lack model.layers.3\.",
    a_tensor_lost: "which its index names",
    of_another_width: "and its config says",
    quantised: r"quantised \(gptq\)",
    index_broken: "is no index",
}


@pytest.mark.parametrize("break_it", BROKEN)
def test_weights_that_are_not_whole_are_named_by_their_headers_and_when_opened(folder, break_it):
    break_it(folder)
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(SettingError, match=BROKEN[break_it]):
        check_folder(folder, config, "model.source")
    with pytest.raises(SettingError, match="model.source"):
        opened(folder)


@pytest.mark.parametrize("name", ["llama-tied", "gpt-neox", "qwen2-moe", "granite-moe", "gemma3"])
def test_a_family_whose_files_have_other_names_is_not_called_broken(name, tmp_path):
    random_model(name).save_pretrained(tmp_path)
    check_folder(tmp_path, AutoConfig.from_pretrained(tmp_path), "model.source")


def test_whole_weights_pass(whole):
    check_folder(whole, AutoConfig.from_pretrained(whole), "model.source")
    assert opened(whole).paths.lean


def test_nan_weights_are_found_before_they_train(folder):
    path = shard(folder)
    values = load_file(path)
    name = next(iter(values))
    values[name].view(-1)[3] = float("nan")
    save_file(values, path, metadata={"format": "pt"})
    with pytest.raises(SettingError, match=f"{name} holds NaN"):
        opened(folder)


def test_a_tokenizer_of_another_model_is_named(folder):
    tokenizer = world_tokenizer()
    tokenizer.add_tokens([f"<more-{i}>" for i in range(600)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SettingError, match="largest token id is .* has 512 rows"):
        opened(folder)


# ---- adapters ----------------------------------------------------------------------------------


def adapter(folder: Path, to: Path, config=None) -> Path:
    model = LlamaForCausalLM.from_pretrained(folder)
    config = config or LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(to)
    return to


def test_a_whole_adapter_opens(folder, tmp_path):
    assert opened(folder, adapter=adapter(folder, tmp_path / "adapter")).n_layers == 4


def test_an_adapter_without_some_weights_is_refused(folder, tmp_path):
    path = adapter(folder, tmp_path / "adapter") / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "layers.2" not in name}
    save_file(kept, path)
    with pytest.raises(SettingError, match="adapter = .* lacks .*layers.2"):
        opened(folder, adapter=path.parent)


def test_an_adapter_with_nan_is_refused(folder, tmp_path):
    path = adapter(folder, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
    with pytest.raises(SettingError, match="adapter = .*holds NaN or infinite weights"):
        opened(folder, adapter=path.parent)


def test_an_adapter_with_other_names_is_refused_and_the_base_not_measured(folder, tmp_path):
    path = adapter(folder, tmp_path / "adapter") / "adapter_model.safetensors"
    renamed = {name.replace(".self_attn.", ".attention."): v for name, v in load_file(path).items()}
    save_file(renamed, path)
    with pytest.raises(SettingError, match="adapter = "):
        opened(folder, adapter=path.parent)


def test_an_adapter_for_another_base_is_refused(folder, tmp_path):
    path = adapter(folder, tmp_path / "adapter") / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "owner/other-model"}))
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config._name_or_path = "owner/this-model"
    from peft import PeftConfig

    from latlib.io.hub import check_adapter

    with pytest.raises(SettingError, match="trained on 'owner/other-model'.*'owner/this-model'"):
        check_adapter(PeftConfig.from_pretrained(path.parent), model, "adapter")


def test_a_prompt_learning_adapter_is_refused_by_its_kind(folder, tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    made = adapter(folder, tmp_path / "adapter", config)
    with pytest.raises(SettingError, match="PROMPT_TUNING adapter, which adds tokens"):
        opened(folder, adapter=made)


def test_targets_without_a_layer_are_named_with_the_layers_there_are(folder):
    lm = opened(folder)
    with pytest.raises(SettingError, match="has no qkv_proj; its layers are .*q_proj"):
        with_adapter(lm, LoraSettings(r=2, targets=("q_proj", "qkv_proj")), seed=0)
