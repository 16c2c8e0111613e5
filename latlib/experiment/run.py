"""A run's folder: what is there is loaded, what is missing is made, and nothing half-made looks
finished.

    run = Run("tiny") lm = run.model("lat", seed=0)                      # loads models/lat-seed0,
    or trains it (and its base) first lm = run.model("lat", 0, {"attack.eps": 0.2})      # a variant
    of your own, kept beside it run.ensure([("ssft", 0), ("lat", 0)])              # trains what is
    missing, side by side table = run.evaluate("lat", 0, "audit")            # rows of the outcome
    table, measured once

A folder belongs to the settings it was made with: opening it with others is an error that says
which differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from latlib.config.profile import Profile, ProfileError, claim_folder, load_profile, run_folder
from latlib.evaluation.outcomes import OnStep, Subject
from latlib.experiment import build
from latlib.experiment.jobs import threads_for, work
from latlib.experiment.tracking import read_metrics
from latlib.hooks import Site
from latlib.io.files import write_json, write_table
from latlib.io.machine import keep_freed_memory
from latlib.models import LanguageModel, load, load_released
from latlib.redteam import audit, jailbreaks, latent
from latlib.redteam.latent import AttackCell
from latlib.refusal.ablation import ablation
from latlib.refusal.directions import (
    Differences,
    Direction,
    find_directions,
    fixed_site,
    load_directions,
    paired_differences,
    save_directions,
    sources,
)
from latlib.refusal.geometry import variance_table

# suites that need nothing but the model
PLAIN_SUITES = {
    "audit": audit.audit,
    "variant": audit.variant,
    "robustness": latent.robustness,
    "attacks": latent.attacks,
}
SUITES = (*PLAIN_SUITES, "jailbreaks", "transfer", "ablation")
GEOMETRY, GEOMETRY_FILES = (
    "geometry",
    ("differences.safetensors", "directions.safetensors", "variance.json"),
)


@dataclass(frozen=True)
class Spec:
    """One model of a run: a method, a seed, and what it changes in the method's training
    settings.
    """

    method: str
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()
    variant: str = ""

    @property
    def label(self) -> str:
        """How tables name it: 'lat', or 'lat[no-kl]'."""
        return f"{self.method}[{self.variant}]" if self.variant else self.method

    @property
    def folder(self) -> str:
        """How folders name it: 'lat-seed0', or 'lat-no-kl-seed0'."""
        slug = re.sub(r"[^A-Za-z0-9._=+-]+", "-", f"-{self.variant}" if self.variant else "")
        return f"{self.method}{slug}-seed{self.seed}"


class Run:
    """See the module's docstring. profile: a name, a YAML file, or a Profile. out: the run folder,
    else `run_folder`.

    Raises ProfileError for bad settings, for an unwritable folder, or for a folder made with other
    settings.
    """

    def __init__(
        self, profile: str | Path | Profile = "tiny", out: str | Path | None = None
    ) -> None:
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        self.folder = run_folder(self.profile.name, out)
        claim_folder(self.profile, self.folder)
        keep_freed_memory()
        torch.set_num_threads(min(torch.get_num_threads(), threads_for(self.profile)))

    def spec(
        self, method: str, seed: int = 0, variant: str | Mapping[str, Any] | None = None
    ) -> Spec:
        """The model that (method, seed, variant) means; a variant is a name of `sweep.variants` or
        dotted changes.

        Raises ProfileError for an unknown method, variant or field.
        """
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ProfileError(f"seed = {seed!r}: give a whole number >= 0")
        if variant is None or variant == {}:
            changes, name = {}, ""
        elif isinstance(variant, str):
            variants = self.profile.sweep.variants
            if variant not in variants:
                raise ProfileError(
                    f"variant = {variant!r} is unknown: choose one of"
                    f" {', '.join(variants) or 'none'}"
                )
            changes, name = variants[variant], variant
        else:
            changes, name = dict(variant), "+".join(f"{k}={v}" for k, v in sorted(variant.items()))
        if changes and method in self.profile.released:
            raise ProfileError(
                f"variant = {variant!r}: {method} is released.{method}, which is not trained here"
            )
        if method != "base":
            self.profile.training(method, changes)
        elif changes:
            raise ProfileError(f"variant = {variant!r}: the base model has none")
        return Spec(method, seed, tuple(sorted(changes.items())), name)

    def model_folder(self, spec: Spec) -> Path:
        """Where a model of this run lies once it is made; of one that is not made
        here, its source.
        """
        return Path(self._source(spec) or self.folder / "models" / spec.folder)

    def _source(self, spec: Spec) -> str | None:
        """The folder or hub id of a model that is not made here: another base than the world's, or
        a released one.
        """
        if spec.method == "base":
            return None if self.profile.model.source == "world" else self.profile.model.source
        return self.profile.released.get(spec.method)

    def has(self, spec: Spec) -> bool:
        """Whether a model is made, or need not be. Folders are moved into place whole."""
        return self._source(spec) is not None or self.model_folder(spec).is_dir()

    def ensure(self, models: Iterable[tuple]) -> None:
        """Make every missing model of [(method, seed), (method, seed, variant), ...] and the bases
        they need.
        """
        self._ensure(self.spec(*m) for m in models)

    def _ensure(self, models: Iterable[Spec]) -> None:
        specs = list(models)
        bases = [self.spec("base", seed) for seed in dict.fromkeys(s.seed for s in specs)]
        jobs = [(s, "") for s in dict.fromkeys([*bases, *specs]) if not self.has(s)]
        work(self, jobs)

    def model(
        self, method: str, seed: int = 0, variant: str | Mapping[str, Any] | None = None
    ) -> LanguageModel:
        """The model, made first if need be, frozen and ready to run; 'base' is the model before
        safety training.
        """
        spec = self.spec(method, seed, variant)
        self.ensure([(method, seed, variant)])
        base = self.model_folder(self.spec("base", seed))
        if method in self.profile.released:
            return load_released(base, self.profile.model, self.profile.released[method])
        return load(base, self.profile.model, None if method == "base" else self.model_folder(spec))

    def card(
        self, method: str, seed: int = 0, variant: str | Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What is recorded of a model's making: settings, seconds, last losses, residual norms.

        Raises ProfileError for a model that is not made here.
        """
        if self._source(self.spec(method, seed, variant)):
            raise ProfileError(
                f"{method} is not made here: it is"
                f" {self._source(self.spec(method, seed, variant))!r}"
            )
        self.ensure([(method, seed, variant)])
        file = self.model_folder(self.spec(method, seed, variant)) / build.RECORD
        return json.loads(file.read_text(encoding="utf-8"))

    def norms(self, seed: int = 0) -> dict[Site, float]:
        """site -> median residual norm of the base model on harmless training prompts, in units of
        the stream.
        """
        file = self.folder / "results" / f"residual_norms-seed{seed}.json"
        if not file.exists():
            base = self.model("base", seed)
            norms = build.measure_norms(base, self.profile, seed)
            self.save_result(file.stem, {str(site): norm for site, norm in norms.items()})
        found = json.loads(file.read_text(encoding="utf-8"))
        return {site if site == "embedding" else int(site): norm for site, norm in found.items()}

    def metrics(
        self, method: str, seed: int = 0, variant: str | Mapping[str, Any] | None = None
    ) -> pd.DataFrame:
        """The training metrics of a model, a row a step."""
        self.ensure([(method, seed, variant)])
        return read_metrics(self.metrics_file(self.spec(method, seed, variant)))

    def metrics_file(self, spec: Spec) -> Path:
        """The JSONL that a model's training writes."""
        return self.folder / "metrics" / f"{spec.folder}.jsonl"

    def subject(self, spec: Spec) -> Subject:
        """What an evaluation suite needs to know about a model."""
        method = "lat" if "lat" in self.profile.methods else next(iter(self.profile.methods))
        attack = self.profile.training(method).attack
        return Subject(self.profile, spec.label, spec.seed, attack, self.norms(spec.seed))

    def differences(self, method: str, seed: int = 0) -> Differences:
        """Harmful-harmless activation differences of a model (see `refusal.Differences`), found
        once and kept.
        """
        file = self._geometry_file(method, seed, "differences.safetensors")
        if not file.exists():
            paired_differences(self.model(method, seed), self.profile).save(file)
        return Differences.load(file)

    def directions(self, method: str, seed: int = 0) -> dict[str, Direction]:
        """rule -> refusal direction of a model (see `refusal.directions`), found once and kept."""
        file = self._geometry_file(method, seed, "directions.safetensors")
        if not file.exists():
            found = find_directions(
                self.model(method, seed), self.profile, self.differences(method, seed)
            )
            save_directions(found, file)
        return load_directions(file)

    def variance(self, method: str, seed: int = 0) -> dict[str, Any]:
        """Explained variance of a model's differences at their last token (see
        `geometry.variance_table`), found once and kept."""
        file = self._geometry_file(method, seed, "variance.json")
        if not file.exists():
            found = self.differences(method, seed)
            site = fixed_site(len(found.pairs) - 1)
            write_json(variance_table(found.last(), found.clusters, site), file)
        return json.loads(file.read_text(encoding="utf-8"))

    def find_geometry(self, models: Iterable[tuple[str, int]]) -> None:
        """Find differences, directions and variance of every model of [(method, seed), ...], side
        by side.
        """
        models = list(dict.fromkeys(models))
        self.ensure(models)
        missing = [
            m
            for m in models
            if not all(self._geometry_file(*m, name).exists() for name in GEOMETRY_FILES)
        ]
        work(self, [(self.spec(*m), GEOMETRY) for m in missing])

    def _geometry_file(self, method: str, seed: int, name: str) -> Path:
        folder = self.folder / "results" / "geometry" / self.spec(method, seed).folder
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def attack(self, method: str, seed: int, cell: AttackCell) -> pd.DataFrame:
        """Outcome rows of an attack of your own on a model, measured once and kept."""
        self.measure([((method, seed), cell)])
        return pd.read_parquet(self.table_file(self.spec(method, seed), cell))

    def table_file(self, spec: Spec, what: str | AttackCell) -> Path:
        """Where the outcome rows of a suite or an attack lie."""
        folder = self.folder / "results"
        if isinstance(what, AttackCell):
            return folder / "attacks" / f"{what.digest(spec.folder)}.parquet"
        return folder / "outcomes" / f"{what}-{spec.folder}.parquet"

    def evaluate(
        self,
        method: str,
        seed: int = 0,
        suite: str = "audit",
        variant: str | Mapping[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Outcome rows of a suite (see `SUITES`), measured once and kept."""
        self.measure([((method, seed, variant), suite)])
        return pd.read_parquet(self.table_file(self.spec(method, seed, variant), suite))

    def measure(self, wanted: Iterable[tuple[tuple, str | AttackCell]]) -> None:
        """Measure what is missing of [(model, suite or attack), ...], side by side; the longest
        first wastes least.

        model: (method, seed) or (method, seed, variant). Raises ValueError for an unknown suite.
        """
        wanted = list(wanted)
        unknown = [what for _, what in wanted if isinstance(what, str) and what not in SUITES]
        if unknown:
            raise ValueError(
                f"suite = {unknown[0]!r} is unknown: choose one of {', '.join(SUITES)}"
            )
        jobs = list(dict.fromkeys((self.spec(*m), what) for m, what in wanted))
        jobs = [(s, what) for s, what in jobs if not self.table_file(s, what).exists()]
        self._ensure(s for s, _ in jobs)
        if any(what == "ablation" for _, what in jobs):  # needs the directions of the other methods
            self.find_geometry((m, s.seed) for s, _ in jobs for m in sources(self.profile))
        self.ensure(
            (m, s.seed) for s, what in jobs if what == "transfer" for m in self.profile.methods
        )
        for seed in {s.seed for s, _ in jobs}:
            self.norms(seed)
        work(self, jobs)

    def evaluate_all(self, models: Iterable[tuple], suite: str) -> None:
        """Measure a suite on every model of [(method, seed), (method, seed, variant), ...], side by
        side.
        """
        self.measure([(model, suite) for model in models])

    def outcomes(self) -> pd.DataFrame:
        """The whole outcome table as measured so far."""
        files = sorted((self.folder / "results" / "outcomes").glob("*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"no outcomes in {self.folder}: run the notebooks 01 to 06 first, or run_all.sh"
            )
        return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)

    def save_result(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write results/<name>.json, whole or not at all; NaN and infinities become null."""
        file = self.folder / "results" / f"{name}.json"
        write_json(data, file)
        return file

    def result(self, name: str) -> dict[str, Any]:
        """Read results/<name>.json. Raises FileNotFoundError naming what to run when
        it is missing.
        """
        file = self.folder / "results" / f"{name}.json"
        if not file.exists():
            raise FileNotFoundError(
                f"no {file.name} in {file.parent}: run the notebook that makes it, or run_all.sh"
            )
        return json.loads(file.read_text(encoding="utf-8"))

    def perform(self, spec: Spec, what: str | AttackCell, on_step) -> None:
        """Do one job here and now: make a model (''), find its geometry, or measure a suite or an
        attack on it.
        """
        if not what:
            build.make_model(self, spec, on_step)
            return
        if what == GEOMETRY:
            self.directions(spec.method, spec.seed)
            self.variance(spec.method, spec.seed)
            return
        lm = self.model(
            spec.method, spec.seed, dict(spec.changes) if not spec.variant else self._variant(spec)
        )
        write_table(self._rows(lm, spec, what, on_step), self.table_file(spec, what))

    def _rows(
        self, lm: LanguageModel, spec: Spec, what: str | AttackCell, on_step: OnStep
    ) -> pd.DataFrame:
        """Outcome rows of a suite or an attack, which is given what else it needs."""
        subject, seed = self.subject(spec), spec.seed
        if isinstance(what, AttackCell):
            return what.measure(lm, subject)
        if what == "jailbreaks":
            table, suffixes = jailbreaks.jailbreaks(lm, subject, on_step)
            if suffixes:
                found = {attack: asdict(suffix) for attack, suffix in suffixes.items()}
                self.save_result(f"suffixes-{spec.folder}", found)
            return table
        if what == "transfer":
            targets = {
                method: lm if method == spec.label else self.model(method, seed)
                for method in self.profile.methods
            }
            return latent.transfer(lm, subject, targets, on_step)
        if what == "ablation":
            directions = {m: self.directions(m, seed) for m in sources(self.profile)}
            return ablation(lm, subject, directions, self.differences(spec.label, seed), on_step)
        return PLAIN_SUITES[what](lm, subject, on_step)

    def _variant(self, spec: Spec) -> str | dict[str, Any]:
        return spec.variant if spec.variant in self.profile.sweep.variants else dict(spec.changes)
