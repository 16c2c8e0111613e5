"""Settings: read from YAML with their types; everything that cannot be used is refused by field,
value and fix.
"""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import latlib
from latlib.config import profile as profile_module
from latlib.config.profile import Profile, changed_settings, find_share, load_profile, run_folder
from latlib.config.sections import ProfileError, RolesSettings
from latlib.experiment.layout import Layout

MINIMAL = {
    "description": "a test",
    "methods": {"ssft": {"attack.steps": 0}, "lat": {}, "at": {"attack.sites": ["embedding"]}},
}


def write(folder, changes="", **sections):
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **sections}) + changes)
    return path


def refusal_of(folder, changes="", **sections) -> str:
    with pytest.raises(ProfileError) as caught:
        load_profile(write(folder, changes, **sections))
    return str(caught.value)


def test_a_file_becomes_a_frozen_profile_named_after_it(tmp_path):
    profile = load_profile(write(tmp_path, train={"steps": 7}))
    assert (profile.name, profile.train.steps, profile.train.attack.steps) == ("mine", 7, 5)
    with pytest.raises(ValidationError):
        profile.train.steps = 8


def test_every_shipped_profile_loads():
    names = sorted(path.stem for path in find_share("profiles").glob("*.yaml"))
    assert names
    for name in names:
        assert load_profile(name).name == {"glance": "tiny"}.get(name, name)


def test_learning_rate_as_text_is_refused_and_the_fix_works(tmp_path):
    message = refusal_of(tmp_path, "train: {lr: 8e-5}\n")  # YAML 1.1 reads this as text
    assert "train.lr" in message and "'8e-5'" in message and "8.0" in message
    fix = message.split("write ")[1].split()[0]
    assert load_profile(write(tmp_path, f"train: {{lr: {fix}}}\n")).train.lr == 8e-5


def test_rerouting_in_several_processes_is_trained_under_fsdp2():
    """Weights behind its last site get no gradient, for which DDP would wait."""
    tree = load_profile("circuit-breakers").model_dump(mode="json")
    for parallel in ({"processes": 1}, {"processes": 2, "mode": "fsdp2"}):
        Profile.model_validate(tree | {"parallel": parallel})
    with pytest.raises(ValidationError, match="parallel.mode = 'ddp' cannot train methods"):
        Profile.model_validate(tree | {"parallel": {"processes": 2}})


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"train": {"stepz": 3}}, ("train.stepz", "3", "'steps'")),
        ({"train": {"attack": {"epsilon": 1.0}}}, ("train.attack.epsilon", "1.0", "eps")),
        ({"trains": {}}, ("trains", "'train'")),
        ({"train": {"attack": {"eps": 0.0}}}, ("train.attack.eps", "0.0", "greater than 0")),
        ({"train": {"attack": {"eps": -6.0}}}, ("train.attack.eps", "-6.0", "greater than 0")),
        ({"train": {"attack": {"eps": float("inf")}}}, ("train.attack.eps", "inf", "finite")),
        ({"train": {"attack": {"sites": []}}}, ("train.attack.sites", "at least 1")),
        ({"train": {"attack": {"sites": [1.5]}}}, ("train.attack.sites", "1.5", "[0, 1)")),
        ({"train": {"attack": {"sites": [-1]}}}, ("train.attack.sites", "-1", ">= 0")),
        ({"train": {"attack": {"sites": [True]}}}, ("train.attack.sites", "True", "block index")),
        ({"train": {"attack": {"rule": "adam"}}}, ("train.attack.rule", "'adam'", "'adamw'")),
        ({"train": {"steps": "100"}}, ("train.steps", "'100'", "without quotes")),
        ({"train": {"steps": 2.5}}, ("train.steps", "2.5", "integer")),
        ({"train": {"attack": {"targeted": "no"}}}, ("train.attack.targeted", "'no'", "boolean")),
        ({"seeds": [0, 0]}, ("seeds", "[0, 0]", "once")),
        (
            {"methods": {"lat": {"attack.epz": 1.0}}},
            ("methods.lat", "'attack.epz'", "'attack.eps'"),
        ),
        ({"methods": {"lat": {"attack.eps": -1.0}}}, ("methods.lat", "-1.0", "greater than 0")),
        (
            {"sweep": {"variants": {"no-away": {"defence.awy": 0.0}}}},
            ("no-away", "'defence.awy'", "'defence.away'"),
        ),
        ({"roles": {"main": "latt"}}, ("roles.main", "'latt'", "did you mean 'lat'")),
        ({"roles": {"undefended": "rlhf"}}, ("roles.undefended", "'rlhf'", "at, lat, ssft")),
        ({"roles": {"reference": "sft"}}, ("roles.reference", "'sft'", "'ssft'")),
        ({"roles": {"compared": ["lat", "x"]}}, ("roles.compared", "'x'", "no method")),
        ({"roles": {"compared": ["lat", "lat"]}}, ("roles.compared", "['lat', 'lat']", "once")),
        ({"roles": {"chief": "lat"}}, ("roles.chief", "not a known field")),
        ({"evaluation": {"sources": ["lta"]}}, ("evaluation.sources", "'lta'", "choose from base")),
        ({"data": {"source": "files"}}, ("data.source", "'files'", "data.harmful")),
        ({"model": {"source": "gpt2"}}, ("model.source", "'gpt2'", "'files'")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_name_the_field_the_value_and_the_fix(tmp_path, sections, said):
    message = refusal_of(tmp_path, **sections)
    for part in said:
        assert part in message


@pytest.mark.parametrize("name", ["tiney", "no-such-profile", "nowhere.yaml"])
def test_unknown_profile_is_named(name):
    with pytest.raises(ProfileError, match=name):
        load_profile(name)


def test_a_misspelt_profile_gets_the_near_name():
    with pytest.raises(ProfileError, match="did you mean 'tiny'"):
        load_profile("tinny")


@pytest.mark.parametrize("text", ["a: [1", "- only\n- a list\n", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match="broken.yaml"):
        load_profile(path)


def test_a_method_is_the_train_section_with_fields_replaced(tmp_path):
    profile = load_profile(write(tmp_path, train={"lr": 0.1, "attack": {"eps": 2.0, "sites": [1]}}))
    assert profile.training("lat") == profile.train
    assert profile.training("at").attack.sites == ("embedding",)
    assert profile.training("at").attack.eps == 2.0
    changed = profile.training("lat", {"attack.eps": 3.0, "defence.kl": 0.0})
    assert (changed.attack.eps, changed.defence.kl, changed.lr) == (3.0, 0.0, 0.1)


def test_an_unknown_method_or_change_is_refused(tmp_path):
    profile = load_profile(write(tmp_path))
    with pytest.raises(ProfileError, match="'rlhf'.*choose one of at, lat, ssft"):
        profile.training("rlhf")
    with pytest.raises(ProfileError, match="'attack.step' does not exist.*'attack.steps'"):
        profile.training("lat", {"attack.step": 3})
    with pytest.raises(ProfileError, match="'8e-5' is text"):
        profile.training("lat", {"lr": "8e-5"})


def test_roles_that_are_stated_are_kept(tmp_path):
    stated = {"undefended": "ssft", "reference": "at", "main": "lat", "compared": ["lat", "ssft"]}
    profile = load_profile(write(tmp_path, roles=stated))
    assert (profile.undefended, profile.reference, profile.main) == ("ssft", "at", "lat")
    assert profile.compared == ("lat", "ssft")
    kept = profile.roles.model_dump(mode="json")
    assert {name: kept[name] for name in stated} == stated


IDLE = {"attack.steps": 0}
AT = {"attack.sites": ["embedding"]}
FREE = {"attack.targeted": False}


def test_roles_that_settings_tell_are_filled_in(tmp_path):
    methods = {"a": {}, "b": IDLE | {"defence.away": 0.0}, "c": IDLE, "d": {"attack.eps": 1e-9}}
    methods |= {"e": AT | {"attack.eps": 2.0}, "f": FREE, "g": FREE | AT}
    methods |= {"h": AT | {"defence.kl": 0.0}}  # its losses differ: no rival
    roles = load_profile(write(tmp_path, methods=methods, roles={"undefended": "b"})).roles
    assert (roles.main, roles.control, roles.no_radius, roles.rival) == ("a", "c", "d", "e")
    assert (roles.untargeted, roles.untargeted_rival) == ("f", "g")


@pytest.mark.parametrize(
    ("role", "method", "differs"),
    [
        ("control", {"attack.steps": 0, "defence.away": 0.0}, "attack.steps, defence.away"),
        ("control", {"attack.eps": 1.0}, "attack.eps"),
        ("no_radius", {"attack.eps": 1.0}, "attack.eps"),
    ],
)
def test_a_control_differs_in_the_attack_and_in_nothing_else(tmp_path, role, method, differs):
    """Else a claim about the attack would be about the other thing as well."""
    path = write(tmp_path, methods={"lat": {}, "x": method}, roles={"main": "lat", role: "x"})
    with pytest.raises(ProfileError, match=f"roles.{role} = 'x' differs from .*: name a method"):
        load_profile(path)
    with pytest.raises(ProfileError, match=re.escape(f"in {differs}:")):
        load_profile(path)


def test_methods_that_shipped_claims_compare_differ_in_what_their_roles_say():
    for name in ("tiny", "tiny-many", "smoke"):
        profile = load_profile(name)
        roles = profile.roles
        assert set(profile.differences(roles.control, roles.main)) == {"attack.steps"}
        assert set(profile.differences(roles.undefended, roles.control)) == {"defence.away"}
        assert set(profile.differences(roles.rival, roles.main)) == {"attack.sites", "attack.eps"}
        untargeted = set(profile.differences(roles.untargeted, roles.untargeted_rival))
        assert untargeted == {"attack.sites"}
        assert set(profile.differences("ssft", roles.untargeted)) <= {"attack.steps", "defence.sft"}


@pytest.mark.parametrize(
    ("methods", "roles", "resolved"),
    [
        # neither an undefended twin nor a reference is guessed
        ({"a": {}, "b": {}}, {}, (None, None, "a", ("a", "b"))),
        ({"a": {"attack.steps": 0}, "b": {}}, {}, (None, None, "b", ("a", "b"))),
        # the twin is never the main method, though it may have an attack's settings
        ({"a": {}, "b": {}}, {"undefended": "a"}, ("a", "a", "b", ("a", "b"))),
        # a defence without an attack
        (
            {"ssft": {"attack.steps": 0}, "rr": {"attack.steps": 0}},
            {"undefended": "ssft"},
            ("ssft", "ssft", "rr", ("rr", "ssft")),
        ),
        ({"a": {"attack.steps": 0}}, {"undefended": "a"}, ("a", "a", "a", ("a",))),
        ({"a": {}, "b": {}}, {"reference": "b"}, (None, "b", "a", ("a", "b"))),
    ],
)
def test_roles_that_are_left_out_are_filled_in(tmp_path, methods, roles, resolved):
    profile = load_profile(write(tmp_path, methods=methods, roles=roles))
    found = (profile.undefended, profile.reference, profile.main, profile.compared)
    assert found == resolved
    # a run folder's own copy says the same
    again = write(tmp_path, **{**profile.model_dump(mode="json"), "name": "mine"})
    assert load_profile(again) == profile


def test_sweeps_vary_the_main_method(tmp_path):
    methods = {"a": {"attack.steps": 0}, "b": {"attack.eps": 2.0}}
    variants = {"bad": {"attack.epz": 1.0}}
    said = refusal_of(tmp_path, methods=methods, sweep={"variants": variants})
    assert "sweep.variants.bad" in said and "'attack.eps'" in said
    said = refusal_of(tmp_path, methods=methods, sweep={"grid": {"attack.eps": [-1.0]}})
    assert "methods.b.attack.eps" in said
    said = refusal_of(
        tmp_path, methods=methods, roles={"main": "a"}, sweep={"grid": {"attack.eps": [-1.0]}}
    )
    assert "methods.a.attack.eps" in said


@pytest.mark.parametrize(
    "path", sorted(find_share("profiles").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_profiles_state_their_roles(path):
    tree = yaml.safe_load(path.read_text())
    if "part_of" in tree:
        return
    assert set(tree["roles"]) >= {"undefended", "reference", "main", "compared"}
    assert set(tree["roles"]) <= set(RolesSettings.model_fields)


def test_differences_name_every_changed_leaf_and_nothing_else(tmp_path):
    old = load_profile(write(tmp_path)).model_dump()
    new = load_profile(write(tmp_path, train={"attack": {"eps": 2.0}}, seeds=[4])).model_dump()
    assert changed_settings(old, old) == []
    assert changed_settings(old, new) == [
        "seeds: (0, 1, 2) -> (4,)",
        "train.attack.eps: 6.0 -> 2.0",
    ]


def test_run_folder_prefers_the_argument_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LATLIB_RUNS", str(tmp_path / "all"))
    assert run_folder("tiny") == tmp_path / "all" / "tiny"
    assert run_folder("tiny", tmp_path / "mine") == tmp_path / "mine"


def test_an_installed_package_runs_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("LATLIB_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run_folder("tiny") == Path(latlib.__file__).parents[1] / "runs" / "tiny"
    share = tmp_path / "site-packages" / "latlib" / "_share" / "notebooks"
    monkeypatch.setattr(profile_module, "find_share", lambda kind: share)
    assert run_folder("tiny") == tmp_path / "runs" / "tiny"


def test_profile_survives_a_round_trip_through_json(tmp_path):
    profile = load_profile(write(tmp_path))
    assert Profile.model_validate_json(profile.model_dump_json()) == profile


def test_another_model_may_be_asked_about_the_made_up_world_if_that_is_said(tmp_path):
    asked = load_profile(write(tmp_path, model={"source": "gpt2"}, data={"source": "world"}))
    # as a run folder keeps it
    again = write(tmp_path, **{**asked.model_dump(mode="json"), "name": "mine"})
    assert load_profile(again).data == asked.data and asked.data.source == "world"


def test_relative_paths_lead_from_the_profiles_folder_then_from_the_repository(
    tmp_path, monkeypatch, root
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bad.csv").write_text("goal,target\n")
    (tmp_path / "mine" / "judge").mkdir()
    tree = {
        "name": "mine",
        "description": "a test",
        "model": {"source": "tests"},  # a folder of the repository
        "data": {
            "source": "files",
            "harmful": "bad.csv",
            "benign": "owner/good",
            "test_benign": "nowhere.csv",
        },
        "methods": {"lat": {}},
        "released": {"lat": "judge"},
        "evaluation": {"grader": {"name": "guard", "source": "judge"}},
    }
    file = tmp_path / "mine" / "p.yaml"
    file.write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    profile, mine = load_profile("mine/p.yaml"), tmp_path / "mine"
    assert profile.model.source == str(root / "tests") and profile.data.harmful == str(
        mine / "bad.csv"
    )
    assert (profile.data.benign, profile.data.test_benign) == ("owner/good", "nowhere.csv")
    assert profile.released == {
        "lat": str(mine / "judge")
    } and profile.evaluation.grader.source == str(mine / "judge")
    (mine / "world").mkdir()
    file.write_text(yaml.safe_dump(tree | {"model": {"source": "world"}}))
    assert load_profile(file).model.source == "world"  # a folder of that name is none


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: a\nname: b\n", "'name' stands twice"),
        ("train:\n  steps: 4\n  lr: 0.1\n  steps: 5\n", "'steps' stands twice"),
        ("methods:\n  lat: {attack.eps: 1, attack.eps: 2}\n", "'attack.eps' stands twice"),
        ("train: {steps: 010}\n", "010 is not a decimal number"),
        ("train: {steps: 1:30}\n", "1:30 is not a decimal number"),
        ("train: {lr: 1:30.5}\n", "1:30.5 is not a decimal number"),
        ("train: {steps: !!int x}\n", "invalid literal"),
        ("train: {[1]: 2}\n", "unhashable key"),
        ("train:\n  ? {a: 1}\n  : 2\n", "unhashable key"),
        ("train:\n  <<: 3\n", "expected a mapping"),
    ],
)
def test_yaml_that_would_be_read_as_something_else_is_an_error_with_its_line(
    tmp_path, text, reason
):
    (tmp_path / "mine.yaml").write_text("description: x\n" + text)
    with pytest.raises(ProfileError, match=reason) as error:
        load_profile(tmp_path / "mine.yaml")
    assert "line" in str(error.value)


def test_a_profile_that_is_not_utf8_is_an_error(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"description: \xff\n")
    with pytest.raises(ProfileError, match="mine.yaml is not UTF-8"):
        load_profile(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    "name", ["../../../pwn", "..", ".lat", "a/b", "a b", "lat\n", "é", "", "con", "NUL.x", "a" * 65]
)
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    """Methods and variants are folders: '../../../pwn' once wrote outside the run folder."""
    for place, sections in (
        ("methods = ", {"methods": {"lat": {}, name: {}}}),
        ("sweep.variants = ", {"sweep": {"variants": {name: {"defence.kl": 0.0}}}}),
        ("name = ", {"name": name}),
    ):
        said = refusal_of(tmp_path, **sections)
        assert said.startswith(place) and repr(name) in said and "letters, digits" in said


@pytest.mark.parametrize(
    ("methods", "variants", "name"),
    [
        (("lat", "lat-no-kl"), ("no-kl",), "lat-no-kl"),
        (("a", "a-b"), ("c", "b-c"), "a-b-c"),
        (("lat", "LAT"), (), "lat"),
        (("lat",), ("wide", "Wide"), "lat-wide"),
        (("lat", "Base"), (), "base"),
    ],
)
def test_two_models_of_one_folder_are_refused(tmp_path, methods, variants, name):
    sweep = {"variants": {variant: {"defence.kl": 0.0} for variant in variants}}
    said = refusal_of(tmp_path, methods={method: {} for method in methods}, sweep=sweep)
    assert f"{name!r} would be the folder of two models" in said.lower()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("eps", [0.05, 0.1, 0.05]),
        ("embedding_eps", [1, 1.0]),
        ("strong_eps", [0.05, 0.05]),
        ("encodings", ["plain", "leet", "plain"]),
        ("further_encodings", ["base64", "base64"]),
        ("rules", ["sign", "sign"]),
    ],
)
def test_what_is_listed_twice_is_refused(tmp_path, field, values):
    """It would double the rows of the outcome table, and so narrow every interval."""
    said = refusal_of(tmp_path, evaluation={field: values})
    assert f"evaluation.{field} = " in said and f"{values[-1]!r} stands twice" in said


def test_a_further_encoding_is_none_of_the_others(tmp_path):
    both = {"encodings": ["plain", "leet"], "further_encodings": ["base64", "leet"]}
    said = refusal_of(tmp_path, evaluation=both)
    assert "further_encodings = 'leet' stands in evaluation.encodings" in said


def test_a_section_may_be_merged_into_another(tmp_path):
    text = (
        "description: x\nmethods:\n  a: &a {attack.eps: 1.0, steps: 3}\n  b: {<<: *a, steps: 4}\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    profile = load_profile(tmp_path / "mine.yaml")
    assert profile.methods["b"] == {"attack.eps": 1.0, "steps": 4}


@pytest.mark.parametrize(("steps", "fix"), [("'4'", "write 4"), ("08", "write 8"), ("x", "give a")])
def test_text_where_a_count_belongs_is_an_error_with_the_number(tmp_path, steps, fix):
    text = f"description: x\nmethods: {{lat: {{}}}}\ntrain: {{steps: {steps}}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ProfileError, match=f"train.steps = .* is text, not a number: {fix}"):
        load_profile(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("changes", "radius", "d_model", "said"),
    [
        ({}, 6.0, 4096, "16 adamw steps of 0.001 in 4,096 dimensions go at most about 1.02,"),
        ({}, 1.0, 4096, ""),
        ({"lr": None}, 6.0, 4096, "of 0.001 in 4,096"),  # the rule's own rate
        ({"lr": 5.0e-2}, 6.0, 4096, ""),
        ({"steps": 100}, 6.0, 4096, ""),
        ({"steps": 0}, 6.0, 4096, ""),
        ({"start": "random"}, 6.0, 4096, ""),  # begins near its ball
        ({"restarts": 2}, 6.0, 4096, ""),
        ({"rule": "l2", "lr": None}, 6.0, 4096, ""),
        ({"rule": "sign", "lr": 0.05}, 6.0, 4096, "16 sign steps of 0.05 of the radius go at most"),
    ],
)
def test_a_ball_that_the_steps_do_not_reach_is_said(changes, radius, d_model, said):
    settings = load_profile("llama3-8b-paper").training("lat").attack.model_copy(update=changes)
    found = settings.never_binds(radius, d_model)
    assert said in found and bool(said) == bool(found)
    assert not said or found.startswith("eps = 6 never binds: ")


def test_a_part_of_a_profile_has_its_settings_and_its_run_folder(tmp_path):
    whole = load_profile("tiny")
    part = load_profile("glance")
    assert part == whole.model_copy(update={"notebooks": ("00",)})
    assert run_folder(part.name) == run_folder(whole.name)
    first = Layout(part, tmp_path / "run")
    first.claim()
    Layout(whole, tmp_path / "run").claim()  # goes on there


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("part_of: tiny\nseeds: [0]\n", "sets 'seeds', which part_of = 'tiny' shares with it"),
        ("part_of: tiny\nname: mine\n", "sets 'name', which part_of"),
        ("part_of: 3\n", "part_of = 3: give the name or the file of a profile"),
        ("part_of: tinny\n", "profile = 'tinny' is unknown"),
        ("part_of: glance\n", "part_of = 'tiny' is not a known field"),
        ("part_of: tiny\nnotebookz: []\n", "sets 'notebookz'"),
    ],
)
def test_a_part_changes_no_result(tmp_path, text, said):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ProfileError, match=re.escape(said)):
        load_profile(tmp_path / "p.yaml")


def test_a_part_may_be_of_a_file_beside_nothing(tmp_path):
    whole = write(tmp_path, train={"steps": 7})
    (tmp_path / "p.yaml").write_text(f"part_of: {whole}\nworkers: 1\n")
    part = load_profile(tmp_path / "p.yaml")
    assert (part.name, part.train.steps, part.workers) == ("mine", 7, 1)
