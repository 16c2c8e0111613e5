"""Every notebook on a saved model and on AdvBench- and Alpaca-like files: by changing the profile
only.

The files are the real ones where `shared/data` lies beside the checkout, and made up in their form
where it does not. Every prompt and reply in them ends in a text that would act if it were taken for
markup, the run's names are of that kind, and its environment is full of secrets.
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
import torch
import yaml
from browser import barriers, opened
from hostile import ACT, NAME, SECRETS, TEXTS, acting, made_hostile, readable
from nbconvert.exporters import HTMLExporter
from rows_in_files import texts
from saved_families import FAMILIES, saved_model
from tiny_models import world_tokenizer
from transformers import AutoModelForCausalLM

from latlib.config.profile import load_profile
from latlib.config.sections import ProfileError
from latlib.data.splits import check_overlap
from latlib.experiment.run import Run
from latlib.report.evidence import Evidence
from latlib.report.publish import publish
from latlib.runner.pipeline import ON_REQUEST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # a whole run, on a busy machine
FAMILY = "qwen2"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Somebody's home, whose name is a secret: all that is made lies in it."""
    folder = tmp_path_factory.mktemp("home") / SECRETS["HOME"]
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def files(root, home):
    """(harmful CSV with goal and target, harmless JSON for training, harmless JSON for results)."""
    shared = root.parent / "shared" / "data"
    if shared.is_dir():
        harmful = pd.read_csv(shared / "advbench.csv")
    else:
        goals = texts("explain ")
        targets = [f"Sure, this is how to {goal[8:-1]}" for goal in goals]
        harmful = pd.DataFrame({"goal": goals, "target": targets})
    paths = [home / f"{NAME}.csv"]
    harmful.apply(made_hostile).to_csv(paths[0], index=False)
    for name, start in (("train", "why should anybody "), ("test", "when is it time to ")):
        paths.append(home / f"harmless_{name}.json")
        harmless = texts(start)
        if shared.is_dir():
            harmless = pd.read_json(shared / paths[-1].name)["instruction"]
        rows = [{"instruction": t, "category": None} for t in made_hostile(harmless)]
        paths[-1].write_text(json.dumps(rows))
    return tuple(map(str, paths))


@pytest.fixture(scope="module")
def tree(root, files, home):
    """A profile: small sizes, a saved model, those files."""
    folder = home / "model"
    saved_model(FAMILY, folder)
    talking = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # else it repeats the turn's mark, which is no text
        talking.get_input_embeddings().weight[world_tokenizer().all_special_ids] = 0
    # real prompts are long in this tokenizer, and longer encoded or behind a shot
    talking.config.max_position_embeddings = 1024
    talking.save_pretrained(folder)
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
    tree["data"] |= {"max_tokens": 400, "too_long": "drop"}
    tree["data"]["near_duplicate"] = 0.95  # many end alike
    tree["data"]["system_prompt"] = f"answer briefly . {TEXTS[0]}"
    tree |= {"description": TEXTS[1], "tracking": {"wandb": "offline"}}
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
    tree["evaluation"] |= {"max_new_tokens": 4, "shots": 1}
    return tree


def pipeline(profile_file, out, *more, cwd=None, **environment):
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
        timeout=1400,
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.fixture(scope="module")
def finished(tree, home, root):
    """(what the pipeline printed, the run) of all notebooks; the package, too, lies in the home."""
    (home / NAME).symlink_to(tree["model"]["source"])  # named as it lies beside the profile
    beside = {**tree, "model": {**tree["model"], "source": NAME}}
    (home / "real.yaml").write_text(yaml.safe_dump(beside))
    (home / "checkout").symlink_to(root)
    places = {"HOME": home, "PYTHONPATH": home / "checkout", "WANDB_CACHE_DIR": home / "cache"}
    environment = SECRETS | {name: str(place) for name, place in places.items()}
    out = home / f"run {NAME}"
    done = pipeline(home / "real.yaml", out, cwd=home, **environment)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    return printed, Run(load_profile(home / "real.yaml"), out)


def test_every_notebook_and_the_report(finished, root):
    printed, run = finished
    there = (root / "notebooks").glob("[0-9]*.ipynb")
    names = sorted(path.name for path in there if path.stem not in ON_REQUEST)
    assert sorted(path.name for path in (run.folder / "notebooks").glob("*.ipynb")) == names
    report = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "real prompts" in report and "at what price?" in report and "report.html" in printed


@pytest.fixture(scope="module")
def shown(finished, tmp_path_factory):
    """A folder of all that a reader is given: the report, the published evidence, and every
    executed notebook of either as nbconvert exports it."""
    _, run = finished
    folder = tmp_path_factory.mktemp("shown") / "evidence"
    publish(run.folder, folder)
    for notebooks in (run.folder / "notebooks", folder / "notebooks"):
        for notebook in sorted(notebooks.glob("*.ipynb")):
            html, _ = HTMLExporter().from_filename(str(notebook))
            place = folder.parent / f"{notebooks.parent.name}-{notebook.stem}.html"
            place.write_text(html, encoding="utf-8")
    return folder.parent


def test_no_secret_and_nobodys_home_is_in_any_byte(finished, shown):
    printed, run = finished
    found = [name for name, value in SECRETS.items() if value in printed and name != "HOME"]
    assert not found, printed
    entries = [(folder, entry) for folder in (run.folder, shown) for entry in folder.rglob("*")]
    files = [entry for _, entry in entries if entry.is_file()]
    kinds = {file.suffix for file in files}
    assert {".parquet", ".json", ".ipynb", ".html", ".wandb", ".safetensors", ".log"} <= kinds
    for folder, entry in entries:
        content = readable(entry) + str(entry.relative_to(folder)).encode()
        found += [
            (entry.name, name) for name, value in SECRETS.items() if value.encode() in content
        ]
    assert not found


def pages_of(run, shown):
    pages = sorted({run.folder / "report.html", *shown.rglob("*.html")})
    assert len(pages) == 2 * len(list((run.folder / "notebooks").glob("*.ipynb"))) + 2
    return pages


def test_no_text_became_an_element(finished, shown):
    for page in pages_of(finished[1], shown):
        assert not acting(page.read_text(encoding="utf-8")), page.name


def test_no_prompt_in_a_table_is_a_formula(finished):
    cells = nbformat.read(finished[1].folder / "notebooks/05_leetspeak_audit.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    tables = [
        output.data["text/html"] for output in outputs if "text/html" in output.get("data", ())
    ]
    with_prompts = [table for table in tables if "pwned" in table]
    assert with_prompts and all("mathjax_ignore" in table for table in with_prompts)


def test_nothing_in_a_page_acts(finished, shown, chromium):
    texts_shown = ""
    for page in pages_of(finished[1], shown):
        seen = opened(chromium, page)
        assert not seen.acts, f"{page.name}: {seen}"
        assert page.name != "report.html" or not (seen.errors or seen.libraries), seen
        texts_shown += seen.text
    assert ACT in texts_shown, "no hostile text was shown at all"


def test_axe_finds_nothing_grave_in_a_page(finished, shown, chromium):
    found = {page.name: barriers(chromium, page) for page in pages_of(finished[1], shown)}
    assert not {name: rules for name, rules in found.items() if rules}


def test_a_text_that_acts_is_seen(chromium, tmp_path):
    """What the browser looks for happens where the texts are put into a page as they are."""
    for number, text in enumerate(TEXTS):
        file = tmp_path / f"{number}.html"
        file.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{text}", encoding="utf-8")
        acted = "<" in text and not text.startswith("|")
        assert opened(chromium, file).acts or not acted, text


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
    """A released adapter, named by its seed, and a released model: what is measured on them is
    what was measured where they were made.
    """
    _, run = finished
    (tmp_path / f"{NAME} 0").symlink_to(run.layout.model_folder(run.spec("lat", 0)))
    released = {"ssft": tree["model"]["source"], "lat": str(tmp_path / f"{NAME} {{seed}}")}
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
    html, _ = HTMLExporter().from_filename(str(here.folder / "notebooks/03_lat_training.ipynb"))
    assert "it is it's" in html and not acting(html)
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
