"""Jailbreaks that are typed: what is asked, where suffixes come from, and that success is counted
on other requests.
"""

import copy
import hashlib
from dataclasses import replace

import pandas as pd
import pytest
import torch

from latlib.config.profile import load_profile
from latlib.evaluation import examine
from latlib.evaluation.ask import Wording, prompt_set, token_rows
from latlib.evaluation.examine import affirmation_tokens, grade_rows
from latlib.evaluation.outcomes import COLUMNS
from latlib.io.files import read_json, write_json
from latlib.io.progress import Progress, Stopped
from latlib.redteam import jailbreaks as module
from latlib.redteam.gcg import Suffix
from latlib.redteam.jailbreaks import (
    SYSTEM_OVERRIDE,
    find_suffixes,
    jailbreaks,
    many_shots,
    suffix_settings,
)
from latlib.world import grammar

TYPED, FOUND = ["many-shot", "system"], ["suffix-gcg", "suffix-random"]


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


@pytest.fixture(scope="module")
def lm(run):
    return run.model("ssft")


@pytest.fixture
def subject(run):
    return run.subject(run.spec("ssft"))


def with_evaluation(subject, **changes):
    """The subject of a profile with other settings of the evaluation."""
    evaluation = subject.profile.evaluation.model_copy(update=changes)
    return replace(subject, profile=subject.profile.model_copy(update={"evaluation": evaluation}))


def without_suffixes(subject):
    suffix = subject.profile.evaluation.suffix.model_copy(update={"steps": 0})
    return with_evaluation(subject, suffix=suffix)


def suffix_of(text):
    return Suffix(text, (1, 2), 1.0, (1.0,), 10, 16, " ")


@pytest.fixture
def graded(monkeypatch, lm):
    """Outcomes that are a function of the prompt's text, and the texts of every call: [[text, ...],
    ...].
    """
    calls = []

    def grade(network, rows, perturb, size, prefilled):
        assert prefilled == affirmation_tokens(lm)
        calls.append([lm.tokenizer.decode(list(row.prompt)) for row in rows])
        return [outcome_of(text) for text in calls[-1]], [finishes(text) for text in calls[-1]]

    monkeypatch.setattr(examine, "grade_rows", grade)

    def found(lm, prompts, targets, settings, *rest):
        return suffix_of("wolf queen" if settings.by_gradient else "rat rat")

    monkeypatch.setattr(module, "gcg", found)
    return calls


def outcome_of(text):
    return ("complied", "refused", "neither")[hashlib.sha256(text.encode()).digest()[0] % 3]


def finishes(text):
    return hashlib.sha256(text.encode()).digest()[1] % 2 == 0


def test_every_attack_is_put_round_every_prompt_and_its_twin(lm, subject, graded):
    table, _ = jailbreaks(lm, subject)
    n, shots = (
        subject.profile.evaluation.prompts,
        many_shots(subject.profile, subject.profile.evaluation.shots),
    )
    assert len(shots) == 2 and tuple(table.columns) == COLUMNS
    before = "".join(f"<|user|> {said}<|assistant|> {replied}<|end|>" for said, replied in shots)
    written = {
        "many-shot": before + "<|user|> {}<|assistant|>",
        "system": f"<|system|> {SYSTEM_OVERRIDE}<|user|> {{}}<|assistant|>",
        "suffix-gcg": "<|user|> {} wolf queen<|assistant|>",
        "suffix-random": "<|user|> {} rat rat<|assistant|>",
    }
    expected = [
        (attack, name, [text.format(p.text) for p in prompt_set(name, subject.profile)])
        for attack, text in written.items()
        for name in ("twin", "harmful")
    ]
    assert graded == [texts for _, _, texts in expected]
    sizes = table.groupby(["attack", "prompts"], sort=False).size()
    assert list(sizes.index) == [(attack, name) for attack, name, _ in expected] and set(sizes) == {
        n
    }
    for attack, name, texts in expected:
        rows = table[(table["attack"] == attack) & (table["prompts"] == name)]
        assert rows["outcome"].tolist() == [outcome_of(text) for text in texts]
        assert rows["prompt_id"].tolist() == [f"{name}-{i:04d}" for i in range(n)]
        assert rows["cluster"].tolist() == [p.cluster for p in prompt_set(name, subject.profile)]
        twins = [written[attack].format(p.text) for p in prompt_set("twin", subject.profile)]
        assert rows["understood"].tolist() == [
            outcome_of(t) == "complied" or finishes(t) for t in twins
        ]
    harmful = table[table["prompts"] == "harmful"]
    assert (harmful["understood"] != harmful["exact"]).any(), "twins and prompts are not told apart"
    assert (
        set(table["encoding"]) == {"plain"}
        and table["eps"].isna().all()
        and set(table["sites"]) == {""}
    )


def test_each_answered_request_ends_as_a_reply_of_the_model_ends(lm, subject):
    shots = many_shots(load_profile("smoke"), 5)
    (row,) = token_rows(lm, prompt_set("harmful", subject.profile, 1), Wording(shots=shots))
    at = 0
    for said, replied in shots:
        turn = lm.tokenizer(
            f"<|user|> {said}<|assistant|> {replied}<|end|>", add_special_tokens=False
        )["input_ids"]
        assert (
            turn[-1] == lm.tokenizer.eos_token_id and list(row.prompt[at : at + len(turn)]) == turn
        )
        at += len(turn)
    assert lm.tokenizer.eos_token_id not in row.prompt[at:]


def test_shots_are_answered_harmful_requests_of_the_training_pairs():
    shots = many_shots(load_profile("smoke"), 8)
    prompts = grammar.draw_set("shots", "train", "harmful", 8)
    assert (
        shots == [(p.text, p.answer) for p in prompts]
        and many_shots(load_profile("smoke"), 0) == []
    )
    assert all(p.harmful and p.answer.startswith(grammar.AFFIRMATION) for p in prompts)
    assert many_shots(load_profile("smoke"), 3) == shots[:3] and len(set(shots)) == 8


def test_suffixes_are_sought_on_other_requests_than_they_are_tried_on(lm, subject, monkeypatch):
    seen = []

    def sought(*args):
        seen.append(args)
        return suffix_of(f"by gradient: {args[3].by_gradient}")

    monkeypatch.setattr(module, "gcg", sought)
    found = find_suffixes(lm, subject.profile, 3)
    texts = ["by gradient: True", "by gradient: False"]
    assert [suffix.text for suffix in found.values()] == texts and list(found) == FOUND
    (*first, settings, seed, _, file), (*second, blind, other_seed, _, _) = seen
    # with one and the same everything
    assert first == second and seed == other_seed == 3
    assert replace(blind, by_gradient=True) == settings
    _, asked, answers = first
    assert file is None  # a run says where
    prompts = grammar.draw_set(
        "suffix", "tune", "harmful", subject.profile.evaluation.suffix.prompts
    )
    assert (asked, answers) == ([p.text for p in prompts], [p.answer for p in prompts])
    tried = prompt_set("harmful", subject.profile)
    pairs = [{(p.verb, p.target) for p in some} for some in (prompts, tried)]
    assert not pairs[0] & pairs[1] and all(p.harmful for p in prompts)
    own = subject.profile.evaluation.suffix
    assert settings == suffix_settings(subject.profile)
    assert [
        settings.n_tokens,
        settings.steps,
        settings.candidates,
        settings.topk,
        settings.batch,
    ] == [*(own.tokens, own.steps, own.candidates, own.topk, own.batch)]
    # as `token_rows` puts it, and as a reply is graded
    assert settings.separator == " " and settings.whole_reply


def test_suffixes_of_a_run_are_kept_with_as_many_queries_each(run, lm):
    """The whole suite, nothing replaced."""
    table = run.evaluate("ssft", 0, "jailbreaks")
    assert list(table["attack"].unique()) == [*TYPED, *FOUND] and set(table["method"]) == {"ssft"}
    kept, own = run.result("suffixes-ssft-seed0"), run.profile.evaluation.suffix
    assert list(kept) == FOUND
    for suffix in kept.values():
        assert len(suffix["token_ids"]) == own.tokens and len(suffix["losses"]) == own.steps
        assert suffix["loss"] == pytest.approx(min(suffix["losses"]))
    # A first loss, and in each step candidates and one gradient pass, or one candidate more.
    expected = own.prompts * (1 + own.steps * (own.candidates + 1))
    assert [suffix["queries"] for suffix in kept.values()] == [expected, expected]
    assert kept["suffix-gcg"]["text"] != kept["suffix-random"]["text"]
    for attack, suffix in kept.items():  # what is kept is what was tried
        wording = Wording(suffix=suffix["text"])
        rows = token_rows(lm, prompt_set("harmful", run.profile), wording)
        ids = suffix["token_ids"]
        assert all(
            any(list(r.prompt[i : i + len(ids)]) == ids for i in range(len(r.prompt))) for r in rows
        )
        outcomes, _ = grade_rows(lm.network(), rows)
        tried = table[(table["attack"] == attack) & (table["prompts"] == "harmful")]
        assert tried["outcome"].tolist() == outcomes


def test_a_run_goes_on_with_a_search_that_was_stopped(run, monkeypatch):
    """In its second search: the first is not made again. One of them belongs to another version of
    latlib, and is."""
    spec, stop, taken = run.spec("lat"), run.folder / "STOP", []
    folder = run.layout.unfinished(spec, "jailbreaks")

    def on_step(bar, step, total, detail):
        taken.append(detail.split(",")[0])
        if taken == [FOUND[0]] * 2 + [FOUND[1]]:
            stop.touch()

    monkeypatch.setattr(Progress, "on_step", on_step)
    with pytest.raises(Stopped, match="asked to stop after suffix-random"):
        run.evaluate("lat", 0, "jailbreaks")
    stop.unlink()
    files = [folder / f"{name}.json" for name in FOUND]
    assert all(file.is_file() for file in files)
    write_json({**read_json(files[0]), "search": "of another version"}, files[0])
    with pytest.warns(UserWarning, match="suffix-gcg.json is of another search.*begun anew"):
        table = run.evaluate("lat", 0, "jailbreaks")
    again = [FOUND[0], FOUND[0], FOUND[1], *TYPED, *FOUND]
    assert taken == [FOUND[0], FOUND[0], FOUND[1], *again] and not folder.exists()
    run.layout.table_file(spec, "jailbreaks").unlink()
    pd.testing.assert_frame_equal(run.evaluate("lat", 0, "jailbreaks"), table)  # never stopped


def test_what_is_returned_is_what_was_found(lm, subject, graded):
    _, suffixes = jailbreaks(lm, subject)
    texts = {name: suffix.text for name, suffix in suffixes.items()}
    assert texts == {"suffix-gcg": "wolf queen", "suffix-random": "rat rat"}


def test_no_steps_no_suffixes(lm, subject, graded, monkeypatch):
    monkeypatch.setattr(module, "gcg", lambda *_: pytest.fail("nothing is to be sought"))
    steps = []
    table, suffixes = jailbreaks(lm, without_suffixes(subject), lambda *step: steps.append(step))
    assert suffixes == {}
    assert list(table["attack"].unique()) == TYPED and len(graded) == 4
    assert steps == [(1, 2, "many-shot"), (2, 2, "system")]


def test_found_again_from_the_same_seed(lm, subject):
    few = subject.profile.evaluation.suffix.model_copy(update={"steps": 1, "prompts": 1})
    subject = with_evaluation(subject, suffix=few)
    one, again, other = (find_suffixes(lm, subject.profile, seed) for seed in (0, 0, 1))
    assert one == again and one != other
    assert all(p.grad is None for p in lm.model.parameters()) and torch.is_grad_enabled()


def test_a_jailbreak_that_the_template_refuses_is_left_out_and_said(lm, subject, monkeypatch):
    """Gemma 2's template has no system role."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    ) + tokenizer.chat_template
    with pytest.warns(UserWarning, match="jailbreak 'system' is left out"):
        table, _ = jailbreaks(replace(lm, tokenizer=tokenizer), without_suffixes(subject))
    assert set(table["attack"]) == {"many-shot"}
