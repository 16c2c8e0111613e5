"""Loading, adapters and the teacher: standard folders, one copy of the weights, errors by name."""

import pytest
import torch
from tiny_models import (
    LORA,
    SCALING,
    as_if_trained,
    benign_batch,
    language_model,
    model_of,
    plain_model,
    saved,
)
from transformers import Phi3Config, Phi3ForCausalLM

import latlib.fused.llama
import latlib.models
from latlib.batch import TokenRow, collate
from latlib.config.sections import LoraSettings, ModelSettings, ProfileError
from latlib.fused.llama import LeanNetwork
from latlib.io import machine
from latlib.losses import at_labels
from latlib.models import (
    LanguageModel,
    load_model,
    resolve_device,
    resolve_dtype,
    with_adapter,
)
from latlib.network import StockNetwork


def settings_for(**changes):
    return ModelSettings(**{"device": "cpu", "dtype": "float32", **changes})


def logits(network):
    batch = benign_batch()
    return network.unembed(at_labels(network.hidden(batch), batch.source))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def test_a_saved_folder_loads_as_the_same_model(folder):
    lm = load_model(folder, settings_for())
    torch.testing.assert_close(
        logits(lm.network()), logits(LeanNetwork(model_of(dtype=torch.float32)))
    )
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert (lm.n_layers, lm.context, lm.device.type) == (4, 64, "cpu")


def test_a_trained_adapter_survives_its_folder(folder, tmp_path):
    lm = as_if_trained(with_adapter(load_model(folder, settings_for()), LORA, seed=3), size=1.0)
    lm.model.save_pretrained(tmp_path)
    again = load_model(folder, settings_for(), tmp_path)
    assert torch.equal(logits(again.network()), logits(lm.network()))
    assert torch.equal(
        logits(again.network(adapter=False)), logits(load_model(folder, settings_for()).network())
    )


@pytest.mark.parametrize("forward", ["lean", "stock"])
def test_a_new_adapter_changes_no_bit(folder, forward):
    plain = load_model(folder, settings_for(forward=forward))
    before = logits(plain.network())
    assert torch.equal(logits(with_adapter(plain, LORA, seed=0).network()), before)


def test_the_adapter_comes_from_its_seed_and_leaves_the_global_one_alone(folder):
    def matrices(seed):
        lm = with_adapter(load_model(folder, settings_for()), LORA, seed)
        return torch.cat([p.flatten() for n, p in lm.model.named_parameters() if "lora_A" in n])

    state = torch.get_rng_state()
    a, b, c = matrices(0), matrices(0), matrices(1)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_lora_has_the_asked_rank_scale_and_targets(folder):
    model = with_adapter(load_model(folder, settings_for()), LORA, seed=0).model
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {n.rsplit(".", 1)[1] for n in layers} == set(LORA.targets)
    assert len(layers) == 4 * len(LORA.targets)
    assert all(
        m.r["default"] == LORA.r and m.scaling["default"] == SCALING for m in layers.values()
    )


def test_an_unknown_lora_target_is_named():
    with pytest.raises(ProfileError, match=r"lora.targets = \['q_porj'\]"):
        with_adapter(
            LanguageModel(model_of(), None, settings_for(), torch.float64),
            LoraSettings(targets=("q_porj",)),
            seed=0,
        )


def test_the_teacher_is_no_second_copy():
    lm = language_model("stock", trained=True)
    parameters = {id(p) for p in lm.model.parameters()}
    teacher, student = lm.network(adapter=False), lm.network()
    assert {
        id(p) for network in (teacher, student) for p in network.model.parameters()
    } == parameters
    assert not torch.allclose(logits(teacher), logits(student))


@pytest.mark.parametrize(
    "forward, kind", [("auto", LeanNetwork), ("lean", LeanNetwork), ("stock", StockNetwork)]
)
def test_which_network_runs_a_llama(folder, forward, kind):
    assert type(load_model(folder, settings_for(forward=forward)).network()) is kind


def test_an_adapter_does_not_change_how_a_model_runs(folder, monkeypatch):
    base = load_model(folder, settings_for())
    monkeypatch.setattr(
        "latlib.fused.llama.LEAN_LIMIT", sum(p.numel() for p in base.model.parameters())
    )
    assert base.paths.lean and with_adapter(base, LoraSettings(r=4), seed=0).paths.lean
    monkeypatch.setattr("latlib.fused.llama.LEAN_LIMIT", latlib.fused.llama.LEAN_LIMIT - 1)
    assert not base.paths.lean


def test_other_families_take_the_stock_network_and_lean_is_refused():
    def of(forward):
        return LanguageModel(model_of("qwen2"), None, settings_for(forward=forward), torch.float64)

    assert type(of("auto").network()) is StockNetwork
    with pytest.raises(
        ProfileError, match="model.forward = 'lean' does not fit Qwen2ForCausalLM.*'auto'"
    ):
        of("lean").network()


def test_bf16_computes_over_float32_weights_in_a_small_model_only(folder):
    lean = load_model(folder, settings_for(dtype="bfloat16"))
    stock = load_model(folder, settings_for(dtype="bfloat16", forward="stock"))
    assert next(lean.model.parameters()).dtype == torch.float32
    assert next(stock.model.parameters()).dtype == torch.bfloat16
    # rounded, far positions would turn wrongly
    assert stock.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert lean.network().dtype == stock.network().dtype == torch.bfloat16


def test_devices_and_dtypes_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(
        ProfileError, match="model.device = 'cuda:1' but torch sees no GPU.*'auto' or 'cpu'"
    ):
        resolve_device("cuda:1")
    assert resolve_dtype("float64", torch.device("cpu")) == torch.float64


@pytest.mark.parametrize(
    ("tiles", "instructions", "seconds", "dtype"),
    [
        (True, True, None, torch.bfloat16),
        (False, False, None, torch.float32),
        (False, True, [4.0, 1.0], torch.bfloat16),
        (False, True, [1.0, 2.0], torch.float32),
    ],
    ids=["AMX", "neither", "AVX512_BF16, fast", "AVX512_BF16, slow"],
)
def test_a_cpu_computes_in_what_it_is_fast_in(monkeypatch, tiles, instructions, seconds, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(machine, "fastest", lambda *_: seconds)
    machine._cpu_prefers_bfloat16.cache_clear()
    assert resolve_dtype("auto", torch.device("cpu")) == dtype
    machine._cpu_prefers_bfloat16.cache_clear()


def test_a_context_ends_where_one_row_would_turn_another():
    """Beyond it longrope (Phi-3) takes other rotations, for all rows of a batch."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 128}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0]}
    shape = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    shape |= dict(num_attention_heads=2, max_position_embeddings=512, initializer_range=0.25)
    shape |= dict(pad_token_id=0, eos_token_id=None, original_max_position_embeddings=128)
    config = Phi3Config(**shape, rope_parameters=rope)
    torch.manual_seed(0)
    lm = plain_model(Phi3ForCausalLM(config).double().eval())
    assert lm.context == 128
    short, long = (TokenRow((5, 6, 7), ((8,) * n,)) for n in (9, 200))
    at_limit = TokenRow((5, 6, 7), ((8,) * 125,))
    network = lm.network()

    def first_row(*rows):
        return network.hidden(collate(rows))[0, :11]

    torch.testing.assert_close(first_row(short, at_limit), first_row(short))
    assert not torch.allclose(first_row(short, long), first_row(short), atol=0.01)
