"""Weights without a direction equal ablation as the model runs; an added vector is where it should
be.
"""

import pytest
import tiny_models as tiny
import torch

from latlib.hooks import EMBEDDING, Capture, LATHook
from latlib.losses import at_labels
from latlib.models import LanguageModel
from latlib.refusal.interventions import adding, orthogonalised

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def plain(family, dtype, **changes) -> LanguageModel:
    return tiny.plain_model(family, dtype, **changes)


def logits(network, batch):
    with torch.no_grad():
        return network.unembed(at_labels(network.hidden(batch), batch.source))


def basis(k, seed=0):
    return torch.randn(
        k, tiny.D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES.items())
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_orthogonalised_weights_equal_ablation(family, dtype, tolerance, k):
    lm, batch = plain(family, dtype), tiny.preference_batch()
    before, changed = logits(lm.network(), batch), orthogonalised(lm, basis(k))
    ablated = logits(lm.network().ablated(basis(k)), batch)
    torch.testing.assert_close(logits(changed.network(), batch), ablated, rtol=0, atol=tolerance)
    assert (ablated - before).abs().max() > 0.01
    assert torch.equal(logits(lm.network(), batch), before), "the model it was made from changed"


@pytest.mark.parametrize("forward", ["lean", "stock"])
@pytest.mark.parametrize("tied", [False, True])
def test_of_an_adapter_and_of_tied_embeddings(forward, tied):
    lm = tiny.language_model(forward, trained=True, tie_word_embeddings=tied)
    batch, changed = tiny.preference_batch(), orthogonalised(lm, basis(2))
    expected = logits(lm.network().ablated(basis(2)), batch)
    torch.testing.assert_close(logits(changed.network(), batch), expected, rtol=0, atol=1e-10)
    assert (
        not hasattr(changed.model, "disable_adapter")
        and not changed.model.config.tie_word_embeddings
    )


def test_it_can_be_saved_and_loaded(tmp_path):
    from transformers import AutoModelForCausalLM

    lm, batch = plain("qwen2", torch.float32, tie_word_embeddings=True), tiny.preference_batch()
    changed = orthogonalised(lm, basis(1))
    changed.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    found = LanguageModel(again, None, lm.settings, lm.dtype)
    assert torch.equal(logits(found.network(), batch), logits(changed.network(), batch))


def test_a_norm_behind_the_weights_is_said():
    with pytest.raises(
        ValueError, match="Gemma2RMSNorm does not write to the stream by one known matrix"
    ):
        orthogonalised(plain("gemma2", torch.float64), basis(1))


@pytest.mark.parametrize("site", [EMBEDDING, 1])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_an_added_vector_moves_its_site_by_its_length(family, site):
    lm, batch, vector = plain(family, torch.float64), tiny.preference_batch(), basis(1)[0]
    with torch.no_grad(), Capture(lm.model, [site]) as clean:
        lm.model(batch.ids)
    with (
        torch.no_grad(),
        LATHook(lm.model, adding(vector, site, 0.5)(batch)),
        Capture(lm.model, [site]) as moved,
    ):
        lm.model(batch.ids)
    torch.testing.assert_close(moved[site] - clean[site], (0.5 * vector).expand_as(clean[site]))
    network = lm.network()
    assert not torch.allclose(
        network.hidden(batch, adding(vector, site)(batch)), network.hidden(batch)
    )
