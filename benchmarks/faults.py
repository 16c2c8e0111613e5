"""Cases in which settings, sources or numbers are bad, or something from outside fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from cases import ROOT, Command, Place, add, case, results, said_in_logs
from damage import cut, emptied

SETTINGS, SOURCES, TRAINING = "Settings", "Models and data", "Trainings that go wrong"
OUTSIDE = "What comes from outside"


# ---- settings


def refused(place: Place, changes: dict[str, Any], said: str) -> str:
    """A profile with these settings: a line, and nothing is made."""
    place.profile(**changes)
    seen = place.pipeline().ended(2, said)
    assert not place.run.exists(), "a folder was made"
    return seen


def unreadable(place: Place, text: str | bytes, said: str) -> str:
    """A profile of this text."""
    raw = text if isinstance(text, bytes) else text.encode()
    (place.folder / "night.yaml").write_bytes(raw)
    done = place.pipeline()
    assert done.seconds < 60, f"{done.seconds:.0f} s"
    return done.ended(2, said)


BAD = {
    "method named ../../../pwn": ({"methods": {"../../../pwn": {}}}, "pwn"),
    "variant named ../x": ({"sweep": {"variants": {"../x": {"lr": 0.1}}}}, "../x"),
    "names that share a folder": (
        {
            "methods": {"ssft": {"attack.steps": 0}, "lat": {}, "lat-no-kl": {}},
            "sweep": {"variants": {"no-kl": {"defence.kl": 0.0}}},
        },
        "no-kl",
    ),
    "eps repeated": ({"evaluation.eps": [0.05, 0.2, 0.05]}, "evaluation.eps"),
    "encoding repeated": ({"evaluation.further_encodings": ["base64", "base64"]}, "base64"),
    "seed repeated": ({"seeds": [0, 0]}, "seeds"),
    "site outside the model": ({"train.attack.sites": [99]}, "99"),
    "device tpu9": ({"model.device": "tpu9"}, "tpu9"),
    "heads that do not fit": ({"model.dim": 33}, "model.dim = 33"),
    "vocabulary of 1e12": ({"model.vocabulary": 10**12}, "model.vocabulary"),
    "batch of 1e12": ({"train.batch": 10**12}, "train.batch"),
    "rate as text": ({"train.lr": "8e-5"}, "train.lr"),
    "rate of NaN": ({"train.lr": float("nan")}, "train.lr"),
    "defence of nothing": (
        {"train.defence": {"toward": 0.0, "away": 0.0, "kl": 0.0, "sft": 0.0}},
        "all are 0",
    ),
    "unknown setting": ({"train.stepz": 7}, "stepz"),
    "unknown columns": ({"data.harmful_columns": {"promt": "x"}}, "promt"),
    "LoRA on no layer": ({"lora.targets": ["nothing"]}, "nothing"),
    "no prompts to test": ({"evaluation.prompts": 0}, "evaluation.prompts"),
}
for _name, (_changes, _said) in BAD.items():
    _words = ", ".join(f"{name}: {json.dumps(value)}" for name, value in _changes.items())
    add(_name, SETTINGS, _words, partial(refused, changes=_changes, said=_said))


@case(SETTINGS, "data.rows: 3, less than a batch, and all the repository's notebooks")
def three_rows(place: Place) -> str:
    """They are taken again and again; every notebook gets to its end."""
    place.profile(data__rows=3, sweep={"variants": {"no-kl": {"defence.kl": 0.0}}})
    place.cells = {}
    return place.pipeline().ended(0, "report:")


ALIASES = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
NO_PROFILES: dict[str, tuple[str | bytes, str]] = {
    "profile that is not UTF-8": (b"name: \xff\n", "not UTF-8"),
    "profile of aliases of aliases": (ALIASES, "more than 10000 values"),
    "profile nested 3000 deep": ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    "profile with a date that is none": (
        "model: {date: 2026-02-31}\nmethods: {a: {}}\ndescription: x\n",
        "2026-02-31",
    ),
    "profile with an integer of 5000 digits": (f"seeds: [{'9' * 5000}]\n", "not readable YAML"),
    "profile that would run code": ("x: !!python/object:os.system {}\n", "constructor"),
    "empty profile": ("", "night.yaml"),
}
for _name, (_text, _said) in NO_PROFILES.items():
    add(_name, SETTINGS, f"a {_name}", partial(unreadable, text=_text, said=_said))


# ---- models and data of the user's


def own_sources(place: Place) -> None:
    """A profile of a local model, which is the night's base, and of two files of prompts."""
    shutil.copytree(place.reference() / "models" / "base-seed0", place.folder / "model")
    rows = "goal,target\n" + "".join(f"do thing {i} now,Sure thing {i}\n" for i in range(20))
    (place.folder / "harmful.csv").write_text(rows)
    benign = rows.replace("goal", "instruction").replace("do", "bake")
    (place.folder / "benign.csv").write_text(benign)
    tree = {
        "name": "mine",
        "description": "of the user",
        "seeds": [0],
        "model": {"source": "model", "device": "cpu", "dtype": "float32"},
        "data": {"source": "files", "harmful": "harmful.csv", "benign": "benign.csv"},
        "train": {
            "steps": 4,
            "batch": 2,
            "benign_batch": 2,
            "micro_batch": 2,
            "attack": {"sites": [1], "steps": 2},
        },
        "methods": {"lat": {}},
    }
    write_settings(place, tree)
    place.cells = {"01_open": ("from latlib import Run\nrun = Run(profile, out)",)}


def write_settings(place: Place, tree: dict[str, Any]) -> None:
    """The profile's plain values."""
    (place.folder / "night.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def settings(place: Place) -> dict[str, Any]:
    """The same, read."""
    return dict(yaml.safe_load((place.folder / "night.yaml").read_text("utf-8")))


def lacking(place: Place, change: Callable[[Place], None], said: str) -> str:
    """Sources that were changed so: a line before anything is trained."""
    own_sources(place)
    change(place)
    done = place.pipeline()
    seen = done.ended(done.status, said)
    assert done.status in (2, 3), f"exit {done.status}"
    assert not list((place.run / "models").glob("*")), "something was trained"
    return seen


def set_to(section: str, **values: Any) -> Callable[[Place], None]:
    """A change of a section of the profile."""

    def change(place: Place) -> None:
        tree = settings(place)
        tree[section] = tree.get(section, {}) | values
        write_settings(place, tree)

    return change


def on_file(name: str, act: Callable[[Path], object]) -> Callable[[Place], None]:
    """A change of a file."""
    return lambda place: act(place.folder / name) and None


def template(text: str) -> Callable[[Place], None]:
    """Another chat template."""
    return on_file("model/chat_template.jinja", lambda file: file.write_text(text))


def _sole_rows(place: Place) -> None:
    rows = (place.folder / "harmful.csv").read_text().splitlines(keepends=True)
    (place.folder / "harmful.csv").write_text("".join(rows[:2]))


def _only_a_header(place: Place) -> None:
    (place.folder / "test.csv").write_text("goal,target\n")
    set_to("data", test_harmful="test.csv")(place)


def _same_prompt(place: Place) -> None:
    (place.folder / "test.csv").write_text("goal,target\nDO THING 7 now !,Sure\nelse,Sure\n")
    set_to("data", test_harmful="test.csv")(place)


LACKING: dict[str, tuple[str, Callable[[Place], None], str]] = {
    "model folder that is not there": (
        "model.source names no folder",
        set_to("model", source="/nowhere/model"),
        "/nowhere/model",
    ),
    "weights cut": (
        "the model's weights are cut in half",
        on_file("model/model.safetensors", cut),
        "model.safetensors",
    ),
    "weights emptied": (
        "the model's weights are empty",
        on_file("model/model.safetensors", emptied),
        "model.safetensors",
    ),
    "tokenizer emptied": (
        "the model's tokenizer is empty",
        on_file("model/tokenizer.json", emptied),
        "tokenizer",
    ),
    "model config cut": (
        "the model's configuration is cut in half",
        on_file("model/config.json", cut),
        "config",
    ),
    "template that is broken": (
        "a chat template with a syntax error",
        template("{% for m in %}"),
        "template",
    ),
    "template that leaves the request out": (
        "a chat template that writes no request",
        template("{% for m in messages %}[x]{% endfor %}"),
        "template",
    ),
    "judge that is not there": (
        "evaluation.grader.source names no folder",
        set_to("evaluation", grader={"name": "harmbench", "source": "/nowhere/judge"}),
        "/nowhere/judge",
    ),
    "site outside a model of the user's": (
        "train.attack.sites: [99] of a model of 4 blocks",
        set_to("train", attack={"sites": [99], "steps": 2}),
        "99",
    ),
    "data file that is not there": (
        "data.harmful names no file",
        set_to("data", harmful="nowhere.csv"),
        "nowhere.csv",
    ),
    "data file that is no text": (
        "data.harmful has bytes that are no text",
        on_file("harmful.csv", lambda file: file.write_bytes(b"goal,target\n\xff\xfe,\x00\n")),
        "harmful.csv",
    ),
    "data file of one row": ("data.harmful has one row", _sole_rows, "row"),
    "test file without rows": ("data.test_harmful has a header only", _only_a_header, "test.csv"),
    "prompt trained and tested on": (
        "data.test_harmful has a prompt of data.harmful, in other letters",
        _same_prompt,
        "test prompt",
    ),
}
for _name, (_words, _change, _said) in LACKING.items():
    add(_name, SOURCES, _words, partial(lacking, change=_change, said=_said))


def another(place: Place, file: str, said: str) -> str:
    """A file of the same name with other content, in a folder that has begun with the first."""
    own_sources(place)
    place.pipeline("--unchecked").ended(0)
    path = place.folder / file
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    seen = place.pipeline("--unchecked").ended(2, "made with other inputs", said)
    content[-5] ^= 1
    path.write_bytes(content)
    place.pipeline("--unchecked").ended(0)
    return f"{seen}; with what was there put back: exit 0"


for _file, _said in {
    "harmful.csv": "data.harmful: ",
    "model/model.safetensors": "model.source, weights: ",
    "model/tokenizer.json": "model.source, tokenizer: ",
}.items():
    _words = f"{_file} changed by one bit between two commands on one folder"
    add(f"another {_file}", SOURCES, _words, partial(another, file=_file, said=_said))


@case(SOURCES, "train.steps: 6 -> 7 between two commands on one folder")
def other_settings(place: Place) -> str:
    """Refused, naming them; what was made stays."""
    place.made()
    place.profile(train__steps=7)
    seen = place.pipeline().ended(2, "train.steps: 6 -> 7", "--fresh", "--out")
    place.profile()
    return f"{seen}; with the settings of before: {place.goes_on()}"


# ---- trainings


def skipped(place: Place, inject: str) -> str:
    """One step that is not finite: it is left out, said, and counted; the run ends well."""
    place.pipeline(inject=inject).ended(0)
    assert place.flag.exists(), "no NaN was put in"
    line = said_in_logs(place.run, "was not finite and is skipped")
    counts = []
    for log in (place.run / "metrics").glob("*.jsonl"):
        records = [json.loads(text) for text in log.read_text().splitlines()]
        counts.append(sum(record.get("skipped", 0) for record in records))
    assert sum(counts) == 1, f"{counts} steps were skipped"
    return f"{line}; counted in the metrics, the run ended well"


for _where in ("loss", "gradient", "perturbation"):
    _words = f"NaN in the {_where} of one training step"
    _inject = f"nan_in_the_{_where}"
    add(f"NaN in the {_where}", TRAINING, _words, partial(skipped, inject=_inject))


@case(TRAINING, "NaN in the gradient of every training step")
def nan_for_ever(place: Place) -> str:
    """The run ends with a line; no adapter is made."""
    seen = place.pipeline(inject="nan_for_ever").ended(1, "all of them skipped", "train.lr")
    made = [path.name for path in (place.run / "models").glob("[!.]*") if "base" not in path.name]
    assert not made, f"{made} looks finished"
    place.pipeline().ended(0)
    return f"{seen}; without the NaN, the same command ends well"


def alarm(place: Place, said: str, inject: str = "", **changes: Any) -> str:
    """What is said while a model trains."""
    place.profile(**changes)
    place.pipeline(inject=inject)
    return said_in_logs(place.run, said)


for _name, _words, _case in (
    (
        "rate of 1e6",
        "train.lr: 1000000.0",
        partial(alarm, said="lower train.lr", train__lr=1e6, train__steps=16),
    ),
    (
        "model that refuses everything",
        "a model that refuses every validation prompt",
        partial(
            alarm,
            said="refuses 100% of harmless",
            inject="refuses_everything",
            train__evaluate_every=2,
        ),
    ),
    (
        "model that babbles",
        "a model too small to learn, so that its replies say nothing",
        partial(alarm, said="neither", train__evaluate_every=2),
    ),
):
    add(_name, TRAINING, _words, _case)


@case(TRAINING, "a GPU's out-of-memory error in the attack of one step")
def gpu_memory(place: Place) -> str:
    """Half as many rows at a time; the run ends well."""
    place.pipeline(inject="out_of_memory").ended(0)
    return said_in_logs(place.run, "out of memory: step") + "; the run ended well"


# ---- from outside


@case(OUTSIDE, "a hub that cannot be reached")
def hub_unreachable(place: Place) -> str:
    """Said in a line, after a few tries."""
    own_sources(place)
    set_to("model", source="someone/model")(place)
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = place.pipeline("--unchecked", **nowhere)
    opened = place.python(
        "import sys\nfrom latlib import Run\n"
        "try:\n    Run(sys.argv[1], sys.argv[2]).model('lat')\n"
        "except Exception as error:\n    sys.exit(f'error: {error}')",
        str(place.folder / "night.yaml"),
        str(place.run),
        **nowhere,
    )
    assert done.status == 0, done.err
    return opened.ended(1, "someone/model")


@case(OUTSIDE, "a W&B server that accepts connections and never answers")
def wandb_hangs(place: Place) -> str:
    """It costs a training some seconds and changes nothing."""
    place.profile(tracking__wandb="online")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        key = {"WANDB_MODE": "online", "WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40}
        done = place.pipeline(**key)
    done.ended(0)
    kept, found = results(place.reference()), results(place.run)
    settings_in = ("profile.yaml", "latlib.json")
    other = [n for n in kept if not n.endswith(settings_in) and found[n] != kept[n]]
    assert not other, f"not the same: {other}"
    return said_in_logs(place.run, "W&B") + "; models, metrics and tables bit for bit"


SCRIPT = """import sys
from latlib import Run
run = Run(sys.argv[1], sys.argv[2])
run.ensure([("lat", 0), ("ssft", 0)])
"""


@case(OUTSIDE, "a script of the user's without if __name__ == '__main__', with two workers")
def script_without_a_guard(place: Place) -> str:
    """Its last line says what it lacks; with it, it works."""
    profile = place.profile()
    script = place.folder / "mine.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(profile), str(place.run)]
    done = Command(command, place.folder, place.environment()).start().wait()
    line = next(x for x in reversed(done.err.splitlines()) if x.startswith("RuntimeError"))
    assert done.status == 1, f"exit {done.status}"
    assert "put what it does under `if __name__ == '__main__':`" in line, done.err[-1500:]
    lines = SCRIPT.splitlines()
    guarded = [*lines[:2], "if __name__ == '__main__':", *(f"    {line}" for line in lines[2:])]
    script.write_text("\n".join(guarded))
    Command(command, place.folder, place.environment()).start().wait().ended(0)
    return f"exit 1: {line}; with it: exit 0"


@case(OUTSIDE, "the package installed from a wheel, run without --out in an empty folder")
def installed_wheel(place: Place) -> str:
    """The run folder lies in the current one, and nothing in the installation."""
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    make = [sys.executable, "-c", build, str(place.folder)]
    subprocess.run(make, cwd=ROOT, check=True, capture_output=True)
    site, here = place.folder / "site", place.folder / "here"
    shutil.unpack_archive(next(place.folder.glob("*.whl")), site, "zip")
    here.mkdir()
    before = sum(1 for _ in site.rglob("*"))
    place.cells = {"01_open": ("from latlib import Run\nrun = Run(profile, out)",)}
    command = [sys.executable, "-B", "-m", "latlib.runner.pipeline", "--profile", "smoke"]
    command += ["--notebooks", str(place.notebooks())]
    environment = place.environment(PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1")
    environment.pop("LATLIB_RUNS", None)
    done = Command(command, here, environment).start().wait()
    done.ended(0, str(here / "runs" / "smoke"))
    assert (here / "runs" / "smoke" / "profile.yaml").is_file()
    assert sum(1 for _ in site.rglob("*")) == before, "something was written beside the package"
    return "exit 0: the run is in runs/smoke of the current folder, the installation as it was"


@case(OUTSIDE, "a HOME that cannot be written")
def home_unwritable(place: Place) -> str:
    """Nothing that matters lies there."""
    done = place.pipeline(HOME=os.devnull)
    done.ended(0)
    return "the run ended well"
