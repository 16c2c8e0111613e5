"""What a reader does with a notebook in JupyterLab: runs it, interrupts it, moves its slider, saves
it and opens it again."""

import shutil
import time

import pytest
import yaml
from lab import PATIENCE_S, Lab, served


@pytest.fixture(scope="module")
def profile(root, tmp_path_factory):
    """`smoke` with a radius that changes what its models reply."""
    settings = yaml.safe_load((root / "profiles" / "smoke.yaml").read_text())
    settings["evaluation"]["eps"] = [0.05, 20.0]
    file = tmp_path_factory.mktemp("profile") / "lab.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def address(root, profile, tmp_path_factory):
    """Of a server on copies of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("00_glance", "02_pgd_attack"):
        shutil.copy(root / "notebooks" / f"{name}.ipynb", folder)
    runs = str(tmp_path_factory.mktemp("runs"))
    environment = {
        "LATLIB_PROFILE": str(profile),
        "LATLIB_RUNS": runs,
        "LATLIB_BATCH": "",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a new kernel's warning about its debugger
    }
    with served(folder, environment) as found:
        yield found


def shown(lab):
    """Rows of the slider's table: model, change, outcome, reply."""
    rows = lab.page.locator(".widget-interact tbody tr")
    return rows.evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def move(lab, key, reached):
    """Press a key on the slider and wait until the table is as it should be."""
    handle = lab.page.locator(".widget-interact .noUi-handle")
    handle.click()  # as soon as it stands still
    handle.press(key)
    until = time.monotonic() + PATIENCE_S
    while not reached(shown(lab)):
        assert time.monotonic() < until, shown(lab)
        lab.page.wait_for_timeout(100)


def check_slider(lab):
    """It has a reply for each model and change. Moved to its lowest end it changes some, and back
    again it shows what it showed."""
    first = shown(lab)
    changes = [(model, how) for model in ("ssft", "lat") for how in ("none", "noise", "PGD")]
    assert [tuple(row[:2]) for row in first] == changes
    move(lab, "Home", lambda rows: len(rows) == len(changes) and rows != first)
    low = shown(lab)
    assert [row for row in low if row[1] == "none"] == [row for row in first if row[1] == "none"]
    move(lab, "End", lambda rows: rows == first)


def check(lab, name):
    """All cells of an open notebook, its slider, and what is seen of it once it was saved: what was
    seen before."""
    assert lab.command("notebook:run-all-cells") is True
    lab.idle()
    check_slider(lab)
    assert lab.troubles() == []
    before = shown(lab)
    lab.close()
    lab.open(name)
    lab.page.locator(".widget-interact tbody tr").first.wait_for()
    assert shown(lab) == before
    assert "Error displaying widget" not in lab.page.locator(".jp-Notebook").text_content()
    lab.close()


@pytest.mark.slow
def test_notebooks_in_jupyterlab(address, chromium):
    """One is interrupted in a training and run again, and its run is the other's."""
    lab = Lab(chromium.new_page(), address)
    lab.open("02_pgd_attack.ipynb")
    lab.start("notebook:run-all-cells")
    lab.page.locator(".jp-OutputArea progress").wait_for()
    lab.command("notebook:interrupt-kernel")
    lab.idle()
    (error,) = lab.outputs("error")
    (line,) = error["traceback"]
    assert line.endswith("; run again to continue")
    assert "<progress" not in str(lab.notebook())
    lab.page.evaluate("window.troubles = []")
    check(lab, "02_pgd_attack.ipynb")
    lab.open("00_glance.ipynb")
    check(lab, "00_glance.ipynb")
