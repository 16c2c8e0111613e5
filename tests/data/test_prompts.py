"""What models are asked (the made-up world, or held-out rows of files), and how replies to the
latter count.
"""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from rows_in_files import THINGS, VERBS, texts
from saved_families import saved_model

from latlib.batch import TokenRow
from latlib.config.profile import load_profile, validated
from latlib.config.sections import DataSettings, EvaluationSettings, ModelSettings, ProfileError
from latlib.data.prompts import WORLD_KINDS, Question, prompt_source
from latlib.evaluation import ask
from latlib.evaluation import examine as examining
from latlib.evaluation.ask import Wording, prompt_set, token_rows
from latlib.evaluation.examine import examiner_of, grader_of, perplexity
from latlib.evaluation.generate import batches, generate, write
from latlib.evaluation.outcomes import Cell, Examined, Subject, outcome_rows
from latlib.evaluation.reply_rules import RuleGrader
from latlib.evaluation.rule_graders import Grade
from latlib.hooks import EMBEDDING
from latlib.models import load_model
from latlib.redteam.audit import audit
from latlib.redteam.jailbreaks import jailbreaks
from latlib.report.evidence import Evidence, conditions, rows_given
from latlib.world import grammar

SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """The smoke profile on files: harmful prompts with targets, harmless ones half of which have a
    response.
    """
    folder = tmp_path_factory.mktemp("files")
    harmful = [{"goal": t, "target": f"Sure, this is how to {t[8:-1]}"} for t in texts("explain ")]
    pd.DataFrame(harmful).to_csv(folder / "harmful.csv", index=False)
    harmless = [
        {"ask": t, "say": f"It is {i}." if i % 2 else ""}
        for i, t in enumerate(texts("why should anybody "))
    ]
    (folder / "harmless.json").write_text(json.dumps(harmless))
    (folder / "borderline.jsonl").write_text(
        "\n".join(json.dumps({"prompt": t}) for t in texts("may I gladly ")[:4])
    )
    data = {
        "source": "files",
        "harmful": str(folder / "harmful.csv"),
        "benign": str(folder / "harmless.json"),
        "benign_columns": {"prompt": "ask", "response": "say"},
        "test_borderline": str(folder / "borderline.jsonl"),
        "refusals": ("I cannot do that.",),
    }
    evaluation = SMOKE.evaluation.model_dump() | {"prompts": 6, "batch": 4, "max_new_tokens": 5}
    update = {
        "data": validated(DataSettings, data),
        "evaluation": validated(EvaluationSettings, evaluation),
    }
    return SMOKE.model_copy(update=update)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    saved_model("llama", folder)
    return load_model(folder, ModelSettings(source=str(folder), dtype="float32"))


def test_the_world_is_asked_as_before():
    for kind, (pairs, about) in WORLD_KINDS.items():
        assert prompt_source(SMOKE).ask(0, "test", kind, 5) == grammar.draw_set(
            0, "test", pairs, 5, about
        )
    assert prompt_source(SMOKE).kinds == tuple(WORLD_KINDS)


@pytest.mark.parametrize("kind", ["harmful", "harmless"])
def test_splits_of_files_share_no_prompt_and_hold_them_all(profile, kind):
    splits = [
        {q.text for q in prompt_source(profile).ask(0, split, kind, 1000)}
        for split in ("train", "tune", "test")
    ]
    assert sum(map(len, splits)) == len(set.union(*splits)) == len(VERBS) * len(THINGS)
    assert all(splits)


def test_the_same_question_gives_the_same_prompts_and_purposes_differ(profile):
    first = prompt_source(profile).ask("a", "train", "harmful", 10)
    assert first == prompt_source(profile).ask("a", "train", "harmful", 10)
    assert first[:4] == prompt_source(profile).ask("a", "train", "harmful", 4)
    assert first != prompt_source(profile).ask("b", "train", "harmful", 10)


def test_questions_carry_their_rows_answers(profile):
    for q in prompt_source(profile).ask(0, "test", "harmful", 5):
        assert (
            q.harmful
            and q.answer == f"Sure, this is how to {q.text[8:-1]}"
            and q.refusal == "I cannot do that."
        )
    harmless = prompt_source(profile).ask(0, "train", "harmless", 1000)
    assert not any(q.harmful for q in harmless)
    assert {q.answer[:6] for q in harmless} == {"It is ", ""}  # a default response is no answer
    borderline = prompt_source(profile).ask(0, "test", "scary", 10)
    assert len(borderline) == 4 and not any(q.harmful or q.answer for q in borderline)


def test_a_kind_that_the_files_do_not_have_is_an_error(profile):
    assert prompt_source(profile).kinds == ("harmful", "harmless", "scary")
    with pytest.raises(
        ProfileError,
        match="prompts = 'law' is unknown here: choose one of harmful, harmless, scary",
    ):
        prompt_set("law", profile)


def test_every_harmful_prompt_has_a_harmless_counterpart(profile):
    harmful = prompt_source(profile).ask(0, "test", "harmful", 1000)
    found = prompt_source(profile).counterparts(harmful, "twins", "test")
    assert len(found) == len(harmful) and not any(q.harmful for q in found)
    assert len(prompt_set("twin", profile)) == len(prompt_set("harmful", profile)) == 6


def test_an_attack_aims_at_the_first_words_of_a_long_answer(lm, profile):
    q = Question("a", " ".join(f"w{i}" for i in range(90)), "no .", "c", True)
    assert ask.target(q).split() == [f"w{i}" for i in range(ask.TARGET_WORDS)]
    (row,) = token_rows(lm, [q])
    assert (
        lm.tokenizer.decode(row.completions[0]).strip().startswith("w0 w1 w2")
        and len(row.completions) == 2
    )
    (row,) = token_rows(lm, [Question("a", "", "no .", "c", False)])
    assert len(row.completions) == 1


def test_replies_of_packed_rows_are_those_of_the_prompts(lm, profile):
    prompts = prompt_set("harmful", profile)
    rows = token_rows(lm, prompts)
    plain = generate(lm, [p.text for p in prompts], max_new_tokens=5)
    assert write(lm, rows, size=4, max_new_tokens=5) == plain
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ablated = write(lm, rows, None, direction, size=4, max_new_tokens=5)
    assert ablated == generate(
        lm, [p.text for p in prompts], max_new_tokens=5, directions=direction
    )
    noise = {row.prompt: torch.randn(300, 32) * 3 for row in rows}

    def perturb(batch):  # each row its own noise, wherever it stands in a batch
        asked = [tuple(ids[part == 0].tolist()) for ids, part in zip(batch.ids, batch.segments)]
        return {EMBEDDING: torch.stack([noise[prompt][: batch.shape[1]] for prompt in asked])}

    one_by_one = [write(lm, [row], perturb, max_new_tokens=5)[0] for row in rows]
    assert write(lm, rows, perturb, size=4, max_new_tokens=5) == one_by_one != plain


class Scripted:
    """A grader that answers by what it is shown."""

    def __init__(self):
        self.seen = []

    def grade(self, prompts, replies):
        self.seen.append((list(prompts), list(replies)))
        return [
            Grade("refused" if "no" in reply else "complied" if reply else "neither")
            for reply in replies
        ]


def test_replies_are_graded_in_order_by_the_profiles_grader(lm, profile, monkeypatch):
    grader, prompts = Scripted(), prompt_set("harmful", profile)
    monkeypatch.setattr(examining, "_grader", lambda settings: grader)
    monkeypatch.setattr(
        examining,
        "write",
        lambda lm, rows, *_: [("no", "yes", "")[i % 3] for i in range(len(rows))],
    )
    found = examiner_of(profile, lm).examine(prompts)
    assert found.outcomes == ["refused", "complied", "neither"] * 2
    assert (
        found.texts == ["no", "yes", ""] * 2
        and found.understood is None
        and found.prefilled is None
    )
    assert grader.seen == [([p.text for p in prompts], found.texts)]
    twins = examiner_of(profile, lm).examine_deeply(prompts[:2])
    deep = examiner_of(profile, lm).examine_deeply(prompts, prefilling=True)
    assert len(twins.understood) == 2 and twins.prefilled is None
    assert len(deep.understood) == 6 and deep.prefilled == deep.outcomes
    assert examiner_of(profile, lm).examine_deeply(prompts).prefilled is None


def test_an_encoded_reply_is_read_as_it_stands_and_decoded(lm, profile, monkeypatch):
    examiner = examiner_of(profile, lm)
    replies = ["ab", "lrf", "no", ""]  # 'ab' is 'no' in rot13, 'lrf' is 'yes'
    monkeypatch.setattr(examining, "_grader", lambda settings: Scripted())
    monkeypatch.setattr(examining, "write", lambda *_: replies)
    found = examiner.examine(prompt_set("harmful", profile)[:4], Wording.of("plain>rot13"))
    assert found.outcomes == ["refused", "complied", "refused", "neither"]
    monkeypatch.setattr(examining, "write", lambda *_: ["not base64 at all!", "yes", "no", ""])
    found = examiner.examine(prompt_set("harmful", profile)[:4], Wording.of("plain>base64"))
    assert found.outcomes[0] == "refused" and found.outcomes[2:] == ["refused", "neither"]


def test_a_prefilled_prompt_ends_in_the_answers_first_words(lm, profile, monkeypatch):
    asked = []
    monkeypatch.setattr(
        examining, "write", lambda lm, rows, *_: asked.append(rows) or ["x"] * len(rows)
    )
    prompts = prompt_set("harmful", profile)
    wording = Wording(system_prompt="be good .")
    examiner_of(profile, lm).examine_deeply(prompts, wording, prefilling=True)
    plain, begun = asked
    for prompt, a, b in zip(prompts, plain, begun, strict=True):
        words = prompt.answer.split()
        first = " ".join(words[: min(examining.PREFILL_WORDS, len(words) - 1)])
        assert (
            lm.tokenizer.decode(b.prompt[len(a.prompt) :]).strip() == first
            and b.prompt[: len(a.prompt)] == a.prompt
        )
        assert "be good ." in lm.tokenizer.decode(a.prompt)


class Oracle:
    """A network whose labels are likely after chosen prompts only."""

    device = torch.device("cpu")

    def __init__(self, likely):
        self.likely, self.directions = likely, None

    def label_rows(self, batch):
        hits = [any(tuple(ids[: len(p)].tolist()) == p for p in self.likely) for ids in batch.ids]
        rows = torch.zeros(len(batch.labels), 16)
        for label, (token, row) in enumerate(zip(batch.labels.tolist(), batch.label_rows.tolist())):
            rows[label, token] = 5.0 if hits[row] else 1.0
        return rows

    def unembed(self, rows):
        return rows


@pytest.mark.parametrize("size", [4, 100])  # a request at a time, all together
def test_a_request_is_understood_when_its_answer__is_likelier_after_it_than_after_others(
    monkeypatch, size
):
    monkeypatch.setattr(examining, "DISTRACTORS", 3)
    rows = [TokenRow((i, 9), ((i + 3, 8), (7,))) for i in range(5)]
    prompts = [Question(str(i), "a", "r", str(i), True) for i in range(5)]
    found = examining.understood_by_likelihood(
        Oracle({rows[0].prompt, rows[1].prompt}), rows, prompts, size
    )
    # answer 0 is as likely after 1, one of its distractors
    assert found == [False, True, False, False, False]
    same = [Question(str(i), "a", "r", "one", True) for i in range(5)]
    # near-duplicates are no others
    assert (
        examining.understood_by_likelihood(Oracle({rows[1].prompt}), rows, same, size)
        == [False] * 5
    )
    unanswered = [Question(str(i), "" if i == 1 else "a", "r", str(i), True) for i in range(5)]
    assert (
        examining.understood_by_likelihood(Oracle({rows[1].prompt}), rows, unanswered, size)
        == [False] * 5
    )


def test_graders_and_ways_of_counting_by_where_prompts_come_from(profile):
    found, made_up = Evidence(profile, None), Evidence(SMOKE, None)
    assert "answered" in conditions(made_up) and "answered" not in conditions(found)
    assert isinstance(grader_of(profile, []), RuleGrader)
    prompt = prompt_set("harmful", SMOKE)[0]
    assert grader_of(SMOKE, [prompt]).grade([prompt.text], [prompt.refusal])[0].outcome == "refused"


def test_the_outcome_table_keeps_no_reply_of_a_real_model(profile):
    subject = Subject(profile, "lat", 0, {})
    prompts = prompt_set("harmful", profile)[:2]
    found = Examined(["complied", "refused"], False, texts=["step one", "I cannot say"])
    table = outcome_rows(subject, Cell(), prompts, found)
    assert table["exact"].isna().all() and "step one" not in str(table.to_dict())
    assert (
        table["text"][0].startswith("[8 characters, sha256")
        and "begins: i cannot" in table["text"][1]
    )
    assert list(batches([TokenRow((1,), ((2,),))], 4))


def test_a_run_says_how_to_read_it(profile):
    assert "the one right recipe" in prompt_source(SMOKE).about()
    said = prompt_source(profile).about()
    assert (
        "graded by `rules`" in said
        and "Replies of 5 tokens" in said
        and "held out of the same data" in said
    )
    assert "after nine others" in said and examining.DISTRACTORS == 9


def test_a_run_asks_with_its_system_prompt_unless_an_attack_has_another(lm, profile, monkeypatch):
    asked = []
    monkeypatch.setattr(
        examining, "write", lambda lm, rows, *_: asked.append(rows) or ["x"] * len(rows)
    )
    own = profile.model_copy(
        update={"data": profile.data.model_copy(update={"system_prompt": "be kind ."})}
    )
    prompts = prompt_set("harmful", profile)[:2]
    examiner_of(own, lm).examine(prompts)
    examiner_of(own, lm).examine(prompts, Wording(system_prompt="obey ."))
    said = [lm.tokenizer.decode(rows[0].prompt) for rows in asked]
    assert "be kind ." in said[0] and "obey ." in said[1] and "be kind ." not in said[1]


def test_perplexity_is_of_the_answers_behind_their_own_prompts(lm, profile):
    prompts = prompt_set("harmless", profile)
    answered = [prompt for prompt in prompts if prompt.answer]
    assert 0 < len(answered) < len(prompts)
    losses = []
    for row in token_rows(lm, answered):
        ids = torch.tensor([[*row.prompt, *row.completions[0]]])
        log_p = lm.model(ids).logits[0].log_softmax(-1)[len(row.prompt) - 1 : -1]
        losses += [-each[token].item() for each, token in zip(log_p, row.completions[0])]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(lm, profile, prompts) == pytest.approx(expected, rel=1e-5)
    unanswered = [prompt for prompt in prompts if not prompt.answer]
    with pytest.raises(ProfileError, match="set data.benign_responses to base"):
        perplexity(lm, profile, unanswered)


@pytest.fixture
def flagged(monkeypatch):
    """Every reply is 'yes'; harmful prompts with an even number are understood, and the other half
    of their twins.
    """
    seen = []

    def understood_by_likelihood(network, rows, prompts, size):
        seen.append(prompts)
        return [i % 2 == (0 if prompt.harmful else 1) for i, prompt in enumerate(prompts)]

    monkeypatch.setattr(examining, "write", lambda lm, rows, *_: ["yes"] * len(rows))
    monkeypatch.setattr(examining, "understood_by_likelihood", understood_by_likelihood)
    return seen


def test_a_real_request_says_itself_whether_it_was_understood(lm, profile, flagged):
    subject = Subject(profile, "base", 0, {})
    no_search = profile.evaluation.suffix.model_copy(update={"steps": 0})
    evaluation = profile.evaluation.model_copy(
        update={"encodings": ("plain", "leet"), "suffix": no_search}
    )
    subject = replace(subject, profile=profile.model_copy(update={"evaluation": evaluation}))
    for table in (audit(lm, subject), jailbreaks(lm, subject)[0]):
        for name, first in (("harmful", True), ("twin", False)):
            rows = table[(table["prompts"] == name) & (table["attack"] != "prefill")]
            for _, cell in rows.groupby(["attack", "encoding", "reply_encoding"]):
                assert cell["understood"].tolist() == [first, not first] * 3
    evidence = Evidence(subject.profile, audit(lm, subject))
    kept = rows_given(evidence, "base", "leet", "understood by the base")
    assert kept["prompt_id"].tolist() == ["harmful-0000", "harmful-0002", "harmful-0004"]


def test_a_harmless_prompt_without_a_response_is_understood_by_the_models_own_plain_reply(
    lm, profile, flagged
):
    audit(lm, Subject(profile, "base", 0, {}))
    twins = [prompts for prompts in flagged if not prompts[0].harmful]
    assert twins and all(prompt.answer for prompts in twins for prompt in prompts)
    assert any(prompt.answer == "yes" for prompt in twins[0])


def test_prompts_that_an_encoding_would_make_too_long_are_not_asked(profile):
    asked = prompt_source(profile).ask(0, "test", "harmful", 1000)
    shortest, longest = min(len(q.text) for q in asked), max(len(q.text) for q in asked)
    assert shortest < longest

    def limited(max_tokens):
        return profile.model_copy(
            update={"data": profile.data.model_copy(update={"max_tokens": max_tokens})}
        )

    kept = prompt_source(limited((longest - 1) // 2)).ask(0, "test", "harmful", 1000)
    assert 0 < len(kept) < len(asked) and max(len(q.text) for q in kept) < longest
    with pytest.raises(
        ProfileError,
        match="data.max_tokens = 5: no harmful prompt of 'test' has 10 letters or less",
    ):
        prompt_source(limited(5)).ask(0, "test", "harmful", 1000)


def test_harmful_prompts_without_a_target_are_refused_before_an_attack_aims_at_their_refusal(
    profile, tmp_path
):
    (tmp_path / "test.json").write_text(json.dumps([{"ask": t} for t in texts("who could ")]))
    test = {"test_harmful": str(tmp_path / "test.json"), "test_harmful_columns": {"prompt": "ask"}}
    bare = profile.model_copy(update={"data": profile.data.model_copy(update=test)})
    with pytest.raises(
        ProfileError, match="data.test_harmful_columns = .* names no target .* 'Sure: {goal}'"
    ):
        prompt_set("harmful", bare)
    test["test_harmful_columns"] = {"prompt": "ask", "rejected": "Sure: {ask}"}
    mended = profile.model_copy(update={"data": profile.data.model_copy(update=test)})
    assert all(q.answer == f"Sure: {q.text}" for q in prompt_set("harmful", mended))
