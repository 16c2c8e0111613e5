"""A run's folder: what is there is loaded, what is missing is made, and nothing half-made looks
finished.

    run = Run("tiny")
    lm = run.model("lat", seed=0)                  # loads it, or trains it (and its base) first
    lm = run.model("lat", 0, {"attack.eps": 0.2})  # a variant of your own, kept beside it
    run.ensure([("ssft", 0), ("lat", 0)])          # trains what is missing, side by side
    table = run.evaluate("lat", 0, "audit")        # rows of the outcome table, measured once

A folder belongs to the settings it was made with and to the files that these name: opening it with
others is an error that says which differ. What is made there has a checksum; what does not match it
is set aside and made again. One `Run` writes at a time, any number read. Which file lies where is
`Run.layout`'s to say.

A model of a call is (method, seed) or (method, seed, variant); a variant is a name of
`sweep.variants`, or changes of the method's training settings by dotted name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from latlib.config.profile import Profile, load_profile, run_folder
from latlib.config.sections import ProfileError
from latlib.data.prompts import in_the_world
from latlib.distributed import ranks
from latlib.evaluation.outcomes import BASE, Keep, Subject
from latlib.evaluation.phrases import redacted
from latlib.experiment import build, launch
from latlib.experiment.jobs import Job, prepare_process, work
from latlib.experiment.layout import DIFFERENCES, DIRECTIONS, GEOMETRY, VARIANCE, Layout
from latlib.experiment.record import RECORD
from latlib.experiment.released import load_released
from latlib.experiment.responses import make_responses
from latlib.experiment.spec import Spec, Variant, find_spec
from latlib.experiment.tracking import read_metrics
from latlib.io.files import Json, read_json, write_json, write_table
from latlib.io.progress import OnStep, Stopped, stop_requested
from latlib.models import LanguageModel, load_model
from latlib.planning.workers import threads_for
from latlib.redteam import audit, jailbreaks, latent
from latlib.redteam.latent import AttackCell
from latlib.refusal import directions
from latlib.refusal.ablation import ablation
from latlib.refusal.activations import paired_activations
from latlib.refusal.directions import Differences
from latlib.refusal.geometry import variance_table
from latlib.refusal.interventions import Direction
from latlib.refusal.massive import massive_record
from latlib.threat import Site

# suites that need nothing but the model
PLAIN_SUITES = {
    "audit": audit.audit,
    "variant": audit.variant,
}
# those made of attacks
ATTACK_SUITES = {
    "robustness": latent.robustness,
    "attacks": latent.attacks,
    "claimed": latent.claimed,
}
SUITES = (*PLAIN_SUITES, *ATTACK_SUITES, "jailbreaks", "transfer", "ablation")
Measured = str | AttackCell  # a suite, or an attack of one's own
Model = tuple[Any, ...]  # see the module's docstring


def _named(spec: Spec, what: Measured) -> str:
    """How progress lines and errors name a suite or an attack on a model."""
    return f"{what} of {spec.name}"


def _kept(suffixes: Mapping[str, Any], profile: Profile) -> Json:
    """Suffixes as they are stored: of a real model no more of their text than of its replies."""
    found = {attack: asdict(suffix) for attack, suffix in suffixes.items()}
    if not in_the_world(profile):
        for suffix in found.values():
            suffix |= {"text": redacted(suffix["text"]), "token_ids": []}
    return found


class Run:
    """See the module's docstring. profile: a name, a YAML file, or a Profile. out: the run folder,
    else `run_folder`.

    Raises ProfileError for bad settings, for an unwritable folder, or for a folder made with other
    settings or inputs; and, where something must be made, while another run makes something there.
    """

    def __init__(
        self,
        profile: str | Path | Profile = "tiny",
        out: str | Path | None = None,
    ) -> None:
        if not isinstance(profile, Profile):
            profile = load_profile(profile)
        self.profile = profile
        self.folder = run_folder(self.profile.name, out)
        self.layout = Layout(self.profile, self.folder).completed()
        self.layout.claim()
        self.profile = self.layout.profile
        prepare_process(min(torch.get_num_threads(), threads_for(self.profile)))

    def spec(
        self,
        method: str,
        seed: int = 0,
        variant: Variant = None,
    ) -> Spec:
        """The model that is meant. Raises ProfileError for an unknown method, variant or field."""
        return find_spec(self.profile, method, seed, variant)

    # ---- models

    def ensure(self, models: Iterable[Model]) -> None:
        """Make every missing one of the models and the bases they need, side by side."""
        self._ensure([self.spec(*model) for model in models])

    def _ensure(self, specs: list[Spec]) -> None:
        if self.layout.lacks_responses():  # which all else stands on
            self._work([Job("responses of the base", partial(make_responses, self.layout))])
        bases = [spec.base for spec in specs]
        jobs = []
        for spec in dict.fromkeys(bases + specs):
            if not self.layout.has(spec):
                after = "" if spec.method == BASE else spec.base.name
                jobs.append(Job(spec.name, partial(self._make, spec), after))
        self._work(jobs)

    def _make(self, spec: Spec, on_step: OnStep) -> None:
        """Make a model: in this process, or in several that are started for it."""
        if self.layout.has(spec):  # by another command, before this one held the folder
            return
        if spec.method == BASE:
            build.make_base(self.layout, spec, on_step)
        elif self.profile.parallel.processes > 1 and not ranks.is_distributed():
            launch.launch(self.layout, spec, on_step)
        else:
            build.make_adapter(self.layout, spec, on_step)

    def _work(self, jobs: list[Job]) -> None:
        if jobs:
            with self.layout.locked():
                work(self.profile, self.folder, jobs)

    def model(
        self,
        method: str,
        seed: int = 0,
        variant: Variant = None,
    ) -> LanguageModel:
        """The model, made first if need be, frozen and ready to run; 'base' is the model before
        safety training.
        """
        return self._model(self.spec(method, seed, variant))

    def _model(self, spec: Spec) -> LanguageModel:
        self._ensure([spec])
        base, settings = self.layout.model_folder(spec.base), self.profile.model
        if spec.method == BASE:
            return load_model(base, settings)
        if source := self.layout.source(spec):
            return load_released(base, settings, source)
        return load_model(base, settings, self.layout.model_folder(spec))

    def card(
        self,
        method: str,
        seed: int = 0,
        variant: Variant = None,
    ) -> Json:
        """What is recorded of a model's making: settings, seconds, last losses, residual norms.

        Raises ProfileError for a model that is not made here.
        """
        spec = self.spec(method, seed, variant)
        if source := self.layout.source(spec):
            raise ProfileError(f"{method} is not made here: it is {source!r}")
        self._ensure([spec])
        return read_json(self.layout.model_folder(spec) / RECORD)

    def metrics(
        self,
        method: str,
        seed: int = 0,
        variant: Variant = None,
    ) -> pd.DataFrame:
        """The training metrics of a model, a row a step."""
        spec = self.spec(method, seed, variant)
        self._ensure([spec])
        return read_metrics(self.layout.metrics_file(spec))

    def norms(self, seed: int = 0) -> dict[Site, float]:
        """site -> median residual norm of the base model on harmless training prompts, in units of
        the stream.
        """
        if self.layout.whole(self.layout.norms_file(seed)):
            return build.norms(self.layout, seed)
        self._ensure([Spec(BASE, seed)])
        with self.layout.locked():
            return build.norms(self.layout, seed)

    # ---- the geometry of activations, found once and kept

    def differences(self, method: str, seed: int = 0) -> Differences:
        """Harmful-harmless activation differences of a model."""
        return Differences.load(self._geometry(method, seed, DIFFERENCES))

    def directions(self, method: str, seed: int = 0) -> dict[str, Direction]:
        """rule -> refusal direction of a model."""
        return directions.load_directions(self._geometry(method, seed, DIRECTIONS))

    def variance(self, method: str, seed: int = 0) -> Json:
        """Explained variance of a model's differences at their last token, and its massive
        activations."""
        return read_json(self._geometry(method, seed, VARIANCE))

    def _geometry(self, method: str, seed: int, name: str) -> Path:
        """The file with one of the three."""
        self.find_geometry([(method, seed)], [name])
        return self.layout.geometry_file(self.spec(method, seed), name)

    def find_geometry(
        self, models: Iterable[tuple[str, int]], names: Sequence[str] = GEOMETRY
    ) -> None:
        """Find the three of every model, side by side, or those that are named. Directions are
        searched for, which on a real model takes many times as long as the others."""
        specs = dict.fromkeys(self.spec(*model) for model in models)
        missing = [spec for spec in specs if not self.layout.has_geometry(spec, names)]
        self._ensure(missing)
        jobs = []
        for spec in missing:
            find = partial(self._find_geometry, spec, names)
            jobs.append(Job(f"geometry of {spec.name}", find))
        self._work(jobs)

    def _find_geometry(self, spec: Spec, names: Sequence[str], on_step: OnStep) -> None:
        lm = self._model(spec)
        file = partial(self.layout.geometry_file, spec)
        if not self.layout.whole(file(DIFFERENCES)):
            for name in (VARIANCE, DIRECTIONS):  # which stand on them
                file(name).unlink(missing_ok=True)
            directions.paired_differences(lm, self.profile).save(file(DIFFERENCES))
        differences = Differences.load(file(DIFFERENCES))  # at the precision that is kept
        if VARIANCE in names and not self.layout.whole(file(VARIANCE)):
            write_json(self._explained(lm, differences), file(VARIANCE))
        if DIRECTIONS in names and not self.layout.whole(file(DIRECTIONS)):
            found = directions.find_directions(lm, self.profile, differences)
            directions.save_directions(found, file(DIRECTIONS))

    def _explained(self, lm: LanguageModel, differences: Differences) -> Json:
        """The variance that components of differences explain, and massive activations."""
        site = directions.fixed_site(len(differences.pairs) - 1)
        explained = variance_table(differences.last(), differences.clusters, site)
        pairs = self.profile.evaluation.pairs
        harmful, harmless = paired_activations(lm, self.profile, [site], pairs)
        explained["massive"] = massive_record((harmful[site], harmless[site]))
        return explained

    # ---- outcomes, measured once and kept

    def evaluate(
        self,
        method: str,
        seed: int = 0,
        suite: Measured = "audit",
        variant: Variant = None,
    ) -> pd.DataFrame:
        """Outcome rows of a suite (see `SUITES`)."""
        self.measure([((method, seed, variant), suite)])
        spec = self.spec(method, seed, variant)
        return pd.read_parquet(self.layout.table_file(spec, suite))

    def attack(self, method: str, seed: int, cell: AttackCell) -> pd.DataFrame:
        """Outcome rows of an attack of your own on a model."""
        return self.evaluate(method, seed, cell)

    def evaluate_all(self, models: Iterable[Model], suite: str) -> None:
        """Measure a suite on every model, side by side."""
        self.measure([(model, suite) for model in models])

    def has_measured(self, model: Model, what: Measured) -> bool:
        """Whether a suite or an attack was measured on a model."""
        return self.layout.whole(self.layout.table_file(self.spec(*model), what))

    def measure(self, wanted: Iterable[tuple[Model, Measured]]) -> None:
        """Measure what is missing of [(model, suite or attack), ...], side by side; the longest
        first wastes least.

        Raises ValueError for an unknown suite.
        """
        pairs = dict.fromkeys((self.spec(*model), what) for model, what in wanted)
        missing = [pair for pair in pairs if not self.layout.whole(self.layout.table_file(*pair))]
        for _, what in missing:
            if isinstance(what, str) and what not in SUITES:
                raise ValueError(f"suite = {what!r} is unknown: choose one of {', '.join(SUITES)}")
        first = self._first_audit
        copied = any(self._copies_first_audit(*pair) for pair in missing)
        if copied and not self.layout.whole(self.layout.table_file(*first)):
            missing = list(dict.fromkeys((first, *missing)))
        specs = [spec for spec, _ in missing]
        geometry = []
        for spec, what in missing:
            if what == "transfer":  # it needs the other methods
                specs += [Spec(method, spec.seed) for method in self.profile.attacked]
            if what == "ablation":  # and their directions
                sources = directions.sources(self.profile, spec.label)
                geometry += [(source, spec.seed) for source in sources]
        self._ensure(specs)
        self.find_geometry(geometry)
        for seed in {spec.seed for spec in specs}:
            self.norms(seed)
        jobs = []
        for spec, what in missing:
            after = _named(*first) if self._copies_first_audit(spec, what) else ""
            call = partial(self._measure, spec, what)
            jobs.append(Job(_named(spec, what), call, after))
        self._work(jobs)

    @property
    def _first_audit(self) -> tuple[Spec, Measured]:
        return Spec(BASE, self.profile.seeds[0]), "audit"

    def _copies_first_audit(self, spec: Spec, what: Measured) -> bool:
        """Whether the first seed's audit of the base is this seed's too: of a base that is not made
        here."""
        shared = spec.method == BASE and self.layout.source(spec) is not None
        return shared and what == "audit" and spec.seed != self.profile.seeds[0]

    def subject(self, spec: Spec) -> Subject:
        """What an evaluation suite needs to know about a model."""
        return Subject(self.profile, spec.method, spec.seed, self.norms(spec.seed), spec.variant)

    def _measure(self, spec: Spec, what: Measured, on_step: OnStep) -> None:
        write_table(self._rows(spec, what, on_step), self.layout.table_file(spec, what))
        if isinstance(what, str):
            self.layout.forget_unfinished(spec, what)

    def _rows(self, spec: Spec, what: Measured, on_step: OnStep) -> pd.DataFrame:
        """Measure a suite or an attack here and now; it is given what it needs."""
        if self._copies_first_audit(spec, what):
            first = pd.read_parquet(self.layout.table_file(*self._first_audit))
            return audit.of_another_seed(first, self.profile, spec.seed)
        lm, subject, seed = self._model(spec), self.subject(spec), spec.seed
        if isinstance(what, AttackCell):
            return what.measure(lm, subject)
        folder = self.layout.unfinished(spec, what)
        keep, heeding = self._keeping(folder), self._heeding(on_step)
        if what in ATTACK_SUITES:
            cells = ATTACK_SUITES[what](self.profile, lm.n_layers)
            return latent.measure_cells(cells, lm, subject, heeding, keep)
        if what == "jailbreaks":
            files = {attack: folder / f"{attack}.json" for attack in jailbreaks.SEARCHES}
            for file in files.values():
                self.layout.whole(file)  # what is damaged is set aside
            table, suffixes = jailbreaks.jailbreaks(lm, subject, heeding, files, keep)
            if suffixes:
                self.save_result(f"suffixes-{spec.folder}", _kept(suffixes, self.profile))
            return table
        if what == "transfer":
            targets = {}
            for method in self.profile.attacked:
                targets[method] = lm if method == spec.label else self.model(method, seed)
            return latent.transfer(lm, subject, targets, heeding, keep)
        if what == "ablation":
            sources = directions.sources(self.profile, spec.label)
            found = {method: self.directions(method, seed) for method in sources}
            differences = self.differences(spec.label, seed)
            return ablation(lm, subject, found, differences, heeding, keep)
        return PLAIN_SUITES[what](lm, subject, heeding, keep)

    def _keeping(self, folder: Path) -> Keep:
        """Keeps each piece of a suite until all are there, so that one which is stopped or killed
        goes on behind the last."""

        def keep(piece: str, measure: Callable[[], pd.DataFrame]) -> pd.DataFrame:
            file = folder / f"{hashlib.sha256(piece.encode()).hexdigest()[:16]}.parquet"
            if not self.layout.whole(file):
                write_table(measure(), file)
            return pd.read_parquet(file)

        return keep

    def _heeding(self, on_step: OnStep) -> OnStep:
        """`on_step` of work that is saved at every step, which stops there when asked to."""

        def heeding(step: int, total: int, detail: str) -> None:
            on_step(step, total, detail)
            if step < total and stop_requested(self.folder):
                raise Stopped(f"asked to stop after {detail}; what was measured is saved")

        return heeding

    def outcomes(self) -> pd.DataFrame:
        """The whole outcome table as measured so far."""
        files = filter(self.layout.whole, sorted(self.layout.outcomes.glob("*.parquet")))
        tables = [pd.read_parquet(file) for file in files]
        if not tables:
            raise FileNotFoundError(
                f"no outcomes in {self.folder}: run the notebooks 01 to 06 first, or run_all.sh"
            )
        return pd.concat(tables, ignore_index=True)

    # ---- other results

    def computed(self, name: str, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute()` returns, in JSON's types: computed once for each `settings`, which are
        all that it depends on beside the run's profile.
        """
        file = self.layout.computed_file(name, settings)
        if not self.layout.whole(file):
            data = compute()
            with self.layout.locked():
                write_json(data, file)
        return read_json(file)

    def save_result(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write results/<name>.json, whole or not at all; NaN and infinities become null."""
        file = self.layout.result_file(name)
        with self.layout.locked():
            write_json(data, file)
        return file

    def result(self, name: str) -> Json:
        """Read results/<name>.json. Raises FileNotFoundError naming what to run when
        it is missing.
        """
        file = self.layout.result_file(name)
        if not self.layout.whole(file):
            raise FileNotFoundError(
                f"no {file.name} in {file.parent}: run the notebook that makes it, or run_all.sh"
            )
        return read_json(file)
