"""Committed evidence is clean: executed notebooks said nothing on stderr, nothing in them or in the
report warns, and no place on somebody's machine is named.
"""

import json
import re
from pathlib import Path

import house
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

RESULTS = Path(__file__).resolve().parents[2] / "results"
TEXTS = (".ipynb", ".html", ".json", ".jsonl", ".yaml", ".md")
FILES = sorted(file for file in RESULTS.rglob("*") if file.suffix in TEXTS)
# what house.MACHINE does not know, for docs may name it
PLACE = re.compile(
    r"(?<![\w.~-])/(?:home|tmp|workspace|mnt|opt|usr|var|private|scratch)/\w|[A-Z]:\\+Users\\"
)
WARNING = re.compile(r"\b\w+Warning\b")
IMAGE = re.compile(r'data:image/[^"]*|"image/(?:png|jpeg)": "[^"]*"')
HOMES = [f"/{folder}" + "/ada" for folder in ("home", "Users", "root", "tmp")]


def noise(name: str, text: str) -> list[str]:
    """What is in a file that no reader should see."""
    found = []
    if name.endswith(".ipynb"):
        for cell in nbformat.reads(text, as_version=4).cells:
            for output in cell.get("outputs", ()):
                if output.get("name") == "stderr":
                    found.append(f"stderr: {output.text}")
    words = IMAGE.sub("", text)
    for pattern in (house.MACHINE, PLACE, WARNING):
        for match in pattern.finditer(words):
            found.append(words[max(match.start() - 60, 0) : match.end() + 60])
    return found


def notebook_with(*outputs):
    return nbformat.writes(new_notebook(cells=[new_code_cell("x", outputs=list(outputs))]))


@pytest.mark.parametrize(
    "text",
    [
        notebook_with(new_output("stream", name="stderr", text="3 rows are cut")),
        notebook_with(new_output("stream", text="stats.py:71: RuntimeWarning: invalid value")),
        *(notebook_with(new_output("display_data", {"text/html": f"<p>{at}/x"})) for at in HOMES),
        nbformat.writes(new_notebook(metadata={"papermill": {"input_path": f"{HOMES[0]}/01"}})),
        json.dumps("C:" + r"\Users\ada"),
    ],
)
def test_noise_is_found(text):
    name = "a.ipynb" if '"nbformat"' in text else "a.json"
    assert noise(name, text)


def test_what_is_no_noise_is_passed_by():
    image = {"image/png": "iVBO+/tmp/x/RuntimeWarning/home/a"}
    shown = new_output("display_data", image, metadata={"image/png": {"alt": "ASR by eps"}})
    said = new_output("stream", text="runs/tiny, ./latlib, ~/models, https://a.org/home/b")
    assert not noise("a.ipynb", notebook_with(shown, said))
    assert not noise("a.html", "<img src='data:image/png;base64,+/tmp/a'> a warning, profiles/tmp")


def test_there_is_evidence():
    assert {file.name for file in FILES} >= {"report.html", "01_hooks.ipynb", "99_report.ipynb"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(RESULTS)))
def test_it_has_no_noise(file):
    assert not noise(file.name, file.read_text(encoding="utf-8"))
