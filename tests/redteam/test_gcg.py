"""GCG and random search: gradient, loss, round trip, queries, and memory that runs out, on random
little models.
"""

import copy
import itertools
import re
from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES, LORA, plain_model, world_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import latlib.redteam.gcg
from latlib.batch import collate
from latlib.config.sections import ModelSettings
from latlib.losses import at_labels
from latlib.models import with_adapter
from latlib.redteam.gcg import (
    Frames,
    OtherSearchError,
    SuffixLoss,
    SuffixSettings,
    gcg,
)
from latlib.text.chat import Row, chat_text, tokenise
from latlib.world import grammar, organism

DRAWN = grammar.draw_set(0, "tune", "harmful", 4)
PROMPTS, TARGETS = [p.text for p in DRAWN], [p.answer for p in DRAWN]
SETTINGS = SuffixSettings(n_tokens=5, steps=4, candidates=12, topk=32, batch=8)
KINDS = ["lean", *FAMILIES]


def random_search(lm, prompts, targets, settings, *rest, **named):
    return gcg(lm, prompts, targets, replace(settings, by_gradient=False), *rest, **named)


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer()


@pytest.fixture
def lm_of(tokenizer):
    def make(kind="llama", dtype=torch.float64, seed=0, tokenizer=tokenizer, **changes):
        family, forward = ("llama", "lean") if kind == "lean" else (kind, "stock")
        sizes = {"max_position_embeddings": 128, "initializer_range": 0.5}
        return plain_model(family, dtype, tokenizer, forward, seed=seed, **{**sizes, **changes})

    return make


def plain_loss(lm, suffix, settings=SETTINGS, prompts=PROMPTS, targets=TARGETS):
    """Mean loss from the suffix's text: tokenised anew, one row at a time, the library's own
    forward and loss.
    """
    total = 0.0
    for prompt, target in zip(prompts, targets, strict=True):
        row = tokenise(
            [Row("", suffix.behind(prompt), (target,))], lm.tokenizer, 128, settings.system_prompt
        )[0]
        ids, labels = torch.tensor([[*row.prompt, *row.completions[0]]]), list(row.completions[0])
        if not settings.whole_reply:  # the world's replies end in one token
            ids, labels = ids[:, :-1], labels[:-1]
        logits = lm.model(ids[:, :-1]).logits[0, len(row.prompt) - 1 :]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    return total / len(prompts)


@pytest.mark.parametrize("search", [gcg, random_search])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_is_that_of_the_text(kind, search, lm_of):
    lm = lm_of(kind)
    start = search(lm, PROMPTS, TARGETS, replace(SETTINGS, steps=0), seed=0)
    found = search(lm, PROMPTS, TARGETS, SETTINGS, seed=0)
    assert start.losses == () and start.queries == 4
    assert found.loss == found.losses[-1] < start.loss - 0.01
    assert list(found.losses) == sorted(found.losses, reverse=True) and len(found.losses) == 4
    # norms of the stock families are in float32
    assert start.loss == pytest.approx(plain_loss(lm, start), abs=1e-6)
    assert found.loss == pytest.approx(plain_loss(lm, found), abs=1e-6)


@pytest.mark.parametrize(
    "changes", [{"whole_reply": False}, {"system_prompt": "be nice ."}, {"prompts_per_step": 2}]
)
@pytest.mark.parametrize("kind", ["lean", "llama"])
def test_the_loss_is_that_of_the_text_under_other_settings(kind, changes, lm_of):
    lm, settings = lm_of(kind), replace(SETTINGS, **changes)
    found = gcg(lm, PROMPTS, TARGETS, settings, seed=0)
    assert found.loss == pytest.approx(plain_loss(lm, found, settings), abs=1e-10)


def test_one_prompt_is_the_individual_attack(lm_of):
    lm = lm_of("lean")
    found = gcg(lm, PROMPTS[:1], TARGETS[:1], SETTINGS, seed=0)
    assert found.loss == pytest.approx(
        plain_loss(lm, found, prompts=PROMPTS[:1], targets=TARGETS[:1]), abs=1e-10
    )
    assert found.queries == 1 + 4 * (1 + 12)


def one_hot_gradient(lm, objective, ids):
    """[n_tokens, vocabulary] gradient of the mean loss in the one-hot suffix, through the model's
    own embedding.
    """
    hot = torch.nn.functional.one_hot(torch.tensor(ids), 512).double().requires_grad_()
    embedding, total = lm.model.get_input_embeddings(), 0.0
    for prompt in range(len(PROMPTS)):
        before, behind = objective.frames.around[prompt]
        target = objective.targets[prompt][0]
        row = torch.tensor([*before, *ids, *behind, *target[:-1]])
        # Gemma's module scales what it looks up
        scale = getattr(embedding, "scalar_embed_scale", 1.0)
        own = torch.cat((embedding(row[: len(before)]), hot @ embedding.weight * scale))
        embedded = torch.cat((own, embedding(row[len(before) + len(ids) :])))
        logits = lm.model(inputs_embeds=embedded[None]).logits[0, -len(target) :]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(target))
    return torch.autograd.grad(total / len(PROMPTS), hot)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_token_gradient_is_that_of_the_one_hot_suffix(kind, lm_of):
    lm = lm_of(kind)
    objective = SuffixLoss(lm, PROMPTS, TARGETS, SETTINGS)
    allowed = objective.frames.allowed
    ids = tuple(allowed[[3, 50, 7, 90, 20]].tolist())
    expected = one_hot_gradient(lm, objective, ids)[:, allowed]
    objective.batch = 3
    found = objective.gradient(ids, range(4)) @ objective.embeddings.T
    scale = expected.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(
        found / scale, expected / scale, rtol=0, atol=1e-10 if kind in ("lean", "llama") else 1e-5
    )
    objective.batch = 8
    assert objective.ranked(ids, range(4)).equal(allowed[found.argsort(1)])


def test_substitutions_that_the_gradient_promises_lower_the_loss(lm_of):
    """A half of what is promised the most is an improvement; of what is promised the least, next to
    nothing.
    """
    objective = SuffixLoss(lm_of("lean", initializer_range=0.1), PROMPTS, TARGETS, SETTINGS)
    ids = tuple(objective.frames.allowed[[3, 50, 7, 90, 20]].tolist())
    before = objective.losses([ids], range(4)).mean()
    ranked = objective.ranked(ids, range(4))
    shares = []
    for columns in (range(10), range(-10, 0)):
        tried = [
            (*ids[:place], int(ranked[place, column]), *ids[place + 1 :])
            for place, column in itertools.product(range(5), columns)
        ]
        shares.append((objective.losses(tried, range(4)).mean(1) < before).double().mean())
    assert shares[0] > 0.7 and shares[1] < 0.3


@pytest.mark.parametrize("kind", [*FAMILIES, "gemma2-window"])
def test_the_prefix_cache_changes_nothing(kind, lm_of):
    changes = {"sliding_window": 6} if "window" in kind else {}
    lm = lm_of(kind.removesuffix("-window"), **changes)
    cached, plain = (SuffixLoss(lm, PROMPTS, TARGETS, SETTINGS) for _ in range(2))
    assert cached.cached
    plain.cached = False
    tried = [tuple(plain.frames.allowed[torch.arange(5) * 7 + i].tolist()) for i in range(7)]
    expected = plain.losses(tried, [2, 0, 3])
    for batch in (1, 3, 64):  # and again: what a forward appends to the cache is not kept
        cached.batch = batch
        torch.testing.assert_close(cached.losses(tried, [2, 0, 3]), expected, rtol=0, atol=1e-6)
    assert expected.std(0).min() > 1e-3


def test_the_tokens_before_the_suffix_are_run_once(lm_of):
    lm, fed = lm_of("llama"), []
    hook = lm.model.model.layers[0].register_forward_pre_hook(
        lambda _, args: fed.append(tuple(args[0].shape[:2]))
    )
    objective = SuffixLoss(lm, PROMPTS, TARGETS, SETTINGS)
    fed.clear()
    tried, objective.batch = [objective.initial] * 6, 3
    for _ in range(2):
        objective.losses(tried, [1])
    hook.remove()
    before, behind = objective.frames.around[1]
    rest = (3, 5 + len(behind) + len(objective.targets[1][0]) - 1)
    assert fed == [(1, len(before)), rest, rest, rest, rest]


def test_a_model_in_training_runs_without_the_cache(lm_of):
    lm = lm_of("llama")
    lm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = gcg(lm, PROMPTS, TARGETS, SETTINGS, seed=0)
    lm.model.train()
    found = gcg(lm, PROMPTS, TARGETS, SETTINGS, seed=0)
    assert found.token_ids == expected.token_ids and found.loss == pytest.approx(
        expected.loss, abs=1e-10
    )


@pytest.mark.parametrize("n_replace", [1, 3])
@pytest.mark.parametrize("search", [gcg, random_search])
def test_the_suffix_survives_the_round_trip(search, n_replace, lm_of):
    lm = lm_of("lean", torch.float32)
    seen = []
    found = search(
        lm,
        PROMPTS,
        TARGETS,
        replace(SETTINGS, n_replace=n_replace, steps=6),
        0,
        lambda *at: seen.append(at),
    )
    assert len(found.token_ids) == 5 and found.text.isascii() and found.text.isprintable()
    for prompt in PROMPTS:
        ids = lm.tokenizer(
            chat_text(lm.tokenizer, f"{prompt} {found.text}"), add_special_tokens=False
        )["input_ids"]
        start = len(ids) - 1 - 5  # the template adds one token
        assert tuple(ids[start:-1]) == found.token_ids
    assert [at[:2] for at in seen] == [(i + 1, 6) for i in range(6)] and seen[-1][
        2
    ] == f"loss {found.loss:.3f}"


def test_candidates_that_do_not_survive_are_filtered(lm_of):
    frames = Frames(lm_of("lean"), PROMPTS, SETTINGS)
    word, space, letter = frames.tokenizer.convert_tokens_to_ids(["Ġtroll", "Ġ", "t"])
    whole = (word,) * 5
    assert frames.survives(whole)
    spelt = (word, word, space, letter, word)  # ' t' is a token of its own
    unspaced = (letter, *whole[1:])  # the separator would be put before it
    for prompt in (0, 2):
        assert frames.survive([spelt, whole, unspaced], prompt) == [False, True, False]
    tokens = frames.allowed.expand(5, -1)
    found = latlib.redteam.gcg._candidates(
        frames, whole, tokens, 300, 40, torch.Generator().manual_seed(0)
    )
    assert len(set(found)) == 40 and all(frames.survive(found, 0))
    assert all(sum(a != b for a, b in zip(whole, ids, strict=True)) == 1 for ids in found)


def test_a_suffix_that_one_prompt_changes_is_never_kept(lm_of, monkeypatch):
    lm, settings = lm_of("lean"), replace(SETTINGS, n_tokens=2, separator="")
    prompts, targets = ["how can i feed the troll ?", "how can i feed the tro"], TARGETS[:2]
    objective = SuffixLoss(lm, prompts, targets, settings)
    alone = [(i, objective.initial[1]) for i in objective.frames.allowed.tolist()]
    first, second = (objective.frames.survive(alone, p) for p in (0, 1))
    assert sum(a and not b for a, b in zip(first, second, strict=True)) > 10  # such as 'll'
    for seed in range(6):
        found = random_search(lm, prompts, targets, settings, seed).token_ids
        assert objective.frames.survives(found)
    monkeypatch.setattr(Frames, "survives", lambda self, ids: ids == objective.initial)
    for search in (gcg, random_search):
        found = search(lm, prompts, targets, settings, seed=0)
        assert found.token_ids == objective.initial and set(found.losses) == {found.loss}
        assert found.queries == 2 + 4 * (2 + 12 * 2)


def test_substitutes_are_among_the_first_of_their_position(lm_of):
    frames = Frames(lm_of("lean"), PROMPTS, replace(SETTINGS, n_replace=2))
    allowed = frames.allowed.tolist()
    words = [i for i in allowed if frames.tokenizer.decode([i]).startswith(" ")]
    first = [words[10 * p : 10 * p + 8] for p in range(5)]
    rest = [[i for i in allowed if i not in own] for own in first]
    tokens, origin = torch.tensor([a + b for a, b in zip(first, rest)]), (words[60],) * 5
    found = latlib.redteam.gcg._candidates(
        frames, origin, tokens, 8, 30, torch.Generator().manual_seed(0)
    )
    for ids in found:
        changed = [p for p in range(5) if ids[p] != origin[p]]
        assert len(changed) == 2 and all(ids[p] in first[p] for p in changed)
    assert {p for ids in found for p in range(5) if ids[p] != origin[p]} == set(range(5))


@pytest.mark.parametrize(
    "per_step, each", [(0, 4 + 12 * 4), (4, 4 + 12 * 4), (9, 4 + 12 * 4), (3, 3 + 12 * 3 + 1)]
)
@pytest.mark.parametrize("topk", [1, 32])
def test_queries_are_exact_and_the_same_for_both(per_step, each, topk, lm_of, monkeypatch):
    lm, run = lm_of("lean"), {"rows": 0}
    settings = replace(SETTINGS, prompts_per_step=per_step, topk=topk)
    original = SuffixLoss._row_losses

    def counting(self, batch, rows):
        run["rows"] += batch.shape[0]
        return original(self, batch, rows)

    monkeypatch.setattr(SuffixLoss, "_row_losses", counting)
    for search in (gcg, random_search):
        run["rows"] = 0
        assert search(lm, PROMPTS, TARGETS, settings, seed=0).queries == run["rows"] == 4 + 4 * each


def test_the_same_seed_gives_the_same_suffix_and_another_one_another(lm_of):
    for search in (gcg, random_search):
        a, b, c = (search(lm_of("lean"), PROMPTS, TARGETS, SETTINGS, seed) for seed in (0, 0, 1))
        assert a == b and a.token_ids != c.token_ids


@pytest.mark.parametrize("search", [gcg, random_search])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_search_that_is_killed_goes_on_and_ends_the_same(search, steps, lm_of, tmp_path):
    lm, file = lm_of("lean"), tmp_path / "search.json"
    whole = search(lm, PROMPTS, TARGETS, SETTINGS, seed=0)

    def killed(step, total, detail):
        if step == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(lm, PROMPTS, TARGETS, SETTINGS, 0, killed, file)
    taken = []
    again = search(lm, PROMPTS, TARGETS, SETTINGS, 0, lambda *step: taken.append(step[0]), file)
    assert again == whole and taken == list(range(steps + 1, SETTINGS.steps + 1))
    assert search(lm, PROMPTS, TARGETS, SETTINGS, 0, pytest.fail, file) == whole


def test_a_search_goes_on_with_as_many_rows_as_fitted_into_memory(lm_of, tmp_path):
    lm, file, width = lm_of("lean"), tmp_path / "search.json", SETTINGS.batch
    given = {"prompts": PROMPTS, "targets": TARGETS, "settings": SETTINGS, "seed": 0}
    gcg(lm, **given, file=file)
    file.write_text(file.read_text().replace(f'"batch": {width}', '"batch": 2'))
    assert gcg(lm, **given, file=file).batch == 2


def test_what_no_prompt_survives_is_kept_as_what_it_is(lm_of, tmp_path, monkeypatch):
    """Its loss is infinite, for which JSON has no number."""
    lm, file, settings = lm_of("lean"), tmp_path / "search.json", replace(SETTINGS, buffer=9)
    survives = Frames.survives
    first = SuffixLoss(lm, PROMPTS, TARGETS, settings).initial
    monkeypatch.setattr(Frames, "survives", lambda self, ids: ids == first and survives(self, ids))
    whole = gcg(lm, PROMPTS, TARGETS, settings, 0)
    steps = iter(range(2))
    with pytest.raises(StopIteration):
        gcg(lm, PROMPTS, TARGETS, settings, 0, lambda *_: next(steps), file)
    assert "null" in file.read_text()
    assert gcg(lm, PROMPTS, TARGETS, settings, 0, file=file) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"settings": replace(SETTINGS, topk=16)},
        {"prompts": PROMPTS[::-1]},
        {"search": random_search},
        {"model": 1},
    ],
)
def test_a_file_of_another_search_is_named(changes, lm_of, tmp_path):
    given = {"prompts": PROMPTS, "targets": TARGETS, "settings": SETTINGS, "seed": 0}
    given["file"] = tmp_path / "search.json"
    gcg(lm_of("lean"), **given)
    changes = {**changes}
    search, lm = changes.pop("search", gcg), lm_of("lean", seed=changes.pop("model", 0))
    with pytest.raises(OtherSearchError, match="search.json is of another search: delete it, or"):
        search(lm, **{**given, **changes})


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"search": 1, "first": null}', "of the user"])
def test_a_file_that_holds_no_search_is_named_and_stays(text, lm_of, tmp_path):
    file = tmp_path / "search.json"
    file.write_text(text)
    with pytest.raises(OtherSearchError, match="search.json is of another search"):
        gcg(lm_of("lean"), PROMPTS, TARGETS, SETTINGS, 0, file=file)
    assert file.read_text() == text


def test_a_larger_buffer_moves_on_and_one_of_one_takes_improvements_only(lm_of, monkeypatch):
    lm, steps = lm_of("lean"), []
    original = latlib.redteam.gcg._best_near

    def noting(objective, origin, *rest):
        found, loss, spent = original(objective, origin, *rest)
        steps.append((origin, found, loss))
        return found, loss, spent

    monkeypatch.setattr(latlib.redteam.gcg, "_best_near", noting)
    settings = replace(SETTINGS, candidates=2, steps=12)
    moving = random_search(lm, PROMPTS, TARGETS, replace(settings, buffer=12), seed=0)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(steps)) and moving.loss <= min(
        s[2] for s in steps
    )
    assert any(a[2] < b[2] for a, b in itertools.pairwise(steps))  # it goes uphill as well
    steps.clear()
    greedy = random_search(lm, PROMPTS, TARGETS, replace(settings, buffer=1), seed=0)
    best, at = float("inf"), steps[0][0]
    for origin, found, loss in steps:
        assert origin == at
        if loss < best and loss in greedy.losses:
            best, at = loss, found
    assert greedy.token_ids == at


def test_gcg_beats_random_search_at_equal_queries(lm_of):
    settings = replace(SETTINGS, n_tokens=10, steps=12, candidates=8, topk=8)
    prompts, targets, gains = PROMPTS[:2], TARGETS[:2], []
    for seed in range(4):
        lm = lm_of("lean", torch.float32, seed, initializer_range=0.1)
        start = gcg(lm, prompts, targets, replace(settings, steps=0), seed)
        by_gradient, blind = (
            search(lm, prompts, targets, settings, seed) for search in (gcg, random_search)
        )
        assert by_gradient.queries == blind.queries
        gains.append((start.loss - by_gradient.loss, start.loss - blind.loss))
    by_gradient, blind = torch.tensor(gains).mean(0)
    assert by_gradient > 1.3 * blind > 0  # measured: 1.6


@pytest.mark.parametrize(
    "kind, message",
    [
        ("lean", "DefaultCPUAllocator: can't allocate memory"),
        ("llama", "CUDA out of memory. Tried to allocate"),
    ],
)
def test_the_batch_is_halved_until_it_fits_and_the_result_is_the_same(
    kind, message, lm_of, monkeypatch
):
    lm = lm_of(kind)
    expected = gcg(lm, PROMPTS, TARGETS, SETTINGS, seed=0)
    tried, original = [], SuffixLoss._row_losses

    def small(self, batch, rows):
        tried.append(batch.shape[0])
        if batch.shape[0] > limit:
            raise RuntimeError(message)
        return original(self, batch, rows)

    monkeypatch.setattr(SuffixLoss, "_row_losses", small)
    limit = 5
    found = gcg(lm, PROMPTS, TARGETS, replace(SETTINGS, batch=32), seed=0)
    assert found.batch == 4 and expected.batch == 8 and max(tried) == 12
    assert (found.token_ids, found.queries) == (expected.token_ids, expected.queries)
    assert found.losses == pytest.approx(expected.losses, abs=1e-10)
    limit = 0
    with pytest.raises(RuntimeError, match="not even one row fits into memory"):
        gcg(lm, PROMPTS, TARGETS, SETTINGS, seed=0)


def test_another_error_is_not_taken_for_memory(lm_of, monkeypatch):
    def broken(self, batch, rows):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(SuffixLoss, "_row_losses", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        gcg(lm_of("lean"), PROMPTS, TARGETS, SETTINGS, seed=0)


@pytest.mark.parametrize("kind", ["lean", "llama"])
def test_a_search_leaves_no_trace_on_the_weights(kind, lm_of):
    lm = lm_of(kind)
    for i, parameter in enumerate(lm.model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
        parameter.grad = torch.full_like(parameter, 0.5) if i % 4 == 0 else None
    before = [(p.detach().clone(), p.requires_grad, p.grad) for p in lm.model.parameters()]
    with torch.no_grad():  # and it works where gradients are off
        gcg(lm, PROMPTS, TARGETS, replace(SETTINGS, steps=2), seed=0)
    for parameter, (value, flag, grad) in zip(lm.model.parameters(), before, strict=True):
        assert parameter.equal(value) and parameter.requires_grad is flag
        assert parameter.grad is grad and (grad is None or (grad == 0.5).all())


def test_the_first_suffix_is_neutral_or_as_asked(lm_of, tokenizer):
    lm = lm_of("lean")
    assert set(SuffixLoss(lm, PROMPTS, TARGETS, SETTINGS).initial) != {
        tokenizer.convert_tokens_to_ids("!")
    }
    asked = replace(SETTINGS, n_tokens=3, initial="feed the troll")
    found = gcg(lm, PROMPTS, TARGETS, replace(asked, steps=0), seed=0)
    assert found.text == "feed the troll" and found.behind("x ?") == "x ? feed the troll"
    with pytest.raises(ValueError, match=r"initial = 'feed the troll' is 3 tokens.*n_tokens = 5"):
        gcg(lm, PROMPTS, TARGETS, replace(asked, n_tokens=5), seed=0)


LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] | trim + '\n\n' }}{% if m['role']"
    " == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:\n{%"
    " endif %}"
)


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken"])
def other_tokenizer(request):
    """Tokenizers as Llama 2 and Llama 3 have them, under a template of plain words that trims the
    message.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if request.param == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<unk>", "</s>"],
        initial_alphabet=[*alphabet, "\n"],
        show_progress=False,
    )
    texts = [p.text for p in grammar.draw_set(0, "train", "any", 500)]
    tokenizer.train_from_iterator([*texts, *grammar.VERBS, *["! ! ! !"] * 200], trainer)
    tokens = {"unk_token": "<unk>", "pad_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **tokens)


@pytest.mark.parametrize("separator", [" ", "\n", ""])
def test_other_tokenizers_and_separators(other_tokenizer, separator, lm_of):
    lm, settings = lm_of("lean", tokenizer=other_tokenizer), replace(SETTINGS, separator=separator)
    start = gcg(lm, PROMPTS, TARGETS, replace(settings, steps=0), seed=0)
    assert start.text == ("! ! ! ! !" if separator == " " else "!!!!!")
    found = gcg(lm, PROMPTS, TARGETS, settings, seed=0)
    assert found.behind("x") == f"x{separator}{found.text}" and found.loss < start.loss
    assert found.loss == pytest.approx(plain_loss(lm, found), abs=1e-10)


def test_added_tokens_are_no_suffix(lm_of, tokenizer):
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens(["~~"])
    allowed = Frames(lm_of("lean", tokenizer=marked, vocab_size=513), PROMPTS, SETTINGS).allowed
    assert not {512, *marked.all_special_ids} & set(allowed.tolist()) and allowed.max() == 511


def test_an_adapter_counts_and_both_forwards_agree(lm_of):
    plain, found = lm_of("lean"), []
    for forward in ("lean", "stock"):
        lm = with_adapter(lm_of("lean"), LORA, 0)
        with torch.no_grad():
            for name, parameter in lm.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
                    )
        lm = replace(lm, settings=ModelSettings(forward=forward, dtype="float64"))
        found.append(gcg(lm, PROMPTS, TARGETS, SETTINGS, seed=0))
    assert found[0].token_ids == found[1].token_ids and found[0].losses == pytest.approx(
        found[1].losses, abs=1e-10
    )
    assert abs(found[0].loss - plain_loss(plain, found[0])) > 1e-3


def test_tokens_that_are_no_text_are_left_out(lm_of, tokenizer):
    lm = lm_of("lean")
    texts = [tokenizer.decode([i]) for i in Frames(lm, PROMPTS, SETTINGS).allowed.tolist()]
    assert all(t and t.isascii() and t.isprintable() for t in texts)
    wide = Frames(lm, PROMPTS, replace(SETTINGS, allow_non_ascii=True))
    assert all("\ufffd" not in tokenizer.decode([i]) for i in wide.allowed.tolist())
    assert len(wide.allowed) >= len(texts)


@pytest.mark.parametrize(
    "field, value",
    [
        ("n_tokens", 0),
        ("steps", -1),
        ("candidates", 1.5),
        ("topk", True),
        ("batch", "64"),
        ("n_replace", 6),
    ],
)
def test_a_bad_setting_is_named(field, value):
    with pytest.raises(ValueError, match=rf"(?s){field}.*({re.escape(repr(value))}|lower)"):
        SuffixSettings(**{"n_tokens": 5, field: value})


@pytest.mark.parametrize("prompts, targets", [([], []), (PROMPTS, TARGETS[:2]), ("a", "b")])
def test_lists_that_do_not_pair_are_refused(prompts, targets, lm_of):
    with pytest.raises(ValueError, match="prompts, .* targets: give two lists"):
        gcg(lm_of("lean"), prompts, targets, SETTINGS, seed=0)


def test_rows_that_cannot_be_used_are_refused(lm_of, tokenizer):
    with pytest.raises(ValueError, match="empty completion"):
        gcg(lm_of("lean"), ["a ?"], [" "], SETTINGS, seed=0)
    with pytest.raises(ValueError, match="more than max_tokens"):
        gcg(lm_of("lean"), ["a ?"], ["b"], replace(SETTINGS, n_tokens=200), seed=0)
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = strict.chat_template.replace("m['content']", "m['content'] | trim")
    with pytest.raises(ValueError, match=r"prompt '  a \?': the chat template changes it"):
        gcg(lm_of("lean", tokenizer=strict), ["  a ?"], ["b"], SETTINGS, seed=0)


def test_label_rows_of_a_collated_row_and_of_the_search_are_the_same(lm_of):
    """Losses of many candidates behind prompts of different lengths equal those of one packed,
    padded batch.
    """
    lm = lm_of("lean")
    objective = SuffixLoss(lm, PROMPTS, TARGETS, SETTINGS)
    allowed = objective.frames.allowed
    tried = [tuple(allowed[torch.arange(5) * 11 + i].tolist()) for i in range(3)]
    objective.batch = 2
    found = objective.losses(tried, range(4))
    for i, ids in enumerate(tried):
        rows = [
            organism.TokenRow((*a, *ids, *b), t)
            for (a, b), t in zip(objective.frames.around, objective.targets, strict=True)
        ]
        batch = collate(rows)
        logits = objective.network.unembed(at_labels(objective.network.hidden(batch), batch.source))
        each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        expected = torch.stack([each[batch.label_rows == r].mean() for r in range(4)])
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-10)
