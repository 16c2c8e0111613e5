"""What a reader does with every notebook in JupyterLab: runs it, interrupts it, restarts it, turns
its widgets, saves it and opens it again.
"""

import shutil
import time
from pathlib import Path

import pytest
import yaml
from lab import PATIENCE_S, Lab, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # each, on a busy machine
FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NAMES = sorted(file.name for file in FOLDER.glob("*.ipynb"))
INTERRUPTED = "02_pgd_attack.ipynb"  # while it trains
RESTARTED = "02_pgd_attack.ipynb"
SEEN = """
() => [...document.querySelectorAll(".jp-Notebook .jp-OutputArea-output")].map(
  area => area.textContent + ` and ${area.querySelectorAll("img, svg").length} pictures`
)
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """`smoke` with a radius and a rate of training that change what its models reply."""
    settings = yaml.safe_load((FOLDER.parent / "profiles" / "smoke.yaml").read_text())
    settings["evaluation"]["eps"] = [0.05, 0.2, 20.0]
    settings["seeds"] = [0]  # nbval runs them with two
    settings["train"]["lr"] = 0.03  # it learns to refuse, so that a direction does something
    file = tmp_path_factory.mktemp("profile") / "lab.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def address(profile, tmp_path_factory):
    """Of a server on copies of the notebooks, which share a run folder: a model is made once."""
    folder = tmp_path_factory.mktemp("lab")
    for name in NAMES:
        shutil.copy(FOLDER / name, folder)
    runs = str(tmp_path_factory.mktemp("runs"))
    environment = {
        "LATLIB_PROFILE": str(profile),
        "LATLIB_RUNS": runs,
        "LATLIB_BATCH": "",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a new kernel's warning about its debugger
    }
    with served(folder, environment) as found:
        yield found


@pytest.fixture
def lab(address, chromium):
    return Lab(chromium.new_page(), address)


def rows_of(lab):
    """Rows of a widget's table: model, change, outcome, reply."""
    rows = lab.page.locator(".widget-interact tbody tr")
    return rows.evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def until(lab, reached, found=None):
    """What is found, rows of a widget's table or else, once it is as it should be."""
    find, end = found or rows_of, time.monotonic() + PATIENCE_S
    while not reached(now := find(lab)):
        assert time.monotonic() < end, now
        lab.page.wait_for_timeout(100)
    return now


def outputs_of(lab):
    """What is seen of every output."""
    return lab.page.evaluate(SEEN)


# ---- the widgets of the last cells: what they show, and what moving them does


def press(lab, key):
    """A key on a widget's slider."""
    handle = lab.page.locator(".widget-interact .noUi-handle")
    handle.click()  # as soon as it stands still
    handle.press(key)


def choose(lab, name, value):
    """One of a list's choices."""
    lab.page.locator(".widget-interact").get_by_label(name, exact=True).select_option(value)


def check_attack_slider(lab):
    """It has a reply for each model and change. Moved to its lowest end it changes some, and back
    again it shows what it showed."""
    first = rows_of(lab)
    changes = [[model, how] for model in ("ssft", "lat") for how in ("none", "noise", "PGD")]
    assert [row[:2] for row in first] == changes
    press(lab, "Home")
    low = until(lab, lambda rows: len(rows) == 6 and rows != first)
    assert [row for row in low if row[1] == "none"] == [row for row in first if row[1] == "none"]
    press(lab, "End")
    until(lab, lambda rows: rows == first)


def check_picker(lab):
    """The untouched reply stands beside the changed one, each with its outcome: ablating a
    direction changes the reply, and so does asking another model. A prompt of one's own is asked,
    too."""
    untouched, ablated = rows_of(lab)
    assert untouched[:2] == ["ssft", "nothing"] and ablated[:2] == ["ssft", "ablate"]
    assert {untouched[2], ablated[2]} <= {"refused", "complied", "neither"}
    assert untouched[3] != ablated[3]
    choose(lab, "mode", "add")
    both = until(lab, lambda rows: [row[1] for row in rows][1:] == ["add"])
    assert both[0] == untouched and both[1][3] != ablated[3]
    choose(lab, "target", "base")
    base = until(lab, lambda rows: [row[0] for row in rows] == ["base", "base"])
    assert base[0][3] != untouched[3]
    prompt = lab.page.locator(".widget-interact").get_by_label("prompt", exact=True)
    prompt.fill("who is there?")
    prompt.press("Enter")
    until(lab, lambda rows: [row[2] for row in rows] == ["not graded"] * 2)


def check_encoding_picker(lab):
    """Strength and encoding change what is asked and the encoded replies, and never the plain
    ones."""
    first = rows_of(lab)
    changes = [[model, how] for model in ("base", "ssft", "lat") for how in ("plain", "leet")]
    assert [row[:2] for row in first] == changes
    asked = lab.page.locator(".widget-interact p i")
    texts = {asked.text_content()}
    press(lab, "Home")
    weak = until(lab, lambda rows: rows[1:] and rows[1][1] == "leet@0")
    assert [row[2:] for row in weak[::2]] == [row[2:] for row in weak[1::2]], "nothing was encoded"
    assert weak[::2] == first[::2]
    texts.add(asked.text_content())
    choose(lab, "encoding", "reverse")
    backwards = until(lab, lambda rows: rows[1:] and rows[1][1] == "reverse")
    assert backwards[::2] == first[::2]
    coded = [rows[1::2] for rows in (first, weak, backwards)]
    assert len({str([row[3] for row in rows]) for rows in coded}) > 1, "no reply has changed"
    assert len(texts | {asked.text_content()}) == 3


WIDGETS = {
    "00_glance.ipynb": check_attack_slider,
    "02_pgd_attack.ipynb": check_attack_slider,
    "04_refusal_svd.ipynb": check_picker,
    "05_leetspeak_audit.ipynb": check_encoding_picker,
}


# ---- what is done with a notebook


def test_an_interrupted_notebook_says_so_in_a_line(lab):
    """Here a training, which saves where it is; the next test goes on with it."""
    lab.open(INTERRUPTED)
    lab.start("notebook:run-all-cells")
    lab.page.locator(".jp-OutputArea progress").wait_for()
    lab.command("notebook:interrupt-kernel")
    lab.idle()
    (error,) = lab.outputs("error")
    (line,) = error["traceback"]
    assert line.endswith("; run again to continue")
    assert "<progress" not in str(lab.notebook())
    lab.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_again_what_it_showed(lab, name):
    lab.open(name)
    assert lab.command("notebook:run-all-cells") is True
    lab.idle()
    if name == RESTARTED:
        lab.restart_and_run_all()
        lab.idle()
    if name in WIDGETS:
        WIDGETS[name](lab)
    assert lab.troubles() == []
    cells = [cell for cell in lab.notebook()["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert "<progress" not in str(cells)
    before = outputs_of(lab)
    lab.close()
    lab.open(name)
    until(lab, lambda seen: seen == before, outputs_of)
    assert "Error displaying widget" not in str(before)
    lab.close()
