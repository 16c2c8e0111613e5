"""A run's folder: what is there is loaded, what is missing is made, and nothing half-made looks
finished.

    run = Run("tiny")
    lm = run.model("lat", seed=0)                  # loads it, or trains it (and its base) first
    lm = run.model("lat", 0, {"attack.eps": 0.2})  # a variant of your own, kept beside it
    run.ensure([("ssft", 0), ("lat", 0)])          # trains what is missing, side by side
    table = run.evaluate("lat", 0, "audit")        # rows of the outcome table, measured once

A folder belongs to the settings it was made with: opening it with others is an error that says
which differ. Which file lies where is `Run.layout`'s to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from latlib.config.profile import Profile, ProfileError, load_profile, run_folder
from latlib.distributed import ranks
from latlib.evaluation.outcomes import BASE, OnStep, Subject
from latlib.experiment import build, launch
from latlib.experiment.jobs import Job, prepare_process, threads_for, work
from latlib.experiment.layout import Layout
from latlib.experiment.released import load_released
from latlib.experiment.spec import Spec, Variant, find_spec
from latlib.experiment.tracking import read_metrics
from latlib.hooks import Site
from latlib.io.files import read_json, write_json, write_table
from latlib.models import LanguageModel, load_model
from latlib.redteam import audit, jailbreaks, latent
from latlib.redteam.latent import AttackCell
from latlib.refusal.ablation import ablation
from latlib.refusal.directions import (
    Differences,
    find_directions,
    fixed_site,
    load_directions,
    paired_differences,
    save_directions,
    sources,
)
from latlib.refusal.geometry import variance_table
from latlib.refusal.interventions import Direction

# suites that need nothing but the model
PLAIN_SUITES = {
    "audit": audit.audit,
    "variant": audit.variant,
    "robustness": latent.robustness,
    "attacks": latent.attacks,
}
SUITES = (*PLAIN_SUITES, "jailbreaks", "transfer", "ablation")
GEOMETRY_FILES = ("differences.safetensors", "directions.safetensors", "variance.json")


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
        self.layout = Layout(self.profile, self.folder)
        self.layout.claim()
        prepare_process(min(torch.get_num_threads(), threads_for(self.profile)))

    def spec(self, method: str, seed: int = 0, variant: Variant = None) -> Spec:
        """The model that (method, seed, variant) means; a variant is a name of `sweep.variants` or
        dotted changes.

        Raises ProfileError for an unknown method, variant or field.
        """
        return find_spec(self.profile, method, seed, variant)

    # ---- models

    def ensure(self, models: Iterable[tuple]) -> None:
        """Make every missing model of [(method, seed), (method, seed, variant), ...] and the bases
        they need.
        """
        self._ensure(self.spec(*m) for m in models)

    def _ensure(self, models: Iterable[Spec]) -> None:
        specs = list(models)
        wanted = dict.fromkeys([*(spec.base for spec in specs), *specs])
        missing = [spec for spec in wanted if not self.layout.has(spec)]
        self._work([_making(self.layout, spec) for spec in missing])

    def _work(self, jobs: list[Job]) -> None:
        work(self.profile, self.folder, jobs)

    def model(self, method: str, seed: int = 0, variant: Variant = None) -> LanguageModel:
        """The model, made first if need be, frozen and ready to run; 'base' is the model before
        safety training.
        """
        spec = self.spec(method, seed, variant)
        self._ensure([spec])
        return _opened(self.layout, spec)

    def card(self, method: str, seed: int = 0, variant: Variant = None) -> dict[str, Any]:
        """What is recorded of a model's making: settings, seconds, last losses, residual norms.

        Raises ProfileError for a model that is not made here.
        """
        spec = self.spec(method, seed, variant)
        if source := self.layout.source(spec):
            raise ProfileError(f"{method} is not made here: it is {source!r}")
        self._ensure([spec])
        return read_json(self.layout.model_folder(spec) / build.RECORD)

    def norms(self, seed: int = 0) -> dict[Site, float]:
        """site -> median residual norm of the base model on harmless training prompts, in units of
        the stream.
        """
        if not self.layout.norms_file(seed).exists():
            self._ensure([Spec(BASE, seed)])
        return build.norms(self.layout, seed)

    def metrics(self, method: str, seed: int = 0, variant: Variant = None) -> pd.DataFrame:
        """The training metrics of a model, a row a step."""
        spec = self.spec(method, seed, variant)
        self._ensure([spec])
        return read_metrics(self.layout.metrics_file(spec))

    # ---- the geometry of activations

    def differences(self, method: str, seed: int = 0) -> Differences:
        """Harmful-harmless activation differences of a model (see `refusal.Differences`), found
        once and kept.
        """
        file = self.layout.geometry_file(self.spec(method, seed), "differences.safetensors")
        if not file.exists():
            paired_differences(self.model(method, seed), self.profile).save(file)
        return Differences.load(file)

    def directions(self, method: str, seed: int = 0) -> dict[str, Direction]:
        """rule -> refusal direction of a model (see `refusal.directions`), found once and kept."""
        file = self.layout.geometry_file(self.spec(method, seed), "directions.safetensors")
        if not file.exists():
            found = find_directions(
                self.model(method, seed), self.profile, self.differences(method, seed)
            )
            save_directions(found, file)
        return load_directions(file)

    def variance(self, method: str, seed: int = 0) -> dict[str, Any]:
        """Explained variance of a model's differences at their last token (see
        `geometry.variance_table`), found once and kept."""
        file = self.layout.geometry_file(self.spec(method, seed), "variance.json")
        if not file.exists():
            found = self.differences(method, seed)
            site = fixed_site(len(found.pairs) - 1)
            write_json(variance_table(found.last(), found.clusters, site), file)
        return read_json(file)

    def find_geometry(self, models: Iterable[tuple[str, int]]) -> None:
        """Find differences, directions and variance of every model of [(method, seed), ...], side
        by side.
        """
        specs = list(dict.fromkeys(self.spec(*m) for m in models))
        self._ensure(specs)
        missing = [spec for spec in specs if not self._has_geometry(spec)]
        self._work([_finding_geometry(self.layout, spec) for spec in missing])

    def _has_geometry(self, spec: Spec) -> bool:
        return all(self.layout.geometry_file(spec, name).exists() for name in GEOMETRY_FILES)

    # ---- outcomes

    def subject(self, spec: Spec) -> Subject:
        """What an evaluation suite needs to know about a model."""
        return Subject(self.profile, spec.method, spec.seed, self.norms(spec.seed), spec.variant)

    def attack(self, method: str, seed: int, cell: AttackCell) -> pd.DataFrame:
        """Outcome rows of an attack of your own on a model, measured once and kept."""
        self.measure([((method, seed), cell)])
        return pd.read_parquet(self.layout.table_file(self.spec(method, seed), cell))

    def evaluate(
        self, method: str, seed: int = 0, suite: str = "audit", variant: Variant = None
    ) -> pd.DataFrame:
        """Outcome rows of a suite (see `SUITES`), measured once and kept."""
        self.measure([((method, seed, variant), suite)])
        return pd.read_parquet(self.layout.table_file(self.spec(method, seed, variant), suite))

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
        pairs = list(dict.fromkeys((self.spec(*m), what) for m, what in wanted))
        pairs = [(s, what) for s, what in pairs if not self.layout.table_file(s, what).exists()]
        self._ensure(s for s, _ in pairs)
        if any(what == "ablation" for _, what in pairs):  # needs the others' directions
            self.find_geometry((m, s.seed) for s, _ in pairs for m in sources(self.profile))
        self.ensure(
            (m, s.seed) for s, what in pairs if what == "transfer" for m in self.profile.methods
        )
        for seed in {s.seed for s, _ in pairs}:
            self.norms(seed)
        self._work([_measuring(self.layout, spec, what) for spec, what in pairs])

    def evaluate_all(self, models: Iterable[tuple], suite: str) -> None:
        """Measure a suite on every model of [(method, seed), (method, seed, variant), ...], side by
        side.
        """
        self.measure([(model, suite) for model in models])

    def outcomes(self) -> pd.DataFrame:
        """The whole outcome table as measured so far."""
        files = sorted(self.layout.outcomes.glob("*.parquet"))
        if not files:
            raise FileNotFoundError(
                f"no outcomes in {self.folder}: run the notebooks 01 to 06 first, or run_all.sh"
            )
        return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)

    # ---- other results

    def save_result(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write results/<name>.json, whole or not at all; NaN and infinities become null."""
        file = self.layout.result_file(name)
        write_json(data, file)
        return file

    def result(self, name: str) -> dict[str, Any]:
        """Read results/<name>.json. Raises FileNotFoundError naming what to run when
        it is missing.
        """
        file = self.layout.result_file(name)
        if not file.exists():
            raise FileNotFoundError(
                f"no {file.name} in {file.parent}: run the notebook that makes it, or run_all.sh"
            )
        return read_json(file)


def _opened(layout: Layout, spec: Spec) -> LanguageModel:
    """A model that is there."""
    base, settings = layout.model_folder(spec.base), layout.profile.model
    if spec.method in layout.profile.released:
        return load_released(base, settings, layout.profile.released[spec.method])
    adapter = None if spec.method == BASE else layout.model_folder(spec)
    return load_model(base, settings, adapter)


# ---- jobs: what a worker does


def _making(layout: Layout, spec: Spec) -> Job:
    """The job of making a model, after its base."""
    after = "" if spec.method == BASE else spec.base.folder
    return Job(_name(spec), spec.folder, _make, (layout, spec), after)


def _finding_geometry(layout: Layout, spec: Spec) -> Job:
    """The job of finding a model's differences, directions and variance."""
    key = f"geometry-{spec.folder}"
    return Job(f"geometry of {_name(spec)}", key, _find_geometry, (layout, spec))


def _measuring(layout: Layout, spec: Spec, what: str | AttackCell) -> Job:
    """The job of measuring a suite or an attack on a model."""
    key = f"{what if isinstance(what, str) else what.digest('')}-{spec.folder}"
    return Job(f"{what} of {_name(spec)}", key, _measure, (layout, spec, what))


def _name(spec: Spec) -> str:
    return f"{spec.label} seed {spec.seed}"


def _make(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    """Make a model: in this process, or in several that are started for it."""
    several = layout.profile.parallel.processes > 1 and not ranks.is_distributed()
    if several and spec.method != BASE:
        launch.launch(layout, spec, on_step)
    else:
        build.make_model(layout, spec, on_step)


def _find_geometry(layout: Layout, spec: Spec, on_step: OnStep) -> None:
    run = Run(layout.profile, layout.folder)
    run.directions(spec.method, spec.seed)
    run.variance(spec.method, spec.seed)


def _measure(layout: Layout, spec: Spec, what: str | AttackCell, on_step: OnStep) -> None:
    run = Run(layout.profile, layout.folder)
    write_table(_rows(run, spec, what, on_step), layout.table_file(spec, what))


def _rows(run: Run, spec: Spec, what: str | AttackCell, on_step: OnStep) -> pd.DataFrame:
    """Outcome rows of a suite or an attack, which is given what else it needs."""
    lm, subject, seed = _opened(run.layout, spec), run.subject(spec), spec.seed
    if isinstance(what, AttackCell):
        return what.measure(lm, subject)
    if what == "jailbreaks":
        table, suffixes = jailbreaks.jailbreaks(lm, subject, on_step)
        if suffixes:
            found = {attack: asdict(suffix) for attack, suffix in suffixes.items()}
            run.save_result(f"suffixes-{spec.folder}", found)
        return table
    if what == "transfer":
        targets = {
            method: lm if method == spec.label else run.model(method, seed)
            for method in run.profile.methods
        }
        return latent.transfer(lm, subject, targets, on_step)
    if what == "ablation":
        directions = {method: run.directions(method, seed) for method in sources(run.profile)}
        return ablation(lm, subject, directions, run.differences(spec.label, seed), on_step)
    return PLAIN_SUITES[what](lm, subject, on_step)
