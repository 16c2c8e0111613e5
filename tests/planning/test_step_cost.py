"""A step without data takes what the same step takes on a CPU, and the short way says what the long
way says.
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import language_model, token_rows
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from architectures import random_model as random_model_of

from latlib.config.sections import (
    AttackSettings,
    DefenceSettings,
    LoraSettings,
    ProfileError,
    TrainSettings,
)
from latlib.fused import products
from latlib.planning.step_cost import (
    FLOP,
    PEAK,
    Lengths,
    StepCounter,
    bytes_of,
    fake_model,
    memory_of,
    micro_batches,
    on_each_gpu,
    predicted_flop,
    predicted_memory,
    random_model,
    random_trainer,
    step_counts,
)
from latlib.train import Trainer

SHAPE = dict(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)
FAMILIES = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**{**SHAPE, "tie_word_embeddings": True}),
    "qwen2": Qwen2Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, query_pre_attn_scalar=16),
    "phi3": Phi3Config(**SHAPE),
}
FEW = ("q_proj", "v_proj", "up_proj")
LENGTHS = Lengths(9, 7)


def lora_of(family: str) -> LoraSettings:
    return LoraSettings(r=4, targets=("qkv_proj", "down_proj") if family == "phi3" else FEW)


def settings_of(
    batch=4, micro_batch=2, iterations=1, sites=(0, 2), steps=2, **attack
) -> TrainSettings:
    return TrainSettings(
        batch=batch,
        benign_batch=batch,
        micro_batch=micro_batch,
        iterations=iterations,
        attack=AttackSettings(sites=sites, steps=steps, **attack),
        defence=DefenceSettings(sft=0.2),
    )


def peak_and_flop(lm, settings) -> tuple[int, int]:
    counts = step_counts(random_trainer(lm, settings, LENGTHS))
    return counts[:, PEAK].max(), counts[-1, FLOP]


@pytest.fixture(scope="module")
def llama():
    return fake_model(FAMILIES["llama"], torch.bfloat16, lora_of("llama"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_without_data_takes_what_it_takes_on_a_cpu(family):
    config, lora, settings = FAMILIES[family], lora_of(family), settings_of(micro_batch=4, steps=1)
    fake = fake_model(config, torch.float32, lora)
    peak, flop = peak_and_flop(fake, settings)
    lm = random_model(config, torch.float32, lora, "cpu")
    trainer = random_trainer(lm, settings, LENGTHS)
    trainer.train_step()  # the moments are there
    trainer.optimiser.zero_grad()
    with StepCounter() as real:
        trainer.train_step()
    assert peak == pytest.approx(real.peak, rel=0.001)
    assert flop == real.flop
    memory = memory_of(fake, peak)
    adapter = bytes_of(trainer.parameters)
    assert (memory.adapter, memory.optimiser) == (adapter, 2 * adapter)
    plain = AutoModelForCausalLM.from_config(config)
    assert memory.weights == 4 * sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        settings_of(3, 1, 3, ("embedding", 1, 2), 1, rule="adamw"),
        settings_of(2, 2, 1, (1,), 3),
        settings_of(2, 2, 2, (0.5,), 2, targeted=False),
        settings_of(2, 1, 2, steps=0),
        settings_of(2, 1).model_copy(update={"attack_after": 5}),
        settings_of(2, 1, 2, steps=0).model_copy(update={"objective": "rerouting"}),
    ],
    ids=["embedding", "one", "untargeted", "plain", "before the attack", "rerouting"],
)
def test_the_short_way_says_what_the_long_way_says(settings, llama):
    peak, flop = peak_and_flop(llama, settings)
    assert predicted_flop(llama, settings, LENGTHS) == pytest.approx(flop, rel=1e-9)
    memory = predicted_memory(llama, settings, LENGTHS)
    assert memory == memory_of(llama, memory.peak)
    # gradients may be there already when a single micro-batch needs most
    assert 0.96 * peak <= memory.peak <= 1.01 * peak + memory.adapter


@pytest.mark.parametrize("name", ["qwen3.5", "deepseek-v3"])
def test_blocks_of_several_kinds_are_counted_one_by_one(name):
    """Linear and full attention; a dense block before those with experts: no few blocks tell."""
    lora = LoraSettings(r=2, targets=("o_proj",))
    lm = fake_model(random_model_of(name).config, torch.bfloat16, lora)
    settings = settings_of(2, 2, 2, (1,), 3)
    peak, flop = peak_and_flop(lm, settings)
    assert predicted_flop(lm, settings, LENGTHS) == pytest.approx(flop, rel=0.02)
    memory = predicted_memory(lm, settings, LENGTHS)
    assert 0.96 * peak <= memory.peak <= 1.01 * peak + memory.adapter


def test_micro_batches_are_the_trainers():
    for settings in (settings_of(5, 2), settings_of(3, 8), settings_of(6, 4, targeted=False)):
        trainer = Trainer(language_model("stock"), token_rows(8, 2), token_rows(8, 1), settings, 0)
        parts = trainer._micro_batches(True, torch.Generator().manual_seed(0))
        count, harmful, benign = micro_batches(settings)
        assert count == len(parts)
        assert benign == max(part.benign.shape[0] for part in parts)
        if settings.attack.targeted:
            assert harmful == max(part.attacked.shape[0] for part in parts)
    assert micro_batches(settings_of(6, 2), processes=2) == (4, 2, 2)


def test_allocations_are_followed_until_they_are_freed():
    weight = torch.zeros(10, 10)
    with StepCounter() as memory:
        a = torch.ones(1000, dtype=torch.float32)  # 4,000 bytes
        view = a[10:].view(2, -1)  # no storage of its own
        weight.add_(1)  # nor this
        b = a.double()  # 8,000
        assert memory.live == 12_000
        del a
        assert memory.live == 12_000  # the view holds it
        del view
        assert memory.live == 8_000
        c = torch.empty(2_500, dtype=torch.float32)
        assert (memory.live, memory.peak) == (18_000, 18_000)
        del b, c
    assert (memory.live, memory.peak) == (0, 18_000)
    assert memory.largest == (2_500, "aten.empty.memory_format")


def test_flops_are_those_that_torch_counts():
    weight = torch.randn(8, 8, requires_grad=True)
    theirs, ours = FlopCounterMode(display=False), StepCounter()
    for counter in (theirs, ours):
        weight.grad = None
        with counter:
            ((torch.randn(5, 8) @ weight).relu() @ weight.T).sum().backward()
    assert ours.flop == theirs.get_total_flops() > 0
    assert ours.live >= 8 * 8 * 4  # the gradient is still there


@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_on_a_cpu_is_counted_as_its_products(causal):
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    with StepCounter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        forward = counter.flop
        out.sum().backward()
    product = 2 * 2 * 3 * 7 * 7 * 4
    assert forward == 2 * product
    assert counter.flop == (2 + 5) * product


@pytest.mark.skipif(products.OPERATOR is None, reason="this torch has no such operator")
def test_products_by_onednn_are_counted(monkeypatch):
    monkeypatch.setattr(products, "_onednn_pays", lambda: True)
    with StepCounter() as counter:
        products.project(torch.randn(5, 8), torch.randn(3, 8))
    assert counter.flop == 2 * 5 * 8 * 3


def test_what_several_processes_hold(llama):
    settings = settings_of(8, 2)
    one = predicted_memory(llama, settings, LENGTHS)
    share = predicted_memory(llama, settings, LENGTHS, processes=2)
    assert share.peak < one.peak
    assert on_each_gpu(share, llama, 2, "ddp") == share
    assert on_each_gpu(share, llama, 1, "fsdp2") == share
    spread = on_each_gpu(share, llama, 4, "fsdp2")
    quarters = (-(-share.weights // 4), -(-share.optimiser // 4))
    assert (spread.weights, spread.optimiser) == quarters
    # some of the weights stay full
    assert share.peak < spread.peak
    assert spread.total < share.total


def test_nothing_is_left_behind(llama):
    trainer = random_trainer(llama, settings_of(2, 2, steps=1), LENGTHS)
    step_counts(trainer)
    assert "zero_grad" not in vars(trainer.optimiser)
    assert torch.ones(2, 3)[torch.tensor([True, False])].sum().item() == 3


def test_a_target_that_the_model_lacks_is_named():
    with pytest.raises(ProfileError, match="c_attn"):
        fake_model(FAMILIES["llama"], torch.bfloat16, LoraSettings(targets=("c_attn",)))
