"""docs/runpod.md: every option, module, profile, setting and file that it names exists."""

import re
import shutil
import subprocess

import pytest
import yaml

from latlib.config.profile import load_profile, validated
from latlib.config.sections import BudgetSettings, ParallelSettings, SweepSettings, TrackingSettings
from latlib.experiment import sweep

SECTIONS = {
    "budget": BudgetSettings,
    "parallel": ParallelSettings,
    "sweep": SweepSettings,
    "tracking": TrackingSettings,
}


@pytest.fixture(scope="module")
def page(root):
    return (root / "docs" / "runpod.md").read_text(encoding="utf-8")


def blocks(page, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_every_block_is_bash(page):
    assert len(blocks(page, "bash")) >= 8
    for block in blocks(page, "bash"):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert checked.returncode == 0, f"{checked.stderr}\n{block}"


def test_every_option_exists(page, root):
    usage = subprocess.run(
        [root / "run_all.sh", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = "\n".join(blocks(page, "bash"))
    options = {
        o
        for call in re.findall(r"run_all\.sh([^&|;'>\n]*)", commands)
        for o in re.findall(r"--[a-z-]+", call)
    }
    assert {"--profile", "--check"} <= options
    assert not {o for o in options if not re.search(rf"{o}\b", usage)}
    calls = re.findall(r"latlib\.experiment\.sweep([^\n]*)", commands)
    options = {o for call in calls for o in re.findall(r"--[a-z-]+", call)} | {
        "--gpus-per-trial",
        "--adapters",
    }
    assert len(calls) == 2 and options <= set(
        sweep._parser().format_help().replace(",", " ").split()
    )


def test_every_module_and_file_exists(page, root):
    for module in re.findall(r"-m (latlib[\w.]+)", page):
        assert (root / f"{module.replace('.', '/')}.py").is_file(), module
    for name in re.findall(r"`eps_grid\.(\w+)`", page):
        assert re.search(
            rf"^def {name}\(",
            (root / "latlib" / "report" / "eps_grid.py").read_text(),
            re.MULTILINE,
        )
    for name in {"run_all.sh", "constraints.txt"} | set(
        re.findall(r"`((?:docs|profiles|latlib|notebooks)/[^`]*)`", page)
    ):
        assert name in page and (root / name).exists(), name
    assert re.search(r"^ray==", (root / "constraints.txt").read_text(), re.MULTILINE)


def test_every_profile_exists(page):
    named = set(re.findall(r"(?:--profile |PROFILE=)([a-z][\w-]*)\b(?!\.)", page))
    assert "tiny" in named
    for name in named:
        load_profile(name)


def test_every_setting_exists(page):
    texts = blocks(page, "yaml") + re.findall(
        r"`((?:budget|parallel|tracking|sweep): \{[^`]*\})`", page
    )
    assert len(texts) >= 5
    for text in texts:
        for section, tree in yaml.safe_load(text).items():
            validated(SECTIONS[section], tree, section)
    profile = load_profile("tiny")
    for field in re.findall(r"`(train|budget)\.(\w+)`", page):
        assert hasattr(getattr(profile, field[0]), field[1]), field


def test_the_grid_of_the_page_is_one_that_can_be_trained(page, tmp_path):
    (grid,) = (text for text in blocks(page, "yaml") if "grid" in text)
    tree = load_profile("tiny").model_dump(mode="json") | yaml.safe_load(grid)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    assert len(sweep.points(load_profile(tmp_path / "my.yaml"))) == 9


def test_no_secret_is_written_anywhere(page):
    assert not re.search(r"(TOKEN|API_KEY)=\S", page) and not re.search(r"hf_[A-Za-z0-9]{8}", page)


def test_a_fresh_volume_gets_everything(page, root, tmp_path):
    """The paste itself, on a stand-in volume, with a run_all.sh that says where it was called and
    with what.
    """
    if not shutil.which("git") or not shutil.which("setsid"):
        pytest.skip("git and setsid are needed")
    source, volume = tmp_path / "source", tmp_path / "a volume"
    source.mkdir()
    volume.mkdir()
    (source / "run_all.sh").write_text(
        '#!/bin/bash\necho "$PWD" "$@"; env | grep -E "^(HF_HOME|PIP_CACHE_DIR|LATLIB_RUNS)="\n'
    )
    (source / "run_all.sh").chmod(0o755)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=source, check=True)
    (paste,) = (block for block in blocks(page, "bash") if "git clone" in block)
    paste = re.sub(r"VOLUME=/workspace", f"VOLUME='{volume}'", paste)
    paste = re.sub(r"REPOSITORY=\S+", f"REPOSITORY='{source}'", paste).replace(
        "tail -F", "sleep 1; tail"
    )
    for _ in range(2):  # the same paste continues
        done = subprocess.run(
            ["bash", "-c", paste], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    lines = (volume / "latlib.log").read_text().splitlines()
    assert (
        lines.count(f"{volume}/latlib --profile tiny") == 2
        and f"{volume}/latlib --profile tiny --check" in done.stdout
    )
    places = {line.split("=")[0]: line.split("=")[1] for line in lines if "=" in line}
    assert set(places) == {"HF_HOME", "PIP_CACHE_DIR", "LATLIB_RUNS"}
    assert all(place.startswith(str(volume)) for place in places.values())
