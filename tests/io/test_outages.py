"""A hub that is out for a while costs some tries, one that refuses none, and one that stays out is
said once, with what to do. The hub is a server on this machine, its client the real one."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import BROKEN, HubServer
from tiny_models import saved

from latlib.io import outages
from latlib.io.outages import LONGEST_S, WAITS, through_outages

ASK = """
import json, sys, time
from latlib.config.sections import ModelSettings
from latlib.data.records import Source, read_table
from latlib.io import outages
from latlib.io.hub import MODEL_FILES, Allowed, open_config, weights_are_safe
from latlib.models import load_model
outages.WAITS = (0.1, 0.2, 0.3)
for kind, name in json.loads(sys.argv[1]):
    begun, said = time.monotonic(), ""
    try:
        if kind == "data":
            rows = read_table(Source(name, "data.harmful"), {"prompt": "goal"}, ("prompt",))
            said = f"{len(rows)} rows"
        elif kind == "config":
            config = open_config(name, "model.source", Allowed())
            said = config.model_type
            weights_are_safe(name, "model.source", Allowed(), MODEL_FILES)
        else:
            lm = load_model(name, ModelSettings(device="cpu", dtype="float32"))
            said = type(lm.model).__name__
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([name, said, time.monotonic() - begun]), flush=True)
"""


def ask(url, home, *wanted):
    """({repository: what came of it}, what was said meanwhile) of a process of its own: the hub's
    client takes its settings when it is imported."""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(wanted)],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=home,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: said for name, said, _ in found}, done.stderr, {n: s for n, _, s in found}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    home = tmp_path_factory.mktemp("repositories")
    model = saved(home / "model")
    data = home / "data"
    data.mkdir()
    (data / "train.csv").write_text("goal\n" + "".join(f"do {i}\n" for i in range(5)))
    found = {f"of/{name}-model": model for name in ("busy", "cut", "out", "gated", "private")}
    return found | {f"of/{name}-data": data for name in ("busy", "cut", "out", "gated")}


@pytest.fixture(scope="module")
def asked(repositories, tmp_path_factory):
    """(the hub, what came of each repository, what was said, seconds that each took, the cache)"""
    home = tmp_path_factory.mktemp("home")
    failing = []
    for kind in ("model", "data"):
        failing += [
            (f"of/busy-{kind}", "GET", 503, 2),
            (f"of/cut-{kind}", "GET", BROKEN, 2),
            (f"of/out-{kind}", "GET", 503, 10**6),
            (f"of/gated-{kind}", "*", 403, 10**6),
        ]
    failing.append(("of/private-model", "*", 404, 10**6))
    server = HubServer(repositories, failing)
    wanted = [(name.rsplit("-")[-1], name) for name in repositories]
    try:
        yield (server, *ask(server.url, home, *wanted), home)
    finally:
        server.shutdown()


def lines_about(said, name):
    return [line for line in said.splitlines() if f"'{name}'" in line]


@pytest.mark.parametrize("name", ["busy", "cut"])
def test_an_outage_is_waited_out_and_said_in_a_line_a_try(asked, name):
    _, found, said, *_ = asked
    assert found[f"of/{name}-model"] == "LlamaForCausalLM" and found[f"of/{name}-data"] == "5 rows"
    for kind, field in (("model", "model.source"), ("data", "data.harmful")):
        lines = lines_about(said, f"of/{name}-{kind}")
        assert [line.rsplit(";")[-1] for line in lines] == [
            f" try {number} of 4 in 0 s" for number in range(2, 2 + len(lines))
        ]
        assert len(lines) <= 2 and all(line.startswith(field) for line in lines)
        assert lines or name == "cut", "of a connection that breaks the hub's client goes on itself"
    assert "Retrying" not in said, "the hub's own client talks, too"


def test_a_hub_that_stays_out_is_named_once_with_what_to_do(asked):
    _, found, said, *_ = asked
    for kind, field in (("model", "model.source"), ("data", "data.harmful")):
        name = f"of/out-{kind}"
        assert found[name].startswith(f"SettingError: {field} = '{name}'") or kind == "data"
        assert found[name].count(name) >= 1 and "503" in found[name]
        assert "the same command again, which continues; or download it" in found[name]
        assert len(lines_about(said, name)) == 3


@pytest.mark.parametrize("name", ["gated-model", "private-model", "gated-data"])
def test_a_refusal_is_said_at_once(asked, name):
    _, found, said, took, _ = asked
    assert "Error: " in found[f"of/{name}"] and "continues" not in found[f"of/{name}"]
    assert not lines_about(said, f"of/{name}") and took[f"of/{name}"] < 2


def test_what_is_in_the_cache_needs_no_hub(asked, repositories):
    *_, home = asked
    server = HubServer(repositories, [("of/busy-model", "*", 500, 10**6)])
    try:
        found, said, took = ask(server.url, home, ("config", "of/busy-model"))
    finally:
        server.shutdown()
    assert found == {"of/busy-model": "llama"}
    assert sum(server.asked.values()) and "try 2" not in said
    assert took["of/busy-model"] < 10


def test_the_tries_end_within_two_minutes():
    """Beside what one of them takes: the hub's client has a patience of its own."""
    assert sum(WAITS) <= 60 and LONGEST_S <= 120


def test_a_call_that_takes_long_is_not_made_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(outages.time, "sleep", lambda seconds: None)

    def call():
        now[0] += LONGEST_S - WAITS[0]
        raise TimeoutError("nobody there")

    with pytest.raises(TimeoutError):
        through_outages(call, "it")
    assert now[0] == 2 * (LONGEST_S - WAITS[0])
