"""A stock model's Linears in the fast way are its own: with an adapter, under hooks, and as before
afterwards."""

import pytest
import torch
from tiny_models import language_model, plain_model

from latlib.evaluation.fast_linears import fast_linears
from latlib.fused import products
from latlib.hooks import Ablate, LATHook

IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module", params=["plain", "adapter"])
def model(request):
    if request.param == "plain":
        return plain_model("llama", torch.float32).model
    return language_model(dtype=torch.float32, trained=True).model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("hooked", [False, True])
def test_the_same_logits_with_and_without_hooks(model, hooked):
    width = model.config.hidden_size
    delta = torch.linspace(-1, 1, 12 * width).view(2, 6, width)
    hooks = (LATHook(model, {1: delta}), Ablate(model, torch.eye(width)[:2]))
    for hook in hooks if hooked else ():
        hook.__enter__()
    expected = logits(model)
    with fast_linears(model):
        found = logits(model)
    again = logits(model)
    for hook in hooks if hooked else ():
        hook.__exit__(None, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)


def test_no_linear_and_no_adapter_is_left_to_the_modules(model, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", None)
    with fast_linears(model):
        assert logits(model).isfinite().all()


def test_weights_are_those_of_now(model):
    weight = next(p for name, p in model.named_parameters() if "down_proj" in name)
    before = weight.detach().clone()
    try:
        weight.data.mul_(1.5)
        with fast_linears(model):
            found = logits(model)
        torch.testing.assert_close(found, logits(model), rtol=1e-5, atol=1e-5)
    finally:
        weight.data.copy_(before)


def test_an_adapter_that_is_off_stays_off():
    model = language_model(dtype=torch.float32, trained=True).model
    on = logits(model)
    with model.disable_adapter():
        expected = logits(model)
        with fast_linears(model):
            found = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - on).abs().max() > 1e-2


def test_products_go_the_fast_way(model, monkeypatch):
    calls = []
    real = products.project
    monkeypatch.setattr(
        "latlib.evaluation.fast_linears.project", lambda x, w: calls.append(1) or real(x, w)
    )
    with fast_linears(model):
        logits(model)
    assert len(calls) == 7 * model.config.num_hidden_layers + 1
