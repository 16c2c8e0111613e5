#!/usr/bin/env bash
# Reproduces the whole suite: makes an environment, runs the notebooks, leaves one report. ./run_all.sh --help says more.
# Needs bash and Python >= 3.10, nothing else. LATLIB_DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv"
export OMP_WAIT_POLICY=PASSIVE # processes that share cores must not spin while they wait
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONUNBUFFERED=1

usage() {
  cat <<'HELP'
usage: ./run_all.sh [--profile NAME|FILE] [--only 03] [--out DIR] [--fresh] [--unchecked] [--grace SECONDS]
       ./run_all.sh --check [--json] [--profile NAME|FILE] [--out DIR]
       ./run_all.sh --compare A B [--out FILE]
       ./run_all.sh --test [-- PYTEST_ARGUMENTS]

Runs the notebooks in order and leaves runs/<profile>/report.html, which is written anew after every notebook. The first
time it makes an environment in .venv (or uses the active one, where latlib is installed from this checkout). Interrupted,
the same command continues.

  --profile NAME|FILE  settings of the run: a name from profiles/, or a YAML file of your own (default: tiny);
                       glance: a first look, on which tiny goes on
  --only 03            run only this notebook, by number or name; repeat it, or separate several by commas
  --out DIR            run folder (default: runs/<profile>)
  --fresh              delete what a run made in the run folder, set aside what else is there, and start anew
  --check              say what the run needs and whether it is here: model, data, disk, memory, hours, cost; runs nothing
  --json               with --check: as JSON
  --grace SECONDS      how long a run that is stopped may take to save; default 120
  --unchecked          run a real model although --check finds something missing, which otherwise stops it
  --compare A B        say where two runs differ, claims first, in a page compare-A-B.html here (or --out FILE) and in
                       short; A and B: run folders, or published results such as results/tiny
  --test               lint, types, tests and every notebook on the smoke profile; arguments after -- go to pytest
  --help               this text

Exit status: 0 done, 1 something failed (the last lines say what, and where the log is), 2 wrong option or setting,
3 something that the run needs is missing, 75 stopped by a signal with everything saved.
HELP
}

say() { printf '%s\n' "$*"; }
die() {
  printf 'error: %s\n' "$2" >&2
  exit "$1"
}
# Runs a command, or prints it when LATLIB_DRY_RUN is set.
run() {
  if [ -n "${LATLIB_DRY_RUN:-}" ]; then
    printf '+'
    printf ' %q' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# ---- options -------------------------------------------------------------------------------------------------------

pipeline_options=()
pytest_options=()
testing=""
module=latlib.runner.pipeline
while [ $# -gt 0 ]; do
  case "$1" in
    --profile | --only | --out | --grace)
      [ $# -ge 2 ] && [ "${2#--}" = "$2" ] || die 2 "$1 needs a value; see ./run_all.sh --help"
      pipeline_options+=("$1" "$2")
      shift
      ;;
    --profile=* | --only=* | --out=* | --grace=*) pipeline_options+=("${1%%=*}" "${1#*=}") ;;
    --fresh | --check | --json | --unchecked) pipeline_options+=("$1") ;;
    --compare)
      [ $# -ge 3 ] && [ "${2#--}" = "$2" ] && [ "${3#--}" = "$3" ] ||
        die 2 "--compare needs two folders, A and B; see ./run_all.sh --help"
      module=latlib.report.compare
      pipeline_options+=("$2" "$3")
      shift 2
      ;;
    --test) testing=yes ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      pytest_options=("$@")
      break
      ;;
    *) die 2 "unknown option '$1'; see ./run_all.sh --help" ;;
  esac
  shift
done
if [ -n "$testing" ] && [ ${#pipeline_options[@]} -gt 0 ]; then
  die 2 "--test goes with no other option than -- PYTEST_ARGUMENTS, not '${pipeline_options[0]}'"
elif [ -z "$testing" ] && [ ${#pytest_options[@]} -gt 0 ]; then
  die 2 "arguments after -- are for pytest: add --test"
fi

# ---- the environment -----------------------------------------------------------------------------------------------

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if is_new_enough "$name"; then
      command -v "$name"
      return 0
    fi
  done
  return 1
}

# Whether Python $1 has this checkout's latlib installed (-I: not merely because of the folder we are called from).
has_this_latlib() {
  "$1" -I - "$ROOT" >/dev/null 2>&1 <<'PYTHON'
import importlib.util, os, sys
spec = importlib.util.find_spec("latlib")
here = os.path.realpath(os.path.join(sys.argv[1], "latlib", "__init__.py"))
missing = [m for m in ("torch", "transformers", "papermill", "pydantic") if importlib.util.find_spec(m) is None]
sys.exit(missing or spec is None or os.path.realpath(spec.origin) != here)
PYTHON
}

has_test_tools() {
  "$1" -I - >/dev/null 2>&1 <<'PYTHON'
import importlib.util, sys
tools = ("pytest", "pytest_timeout", "xdist", "hypothesis", "nbval", "nbstripout", "sklearn", "ray", "gguf", "ruff", "mypy",
  "hatchling", "playwright", "axe_playwright_python")
sys.exit(any(importlib.util.find_spec(name) is None for name in tools))
PYTHON
}

has_new_torch() {
  "$1" -I - >/dev/null 2>&1 <<'PYTHON'
import importlib.metadata, re, sys
version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
sys.exit((int(version[1]), int(version[2])) < (2, 8))
PYTHON
}

# What an installed environment depends on; when it changes, pip is asked again.
fingerprint() {
  "$1" -I - "$ROOT" "$2" <<'PYTHON'
import hashlib, sys
from pathlib import Path
root = Path(sys.argv[1])
parts = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join([*parts, repr((sys.version_info[:3], sys.argv)).encode()])).hexdigest())
PYTHON
}

# Shows pip's lines as one live line on a terminal, and nothing elsewhere.
live_line() {
  local line width="${COLUMNS:-$(tput cols 2>/dev/null || echo 80)}"
  while IFS= read -r line; do
    if [ -t 1 ]; then printf '\r\033[2K  %.*s' "$((width - 4))" "$line"; fi
  done
  if [ -t 1 ]; then printf '\r\033[2K'; fi
}

# install PYTHON REQUIREMENT CONSTRAINTS LOG
install() {
  local started=$SECONDS
  if [ -n "${LATLIB_DRY_RUN:-}" ]; then
    run "$1" -m pip install -e "$2" -c "$3"
    return
  fi
  if ! (cd "$ROOT" && { "$1" -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 23)' ||
    "$1" -m pip install 'pip>=23'; } && "$1" -m pip install -e "$2" -c "$3") 2>&1 | tee "$4" | live_line; then
    tail -n 15 "$4" >&2
    die 1 "the installation failed; the whole log is in $4"
  fi
  say "installed in $((SECONDS - started)) s"
}

# Makes or refreshes .venv with the requirement $1 ('.' or '.[test]'). A file inside says that it is unfinished until
# every step has succeeded, so that an interrupted one is made anew.
own_environment() {
  local base system="" stamp_file pins print
  base="$(find_python)" || die 1 "no Python >= 3.10 found (tried python3, python3.13 to python3.10, python): install one"
  if { [ -e "$VENV" ] || [ -L "$VENV" ]; } && [ ! -e "$VENV/.latlib-unfinished" ] && [ ! -e "$VENV/.latlib-stamp" ]; then
    has_this_latlib "$VENV/bin/python" ||
      die 1 "$VENV was not made by this script and has no latlib: run pip install -e . -c constraints.txt in it, or delete it"
    PYTHON="$VENV/bin/python"
    say "environment: your own .venv"
    return
  fi
  if [ -e "$VENV/.latlib-unfinished" ] || ! is_new_enough "$VENV/bin/python"; then
    if has_new_torch "$base"; then system="--system-site-packages"; fi
    say "environment: making .venv with $("$base" --version)${system:+, keeping the torch that is installed there}"
    run rm -rf "$VENV"
    run mkdir -p "$VENV"
    run touch "$VENV/.latlib-unfinished"
    if ! run "$base" -m venv ${system:+"$system"} "$VENV"; then
      rm -rf "$VENV"
      die 1 "$base cannot make an environment; on Debian and Ubuntu: apt install python3-venv"
    fi
  fi
  PYTHON="$VENV/bin/python"
  pins="$ROOT/constraints.txt"
  if grep -qs '^include-system-site-packages = true' "$VENV/pyvenv.cfg" && has_new_torch "$PYTHON"; then
    pins="$VENV/constraints.txt" # the torch that is there fits its GPU; ours would replace it
    grep -v '^torch==' "$ROOT/constraints.txt" >"$pins"
  fi
  stamp_file="$VENV/.latlib-stamp"
  if [ -n "${LATLIB_DRY_RUN:-}" ] && [ ! -x "$PYTHON" ]; then
    print="none"
  else
    print="$(fingerprint "$PYTHON" "$pins")"
  fi
  if [ -e "$stamp_file" ] && grep -qxF "$print $1" "$stamp_file"; then
    say "environment: .venv is ready"
    return
  elif [ "$1" = "." ] && [ -e "$stamp_file" ] && grep -qxF "$print .[test]" "$stamp_file"; then
    say "environment: .venv is ready"
    return
  fi
  say "environment: installing latlib into .venv (some minutes the first time; log: .venv/install.log)"
  install "$PYTHON" "$1" "$pins" "$VENV/install.log"
  if [ -z "${LATLIB_DRY_RUN:-}" ]; then
    printf '%s %s\n' "$print" "$1" >"$stamp_file.new"
    mv "$stamp_file.new" "$stamp_file"
    rm -f "$VENV/.latlib-unfinished"
  fi
}

# Sets PYTHON: the active environment where this latlib is installed in it, else .venv.
choose_environment() {
  local name prefix
  for name in python python3; do
    is_new_enough "$name" && has_this_latlib "$name" || continue
    prefix="$("$name" -c 'import sys; print(sys.prefix)')"
    [ "$prefix" != "$VENV" ] || continue # ours: looked after below
    PYTHON="$(command -v "$name")"
    say "environment: the active one, $prefix"
    break
  done
  [ -n "${PYTHON:-}" ] || own_environment "$1"
  if [ "$1" != "." ] && [ -z "${LATLIB_DRY_RUN:-}" ] && ! has_test_tools "$PYTHON"; then
    say "environment: adding the test tools"
    install "$PYTHON" "$1" "$ROOT/constraints.txt" "$(mktemp)"
  fi
}

# ---- work ----------------------------------------------------------------------------------------------------------

run_tests() {
  local status=0
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  export LATLIB_PROFILE=smoke LATLIB_RUNS="$scratch/runs" LATLIB_BATCH=1
  export WANDB_MODE=offline WANDB_SILENT=true WANDB_ERROR_REPORTING=false HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  cd "$ROOT"
  run "$PYTHON" -m ruff check || status=1
  run "$PYTHON" -m ruff format --check || status=1
  run "$PYTHON" -m mypy || status=1
  [ "$status" = 0 ] || say "ruff or mypy found something to fix (above)"
  # files side by side, at most four: each process holds a torch of its own
  run "$PYTHON" -m pytest tests notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout 600 \
    -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 40 --durations-min 20 \
    ${pytest_options[@]+"${pytest_options[@]}"} || status=1
  exit "$status"
}

unset PYTHON
if [ -n "$testing" ]; then
  choose_environment ".[test]"
  run_tests
fi
choose_environment "."
if [ -n "${LATLIB_DRY_RUN:-}" ]; then
  run "$PYTHON" -m "$module" ${pipeline_options[@]+"${pipeline_options[@]}"}
else
  # in place of this shell, so that a signal reaches the driver that knows how to stop
  exec "$PYTHON" -m "$module" ${pipeline_options[@]+"${pipeline_options[@]}"}
fi
