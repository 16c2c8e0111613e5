"""The settings of a run: typed, frozen, read from YAML, wrong ones refused by name before anything
is trained.

1. `load_profile("tiny")` reads `profiles/tiny.yaml`; `load_profile("my.yaml")` reads anyone's file.
2. Every field has a type and a range. Text where a number belongs (YAML 1.1 reads `8e-5` as text),
   an unknown name or a value out of range is a `ProfileError` naming the field, the value and the
   mend.
3. A method is the `train` section with a few fields replaced:
   `profile.training(profile.main, {"attack.eps": 0.1})`. What a method is for, its role, stands in
   the section `roles`: `profile.undefended`, `.reference`, `.main` and `.compared` are names.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, Strict, ValidationError, model_validator

from latlib.config.paths import absolute
from latlib.config.sections import (
    AttackSettings,
    BudgetSettings,
    DataSettings,
    DefenceSettings,
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    Natural,
    ParallelSettings,
    PretrainSettings,
    ProfileError,
    RolesSettings,
    Section,
    SweepSettings,
    Text,
    TrackingSettings,
    TrainSettings,
)

__all__ = [
    "AttackSettings",
    "BudgetSettings",
    "DataSettings",
    "DefenceSettings",
    "EvaluationSettings",
    "FREE_FIELDS",
    "LoraSettings",
    "ModelSettings",
    "ParallelSettings",
    "PretrainSettings",
    "Profile",
    "ProfileError",
    "RolesSettings",
    "Section",
    "SweepSettings",
    "TrackingSettings",
    "TrainSettings",
    "differences",
    "find_share",
    "load_profile",
    "run_folder",
    "validated",
]


class Profile(Section):
    """Everything a run depends on."""

    name: Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: Text
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1)] = (0, 1, 2)
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    methods: Annotated[dict[Text, dict[str, Any]], Field(min_length=1)]
    roles: RolesSettings = RolesSettings()
    # method -> folder or hub id of somebody's model or adapter, which is not trained
    released: dict[Text, Text] = {}
    evaluation: EvaluationSettings = EvaluationSettings()
    sweep: SweepSettings = SweepSettings()
    tracking: TrackingSettings = TrackingSettings()
    parallel: ParallelSettings = ParallelSettings()
    budget: BudgetSettings = BudgetSettings()
    # processes that train or evaluate side by side; 0: one per core on a CPU, one on a GPU
    workers: Natural = 0

    @property
    def undefended(self) -> str | None:
        """The method that is the undefended twin; None where the profile has none."""
        return self.roles.undefended

    @property
    def reference(self) -> str | None:
        """The method whose refusal direction is the reference; None where there is none."""
        return self.roles.reference

    @property
    def main(self) -> str:
        """The method that claims are about, whose attack is the threat model, and which sweeps
        vary.
        """
        assert self.roles.main is not None  # filled in when the profile was validated
        return self.roles.main

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods that are set side by side in claims and figures."""
        return self.roles.compared

    @model_validator(mode="after")
    def _whole(self) -> Profile:
        attacked = {method: self.training(method).attack.steps > 0 for method in self.methods}
        # the class is frozen for its users; here the value is still being made
        object.__setattr__(self, "roles", self.roles.resolved(attacked))
        for name, variant in self.sweep.variants.items():
            try:
                self.training(self.main, variant)
            except ProfileError as error:
                raise ValueError(f"sweep.variants.{name}: {error}") from error
        for name, values in self.sweep.grid.items():
            if not values or any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(
                    f"sweep.grid.{name} = {list(values)}: give at least one value, and each once"
                )
            for value in values:
                try:
                    self.training(self.main, {name: value})
                except ProfileError as error:
                    raise ValueError(f"sweep.grid.{name}: {error}") from error
        unknown = sorted(set(self.released) - set(self.methods))
        if unknown:
            raise ValueError(
                f"released.{unknown[0]} is no method of this profile: add it to methods"
            )
        if self.data.source == "files" and not (self.data.harmful and self.data.benign):
            raise ValueError(
                "data.source = 'files' needs data.harmful and data.benign: give both paths"
            )
        if self.model.source != "world" and "source" not in self.data.model_fields_set:
            raise ValueError(
                f"model.source = {self.model.source!r} needs data.source: set it to 'files', or to"
                " 'world' for the prompts of the made-up world, which only the organism knows"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} repeats a seed: list each once")
        return self

    def training(self, method: str, changes: dict[str, Any] | None = None) -> TrainSettings:
        """`train` as `method` uses it, with further `changes` given by dotted name ({"attack.eps":
        0.1}).

        Raises ProfileError for an unknown method, an unknown field or a value out of range.
        """
        if method not in self.methods:
            raise ProfileError(
                f"method = {method!r} is not in this profile: choose one of"
                f" {', '.join(self.methods)}"
            )
        tree = self.train.model_dump()
        for source, values in (
            (f"methods.{method}", self.methods[method]),
            ("changes", changes or {}),
        ):
            for dotted, value in values.items():
                _set(tree, dotted, value, source)
        return validated(TrainSettings, tree, f"methods.{method}")


# Fields that may differ between two visits to the same run folder: they change no result.
FREE_FIELDS = ("description", "tracking", "workers", "parallel", "budget")


def _set(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Replace one leaf of a dumped section, given by dotted name."""
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        near = difflib.get_close_matches(leaf, node or (), n=1) if isinstance(node, dict) else []
        hint = (
            f": did you mean {'.'.join([*parents, near[0]])!r}?"
            if near
            else ": see TrainSettings for the names"
        )
        raise ProfileError(f"{source}: field {dotted!r} does not exist{hint}")
    node[leaf] = value


def _explain(cls: type[BaseModel], error: ValidationError, where: str) -> str:
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        at = ".".join(part for part in (where, field) if part) or "profile"
        value, kind = item["input"], item["type"]
        if kind == "extra_forbidden":
            section: Any = cls
            for part in item["loc"][:-1]:
                section = getattr(section, "model_fields", {}).get(part)
                section = getattr(section, "annotation", None)
            near = difflib.get_close_matches(
                str(item["loc"][-1]), getattr(section, "model_fields", {}), n=1
            )
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            lines.append(f"{at} = {value!r} is not a known field: {hint}")
        elif kind in ("float_type", "int_type") and isinstance(value, str):
            try:
                mend = (
                    f"write {float(value):.6e}"
                    if kind == "float_type"
                    else "write it without quotes"
                )
            except ValueError:
                mend = "give a number"
            lines.append(
                f"{at} = {value!r} is text, not a number: {mend} (YAML needs a dot: 8.0e-5, not"
                " 8e-5)"
            )
        elif kind == "value_error" and not item["loc"]:
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{at} = {value!r}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def validated(cls: type[Section], tree: dict[str, Any], where: str = "") -> Any:
    """A section from plain values; `where` is its place in the profile. Raises ProfileError naming
    every bad field.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ProfileError(_explain(cls, error, where)) from None


def find_share(kind: str) -> Path:
    """The folder `notebooks` or `profiles`: beside the package in a checkout, inside it in a
    wheel.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / kind, package / "_share" / kind):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"no {kind!r} folder beside or inside {package}: install latlib from a full checkout"
    )


def load_profile(name_or_path: str | os.PathLike[str]) -> Profile:
    """Read a profile by name (`tiny`) or by path (`my.yaml`).

    Raises ProfileError for an unknown name, unreadable YAML or any bad setting.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        folder = find_share("profiles")
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        if str(name_or_path) not in known:
            near = difflib.get_close_matches(str(name_or_path), known, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else "give one of these or the path of a .yaml file"
            )
            raise ProfileError(
                f"profile = {str(name_or_path)!r} is unknown; there are {', '.join(known)}: {hint}"
            )
        path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        raise ProfileError(f"profile = {str(path)!r} is not a file: check the path")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ProfileError(f"profile {path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ProfileError(f"profile {path} holds {type(tree).__name__}, not a mapping of sections")
    tree.setdefault("name", path.stem)
    return validated(
        Profile, absolute(tree, (path.resolve().parent, find_share("profiles").parent))
    )


def run_folder(profile_name: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Where a run lives: `out`, else `$LATLIB_RUNS/<profile>`, else `runs/<profile>` beside the
    notebooks.
    """
    if out:
        return Path(out).expanduser().resolve()
    root = os.environ.get("LATLIB_RUNS")
    return (
        Path(root).expanduser() if root else find_share("notebooks").parent / "runs"
    ).resolve() / profile_name


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines 'field: old -> new' for every leaf in which two dumped profiles differ."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a!r} -> {b!r}")
    return lines
