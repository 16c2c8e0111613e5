"""Which file of a run lies where in its folder.

    profile.yaml                                what the run was made with
    began.json                                  the day on which it began
    models/<model>/                             an adapter or a base, with its card and its record
    models/.<model>.checkpoints/                of a training that is not finished
    metrics/<model>.jsonl                       a line a training step
    results/outcomes/<suite>-<model>.parquet    rows of the outcome table
    results/attacks/<digest>.parquet            rows of a single attack
    results/geometry/<model>/                   differences, directions and variance of activations
    results/<name>.json                         everything else that was measured
    wandb/                                      what wandb writes

where <model> is `Spec.folder`, such as 'lat-seed0'.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from filelock import FileLock, Timeout

from latlib.config.paths import portable
from latlib.config.profile import FREE_FIELDS, Profile, changed_settings
from latlib.config.sections import ProfileError
from latlib.evaluation.outcomes import BASE
from latlib.experiment.spec import Spec
from latlib.io.files import Json, read_json, write_json, write_text

if TYPE_CHECKING:
    from latlib.redteam.latent import AttackCell

# on the geometry of a model's activations
DIFFERENCES = "differences.safetensors"
DIRECTIONS = "directions.safetensors"
VARIANCE = "variance.json"  # the last of them that is written
NEEDED_BYTES = 300 * 2**20  # a tiny run leaves about half of that


@dataclass(frozen=True)
class Layout:
    """The files of a run with this profile in this folder."""

    profile: Profile
    folder: Path

    def claim(self) -> None:
        """Make the folder and write the profile there, or compare with the one it was made with.

        Raises ProfileError for a folder that cannot be written or whose disk is too full for a run,
        or that was made with other settings (saying which differ).
        """
        mine = self.profile.model_dump(mode="json")
        file = self.folder / "profile.yaml"
        with _writing(self.folder):
            if not file.exists():
                write_text(yaml.safe_dump(mine, sort_keys=False), file)
            for folder in ("models", "metrics", "results/outcomes", "logs"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        if free < NEEDED_BYTES:
            raise ProfileError(
                f"run folder {self.folder}: {free / 2**20:.0f} MiB are free on its disk, a run"
                f" needs {NEEDED_BYTES / 2**20:.0f}: free some, or give a folder on another disk"
                " with --out"
            )
        theirs = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        if lines := changed_settings(fixed_settings(theirs), fixed_settings(mine)):
            raise ProfileError(
                f"run folder {self.folder} was made with other settings:\n  "
                + "\n  ".join(lines)
                + "\nstart over with --fresh, or keep both by giving another folder with --out"
            )

    def dated(self) -> Layout:
        """This layout, its profile's model.date set: the day on which the run began, where the
        profile names none."""
        model = self.profile.model
        if model.date is not None:
            return self
        file = self.folder / "began.json"
        if not file.exists():
            write_json({"date": datetime.date.today().isoformat()}, file)
        day = datetime.date.fromisoformat(read_json(file)["date"])
        model = model.model_copy(update={"date": day})
        return replace(self, profile=self.profile.model_copy(update={"model": model}))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that two commands never write into the same one. Raises
        ProfileError.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                held = lock.acquire()
            except Timeout:
                raise ProfileError(
                    f"another run is using {self.folder}: wait for it, or choose another with --out"
                ) from None
        with held:
            yield

    def source(self, spec: Spec) -> str | None:
        """The folder or hub id of a model that is not made here: another base than the world's, or
        a released one.
        """
        if spec.method == BASE:
            source = self.profile.model.source
            return None if source == "world" else source
        return self.profile.released.get(spec.method)

    def model_folder(self, spec: Spec) -> Path:
        """Where a model of this run lies once it is made; of one that is not made here, its
        source.
        """
        return Path(self.source(spec) or self.folder / "models" / spec.folder)

    def has(self, spec: Spec) -> bool:
        """Whether a model is made, or need not be. Folders are moved into place whole."""
        return self.source(spec) is not None or self.model_folder(spec).is_dir()

    def checkpoints(self, spec: Spec) -> Path:
        """The folder of a training's checkpoints."""
        return self.folder / "models" / f".{spec.folder}.checkpoints"

    def plain_steps(self, steps: int, digest: str) -> Path:
        """The state after so many training steps without an attack, which methods share."""
        return self.folder / "models" / f".plain-{steps}-{digest}.pt"

    def metrics_file(self, spec: Spec) -> Path:
        """The JSONL that a model's training writes."""
        return self.folder / "metrics" / f"{spec.folder}.jsonl"

    def table_file(self, spec: Spec, what: str | AttackCell) -> Path:
        """Where the outcome rows of a suite or an attack lie."""
        if isinstance(what, str):
            return self.outcomes / f"{what}-{spec.folder}.parquet"
        return self.folder / "results" / "attacks" / f"{what.digest(spec.folder)}.parquet"

    @property
    def outcomes(self) -> Path:
        """The folder of the suites' tables."""
        return self.folder / "results" / "outcomes"

    def geometry_file(self, spec: Spec, name: str) -> Path:
        """A file on the geometry of a model's activations."""
        return self.folder / "results" / "geometry" / spec.folder / name

    def has_geometry(self, spec: Spec) -> bool:
        """Whether it is found."""
        return self.geometry_file(spec, VARIANCE).exists()

    def result_file(self, name: str) -> Path:
        """Where a result of this name lies."""
        return self.folder / "results" / f"{name}.json"

    def norms_file(self, seed: int) -> Path:
        """Where the residual norms of a seed's base model lie."""
        return self.result_file(f"residual_norms-seed{seed}")

    @property
    def logs(self) -> Path:
        """The folder of logs, and of what processes tell each other."""
        return self.folder / "logs"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises ProfileError where the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ProfileError(
            f"run folder {folder} cannot be written ({error}): give another with --out"
        ) from None


def fixed_settings(profile: Json) -> Json:
    """The part of a dumped profile that a run folder is made with: a grid names trials and changes
    none, a file stays the same wherever it lies, and the day is the folder's."""
    kept = portable({k: v for k, v in profile.items() if k not in FREE_FIELDS})
    kept.get("sweep", {}).pop("grid", None)
    kept.get("model", {}).pop("date", None)  # of the run's own making
    return kept
