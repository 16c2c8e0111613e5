"""Every notebook on a saved model and on AdvBench- and Alpaca-like files: by changing the profile
only.

The files are the real ones where `shared/data` lies beside the checkout, and made up in their form
where it does not.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from rows_in_files import texts
from saved_families import FAMILIES, saved_model

from latlib.config.profile import load_profile
from latlib.config.sections import ProfileError
from latlib.data.splits import check_overlap
from latlib.experiment.run import Run
from latlib.report.evidence import Evidence

pytestmark = pytest.mark.slow
FAMILY = "qwen2"


@pytest.fixture(scope="module")
def files(root, tmp_path_factory):
    """(harmful CSV with goal and target, harmless JSON for training, harmless JSON for results)."""
    shared = root.parent / "shared" / "data"
    if shared.is_dir():
        return tuple(
            str(shared / f) for f in ("advbench.csv", "harmless_train.json", "harmless_test.json")
        )
    folder = tmp_path_factory.mktemp("files")
    harmful = [{"goal": t, "target": f"Sure, this is how to {t[8:-1]}"} for t in texts("explain ")]
    pd.DataFrame(harmful).to_csv(folder / "advbench.csv", index=False)
    for name, start in (("train", "why should anybody "), ("test", "when is it time to ")):
        harmless = [{"instruction": t, "category": None} for t in texts(start)]
        (folder / f"harmless_{name}.json").write_text(json.dumps(harmless))
    return tuple(
        str(folder / f) for f in ("advbench.csv", "harmless_train.json", "harmless_test.json")
    )


@pytest.fixture(scope="module")
def tree(root, files, tmp_path_factory):
    """A profile: small sizes, a saved model, those files."""
    folder = tmp_path_factory.mktemp("model")
    saved_model(FAMILY, folder)
    tree = yaml.safe_load((root / "profiles" / "smoke.yaml").read_text())
    tree |= {"name": "real", "seeds": [0], "model": {"source": str(folder), "dtype": "float32"}}
    tree["lora"]["targets"] = FAMILIES[FAMILY][2]
    harmful, benign, test_benign = files
    tree["data"] = {
        "source": "files",
        "rows": 200,
        "harmful": harmful,
        "benign": benign,
        "test_benign": test_benign,
    }
    tree["data"] |= {"max_tokens": 300, "too_long": "drop", "system_prompt": "answer briefly ."}
    tree["evaluation"] |= {
        "prompts": 8,
        "pgd_prompts": 4,
        "ablation_prompts": 4,
        "pairs": 8,
        "random_directions": 1,
    }
    tree["evaluation"] |= {
        "encodings": ["plain", "leet"],
        "further_encodings": ["base64", "plain>leet"],
    }
    tree["evaluation"] |= {"max_new_tokens": 4}
    return tree


def pipeline(profile_file, out, *more):
    command = [
        sys.executable,
        "-m",
        "latlib.runner.pipeline",
        "--profile",
        str(profile_file),
        "--out",
        str(out),
        *more,
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """(what the pipeline printed, the run) of all notebooks."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "model").symlink_to(tree["model"]["source"])  # named as it lies beside the profile
    beside = {**tree, "model": {**tree["model"], "source": "model"}}
    (folder / "real.yaml").write_text(yaml.safe_dump(beside))
    done = pipeline(folder / "real.yaml", folder / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, Run(load_profile(folder / "real.yaml"), folder / "out")


def test_every_notebook_and_the_report(finished, root):
    printed, run = finished
    names = sorted(path.name for path in (root / "notebooks").glob("[0-9]*.ipynb"))
    assert (
        sorted(path.name for path in (run.folder / "notebooks").glob("*.ipynb")) == names
        and len(names) == 8
    )
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "real prompts" in report and "Which of the papers" in report and "report.html" in printed


def test_every_suite_was_measured_on_held_out_prompts(finished):
    _, run = finished
    outcomes = run.outcomes()
    assert set(outcomes["method"]) >= {"base", "ssft", "at", "lat", "lat-untargeted"}
    assert {
        "none",
        "prefill",
        "pgd",
        "noise",
        "many-shot",
        "system",
        "suffix-gcg",
        "transfer",
    } <= set(outcomes["attack"])
    assert set(outcomes["prompts"]) == {"harmful", "harmless", "twin"}
    assert (
        set(outcomes["outcome"]) <= {"refused", "complied", "neither"}
        and outcomes["exact"].isna().all()
    )
    asked = outcomes[
        outcomes["attack"].isin(["none", "prefill"])
        & (outcomes["intervention"] == "none")
        & outcomes["prompts"].isin(["harmful", "twin"])
    ]
    assert not asked["understood"].isna().any()
    assert not Evidence.load(run.folder / "results").outcomes.empty


def test_no_reply_is_shown_or_kept(finished):
    """Replies appear as their length and a hash; a refusal's own first words may be shown."""
    _, run = finished
    kept = run.outcomes()["text"]
    assert (
        kept[kept != ""]
        .str.fullmatch(r"\[\d+ characters, sha256 [0-9a-f]{12}(, begins: .*)?\]")
        .all()
    )
    assert (kept != "").any()
    for name in ("02_pgd_attack", "05_leetspeak_audit"):
        cells = nbformat.read(run.folder / "notebooks" / f"{name}.ipynb", as_version=4).cells
        shown = [str(output) for cell in cells for output in cell.get("outputs", ())]
        assert any("characters, sha256" in text for text in shown)


def test_what_it_learned_from_is_shown(finished):
    _, run = finished
    cells = nbformat.read(run.folder / "notebooks" / "03_lat_training.ipynb", as_version=4).cells
    shown = "".join(str(output) for cell in cells for output in cell.get("outputs", ()))
    for word in ("clusters", "over", "dropped", "default_completions", "prompt_median"):
        assert word in shown


def test_a_prompt_that_is_trained_and_tested_on_stops_the_run_before_anything_is_made(
    tree, files, tmp_path
):
    harmful = pd.read_csv(files[0])
    fresh = pd.DataFrame({"goal": texts("who would ever ")[:20], "target": "Sure, somebody would"})
    shared = pd.concat([fresh, harmful.sample(1, random_state=0)])
    shared.to_csv(tmp_path / "test.csv", index=False)
    changed = {
        **tree,
        "data": {**tree["data"], "rows": 4000, "test_harmful": str(tmp_path / "test.csv")},
    }
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(changed))
    stopped = pipeline(tmp_path / "real.yaml", tmp_path / "out")
    assert stopped.returncode == 3, stopped.stdout + stopped.stderr
    assert "missing: overlap" in stopped.stderr and "equal to a test" in stopped.stderr
    assert "remove those rows" in stopped.stderr and "--unchecked" in stopped.stderr
    assert not list((tmp_path / "out").rglob("*.ipynb")) and not list(
        (tmp_path / "out").rglob("*.safetensors")
    )
    goal = shared["goal"].iloc[-1]
    near = pd.concat([fresh, pd.DataFrame({"goal": [f"  {goal.upper()} !!"], "target": "Sure"})])
    near.to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(ProfileError, match="equal to a test"):
        check_overlap(load_profile(tmp_path / "real.yaml").data)
    fresh.to_csv(tmp_path / "test.csv", index=False)
    check_overlap(load_profile(tmp_path / "real.yaml").data)


def test_somebodys_models_are_evaluated_and_not_trained(finished, tree, tmp_path):
    """A released adapter and a released model: what is measured on them is what was measured where
    they were made.
    """
    _, run = finished
    released = {
        "ssft": tree["model"]["source"],
        "lat": str(run.layout.model_folder(run.spec("lat", 0))),
    }
    changed = {**tree, "name": "released", "released": released, "sweep": {"variants": {}}}
    changed["methods"] = {name: tree["methods"][name] for name in released}
    changed["roles"] = {"undefended": "ssft", "main": "lat"}
    (tmp_path / "released.yaml").write_text(yaml.safe_dump(changed))
    done = pipeline(tmp_path / "released.yaml", tmp_path / "out", "--only", "03,05,99")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "out" / "models").iterdir()) and not list(
        (tmp_path / "out" / "metrics").iterdir()
    )
    here = Run(load_profile(tmp_path / "released.yaml"), tmp_path / "out")
    columns = ["prompts", "attack", "encoding", "prompt_id", "outcome", "text"]
    pd.testing.assert_frame_equal(here.evaluate("lat", 0)[columns], run.evaluate("lat", 0)[columns])
    pd.testing.assert_frame_equal(
        here.evaluate("ssft", 0)[columns], run.evaluate("base", 0)[columns]
    )
    with pytest.raises(ProfileError, match="lat is not made here"):
        here.card("lat")
    with pytest.raises(ProfileError, match="released.lat, which is not trained here"):
        here.model("lat", 0, {"attack.eps": 0.2})


def test_a_model_of_the_hub_is_named_by_its_id_everywhere(tree, tmp_path):
    """From a hub cache without a network: loaded, trained on, put beside a released one, and
    merged.
    """
    source, snapshot = (
        Path(tree["model"]["source"]),
        tmp_path / "hub" / "models--someone--chat" / "snapshots" / "abc",
    )
    shutil.copytree(source, snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    changed = {
        **tree,
        "model": {**tree["model"], "source": "someone/chat"},
        "sweep": {"variants": {}},
    }
    changed |= {
        "methods": {"ssft": {}, "lat": tree["methods"]["lat"]},
        "roles": {"undefended": "ssft", "main": "lat"},
        "released": {"ssft": "someone/chat"},
    }
    (tmp_path / "hub.yaml").write_text(yaml.safe_dump(changed))
    script = f"""
import torch
from latlib.experiment.export_model import export
from latlib.experiment.released import load_tokenizer
from latlib.experiment.run import Run
run = Run({str(tmp_path / "hub.yaml")!r}, {str(tmp_path / "out")!r})
base, ssft, lat = (run.model(method) for method in ("base", "ssft", "lat"))
ids = torch.tensor([[5, 6, 7]])
assert torch.equal(base.model(input_ids=ids).logits, ssft.model(input_ids=ids).logits)
assert not torch.equal(base.model(input_ids=ids).logits, lat.model(input_ids=ids).logits)
assert load_tokenizer(run.layout.model_folder(run.spec("base")), run.profile.model).chat_template
export(run, "lat", 0, {str(tmp_path / "merged")!r})
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    adapter = json.loads(
        (tmp_path / "out" / "models" / "lat-seed0" / "adapter_config.json").read_text()
    )
    assert adapter["base_model_name_or_path"] == "someone/chat"
    assert "`someone/chat`" in (tmp_path / "merged" / "README.md").read_text()
