"""pyproject.toml, constraints.txt and environment.yml describe the same environment."""

import json
import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, metadata

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import latlib

tomllib = pytest.importorskip("tomllib")  # Python 3.11; the files do not depend on who reads them


def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def direct(root):
    """Canonical name -> requirement of everything pyproject asks for."""
    table = project(root)
    requirements = map(Requirement, table["dependencies"] + table["optional-dependencies"]["test"])
    return {canonicalize_name(r.name): r for r in requirements}


def pins(root, python="3.11"):
    """Canonical name -> version that constraints.txt gives on that Python ("3.11": its last)."""
    lines = (root / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    minor = ".".join(python.split(".")[:2])
    full = python if python != minor else f"{python}.99"
    environment = default_environment() | {"python_version": minor, "python_full_version": full}
    found = {}
    for r in requirements:
        if r.marker is None or r.marker.evaluate(environment):
            assert canonicalize_name(r.name) not in found, (
                f"{r.name} is pinned twice on Python {python}"
            )
            found[canonicalize_name(r.name)] = str(r.specifier)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_direct_requirement_has_one_exact_pin_that_satisfies_it(root, python):
    pinned = pins(root, python)
    for name, requirement in direct(root).items():
        assert name in pinned, f"{name} has no pin on Python {python}"
        version = re.fullmatch(r"==([0-9][0-9a-z.]*)", pinned[name])
        assert version, f"{name}{pinned[name]} is not an exact version without a local suffix"
        assert requirement.specifier.contains(version[1]), (
            f"{name} {version[1]} does not satisfy {requirement}"
        )


@pytest.mark.parametrize("python", ["3.10.0", "3.11.0", "3.11.2", "3.12.0", "3.13.0"])
def test_no_pin_asks_for_a_later_patch_of_python(root, python):
    """Debian 12 has Python 3.11.2. Seen for what is installed here in the version of its pin."""
    for name, pin in pins(root, python).items():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            continue
        asks = SpecifierSet(found["Requires-Python"] or "")
        assert pin != f"=={found['Version']}" or asks.contains(python), (
            f"{name}{pin} needs Python {asks}; pin an earlier release for {python}"
        )


def test_pins_hold_on_any_machine(root):
    text = (root / "constraints.txt").read_text()
    assert not re.search(r"://|@ |^nvidia|^triton|^cuda|^latlib|==[^;\n]*\+\w", text, re.MULTILINE)


def test_conda_users_get_the_same_set(root):
    environment = yaml.safe_load((root / "environment.yml").read_text())
    (section,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    options = [line for line in section if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    listed = {
        canonicalize_name(r.name): str(r.specifier)
        for r in map(Requirement, set(section) - set(options))
    }
    (python,) = [
        d for d in environment["dependencies"] if isinstance(d, str) and d.startswith("python")
    ]
    pinned = pins(root, python.split("=")[1])
    assert listed == {name: pinned[name] for name in direct(root)}
    assert python.split("=")[1] in ("3.10", "3.11", "3.12", "3.13")


def hooks(root):
    """Hook id -> (revision of its repository without the v, the hook), of .pre-commit-config.yaml."""
    found = {}
    for repository in yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]:
        for hook in repository["hooks"]:
            found[hook["id"]] = (str(repository.get("rev", "")).removeprefix("v"), hook)
    return found


def test_hooks_before_a_commit_are_of_the_versions_that_test(root):
    found, pinned = hooks(root), pins(root)
    for hook, package in {
        "ruff-check": "ruff",
        "ruff-format": "ruff",
        "nbstripout": "nbstripout",
    }.items():
        assert f"=={found[hook][0]}" == pinned[package]


def test_a_commit_leaves_notebooks_as_they_are_stored(root, tmp_path):
    """nbstripout and our own hook would change nothing of what is committed, and take what is not."""
    found = hooks(root)
    strip = [sys.executable, "-m", "nbstripout", *found["nbstripout"][1]["args"]]
    notebooks = sorted((root / "notebooks").glob("*.ipynb"))
    assert notebooks
    subprocess.run([*strip, "--verify", *notebooks], check=True)
    executed = tmp_path / "executed.ipynb"
    notebook = json.loads(notebooks[0].read_text())
    notebook["metadata"]["papermill"] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["execution_count"] = cell["execution_count"] or 9
            cell["outputs"] = cell["outputs"] or [
                {"output_type": "stream", "name": "stdout", "text": "a"}
            ]
    executed.write_text(json.dumps(notebook))
    subprocess.run([*strip, executed], check=True)
    program, *arguments = found["counts"][1]["entry"].split()
    assert program == "python"
    subprocess.run([sys.executable, *arguments, executed], cwd=root, check=True)
    assert json.loads(executed.read_text()) == json.loads(notebooks[0].read_text())


def test_it_can_be_cited(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert citation["version"] == project(root)["version"] == latlib.__version__
    assert citation["license"] == project(root)["license"] == "MIT"
    assert f"## {latlib.__version__}" in (root / "CHANGELOG.md").read_text()


def test_run_all_accepts_the_same_pythons(root):
    assert project(root)["requires-python"] == ">=3.10"
    assert "(3, 10)" in (root / "run_all.sh").read_text()


def test_importing_latlib_needs_only_the_core():
    """Neither matplotlib nor wandb nor papermill is imported until someone asks for it."""
    code = (
        "import sys, latlib, latlib.config.profile, latlib.experiment.tracking, latlib.io.progress,"
        " latlib.runner.pipeline; print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"matplotlib", "wandb", "papermill", "nbconvert"} & set(loaded)


FROM_A_WHEEL = """
import sys
sys.path.insert(0, {site!r})
import latlib
from latlib import Run, LATHook, Capture, Ablate, pgd, ThreatModel, PGD, Trainer, load_model, generate, encode, gcg
from latlib import Evidence
from latlib.config.profile import find_share, load_profile
assert latlib.__file__.startswith({site!r}), latlib.__file__
assert str(find_share("profiles")).startswith({site!r}), find_share("profiles")
assert encode("a leek", "leet") != "a leek"
run = Run("smoke", {out!r})
assert run.folder.is_dir() and load_profile("tiny").name == "tiny"
print("as installed")
"""


def test_a_wheel_works_outside_the_clone(root, tmp_path):
    """The public names, the profiles and the notebooks come with it."""
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, tmp_path],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / made.stdout.split()[-1]) as wheel:
        wheel.extractall(site)
    assert (site / "latlib" / "py.typed").exists()
    assert list((site / "latlib" / "_share" / "notebooks").glob("*.ipynb"))
    assert not list(site.glob("latlib/**/*.pyc")) and not (site / "tests").exists()
    code = FROM_A_WHEEL.format(site=str(site), out=str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "as installed\n", done.stderr
