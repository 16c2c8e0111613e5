"""Notebooks on saved models of other families: by changing the profile only."""

import json

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from saved_families import FAMILIES, OTHERS, saved_model

from latlib.batch import TokenRow, collate
from latlib.config.profile import Profile, load_profile, validated
from latlib.experiment.run import Run


def run_notebooks(family: str, names: list[str], tmp_path, monkeypatch, root, **evaluation) -> Run:
    """The run that notebooks leave which are executed on a saved model; `evaluation` replaces
    settings of `smoke`.
    """
    saved_model(family, tmp_path / "model")
    tree = yaml.safe_load((root / "profiles" / "smoke.yaml").read_text())
    tree |= {
        "name": f"smoke-{family}",
        "seeds": [0],
        "model": {"source": str(tmp_path / "model"), "dtype": "float32"},
    }
    tree["data"]["source"] = "world"
    tree["lora"]["targets"] = FAMILIES[family][2]
    tree["evaluation"] |= evaluation
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("LATLIB_PROFILE", str(tmp_path / "profile.yaml"))
    monkeypatch.setenv("LATLIB_RUNS", str(tmp_path / "runs"))
    for name in names:
        path = root / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(
            notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
        ).execute()
    return Run(load_profile(tmp_path / "profile.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_notebook_04_runs_on_a_saved_model(family, tmp_path, monkeypatch, root):
    run = run_notebooks(family, ["04_refusal_svd"], tmp_path, monkeypatch, root)
    assert run.differences("lat").pairs[0].shape == (16, 2 if family == "gpt_neox" else 1, 32)
    assert {m for m in run.outcomes()["method"]} == {"base", *run.profile.methods}


@pytest.mark.slow
def test_audit_and_attacks_run_on_a_saved_model_without_anything_optional(
    tmp_path, monkeypatch, root
):
    bare = {
        "further_encodings": [],
        "embedding_eps": [],
        "rules": [],
        "eps": [0.05],
        "suffix": {"steps": 0},
    }
    run = run_notebooks(
        "qwen2", ["05_leetspeak_audit", "06_robustness"], tmp_path, monkeypatch, root, **bare
    )
    found = run.outcomes()
    assert set(found["encoding"]) == set(run.profile.evaluation.encodings)
    assert {"pgd", "one-step", "pgd-restarts", "transfer", "many-shot"} <= set(found["attack"])
    assert "ssft" in set(found[found["attack"] == "transfer"]["source"])
    assert (
        not set(found["attack"]) & {"suffix-gcg", "pgd-sign"} and run.result("robustness")["panel"]
    )


@pytest.mark.parametrize("family", OTHERS)
def test_another_family_is_trained_attacked_and_audited_by_its_profile_alone(
    family, tmp_path, root
):
    """On prompts from files, at sites given as shares of depth."""
    saved_model(family, tmp_path / "model")
    tree = yaml.safe_load((root / "profiles" / "smoke.yaml").read_text())
    tree |= {
        "name": family,
        "seeds": [0],
        "model": {"source": str(tmp_path / "model"), "dtype": "float32"},
    }
    rows = [
        {"goal": f"explain topic {i} {'abcdefgh'[i % 8] * 9}", "target": f"Sure, topic {i}"}
        for i in range(24)
    ]
    (tmp_path / "harmful.json").write_text(json.dumps(rows))
    (tmp_path / "benign.json").write_text(
        json.dumps([{"instruction": f"{i} {'stuvwxyz'[i % 8] * 9}"} for i in range(24)])
    )
    files = {"harmful": str(tmp_path / "harmful.json"), "benign": str(tmp_path / "benign.json")}
    tree["data"] = {"source": "files", **files, "near_duplicate": 0.95}
    tree["lora"]["targets"] = OTHERS[family][2]
    tree["train"]["attack"]["sites"] = ["embedding", 0.25, 0.75]
    tree["methods"], tree["roles"] = {"lat": {}}, {}
    tree["evaluation"] |= {
        "prompts": 3,
        "pgd_prompts": 3,
        "ablation_prompts": 3,
        "pairs": 4,
        "random_directions": 1,
    }
    tree["evaluation"] |= {
        "encodings": ["plain"],
        "further_encodings": [],
        "max_new_tokens": 3,
        "eps": [0.2],
        "rules": [],
    }
    run = Run(validated(Profile, tree), tmp_path / "run")
    lm, base = run.model("lat", 0), run.model("base", 0)
    assert {str(site) for site in run.card("lat", 0)["eps"]} == {"embedding", "1", "3"}
    ids = torch.arange(5, 25)[None]
    batch = collate([TokenRow(tuple(ids[0].tolist()), ((7,),))])
    with torch.no_grad():
        for model in (lm, base):
            expected = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            network = model.network()
            torch.testing.assert_close(
                network.unembed(network.hidden(batch)), expected, rtol=1e-4, atol=1e-5
            )
    assert not torch.equal(lm.network().hidden(batch), base.network().hidden(batch)), (
        "nothing was trained"
    )
    for suite in ("audit", "robustness", "ablation"):
        found = run.evaluate("lat", 0, suite)
        assert len(found) and set(found["outcome"]) <= {"refused", "complied", "neither"}
