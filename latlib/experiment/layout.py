"""Which file of a run lies where in its folder.

    latlib.sha256                               what is here, with checksums (`latlib.io.manifest`)
    profile.yaml                                what the run was made with
    began.json                                  the same again, and digests of the files it names
    data/responses.json                         what the base replies to benign prompts
    models/<model>/                             an adapter or a base, with its card and its record
    models/.<model>.checkpoints/                of a training that is not finished
    metrics/<model>.jsonl                       a line a training step
    results/outcomes/<suite>-<model>.parquet    rows of the outcome table
    results/attacks/<digest>.parquet            rows of a single attack
    results/geometry/<model>/                   differences, directions and variance of activations
    results/computed/<name>-<digest>.json       what a notebook computes once
    results/.unfinished/<suite>-<model>/        what a suite has measured before it has all
    results/<name>.json                         everything else that was measured
    wandb/                                      what wandb writes
    set-aside/                                  what was damaged, or is not of this run

where <model> is `Spec.folder`, such as 'lat-seed0'.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout
from pydantic import ValidationError

from latlib.config.paths import from_home, portable
from latlib.config.profile import FREE_FIELDS, Profile, changed_settings
from latlib.config.sections import BASE_ANSWERS, ProfileError
from latlib.evaluation.outcomes import BASE
from latlib.experiment.inputs import SHOWN, digests
from latlib.experiment.jobs import HELD
from latlib.experiment.record import PROFILE, RECORD
from latlib.experiment.spec import Spec
from latlib.io import manifest
from latlib.io.files import (
    SET_ASIDE,
    Json,
    json_ready,
    read_json,
    set_aside,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from latlib.redteam.latent import AttackCell

# on the geometry of a model's activations
DIFFERENCES = "differences.safetensors"
DIRECTIONS = "directions.safetensors"
VARIANCE = "variance.json"
GEOMETRY = (DIFFERENCES, VARIANCE, DIRECTIONS)
BEGAN = "began.json"  # what a folder was begun with: settings, digests of inputs
METRICS = "metrics.jsonl"  # in a model's folder: a copy of its log
LOCK_WAIT_S = 1.0  # whoever writes a single result is done by then
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NEEDED_BYTES = 300 * 2**20  # a tiny run leaves about half of that


@dataclass(frozen=True)
class Layout:
    """The files of a run with this profile in this folder."""

    profile: Profile
    folder: Path

    def claim(self) -> None:
        """Make the folder and write down what it is made with, or compare with that.

        Raises ProfileError for a folder that cannot be written, whose disk is too full for a run,
        that holds other things, or that was made with other settings or inputs (saying which
        differ).
        """
        kept = self._kept()
        if not kept:
            self._check_empty()
            settings = self.completed().profile.model_dump(mode="json")
            kept = {"profile": from_home(settings), "inputs": {}}
        mine = self.profile.model_dump(mode="json")
        began_with = fixed_settings(_in_full(kept["profile"]))
        if lines := changed_settings(began_with, fixed_settings(mine)):
            raise ProfileError(
                f"run folder {self.folder} was made with other settings:\n  "
                + "\n  ".join(lines)
                + "\nstart over with --fresh, or keep both by giving another folder with --out"
            )
        kept = kept | {"inputs": self._same_inputs(kept["inputs"])}
        profile, began = self.folder / PROFILE, self.folder / BEGAN
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / manifest.NAME).exists():
                (self.folder / manifest.NAME).touch()  # first: it says whose folder it is
            for folder in ("models", "metrics", "results/outcomes", "logs"):
                (self.folder / folder).mkdir(parents=True, exist_ok=True)
            if not self.whole(profile):
                write_text(yaml.safe_dump(kept["profile"], sort_keys=False), profile)
            if not self.whole(began) or read_json(began) != kept:
                write_json(kept, began)
            free = shutil.disk_usage(self.folder).free
        if free < NEEDED_BYTES:
            raise ProfileError(
                f"run folder {self.folder}: {free / 2**20:.0f} MiB are free on its disk, a run"
                f" needs {NEEDED_BYTES / 2**20:.0f}: free some, or give a folder on another disk"
                " with --out"
            )

    def _kept(self) -> Json:
        """What the folder was begun with, {} for a new one: of its two copies the one that is
        whole."""
        began, file = self.folder / BEGAN, self.folder / PROFILE
        if self.whole(began) and "profile" in (kept := read_json(began)):
            return kept
        if not self.whole(file):
            return {}
        try:
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            settings = None
        if not isinstance(settings, dict):
            raise ProfileError(f"{file} is no profile: put it back, or give another folder (--out)")
        return {"profile": settings, "inputs": {}}

    def _check_empty(self) -> None:
        """Raises ProfileError for a folder that is new to us and holds something."""
        ours = (".lock", manifest.NAME, SET_ASIDE)
        there = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        strange = [entry.name for entry in there if entry.name not in ours]
        if strange and not (self.folder / manifest.NAME).is_file():
            raise ProfileError(
                f"run folder {self.folder} is none, and holds {', '.join(strange[:3])}: give a new"
                " folder with --out"
            )

    def _same_inputs(self, kept: Mapping[str, str]) -> dict[str, str]:
        """Digests of what the settings name, those that are known. Raises ProfileError where they
        are not those of the folder, naming the inputs."""
        found = digests(self.profile)
        lines = []
        for name, digest in found.items():
            if kept.get(name, digest) != digest:
                lines.append(f"{name}: {kept[name]} -> {digest}")
        if lines:
            raise ProfileError(
                f"run folder {self.folder} was made with other inputs (digests of what is in"
                " them):\n  "
                + "\n  ".join(lines)
                + "\nput back what was there (of a hub id: set its revision), start over with"
                " --fresh, or keep both by giving another folder with --out"
            )
        return {**kept, **found}

    def completed(self) -> Layout:
        """This layout, its profile completed by what is the run's own: model.date, the day on which
        it began, where the profile names none; and where the base's responses are kept."""
        model, data = self.profile.model, self.profile.data
        if model.date is None:
            began = self._kept().get("profile", {}).get("model", {}).get("date")
            day = datetime.date.fromisoformat(began) if began else datetime.date.today()
            model = model.model_copy(update={"date": day})
        if data.benign_responses == BASE_ANSWERS:
            data = data.answered_in(self.folder / "data" / "responses.json")
        changed = {"model": model, "data": data}
        return replace(self, profile=self.profile.model_copy(update=changed))

    def lacks_responses(self) -> bool:
        """Whether the base is still to be asked for responses to benign prompts."""
        file = self.profile.data.answers
        return file is not None and not self.whole(file)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing: one command or notebook does at a time, together with the
        processes that it starts. Raises ProfileError where another does.
        """
        held = os.environ.get(HELD, "")
        if str(self.folder) in held.split("\n"):  # a colon may stand in a name
            yield
            return
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _acquired(self.folder)
        os.environ[HELD] = f"{held}\n{self.folder}"
        try:
            yield
        finally:
            os.environ[HELD] = held
            lock.release()

    def whole(self, path: Path) -> bool:
        """Whether a finished file or folder is there as it was written. What is damaged is set
        aside, so that it is made again."""
        if damage := manifest.damage(path):
            with self.locked():
                set_aside(self.folder, path, f"{damage} and is made again")
        return path.exists()

    def source(self, spec: Spec) -> str | None:
        """The folder or hub id of a model that is not made here: another base than the world's, or
        a released one.
        """
        if spec.method == BASE:
            source = self.profile.model.source
            return None if source == "world" else source
        return self.profile.released_source(spec.method, spec.seed)

    def model_folder(self, spec: Spec) -> Path:
        """Where a model of this run lies once it is made; of one that is not made here, its
        source.
        """
        return Path(self.source(spec) or self.folder / "models" / spec.folder)

    def has(self, spec: Spec) -> bool:
        """Whether a model is made, or need not be. A log that is lost comes from its folder."""
        if self.source(spec) is not None:
            return True
        folder, log = self.model_folder(spec), self.metrics_file(spec)
        made = self.whole(folder)
        if made and spec.method != BASE:
            self._check_inputs(spec)
        if made and (folder / METRICS).is_file() and not self.whole(log):
            write_text((folder / METRICS).read_text(encoding="utf-8"), log)
        return made

    def inputs(self, spec: Spec) -> dict[str, str]:
        """Digests of what a model is made from: files that the settings name, and what this run has
        made itself."""
        return digests(self.profile) | self._made_inputs(spec)

    def _made_inputs(self, spec: Spec) -> dict[str, str]:
        """Of these what the run has made: a base, and what a base replied."""
        files = {"responses of the base": self.profile.data.answers}
        if self.source(spec.base) is None:
            files["base"] = self.model_folder(spec.base) / "model.safetensors"
        found = {}
        for name, file in files.items():
            if file is not None and file.is_file():
                found[name] = manifest.digest(file)[:SHOWN]
        return found

    def _check_inputs(self, spec: Spec) -> None:
        """Raises ProfileError for a model that was trained on another base of this run, or on other
        responses of it."""
        record = self.model_folder(spec) / RECORD
        mine = self._made_inputs(spec)
        if not mine or not record.is_file():
            return
        before = read_json(record).get("inputs", {})
        for name, digest in mine.items():
            if before.get(name, digest) != digest:
                raise ProfileError(
                    f"{spec.name} in {self.folder} was trained on the {name} {before[name]}, and"
                    f" that of {spec.base.name} is {digest} now: start over with --fresh, or give"
                    " another folder with --out"
                )

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

    def unfinished(self, spec: Spec, suite: str) -> Path:
        """The folder of what a suite has measured on a model before it has all: with checksums of
        its own, and another one when the model is another."""
        key = [str(self.profile.model.date)]
        if self.source(spec) is None:
            weights = sorted(self.model_folder(spec).glob("*.safetensors"))
            key += map(manifest.digest, weights)
        name = hashlib.sha256(" ".join(key).encode()).hexdigest()[:SHOWN]
        folder = self._unfinished(spec, suite) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / manifest.NAME).touch()
        return folder

    def forget_unfinished(self, spec: Spec, suite: str) -> None:
        """Delete it: the suite is measured."""
        shutil.rmtree(self._unfinished(spec, suite), ignore_errors=True)

    def _unfinished(self, spec: Spec, suite: str) -> Path:
        return self.folder / "results" / ".unfinished" / f"{suite}-{spec.folder}"

    @property
    def outcomes(self) -> Path:
        """The folder of the suites' tables."""
        return self.folder / "results" / "outcomes"

    def geometry_file(self, spec: Spec, name: str) -> Path:
        """A file on the geometry of a model's activations."""
        return self.folder / "results" / "geometry" / spec.folder / name

    def has_geometry(self, spec: Spec, names: Iterable[str]) -> bool:
        """Whether these of its files are there, and the differences that they stand on."""
        files = [self.geometry_file(spec, name) for name in {DIFFERENCES, *names}]
        return all(map(self.whole, files))

    def result_file(self, name: str) -> Path:
        """Where a result of this name lies."""
        return self.folder / "results" / f"{name}.json"

    def computed_file(self, name: str, settings: Mapping[str, Any]) -> Path:
        """Where what was computed with these settings lies."""
        key = json.dumps(json_ready(settings), sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:SHOWN]
        return self.folder / "results" / "computed" / f"{name}-{digest}.json"

    def norms_file(self, seed: int) -> Path:
        """Where the residual norms of a seed's base model lie."""
        return self.result_file(f"residual_norms-seed{seed}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises ProfileError where the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise ProfileError(
            f"run folder {folder} cannot be written ({error}): give another with --out"
        ) from None


def _acquired(folder: Path) -> BaseFileLock:
    """The lock of a folder, held where its disk has locks. Raises ProfileError where another
    process holds it."""
    lock = FileLock(folder / ".lock", timeout=LOCK_WAIT_S)
    try:
        lock.acquire()
    except Timeout:
        raise ProfileError(
            f"another run is using {folder}: wait for it, or choose another with --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        line = f"{folder}: its disk has no locks ({error}): let nothing else write there"
        print(line, file=sys.stderr, flush=True)
    return lock


def _in_full(profile: Json) -> Json:
    """A folder's settings, those that are newer than the folder at their defaults: what an earlier
    version began goes on while nobody changes them."""
    try:
        return Profile.model_validate(profile).model_dump(mode="json")
    except ValidationError:  # a field of then is gone, or means something else now
        return profile


def fixed_settings(profile: Json) -> Json:
    """The part of a dumped profile that a run folder is made with: a grid names trials and changes
    none, a file stays the same wherever it lies, the day is the folder's, and the made-up world
    has no use for a grader."""
    kept = portable({k: v for k, v in profile.items() if k not in FREE_FIELDS})
    kept.get("sweep", {}).pop("grid", None)
    kept.get("model", {}).pop("date", None)  # of the run's own making
    if kept.get("data", {}).get("source") == "world":  # whose replies are graded exactly
        kept.get("evaluation", {}).pop("grader", None)
    return kept
