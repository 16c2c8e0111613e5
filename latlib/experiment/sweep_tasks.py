"""What a sweep does on the machine of a trial, and how files travel between it and the driver (see
`latlib.experiment.sweep`).

1. `make_base` and `make_trial` are Ray's tasks: plain functions that take settings and files and
   return files.
2. Each works on an ordinary `Run` in a scratch folder named after the settings and the trial, so
   that the next attempt on this machine goes on from the checkpoint there. The folder is deleted
   when the files are packed.
3. `packed` and `unpack` turn parts of a run folder into bytes and back; what is unpacked is there
   whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from latlib.config.profile import FREE_FIELDS, Profile, validated
from latlib.experiment.run import Run
from latlib.experiment.spec import Spec
from latlib.io.files import aside, folder_aside

SUITE = "variant"  # what is measured on a trial's model
Files = dict[str, bytes]  # path in a run folder -> content
Result = tuple[Files, float, str]  # what was made, seconds, machine


@contextmanager
def _scratch(settings: dict[str, Any], name: str, place: str) -> Iterator[Run]:
    """The run of one task in this machine's scratch folder, to itself; deleted at the end unless
    there was an error.

    A file beside it lists the processes that worked on it, a line each.
    """
    profile = validated(Profile, settings)
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in settings.items() if k not in FREE_FIELDS}).encode()
    )
    root = (
        Path(place).expanduser()
        if place
        else Path(tempfile.gettempdir()) / f"latlib-sweep-{os.getuid()}"
    )
    folder = root / digest.hexdigest()[:12] / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # an attempt that Ray gave up may not be quite dead yet
    with FileLock(folder.with_name(f"{name}.lock")):
        with folder.with_name(f"{name}.attempts").open("a") as attempts:
            print(os.getpid(), file=attempts)
        yield Run(profile, folder)
        shutil.rmtree(folder, ignore_errors=True)


def make_base(settings: dict[str, Any], base: Spec, files: Files, scratch: str) -> Result:
    """Task: the base model of a seed and the residual norms measured on it. files: those of them
    that are there.
    """
    started = time.monotonic()
    with _scratch(settings, base.folder, scratch) as run:
        unpack(run.folder, files)
        run.norms(base.seed)
        return (
            packed(run.folder, base_paths(run, base.seed)),
            time.monotonic() - started,
            socket.gethostname(),
        )


def make_trial(
    settings: dict[str, Any], trial: Spec, files: Files, scratch: str, adapter: bool
) -> Result:
    """Task: train and measure one model on the base in `files`. adapter: whether to return it
    too.
    """
    started, model = time.monotonic(), (trial.method, trial.seed, dict(trial.changes))
    with _scratch(settings, trial.folder, scratch) as run:
        unpack(run.folder, files)
        run.measure([(model, SUITE)])
        made = packed(run.folder, trial_paths(run, trial, adapter))
        return made, time.monotonic() - started, socket.gethostname()


def base_paths(run: Run, seed: int) -> list[Path]:
    """What a trial needs of its seed's base: the model, where it is made here and not a hub's, and
    its norms.
    """
    base = run.spec("base", seed)
    model = (
        [run.layout.model_folder(base), run.layout.metrics_file(base)]
        if run.profile.model.source == "world"
        else []
    )
    return [*model, run.layout.norms_file(seed)]


def trial_paths(run: Run, trial: Spec, adapter: bool) -> list[Path]:
    """What is kept of a trial, its table last: where that is, all is."""
    model = [run.layout.model_folder(trial)] if adapter else []
    return [*model, run.layout.metrics_file(trial), run.layout.table_file(trial, SUITE)]


def packed(folder: Path, paths: Sequence[Path]) -> Files:
    """The files at `paths`, or below them, under `folder`; a path where nothing is adds nothing."""
    found = [
        file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found if file.is_file()}


def unpack(folder: Path, files: Files) -> None:
    """Put files into a run folder in their order, each aside first, then renamed; a model's folder
    as one.
    """
    models: dict[Path, Files] = {}
    for name, content in files.items():
        path = Path(name)
        if path.parts[0] == "models":
            models.setdefault(folder / "models" / path.parts[1], {})[str(Path(*path.parts[2:]))] = (
                content
            )
    for target, parts in models.items():
        if not target.exists():
            with folder_aside(target) as folder_of_model:
                _write(folder_of_model, parts)
    _write(
        folder, {name: content for name, content in files.items() if not name.startswith("models/")}
    )


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        with aside(folder / name) as partial:
            partial.write_bytes(content)
