"""Products of float32 matrices by oneDNN: the same numbers, taken where they are there and fast."""

import pytest
import torch
from tiny_models import language_model, preference_batch

from latlib.fused import products
from latlib.fused.products import Linear, project, project_each, project_onto
from latlib.io.machine import fastest


@pytest.fixture(autouse=True)
def asked_anew():
    products._onednn_pays.cache_clear()
    yield
    products._onednn_pays.cache_clear()


@pytest.fixture
def by_onednn(monkeypatch):
    """Products by oneDNN's operator, whatever is faster here."""
    if products.OPERATOR is None:
        pytest.skip("this torch has no such operator")
    called = []
    operator = products._operator
    monkeypatch.setattr(products, "_operator", lambda x, w: called.append(1) or operator(x, w))
    monkeypatch.setattr(products, "_onednn_pays", lambda: True)
    return called


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_products_of_views_of_any_layout(by_onednn, rows):
    """The backward passes multiply transposed matrices and some of their columns."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24), torch.randn(40, 24)
    stream = torch.randn(rows, 40)
    right = (x.double() @ weight.double().T).float()
    for a in (x, x.T.contiguous().T, torch.randn(rows, 60)[:, 8:32].copy_(x)):
        for b in (weight, weight.T.contiguous().T, torch.randn(80, 24)[::2].copy_(weight)):
            torch.testing.assert_close(project(a, b), right, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                project_onto(stream, a, b), stream + right, rtol=1e-5, atol=1e-5
            )
    assert len(by_onednn) == 18


def test_other_precisions_go_the_usual_way(by_onednn):
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype)
        assert torch.equal(project(x, weight), x @ weight.T)
    assert not by_onednn


def test_empty_products_go_the_usual_way(by_onednn):
    """A part of a batch may have no labels."""
    x, weight = torch.randn(0, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    Linear.apply(x, weight).sum().backward()
    assert x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros(5, 8))
    assert project_each(torch.randn(0, 2, 8), torch.randn(0, 5, 8)).shape == (0, 2, 5)
    assert not by_onednn


def test_its_gradients_are_those_of_a_linear_layer(by_onednn):
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    found = []
    for product in (Linear.apply, torch.nn.functional.linear):
        found.append(torch.autograd.grad(product(x, weight).square().sum(), (x, weight)))
    assert len(by_onednn) == 3
    torch.testing.assert_close(*found)


def test_a_step_is_the_same_by_both_libraries(by_onednn, monkeypatch):
    found = []
    for used in (True, False):
        monkeypatch.setattr(products, "_onednn_pays", lambda used=used: used)
        lm, batch = language_model("lean", torch.float32, trained=True), preference_batch()
        parameters = [p.requires_grad_() for n, p in lm.model.named_parameters() if "lora_" in n]
        network = lm.network(train=True)
        rows = network.label_rows(batch)
        network.unembed(rows).logsumexp(-1).pow(2).sum().backward()
        network.flush_gradients()
        found.append([rows.detach(), *(p.grad for p in parameters)])
        assert bool(by_onednn) == used
        by_onednn.clear()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("capability", "seconds", "taken"),
    [("AVX512", [2.0, 1.0], True), ("AVX512", [1.0, 1.0], False), ("AVX2", [2.0, 1.0], False)],
)
def test_it_is_taken_where_it_is_measured_to_be_faster(monkeypatch, capability, seconds, taken):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "OPERATOR", object())
    monkeypatch.setattr(products, "_operator", lambda x, weight: x @ weight.T)
    monkeypatch.setattr(products, "fastest", lambda *_: seconds)
    assert products.by_onednn(torch.ones(1)) == taken


def _raises(x, weight):
    raise RuntimeError("another signature")


@pytest.mark.parametrize("operator", [lambda x, weight: x @ weight, _raises])
def test_what_is_wrong_or_refuses_is_not_taken(monkeypatch, operator):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "_onednn", operator)
    monkeypatch.setattr(products, "fastest", lambda *_: [9.0, 1.0])
    assert not products.by_onednn(torch.ones(1))


def test_a_torch_without_the_operator_goes_the_usual_way(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "OPERATOR", None)
    assert not products.by_onednn(torch.ones(1))


@pytest.mark.parametrize("share", [1, 1 << 40], ids=["a call each", "one call"])
def test_products_of_groups(by_onednn, monkeypatch, share):
    monkeypatch.setattr(products, "WORTH_A_CALL", share)
    a, b = torch.randn(3, 7, 8), torch.randn(3, 5, 8)
    right = torch.bmm(a, b.mT)
    for x in (a, a.mT.contiguous().mT):
        for weight in (b, b.mT.contiguous().mT):
            torch.testing.assert_close(project_each(x, weight), right)
    assert len(by_onednn) == (12 if share == 1 else 0)


def test_the_fastest_of_several_calls_counts_and_the_first_does_not(monkeypatch):
    times = iter([0, 100, 0, 100, 0, 3, 0, 7, 0, 2, 0, 8])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert fastest(lambda: None, lambda: None, repeats=2) == [2, 7]
