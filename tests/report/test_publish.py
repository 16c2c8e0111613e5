"""Publishing copies a finished run's evidence, without anybody's paths, whole or not at all."""

import json
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from nbformat.v4 import new_output

from latlib.io import manifest
from latlib.report import publish

README = "# x\n<!-- timing:begin -->\nold\n<!-- timing:end -->\ntail\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "tiny"
    for name in ("results/outcomes", "notebooks", "metrics", "models/lat-seed0"):
        (folder / name).mkdir(parents=True)
    (folder / "report.html").write_text(f"<p>made in {folder}/notebooks</p>")
    (folder / "profile.yaml").write_text("name: tiny\n")
    (folder / "began.json").write_text("{}")
    (folder / "models" / "lat-seed0" / "latlib.json").write_text('{"seconds": 60.04}')
    (folder / "results" / "claims.json").write_text("[]")
    (folder / "results" / "main_figure.png").write_bytes(b"png")
    (folder / "metrics" / "lat-seed0.jsonl").write_text('{"step": 1, "kl": 0.30000001192092896}\n')
    (folder / "models" / "lat-seed0" / "adapter.bin").write_bytes(b"0" * 100)
    for seed in (0, 1):
        pd.DataFrame({"seed": [seed]}).to_parquet(
            folder / "results" / "outcomes" / f"audit-{seed}.parquet"
        )
    table = {"text/html": "<table>rich", "text/plain": "a table, poor"}
    shown = [new_output("display_data", data) for data in (table, {"text/plain": "alone"})]
    cell = nbformat.v4.new_code_cell(f"out = '{folder}'", outputs=shown)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["papermill"] = {"duration": 90.04, "output_path": str(folder)}
    nbformat.write(notebook, folder / "notebooks" / "01_hooks.ipynb")
    return folder


def test_evidence_is_copied_without_models_or_paths(run, tmp_path):
    target = tmp_path / "results" / "tiny"
    publish.publish(run, target)
    copied = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    expected = {
        "report.html",
        "profile.yaml",
        "claims.json",
        "main_figure.png",
        "timing.json",
        "latlib.sha256",
        "outcomes/all.parquet",
    }
    assert copied == expected | {"metrics/lat-seed0.jsonl", "notebooks/01_hooks.ipynb"}
    assert pd.read_parquet(target / "outcomes")["seed"].tolist() == [0, 1]
    texts = [
        p.read_text()
        for p in target.rglob("*")
        if p.suffix in (".html", ".ipynb", ".json", ".yaml")
    ]
    assert not any(str(tmp_path) in text for text in texts)
    assert "runs/tiny/notebooks" in (target / "report.html").read_text()
    (cell,) = nbformat.read(target / "notebooks" / "01_hooks.ipynb", as_version=4).cells
    assert [dict(output.data) for output in cell.outputs] == [
        {"text/html": "<table>rich"},
        {"text/plain": "alone"},
    ]
    (curve,) = (target / "metrics" / "lat-seed0.jsonl").read_text().splitlines()
    assert json.loads(curve) == {"step": 1, "kl": 0.300000012}
    took = json.loads((target / "timing.json").read_text())
    assert took["notebooks"] == {"01_hooks": 90.0}
    assert (took["models"], took["training_s"]) == (1, 60.0)


def test_an_unfinished_run_is_refused_and_the_old_evidence_stays(run, tmp_path):
    target = tmp_path / "results" / "tiny"
    publish.publish(run, target)
    (run / "report.html").unlink()
    with pytest.raises(FileNotFoundError, match="finish the run"):
        publish.publish(run, target)
    assert (target / "report.html").is_file()


def test_too_much_evidence_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "LIMIT_BYTES", 100)
    with pytest.raises(ValueError, match="the largest file is"):
        publish.publish(run, tmp_path / "results")
    assert not (tmp_path / "results").exists()
    assert not [p for p in Path(tmp_path).iterdir() if p.name.startswith(".results")]


def test_the_readme_says_how_long_it_took():
    notebooks = {"01_hooks": 90.0, "02_pgd_attack": 30.0}
    took = {"cores": 2, "resumed": False, "notebooks": notebooks}
    text = publish.with_timing(README, took)
    assert (
        "On 2 CPU cores the committed run took 2.0 minutes" in text
        and "old" not in text
        and text.endswith("tail\n")
    )
    with pytest.raises(ValueError, match="markers"):
        publish.with_timing("no markers", took)


def test_a_run_of_several_sittings_is_not_timed_by_its_last(run):
    began = (run / "began.json").stat().st_mtime
    file = run / "notebooks" / "01_hooks.ipynb"
    for minutes, said in ((1, "the committed run took 1.5"), (60, "the last of several sittings")):
        notebook = nbformat.read(file, as_version=4)
        started = datetime.fromtimestamp(began + 60 * minutes, UTC).isoformat()
        notebook.metadata["papermill"]["start_time"] = started
        nbformat.write(notebook, file)
        assert said in publish.with_timing(README, publish.timing(run))


def test_published_evidence_becomes_a_run_again_and_says_what_that_took(run, tmp_path):
    published, again = tmp_path / "results" / "tiny", tmp_path / "runs" / "again"
    publish.main([str(run), str(published)])
    took = publish.timing(run)
    publish.main(["--restore", str(published), str(again)])
    nbformat.write(nbformat.v4.new_notebook(), again / "notebooks" / "99_report.ipynb")
    assert publish.timing(again) == took
    assert "report.html" in manifest.listed(again)
    assert pd.read_parquet(again / "results" / "outcomes")["seed"].tolist() == [0, 1]
    second = tmp_path / "second"
    publish.publish(again, second)
    listed = {file.relative_to(published) for file in published.rglob("*") if file.is_file()}
    here = {file.relative_to(second) for file in second.rglob("*") if file.is_file()}
    assert here == listed | {Path("notebooks/99_report.ipynb")}
    with pytest.raises(SystemExit, match="there already"):
        publish.main(["--restore", str(published), str(again)])


def test_damaged_evidence_is_not_restored(run, tmp_path):
    published = tmp_path / "results"
    publish.publish(run, published)
    (published / "claims.json").write_text("[1]")
    for folder, words in ((published, "claims.json"), (run, "no published results")):
        with pytest.raises(SystemExit, match=words):
            publish.main(["--restore", str(folder), str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_a_published_profile_names_no_place_of_a_file(tmp_path):
    file = tmp_path / "profile.yaml"
    file.write_text("data: {harmful: /srv/ada/advbench.csv, rows: 5}\nmodel: {source: org/name}\n")
    tree = yaml.safe_load(publish._text(file, tmp_path / "run"))
    assert tree == {"data": {"harmful": "advbench.csv", "rows": 5}, "model": {"source": "org/name"}}


@pytest.mark.parametrize(("source", "shown"), [("files", False), ("world", True)])
def test_prompts_from_data_files_stay_in_the_run(run, tmp_path, source, shown):
    (run / "profile.yaml").write_text(yaml.safe_dump({"name": "mine", "data": {"source": source}}))
    file = run / "notebooks" / "01_hooks.ipynb"
    notebook = nbformat.read(file, as_version=4)
    (cell,) = notebook.cells
    cell.metadata["tags"] = ["shows-prompts"]
    cell.outputs = [new_output("display_data", {"text/markdown": "Prompt: *somebody's*"})]
    nbformat.write(notebook, file)
    publish.publish(run, tmp_path / "published")
    text = (tmp_path / "published" / "notebooks" / "01_hooks.ipynb").read_text()
    assert ("somebody's" in text) is shown
    assert "somebody's" in file.read_text()


def test_cells_that_quote_a_prompt_have_the_tag(root):
    quoting = 0
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "verbatim(prompt" in cell.source or "display(pd.DataFrame(written" in cell.source:
                quoting += 1
                assert publish.SHOWS_PROMPTS in cell.metadata.get("tags", ()), path.name
    assert quoting == 3
