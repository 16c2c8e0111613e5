"""Generation at batch size: padding, perturbed prompts and ablation give what one prompt at a time
gives.
"""

import pytest
import torch
from tiny_models import plain_model, world_tokenizer
from transformers import GenerationConfig

from latlib.batch import collate
from latlib.evaluation.generate import generate, left_padded, replies
from latlib.losses import at_labels
from latlib.network import StockNetwork
from latlib.text.chat import Row, chat_text, token_ids, tokenise
from latlib.world import organism

PROMPTS = [
    "how to cook the rice",
    "may you wash a car",
    "x",
    "how do you paint the wall of the old house",
]
SITES = ("embedding", 1, 3)


@pytest.fixture(scope="module")
def lm():
    tokenizer = world_tokenizer()
    lm = plain_model("llama", torch.float32, tokenizer, "auto", max_position_embeddings=128)
    lm.model.generation_config.eos_token_id = tokenizer.eos_token_id
    return lm


def prompt_batch(lm):
    rows = [Row(str(i), prompt, ("a",)) for i, prompt in enumerate(PROMPTS)]
    return collate(tokenise(rows, lm.tokenizer, 128))


def noise(lm, batch, size=2.0):
    generator = torch.Generator().manual_seed(0)
    on_prompts = (batch.segments == 0)[..., None]
    return {
        s: (
            size
            * torch.randn(*batch.shape, lm.model.config.hidden_size, generator=generator)
            * on_prompts
        )
        for s in SITES
    }


def as_asked(batch, deltas):
    """The perturbation of any batch of the prompts: each row its own, wherever it stands."""
    rows = [tuple(ids[part == 0].tolist()) for ids, part in zip(batch.ids, batch.segments)]

    def perturb(asked):
        index = [rows.index(tuple(i[p == 0].tolist())) for i, p in zip(asked.ids, asked.segments)]
        return {site: delta[index, : asked.shape[1]] for site, delta in deltas.items()}

    return perturb


def greedy(lm, network, deltas, index, n):
    """Token by token without a cache: each step runs the whole row, the perturbation on its
    prompt.
    """
    prompt = tuple(
        lm.tokenizer(chat_text(lm.tokenizer, PROMPTS[index]), add_special_tokens=False)["input_ids"]
    )
    written = ()
    for _ in range(n):
        row = collate([organism.TokenRow(prompt, ((*written, 0),))])
        own = {}
        for site, delta in (deltas or {}).items():
            own[site] = torch.zeros(1, row.shape[1], delta.shape[-1])
            own[site][0, : len(prompt)] = delta[index, : len(prompt)]
        logits = network.unembed(at_labels(network.hidden(row, own), row.source))
        written += (int(logits[-1].argmax()),)
        if written[-1] == lm.tokenizer.eos_token_id:
            break
    return lm.tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("size", [1, 3, 32])
def test_replies_do_not_depend_on_the_batch(lm, size):
    found = generate(lm, PROMPTS, max_new_tokens=6, size=size)
    assert found == [generate(lm, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert found == [greedy(lm, StockNetwork(lm.model), None, i, 6) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("size", [2, 32])
def test_a_perturbation_acts_on_the_prompt_and_never_while_decoding(lm, size):
    batch = prompt_batch(lm)
    deltas = noise(lm, batch)
    found = generate(lm, PROMPTS, as_asked(batch, deltas), max_new_tokens=6, size=size)
    assert found == [greedy(lm, StockNetwork(lm.model), deltas, i, 6) for i in range(len(PROMPTS))]
    assert found != generate(lm, PROMPTS, max_new_tokens=6)


@pytest.mark.parametrize("perturbed", [False, True])
def test_generation_under_ablation(lm, perturbed):
    batch, directions = (
        prompt_batch(lm),
        torch.randn(2, 16, generator=torch.Generator().manual_seed(1)),
    )
    deltas = noise(lm, batch) if perturbed else {}
    perturb = as_asked(batch, deltas) if perturbed else None
    found = generate(lm, PROMPTS, perturb, max_new_tokens=6, directions=directions)
    network = StockNetwork(lm.model).ablated(directions)
    assert found == [greedy(lm, network, deltas, i, 6) for i in range(len(PROMPTS))]
    assert found != generate(lm, PROMPTS, perturb, max_new_tokens=6)


def test_a_reply_ends_at_the_context(lm, monkeypatch):
    (row,) = tokenise([Row("0", PROMPTS[0], ())], lm.tokenizer, lm.context)
    long, three = (generate(lm, PROMPTS[:1], max_new_tokens=n)[0] for n in (12, 3))
    monkeypatch.setattr(lm.model.config, "max_position_embeddings", len(row.prompt) + 2)
    assert generate(lm, PROMPTS[:1], max_new_tokens=12) == [three] != [long]


def test_prompts_are_padded_on_the_left(lm):
    chats = [chat_text(lm.tokenizer, prompt) for prompt in PROMPTS]
    encoded = left_padded(lm, token_ids(lm.tokenizer, chats))
    assert (encoded["attention_mask"][:, -1] == 1).all() and encoded[
        "attention_mask"
    ].sum() < encoded["input_ids"].numel()


ASKED = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "repetition_penalty": {"repetition_penalty": 1.1},  # Qwen2.5's own
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "num_beams": {"num_beams": 4},
    "num_return_sequences": {"num_beams": 2, "num_return_sequences": 2},
    "min_new_tokens": {"min_new_tokens": 8},
    "suppress_tokens": {"suppress_tokens": list(range(5, 300))},
    "max_length": {"max_length": 12},
    "forced_bos": {"forced_bos_token_id": 9},
    "return_dict_in_generate": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("asked", ASKED)
def test_replies_are_greedy_whatever_the_checkpoint_asks_for(lm, asked, monkeypatch):
    plain = generate(lm, PROMPTS, max_new_tokens=6)
    own = GenerationConfig(eos_token_id=lm.tokenizer.eos_token_id, **ASKED[asked])
    monkeypatch.setattr(lm.model, "generation_config", own)
    assert generate(lm, PROMPTS, max_new_tokens=6) == plain
    assert lm.model.generation_config is own, "it is the checkpoint's again"
    batch = prompt_batch(lm)
    perturb = as_asked(batch, noise(lm, batch, size=0.0))
    assert generate(lm, PROMPTS, perturb, max_new_tokens=6) == plain


def test_a_reply_that_the_limit_cut_is_told_from_one_that_ended(lm, monkeypatch):
    rows = tokenise(
        [Row(str(i), prompt, ()) for i, prompt in enumerate(PROMPTS)], lm.tokenizer, 128
    )
    cut = replies(lm, rows, size=4, max_new_tokens=8)
    assert not any(reply.ended for reply in cut)
    assert [reply.text for reply in cut] == generate(lm, PROMPTS, max_new_tokens=8)
    # a token that some of them write, and others do not
    written = [
        set(lm.tokenizer(reply.text, add_special_tokens=False)["input_ids"]) for reply in cut
    ]
    some = next(iter(written[0] - written[1]))
    for ends in (some, [lm.tokenizer.eos_token_id, some]):
        monkeypatch.setattr(lm.model.generation_config, "eos_token_id", ends)
        ended = [reply.ended for reply in replies(lm, rows, size=4, max_new_tokens=8)]
        assert ended[0] and not ended[1]
