"""Activations at prompt ends against one prompt at a time; positions, pairing and files."""

import pytest
import tiny_models as tiny
import torch

from latlib.batch import collate
from latlib.config.profile import load_profile
from latlib.hooks import Capture
from latlib.refusal import activations as act
from latlib.text.chat import chat_text
from latlib.world import grammar

ROWS = tiny.prompt_rows(12)
SITES = act.sites_of(tiny.LAYERS)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("forward", ["lean", "stock"])
def test_activations_are_those_of_each_prompt_alone_at_its_last_tokens(forward, count):
    lm = tiny.language_model(forward)
    found = act.activations(lm.network(), ROWS, SITES, count, size=5)
    for i, row in enumerate(ROWS):
        with torch.no_grad(), Capture(lm.model, SITES, positions=range(-count, 0)) as streams:
            lm.model(torch.tensor([row.prompt]))
        for site in SITES:
            torch.testing.assert_close(found[site][i], streams[site][0], atol=1e-6, rtol=1e-6)


def test_the_last_prompt_token_of_a_packed_row_is_the_one_that_predicts_the_reply():
    batch = collate(tiny.token_rows(4, 2))
    first_label = [batch.source[batch.label_rows == row][0].item() for row in range(4)]
    assert act.prompt_ends(batch)[:, 0].tolist() == first_label
    assert act.prompt_ends(batch, 3).tolist() == [[i - 2, i - 1, i] for i in first_label]


def test_more_positions_than_a_prompt_has_are_an_error():
    batch = collate(ROWS)
    shortest = min(len(row.prompt) for row in ROWS)
    with pytest.raises(
        ValueError, match=f"positions = {shortest + 1}: the shortest prompt has {shortest} tokens"
    ):
        act.prompt_ends(batch, shortest + 1)


@pytest.mark.parametrize(
    ("behind", "count"),
    [("<|assistant|>", 1), ("<|end|><|assistant|>", 2), ("", 1)],
)
def test_post_instruction_tokens_are_the_templates(behind, count):
    tokenizer = tiny.world_tokenizer()
    reply = "{% if messages[1:] %}{{ messages[1]['content'] }}{% endif %}"
    tokenizer.chat_template = "<|user|> {{ messages[0]['content'] }}" + behind + reply
    assert act.post_instruction(tokenizer) == count
    ends = {
        tuple(tokenizer(chat_text(tokenizer, text), add_special_tokens=False)["input_ids"][-count:])
        for text in "ab"
    }
    assert len(ends) == (1 if behind else 2)


def with_pairing(pairing):
    profile = load_profile("smoke")
    return profile.model_copy(
        update={"evaluation": profile.evaluation.model_copy(update={"pairing": pairing})}
    )


@pytest.mark.parametrize("pairing", ["matched", "random"])
def test_pairs_are_of_one_split_and_as_asked(pairing):
    profile = with_pairing(pairing)
    harmful, harmless = act.paired_prompts(profile, "train", 40)
    assert len(harmful) == len(harmless) == 40
    assert all(h.harmful and not c.harmful for h, c in zip(harmful, harmless, strict=True))
    same = [
        (h.verb, h.tool, h.template) == (c.verb, c.tool, c.template)
        for h, c in zip(harmful, harmless, strict=True)
    ]
    assert all(same) if pairing == "matched" else not all(same)
    assert {(p.verb, p.target) for p in harmful} <= set(grammar.pairs_of("train", "harmful"))
    assert act.paired_prompts(profile, "train", 40) == (harmful, harmless)


def test_sides_that_do_not_pair_up_are_errors():
    with pytest.raises(ValueError, match="3 harmful and 2 harmless"):
        act.activation_differences(tiny.language_model().network(), ROWS[:3], ROWS[:2], SITES)


def test_both_sides_of_a_run_differ_by_what_is_kept(smoke_run):
    profile, lm = smoke_run.profile, smoke_run.model("ssft", 0)
    kept = smoke_run.differences("ssft", 0).last()[1]
    harmful, harmless = act.paired_activations(lm, profile, [1], profile.evaluation.pairs)
    assert torch.allclose(harmful[1] - harmless[1], kept, atol=1e-5)
    assert harmless[1].norm() > 0
    record = smoke_run.variance("ssft", 0)["massive"]
    site = smoke_run.variance("ssft", 0)["fixed_site"]
    assert record["prompts"] == 2 * len(kept)
    at = smoke_run.variance("ssft", 0)["sites"].index(str(site))
    share = sum(smoke_run.variance("ssft", 0)["uncentred"][at][:2])
    assert record["share"][0] == pytest.approx(share, abs=1e-4)
