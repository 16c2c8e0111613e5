"""data.benign_responses: base. The frozen base answers benign prompts once, for all methods and
seeds, however often it is stopped; and what it says is what is trained on."""

import json

import pytest
import torch
import yaml
from rows_in_files import texts
from saved_families import saved_model
from tiny_models import world_tokenizer
from transformers import AutoModelForCausalLM

from latlib.config.profile import load_profile
from latlib.config.sections import ProfileError
from latlib.data.prompts import prompt_source
from latlib.data.splits import benign_rows, file_prompts
from latlib.evaluation.generate import Reply, generate
from latlib.experiment import build, launch, responses, sweep
from latlib.experiment.run import Run
from latlib.experiment.sweep_tasks import files_of
from latlib.io import manifest
from latlib.io.progress import Stopped, unseen
from latlib.planning import check
from latlib.report.data_summary import data_report
from latlib.runner.pipeline import empty_run_folder

TOKENS = 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a small model that talks, harmful.csv, and benign.csv without responses."""
    folder = tmp_path_factory.mktemp("sources")
    saved_model("llama", folder / "model")
    talking = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():  # else it repeats the turn's mark, which is no text
        talking.lm_head.weight[world_tokenizer().all_special_ids] = 0
    talking.save_pretrained(folder / "model")
    lines = [f"{text},Sure" for text in texts("explain ")[:20]]
    (folder / "harmful.csv").write_text("\n".join(["goal,target", *lines, ""]))
    (folder / "benign.csv").write_text("\n".join(["instruction", *texts("why ")[:20], ""]))
    return folder


@pytest.fixture
def profile(sources, tmp_path):
    """A function: the profile with changes of its sections."""

    def changed(**sections):
        tree = {
            "name": "small",
            "description": "a test",
            "seeds": [0, 1],
            "model": {"source": str(sources / "model"), "dtype": "float32", "device": "cpu"},
            "data": {
                "source": "files",
                "harmful": str(sources / "harmful.csv"),
                "benign": str(sources / "benign.csv"),
                "benign_responses": "base",
                "response_tokens": TOKENS,
                "max_tokens": 60,
            },
            "train": {
                "steps": 2,
                "batch": 2,
                "benign_batch": 2,
                "micro_batch": 2,
                "attack": {"sites": [1], "steps": 1},
            },
            "methods": {"ssft": {"attack.steps": 0}, "lat": {}},
            "evaluation": {"batch": 6},
            "workers": 1,
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump(tree))
        return load_profile(file)

    return changed


@pytest.fixture
def asked(monkeypatch):
    """The prompts that `replies` is given, a list a call."""
    plain, calls = responses.replies, []

    def counted(lm, rows, **options):
        calls.append([row.prompt for row in rows])
        return plain(lm, rows, **options)

    monkeypatch.setattr(responses, "replies", counted)
    return calls


def kept(run):
    return json.loads((run.folder / "data" / "responses.json").read_text())


def test_every_method_and_seed_is_trained_on_what_the_base_replied_once(profile, asked, tmp_path):
    run = Run(profile(), tmp_path / "run")
    run.ensure([(method, seed) for method in ("ssft", "lat") for seed in (0, 1)])
    again = Run(profile(), tmp_path / "run")
    prompts = file_prompts(again.profile.data)["benign"]
    assert sorted(map(len, asked)) == [2, 6, 6, 6]
    assert sum(map(len, asked)) == len(prompts) == len(kept(again))
    lm = again.model("base")
    alone = {p.row_id: generate(lm, [p.prompt], max_new_tokens=TOKENS)[0] for p in prompts}
    assert {name: text for name, (text, _) in kept(again).items()} == alone
    assert len(set(alone.values())) > 3
    rows = {}
    for split in ("train", "tune", "test"):
        rows |= {row.row_id: row for row in benign_rows(again.profile.data, 1, split)}
    assert {name: row.completions for name, row in rows.items()} == {
        name: (text,) for name, text in alone.items()
    }
    trained = build.make_trainer(again.layout, again.spec("lat", 1)).benign
    decode = lm.tokenizer.decode
    said = {decode(row.completions[0], skip_special_tokens=True).strip() for row in trained}
    assert said <= set(alone.values()) and len(said) > 3
    held_out = prompt_source(again.profile).ask(0, "test", "harmless", 3)
    assert all(question.answer in alone.values() for question in held_out)
    assert "base model's own replies" in prompt_source(again.profile).about()


def test_they_are_checked_and_named_like_any_result(profile, tmp_path, capsys):
    run = Run(profile(), tmp_path / "run")
    run.ensure([("lat", 0)])
    file = run.folder / "data" / "responses.json"
    digest = manifest.digest(file)
    assert manifest.listed(run.folder)["data/responses.json"] == {digest}
    assert digest.startswith(run.card("lat")["inputs"]["responses of the base"])
    good = file.read_text()
    file.write_text(good.replace('"', "'", 1))
    Run(profile(), tmp_path / "run").ensure([("lat", 0)])
    assert file.read_text() == good
    assert "responses.json does not match its checksum" in capsys.readouterr().err
    file.write_text(good.replace("true", "false") + "\n")
    manifest.record(run.folder, file, file)  # made on another machine, say
    with pytest.raises(ProfileError, match="trained on the responses of the base .* --fresh"):
        Run(profile(), tmp_path / "run").ensure([("lat", 0)])


class KilledError(Exception):
    pass


@pytest.mark.parametrize("how", ["killed", "asked to stop"])
def test_who_is_stopped_goes_on_and_ends_the_same(how, profile, asked, tmp_path, monkeypatch):
    whole = Run(profile(), tmp_path / "whole")
    whole.ensure([])
    in_one_go = list(asked)
    run = Run(profile(), tmp_path / "run")

    def on_step(step, total, detail):
        if step >= 12 and how == "killed":
            raise KilledError
        if step >= 12:
            (run.folder / "STOP").touch()

    asked.clear()
    with pytest.raises((KilledError, Stopped)):
        responses.make_responses(run.layout, on_step)
    assert asked == in_one_go[:2] and not (run.folder / "data" / "responses.json").exists()
    (run.folder / "STOP").unlink(missing_ok=True)
    Run(profile(), tmp_path / "run").ensure([])
    assert asked == in_one_go
    name = "data/responses.json"
    assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert [file.name for file in (run.folder / "data").iterdir()] == ["responses.json"]
    responses.make_responses(run.layout, unseen)  # another command was faster
    assert asked == in_one_go


def test_a_fresh_start_leaves_nothing_of_them(profile, tmp_path):
    run = Run(profile(), tmp_path / "run")
    run.ensure([])
    (run.folder / "data" / responses.PARTIAL).write_text("{}")
    empty_run_folder(run.folder)
    assert not (run.folder / "data").exists() and not (run.folder / "set-aside").exists()


def test_a_cut_reply_makes_a_row_without_an_end_and_an_empty_one_none(
    profile, tmp_path, monkeypatch
):
    written = [Reply("It is.", True), Reply("It is so, for", False), Reply("", True)]
    monkeypatch.setattr(
        responses, "replies", lambda lm, rows, **_: [written[i % 3] for i in range(len(rows))]
    )
    run = Run(profile(), tmp_path / "run")
    run.ensure([])
    rows = []
    for split in ("train", "tune", "test"):
        rows += benign_rows(run.profile.data, 0, split)
    assert {(row.completions, row.ended) for row in rows} == {
        (("It is.",), True),
        (("It is so, for",), False),
    }
    assert len(rows) == sum(text != "" for text, _ in kept(run).values()) == 14
    trainer = build.make_trainer(run.layout, run.spec("ssft", 0))
    end = run.model("base").tokenizer.eos_token_id
    assert {row.completions[0][-1] == end for row in trainer.benign} == {True, False}


def test_a_reply_never_makes_a_row_too_long(profile, tmp_path):
    run = Run(profile(data={"response_tokens": 100}), tmp_path / "run")
    run.ensure([])
    trainer = build.make_trainer(run.layout, run.spec("ssft", 0))  # data.too_long: error
    assert max(row.longest for row in trainer.benign) == run.profile.data.max_tokens


@pytest.mark.parametrize("too_long", ["error", "drop"])
def test_a_prompt_without_room_for_a_reply(too_long, profile, sources, tmp_path):
    prompts = [*texts("why ")[:20], "why " + "really rather " * 60]
    (tmp_path / "benign.csv").write_text("\n".join(["instruction", *prompts, ""]))
    data = {"benign": str(tmp_path / "benign.csv"), "too_long": too_long}
    run = Run(profile(data=data), tmp_path / "run")
    assert file_prompts(run.profile.data)["benign"][-1].split == "train"
    if too_long == "error":
        with pytest.raises(ProfileError, match=r"benign-20 .* no room .*data.max_tokens = 60"):
            run.ensure([])
        return
    run.ensure([])
    assert len(kept(run)) == 20 and "benign-20" not in kept(run)
    assert "benign-20" not in {row.row_id for row in benign_rows(run.profile.data, 0)}


def test_test_prompts_without_a_response_are_answered_too(profile, tmp_path):
    questions = texts("when should anybody ")[:4]
    lines = [f"{question},Soon." for question in questions[:2]] + [f"{q}," for q in questions[2:]]
    (tmp_path / "test.csv").write_text("\n".join(["ask,say", *lines, ""]))
    columns = {"prompt": "ask", "response": "say"}
    data = {"test_benign": str(tmp_path / "test.csv"), "test_benign_columns": columns}
    run = Run(profile(data=data), tmp_path / "run")
    run.ensure([])
    rows = {row.row_id: row.completions for row in benign_rows(run.profile.data, 0, "test")}
    assert rows["benign-test-0"] == rows["benign-test-1"] == ("Soon.",)
    assert rows["benign-test-2"] == (kept(run)["benign-test-2"][0],) and "benign-test-3" in rows
    assert set(kept(run)) >= {"benign-test-2", "benign-test-3"}
    assert not set(kept(run)) & {"benign-test-0", "benign-test-1"}


def test_before_the_base_was_asked_that_is_said(profile):
    with pytest.raises(ProfileError, match="'base': the base has answered none of .* latlib.Run"):
        benign_rows(profile().data, 0)


def test_the_summary_of_the_data_has_their_lengths(profile, tmp_path):
    run = Run(profile(), tmp_path / "run")
    run.ensure([])
    table = data_report(run.profile, world_tokenizer()).set_index(["kind", "split"])
    line = table.loc[("benign", "train")]
    assert line["completion_longest"] >= TOKENS and line["default_completions"] == 0


def test_a_sweep_hands_them_to_its_machines(profile, tmp_path):
    run = Run(profile(), tmp_path / "run")
    base = run.spec("base", 0)
    assert files_of(run.layout, base)[-1] == run.folder / "data" / "responses.json"
    plain = Run(profile(data={"benign_responses": ["Yes."]}), tmp_path / "plain")
    assert files_of(plain.layout, base) == [plain.layout.norms_file(0)]
    assert not plain.layout.lacks_responses()


def test_a_sweep_asks_once_for_all_of_its_machines(profile, tmp_path, monkeypatch):
    def none_here(*_):
        raise KilledError

    run = Run(profile(sweep={"grid": {"attack.eps": [1.0, 2.0]}}), tmp_path / "run")
    monkeypatch.setattr(sweep, "_ray", lambda: None)
    monkeypatch.setattr(sweep, "_cluster", none_here)
    with pytest.raises(KilledError):
        sweep.sweep(run, say=lambda _: None)
    assert len(kept(run)) == 20


def test_a_training_that_is_started_by_hand_asks_first(profile, tmp_path):
    run = Run(profile(), tmp_path / "run")
    launch._train(run.layout, run.spec("ssft", 0), unseen)
    assert len(kept(run)) == 20 and run.layout.has(run.spec("ssft", 0))


def test_the_check_says_what_will_be_asked(profile, tmp_path):
    lines = {line.subject: line for line in check.check(profile(), tmp_path / "run")}
    said = lines["responses"]
    assert said.state == "note" and "answers 20 benign prompts" in said.text
    assert f"data.response_tokens = {TOKENS} tokens" in said.text
    assert not [line for line in lines.values() if line.state == "missing"]
    longer = profile(data={"response_tokens": 40})
    more = {line.subject: line for line in check.check(longer, tmp_path / "run")}
    assert lines["rows"].text != more["rows"].text
    elsewhere = profile(data={"benign": "owner/prompts"})
    lines = {line.subject: line for line in check.check(elsewhere, tmp_path / "run")}
    assert "answers all benign prompts" in lines["responses"].text
    plain = profile(data={"benign_responses": ["Yes."]})
    lines = {line.subject: line for line in check.check(plain, tmp_path / "run")}
    assert "responses" not in lines


WORLD = {"model": {"source": "world"}}
REFUSED = {
    "data.source = 'world'": {"data": {"source": "world"}},
    "model.source = 'world'": WORLD | {"lora": {"targets": ["q_proj"]}},
    "data.benign_columns.response = 'output'": {
        "data": {"benign_columns": {"prompt": "instruction", "response": "output"}}
    },
    "released models alone": {"released": {"ssft": "owner/one", "lat": "owner/two"}},
}


@pytest.mark.parametrize("beside", REFUSED)
def test_what_does_not_go_with_it_is_named(beside, profile):
    with pytest.raises(
        ProfileError, match=r"data.benign_responses = 'base' stands beside"
    ) as error:
        profile(**REFUSED[beside])
    assert beside in str(error.value) and "leave out either" in str(error.value)


def test_one_of_several_released_models_goes_with_it(profile):
    assert profile(released={"ssft": "owner/one"}).data.default_responses == ("",)


@pytest.mark.parametrize("value", ["bass", [], [""], [7], 3, None, {"a": "b"}])
def test_anything_else_than_texts_or_base_is_refused(value, profile):
    with pytest.raises(
        ProfileError, match="data.benign_responses.*give a list of texts, or 'base'"
    ):
        profile(data={"benign_responses": value})
