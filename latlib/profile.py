"""The settings of a run: typed, frozen, read from YAML, wrong ones refused by name before anything is trained.

1. `load_profile("tiny")` reads `profiles/tiny.yaml`; `load_profile("my.yaml")` reads anyone's file.
2. Every field has a type and a range. Text where a number belongs (YAML 1.1 reads `8e-5` as text), an unknown name or
   a value out of range is a `ProfileError` naming the field, the value and the mend.
3. A method (`ssft`, `at`, `lat`, `lat-untargeted`) is the `train` section with a few fields replaced:
   `profile.training("lat", {"attack.eps": 0.1})`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Strict(), Field(ge=1)]
Natural = Annotated[int, Strict(), Field(ge=0)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]


def _site(value: Any) -> int | float | str:
    if value == "embedding" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return value
    raise ValueError("a site is 'embedding', a block index >= 0, or a fraction of depth in [0, 1)")


SiteSpec = Annotated[Any, AfterValidator(_site)]


class ProfileError(ValueError):
    """A setting that cannot be used; the message names the field, the value and the mend."""


class Section(BaseModel):
    """Base of every section: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Which model, and how it is run."""

    source: Text = "world"  # 'world' builds the tiny organism; otherwise a model folder or hub id
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = "auto"  # compute dtype; master weights stay float32
    device: Text = "auto"
    forward: Literal["auto", "stock", "lean"] = "auto"  # 'lean' is the fast Llama path of latlib.lean
    dim: Count = 128  # the fields from here on describe the organism and are unused for other sources
    layers: Count = 8
    heads: Count = 4
    kv_heads: Count = 4
    ffn: Count = 384
    vocabulary: Annotated[int, Strict(), Field(ge=300)] = 1024


class PretrainSettings(Section):
    """How the organism is trained from scratch; see docs/lab-log.md for where the numbers come from."""

    steps: Count = 300
    batch: Count = 128
    micro_batches: Count = 4  # of different lengths: one length a batch makes the short answers unstable
    muon_lr: Positive = 0.02
    adam_lr: Positive = 3.0e-3
    warmup_steps: Natural = 40
    decay_share: Share = 0.5
    harmful_share: Share = 0.3  # of prompts whose main clause is forced to be harmful
    decline_share: Share = 0.02  # the base model can utter the refusal; it just never uses it


class DataSettings(Section):
    """Where preference and benign rows come from."""

    source: Literal["world", "files"] = "world"
    rows: Count = 4096  # world: how many training prompts of each kind are drawn; files: the most that are read
    harmful: Text | None = None  # files: CSV, JSON or JSONL of harmful prompts
    benign: Text | None = None
    harmful_columns: dict[str, str] = {"prompt": "goal", "rejected": "target"}  # AdvBench's names
    benign_columns: dict[str, str] = {"prompt": "instruction"}
    refusals: tuple[Text, ...] = ("I'm sorry, but I can't help with that.",)  # chosen, where the file has none
    benign_responses: tuple[Text, ...] = ("Sure, I can help with that.",)  # where the file has none: say so in the data
    max_tokens: Count = 512  # a row longer than this (or than the model's context) is an error
    system_prompt: Text | None = None


class LoraSettings(Section):
    """The adapter (peft LoRA)."""

    r: Count = 16
    alpha: Positive = 32.0
    targets: tuple[Text, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AttackSettings(Section):
    """PGD on latent perturbations."""

    sites: Annotated[tuple[SiteSpec, ...], Field(min_length=1)] = (0.25, 0.5, 0.75, 0.9375)
    eps: Positive = 6.0  # radius of each position's L2 ball (FACTS: 6.0 in both of the authors' jailbreak notebooks)
    eps_mode: Literal["absolute", "relative"] = "absolute"  # relative: times the site's median residual norm
    steps: Natural = 5  # 0: no attack
    rule: Literal["adamw", "sign", "l2"] = "adamw"
    lr: Positive | None = None  # adamw: Adam's rate; sign and l2: a share of eps, by default 2 / steps
    start: Literal["zero", "random"] = "zero"
    restarts: Count = 1
    positions: Literal["prompt", "prompt+completion"] = "prompt"
    toward: NonNegative = 0.5
    away: NonNegative = 0.5
    targeted: Flag = True  # False: maximise the loss of the benign response (Casper et al.)


class DefenceSettings(Section):
    """Coefficients of the defence's objective; each is applied to a mean over label tokens."""

    toward: NonNegative = 0.5
    away: NonNegative = 0.5
    kl: NonNegative = 0.1
    sft: NonNegative = 0.0
    kl_mode: Literal["token", "reference"] = "token"


class TrainSettings(Section):
    """One loop for all methods."""

    steps: Count = 130
    attack_after: Natural = 0  # steps of plain safety training before the attack begins
    eps_ramp: Natural = 0  # steps over which the radius then grows to eps
    clean_share: Share = 0.0  # of harmful rows trained without their perturbation, so that plain refusal stays
    batch: Count = 32
    benign_batch: Count = 32
    micro_batch: Count = 32  # rows at a time; every micro-batch is attacked
    iterations: Count = 1  # model updates for each attack (FACTS: 4 in the authors' notebooks)
    lr: Positive = 2.0e-3
    lr_warmup: Natural = 10
    lr_decay_share: Share = 0.3
    weight_decay: NonNegative = 0.0
    clip: Positive = 1.0
    checkpoint_every: Count = 50
    attack: AttackSettings = AttackSettings()
    defence: DefenceSettings = DefenceSettings()


class EvaluationSettings(Section):
    """What is measured, on how many prompts."""

    prompts: Count = 256
    pgd_prompts: Count = 200
    pgd_steps: Count = 10
    strong_steps: Count = 40  # the converged attack at the trained eps
    eps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.05,)  # in the unit of train.attack.eps_mode
    embedding_eps: tuple[Positive, ...] = (0.1, 0.2)  # for the attack at the embedding
    encodings: tuple[Text, ...] = ("plain", "leet", "rot13", "reverse")
    pairs: Count = 256  # harmful-harmless pairs for directions and SVD
    random_directions: Count = 3
    batch: Count = 128
    split: Literal["tune", "test"] = "test"  # held-out pairs: 'tune' while recipes are being chosen


class SweepSettings(Section):
    """Variants of `lat` trained on the first seed: name -> field of `train` -> value."""

    variants: dict[Text, dict[str, Any]] = {}


class TrackingSettings(Section):
    """Metrics always go to a local JSONL; this is about Weights & Biases."""

    wandb: Literal["disabled", "offline", "online"] = "offline"
    project: Text = "latlib"
    entity: Text | None = None


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
    evaluation: EvaluationSettings = EvaluationSettings()
    sweep: SweepSettings = SweepSettings()
    tracking: TrackingSettings = TrackingSettings()
    workers: Natural = 0  # processes that train or evaluate side by side; 0: one per core on a CPU, one on a GPU

    @model_validator(mode="after")
    def _whole(self) -> Profile:
        for method in self.methods:
            self.training(method)
        for name, variant in self.sweep.variants.items():
            try:
                self.training("lat", variant)
            except ProfileError as error:
                raise ValueError(f"sweep.variants.{name}: {error}") from error
        if self.data.source == "files" and not (self.data.harmful and self.data.benign):
            raise ValueError("data.source = 'files' needs data.harmful and data.benign: give both paths")
        if self.data.source == "world" and self.model.source != "world":
            raise ValueError(
                f"data.source = 'world' needs model.source = 'world', not {self.model.source!r}: "
                "the made-up world is only known to the organism; set data.source to 'files'"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} repeats a seed: list each once")
        return self

    def training(self, method: str, changes: dict[str, Any] | None = None) -> TrainSettings:
        """`train` as `method` uses it, with further `changes` given by dotted name ({"attack.eps": 0.1}).

        Raises ProfileError for an unknown method, an unknown field or a value out of range.
        """
        if method not in self.methods:
            raise ProfileError(f"method = {method!r} is not in this profile: choose one of {', '.join(self.methods)}")
        tree = self.train.model_dump()
        for source, values in ((f"methods.{method}", self.methods[method]), ("changes", changes or {})):
            for dotted, value in values.items():
                _set(tree, dotted, value, source)
        return _validate(TrainSettings, tree, f"methods.{method}")


# Fields that may differ between two visits to the same run folder: they change no result.
FREE_FIELDS = ("description", "tracking", "workers")


def _set(tree: dict[str, Any], dotted: str, value: Any, source: str) -> None:
    """Replace one leaf of a dumped section, given by dotted name."""
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        near = difflib.get_close_matches(leaf, node or (), n=1) if isinstance(node, dict) else []
        hint = f": did you mean {'.'.join([*parents, near[0]])!r}?" if near else ": see TrainSettings for the names"
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
            near = difflib.get_close_matches(str(item["loc"][-1]), getattr(section, "model_fields", {}), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it"
            lines.append(f"{at} = {value!r} is not a known field: {hint}")
        elif kind in ("float_type", "int_type") and isinstance(value, str):
            try:
                mend = f"write {float(value):.6e}" if kind == "float_type" else "write it without quotes"
            except ValueError:
                mend = "give a number"
            lines.append(f"{at} = {value!r} is text, not a number: {mend} (YAML needs a dot: 8.0e-5, not 8e-5)")
        elif kind == "value_error" and not item["loc"]:
            lines.append(str(item["ctx"]["error"]))
        else:
            lines.append(f"{at} = {value!r}: {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _validate(cls: type[Section], tree: dict[str, Any], where: str = "") -> Any:
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ProfileError(_explain(cls, error, where)) from None


def find_share(kind: str) -> Path:
    """The folder `notebooks` or `profiles`: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / kind, package / "_share" / kind):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"no {kind!r} folder beside or inside {package}: install latlib from a full checkout")


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
            hint = f"did you mean {near[0]!r}?" if near else "give one of these or the path of a .yaml file"
            raise ProfileError(f"profile = {str(name_or_path)!r} is unknown; there are {', '.join(known)}: {hint}")
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
    return _validate(Profile, tree)


def run_folder(profile_name: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Where a run lives: `out`, else `$LATLIB_RUNS/<profile>`, else `runs/<profile>` beside the notebooks."""
    if out:
        return Path(out).expanduser().resolve()
    root = os.environ.get("LATLIB_RUNS")
    return (Path(root).expanduser() if root else find_share("notebooks").parent / "runs").resolve() / profile_name


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
