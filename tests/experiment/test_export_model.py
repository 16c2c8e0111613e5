"""Merged models: standard folders that say what the adapter on its base says, and nothing of this
machine.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from architectures import random_model

import latlib
from latlib.config.paths import portable
from latlib.config.profile import Profile, load_profile, validated
from latlib.config.sections import ProfileError
from latlib.experiment import export_model
from latlib.models import load_model


@pytest.fixture(scope="module")
def run(smoke_run):
    smoke_run.ensure([("lat", 0, "no-kl")])
    return smoke_run


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    return export_model.export(run, "lat", 0, tmp_path_factory.mktemp("to") / "model", "no-kl")


def test_it_says_what_the_adapter_on_its_base_says(run, merged):
    ids = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    apart = run.model("lat", 0, "no-kl").model
    with torch.no_grad():
        expected, base = apart(ids).logits, run.model("base", 0).model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 1e-3
    again = load_model(merged, run.profile.model)
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, expected, rtol=0, atol=1e-5)


ALONE = """
import sys
sys.modules["peft"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
out = model.generate(**tokenizer(text, return_tensors="pt", add_special_tokens=False), max_new_tokens=3)
assert "latlib" not in sys.modules
print(out.shape[1])
"""


def test_it_needs_neither_peft_nor_latlib(merged):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(merged)], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3


def test_the_folder_is_a_standard_one_with_all_that_made_it(run, merged):
    names = {p.name for p in merged.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert not any("adapter" in name for name in names)
    assert not any("lora" in name for name in load_file(merged / "model.safetensors"))
    assert (
        AutoTokenizer.from_pretrained(merged).get_vocab()
        == run.model("base", 0).tokenizer.get_vocab()
    )
    record = json.loads((merged / "latlib.json").read_text())
    assert (
        record["latlib"] == record["merged_by"] == latlib.__version__
        and record["base"] == "../base-seed0"
    )
    assert record["training"]["defence"]["kl"] == 0.0 and record["dtype"] == "float32"
    assert record["settings"]["train"]["steps"] == 6 and record["largest_logit_difference"] < 1e-5
    card = (merged / "README.md").read_text()
    assert (
        "# lat[no-kl], seed 0 (profile smoke), merged" in card
        and "library_name: transformers" in card
    )
    assert "{" not in card and "A LoRA adapter (r = 4" in card
    assert oct(merged.stat().st_mode & 0o777) == "0o755"


def told_of_this_machine(folder):
    words = (str(Path.home()) + "/", socket.gethostname(), "/tmp/", os.getcwd())
    files = [p for p in folder.iterdir() if p.suffix not in (".safetensors",)]
    return [
        (f.name, word) for f in files for word in words if word in f.read_text(encoding="utf-8")
    ]


def test_no_path_of_this_machine_is_in_either_folder(run, merged):
    for folder in (merged, run.layout.model_folder(run.spec("lat", 0, "no-kl"))):
        assert told_of_this_machine(folder) == []


def test_both_folders_hold_the_whole_profile(run, merged):
    for folder in (
        merged,
        run.layout.model_folder(run.spec("lat", 0, "no-kl")),
        run.folder / "models" / "base-seed0",
    ):
        assert (
            validated(Profile, yaml.safe_load((folder / "profile.yaml").read_text())) == run.profile
        )
        assert json.loads((folder / "latlib.json").read_text())["latlib"] == latlib.__version__


def test_paths_in_settings_leave_their_last_part():
    smoke = load_profile("smoke")
    data = {"source": "files", "harmful": "/home/me/secret/advbench.csv", "benign": "~/alpaca.json"}
    profile = validated(
        Profile, smoke.model_dump() | {"data": data, "released": {"lat": "/data/models/lat"}}
    )
    found = portable(profile.model_dump(mode="json"))
    assert (found["data"]["harmful"], found["data"]["benign"]) == ("advbench.csv", "alpaca.json")
    assert found["released"] == {"lat": "lat"}
    assert found["model"] == profile.model_dump(mode="json")["model"]
    assert portable({"a": ["owner/name", 1, None]}) == {"a": ["owner/name", 1, None]}


def test_a_folder_that_holds_something_is_refused_and_left(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds something already.*--to"):
        export_model.export(run, "lat", 0, tmp_path, "no-kl")
    with pytest.raises(FileExistsError):
        export_model.export(run, "lat", 0, tmp_path / "thesis.tex", "no-kl")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_half_made_is_left(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_model, "model_card", lambda record, library: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model.export(run, "lat", 0, tmp_path / "to", "no-kl")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_changes_the_model_is_an_error(run, tmp_path, monkeypatch):
    plain = LoraModel.merge_and_unload

    def wrong(self, **options):
        model = plain(self, **options)
        model.get_input_embeddings().weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(ValueError, match=r"lat\[no-kl\] seed 0: merged, it says other things"):
        export_model.export(run, "lat", 0, tmp_path / "to", "no-kl")
    assert list(tmp_path.iterdir()) == []


TARGETS = ["q_proj", "down_proj"]
EMBEDDING, HEAD = [*TARGETS, "embed_tokens"], [*TARGETS, "lm_head"]
ADAPTERS = {
    "embedding": {"target_modules": EMBEDDING},
    "head": {"target_modules": HEAD},
    "both": {"target_modules": [*EMBEDDING, "lm_head"]},
    "both as one": {"target_modules": EMBEDDING, "ensure_weight_tying": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 4, 5]},
    "dora": {"target_modules": EMBEDDING, "use_dora": True},
    "rslora": {"use_rslora": True},
}


def adapted(architecture, **options):
    """A random model under an adapter that says something in all its parts."""
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": TARGETS} | options)
    model = get_peft_model(random_model(architecture), config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    marks = ("lora_", "modules_to_save", "token_adapter")
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in marks) and "original_module" not in name:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore:embedding and head:UserWarning")
@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
@torch.no_grad()
def test_any_adapter_is_exported_as_it_was_trained(architecture, kind, tmp_path):
    model = adapted(architecture, **ADAPTERS[kind])
    ids = torch.arange(40).view(2, 20)
    expected = model(ids).logits
    export_model.merged(model, torch.float32)[0].save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    plain = random_model(architecture)(ids).logits
    assert (found - plain).abs().max() > 0.1


def test_a_shared_matrix_becomes_two_only_where_the_adapter_is_on_it():
    with pytest.warns(UserWarning, match="embedding and head are one matrix in the base"):
        model, _ = export_model.merged(adapted("llama-tied", target_modules=HEAD), torch.float32)
    assert not model.config.tie_word_embeddings
    model, _ = export_model.merged(adapted("llama-tied"), torch.float32)
    assert (
        model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    )


def test_an_adapter_that_no_weights_hold_is_an_error():
    with pytest.raises(ValueError, match="its adapter cannot be merged .*bias"):
        export_model.merged(adapted("llama", lora_bias=True), torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("lat", 1), FileNotFoundError, "lat seed 1 is not in .*train it first"),
        (("base", 0), ProfileError, "no adapter of this run"),
        (("latt", 0), ProfileError, "method = 'latt'"),
    ],
)
def test_what_cannot_be_merged_is_named(run, tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        export_model.export(run, *arguments, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_the_command_line(run, tmp_path, capsys):
    common = [
        "--profile",
        "smoke",
        "--method",
        "lat",
        "--variant",
        "no-kl",
        "--out",
        str(run.folder),
    ]
    (tmp_path / "to").mkdir()  # an empty folder is fine
    assert export_model.main([*common, "--to", str(tmp_path / "to")]) == 0
    assert (
        capsys.readouterr().out == f"{tmp_path / 'to'}\n"
        and (tmp_path / "to" / "model.safetensors").is_file()
    )
    assert export_model.main([*common, "--to", str(tmp_path / "to")]) == 2
    assert "holds something already" in capsys.readouterr().err
