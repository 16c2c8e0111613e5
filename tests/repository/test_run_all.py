"""run_all.sh: its options, the Python it finds, and an environment that is finished or is not. No
real one is made.
"""

import os
import shutil
import subprocess

import pytest

# Stands for every Python: it records how it was called and answers as the FAKE_... variables say.
FAKE_PYTHON = r"""#!/bin/bash
echo "$(basename "$0") $*" >>"$FAKE_LOG"
case "$*" in
  "-c import sys; sys.exit(sys.version_info < (3, 10))") exit "${FAKE_OLD:-0}" ;;
  "-c import sys; print(sys.prefix)") echo /some/environment ;;
  "--version") echo "Python 3.11.0" ;;
  "-I -"*)
    code="$(cat)"
    case "$code" in
      *hashlib*) cat "$3/pyproject.toml" "$3/constraints.txt" | cksum | tr -d ' ' ;;
      *'find_spec("latlib")'*) exit "${FAKE_NO_LATLIB:-1}" ;;
      *'version("torch")'*) exit "${FAKE_NO_TORCH:-1}" ;;
    esac ;;
  "-m venv"*)
    for folder; do :; done
    mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
    case "$*" in *--system-site-packages*) echo "include-system-site-packages = true" >"$folder/pyvenv.cfg" ;; esac ;;
  "-m pip install"*) echo "pip speaks"; exit "${FAKE_PIP:-0}" ;;
  "-m ruff check") echo "ruff: bad"; exit "${FAKE_RUFF:-0}" ;;
  "-m ruff format"*) exit "${FAKE_FORMAT:-0}" ;;
  "-m mypy") echo "mypy: bad"; exit "${FAKE_MYPY:-0}" ;;
  "-m latlib.runner.pipeline"*) exit "${FAKE_PIPELINE:-0}" ;;
  "-m pytest"*)
    echo "$LATLIB_PROFILE $LATLIB_RUNS $(ls -d "$(dirname "$LATLIB_RUNS")")" >>"$FAKE_LOG"
    echo "3 passed in 0.1s"; exit "${FAKE_PYTEST:-0}" ;;
esac
"""
TOOLS = "bash env dirname basename cat grep rm mkdir cp touch mv tail tee tr mktemp cksum ls tput".split()


@pytest.fixture
def checkout(tmp_path, root):
    """A checkout with a space in its path, and beside it a PATH with a fake python3 and POSIX tools
    only.
    """
    place = tmp_path / "my check out"
    place.mkdir()
    for name in ("run_all.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, place / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    (tools / "python3").write_text(FAKE_PYTHON)
    (tools / "python3").chmod(0o755)
    return place


def call(checkout, *options, **fake):
    """Run the script from elsewhere; its result, with the calls of Python since the last time as
    `.calls`.
    """
    log = checkout.parent / "calls.log"
    log.write_text("")
    env = {
        "PATH": str(checkout.parent / "bin"),
        "HOME": "/nonexistent",
        "FAKE_LOG": str(log),
        "TMPDIR": str(checkout.parent),
    }
    done = subprocess.run(
        [str(checkout / "run_all.sh"), *options],
        env=env | {name: str(value) for name, value in fake.items()},
        cwd="/",
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    done.calls = [
        line
        for line in log.read_text().splitlines()
        if " -m " in line or not line.startswith("python")
    ]
    return done


def test_help_names_every_option(checkout):
    done = call(checkout, "--help")
    assert done.returncode == 0 and done.calls == []
    for option in (
        "--profile",
        "--only",
        "--out",
        "--fresh",
        "--check",
        "--json",
        "--unchecked",
        "--compare",
        "--test",
        "--help",
    ):
        assert f"  {option}" in done.stdout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--frsh"], "--frsh"),
        (["tiny"], "'tiny'"),
        (["--only"], "--only"),
        (["--out", "--fresh"], "--out"),
    ]
    + [(["--test", "--fresh"], "--fresh"), (["--", "-x"], "--test")]
    + [(["--compare", "a"], "--compare"), (["--compare", "a", "--out"], "--compare")],
)
def test_wrong_option_is_named_and_nothing_is_made(checkout, options, word):
    done = call(checkout, *options)
    assert done.returncode == 2 and word in done.stderr
    assert done.calls == [] and not (checkout / ".venv").exists()


def test_options_reach_the_pipeline_whole(checkout):
    options = [
        "--profile=my file.yaml",
        "--only",
        "03",
        "--only",
        "1,2",
        "--out",
        "/tmp/my runs",
        "--fresh",
    ]
    done = call(checkout, *options, LATLIB_DRY_RUN=1)
    assert done.returncode == 0, done.stderr
    expected = (
        r"-m latlib.runner.pipeline --profile my\ file.yaml --only 03 --only 1\,2 --out"
        r" /tmp/my\ runs --fresh"
    )
    assert done.stdout.splitlines()[-1].endswith(expected)
    assert not (checkout / ".venv").exists(), "a dry run has made an environment"


def test_a_check_reaches_the_pipeline_and_its_status_comes_back(checkout):
    done = call(checkout, "--profile", "llama3-8b-seed", "--check", "--json", LATLIB_DRY_RUN=1)
    assert done.stdout.splitlines()[-1].endswith(
        "-m latlib.runner.pipeline --profile llama3-8b-seed --check --json"
    )
    assert call(checkout, "--check", FAKE_PIPELINE=3).returncode == 3
    assert "3 something that the run needs is missing" in call(checkout, "--help").stdout


def test_a_comparison_is_the_work_of_its_own_module(checkout):
    done = call(checkout, "--compare", "my runs/a", "b", "--out", "c.html", LATLIB_DRY_RUN=1)
    wanted = r"-m latlib.report.compare my\ runs/a b --out c.html"
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith(wanted)


def test_first_time_installs_second_time_does_not(checkout):
    first = call(checkout)
    assert first.returncode == 0, first.stderr
    assert [line.split()[2] for line in first.calls] == ["venv", "pip", "latlib.runner.pipeline"]
    assert f"-e . -c {checkout / 'constraints.txt'}" in first.calls[1]
    second = call(checkout)
    assert [line.split()[2] for line in second.calls] == ["latlib.runner.pipeline"]
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert [line.split()[2] for line in call(checkout).calls] == ["pip", "latlib.runner.pipeline"]
    assert ".[test]" in call(checkout, "--test").calls[0], "the extra was not installed"


def test_failed_installation_is_said_and_made_anew(checkout):
    failed = call(checkout, FAKE_PIP=1)
    assert failed.returncode == 1
    assert "pip speaks" in failed.stderr and "install.log" in failed.stderr.splitlines()[-1]
    assert not (checkout / ".venv" / ".latlib-stamp").exists()
    (checkout / ".venv" / "half").touch()
    assert [line.split()[2] for line in call(checkout).calls] == [
        "venv",
        "pip",
        "latlib.runner.pipeline",
    ]
    assert not (checkout / ".venv" / "half").exists()


def test_torch_that_is_there_is_kept(checkout):
    done = call(checkout, FAKE_NO_TORCH=0)
    assert "--system-site-packages" in done.calls[0]
    pins = (checkout / ".venv" / "constraints.txt").read_text()
    assert str(checkout / ".venv" / "constraints.txt") in done.calls[1]
    assert "\ntorch==" not in pins and "\npeft==" in pins


def test_active_environment_with_this_latlib_is_used(checkout):
    done = call(checkout, FAKE_NO_LATLIB=0)
    assert [line.split()[2] for line in done.calls] == [
        "latlib.runner.pipeline"
    ] and "/some/environment" in done.stdout
    assert not (checkout / ".venv").exists()


def test_someone_elses_environment_is_left_alone(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "theirs").touch()
    done = call(checkout)
    assert done.returncode == 1 and "not made by this script" in done.stderr
    assert (checkout / ".venv" / "theirs").exists() and done.calls == []


def test_python_too_old_or_absent_is_said(checkout):
    done = call(checkout, FAKE_OLD=1)
    assert done.returncode == 1 and "Python >= 3.10" in done.stderr
    tools = checkout.parent / "bin"
    (tools / "python3").rename(tools / "python3.12")
    assert call(checkout, LATLIB_DRY_RUN=1).returncode == 0, "python3.12 was not found"


@pytest.mark.parametrize(
    ("fake", "status"),
    [({}, 0)] + [({f"FAKE_{n}": 1}, 1) for n in ("RUFF", "FORMAT", "MYPY", "PYTEST")],
)
def test_test_mode_ends_in_pytests_line_and_fails_when_anything_does(checkout, fake, status):
    done = call(checkout, "--test", "--", "-k", "one or two", **fake)
    assert done.returncode == status
    assert done.stdout.splitlines()[-1] == "3 passed in 0.1s"
    *_, pytest_call, environment = done.calls
    assert sum("-m pytest" in line for line in done.calls) == 1
    assert (
        pytest_call.endswith("-k one or two")
        and " tests notebooks --nbval-lax --nbval-current-env " in pytest_call
    )
    profile, runs, parent = environment.split()
    assert profile == "smoke" and runs.startswith(parent) and not os.path.exists(parent), (
        "the run folder is left"
    )


def test_ci_calls_test_mode(root):
    assert os.access(root / ".ci" / "run", os.X_OK) and os.access(root / "run_all.sh", os.X_OK)
    assert (root / ".ci" / "run").read_text().rstrip().endswith("exec ./run_all.sh --test")


@pytest.mark.parametrize("kind", ["file", "folder", "link to nothing"])
def test_an_environment_that_somebody_else_made_is_not_deleted(checkout, kind):
    """Some tools keep a file of the name .venv, which says where the environment is."""
    venv = checkout / ".venv"
    if kind == "link to nothing":
        venv.symlink_to(checkout / "nowhere")
    elif kind == "folder":
        (venv / "mine").mkdir(parents=True)
    else:
        venv.write_text("/somewhere/else")
    done = call(checkout)
    assert done.returncode == 1 and "was not made by this script" in done.stderr
    assert venv.is_symlink() or venv.is_file() or (venv / "mine").is_dir()
