"""The settings of a run: typed, frozen, read from YAML, wrong ones refused by name before anything
is trained.

1. `load_profile("tiny")` reads `profiles/tiny.yaml`; `load_profile("my.yaml")` reads anyone's file.
2. Every field has a type and a range. Text where a number belongs (YAML 1.1 reads `8e-5` as text),
   an unknown name or a value out of range is a `ProfileError` naming the field, the value and the
   fix.
3. A method is the `train` section with a few fields replaced:
   `profile.training(profile.main, {"attack.eps": 0.1})`. What a method is for, its role, stands in
   the section `roles`: `profile.undefended`, `.reference`, `.main` and `.compared` are names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from latlib.config.paths import absolute, node_of
from latlib.config.sections import (
    BASE_ANSWERS,
    BudgetSettings,
    DataSettings,
    EachOnce,
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    Name,
    Natural,
    ParallelSettings,
    PretrainSettings,
    ProfileError,
    RolesSettings,
    Section,
    Seed,
    SweepSettings,
    Text,
    TrackingSettings,
    TrainSettings,
    suggestion,
)
from latlib.threat import resolve_sites


class Profile(Section):
    """Everything a run depends on."""

    name: Name
    description: Text
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), EachOnce] = (0, 1, 2)
    model: ModelSettings = ModelSettings()
    pretrain: PretrainSettings = PretrainSettings()
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    methods: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    roles: RolesSettings = RolesSettings()
    # method -> folder or hub id of somebody's model or adapter, which is not trained; "{seed}" in
    # it stands for the seed
    released: dict[Text, Text] = {}
    evaluation: EvaluationSettings = EvaluationSettings()
    sweep: SweepSettings = SweepSettings()
    tracking: TrackingSettings = TrackingSettings()
    parallel: ParallelSettings = ParallelSettings()
    budget: BudgetSettings = BudgetSettings()
    # those that run_all.sh runs, by number or name; none: all
    notebooks: tuple[Text, ...] = ()
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

    @property
    def claimed(self) -> list[str]:
        """The methods that claims about the attack rest on."""
        roles = self.roles
        named = {roles.undefended, roles.control, roles.no_radius, roles.main, roles.rival}
        return [method for method in self.methods if method in named]

    @property
    def attacked(self) -> list[str]:
        """The methods whose robustness is measured: those claimed and those compared."""
        return [method for method in self.methods if method in {*self.claimed, *self.compared}]

    def released_source(self, method: str, seed: int) -> str | None:
        """The folder or hub id of a method's released model, None for a method that is trained."""
        source = self.released.get(method)
        return source and source.replace("{seed}", str(seed))

    @property
    def contrasted(self) -> tuple[str, ...]:
        """The undefended twin, where there is one, and the main method: what a first look is at."""
        twin = (self.undefended,) if self.undefended else ()
        return tuple(dict.fromkeys((*twin, self.main)))

    @property
    def only_a_first_look(self) -> bool:
        """Whether notebook 00 is all that is run."""
        return self.notebooks == ("00",)

    @model_validator(mode="after")
    def _checked(self) -> Profile:
        attacked = {method: self.training(method).attack.steps > 0 for method in self.methods}
        # the class is frozen for its users; here the value is still being made
        object.__setattr__(self, "roles", self.roles.resolved(attacked))
        self._check_controls()
        self._check_names()
        self._check_sweep()
        self._check_data()
        self._check_responses()
        self._check_parallel()
        for name in self.released:
            if name not in self.methods:
                raise ValueError(f"released.{name} is no method of this profile: add it to methods")
        return self

    def _check_controls(self) -> None:
        """Roles that settings tell are filled in; a control differs from the main method in its
        attack, and in nothing else.
        """
        fitting = {role: self._fitting(role) for role in FITS}
        found = {}
        for role, names in fitting.items():
            if getattr(self.roles, role) is None and names:
                found[role] = names[0]
        object.__setattr__(self, "roles", self.roles.model_copy(update=found))
        for role, words in ALONE.items():
            name = getattr(self.roles, role)
            if name is not None and name not in fitting[role]:
                others = ", ".join(self.differences(name, self.main)) or "nothing"
                raise ValueError(
                    f"roles.{role} = {name!r} differs from roles.main = {self.main!r} in {others}:"
                    f" name a method that differs from it only in {words}"
                )

    def _fitting(self, role: str) -> list[str]:
        """The methods whose settings are a role's."""
        others = [name for name in self.methods if name not in (self.main, *self.released)]
        found = []
        for name in others:
            attack = self.training(name).attack
            changed = set(self.differences(name, self.main))
            fits = {
                "control": not attack.steps and changed <= {"attack.steps"},
                "no_radius": changed == {"attack.eps"} and attack.eps < NO_RADIUS,
                "rival": changed <= {"attack.sites", "attack.eps"} and attack.at_embedding,
                "untargeted": not (attack.targeted or attack.at_embedding) and attack.steps > 0,
                "untargeted_rival": not attack.targeted and attack.at_embedding,
            }
            if fits[role]:
                found.append(name)
        return found

    def differences(self, one: str, other: str) -> dict[str, tuple[Any, Any]]:
        """Dotted field of `train` -> its values of two methods, where they differ and matter: of a
        method without an attack only attack.steps does.
        """
        first, second = (_flat(self.training(method).model_dump()) for method in (one, other))
        fields = [field for field in first if first[field] != second[field]]
        if 0 in (first["attack.steps"], second["attack.steps"]):
            idle = [field for field in fields if field.startswith("attack") or field in SCHEDULE]
            fields = [field for field in fields if field not in idle or field == "attack.steps"]
        return {field: (first[field], second[field]) for field in fields}

    def _check_names(self) -> None:
        """No two models of a seed share a folder, also on disks where case does not matter."""
        names = ["base", *self.methods]
        for method in self.methods:
            names += [f"{method}-{variant}" for variant in self.sweep.variants]
        folded = [name.lower() for name in names]
        for name in names:
            if folded.count(name.lower()) > 1:
                raise ValueError(
                    f"{name!r} would be the folder of two models: a variant's is method-variant,"
                    " 'base' is the model before safety training: rename a method or a variant"
                )

    def _check_sweep(self) -> None:
        changes = [(f"variants.{name}", change) for name, change in self.sweep.variants.items()]
        for name, values in self.sweep.grid.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise ValueError(
                    f"sweep.grid.{name} = {list(values)}: give at least one value, and each once"
                )
            changes += [(f"grid.{name}", {name: value}) for value in values]
        for place, change in changes:
            try:
                self.training(self.main, change)
            except ProfileError as error:
                raise ValueError(f"sweep.{place}: {error}") from error

    def _check_data(self) -> None:
        for name in self.evaluation.sources:
            if name not in ("base", *self.methods):
                raise ValueError(
                    f"evaluation.sources = {name!r} is no method of this profile: choose from base,"
                    f" {', '.join(self.methods)}"
                )
        for name in self.evaluation.further_encodings:
            if name in self.evaluation.encodings:
                raise ValueError(
                    f"evaluation.further_encodings = {name!r} stands in evaluation.encodings, too:"
                    " list it in one of them"
                )
        if self.data.source == "files" and not (self.data.harmful and self.data.benign):
            raise ValueError(
                "data.source = 'files' needs data.harmful and data.benign: give both paths"
            )
        if self.model.source == "world":
            known = LoraSettings().targets
            unknown = [name for name in self.lora.targets if name.rpartition(".")[2] not in known]
            if unknown:
                raise ValueError(
                    f"lora.targets = {unknown} are no layers of the organism: choose of {known}"
                )
        elif "source" not in self.data.model_fields_set:
            raise ValueError(
                f"model.source = {self.model.source!r} needs data.source: set it to 'files', or to"
                " 'world' for the prompts of the made-up world, which only the organism knows"
            )

    def _check_responses(self) -> None:
        """The base can be asked for responses, and there is a use for them."""
        if self.data.benign_responses != BASE_ANSWERS:
            return
        why = ""
        if self.data.source == "world":
            why = "stands beside data.source = 'world', whose prompts have their right answers"
        elif self.model.source == "world":
            why = "stands beside model.source = 'world', whose base knows its own world alone"
        elif "response" in self.data.benign_columns:
            column = self.data.benign_columns["response"]
            why = f"stands beside data.benign_columns.response = {column!r}"
        elif set(self.methods) <= set(self.released):
            why = "stands beside released models alone, and nothing is trained on it"
        if why:
            raise ValueError(f"data.benign_responses = {BASE_ANSWERS!r} {why}: leave out either")

    def _check_parallel(self) -> None:
        """DDP waits for a gradient of every weight, which behind the last site there is none of."""
        if self.parallel.processes == 1 or self.parallel.mode == "fsdp2":
            return
        for method in self.methods:
            if self.training(method).objective == "rerouting":
                raise ValueError(
                    f"parallel.mode = 'ddp' cannot train methods.{method}, whose objective is"
                    " 'rerouting': set parallel.mode to fsdp2, or parallel.processes to 1"
                )

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
        tree, where = self.train.model_dump(), f"methods.{method}"
        for source, fields in ((where, self.methods[method]), ("changes", changes or {})):
            for dotted, value in fields.items():
                _set(tree, dotted, value, source)
        found = validated(TrainSettings, tree, where)
        if self.model.source == "world":  # of another model, --check knows the number of blocks
            self._check_sites(found, where)
        return found

    def _check_sites(self, settings: TrainSettings, where: str) -> None:
        sites = {"attack": settings.attack.sites, "rerouting": settings.rerouting.sites}
        for name, specs in sites.items():
            try:
                resolve_sites(specs, self.model.layers)
            except ValueError as error:
                raise ProfileError(f"{where}.{name}.{error}") from None


# roles that a method's settings tell, and what alone may tell a control from the main method
FITS = ("control", "no_radius", "rival", "untargeted", "untargeted_rival")
ALONE = {
    "control": "its attack, and has none",
    "no_radius": "attack.eps, which is next to nothing",
}
NO_RADIUS = 1e-6  # of the residual norm, or absolute: less than a bfloat16 stream can add
# how the attack comes in: idle without one
SCHEDULE = ("attack_after", "eps_ramp", "clean_share")
# Fields that may differ between two visits to the same run folder: they change no result.
FREE_FIELDS = ("description", "notebooks", "tracking", "workers", "parallel", "budget")
MOST_VALUES = 10_000  # in a file; a shipped profile has about 200


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A dumped section by dotted names."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def _set(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Replace one leaf of a dumped section, given by dotted name."""
    section, _, leaf = dotted.rpartition(".")
    node = node_of(tree, section)
    if leaf in node:
        node[leaf] = value
        return
    known = [f"{section}.{name}".strip(".") for name in node]
    hint = suggestion(dotted, known, "see TrainSettings for the names")
    raise ProfileError(f"{source}: field {dotted!r} does not exist: {hint}")


def validated(cls: type[Section], tree: dict[str, Any], where: str = "") -> Any:
    """A section from plain values; `where` is its place in the profile. Raises ProfileError naming
    every bad field.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = [_explained(cls, item, where) for item in error.errors()]
        raise ProfileError("\n".join(lines)) from None


def _explained(cls: type[Section], item: ErrorDetails, where: str) -> str:
    """One error of pydantic's as field, value and fix."""
    kind, value = item["type"], item["input"]
    place = [str(part) for part in item["loc"]]
    if place[-1:] == ["[key]"]:  # the name is wrong, not what stands behind it
        del place[-2:]
    field = ".".join([where, *place]).strip(".")
    of_section = not isinstance(value, str | int | float | list | tuple)
    if kind == "value_error" and of_section:  # which begins with the name of a field
        said = str(item["ctx"]["error"])
        return f"{field}.{said}".strip(".")
    field = field or "profile"
    subject = f"{field} = {_short(value)}"
    if kind == "extra_forbidden":
        hint = suggestion(place[-1], _fields(cls, place[:-1]), "remove it")
        return f"{subject} is not a known field: {hint}"
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return f"{subject} is text, not a number: {_as_number(value, kind)}"
    return f"{subject}: {item['msg'].removeprefix('Value error, ')}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _fields(cls: type[Section], place: list[str]) -> list[str]:
    """The names of a section's fields, or of a section in it."""
    section: Any = cls
    for name in place:
        section = section.model_fields[name].annotation
    return list(section.model_fields)


def _as_number(text: str, kind: str) -> str:
    try:
        fix = (
            f"write {int(text)} without quotes"
            if kind == "int_type"
            else f"write {float(text):.6e}"
        )
    except ValueError:
        fix = "give a number"
    return f"{fix} (YAML needs a dot: 8.0e-5, not 8e-5)"


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
    """Read a profile by name (`tiny`) or by path (`my.yaml`). One with `part_of: tiny` has the
    settings and the run folder of that other one, and states only what changes no result.

    Raises ProfileError for an unknown name, unreadable YAML or any bad setting.
    """
    path, part = _profile_file(name_or_path), {}
    tree = _tree_of(path)
    if "part_of" in tree:
        part, path = tree, _whole_of(tree, path)
        tree = _tree_of(path)
    tree.setdefault("name", path.stem)
    bases = (path.resolve().parent, find_share("profiles").parent)
    return validated(Profile, absolute(tree | part, bases))


def _whole_of(part: dict[str, Any], path: Path) -> Path:
    """The file of the profile that this is a part of, whose name leaves the part."""
    whole = part.pop("part_of")
    if not isinstance(whole, str):
        raise ProfileError(f"part_of = {_short(whole)}: give the name or the file of a profile")
    if others := [name for name in part if name not in FREE_FIELDS]:
        raise ProfileError(
            f"profile {path} sets {others[0]!r}, which part_of = {whole!r} shares with it: leave it"
            f" out (a part may set {', '.join(FREE_FIELDS)}), or write a whole profile"
        )
    return _profile_file(whole)


def _tree_of(path: Path) -> dict[str, Any]:
    """What a profile's file holds."""
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ProfileError(f"profile {path} is not UTF-8 ({error}): save it as UTF-8") from None
    except RecursionError:
        raise ProfileError(f"profile {path} is nested too deeply: sections hold settings") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ProfileError(f"profile {path} is not readable YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ProfileError(f"profile {path} holds {type(tree).__name__}, not a mapping of sections")
    return tree


def _read_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if _size(node, {}) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values, aliases counted")
        return loader.construct_document(node) if node else None
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int]) -> int:
    """How many values a node has, an alias as often as it stands there."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key stands once, and a number is what it looks like: YAML 1.1 keeps the
    last of two equal keys, reads 010 as 8 and 1:30 as 90."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        # '<<', and what is no key: construct_mapping says so
        name = loader.construct_object(key, deep=True) if _is_name(key) else key
        if name in seen:
            problem = f"{name!r} stands twice: keep one of them"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen.add(name)
    loader.flatten_mapping(node)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _is_name(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge")


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = str(node.value)
    if ":" in text or re.match(r"[-+]?0[0-9_]", text):
        problem = f"{text} is not a decimal number: write 10 for 010, 90 for 1:30, or quote a text"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    is_int = node.tag.endswith(":int")
    try:
        return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
# a date stays text: the field that takes it says what is wrong with it
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_scalar)


def _profile_file(name_or_path: str | os.PathLike[str]) -> Path:
    path, name = Path(name_or_path), str(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ProfileError(f"profile = {name!r} is not a file: check the path")
        return path
    known = {file.stem: file for file in sorted(find_share("profiles").glob("*.yaml"))}
    if name not in known:
        hint = suggestion(name, known, "give one of these or the path of a .yaml file")
        raise ProfileError(f"profile = {name!r} is unknown; there are {', '.join(known)}: {hint}")
    return known[name]


def run_folder(profile_name: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Where a run lives: `out`, else `$LATLIB_RUNS/<profile>`, else `runs/<profile>` beside the
    notebooks of a checkout; of an installed package, in the current folder.
    """
    if out:
        return Path(out).expanduser().resolve()
    root = os.environ.get("LATLIB_RUNS")
    share = find_share("notebooks").parent
    beside = Path.cwd() if share.name == "_share" else share
    runs = Path(root).expanduser() if root else beside / "runs"
    return runs.resolve() / profile_name


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines 'field: old -> new' for every leaf in which two dumped profiles differ."""
    lines = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before = old.get(key)
        after = new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
