"""Hooks in the residual stream: right for every kind of block, there as long as needed, and gone
afterwards.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, LAYERS, D, language_model, model_of, noise_like
from torch import nn

from latlib.blocks import blocks_of, decoder_of, writers_of
from latlib.hooks import (
    EMBEDDING,
    Ablate,
    Capture,
    LATHook,
    orthonormal,
    resolve_sites,
)

IDS = torch.tensor([[5, 3, 9, 1, 7, 2], [8, 8, 4, 6, 2, 1]])
SITES = (EMBEDDING, 1, LAYERS - 1)


class Block(nn.Module):
    """A block whose output is a tensor or a tuple."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.linear, self.as_tuple = nn.Linear(D, D), as_tuple

    def forward(self, hidden_states):
        out = hidden_states + torch.tanh(self.linear(hidden_states))
        return (out, "cache") if self.as_tuple else out


class Decoder(nn.Module):
    """The least that has blocks and a configuration."""

    def __init__(self, as_tuple: bool, by_keyword: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.by_keyword = SimpleNamespace(num_hidden_layers=3), by_keyword
        self.blocks = nn.ModuleList(Block(as_tuple) for _ in range(3))

    def forward(self, x):
        self.extras = []
        for block in self.blocks:
            out = block(hidden_states=x) if self.by_keyword else block(x)
            x, *extra = out if isinstance(out, tuple) else (out,)
            self.extras += extra
        return x


def deltas_for(ids=IDS, sites=SITES, dtype=torch.float64, size=1.0):
    return noise_like(SimpleNamespace(shape=ids.shape), sites, dtype, size)


def hooks_on(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("as_tuple", [False, True])
def test_blocks_that_return_tensors_or_tuples(as_tuple, by_keyword):
    model, x = Decoder(as_tuple, by_keyword), torch.randn(2, 4, D)
    deltas = {s: torch.randn(2, 4, D) for s in (EMBEDDING, 0, 2)}
    expected = x + deltas[EMBEDDING]
    for i, block in enumerate(model.blocks):
        expected = expected + torch.tanh(block.linear(expected)) + deltas.get(i, 0)
    with LATHook(model, deltas), Capture(model, [EMBEDDING, 2]) as streams:
        found = model(x)
    torch.testing.assert_close(found, expected)
    assert torch.equal(streams[2], found) and torch.equal(streams[EMBEDDING], x + deltas[EMBEDDING])
    assert model.extras == (["cache"] * 3 if as_tuple else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_perturbation_changes_no_bit(family, dtype):
    model = model_of(family, dtype)
    expected = model(IDS).logits
    with LATHook(model, {s: torch.zeros(*IDS.shape, D) for s in (EMBEDDING, *range(LAYERS))}):
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_a_perturbation_reaches_its_site_and_leaves_no_trace(family, site):
    model = model_of(family)
    expected, deltas = model(IDS).logits, deltas_for(sites=[site])
    with Capture(model, [site]) as before:
        model(IDS)
    with LATHook(model, deltas), Capture(model, [site]) as after:
        assert not torch.allclose(model(IDS).logits, expected)
    torch.testing.assert_close(after[site] - before[site], deltas[site])
    assert torch.equal(model(IDS).logits, expected)


def test_hooks_are_gone_after_an_exception():
    model = model_of()
    before, expected = hooks_on(model), model(IDS).logits
    for hook in (LATHook(model, deltas_for()), Capture(model, SITES), Ablate(model, torch.ones(D))):
        with pytest.raises(KeyboardInterrupt), hook:
            assert hooks_on(model) > before
            raise KeyboardInterrupt
        assert hooks_on(model) == before
    assert torch.equal(model(IDS).logits, expected)


def test_hooks_that_cannot_be_installed_whole_are_not_installed_at_all():
    model = model_of()
    before = hooks_on(model)
    with pytest.raises(
        ValueError,
        match=f"site = {LAYERS} is outside this model of {LAYERS} blocks.*0..{LAYERS - 1}",
    ):
        LATHook(model, {0: torch.zeros(1), LAYERS: torch.zeros(1)}).__enter__()
    assert hooks_on(model) == before


def test_hooks_nest():
    model, a, b = model_of(), deltas_for(), deltas_for(size=0.5)
    with LATHook(model, {s: a[s] + b[s] for s in SITES}):
        both = model(IDS).logits
    with LATHook(model, a):
        outer = model(IDS).logits
        with LATHook(model, b):
            torch.testing.assert_close(model(IDS).logits, both, rtol=0, atol=1e-6)
        assert torch.equal(model(IDS).logits, outer)


def test_one_hook_is_not_entered_twice():
    model = model_of()
    hook = LATHook(model, deltas_for())
    with hook, pytest.raises(RuntimeError, match="already entered.*second"):
        hook.__enter__()
    with hook:  # after leaving, it can be used again
        assert hooks_on(model) == len(SITES)


@pytest.mark.parametrize(
    "delta, said",
    [
        (torch.zeros(2, 5, D), ("(2, 5, 16)", "(2, 6, 16)")),
        (torch.zeros(1, 6, D), ("(1, 6, 16)", "(2, 6, 16)")),
        (torch.zeros(2, 6, D, dtype=torch.bfloat16), ("torch.bfloat16", "torch.float32")),
        (torch.zeros(2, 6, D, dtype=torch.int64), ("torch.int64", "torch.float32")),
        (torch.zeros(2, 6, D, device="meta"), ("meta", "cpu")),
    ],
    ids=["length", "batch", "bf16", "int64", "device"],
)
def test_a_perturbation_that_does_not_fit_names_both_sides(delta, said):
    model = model_of(dtype=torch.float32)
    with LATHook(model, {1: delta}), pytest.raises(ValueError, match="site 1: ") as caught:
        model(IDS)
    for part in said:
        assert part in str(caught.value)
    assert torch.isfinite(model(IDS).logits).all()


def test_a_float32_perturbation_fits_a_bf16_stream():
    model = model_of(dtype=torch.bfloat16)
    with LATHook(model, deltas_for(dtype=torch.float32)):
        assert model(IDS).logits.dtype == torch.bfloat16


def gradients_under_a_hook(checkpointing: bool):
    lm = language_model(trained=True)
    calls, deltas = [], {s: d.requires_grad_() for s, d in deltas_for().items()}
    blocks_of(lm.model)[2].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    lm.model.train()
    if checkpointing:
        lm.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    parameters = [p for n, p in lm.model.named_parameters() if "lora_" in n]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with LATHook(lm.model, deltas):
        lm.model(IDS, use_cache=False).logits.logsumexp(-1).pow(2).sum().backward()
    return len(calls), [p.grad for p in (*parameters, *deltas.values())]


def test_gradient_checkpointing_changes_no_gradient():
    once, expected = gradients_under_a_hook(checkpointing=False)
    twice, found = gradients_under_a_hook(checkpointing=True)
    assert (once, twice) == (1, 2)  # the block really was run again in the backward pass
    assert all(g.abs().sum() > 0 for g in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_reads_the_librarys_hidden_states(family):
    model = model_of(family)
    expected = model(IDS, output_hidden_states=True).hidden_states
    with Capture(model, [EMBEDDING, 0, 2]) as streams:
        model(IDS)
    for site, index in ((EMBEDDING, 0), (0, 1), (2, 3)):
        assert torch.equal(streams[site], expected[index])


def test_capture_at_positions_and_of_an_unnamed_site():
    model = model_of()
    with Capture(model, [1]) as whole, Capture(model, [1], positions=[0, -1]) as ends:
        model(IDS)
    assert torch.equal(ends[1], whole[1][:, [0, -1]])
    with pytest.raises(KeyError, match="site 2 was not captured"):
        whole[2]


def test_while_decoding_the_perturbation_stays_in_the_prefill():
    """Cached decoding after a perturbed prefill equals whole forwards with zeros at the new
    positions.
    """
    model, deltas = model_of(), deltas_for()
    with LATHook(model, deltas, decoding=True):
        found = model.generate(
            IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
        )
    ids = IDS
    for _ in range(4):
        longer = {
            s: nn.functional.pad(d, (0, 0, 0, ids.shape[1] - d.shape[1])) for s, d in deltas.items()
        }
        with LATHook(model, longer):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, ids)
    assert not torch.equal(
        found, model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_directions_are_nowhere_in_the_stream(family):
    model, directions = model_of(family), torch.randn(2, D, dtype=torch.float64)
    sites = (EMBEDDING, *range(LAYERS))
    reads_stream = "pre_feedforward_layernorm" if family == "gemma2" else "post_attention_layernorm"
    ablation = Ablate(model, directions)
    halfway = []  # the stream between attention and MLP
    for block in blocks_of(model):
        getattr(block, reads_stream).register_forward_pre_hook(
            lambda _, args: halfway.append(args[0])
        )
    with ablation, Capture(model, sites) as streams:
        changed = model(IDS).logits
    assert len(halfway) == LAYERS
    for stream in (*(streams[s] for s in sites), *halfway):
        assert (stream @ directions.T).abs().max() < 1e-10
        assert stream.norm() > 1
    assert not torch.allclose(changed, model(IDS).logits)


@given(st.integers(1, 5), st.integers(0, 1000))
def test_orthonormal_spans_the_same_space(k, seed):
    rows = torch.randn(k, D, generator=torch.Generator().manual_seed(seed)) * 100
    basis = orthonormal(rows)
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(rows.double() @ basis.T @ basis, rows.double())


def test_orthonormal_of_dependent_directions_holds_nothing_else():
    a, b = torch.randn(2, D, dtype=torch.float64)
    basis = orthonormal(torch.stack((a, 2 * a, b, a - b)))
    assert basis.shape == (2, D)
    torch.testing.assert_close(b @ basis.T @ basis, b)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_direction_of_no_use_is_refused(value):
    with pytest.raises(ValueError, match="finite and non-zero"):
        orthonormal(torch.stack((torch.ones(D), torch.full((D,), value))))


def test_fractions_of_depth_are_the_papers_sites():
    assert resolve_sites([1 / 4, 1 / 2, 3 / 4, 15 / 16], 32) == (8, 16, 24, 30)
    assert resolve_sites([2, "embedding", 0.0, 0], 4) == (EMBEDDING, 0, 2)


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 200))
def test_a_fraction_is_always_inside_the_model(fraction, n_layers):
    (site,) = resolve_sites([fraction], n_layers)
    assert 0 <= site < n_layers


@pytest.mark.parametrize("spec", [4, -1, 1.0, -0.5, "embed"])
def test_a_site_outside_the_model_is_named(spec):
    with pytest.raises(
        ValueError, match="outside this model of 4 blocks: give 'embedding', 0..3"
    ) as caught:
        resolve_sites([spec], 4)
    assert repr(spec) in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_writers_are_found_inside_any_wrapping(family):
    model = model_of(family)
    assert len(blocks_of(model)) == LAYERS
    assert [len(writers) for writers in writers_of(model)] == [2] * LAYERS


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_writers_are_found_beside_massive_activations(size):
    """One element of one token, thousands of times as large as the others, as real models have it:
    what rounding does to it must not decide which modules add up.
    """
    model = language_model("stock", trained=True).model.float()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 5] = size
    for block, writers in zip(blocks_of(model), writers_of(model), strict=True):
        assert writers == [block.self_attn, block.mlp]


def test_the_blocks_of_a_peft_model_are_the_models_own():
    lm = language_model()
    assert blocks_of(lm.model)[0] is lm.model.base_model.model.model.layers[0]


def test_a_model_without_blocks_is_refused():
    bare = nn.Linear(2, 2)
    bare.config = SimpleNamespace(num_hidden_layers=2)
    with pytest.raises(ValueError, match="Linear has no list of 2 blocks"):
        decoder_of(bare)
