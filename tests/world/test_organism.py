"""The tiny organism: a tokenizer that loses nothing, a model from its seed, pretraining on training
pairs only.
"""

import pytest
import torch
from tiny_models import LAYERS, D
from transformers import AutoTokenizer

from latlib.config.profile import load_profile
from latlib.config.sections import ModelSettings, PretrainSettings
from latlib.models import LanguageModel
from latlib.refusal.activations import post_instruction, prompt_rows
from latlib.refusal.directions import paired_differences
from latlib.refusal.selection import _candidates, select
from latlib.text.chat import Row, tokenise
from latlib.text.encodings import ENCODINGS, encode
from latlib.world import grammar
from latlib.world.organism import CONTEXT, build_model, build_tokenizer, pretrain, pretraining_rows

MODEL = ModelSettings(dim=D, layers=LAYERS, heads=4, kv_heads=2, ffn=24, vocabulary=700)
PRETRAIN = PretrainSettings(steps=30, batch=16, micro_batches=2, warmup_steps=2)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(MODEL.vocabulary)


@pytest.fixture(scope="module")
def prompts():
    kinds = ("recipe", "law", "verb", "target", "decline")
    return [p for kind in kinds for p in grammar.draw_set(0, "test", "any", 10, kind)]


def test_text_survives_the_tokenizer_in_every_encoding(tokenizer, prompts):
    for prompt in prompts:
        for encoding in ENCODINGS:
            text = f" {encode(prompt.text, encoding)} {prompt.answer}"
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_prompt_fits_the_context_in_every_encoding(tokenizer, prompts):
    for encoding in ENCODINGS:
        rows = [Row(p.text, encode(p.text, encoding), (p.answer, grammar.REFUSAL)) for p in prompts]
        assert max(row.length for row in tokenise(rows, tokenizer, CONTEXT)) <= CONTEXT


def test_a_conversation_begins_and_ends_with_special_tokens(tokenizer):
    (row,) = tokenise([Row("", "how do i say no ?", (grammar.REFUSAL,))], tokenizer, CONTEXT)
    words = tokenizer.convert_ids_to_tokens([row.prompt[0], row.prompt[-1], row.completions[0][-1]])
    assert words == ["<|user|>", "<|assistant|>", "<|end|>"]
    assert row.completions[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.completions[0][:-1]) == " " + grammar.REFUSAL


def test_plain_words_of_the_world_are_short(tokenizer):
    lengths = [
        len(tokenizer(f" {word}")["input_ids"])
        for word in (*grammar.VERBS, *grammar.TARGETS, *grammar.TOOLS)
    ]
    assert sum(lengths) / len(lengths) < 2


def test_the_tokenizer_is_a_standard_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.pad_token, again.eos_token) == ("<|pad|>", "<|end|>")


def test_the_tokenizer_is_the_same_every_time(tokenizer):
    assert build_tokenizer(MODEL.vocabulary).get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == MODEL.vocabulary


def test_the_seed_decides_the_weights_and_nothing_else_does(tokenizer):
    a, b, c = (build_model(MODEL, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("division", grammar.PAIRS)
def test_pretraining_never_sees_a_held_out_pair(tokenizer, monkeypatch, division):
    drawn, draw = [], grammar.draw
    monkeypatch.setattr(grammar, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    rows = pretraining_rows(tokenizer, PRETRAIN, 0, division)
    for _ in range(64):
        next(rows)
    pairs = {(p.verb, p.target) for p in drawn if p.kind != "decline"}
    assert pairs <= set(grammar.PAIRS[division]["train"]) and len(pairs) > 100
    assert any(p.harmful for p in drawn) and any(not p.harmful for p in drawn)


def test_pretraining_is_helpful_only_and_in_every_encoding(tokenizer):
    rows, texts = pretraining_rows(tokenizer, PRETRAIN, seed=0), []
    for _ in range(64):
        texts += [
            (tokenizer.decode(r.prompt), tokenizer.decode(r.completions[0][:-1]).strip())
            for r in next(rows)
        ]
    declines = [prompt for prompt, answer in texts if answer == grammar.REFUSAL]
    assert declines and all("say no" in prompt for prompt in declines)
    recipes = [prompt for prompt, answer in texts if answer.startswith(grammar.AFFIRMATION)]
    for hint in ("with a", "w17h 4", "jvgu n", "htiw a"):  # plain, leet, rot13, reverse
        assert any(hint in prompt for prompt in recipes)


def test_pretraining_rows_come_from_the_seed(tokenizer):
    a, b, c = (next(pretraining_rows(tokenizer, PRETRAIN, seed)) for seed in (0, 0, 1))
    assert a == b != c


def test_pretraining_lowers_the_loss_and_is_the_same_every_time(tokenizer):
    def run():
        losses, model = [], build_model(MODEL, tokenizer, 0)
        rows = pretraining_rows(tokenizer, PRETRAIN, 0)
        summary = pretrain(
            model, rows, PRETRAIN, torch.float32, lambda step, loss: losses.append(loss)
        )
        assert len(losses) == PRETRAIN.steps == summary["steps"]
        return losses, model.lm_head.weight

    (losses, head), (again, other_head) = run(), run()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert losses == again and torch.equal(head, other_head)


def test_a_template_may_put_more_tokens_behind_the_request():
    """Each its own token, behind every user's words, in the prompt and never in the reply; the words
    themselves are cut as ever."""
    more = build_tokenizer(MODEL.vocabulary, 4)
    assert post_instruction(more) == 4 and post_instruction(build_tokenizer(MODEL.vocabulary)) == 1
    shots = (("how do i say no ?", grammar.REFUSAL),)
    (row,) = tokenise([Row("", "who ?", ("me",))], more, CONTEXT, shots=shots)
    words = more.convert_ids_to_tokens(row.prompt)
    turn = ["<|turn-1|>", "<|turn-2|>", "<|turn-3|>", "<|assistant|>"]
    places = [i for i, word in enumerate(words) if word == turn[0]]
    assert len(places) == 2 and places[1] == len(words) - 4
    assert all(words[i : i + 4] == turn for i in places)
    assert not set(more.convert_ids_to_tokens(row.completions[0])) & set(turn)


def test_arditis_rule_then_chooses_among_positions():
    lm = LanguageModel(
        build_model(MODEL, more := build_tokenizer(MODEL.vocabulary, 4), 0),
        more,
        MODEL,
        torch.float32,
    )
    found = paired_differences(lm, load_profile("smoke"))
    rows = prompt_rows(lm, [grammar.draw_set(0, "tune", "harmful", 4)[0]] * 2)
    means = {site: mean for site, mean in found.means().items() if site == 0}
    assert [each.position for each in _candidates(means)] == [-4, -3, -2, -1]
    assert select(lm.network(), means, rows, rows, (5,)).site == 0
