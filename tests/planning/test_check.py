"""`--check` says what a run needs and whether it is here, without a network and without showing a
token.
"""

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from small_profile import small_run, write_sources
from transformers import LlamaConfig

from latlib.config.profile import find_share, load_profile
from latlib.planning import check as planning
from latlib.planning import estimate, published_configs, requirements
from latlib.planning.estimate import phases, timed_base_hours, timed_hours
from latlib.planning.requirements import Machine
from latlib.planning.step_cost import Lengths, Memory, fake_model

PROFILES = sorted(p.stem for p in find_share("profiles").glob("*.yaml"))
GATED = {"llama3-8b-paper", "llama2-7b-paper", "llama3-8b-seed", "llama2-7b-abbas", "evaluate-only"}
# their model and data are files that everybody puts there
LOCAL = {"smollm2", "smollm2-many", "smollm2-strongreject"}
SECRET = "hf_abcdefghijklmnop"
BIG = Machine(
    gpus=(80 * 2**30,) * 2,
    gpu="a big GPU",
    bf16=True,
    ram=2**40,
    disk=2**40,
    cache_disk=2**40,
    one_disk=True,
    token=True,
    offline=False,
)
CPU = replace(BIG, gpus=(), gpu="", bf16=False)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # whatever this machine's user has downloaded
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        estimate, "timed_hours", lambda profile, *_: {p.model: 1.0 for p in phases(profile)}
    )
    monkeypatch.setattr(estimate, "timed_base_hours", lambda *_: 2.0)
    monkeypatch.chdir(tmp_path)


def cheap_steps(monkeypatch):
    """A step's size is made up."""
    monkeypatch.setattr(estimate, "predicted_flop", lambda *_: 1e15)
    memory = Memory(10**9, 10**7, 10**7, 10**9)
    monkeypatch.setattr(estimate, "predicted_memory", lambda *_: memory)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A function: the lines of a small local model's profile with changes, by subject; a step's
    size is made up.
    """
    cheap_steps(monkeypatch)
    write_sources(tmp_path)

    def check(machine=CPU, **sections):
        tree = small_run()
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
        profile = load_profile(tmp_path / "small.yaml")
        return {line.subject: line for line in planning.check(profile, tmp_path / "run", machine)}

    return check


def missing(lines):
    return [line.subject for line in lines.values() if line.state == "missing"]


def status_of(name, machine, capsys):
    profile = load_profile(name)
    status = planning.main(profile, Path("run"), as_json=True, machine=machine)
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == status and found["profile"] == profile.name
    assert (status == 3) == any(line["state"] == "missing" for line in found["lines"])
    assert all(bool(line["fix"]) for line in found["lines"] if line["state"] == "missing")
    return status, {line["subject"]: line for line in found["lines"]}


@pytest.mark.parametrize("name", sorted({*PROFILES} - LOCAL))
def test_a_shipped_profile_is_checked_without_token_or_network(name, capsys, monkeypatch):
    cheap_steps(monkeypatch)
    status, lines = status_of(name, replace(BIG, token=False), capsys)
    assert status == (3 if name in GATED else 0)
    assert lines["memory"]["state"] == "ok" and {"rows", "disk", "LoRA targets", "time"} <= set(
        lines
    )
    if name in GATED:
        assert "HF_TOKEN" in lines["licence"]["fix"] and "hf auth login" in lines["licence"]["fix"]
        assert "https://huggingface.co/meta-llama/" in lines["licence"]["fix"]


@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_shipped_profile_on_files_says_which_are_missing(name, capsys):
    status, lines = status_of(name, BIG, capsys)
    missing = [subject for subject, line in lines.items() if line["state"] == "missing"]
    profile = load_profile(name)
    released = [f"released {method}" for method in profile.released]
    own = [f"data.{field}" for field in ("harmful", "benign", "test_harmful")]
    files = [field for field in own if getattr(profile.data, field.removeprefix("data."))]
    assert status == 3 and missing == ["model", *released, *files]
    assert "models/smollm2" in lines["model"]["text"]


def test_a_shipped_profile_of_eight_billion_parameters_is_predicted(capsys, tmp_path, monkeypatch):
    """The real prediction; that there is no file is the only thing missing."""
    status, lines = status_of("llama3-8b-seed", BIG, capsys)
    assert status == 3 and lines["data.harmful"]["state"] == "missing"
    assert "24.0 GB predicted: weights 16.1" in lines["memory"]["text"]
    assert lines["memory"]["state"] == "ok"
    assert lines["time"]["text"].startswith("3.0 h")
    cheap_steps(monkeypatch)
    profile, machine = load_profile("llama3-8b-seed"), replace(BIG, gpus=())
    assert planning.main(profile, tmp_path, machine=machine) == 3
    said = capsys.readouterr().out
    assert "estimate, not measured here" in said and "FLOP counted" in said and "missing: 2" in said


@pytest.mark.parametrize("as_json", [False, True])
def test_a_token_is_never_shown(as_json, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    cheap_steps(monkeypatch)
    machine = requirements.look(tmp_path / "not" / "there")
    assert machine.token and machine.disk > 0 and machine.ram > 0
    planning.main(
        load_profile("llama3-8b-paper"), tmp_path, as_json, replace(machine, offline=False)
    )
    said = capsys.readouterr().out
    assert "a token is here" in said and SECRET not in said and SECRET not in repr(machine)


def test_what_is_lacking_is_said_without_timing_anything(small, tmp_path, monkeypatch):
    said = []
    for changes in ({"data": {"benign": "nowhere/x.csv"}}, {}):
        small(**changes)
        with monkeypatch.context() as patched:
            patched.setattr(planning, "_time", lambda *_: pytest.fail("timed"))
            said.append(
                planning.lacking(load_profile(tmp_path / "small.yaml"), tmp_path / "run", CPU)
            )
    assert said[0].startswith("missing: data.benign: nowhere/x.csv: no such file") and said[1] == ""
    assert "\n  download it there, or set data.benign to where it is" in said[0]


def test_everything_there(small, tmp_path):
    lines = small(CPU)
    assert missing(lines) == [] and lines["model"].text == f"folder {tmp_path / 'model'}"
    assert lines["rows"].text.startswith("read: ")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("model", name).unlink()
    lines = small(CPU)
    assert missing(lines) == ["model"] and "no tokenizer" in lines["model"].text


def test_a_prompt_that_is_trained_and_tested_on_is_missing_its_mend(small):
    assert small()["overlap"].state == "ok"
    Path("test.csv").write_text(
        "goal,target\nDO thing 7 NOW !,Sure\nsomething else entirely,Sure\n"
    )
    line = small(data={"test_harmful": "test.csv"})["overlap"]
    assert line.state == "missing" and "equal to a test prompt" in line.text
    assert line.fix.startswith("remove those rows from the training or the test file")
    assert "overlap" not in small(data={"benign": "someone/prompts"})  # not before it is here


def test_a_missing_file_and_a_data_set_to_be_downloaded(small):
    lines = small(data={"harmful": "nowhere/x.csv"})
    assert missing(lines) == ["data.harmful"]
    assert "nowhere/x.csv" in lines["data.harmful"].text
    lines = small(data={"benign": "someone/prompts"})
    assert missing(lines) == []
    assert "to be downloaded" in lines["data.benign"].text
    assert missing(small(replace(CPU, offline=True), data={"benign": "someone/prompts"})) == [
        "data.benign"
    ]


def test_what_is_in_the_hub_cache_is_not_downloaded(small, tmp_path):
    cached(tmp_path / "hub" / "datasets--someone--prompts")
    model = cached(tmp_path / "hub" / "models--someone--model")
    shutil.copytree(tmp_path / "model", model, dirs_exist_ok=True)
    weights = (model / "model.safetensors").rename(tmp_path / "weights")
    changes = {"model": {"source": "someone/model"}, "data": {"benign": "someone/prompts"}}
    lines = small(replace(CPU, offline=True), **changes)
    assert missing(lines) == ["model"]  # its weights are not there
    assert lines["data.benign"].text == "someone/prompts: in the cache"
    shutil.copy(weights, model / "model.safetensors")
    lines = small(replace(CPU, offline=True), **changes)
    assert missing(lines) == [] and lines["model"].text == "someone/model: in the hub cache"
    index = {"weight_map": {"a": "model.safetensors", "b": "2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing(small(replace(CPU, offline=True), **changes)) == ["model"]


def cached(repository: Path) -> Path:
    """The folder of the only revision of a repository in the hub cache."""
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    return repository / "snapshots" / "abc"


def test_a_wrong_site_and_a_wrong_target(small):
    lines = small(train={"attack": {"sites": [3], "steps": 2}})
    assert missing(lines) == ["sites of lat"] and "3 blocks" in lines["sites of lat"].text
    lines = small(lora={"targets": ["c_attn"]})
    assert missing(lines) == ["LoRA targets"] and "c_attn" in lines["LoRA targets"].text


def test_a_prompt_that_outgrows_the_context_as_it_will_be_asked_is_missing_room(small):
    def line(subject="room", **evaluation):
        return small(evaluation={"max_new_tokens": 8, **evaluation})[subject]

    assert line().state == "ok" and "of 256 tokens" in line().text
    for spelt in (
        {"encodings": ["plain", "morse+morse"]},
        {"further_encodings": ["morse+morse"]},
    ):
        found = line(**spelt)
        assert found.state == "missing" and found.text.startswith("evaluation.encodings, 'morse+m")
        assert "more than the model's context of 256" in found.text
    short = line(max_new_tokens=250)  # a reply is cut then
    assert short.state == "note" and "evaluation.max_new_tokens = 250" in short.text and short.fix


def test_a_jailbreak_that_has_no_room_is_noted(small):
    def said(**evaluation):
        lines = small(evaluation={"max_new_tokens": 8, **evaluation})
        assert lines["room"].state == "ok"
        found = {name: line for name, line in lines.items() if name.startswith("room of ")}
        assert {line.state for line in found.values()} <= {"note"}
        assert all("will be left out: a prompt has " in line.text for line in found.values())
        return set(found)

    assert said() == set()
    assert said(shots=20) == {"room of many-shot"}
    suffix = {"steps": 1, "tokens": 240}
    assert said(suffix=suffix) == {"room of suffix-gcg", "room of suffix-random"}


def test_a_radius_that_never_binds_or_is_rounded_away_is_noted(small):
    paper = {"sites": [1], "steps": 16, "rule": "adamw", "lr": 1.0e-3, "eps": 6.0}
    line = small(train={"attack": paper})["radius of lat"]
    assert line.state == "note" and line.fix
    assert "16 adamw steps of 0.001 in 16 dimensions go at most about 0.064" in line.text
    assert "radius of lat" not in small(train={"attack": {**paper, "lr": 0.5}})
    relative = {"sites": [1], "steps": 2, "rule": "l2", "eps_mode": "relative"}
    half, full = ({"source": "model", "dtype": d} for d in ("bfloat16", "float32"))
    line = small(train={"attack": {**relative, "eps": 5.0e-4}}, model=half)["precision"]
    assert line.state == "note" and "eps = 0.0005 of the stream" in line.text
    assert "bfloat16 adds about " in line.text and "float32" in line.fix
    assert "precision" not in small(train={"attack": {**relative, "eps": 5.0e-4}}, model=full)
    assert "precision" not in small(train={"attack": {**relative, "eps": 0.1}}, model=half)
    evaluated = {"eps": [5.0e-4], "embedding_eps": []}
    lines = small(train={"attack": {**relative, "eps": 0.1}}, model=half, evaluation=evaluated)
    assert "eps = 0.0005" in lines["precision"].text


def test_too_little_memory_disk_and_too_few_gpus(small):
    assert missing(small(replace(CPU, ram=10**4))) == ["memory"]
    assert missing(small(replace(CPU, disk=10**3))) == ["disk"]
    two_disks = replace(CPU, one_disk=False, cache_disk=0)
    assert missing(small(two_disks)) == []  # nothing is downloaded
    uneven = replace(BIG, gpus=(2**40, 2**20))
    assert missing(small(uneven)) == []
    # the fullest GPU decides
    assert missing(small(uneven, parallel={"processes": 2})) == ["memory"]
    assert missing(small(BIG, parallel={"processes": 3})) == ["device"]
    assert missing(
        small(replace(BIG, bf16=False), model={"source": "model", "dtype": "bfloat16"})
    ) == ["device"]


def test_models_that_are_not_there(small):
    assert missing(small(model={"source": "./nowhere"})) == ["model"]
    lines = small(model={"source": "someone/model"})
    assert missing(lines) == [] and lines["shape"].state == "note" and "memory" not in lines
    assert missing(small(replace(CPU, offline=True), model={"source": "someone/model"})) == [
        "model"
    ]
    lines = small(released={"lat": "./robust"})
    assert missing(lines) == ["released lat"] and lines["time"].text == "nothing is trained"


def test_a_released_model_of_each_seed_is_looked_for(small, tmp_path):
    (tmp_path / "robust-0").symlink_to(tmp_path / "model")
    released = {"lat": "./robust-{seed}"}
    assert not missing(small(seeds=[0], released=released))
    assert missing(small(seeds=[0, 1], released=released)) == ["released lat"]


def test_a_large_model_without_a_gpu_is_missing_one(capsys, monkeypatch):
    cheap_steps(monkeypatch)
    _, lines = status_of("evaluate-only", CPU, capsys)
    assert lines["device"]["state"] == "missing" and "GPU" in lines["device"]["fix"]
    _, lines = status_of("small-gpu", CPU, capsys)
    assert lines["device"]["state"] == "note"


def test_hours_follow_flops_steps_seeds_processes_and_price(small, monkeypatch):
    cheap_steps(monkeypatch)
    rate = estimate.MEASURED_RATE * estimate.SHARE
    steps = round(rate * 3600 * 8 / 1e15)  # eight hours at the stated rate
    lines = small(train={"steps": steps}, budget={"usd_per_hour": 2.0})
    assert lines["time"].text.startswith("8.0 h") and "16.00 USD" in lines["cost"].text
    two = replace(BIG, gpus=(1, 1))  # too little memory to be timed
    lines = small(
        two, train={"steps": steps}, budget={"usd_per_hour": 2.0}, parallel={"processes": 2}
    )
    assert lines["time"].text.startswith("4.0 h") and "16.00 USD" in lines["cost"].text


def test_a_first_look_needs_its_own_models_alone(capsys, monkeypatch):
    """And the whole run all of them, as many side by side as there are cores."""
    cheap_steps(monkeypatch)
    monkeypatch.setattr(planning, "worker_count", lambda profile, jobs: min(2, jobs))
    _, lines = status_of("glance", CPU, capsys)
    assert lines["scope"]["text"] == "a first look alone: ssft, lat of seed 0"
    assert lines["time"]["text"].startswith(
        "3.0 h (base 2.0 h, ssft 60 min, lat 60 min); training of 1 seed(s), "
    )
    assert "sites of at" not in lines
    _, lines = status_of("tiny", CPU, capsys)
    said = lines["time"]["text"]  # 27 hours of one core
    assert said.startswith("13.5 h (base 6.0 h, ssft 3.0 h, rt 3.0 h, at 3.0 h, ")
    assert ", 3 variants of lat 3.0 h); " in said and ", 2 models side by side; " in said
    assert lines["time of all"]["text"].startswith("about 27.0 h with evaluations: ")
    assert "scope" not in lines


@pytest.mark.parametrize(
    ("one_seed", "n_seeds", "workers", "expected"),
    [
        ({"base": 2.0, "ssft": 1.0, "lat": 3.0}, 1, 2, 5.0),  # lat waits for the base
        ({"base": 2.0, "ssft": 1.0, "lat": 3.0}, 3, 2, 9.0),
        ({"base": 2.0, "ssft": 1.0, "lat": 3.0}, 3, 1, 18.0),
        ({"base": 2.0}, 2, 2, 2.0),
        ({"lat": 3.0}, 2, 1, 6.0),
    ],
)
def test_what_stands_on_a_base_waits_for_it(one_seed, n_seeds, workers, expected):
    seeds = dict.fromkeys(one_seed, n_seeds)
    assert estimate.elapsed_hours(one_seed, seeds, workers) == expected


def test_variants_are_counted_and_steps_in_common_once(monkeypatch):
    profile = load_profile("tiny")
    steps = {}
    for phase in phases(profile):
        steps.setdefault(phase.model, []).append(phase.steps)
    # at, lat and the untargeted ones go on from 60 steps of ssft, without the KL term nothing does
    assert steps["ssft"] == steps["rt"] == [130] and steps["lat[no-kl]"] == [60, 70]
    assert steps["at"] == steps["lat"] == steps["lat-untargeted"] == steps["lat[eps-0.2]"] == [70]
    assert estimate.seeds_of(profile, "lat") == 3 and estimate.seeds_of(profile, "lat[no-kl]") == 1
    asked = []
    monkeypatch.setattr(
        estimate, "predicted_flop", lambda _, settings, __: asked.append(settings) or 1
    )
    hours = estimate.counted_hours(profile, None, None)
    assert hours["lat"] == hours["lat[eps-0.2]"] < hours["lat[no-kl]"]
    assert len({settings.attack.eps for settings in asked}) == 1, "a radius costs no time"


def test_rows_that_are_here_are_read():
    profile = load_profile("smoke")
    found = requirements.row_lengths(profile, 256, requirements.tokenizer_of(profile))
    assert found.source.startswith("read: ") and found.longest.prompt >= found.mean.prompt
    assert estimate.assumed_lengths(100).longest == Lengths(25, 75)


def test_steps_are_timed_on_any_device():
    profile = load_profile("smoke")
    config = published_configs.config_of(profile.model)
    fake = fake_model(config, torch.float32, profile.lora)
    found = timed_hours(profile, fake, Lengths(6, 4), "cpu")
    variants = {f"lat[{name}]" for name in profile.sweep.variants}
    assert variants and set(found) == {*profile.methods} | variants
    assert all(hours > 0 for hours in found.values())


def test_a_base_is_timed_by_steps_like_its_own():
    """As many times longer as there are more of them."""
    profile = load_profile("smoke")
    tokenizer = requirements.tokenizer_of(profile)
    long = profile.model_copy(
        update={"pretrain": profile.pretrain.model_copy(update={"steps": 1000})}
    )
    short, found = (timed_base_hours(each, tokenizer, "cpu") for each in (profile, long))
    assert 0 < short < found < 1000 * short


def test_published_shapes_have_the_published_size():
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, known in published_configs.PUBLISHED.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known.config))
        assert sum(p.numel() for p in model.parameters()) == known.parameters, name
    for name in {*PROFILES} - LOCAL:
        profile = load_profile(name)
        assert (
            profile.model.source == "world" or profile.model.source in published_configs.PUBLISHED
        )


def test_a_config_that_is_here_is_the_truth(tmp_path, monkeypatch):
    LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    settings = load_profile("llama3-8b-seed").model
    assert published_configs.config_of(settings).num_hidden_layers == 32
    here = settings.model_copy(update={"source": str(tmp_path)})
    assert published_configs.config_of(here).num_hidden_layers == 3


def test_the_command_line_runs_nothing_and_imports_no_jupyter(tmp_path):
    code = (
        "import sys; from latlib.runner.pipeline import main; s = main(sys.argv[1:]);"
        " print({'papermill', 'nbformat', 'IPython', 'jupyter_client'} & set(sys.modules));"
        " sys.exit(s)"
    )
    options = ["--profile", "smoke", "--out", str(tmp_path / "run"), "--check"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options], capture_output=True, text=True, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.endswith("everything that a run needs is there\nset()\n") and done.stderr == ""
    )
    assert not (tmp_path / "run").exists()
    done = subprocess.run(
        [sys.executable, "-c", code, *options, "--fresh"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "--check" in done.stderr
