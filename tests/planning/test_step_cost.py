"""A step on the meta device takes what the same step takes on a CPU, and the short way says what
the long way says.
"""

import pytest
import torch
from tiny_models import language_model, preference_batch, token_rows
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from latlib.config.sections import (
    AttackSettings,
    DefenceSettings,
    LoraSettings,
    ProfileError,
    TrainSettings,
)
from latlib.planning import step_cost
from latlib.planning.counters import StepCounter, bytes_of, flop_counter
from latlib.planning.estimate import random_model, random_trainer
from latlib.planning.step_cost import (
    Lengths,
    meta_model,
    micro_batches,
    on_each_gpu,
    predicted_step,
    whole_step,
)
from latlib.train import Trainer

SHAPE = dict(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
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
    batch=4, micro_batch=2, iterations=1, sites=(1, 3), steps=2, **attack
) -> TrainSettings:
    return TrainSettings(
        batch=batch,
        benign_batch=batch,
        micro_batch=micro_batch,
        iterations=iterations,
        attack=AttackSettings(sites=sites, steps=steps, **attack),
        defence=DefenceSettings(sft=0.2),
    )


def long_way(lm, settings, lengths=LENGTHS, attacked=True):
    return whole_step(
        lm, lengths.rows(settings.batch, 2), lengths.rows(settings.batch, 1), settings, attacked
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meta_device_predicts_what_a_step_holds_on_a_cpu(family):
    """Within 10 %: all that differs is attention, which on a CPU keeps other buffers."""
    settings = settings_of()
    predicted = long_way(meta_model(FAMILIES[family], torch.float32, lora_of(family)), settings)
    lm = random_model(FAMILIES[family], torch.float32, lora_of(family), "cpu")
    trainer = random_trainer(lm, settings, LENGTHS)
    trainer.train_step()  # the moments are there
    trainer.optimiser.zero_grad()
    with StepCounter() as real:
        trainer.train_step()
    assert predicted.peak == pytest.approx(real.peak, rel=0.1)
    assert predicted.flop == pytest.approx(real.flop, rel=0.02)
    adapter = bytes_of(trainer.parameters)
    assert (predicted.adapter, predicted.optimiser) == (adapter, 2 * adapter)
    plain = AutoModelForCausalLM.from_config(FAMILIES[family])
    assert (
        predicted.weights
        == bytes_of(plain.parameters())
        == 4 * sum(p.numel() for p in plain.parameters())
    )


@pytest.mark.parametrize(
    "settings",
    [
        settings_of(8, 2, 3, ("embedding", 2, 3), 4, rule="adamw"),
        settings_of(2, 2, 1, (2,), 3),
        settings_of(4, 2, 2, (0.5,), 2, targeted=False),
        settings_of(4, 2, 2, steps=0),
    ],
    ids=["embedding", "one", "untargeted", "plain"],
)
def test_the_short_way_says_what_the_long_way_says(settings):
    lm = meta_model(FAMILIES["llama"], torch.bfloat16, lora_of("llama"))
    short, long = predicted_step(lm, settings, LENGTHS), long_way(lm, settings)
    assert short.flop == pytest.approx(long.flop, rel=1e-9)
    assert short.peak == pytest.approx(long.peak, rel=0.04)
    assert (short.weights, short.adapter, short.optimiser) == (
        long.weights,
        long.adapter,
        long.optimiser,
    )
    flop = predicted_step(lm, settings, LENGTHS, peak=False)
    assert (flop.flop, flop.peak) == (pytest.approx(long.flop, rel=1e-9), 0)


def test_a_step_before_the_attack_begins_costs_less():
    lm, settings = meta_model(FAMILIES["llama"], torch.bfloat16, lora_of("llama")), settings_of()
    plain = predicted_step(lm, settings, LENGTHS, attacked=False)
    assert plain.flop == pytest.approx(long_way(lm, settings, attacked=False).flop, rel=1e-9)
    assert plain.flop < 0.7 * long_way(lm, settings).flop


def test_micro_batches_are_the_trainers():
    for settings in (settings_of(5, 2), settings_of(3, 8), settings_of(6, 4, targeted=False)):
        trainer = Trainer(language_model("stock"), token_rows(8, 2), token_rows(8, 1), settings, 0)
        parts = trainer._micro_batches(True, torch.Generator().manual_seed(0))
        n, rows, calm = micro_batches(settings)
        assert (n, calm) == (len(parts), max(part.benign.shape[0] for part in parts))
        if settings.attack.targeted:
            assert rows == max(part.attacked.shape[0] for part in parts)
    assert micro_batches(settings_of(6, 2), processes=2) == (4, 2, 2)


def test_the_step_counter_counts_what_torch_counts():
    lm, batch = language_model("stock", trained=True), preference_batch(4)
    found = []
    for counter in (flop_counter(), StepCounter()):
        with counter:
            lm.network(train=True).label_rows(batch).sum().backward()
        found.append(
            counter.flop if isinstance(counter, StepCounter) else counter.get_total_flops()
        )
    assert found[0] == found[1] > 0


def test_what_several_processes_hold():
    lm = meta_model(FAMILIES["llama"], torch.bfloat16, lora_of("llama"))
    one = predicted_step(lm, settings_of(8, 2), LENGTHS)
    share = predicted_step(lm, settings_of(8, 2), LENGTHS, processes=2)
    assert share.peak < one.peak and share.flop == pytest.approx(one.flop)
    assert on_each_gpu(share, lm, 2, "ddp") == share and on_each_gpu(share, lm, 1, "fsdp2") == share
    spread = on_each_gpu(share, lm, 4, "fsdp2")
    assert (spread.weights, spread.optimiser) == (-(-share.weights // 4), -(-share.optimiser // 4))
    assert share.peak < spread.peak and spread.total < share.total  # some of the weights stay whole


def test_nothing_of_the_meta_device_is_left_behind():
    before = (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.to, torch.bincount)
    with pytest.raises(ZeroDivisionError), step_cost.on_meta():
        raise ZeroDivisionError
    assert before == (torch.Tensor.__bool__, torch.Tensor.item, torch.Tensor.to, torch.bincount)


def test_a_target_that_the_model_lacks_is_named():
    with pytest.raises(ProfileError, match="c_attn"):
        meta_model(FAMILIES["llama"], torch.bfloat16, LoraSettings(targets=("c_attn",)))
