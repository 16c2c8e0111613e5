"""The geometry of a model's activations, found once and kept: differences, directions, variance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latlib.experiment.layout import Layout
from latlib.experiment.spec import Spec
from latlib.io.files import read_json, write_json
from latlib.models import LanguageModel
from latlib.refusal.directions import (
    Differences,
    find_directions,
    fixed_site,
    load_directions,
    paired_differences,
    save_directions,
)
from latlib.refusal.geometry import variance_table
from latlib.refusal.interventions import Direction

DIFFERENCES, DIRECTIONS = "differences.safetensors", "directions.safetensors"
VARIANCE = "variance.json"


@dataclass(frozen=True)
class Geometry:
    """What is found in the activations of a run's models. model: opens one."""

    layout: Layout
    model: Callable[[Spec], LanguageModel]

    def is_complete(self, spec: Spec) -> bool:
        """Whether everything of a model is there."""
        names = (DIFFERENCES, DIRECTIONS, VARIANCE)
        return all(self.layout.geometry_file(spec, name).exists() for name in names)

    def differences(self, spec: Spec) -> Differences:
        """Harmful-harmless activation differences (see `refusal.directions.Differences`)."""
        file = self.layout.geometry_file(spec, DIFFERENCES)
        if not file.exists():
            paired_differences(self.model(spec), self.layout.profile).save(file)
        return Differences.load(file)

    def directions(self, spec: Spec) -> dict[str, Direction]:
        """rule -> refusal direction (see `refusal.directions.find_directions`)."""
        file = self.layout.geometry_file(spec, DIRECTIONS)
        if not file.exists():
            lm, differences = self.model(spec), self.differences(spec)
            save_directions(find_directions(lm, self.layout.profile, differences), file)
        return load_directions(file)

    def variance(self, spec: Spec) -> dict[str, Any]:
        """Explained variance of the differences at their last token (see
        `refusal.geometry.variance_table`).
        """
        file = self.layout.geometry_file(spec, VARIANCE)
        if not file.exists():
            differences = self.differences(spec)
            site = fixed_site(len(differences.pairs) - 1)
            write_json(variance_table(differences.last(), differences.clusters, site), file)
        return read_json(file)
