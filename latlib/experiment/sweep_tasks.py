"""What a sweep does on the machine of a trial, and how files travel between it and the driver (see
`latlib.experiment.sweep`).

1. `perform` is Ray's task: a plain function that takes settings and files and returns files.
2. It works on an ordinary `Run` in a scratch folder named after the settings and the model, so that
   the next attempt on this machine goes on from the checkpoint there. The folder is deleted when
   the files are packed.
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
from latlib.evaluation.outcomes import BASE
from latlib.experiment.layout import Layout
from latlib.experiment.run import Run
from latlib.experiment.spec import Spec
from latlib.io.files import aside, folder_aside

SUITE = "variant"  # what is measured on a trial's model
MODELS = "models"  # the folder of a run in which a model is a folder
Files = dict[str, bytes]  # path in a run folder -> content
Result = tuple[Files, float, str]  # what was made, seconds, machine


def perform(
    settings: dict[str, Any], spec: Spec, base: Result, scratch: str, adapter: bool
) -> Result:
    """Task: make a base model and measure its residual norms, or train and measure a trial.

    base: what there is of the base. adapter: whether to return a trial's adapter, too.
    """
    started = time.monotonic()
    with _scratch_run(settings, spec.folder, scratch) as run:
        unpack(run.folder, base[0])
        if spec.method == BASE:
            run.norms(spec.seed)
            paths = base_paths(run.layout, spec)
        else:
            model = (spec.method, spec.seed, dict(spec.changes))
            run.measure([(model, SUITE)])
            paths = trial_paths(run.layout, spec, adapter)
        made = packed(run.folder, paths)
    return made, time.monotonic() - started, socket.gethostname()


@contextmanager
def _scratch_run(settings: dict[str, Any], name: str, scratch: str) -> Iterator[Run]:
    """The run of one task in this machine's scratch folder, to itself; deleted at the end unless
    there was an error.

    A file beside it lists the processes that worked on it, a line each.
    """
    parent = _scratch_folder(settings, scratch)
    parent.mkdir(parents=True, exist_ok=True)
    # an attempt that Ray gave up may not be quite dead yet
    with FileLock(parent / f"{name}.lock"):
        with (parent / f"{name}.attempts").open("a") as attempts:
            print(os.getpid(), file=attempts)
        yield Run(validated(Profile, settings), parent / name)
        shutil.rmtree(parent / name, ignore_errors=True)


def _scratch_folder(settings: dict[str, Any], scratch: str) -> Path:
    """Where runs with these settings lie on this machine."""
    fixed = {field: value for field, value in settings.items() if field not in FREE_FIELDS}
    digest = hashlib.sha256(json.dumps(fixed).encode()).hexdigest()
    place = scratch or f"{tempfile.gettempdir()}/latlib-sweep-{os.getuid()}"
    return Path(place).expanduser() / digest[:12]


def base_paths(layout: Layout, base: Spec) -> list[Path]:
    """What a trial needs of its seed's base: the model, where it is made here and not a hub's, and
    its norms.
    """
    paths = [layout.norms_file(base.seed)]
    if layout.source(base) is None:
        paths += [layout.model_folder(base), layout.metrics_file(base)]
    return paths


def trial_paths(layout: Layout, trial: Spec, adapter: bool) -> list[Path]:
    """What is kept of a trial, its table last: where that is, all is."""
    model = [layout.model_folder(trial)] if adapter else []
    return [*model, layout.metrics_file(trial), layout.table_file(trial, SUITE)]


def packed(folder: Path, paths: Sequence[Path]) -> Files:
    """The files at `paths`, or below them, under `folder`; a path where nothing is adds nothing."""
    files = {}
    for path in paths:
        for file in (path, *sorted(path.rglob("*"))):
            if file.is_file():
                files[str(file.relative_to(folder))] = file.read_bytes()
    return files


def unpack(folder: Path, files: Files) -> None:
    """Put files into a run folder, a model's folder as one and before the others; these in their
    order, each whole.
    """
    models: dict[str, Files] = {}
    others: Files = {}
    for name, content in files.items():
        first, *rest = Path(name).parts
        if first == MODELS:
            model, *inside = rest
            models.setdefault(model, {})[str(Path(*inside))] = content
        else:
            others[name] = content
    for model, parts in models.items():
        target = folder / MODELS / model
        if not target.exists():
            with folder_aside(target) as partial:
                _write(partial, parts)
    _write(folder, others)


def _write(folder: Path, files: Files) -> None:
    for name, content in files.items():
        with aside(folder / name) as partial:
            partial.write_bytes(content)
