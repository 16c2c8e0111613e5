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

from filelock import FileLock

from latlib.config.profile import Profile
from latlib.evaluation.outcomes import BASE
from latlib.experiment.layout import Layout, fixed_settings
from latlib.experiment.run import Run
from latlib.experiment.spec import Spec
from latlib.io.files import aside
from latlib.io.manifest import files_below

SUITE = "variant"  # what is measured on a trial's model
# path in a run folder -> path in it ("." of a file) -> content
Files = dict[str, dict[str, bytes]]
Result = tuple[Files, float, str]  # what was made, seconds, machine


def perform(scratch: str, adapter: bool, profile: Profile, spec: Spec, base: Result) -> Result:
    """Task: make a base model and measure its residual norms, or train and measure a trial.

    adapter: whether to return a trial's adapter, too. base: what there is of the base.
    """
    started = time.monotonic()
    with _scratch_run(profile, spec.folder, scratch) as run:
        unpack(run.folder, base[0])
        if spec.method == BASE:
            run.norms(spec.seed)
        else:
            run.evaluate(spec.method, spec.seed, SUITE, dict(spec.changes))
        made = packed(run.folder, files_of(run.layout, spec, adapter))
    return made, time.monotonic() - started, socket.gethostname()


@contextmanager
def _scratch_run(profile: Profile, name: str, scratch: str) -> Iterator[Run]:
    """The run of one task in this machine's scratch folder, to itself; deleted at the end unless
    there was an error.

    A file beside it lists the processes that worked on it, a line each.
    """
    settings = json.dumps(fixed_settings(profile.model_dump(mode="json")))
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    place = scratch or f"{tempfile.gettempdir()}/latlib-sweep-{os.getuid()}"
    parent = Path(place, digest).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    # an attempt that Ray gave up may not be quite dead yet
    with FileLock(parent / f"{name}.lock"):
        with (parent / f"{name}.attempts").open("a") as attempts:
            print(os.getpid(), file=attempts)
        yield Run(profile, parent / name)
        shutil.rmtree(parent / name, ignore_errors=True)


def files_of(layout: Layout, spec: Spec, adapter: bool = False) -> list[Path]:
    """What a trial needs of its base: the model, where it is made here and not a hub's, its norms,
    and its responses where it is asked for any; or what is kept of a trial, its table last: where
    that is, all is.
    """
    model, metrics = layout.model_folder(spec), layout.metrics_file(spec)
    if spec.method != BASE:
        table = layout.table_file(spec, SUITE)
        return [model, metrics, table] if adapter else [metrics, table]
    measured = [layout.norms_file(spec.seed)]
    if answers := layout.profile.data.answers:
        measured.append(answers)
    return measured if layout.source(spec) else [model, metrics, *measured]


def packed(folder: Path, paths: Sequence[Path]) -> Files:
    """The files and folders at `paths` under `folder`; a path where nothing is adds nothing."""
    files = {}
    for path in paths:
        inside = {str(file.relative_to(path)): file.read_bytes() for file in files_below(path)}
        if inside:
            files[str(path.relative_to(folder))] = inside
    return files


def unpack(folder: Path, files: Files) -> None:
    """Put files and folders into a run folder in their order, each whole; a folder that is there
    stays as it is."""
    for name, content in files.items():
        target = folder / name
        if target.is_dir():
            continue
        with aside(target) as partial:
            for inside, part in content.items():
                file = partial / inside
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(part)
