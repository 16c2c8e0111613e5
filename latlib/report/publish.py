"""Copy what a reader needs of a finished run into the repository: the evidence behind the README.

    ./run_all.sh --fresh && .venv/bin/python -m latlib.report.publish runs/tiny results/tiny
    --claims README.md --timing README.md

1. The report, the executed notebooks, the outcome table, results JSON, training curves and the main
   figure are copied; models and W&B folders are not.
2. Paths of the machine it ran on are left out (`latlib.io.files.without_paths`), as is the notebook
   runner's bookkeeping; numbers of training curves have nine digits. Prompts from data files are
   somebody's: cells with the tag `shows-prompts` go without their outputs.
3. Where asked for, the README's table of claims and its line on time are written anew from the
   copy. Of a run that was made in several sittings the line tells what the last one took, and says
   so.
4. A manifest with the checksums of all of it lies beside it (`latlib.io.manifest`).
5. `restore` is the way back: a run folder of published evidence, on which notebooks that train
   nothing (09, 99) run again when the report has changed:
    python -m latlib.report.publish --restore results/tiny-many runs/again
    ./run_all.sh --profile tiny-many --out runs/again --only 09,99
The folder is put into place whole, and only when it stays below the size a repository should carry.
What it replaces must be what was published there, unchanged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml

from latlib.config.paths import portable
from latlib.experiment.layout import BEGAN
from latlib.experiment.record import PROFILE
from latlib.io import manifest
from latlib.io.files import folder_aside, read_json, without_paths
from latlib.io.machine import available_cores
from latlib.report.claims import write_readme
from latlib.report.tables import between_markers

LIMIT_BYTES = 8_000_000
TEXTS = (".json", ".jsonl", ".yaml", ".html", ".md", ".ipynb")
COPIED = ("report.html", "profile.yaml", "metrics/*.jsonl")
RESULTS = ("results/*.json", "results/*.png", "results/*.md")
NOTEBOOKS = "notebooks/[0-9][0-9]_*.ipynb"
SHOWS_PROMPTS = "shows-prompts"  # the tag of cells whose outputs quote prompts
NOT_PUBLISHED = "Left out here: prompts from data files are shown in the run's own folder.\n"
TIMING = "timing.json"
OF_A_RUN = ("notebooks", "metrics", "profile.yaml", "report.html")  # where they lie in a run, too
STARTING_S = 120  # seconds from a run's first file to its first notebook, at most: our choice


def publish(run: Path, target: Path) -> None:
    """Copy the evidence of `run` to `target`.

    Raises FileNotFoundError when the run has no report (it is not finished), ValueError when the
    copy is too large, FileExistsError when `target` holds something that was not published there.
    """
    run = run.resolve()
    if not (run / "report.html").is_file():
        raise FileNotFoundError(f"{run} has no report.html: finish the run with ./run_all.sh first")
    target = target.resolve()
    with folder_aside(target) as folder:
        _write(run, folder)
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        total = sum(sizes.values())
        if total > LIMIT_BYTES:
            largest = max(sizes, key=sizes.__getitem__).relative_to(folder)
            raise ValueError(
                f"{total} bytes, more than {LIMIT_BYTES}; the largest file is {largest}"
            )
        manifest.record(folder, folder, folder)
        if target.is_dir():
            check_replaceable(target)
            shutil.rmtree(target)


def restore(published: Path, run: Path) -> None:
    """Lay out a run folder of published evidence; it has no models.

    Raises FileExistsError when `run` is there already, ValueError when nothing was published at
    `published`, or something in it is damaged.
    """
    if run.exists():
        raise FileExistsError(f"{run} is there already: give another folder")
    if not (published / manifest.NAME).is_file():
        raise ValueError(f"{published} has no {manifest.NAME}: it holds no published results")
    with folder_aside(run.resolve()) as folder:
        for file in manifest.files_below(published.resolve()):
            if damage := manifest.damage(file):
                raise ValueError(f"{file}: {damage}")
            path = file.relative_to(published.resolve())
            place = folder / path if path.parts[0] in OF_A_RUN else folder / "results" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
        manifest.record(folder, folder, folder)


def check_replaceable(target: Path) -> None:
    """Raise FileExistsError where `target` holds something that was not published there, or was
    changed since."""
    for path in sorted(target.rglob("*")):
        ours = path.name == manifest.NAME or (path.is_file() and manifest.is_ours(target, path))
        if not path.is_dir() and not ours:
            raise FileExistsError(
                f"{target} would be replaced, and {path.relative_to(target)} in it is not as it was"
                " published: move it away, or give another folder"
            )


def _write(run: Path, folder: Path) -> None:
    """Fill a folder with the evidence of a run."""
    for source in _files(run, *COPIED, *RESULTS, NOTEBOOKS):
        # results lie at the top of the copy
        copy = folder / source.relative_to(run).as_posix().removeprefix("results/")
        copy.parent.mkdir(exist_ok=True)
        if source.suffix in TEXTS:
            copy.write_text(_text(source, run), encoding="utf-8")
        else:
            shutil.copy2(source, copy)
    (folder / TIMING).write_text(json.dumps(timing(run), indent=1), encoding="utf-8")
    (folder / "outcomes").mkdir()
    tables = [pd.read_parquet(path) for path in _files(run, "results/outcomes/*.parquet")]
    every = pd.concat(tables, ignore_index=True)
    every.to_parquet(folder / "outcomes" / "all.parquet", index=False, compression="zstd")


def _files(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def _text(file: Path, run: Path) -> str:
    """A text without paths of this machine; of an executed notebook without the runner's metadata,
    which changes with every run, and without the plain words of what is shown richly, too.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        notebook = nbformat.reads(text, as_version=4)
        for part in (notebook, *notebook.cells):
            part.metadata.pop("papermill", None)
            part.metadata.pop("execution", None)
        somebodys = _from_files(run)
        for cell in notebook.cells:
            if somebodys and SHOWS_PROMPTS in cell.metadata.get("tags", ()):
                cell.outputs = [nbformat.v4.new_output("stream", text=NOT_PUBLISHED)]
            for output in cell.get("outputs", ()):
                if len(output.get("data", ())) > 1:
                    output["data"].pop("text/plain", None)
        text = nbformat.writes(notebook)
    if file.name == PROFILE:  # files that it names may lie anywhere
        text = yaml.safe_dump(portable(yaml.safe_load(text)), sort_keys=False)
    if file.suffix == ".jsonl":
        text = "".join(json.dumps(_short(json.loads(line))) + "\n" for line in text.splitlines())
    return without_paths(text, run)


def _from_files(run: Path) -> bool:
    """Whether a run's prompts are somebody's, and not the made-up world's."""
    settings = yaml.safe_load((run / PROFILE).read_text(encoding="utf-8"))
    return bool(settings.get("data", {}).get("source") == "files")


def _short(step: dict[str, Any]) -> dict[str, Any]:
    """A line of training curves in nine digits a number, which tell any two float32 apart."""
    return {k: float(f"{v:.9g}") if isinstance(v, float) else v for k, v in step.items()}


def timing(run: Path) -> dict[str, Any]:
    """What a run took: `notebooks`, seconds of each executed one; `resumed`, whether it had begun
    in an earlier sitting; `models` and `training_s`, how many were trained and in how many seconds;
    `began`, a date; the `cores` of this machine. Of a restored run, what was published.
    """
    if (published := run / "results" / TIMING).is_file():
        return read_json(published)
    notebooks: dict[str, float] = {}
    starts = []
    for path in _files(run, NOTEBOOKS):
        bookkeeping = nbformat.read(path, as_version=4).metadata.get("papermill", {})
        notebooks[path.stem] = round(bookkeeping.get("duration") or float("nan"), 1)
        if started := bookkeeping.get("start_time"):
            starts.append(datetime.fromisoformat(started).timestamp())
    began = (run / BEGAN).stat().st_mtime
    cards = [read_json(path) for path in _files(run, "models/*/latlib.json")]
    return {
        "cores": available_cores(),
        "resumed": bool(starts) and min(starts) - began > STARTING_S,
        "began": str(date.fromtimestamp(began)),
        "models": len(cards),
        "training_s": round(sum(card.get("seconds", 0.0) for card in cards), 1),
        "notebooks": notebooks,
    }


def with_timing(readme: str, took: dict[str, Any]) -> str:
    """`readme` with the line between its timing markers written from `timing`'s result."""
    minutes = {name: seconds / 60 for name, seconds in took["notebooks"].items()}
    each = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    who = "the committed run took"
    if took["resumed"]:
        who = "the last of several sittings, which made what was still missing of the run, took"
    line = (
        f"**How long it takes.** On {took['cores']} CPU cores {who}"
        f" {sum(minutes.values()):.1f} minutes after installation ({each})."
    )
    return between_markers(readme, "timing", line)


def main(arguments: list[str] | None = None) -> None:
    """The command line; exits with status 1 and the reason where nothing can be published."""
    parser = argparse.ArgumentParser(
        prog="python -m latlib.report.publish", description="Copy a run's evidence."
    )
    parser.add_argument("run", type=Path, help="run folder, such as runs/tiny")
    parser.add_argument("target", type=Path, help="where it goes, such as results/tiny")
    parser.add_argument("--restore", action="store_true", help="lay out a run folder of results")
    parser.add_argument("--claims", type=Path, help="README whose table of claims is written anew")
    parser.add_argument("--timing", type=Path, help="README whose line on time is written anew")
    options = parser.parse_args(arguments)
    try:
        (restore if options.restore else publish)(options.run, options.target)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.claims:
        write_readme(options.target, options.claims)
    if options.timing:
        text = with_timing(options.timing.read_text(encoding="utf-8"), timing(options.run))
        options.timing.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
