"""The command that sets predictions beside what a GPU shows, on a CPU with a tiny model."""

import json

import pytest
from transformers import LlamaConfig


@pytest.fixture
def gpu_profile(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import gpu_profile

    return gpu_profile


def test_a_run_is_killed_resumed_and_written_down(gpu_profile, tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=5,
        num_attention_heads=2,
    )
    config.save_pretrained(tmp_path / "model")
    arguments = [
        "--profile",
        "smoke",
        "--device",
        "cpu",
        "--config",
        str(tmp_path / "model" / "config.json"),
    ]
    arguments += [
        "--steps",
        "4",
        "--prompt",
        "5",
        "--completion",
        "3",
        "--json",
        str(tmp_path / "out.json"),
    ]
    found = gpu_profile.main(arguments)
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(found))
    assert [(s["step"], s["resumed"]) for s in found["steps"]] == [(1, 0), (2, 0), (3, 2), (4, 2)]
    assert found["resumed_at"] == 2 and found["predicted"]["total"] > 0
    assert found["measured"]["peak_bytes"] is None and found["measured"]["seconds_per_step"] > 0
    assert found["hours_of_the_run"] == pytest.approx(
        found["measured"]["seconds_per_step"] * 6 / 3600
    )
    assert (
        "commit" in found["environment"]
        and "killed and resumed at step 2" in capsys.readouterr().out
    )


def test_a_child_that_fails_is_said(gpu_profile, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    arguments = ["--device", "cpu", "--steps", "4", "--config", str(tmp_path / "config.json")]
    with pytest.raises((ValueError, RuntimeError)):
        gpu_profile.main(arguments)
    with pytest.raises(SystemExit):
        gpu_profile.main(["--steps", "3"])
