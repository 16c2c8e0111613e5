"""Copy what a reader needs of a finished run into the repository: the evidence behind the README.

    ./run_all.sh --fresh && .venv/bin/python -m latlib.report.publish runs/tiny results/tiny
    --readme README.md

1. The report, the executed notebooks, the outcome table, results JSON, training curves and the main
   figure are copied; models and W&B folders are not.
2. Paths of the machine it ran on are replaced by the run folder's name; the notebook runner's
   bookkeeping is dropped.
3. The README's table of claims and its line on time are written anew from the copy.
The folder is put into place whole, and only when it stays below the size a repository should carry.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import nbformat
import pandas as pd

from latlib.io.files import folder_aside
from latlib.io.machine import available_cores
from latlib.report.claims import main as write_claims

LIMIT_BYTES = 8_000_000
TEXTS = (".json", ".jsonl", ".yaml", ".html", ".md")


def publish(run: Path, target: Path) -> None:
    """Copy the evidence of `run` to `target`.

    Raises FileNotFoundError when the run has no report (it is not finished), ValueError when the
    copy is too large or still names a path of this machine.
    """
    run = run.resolve()
    if not (run / "report.html").is_file():
        raise FileNotFoundError(f"{run} has no report.html: finish the run with ./run_all.sh first")

    with folder_aside(target.resolve()) as folder:
        for source in (
            *sorted(run.glob("results/*.json")),
            *run.glob("results/*.png"),
            run / "profile.yaml",
        ):
            _copy(source, folder / source.name, run)
        for source in (run / "report.html", *sorted(run.glob("metrics/*.jsonl"))):
            _copy(source, folder / source.relative_to(run), run)
        for source in sorted(run.glob("notebooks/[0-9][0-9]_*.ipynb")):
            _copy_notebook(source, folder / "notebooks" / source.name, run)
        (folder / "timing.json").write_text(json.dumps(timing(run), indent=1), encoding="utf-8")
        tables = [pd.read_parquet(path) for path in sorted(run.glob("results/outcomes/*.parquet"))]
        (folder / "outcomes").mkdir()
        whole = pd.concat(tables, ignore_index=True)
        whole.to_parquet(folder / "outcomes" / "all.parquet", index=False, compression="zstd")
        _check(folder)


def timing(run: Path) -> dict[str, float]:
    """Seconds each executed notebook of a run took, and the processor cores of this machine."""
    seconds = {}
    for path in sorted(run.glob("notebooks/[0-9][0-9]_*.ipynb")):
        bookkeeping = nbformat.read(path, as_version=4).metadata.get("papermill", {})
        seconds[path.stem] = round(bookkeeping.get("duration") or float("nan"), 1)
    return {"cores": available_cores(), **seconds}


def with_timing(readme: str, seconds: dict[str, float]) -> str:
    """`readme` with the line between its timing markers written from `timing`'s result."""
    begin, end = "<!-- timing:begin -->", "<!-- timing:end -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"the README needs the markers {begin} and {end}, once each")
    parts = {name: value for name, value in seconds.items() if name != "cores"}
    each = ", ".join(f"{name} {value / 60:.1f}" for name, value in parts.items())
    line = (
        f"**How long it takes.** On {seconds['cores']:.0f} CPU cores the committed run took "
        f"{sum(parts.values()) / 60:.1f} minutes after installation ({each})."
    )
    return readme[: readme.index(begin) + len(begin)] + f"\n{line}\n" + readme[readme.index(end) :]


def _clean(text: str, run: Path) -> str:
    """Text without paths of this machine."""
    root = str(Path(__file__).resolve().parents[2])
    return text.replace(str(run), f"runs/{run.name}").replace(root + "/", "").replace(root, ".")


def _copy(source: Path, target: Path, run: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in TEXTS:
        target.write_text(_clean(source.read_text(encoding="utf-8"), run), encoding="utf-8")
    else:
        shutil.copy2(source, target)


def _copy_notebook(source: Path, target: Path, run: Path) -> None:
    """An executed notebook without the runner's metadata, which names paths and changes with every
    run.
    """
    notebook = nbformat.read(source, as_version=4)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_clean(nbformat.writes(notebook), run), encoding="utf-8")


def _check(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if size > LIMIT_BYTES:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise ValueError(
            f"{size} bytes, more than {LIMIT_BYTES}; the largest file is"
            f" {largest.relative_to(folder)}"
        )
    for path in files:
        if path.suffix in (*TEXTS, ".ipynb") and str(Path.home()) + "/" in path.read_text(
            encoding="utf-8"
        ):
            raise ValueError(f"{path.relative_to(folder)} names a path under {Path.home()}")
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latlib.report.publish", description="Copy a run's evidence."
    )
    parser.add_argument("run", type=Path, help="run folder, such as runs/tiny")
    parser.add_argument("target", type=Path, help="where it goes, such as results/tiny")
    parser.add_argument(
        "--readme", type=Path, default=None, help="README whose table of claims is written anew"
    )
    options = parser.parse_args(arguments)
    try:
        publish(options.run, options.target)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.readme:
        write_claims(["--results", str(options.target), "--readme", str(options.readme)])
        seconds = json.loads((options.target / "timing.json").read_text(encoding="utf-8"))
        options.readme.write_text(
            with_timing(options.readme.read_text(encoding="utf-8"), seconds), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
