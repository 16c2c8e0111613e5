"""Models of other people: what is refused, what a profile can allow, and that nothing is opened
before that.
"""

import json
import sys

import httpx
import pytest
import torch
import transformers.dynamic_module_utils
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, LORA, as_if_trained, benign_batch, model_of, saved
from transformers import AutoModelForCausalLM

import latlib.io.hub
import latlib.models
from latlib.config.sections import ModelSettings, ProfileError
from latlib.experiment.released import load_released
from latlib.io import outages
from latlib.io.hub import Allowed, open_model, source_file
from latlib.losses import at_labels
from latlib.models import load_model, with_adapter


def settings_for(**changes):
    return ModelSettings(**{"device": "cpu", "dtype": "float32", **changes})


def logits(lm, **how):
    batch = benign_batch()
    network = lm.network(**how)
    return network.unembed(at_labels(network.hidden(batch), batch.source))


def pickled(folder, bomb=False):
    """The same folder with its weights as a pickle, as models were once published."""
    saved(folder)
    weights = dict(model_of(dtype=torch.float32).state_dict())
    (folder / "model.safetensors").unlink()
    torch.save({"bomb": Bomb()} if bomb else weights, folder / "pytorch_model.bin")
    return folder


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self):
        return (open, ("/nowhere/unpickled", "w"))


def adapter(folder, base, seed=1):
    with latlib.models.quietly():
        lm = with_adapter(load_model(base, settings_for()), LORA, seed)
    as_if_trained(lm, seed, size=1.0)
    lm.model.save_pretrained(folder)
    return folder, logits(lm)


def test_a_pickle_is_refused_unread_and_read_where_the_profile_allows_it(tmp_path):
    with pytest.raises(
        ProfileError, match="model.source = .* only pickled weights.*set model.allow_pickle: true"
    ):
        load_model(pickled(tmp_path / "bomb", bomb=True), settings_for())
    lm = load_model(pickled(tmp_path / "old"), settings_for(allow_pickle=True))
    assert torch.equal(logits(lm), logits(load_model(saved(tmp_path / "new"), settings_for())))


def test_safetensors_are_read_even_where_a_pickle_is_allowed(tmp_path):
    want = logits(load_model(saved(tmp_path), settings_for()))
    torch.save({"bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    assert torch.equal(logits(load_model(tmp_path, settings_for(allow_pickle=True))), want)


def test_a_pickled_adapter_is_refused_unread_and_read_where_the_profile_allows_it(tmp_path):
    base = saved(tmp_path / "base")
    folder, want = adapter(tmp_path / "adapter", base)
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"bomb": Bomb()}, folder / "adapter_model.bin")
    for call, field in ((load_model, "adapter"), (load_released, "released")):
        args = (base, settings_for(), folder)
        with pytest.raises(
            ProfileError,
            match=f"{field} = .*adapter' holds no adapter_model.safetensors, only pickled",
        ):
            call(*args)
    torch.save(weights, folder / "adapter_model.bin")
    assert torch.equal(logits(load_released(base, settings_for(allow_pickle=True), folder)), want)


def test_a_folder_without_weights_is_named(tmp_path):
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(
        ProfileError,
        match="model.source = .* holds no model.safetensors or model.safetensors.index",
    ):
        load_model(tmp_path, settings_for(allow_pickle=True))


MODEL_CODE = """
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
"""
TOKENIZER_CODE = """
open({mark!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def edited(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Where transformers copies foreign code before it runs it: here, and forgotten afterwards."""
    cache = tmp_path / "modules"
    cache.mkdir()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_foreign_code_does_not_run_unless_the_profile_allows_it(tmp_path, modules, what):
    folder, mark = saved(tmp_path / f"foreign_{what}"), tmp_path / "was-run"
    if what == "model":
        auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        edited(folder / "config.json", model_type="own", auto_map=auto_map)
    else:
        auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        edited(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)
    (folder / "own.py").write_text(
        (MODEL_CODE if what == "model" else TOKENIZER_CODE).format(mark=str(mark))
    )
    with pytest.raises(
        ProfileError, match="model.source = .* needs Python code .* model.trust_remote_code: true"
    ):
        load_model(folder, settings_for())
    assert not mark.exists()
    lm = load_model(folder, settings_for(trust_remote_code=True))
    assert mark.exists()
    assert type(lm.model if what == "model" else lm.tokenizer).__module__.startswith(
        "transformers_modules"
    )


def test_a_tokenizer_that_fails_only_in_use_is_named(tmp_path):
    folder = saved(tmp_path / "odd")
    edited(folder / "tokenizer_config.json", model_max_length="")
    with pytest.raises(ProfileError, match="tokenizer of model.source = .* cannot be loaded"):
        load_model(folder, settings_for())


def test_a_model_that_transformers_knows_is_opened_with_its_code_and_not_with_the_folders(tmp_path):
    folder, mark = saved(tmp_path / "known"), tmp_path / "was-run"
    edited(
        folder / "config.json",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (folder / "own.py").write_text(MODEL_CODE.format(mark=str(mark)))
    assert torch.equal(
        logits(load_model(folder, settings_for())),
        logits(load_model(saved(tmp_path / "plain"), settings_for())),
    )
    assert not mark.exists()


def test_a_released_adapter_is_put_on_the_base_and_a_released_model_stands_alone(tmp_path):
    base, other = saved(tmp_path / "base"), saved(tmp_path / "other", seed=7)
    folder, want = adapter(tmp_path / "adapter", base)
    lm = load_released(base, settings_for(), folder)
    plain = logits(load_model(base, settings_for()))
    assert torch.equal(logits(lm), want) and not torch.allclose(want, plain)
    assert torch.equal(logits(lm, adapter=False), plain)
    assert not any(p.requires_grad for p in lm.model.parameters())
    whole = load_released(base, settings_for(), str(other))
    assert torch.equal(logits(whole), logits(load_model(other, settings_for())))


def test_an_adapter_as_model_source_is_refused_before_the_model_it_names_is_looked_for(tmp_path):
    folder, _ = adapter(tmp_path / "adapter", saved(tmp_path / "base"))
    with pytest.raises(
        ProfileError, match="model.source = .*adapter' is an adapter, not a model: .*base"
    ):
        load_model(folder, settings_for())


def test_an_adapter_of_another_model_is_named(tmp_path):
    base, wide = saved(tmp_path / "base"), tmp_path / "wide"
    model = model_of(dtype=torch.float32, hidden_size=32)
    get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(wide)
    with pytest.raises(ProfileError, match="released = .*wide' cannot be loaded"):
        load_released(base, settings_for(), wide)


def test_broken_files_are_named(tmp_path):
    (saved(tmp_path) / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ProfileError, match="model.source = .* no safetensors file"):
        load_model(tmp_path, settings_for())


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", ""])
def test_a_missing_folder_is_named(source, tmp_path):
    with pytest.raises(
        ProfileError, match="model.source = .* is not a folder: give a model folder or a hub id"
    ):
        load_model(source, settings_for())
    with pytest.raises(ProfileError, match="released = .* is not a folder"):
        load_released(tmp_path, settings_for(), source)


def test_a_hub_model_that_is_not_here_says_so_without_a_network(tmp_path):
    with pytest.raises(
        ProfileError, match="model.source = 'no-owner/no-model' cannot be loaded .*give the folder"
    ):
        load_model("no-owner/no-model", settings_for())
    with pytest.raises(ProfileError, match="released = 'no-owner/no-model' cannot be loaded"):
        load_released(tmp_path, settings_for(), "no-owner/no-model")


@pytest.mark.parametrize(
    "error, said",
    [
        (GatedRepoError, "is gated: accept its terms"),
        (RevisionNotFoundError, "has no revision 'v1': fix model.revision"),
    ],
)
def test_what_the_hub_refuses_is_said_with_its_fix(monkeypatch, error, said):
    def refused(source, name, **options):
        response = httpx.Response(
            403, request=httpx.Request("GET", f"https://hub.invalid/{source}/{name}")
        )
        raise OSError("no") from error("403", response=response)

    settings = settings_for(source="owner/name", revision="v1")
    monkeypatch.setattr(latlib.io.hub, "cached_file", refused)
    with pytest.raises(ProfileError, match=f"model.source = 'owner/name' {said}"):
        load_model("owner/name", settings)


def test_the_revision_is_that_of_the_profiles_own_model_only(tmp_path, monkeypatch):
    folder, asked = saved(tmp_path), []
    real = {name: getattr(latlib.io.hub, name).from_pretrained for name in CLASSES}

    def stand_in(name):
        def from_pretrained(source, *args, revision=None, **options):
            if source != folder:  # not one that another stand-in calls
                asked.append((name, source, revision))
            return real[name](folder, *args, **options)

        return from_pretrained

    for name in CLASSES:
        monkeypatch.setattr(getattr(latlib.io.hub, name), "from_pretrained", stand_in(name))

    def cached(source, name, revision=None, **options):
        asked.append((name, source, revision))
        return str(folder / name) if (folder / name).is_file() else None

    for name in ("cached_file", "_hub_file"):
        monkeypatch.setattr(latlib.io.hub, name, cached)
    settings = settings_for(source="owner/name", revision="v1")
    load_model("owner/name", settings)
    assert {name for name, _, _ in asked} >= {
        *CLASSES,
        "config.json",
        "model.safetensors",
        "adapter_config.json",
    }
    assert {(source, revision) for _, source, revision in asked} == {("owner/name", "v1")}
    asked.clear()
    load_released("owner/name", settings, "other/name")
    assert {(source, revision) for _, source, revision in asked} == {("other/name", None)}


CLASSES = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_weights_are_read_in_their_precision_and_not_copied(tmp_path, monkeypatch, dtype):
    saved(tmp_path)
    read, real = [], open_model

    def watched(*args):
        read.append((args[-1], real(*args)))
        places.update(p.data_ptr() for p in read[-1][1].parameters())
        return read[-1][1]

    places = set()
    monkeypatch.setattr(latlib.models, "open_model", watched)
    lm = load_model(tmp_path, settings_for(dtype=dtype, forward="stock"))
    assert [asked for asked, _ in read] == [getattr(torch, dtype)]
    assert {p.data_ptr() for p in lm.model.parameters()} == places
    read.clear()
    places.clear()
    load_model(tmp_path, settings_for(dtype=dtype))  # lean: float32 weights under bfloat16
    assert [asked for asked, _ in read] == [torch.float32 if dtype == "bfloat16" else torch.float64]


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_are_not_rounded_by_a_low_precision(tmp_path, family):
    saved(tmp_path, family)
    with latlib.models.quietly():
        whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").named_buffers())
    found = dict(
        open_model(str(tmp_path), "model.source", Allowed(), torch.bfloat16).named_buffers()
    )
    turns = [name for name in whole if "inv_freq" in name]
    assert turns and all(torch.equal(found[name], whole[name]) for name in turns)
    assert all(found[name].dtype == torch.float32 for name in turns)


def test_a_file_that_cannot_be_asked_for_is_not_one_that_is_missing(monkeypatch):
    def out(source, name, revision=None):
        raise LocalEntryNotFoundError("not here") from TimeoutError("no answer")

    monkeypatch.setattr(outages, "WAITS", ())
    monkeypatch.setattr(latlib.io.hub, "hf_hub_download", out)
    with pytest.raises(ProfileError, match="'owner/name' cannot be had: the hub does not answer"):
        source_file("owner/name", "model.safetensors", "model.source")
