"""`--check` never says that everything is there for a run that a file on disk would stop later."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from broken_weights import (
    cut,
    cut_in_the_header,
    emptied,
    pointer,
    shard,
    with_value,
    without_a_layer,
    without_a_shard,
)
from huggingface_hub import constants
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_profile import small_run
from tiny_models import world_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Llama4Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
)

import latlib.io.gguf
from latlib.config.profile import load_profile
from latlib.config.sections import LoraSettings, ModelSettings, ProfileError
from latlib.errors import SettingError
from latlib.io.weights import INDEX
from latlib.models import load_model, with_adapter
from latlib.planning import check as planning
from latlib.planning import estimate, requirements
from latlib.planning.requirements import Machine
from latlib.planning.step_cost import Memory

MACHINE = Machine((), "", False, 2**40, 2**40, 2**40, True, False, True)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}[{{m.role}}]{{m.content}}{% endfor %}[assistant]"
)


TOWER = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)
TEXT = dict(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder with a model in three shards, an adapter for it, and two files of prompts."""
    home = tmp_path_factory.mktemp("sources")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(home / "model", max_shard_size="100KB")
    world_tokenizer().save_pretrained(home / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(home / "adapter")
    rows = "goal,target\n" + "".join(f"do thing {i} now,Sure thing {i}\n" for i in range(20))
    (home / "harmful.csv").write_text(rows)
    benign = rows.replace("goal", "instruction").replace("do", "bake")
    (home / "benign.csv").write_text(benign)
    return home


@pytest.fixture
def home(sources, tmp_path, monkeypatch) -> Path:
    """A copy that may be broken; a step's size is made up."""
    monkeypatch.setattr(estimate, "predicted_flop", lambda *_: 1e15)
    memory = Memory(10**9, 10**7, 10**7, 10**9)
    monkeypatch.setattr(estimate, "predicted_memory", lambda *_: memory)
    copied = Path(shutil.copytree(sources, tmp_path / "home"))
    monkeypatch.chdir(copied)
    return copied


def checked(home: Path, **sections) -> str:
    """What is missing, as text; '' for nothing. An unusable setting is named by its error."""
    tree = small_run()
    tree["model"]["device"] = "cpu"
    tree["released"] = {"theirs": "adapter"}
    tree["methods"]["theirs"] = {}
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    (home / "broken.yaml").write_text(yaml.safe_dump(tree))
    try:
        lines = planning.check(load_profile(home / "broken.yaml"), home / "run", MACHINE)
    except ProfileError as error:
        return str(error)
    wrong = [line for line in lines if line.state == "missing"]
    assert all(line.fix for line in wrong), "every one has a fix"
    return "\n".join(f"[{line.subject}] {line.text}: {line.fix}" for line in wrong)


def test_whole_sources_lack_nothing(home):
    assert checked(home) == ""


def test_large_weights_are_not_read_and_that_is_said(home, monkeypatch):
    with_value(shard(home / "model"), float("nan"))
    monkeypatch.setattr(requirements, "LOOKED_THROUGH", 1000)
    assert checked(home) == ""
    lines = planning.check(load_profile(home / "broken.yaml"), home / "run", MACHINE)
    (model,) = [line for line in lines if line.subject == "model"]
    assert "0.0 GB of weights, looked through for NaN when they are loaded" in model.text


def config_with(home: Path, **changes) -> None:
    path = home / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def template(home: Path, text: str | None) -> None:
    tokenizer = world_tokenizer()
    shutil.rmtree(home / "tokenizer", ignore_errors=True)
    for path in (home / "model").glob("chat_template*"):
        path.unlink()
    tokenizer.chat_template = text
    tokenizer.save_pretrained(home / "model")


def more_tokens(home: Path) -> None:
    tokenizer = world_tokenizer()
    tokenizer.add_tokens([f"<more-{i}>" for i in range(600)])
    tokenizer.save_pretrained(home / "model")


def prompt_tuned(home: Path) -> None:
    shutil.rmtree(home / "adapter")
    model = LlamaForCausalLM.from_pretrained(home / "model")
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(home / "adapter")


def adapter_lacks(home: Path) -> None:
    path = home / "adapter/adapter_model.safetensors"
    kept = {n: v for n, v in load_file(path).items() if "layers.2" not in n}
    save_file(kept, path)


def tokenizer_files(home: Path) -> None:
    for path in (home / "model").glob("*token*"):
        path.unlink()


def as_gguf(home: Path, **how) -> Path:
    """The same folder with a GGUF file in place of its model, and an adapter for that."""
    tiny_gguf = pytest.importorskip("tiny_gguf")
    shutil.rmtree(home / "model")
    (home / "model").mkdir()
    model = tiny_gguf.little_model()
    tiny_gguf.write_gguf(home / "model/tiny.gguf", model, **how)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(home / "adapter")
    return home / "model/tiny.gguf"


def adapter_with(home: Path, **changes) -> None:
    path = home / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def adapter_of_another_width(home: Path) -> None:
    wide = LlamaForCausalLM(LlamaConfig(**TEXT | {"hidden_size": 64}))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(wide, lora).save_pretrained(home / "adapter")


def numbers_of(home: Path, dtype: torch.dtype) -> None:
    path = shard(home / "model")
    values = {name: value.to(dtype) for name, value in load_file(path).items()}
    save_file(values, path, metadata={"format": "pt"})


def a_single_file_too(home: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, home / "model/model.safetensors")


def an_empty_folder(home: Path) -> None:
    (home / "harmful.csv").unlink()
    (home / "harmful.csv").mkdir()


def several_gguf(home: Path) -> None:
    file = as_gguf(home)
    shutil.copy(file, file.with_name("other.gguf"))


def gguf_cut(home: Path) -> None:
    file = as_gguf(home)
    file.write_bytes(file.read_bytes()[:-2000])


BREAKS = {
    "a tokenizer that is none": (
        lambda h: (h / "model/tokenizer.json").write_text("[]"),
        "the tokenizer of model",
    ),
    "an unknown function": (
        lambda h: config_with(h, hidden_act="mine"),
        "makes no model (KeyError",
    ),
    "unknown rotations": (
        lambda h: config_with(h, rope_parameters={"rope_type": "mine", "rope_theta": 1.0}),
        "makes no model (KeyError",
    ),
    "no blocks": (lambda h: config_with(h, num_hidden_layers=0), "outside this model of 0 blocks"),
    "8 bits that nobody mentions": (
        lambda h: numbers_of(h, torch.float8_e4m3fn),
        "are F8_E4M3 numbers, through which",
    ),
    "a NaN": (
        lambda h: with_value(shard(h / "model"), float("nan")),
        "holds NaN or infinite weights",
    ),
    "an infinity in an adapter": (
        lambda h: with_value(h / "adapter/adapter_model.safetensors", float("-inf")),
        "[released theirs] released theirs",
    ),
    "integers": (lambda h: numbers_of(h, torch.int8), "are I8 numbers, through which"),
    "a template without the reply": (
        lambda h: template(
            h, "{% for m in messages %}{% if loop.first %}{{m.content}}{% endif %}{% endfor %}"
        ),
        "leaves out what is asked or replied",
    ),
    "a template without the request": (lambda h: template(h, "hello"), "leaves out what is asked"),
    "an adapter of another width": (adapter_of_another_width, "the model has a place for (2, 32)"),
    "an adapter of another rank": (lambda h: adapter_with(h, r=4), "or with another r"),
    "an adapter for other layers": (
        lambda h: adapter_with(h, target_modules=["qkv_proj"]),
        "[released theirs] Target modules {'qkv_proj'} not found",
    ),
    "an unknown adapter": (lambda h: adapter_with(h, peft_type="MINE"), "theirs"),
    "a folder without data": (an_empty_folder, "doesn't contain any data files"),
    "too few rows to hold some out": (
        lambda h: (h / "harmful.csv").write_text("goal,target\na b c d,Sure\n"),
        "1 rows, too few for any in split",
    ),
    "no target": (lambda h: (h / "harmful.csv").write_text("goal,target\na b,\n"), "is empty"),
    "a column twice": (
        lambda h: (h / "harmful.csv").write_text("goal,goal\na,b\n"),
        "names a column twice",
    ),
    "several gguf files": (several_gguf, "several GGUF files, other.gguf, tiny.gguf: give"),
    "a gguf file cut": (gguf_cut, "was cut"),
    "gguf of unknown text": (lambda h: as_gguf(h, pre="mine"), "splits text as 'mine'"),
    "no model": (lambda h: shutil.rmtree(h / "model"), "[model] model: no such folder"),
    "no config": (lambda h: (h / "model/config.json").unlink(), "config.json"),
    "broken config": (lambda h: (h / "model/config.json").write_text("{"), "model"),
    "config of a list": (lambda h: (h / "model/config.json").write_text("[]"), "model"),
    "unknown kind": (lambda h: config_with(h, model_type="nothing-known"), "model"),
    "its own code": (
        lambda h: config_with(
            h,
            model_type="mine",
            auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "m.M"},
        ),
        "model",
    ),
    "no tokenizer": (tokenizer_files, "tokenizer"),
    "broken tokenizer": (
        lambda h: (h / "model/tokenizer.json").write_text("{"),
        "the tokenizer of model",
    ),
    "no weights": (
        lambda h: [p.unlink() for p in (h / "model").glob("*.safetensors*")],
        "holds no model.safetensors",
    ),
    "a shard missing": (lambda h: without_a_shard(h / "model"), "lacks model-00002"),
    "a shard cut": (lambda h: cut(h / "model"), "bytes long"),
    "a header cut": (lambda h: cut_in_the_header(h / "model"), "header"),
    "an empty shard": (lambda h: emptied(h / "model"), "no safetensors file"),
    "a git-lfs pointer": (lambda h: pointer(h / "model"), "pointer of git-lfs"),
    "broken index": (lambda h: (h / "model" / INDEX).write_text("[1"), "is no index"),
    "a layer missing": (lambda h: without_a_layer(h / "model"), "model.layers.3."),
    "another width": (lambda h: config_with(h, intermediate_size=64), "its config says"),
    "another depth": (lambda h: config_with(h, num_hidden_layers=6), "model.layers.4."),
    "gptq": (
        lambda h: config_with(h, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised (gptq)",
    ),
    "8 bit": (
        lambda h: config_with(
            h, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}
        ),
        "quantised (bitsandbytes)",
    ),
    "fp8": (
        lambda h: config_with(h, quantization_config={"quant_method": "fp8"}),
        "quantised (fp8)",
    ),
    "a single file, which is read": (a_single_file_too, "lack model.embed_tokens.weight"),
    "special tokens of a list": (
        lambda h: (h / "model/special_tokens_map.json").write_text("[1]"),
        "cannot be loaded",
    ),
    "rows beyond the context": (
        lambda h: config_with(h, max_position_embeddings=8),
        "more than max_tokens = 8",
    ),
    "an adapter's targets broken": (lambda h: adapter_with(h, target_modules="("), "missing )"),
    "too many tokens": (more_tokens, "largest token id"),
    "no template": (lambda h: template(h, None), "no chat template"),
    "a template that raises": (lambda h: template(h, "{{ nothing.here.at.all }}"), "cannot write"),
    "a broken template": (lambda h: template(h, "{% for m in %}"), "cannot write"),
    "an adapter without weights": (
        lambda h: (h / "adapter/adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors",
    ),
    "an adapter cut": (
        lambda h: (h / "adapter/adapter_model.safetensors").write_bytes(
            (h / "adapter/adapter_model.safetensors").read_bytes()[:-9]
        ),
        "bytes long",
    ),
    "an adapter's config broken": (
        lambda h: (h / "adapter/adapter_config.json").write_text("{"),
        "theirs",
    ),
    "a prompt-learning adapter": (prompt_tuned, "PROMPT_TUNING"),
    "an adapter lacks weights": (adapter_lacks, "theirs"),
    "no harmful file": (lambda h: (h / "harmful.csv").unlink(), "harmful.csv"),
    "an empty file": (lambda h: (h / "harmful.csv").write_text(""), "harmful.csv"),
    "another column": (lambda h: (h / "benign.csv").write_text("a,b\n1,2\n"), "instruction"),
    "a field too many": (
        lambda h: (h / "harmful.csv").write_text("goal,target\na,b,c\n"),
        "harmful.csv",
    ),
    "not UTF-8": (lambda h: (h / "harmful.csv").write_bytes(b"goal,target\n\xff,a\n"), "harmful"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_would_stop_the_run_is_named(home, name):
    break_it, named = BREAKS[name]
    break_it(home)
    assert named in checked(home), name


# ---- models that see, too -------------------------------------------------------------------------


def gemma3() -> Gemma3Config:
    text = TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 64}
    return Gemma3Config(
        text_config=text, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=5
    )


def llama4() -> Llama4Config:
    text = TEXT | {"intermediate_size_mlp": 48, "num_local_experts": 4}
    sides = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 16)
    return Llama4Config(vision_config=TOWER | sides, text_config=text)


def qwen2_vl() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    )


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (gemma3, ""),
        (llama4, ""),
        (qwen2_vl, "'qwen2_vl' model, which transformers does not open as a language model"),
    ],
)
def test_a_model_that_sees_too_is_run_by_its_language_model_or_refused(home, config, missing):
    torch.manual_seed(0)
    shutil.rmtree(home / "model")
    AutoModelForImageTextToText.from_config(config()).save_pretrained(home / "model")
    world_tokenizer().save_pretrained(home / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if not missing:
        base = AutoModelForCausalLM.from_pretrained(home / "model")
        get_peft_model(base, lora).save_pretrained(home / "adapter")
    found = checked(home)
    settings = ModelSettings(source=str(home / "model"), device="cpu", dtype="float32")
    if missing:
        assert missing in found
        with pytest.raises(SettingError, match=f"model.source = .*{missing}"):
            load_model(home / "model", settings)
        return
    assert found == ""
    lm = with_adapter(load_model(home / "model", settings), LoraSettings(r=2), 0)
    adapted = [name for name, _ in lm.model.named_parameters() if "lora_A" in name]
    assert len(adapted) == 4 * 7 and not any("vision" in name for name in adapted)


def test_a_step_that_cannot_be_counted_is_said(home, monkeypatch):
    def count(*_):
        raise RuntimeError("a kernel\nneeds data")

    monkeypatch.setattr(estimate, "predicted_memory", count)
    assert checked(home) == ""
    lines = planning.check(load_profile(home / "broken.yaml"), home / "run", MACHINE)
    (memory,) = (line for line in lines if line.subject == "memory")
    assert memory.text.startswith("no prediction of memory or time for 'llama' models (a kernel;")
    assert not any(line.subject == "time" for line in lines)


def test_a_system_prompt_that_the_template_refuses_is_named(home):
    template(home, NO_SYSTEM)
    assert checked(home) == ""
    lines = planning.check(load_profile(home / "broken.yaml"), home / "run", MACHINE)
    (left_out,) = (line.text for line in lines if line.subject == "jailbreaks")
    assert left_out.startswith("'system' will be left out")
    assert "data.system_prompt" in checked(home, data={"system_prompt": "Be kind."})


def test_a_template_is_asked_with_its_arguments(home):
    template(home, "{{ need + '' }}{% for m in messages %}{{m.content}}{% endfor %}")
    assert "'need' is undefined" in checked(home)
    assert checked(home, model={"template": {"need": "x"}}) == ""


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rerouting": {"sites": [9]}, "attack": {"steps": 0}}, "site = 9 is outside"),
        ({}, "trains without an attack"),
    ],
)
def test_an_objective_that_does_not_fit_is_named(home, settings, named):
    assert named in checked(home, train={"objective": "rerouting", **settings})


@pytest.mark.parametrize("changes", [{"hidden_act": "mine"}, {"_attn_implementation": "mine"}])
def test_a_config_that_makes_no_model_is_an_error_where_it_is_opened(home, changes):
    config_with(home, **changes)
    with pytest.raises(SettingError, match="model.source = .* cannot be loaded"):
        load_model(home / "model", ModelSettings(source=str(home / "model"), device="cpu"))


def test_a_target_that_is_no_layer_is_named(home):
    assert "qkv_proj" in checked(home, lora={"targets": ["q_proj", "qkv_proj"]})


def test_gguf_lacks_nothing_whole_and_its_package_otherwise(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(home / "cache"))
    file = as_gguf(home)
    for source in ("model", "model/tiny.gguf"):
        assert checked(home, model={"source": source}) == ""
    assert not (home / "cache").exists(), "nothing is made by looking"
    load_model(file, ModelSettings(source=str(file), device="cpu"))
    assert checked(home) == ""
    shutil.rmtree(home / "cache")
    monkeypatch.setitem(sys.modules, "gguf", None)
    latlib.io.gguf._read.cache_clear()
    assert "package `gguf`, which is not installed: pip install gguf" in checked(home)


@pytest.mark.parametrize(
    "grader, named",
    [
        ({"name": "harmbench", "source": "/nope"}, "[grader] /nope: no such folder"),
        ({"name": "guard", "source": "model", "base": "/nope"}, "[grader] /nope: no such folder"),
        ({"name": "harmbench", "source": "model", "template": "no.txt"}, "no.txt' cannot be read"),
        ({"name": "harmbench", "source": "empty"}, "[grader] folder "),
        ({"name": "phrases", "source": "model"}, "evaluation.grader.name = 'phrases' is no model"),
        ({"name": "harmbench", "source": "model"}, ""),
    ],
)
def test_a_grader_is_looked_for_before_anything_is_trained(home, grader, named):
    (home / "empty").mkdir()
    said = checked(home, evaluation={"grader": grader})
    assert (named in said) if named else said == ""
