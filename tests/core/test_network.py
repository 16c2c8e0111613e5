"""Networks: the same function as the library's modules, from any site, under any perturbation,
adapter on or off.
"""

from dataclasses import replace

import pytest
import reference
import torch
from tiny_models import (
    FAMILIES,
    LAYERS,
    SCALING,
    D,
    as_if_trained,
    benign_batch,
    language_model,
    model_of,
    noise_like,
    plain_model,
    preference_batch,
    token_rows,
)

from latlib.batch import TokenRow, collate
from latlib.blocks import decoder_of
from latlib.config.sections import LoraSettings
from latlib.fused.kernels import padded_keys
from latlib.fused.llama import LeanNetwork, fits
from latlib.hooks import EMBEDDING, Ablate, LATHook
from latlib.io.machine import can_compile
from latlib.losses import at_labels
from latlib.models import with_adapter
from latlib.network import StockNetwork, adapter_off, frozen

SITES = (EMBEDDING, 1, LAYERS - 1)
KINDS = ["stock", "lean"]


def label_logits(network, batch, deltas=None, start=None):
    return network.unembed(network.label_rows(batch, deltas, start))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_equals_the_model_under_the_hook(family):
    model, batch = model_of(family, torch.float32), benign_batch()
    deltas = noise_like(batch, SITES, torch.float32)
    for own in ({}, deltas):
        with LATHook(model, own):
            expected = model(batch.ids).logits.flatten(0, 1)[batch.source]
        torch.testing.assert_close(
            label_logits(StockNetwork(model), batch, own), expected, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_packed_rows_equal_separate_rows(family):
    network, rows = StockNetwork(model_of(family, torch.float32)), token_rows(3, 2)
    batch = collate(rows)
    found = label_logits(network, batch)
    for which in (1, 2):
        single = collate([type(r)(r.prompt, (r.completions[which - 1],)) for r in rows])
        torch.testing.assert_close(
            found[batch.label_index(which)], label_logits(network, single), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("make", [preference_batch, benign_batch], ids=["packed", "plain"])
def test_lean_equals_stock(kv_heads, adapter, make):
    lm, batch = (
        language_model(dtype=torch.float32, trained=True, num_key_value_heads=kv_heads),
        make(),
    )
    deltas = noise_like(batch, SITES, torch.float32)
    lean, stock, directions = (
        LeanNetwork(lm.model, adapter),
        StockNetwork(lm.model, adapter),
        torch.randn(2, D),
    )
    pairs = (
        (label_logits(lean, batch), label_logits(stock, batch)),
        (label_logits(lean, batch, deltas), label_logits(stock, batch, deltas)),
        (
            label_logits(lean.ablated(directions), batch),
            label_logits(stock.ablated(directions), batch),
        ),
        (
            label_logits(lean.ablated(directions), batch, deltas),
            label_logits(stock.ablated(directions), batch, deltas),
        ),
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_factors", [True, False])
@pytest.mark.parametrize("settle_each", [True, False])
def test_lean_gradients_equal_stock(settle_each, by_factors, monkeypatch):
    found = []
    monkeypatch.setattr("latlib.fused.llama.WIDTHS_A_RANK", 0 if by_factors else 10_000)
    for kind in KINDS:
        lm, batch = language_model(kind, trained=True), preference_batch()
        parameters = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
        deltas = {s: d.requires_grad_() for s, d in noise_like(batch, SITES).items()}
        network = lm.network(train=True)
        if kind == "lean":
            used = [matrix.left is not None for matrix in network.weights.blocks[0]]
            assert used == [by_factors] * 4
        for _ in range(2):  # two micro-batches
            label_logits(network, batch, deltas).logsumexp(-1).pow(2).sum().backward()
            if settle_each:
                network.flush_gradients()
        network.flush_gradients()
        found.append([t.grad for t in (*parameters, *deltas.values())])
    for a, b in zip(*found, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("targets", [("q_proj", "up_proj"), ("k_proj", "v_proj", "down_proj")])
def test_factors_of_a_part_of_a_stack_get_the_gradients_of_stock(targets, monkeypatch):
    monkeypatch.setattr("latlib.fused.llama.WIDTHS_A_RANK", 0)
    found, batch = [], benign_batch()
    for kind in KINDS:
        lora = LoraSettings(r=3, alpha=6.0, targets=targets)
        lm = as_if_trained(
            with_adapter(plain_model("llama", torch.float64, None, kind), lora, 0), 0
        )
        parameters = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
        network = lm.network(train=True)
        label_logits(network, batch).logsumexp(-1).pow(2).sum().backward()
        network.flush_gradients()
        found.append([p.grad for p in parameters])
    for a, b in zip(*found, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [True, False])
def test_both_equal_the_reference_in_float64(kind, adapter):
    lm, (row,) = language_model(kind, trained=True), token_rows(1, 1)
    expected = reference.Llama.of(lm.model, SCALING).logits(
        [*row.prompt, *row.completions[0][:-1]], adapter=adapter
    )
    found = label_logits(lm.network(adapter), collate([row]))
    torch.testing.assert_close(found, expected[len(row.prompt) - 1 :], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_running_from_a_site_equals_running_everything(kind, site):
    network, batch = language_model(kind, trained=True).network(), preference_batch()
    deltas = noise_like(batch, [s for s in SITES if SITES.index(s) >= SITES.index(site)])
    stream = network.capture(batch, [site])[site]
    assert torch.equal(network.hidden(batch, deltas, (site, stream)), network.hidden(batch, deltas))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_label_rows_are_hidden_states_at_the_label_positions(kind, site):
    """Values, and gradients of perturbations and adapter, though the last block runs at these
    positions only.
    """
    lm, batch, found = language_model(kind, trained=True), preference_batch(), []
    parameters = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
    for rows_of in (
        lambda n, d: n.label_rows(batch, d),
        lambda n, d: at_labels(n.hidden(batch, d), batch.source),
    ):
        network = lm.network(train=True)
        deltas = {s: d.requires_grad_() for s, d in noise_like(batch, {site, LAYERS - 1}).items()}
        logits = network.unembed(rows_of(network, deltas))
        logits.logsumexp(-1).pow(2).sum().backward()
        network.flush_gradients()
        found.append([logits, *(t.grad for t in (*parameters, *deltas.values()))])
        lm.model.zero_grad()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_below_the_start_is_refused(kind):
    network, batch = language_model(kind).network(), preference_batch()
    stream = network.capture(batch, [1])[1]
    with pytest.raises(ValueError, match="start is site 1 but site embedding is perturbed"):
        network.hidden(batch, noise_like(batch, [EMBEDDING, 1]), (1, stream))


@pytest.mark.parametrize("kind", KINDS)
def test_capture_is_the_unperturbed_stream_at_the_asked_positions(kind):
    lm, batch = language_model(kind, trained=True), benign_batch()
    network, expected = lm.network(), lm.model(batch.ids, output_hidden_states=True).hidden_states
    streams, rows = (
        network.capture(batch, [EMBEDDING, 1]),
        network.capture(batch, [1, EMBEDDING], batch.source),
    )
    for site, index in ((EMBEDDING, 0), (1, 2)):
        real = (batch.segments >= 0)[..., None]
        torch.testing.assert_close(streams[site] * real, expected[index] * real, rtol=0, atol=1e-10)
        assert torch.equal(rows[site], at_labels(streams[site], batch.source))
        assert not streams[site].requires_grad


def test_stock_runs_no_block_above_the_deepest_captured_site():
    model, ran = model_of(), []
    for i, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    StockNetwork(model).capture(benign_batch(), [0, 1])
    assert ran == [0, 1]
    model.model.layers[0].mlp.register_forward_hook(lambda *_: pytest.fail("block 0 was run"))
    StockNetwork(model).capture(benign_batch(), [EMBEDDING])


def test_lean_runs_no_block_above_the_deepest_captured_site(monkeypatch):
    network, ran = language_model().network(), []
    block = LeanNetwork._block
    monkeypatch.setattr(
        LeanNetwork, "_block", lambda self, x, i, *t: ran.append(i) or block(self, x, i, *t)
    )
    network.capture(benign_batch(), [EMBEDDING, 1])
    assert ran == [0, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_runs_each_block_once_a_forward(family):
    """Masks and rotary tables are made by a pass that runs no block, once for a batch, whoever runs
    it next.
    """
    model, batch, ran = model_of(family, torch.float32), preference_batch(), []
    for i, block in enumerate(decoder_of(model).layers):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    network = StockNetwork(model)
    stream = network.capture(batch, [1])[1]
    assert ran == [0, 1]
    network.hidden(batch, start=(1, stream))
    assert ran == [0, 1, 2, 3]
    network.frozen().hidden(batch)
    assert ran == [0, 1, 2, 3, 0, 1, 2, 3]
    assert "forward" not in decoder_of(model).layers[0].__dict__


@pytest.mark.slow
def test_compiled_blocks_equal_uncompiled_ones_and_are_compiled_once():
    """One compilation serves all blocks and every later batch; a hook on a block or under ablation
    is not bypassed.
    """
    lm = language_model("stock", torch.float32, trained=True)
    if not can_compile("cpu"):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    plain, compiled = StockNetwork(lm.model), StockNetwork(lm.model, compiled=True)

    def gradients(network, seed):
        batch = collate(token_rows(3, 2, seed), pad_to=16)
        deltas = {s: d.requires_grad_() for s, d in noise_like(batch, SITES, torch.float32).items()}
        logits = label_logits(network, batch, deltas)
        return logits.detach(), *torch.autograd.grad(
            logits.logsumexp(-1).sum(), list(deltas.values())
        )

    for a, b in zip(gradients(compiled, 0), gradients(plain, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in (1, 2, 3):  # other rows of the same bucket of lengths
        for a, b in zip(gradients(compiled, seed), gradients(plain, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs <= 2
    batch, direction = benign_batch(), torch.randn(D)
    found, expected = (label_logits(n.ablated(direction), batch) for n in (compiled, plain))
    assert torch.equal(found, expected) and not torch.allclose(found, label_logits(plain, batch))


def test_without_a_compiler_blocks_run_uncompiled(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    can_compile.cache_clear()
    lm, batch = language_model("stock"), benign_batch()
    lm = replace(lm, settings=lm.settings.model_copy(update={"compile": True}))
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler found; blocks run uncompiled"):
        network = lm.network()
    assert torch.equal(label_logits(network, batch), label_logits(StockNetwork(lm.model), batch))
    can_compile.cache_clear()


@pytest.mark.parametrize("length", [40, 140])
def test_lean_in_bf16_on_long_rows_equals_float32(length):
    """Long rows get keys that nobody sees, short ones a float32 softmax: neither changes a
    result.
    """
    rows = [
        TokenRow(tuple(range(1, length)), ((5, 6, 7), (8, 9))),
        TokenRow(tuple(range(3, 30)), ((5, 6), (7, 8))),
    ]
    lm = language_model(
        dtype=torch.float32, trained=True, max_position_embeddings=256, vocab_size=160
    )
    batch, found = collate(rows), []
    assert (padded_keys(batch.shape[1], torch.bfloat16, lm.device) > batch.shape[1]) == (
        length == 140
    )
    for dtype in (torch.float32, torch.bfloat16):
        delta = noise_like(batch, [1], torch.float32, size=0.1)[1].requires_grad_()
        logits = label_logits(LeanNetwork(lm.model, dtype=dtype), batch, {1: delta}).float()
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), delta)
        found.append((logits.detach(), gradient))
    for exact, rounded, tolerance in zip(*found, (0.05, 0.1), strict=True):
        assert (rounded - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_perturbation_of_another_length_is_refused(kind):
    network, batch = language_model(kind).network(), preference_batch()
    with pytest.raises(ValueError, match="site 1: perturbation is .*the residual stream is"):
        network.hidden(
            batch, {1: torch.zeros(batch.shape[0], batch.shape[1] + 1, D, dtype=torch.float64)}
        )
    with pytest.raises(ValueError, match="torch.float32.*torch.float64"):
        network.hidden(batch, {1: torch.zeros(*batch.shape, D)})
    with pytest.raises(ValueError, match="on meta, the residual stream on cpu"):
        network.hidden(batch, {1: torch.zeros(*batch.shape, D, device="meta")})


@pytest.mark.parametrize("kind", KINDS)
def test_zero_perturbation_changes_no_bit(kind):
    network, batch = language_model(kind, torch.float32).network(), preference_batch()
    zeros = noise_like(batch, SITES, torch.float32, size=0.0)
    assert torch.equal(network.hidden(batch, zeros), network.hidden(batch))


def test_ablating_weights_equals_ablating_by_hooks():
    lm, batch, directions = language_model(trained=True), benign_batch(), torch.randn(2, D)
    found = label_logits(LeanNetwork(lm.model).ablated(directions), batch)
    with Ablate(lm.model, directions):
        expected = lm.model(batch.ids).logits.flatten(0, 1)[batch.source]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(found, label_logits(lm.network(), batch))


@pytest.mark.parametrize("kind", KINDS)
def test_ablations_add_up(kind):
    network, batch, directions = language_model(kind).network(), benign_batch(), torch.randn(2, D)
    one_by_one = network.ablated(directions[0]).ablated(directions[1]).ablated(directions[1])
    at_once, deltas = network.ablated(directions), noise_like(batch, SITES)
    for own in ({}, deltas):
        found, expected = label_logits(one_by_one, batch, own), label_logits(at_once, batch, own)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_ablation_leaves_the_network_it_came_from_alone():
    lm, batch = language_model(), benign_batch()
    for network in (LeanNetwork(lm.model), StockNetwork(lm.model)):
        before = label_logits(network, batch)
        label_logits(network.ablated(torch.ones(D)), batch)
        assert torch.equal(label_logits(network, batch), before)


@pytest.mark.parametrize("start", [True, False])
def test_adapter_off_leaves_requires_grad_as_it_was(start):
    """peft's own `disable_adapter()` switches the gradients of a frozen adapter on
    when it is left.
    """
    model = language_model(trained=True).model
    lora = [p.requires_grad_(start) for n, p in model.named_parameters() if "lora_" in n]
    flags = [p.requires_grad for p in model.parameters()]
    with adapter_off(model):
        pass
    with pytest.raises(KeyboardInterrupt), adapter_off(model):
        raise KeyboardInterrupt
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.requires_grad == start for p in lora)


def test_frozen_is_undone_even_after_an_exception():
    model = model_of()
    model.model.norm.weight.requires_grad_(True)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyboardInterrupt
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_is_the_base_model_and_holds_no_second_copy(kind):
    lm, batch = language_model(kind, trained=True), benign_batch()
    teacher, student = (
        label_logits(lm.network(adapter=False), batch),
        label_logits(lm.network(), batch),
    )
    base = label_logits(StockNetwork(model_of()), batch)
    torch.testing.assert_close(teacher, base, rtol=0, atol=1e-10)
    assert not torch.allclose(student, base)
    if kind == "stock":
        assert lm.network(adapter=False).model is lm.network().model


def test_training_under_gradient_checkpointing_gives_equal_gradients():
    found = []
    for checkpointing in (False, True):
        lm, batch = language_model("stock", trained=True), preference_batch()
        lm.model.train()
        if checkpointing:
            lm.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        parameters = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
        deltas = noise_like(batch, SITES)
        label_logits(lm.network(train=True), batch, deltas).logsumexp(-1).pow(2).sum().backward()
        found.append([p.grad for p in parameters])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "change", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}]
)
def test_lean_refuses_what_it_does_not_compute(change):
    assert fits(model_of())
    assert not fits(model_of(**change))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_lean_is_for_llama(family):
    assert not fits(model_of(family))


def test_lean_computes_in_bf16_over_float32_weights():
    lm, batch = language_model(dtype=torch.float32, trained=True), preference_batch()
    network = LeanNetwork(lm.model, dtype=torch.bfloat16)
    found, expected = label_logits(network, batch), label_logits(lm.network(), batch)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_lean_merges_a_bf16_model_with_its_float32_adapter():
    lm, batch = language_model(dtype=torch.bfloat16, trained=True), preference_batch()
    assert {p.dtype for n, p in lm.model.named_parameters() if "lora_" in n} == {torch.float32}
    found, expected = (label_logits(n, batch) for n in (lm.network(), StockNetwork(lm.model)))
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ["stock", "lean"])
def test_streams_are_what_capture_reads_with_gradients_to_the_adapter(kind):
    lm, batch = language_model(kind, trained=True), preference_batch(3)
    sites = ["embedding", 1, 3]
    for parameter in (p for n, p in lm.model.named_parameters() if "lora_" in n):
        parameter.requires_grad_(True)
    network = lm.network(train=True)
    streams = network.streams(batch, sites)
    captured = network.capture(batch, sites)
    assert list(streams) == sites and all(torch.equal(streams[s], captured[s]) for s in sites)
    assert not any(stream.requires_grad for stream in captured.values())
    streams[1].square().sum().backward()
    network.flush_gradients()
    reached = [p.grad is not None for n, p in lm.model.named_parameters() if "lora_" in n]
    assert any(reached) and not all(reached), "the blocks above site 1 play no part"
