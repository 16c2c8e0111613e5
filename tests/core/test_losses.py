"""Toward, away and KL: the right tokens, the right direction, the right scale, and never a tensor
of all positions.
"""

from unittest.mock import patch

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import (
    FAMILIES,
    SCALING,
    VOCABULARY,
    D,
    language_model,
    model_of,
    noise_like,
    token_rows,
)

from latlib import losses
from latlib.batch import TokenRow, collate
from latlib.losses import (
    argmax_matches,
    at_labels,
    kl_divergence,
    normalised,
    row_means,
    token_losses,
)
from latlib.network import StockNetwork
from latlib.proof.separate import SeparateRows

KINDS = ["stock", "lean"]


def losses_of(network, batch, deltas=None):
    """(toward, away) of a batch, each [labels]."""
    rows = at_labels(network.hidden(batch, deltas), batch.source)
    return both_losses(network.unembed, rows, batch.labels)


def both_losses(unembed, rows, labels):
    """(toward, away) of every label."""
    return tuple(
        token_losses(unembed, rows, labels, torch.full(labels.shape, away))
        for away in (False, True)
    )


def in_chunks_of(rows):
    """With logits of so many rows at a time."""
    return patch.object(losses, "CHUNK_ELEMENTS", rows * VOCABULARY)


def logits_as_rows(n, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, VOCABULARY, generator=generator, dtype=torch.float64)


def identity(rows):
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_label_shift_is_the_librarys_own(family):
    model, (row,) = model_of(family, torch.float32), token_rows(1, 1)
    batch = collate([row])
    ids = torch.tensor([[*row.prompt, *row.completions[0]]])
    labels = ids.clone()
    labels[:, : len(row.prompt)] = -100
    toward, _ = losses_of(StockNetwork(model), batch)
    torch.testing.assert_close(toward.mean(), model(ids, labels=labels).loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [*KINDS, "separate"])
def test_a_row_holds_any_number_of_completions(kind):
    lm = language_model("stock" if kind == "separate" else kind, trained=True)
    network = SeparateRows(lm.network()) if kind == "separate" else lm.network()
    rows = [*token_rows(2, 5), *token_rows(1, 1), *token_rows(1, 3)]
    batch = collate(rows)
    toward, _ = both_losses(network.unembed, network.label_rows(batch), batch.labels)
    for n, row in enumerate(rows):
        for which, completion in enumerate(row.completions, start=1):
            alone = collate([TokenRow(row.prompt, (completion,))])
            expected, _ = losses_of(lm.network(), alone)
            own = (batch.label_rows == n) & (batch.label_segments == which)
            torch.testing.assert_close(toward[own], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_packed_row_equals_its_separate_rows(kind, perturbed):
    lm, rows = language_model(kind, trained=True), token_rows(4, 2)
    batch = collate(rows, pad_to=16)
    deltas = noise_like(batch, ["embedding", 1]) if perturbed else {}
    toward, away = losses_of(lm.network(), batch, deltas)
    llama, expected = reference.Llama.of(lm.model, SCALING), ([], [])
    for n, row in enumerate(rows):
        own = {s: d[n, : row.length] for s, d in deltas.items()}
        for which in (1, 2):
            log_p = reference.log_probabilities(llama, (row.prompt, *row.completions), which, own)
            expected[0].extend(reference.toward(log_p, row.completions[which - 1]))
            expected[1].extend(reference.away(log_p, row.completions[which - 1]))
    torch.testing.assert_close(toward, torch.stack(expected[0]), rtol=0, atol=1e-10)
    torch.testing.assert_close(away, torch.stack(expected[1]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_rows_gradient_equals_its_separate_rows(kind):
    lm, (row,) = language_model(kind, trained=True), token_rows(1, 2)
    batch = collate([row])
    delta = noise_like(batch, [1])[1].requires_grad_()
    toward, away = losses_of(lm.network(), batch, {1: delta})
    (found,) = torch.autograd.grad(toward.sum() + away.sum(), delta)
    llama, own = reference.Llama.of(lm.model, SCALING), delta.detach()[0].requires_grad_()
    total = 0
    for which, completion in enumerate(row.completions, start=1):
        log_p = reference.log_probabilities(llama, (row.prompt, *row.completions), which, {1: own})
        total = (
            total
            + sum(reference.toward(log_p, completion))
            + sum(reference.away(log_p, completion))
        )
    (expected,) = torch.autograd.grad(total, own)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-10)


def test_padding_changes_no_loss():
    network, rows = language_model().network(), token_rows(3, 2)
    tight, wide = (
        losses_of(network, collate(rows)),
        losses_of(network, collate(rows, pad_id=7, pad_to=32)),
    )
    torch.testing.assert_close(tight, wide, rtol=0, atol=1e-10)


@given(st.integers(0, 1000), st.floats(0.1, 8))
def test_losses_equal_the_formulas(seed, scale):
    logits = logits_as_rows(9, seed, scale)
    labels = torch.randint(VOCABULARY, (9,), generator=torch.Generator().manual_seed(seed))
    toward, away = both_losses(identity, logits, labels)
    log_p = [torch.log_softmax(row, 0) for row in logits]
    torch.testing.assert_close(
        toward, torch.stack(reference.toward(log_p, labels)), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        away, torch.stack(reference.away(log_p, labels)), rtol=1e-6, atol=1e-10
    )


def test_away_is_exact_and_finite_for_a_certain_token():
    """1 - p rounds to 0 in float32 for a margin of 40; the loss is the margin all the same, and its
    slope is 1.
    """
    rows = torch.tensor([[40.0, 0.0]], requires_grad=True)
    _, away = both_losses(identity, rows, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(away.sum(), rows)
    assert away.item() == 40.0
    assert gradient.tolist() == [[1.0, -1.0]]


def test_away_ignores_tokens_that_are_unlikely_already():
    def rows(log_p):  # two tokens, the first with this log probability
        p = torch.tensor(log_p, dtype=torch.float64).exp()
        return torch.stack((p.log(), (1 - p).log()))[None].requires_grad_()

    for log_p, kept in ((-4.99, True), (-5.01, False)):
        x = rows(log_p)
        _, away = both_losses(identity, x, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(away.sum(), x)
        assert (away.item() > 0) == kept
        assert bool(gradient.abs().sum() > 0) == kept


def test_losses_of_bf16_logits_are_float32():
    toward, away = both_losses(
        identity, logits_as_rows(4).bfloat16(), torch.zeros(4, dtype=torch.long)
    )
    assert toward.dtype == away.dtype == torch.float32


@pytest.mark.parametrize("trained", [False, True])
def test_logits_exist_a_chunk_at_a_time_also_in_the_backward_pass(trained):
    """Each chunk's logits are made once, or twice where the output matrix itself wants a
    gradient.
    """
    weight = torch.randn(VOCABULARY, D, dtype=torch.float64, requires_grad=trained)
    rows = torch.randn(23, D, dtype=torch.float64, requires_grad=True)
    leaves = (rows, weight) if trained else (rows,)
    labels, seen = torch.arange(23), []
    scale = torch.linspace(0.5, 2, 23, dtype=torch.float64)

    def unembed(part):
        seen.append(len(part))
        return part @ weight.T

    def total(chunk):
        teacher = rows.detach().roll(1, 0)
        with in_chunks_of(chunk):
            each = (
                *both_losses(unembed, rows, labels),
                kl_divergence(unembed, rows, unembed, teacher),
            )
        return sum((scale * loss).sum() for loss in each)

    expected = torch.autograd.grad(total(100), leaves)
    seen.clear()
    loss = total(5)
    forward = sum(seen)
    found = torch.autograd.grad(loss, leaves)
    assert max(seen) <= 5
    assert sum(seen) == forward + (4 * 23 if trained else 0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_a_chunk_holds_so_many_logits_whatever_the_vocabulary():
    weight, seen = torch.randn(VOCABULARY, D, dtype=torch.float64), []
    rows = torch.randn(23, D, dtype=torch.float64, requires_grad=True)
    with in_chunks_of(10):
        token_losses(
            lambda part: seen.append(len(part)) or part @ weight.T, rows, torch.arange(23)
        ).sum().backward()
    assert seen == [1, 10, 10, 3]  # one row tells the vocabulary


@given(st.integers(0, 1000), st.integers(1, 9))
def test_argmax_matches_are_those_of_all_logits(seed, chunk):
    logits = logits_as_rows(9, seed)
    labels = torch.where(torch.arange(9) % 2 == 0, logits.argmax(-1), 0)
    with in_chunks_of(chunk):
        found = argmax_matches(identity, logits, labels)
    assert torch.equal(found, logits.argmax(-1) == labels)


@pytest.mark.parametrize("kind", KINDS)
def test_only_label_positions_meet_the_output_matrix(kind):
    network, batch = language_model(kind).network(), collate(token_rows(3, 1))
    seen, unembed = [], network.unembed
    network.unembed = lambda rows: seen.append(rows.shape) or unembed(rows)
    losses_of(network, batch)
    assert set(seen) <= {(len(batch.labels), D), (1, D)}  # one row tells the vocabulary


def test_kl_is_from_teacher_to_student():
    student, teacher = logits_as_rows(6, 1), logits_as_rows(6, 2)
    found = kl_divergence(identity, student, identity, teacher)
    categorical = torch.distributions.Categorical
    p, q = categorical(logits=teacher), categorical(logits=student)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q), rtol=0, atol=1e-10)
    assert not torch.allclose(found, torch.distributions.kl_divergence(q, p), rtol=0.01)
    one = reference.kl(
        [torch.log_softmax(t, 0) for t in teacher], [torch.log_softmax(s, 0) for s in student]
    )
    torch.testing.assert_close(found, torch.stack(one), rtol=0, atol=1e-10)


def test_reference_kl_is_the_authors():
    student, teacher = logits_as_rows(6, 1).requires_grad_(), logits_as_rows(6, 2)
    found = kl_divergence(identity, student, identity, teacher, "reference")
    new, old = student.log_softmax(-1), teacher.log_softmax(-1)
    # KL(new || base), a mean over tokens x vocabulary
    expected = (new.exp() * (new - old)).mean(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(normalised(found.mean()), student, retain_graph=True)
    (direction,) = torch.autograd.grad(expected.mean(), student)
    size = expected.mean().item()
    assert normalised(found.mean()).item() == pytest.approx(size / (size + 1e-8), abs=1e-12)
    torch.testing.assert_close(gradient, direction / (size + 1e-8), rtol=0, atol=1e-10)


@given(st.integers(0, 1000))
def test_kl_is_zero_for_equals_and_positive_otherwise(seed):
    a, b = logits_as_rows(4, seed), logits_as_rows(4, seed + 1)
    assert kl_divergence(identity, a, identity, a).abs().max() == 0
    # a constant shift is no change
    assert kl_divergence(identity, a + 5.0, identity, a).abs().max() < 1e-12
    assert (kl_divergence(identity, a, identity, b) > 0).all()


@pytest.mark.parametrize("mode", ["token", "reference"])
def test_kl_gives_the_teacher_no_gradient(mode):
    student, teacher = logits_as_rows(4, 1).requires_grad_(), logits_as_rows(4, 2).requires_grad_()
    kl_divergence(identity, student, identity, teacher, mode).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_row_means_count_each_rows_own_tokens():
    values = torch.tensor([1.0, 3.0, 10.0])
    assert row_means(values, torch.tensor([0, 0, 2]), 4).tolist() == [2.0, 0.0, 10.0, 0.0]


def test_at_labels_takes_the_predicting_positions():
    batch = collate(token_rows(3, 2))
    hidden = torch.arange(batch.ids.numel(), dtype=torch.float64).view(*batch.shape, 1)
    assert at_labels(hidden, batch.source).squeeze(1).tolist() == batch.source.tolist()
