"""What notebooks compute on a model: the same as the long way, and no reply of a real model."""

import pytest
import torch

from latlib.attack import perturbed_positions, random_noise
from latlib.batch import collate
from latlib.data.splits import benign_sample
from latlib.evaluation.ask import prompt_set
from latlib.evaluation.rule_graders import PhraseGrader
from latlib.experiment import computed
from latlib.text.chat import tokenise
from latlib.threat import EMBEDDING


def test_noise_that_starts_at_its_site_does_what_it_does_in_a_whole_forward(smoke_run):
    lm, norms, data = smoke_run.model("base", 0), smoke_run.norms(0), smoke_run.profile.data
    rows = tokenise(benign_sample(data, 0, 4), lm.tokenizer, lm.context, data.system_prompt)
    network, batch = lm.network(), collate(rows, device=lm.device)
    sites = [EMBEDDING, *range(lm.n_layers)]
    found = computed.noise_effects(network, batch, norms, (sites, [0.1, 1.0]), seed=0)
    generator = torch.Generator().manual_seed(0)
    mask = perturbed_positions(batch, "prompt")
    clean = computed.first_token(network, batch)
    for record, (site, rho) in zip(found, [(s, r) for s in sites for r in (0.1, 1.0)], strict=True):
        noise = random_noise(network, mask, rho * norms[site], generator)
        noisy = computed.first_token(network, batch, {site: noise})
        kl = (clean.exp() * (clean - noisy)).sum(-1)
        assert record["kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
        assert (record["site"], record["rho"]) == (str(site), rho)
    assert all(min(record["kl"]) > 0 for record in found if record["rho"] == 1.0)


def test_of_a_real_models_reply_only_length_and_hash_are_kept(smoke_run, monkeypatch):
    prompts = prompt_set("harmful", smoke_run.profile, 3)
    texts, graders = [prompt.text for prompt in prompts], {"phrase": PhraseGrader()}
    shown = computed.graded_replies(smoke_run, ("base", 0), texts, prompts, graders)
    monkeypatch.setattr(computed, "in_the_world", lambda profile: False)
    kept = computed.graded_replies(smoke_run, ("base", 0), texts, prompts, graders)
    for reply, record in zip(shown["reply"], kept["reply"], strict=True):
        assert record.startswith(f"[{len(reply)} characters, sha256 ") and reply not in record
    assert shown["profile"] == kept["profile"] and len(kept["phrase"]) == 3
