"""The sections of a profile: every setting with its type, its range, its default and where the
default comes from.

Sources are listed in docs/sources.md; "our choice" that docs/lab-log.md explains names it. Authors'
code: github.com/aengusl/latent-adversarial-training at commit 53ac752.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    model_validator,
)

from latlib.errors import SettingError
from latlib.text.encodings import resolve
from latlib.threat import ADAM_LR, PGD, Positions, Site, ThreatModel, resolve_sites

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, le=1e9)]
NonNegative = Annotated[Number, Field(ge=0, le=1e9)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Strict(), Field(ge=1, le=1_000_000_000)]
Natural = Annotated[int, Strict(), Field(ge=0, le=1_000_000_000)]
Width = Annotated[int, Strict(), Field(ge=1, le=65_536)]  # of a layer or a batch
Seed = Annotated[int, Strict(), Field(ge=0, le=1_000_000)]  # times steps it fits 64 bits
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
# Windows has files of these names already, whatever follows behind a dot
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_LONGEST_NAME = 64
BASE_ANSWERS = "base"  # of data.benign_responses


def _site(value: Any) -> int | float | str:
    is_block = type(value) is int and value >= 0
    is_fraction = type(value) is float and 0 <= value < 1
    if value == "embedding" or is_block or is_fraction:
        return value
    raise ValueError("a site is 'embedding', a block index >= 0, or a fraction of depth in [0, 1)")


def _encoding(name: str) -> str:
    for part in name.split(">", 1):  # 'request>reply'
        resolve(part)  # its ValueError says what is wrong and how to fix it
    return name


def _name(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?", text)
    if not plain or _RESERVED.fullmatch(text) or len(text) > _LONGEST_NAME:
        raise ValueError(
            "folders are named after it: use at most 64 letters, digits, '.', '_' and '-', begin"
            " with a letter or digit, end with no dot, and leave out names that Windows keeps for"
            " itself (con, nul, com1)"
        )
    return text


def _responses(value: Any) -> Any:
    if value == BASE_ANSWERS:
        return value
    if isinstance(value, list | tuple) and value:
        if all(isinstance(text, str) and text for text in value):
            return tuple(value)
    raise ValueError(f"give a list of texts, or {BASE_ANSWERS!r}: the base model's own responses")


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", name):
        raise ValueError("no such device: give 'auto', 'cpu', 'cuda', 'cuda:0', 'xpu' or 'mps'")
    return name


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{value!r} stands twice: list each once")
    return values


ProfileError = SettingError  # its name where a profile is read


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """What to do about a name that is not known: the one that was meant, or something else."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


SiteSpec = Annotated[Any, AfterValidator(_site)]
SomeSites = Annotated[tuple[SiteSpec, ...], Field(min_length=1)]
EncodingName = Annotated[Text, AfterValidator(_encoding)]
Name = Annotated[str, Strict(), AfterValidator(_name)]
EachOnce = AfterValidator(_each_once)
Device = Annotated[str, Strict(), AfterValidator(_device)]
# what a column can stand for
HarmfulColumns = dict[Literal["prompt", "rejected", "chosen"], Text]
BenignColumns = dict[Literal["prompt", "response"], Text]
BorderlineColumns = dict[Literal["prompt", "label"], Text]
Radii = Annotated[tuple[Positive, ...], EachOnce]
Encodings = Annotated[tuple[EncodingName, ...], EachOnce]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Which model, and how it is run."""

    # 'world' builds the tiny organism; otherwise a model folder or hub id. Our choice
    source: Text = "world"
    # of a hub model: a commit, branch or tag. Our choice: the hub's newest
    revision: Text | None = None
    # read weights that exist only as pickles, which can run any code when they are opened. Our
    # choice: no
    allow_pickle: Flag = False
    # run the Python files of a model's folder. Our choice: no
    trust_remote_code: Flag = False
    # compute dtype; master weights stay float32. Our choice: what the machine is fast in
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = "auto"
    device: Device = "auto"  # our choice: a GPU where there is one
    # 'lean' is the fast Llama path of latlib.fused.llama. Our choice: where it fits the model
    forward: Literal["auto", "stock", "lean"] = "auto"
    # torch.compile of the stock forward's blocks; falls back with a warning where it cannot. Our
    # choice: it costs 8 to 23 s a process (docs/lab-log.md)
    compile: Flag = False
    # what the chat template gets beside the messages, such as {enable_thinking: false}. Our choice
    template: dict[str, bool | int | str] = {}
    # what a chat template writes for today. Our choice: the day on which the run began
    date: datetime.date | None = None
    # The fields from here on describe the organism and are unused for other sources. Our choice:
    # the smallest that reads every encoding (docs/lab-log.md)
    dim: Width = 128
    layers: Annotated[int, Strict(), Field(ge=1, le=512)] = 8
    heads: Width = 4
    kv_heads: Width = 4
    ffn: Width = 384
    vocabulary: Annotated[int, Strict(), Field(ge=300, le=1_000_000)] = 1024
    # tokens that the chat template puts behind the user's words: the positions that Arditi et al.'s
    # rule chooses from. Our choice: the fewest
    post_instruction_tokens: Annotated[int, Strict(), Field(ge=1, le=8)] = 1

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelSettings:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim = {self.dim} is no even multiple of heads = {self.heads}: each head turns"
                " pairs of dimensions"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads = {self.heads} is no multiple of kv_heads = {self.kv_heads}: they are"
                " shared evenly"
            )
        return self


class PretrainSettings(Section):
    """How the organism is trained from scratch. All of it is our choice (docs/lab-log.md)."""

    steps: Count = 300
    batch: Width = 128
    # of different lengths: one length a batch makes the short answers unstable
    micro_batches: Count = 4
    muon_lr: Positive = 0.02
    adam_lr: Positive = 3.0e-3
    warmup_steps: Natural = 40
    decay_share: Share = 0.5
    harmful_share: Share = 0.3  # of prompts whose main clause is forced to be harmful
    decline_share: Share = 0.02  # the base model can utter the refusal; it just never uses it


class DataSettings(Section):
    """Where preference and benign rows come from. Defaults are our choice where none is named."""

    source: Literal["world", "files"] = "world"
    # world: how many training prompts of each kind are drawn; files: the most that are read
    rows: Count = 4096
    # world: which of its two divisions into training and held-out pairs
    division: Literal["first", "second"] = "first"
    # files: a CSV, JSON, JSONL or parquet file, a data set's folder, or its hub id
    harmful: Text | None = None
    benign: Text | None = None
    # our name -> a column, or a format string over them: "{instruction}\n{input}",
    # "{messages[user]}". The names are AdvBench's (Zou et al. 2023)
    harmful_columns: HarmfulColumns = {"prompt": "goal", "rejected": "target"}
    benign_columns: BenignColumns = {"prompt": "instruction"}  # Alpaca's name
    harmful_config: Text | None = None  # of a hub data set that has several configurations
    benign_config: Text | None = None
    harmful_split: Text = "train"  # of a hub data set or a data set's folder
    benign_split: Text = "train"
    streaming: Flag = False  # read a hub data set row by row instead of downloading all of it
    # of the prompts: half for choosing (tune), half for results
    held_out: Annotated[Number, Field(gt=0, lt=1)] = 0.3
    # prompts that results are measured on; None: held out of `harmful`
    test_harmful: Text | None = None
    # AdvBench's names (Zou et al. 2023)
    test_harmful_columns: HarmfulColumns = {"prompt": "goal", "rejected": "target"}
    test_benign: Text | None = None
    test_benign_columns: BenignColumns = {"prompt": "instruction"}  # Alpaca's name
    # prompts that merely sound harmful, as in XSTest: a refusal is one too many
    test_borderline: Text | None = None
    test_borderline_columns: BorderlineColumns = {"prompt": "prompt"}  # XSTest's name
    # Jaccard similarity of two prompts' 5-letter shingles from which they count as one
    near_duplicate: Share = 0.7
    # chosen, where the file has none
    refusals: tuple[Text, ...] = ("I'm sorry, but I can't help with that.",)
    # where the file has none: texts, or 'base': what the frozen base replies, once for all methods
    # and seeds
    benign_responses: Annotated[Any, AfterValidator(_responses)] = ("Sure, I can help with that.",)
    response_tokens: Count = 128  # that the base writes at most
    # of a row's prompt and either completion; never more than the model's context
    max_tokens: Count = 512  # as in Casper et al. 2024, lat.py
    # truncate: cut a completion, drop a row whose prompt is
    too_long: Literal["error", "drop", "truncate"] = "error"
    system_prompt: Text | None = None
    # which completions a token ends: all, or the benign ones alone (Sheshadri et al. 2024, authors'
    # code). Our choice: all, or a model does not learn where a refusal ends
    end_of_turn: Literal["all", "benign"] = "all"
    _answers: Path | None = PrivateAttr(None)

    @property
    def default_responses(self) -> tuple[str, ...]:
        """What stands in place of a response that the file lacks: '' where the base gives one."""
        return ("",) if self.benign_responses == BASE_ANSWERS else self.benign_responses

    @property
    def answers(self) -> Path | None:
        """The file with what the base replies, of a run; it may not be there yet."""
        return self._answers

    def answered_in(self, file: Path) -> DataSettings:
        """The same settings in a run that keeps what the base replies in a file."""
        settings = self.model_copy()
        settings._answers = file
        return settings


class LoraSettings(Section):
    """The adapter (peft LoRA). All of it is our choice, for the organism (docs/lab-log.md)."""

    r: Width = 16
    alpha: Positive = 32.0
    targets: tuple[Text, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class AttackSettings(Section):
    """PGD on latent perturbations."""

    # Sheshadri et al. 2024, authors' code: 8, 16, 24 and 30 of 32 blocks, as shares of the depth
    sites: SomeSites = (0.25, 0.5, 0.75, 0.9375)
    # radius of each position's L2 ball. Sheshadri et al. 2024, authors' code: 6.0 for both models
    eps: Positive = 6.0
    # relative: times the site's median residual norm. Sheshadri et al. 2024: absolute
    eps_mode: Literal["absolute", "relative"] = "absolute"
    steps: Natural = 5  # 0: no attack. Our choice; the authors' code takes 16
    rule: Literal["adamw", "sign", "l2"] = "adamw"  # Sheshadri et al. 2024, authors' code
    # adamw: Adam's rate; sign and l2: a share of eps. Our choice: the rule's own, see latlib.attack
    lr: Positive | None = None
    start: Literal["zero", "random"] = "zero"  # Sheshadri et al. 2024, authors' code
    restarts: Count = 1  # Sheshadri et al. 2024, authors' code
    # Sheshadri et al. 2024, authors' code: the prompt for Llama-2, 'prompt+shared' for Llama-3:
    # one perturbation a token, the same in both completions
    positions: Positions = "prompt"
    toward: NonNegative = 0.5  # Sheshadri et al. 2024, authors' code
    away: NonNegative = 0.5  # Sheshadri et al. 2024, authors' code
    # False: maximise the loss of the benign response (Casper et al. 2024). Sheshadri et al. 2024
    targeted: Flag = True

    @property
    def at_embedding(self) -> bool:
        """Whether it attacks at the embedding only."""
        return self.steps > 0 and tuple(self.sites) == ("embedding",)

    def threat_model(self, n_layers: int, norms: Mapping[Site, float] | None = None) -> ThreatModel:
        """Where the adversary may perturb a model of so many blocks, and how far. norms: site ->
        median residual norm, needed for eps_mode 'relative'. Raises ValueError without them, or for
        a site outside the model.
        """
        sites = resolve_sites(self.sites, n_layers)
        if self.eps_mode == "absolute":
            return ThreatModel.within(dict.fromkeys(sites, self.eps), self.positions)
        if norms is None:
            raise ValueError(
                "eps_mode = 'relative' needs the median residual norms: measure them with"
                " residual_norms()"
            )
        own = {site: norms[site] for site in sites}
        return ThreatModel.relative(self.eps, own, self.positions)

    def search(self) -> PGD:
        """How it searches there."""
        return PGD(**{field.name: getattr(self, field.name) for field in fields(PGD)})

    def never_binds(self, radius: float, d_model: int) -> str:
        """That the steps do not lead out of a ball of `radius` around zero, in words; '' where they
        can. Adam moves no coordinate by much more than its rate.
        """
        if not self.steps or self.start == "random" or self.restarts > 1:
            return ""
        if self.rule == "adamw":
            rate = self.lr or ADAM_LR
            length = rate * d_model**0.5
            of = f"{rate:g} in {d_model:,} dimensions"
        else:
            share = self.lr or 2 / self.steps
            length = share * radius
            of = f"{share:g} of the radius"
        furthest = self.steps * length
        if furthest >= radius:
            return ""
        return (
            f"eps = {self.eps:g} never binds: {self.steps} {self.rule} steps of {of} go at most"
            f" about {furthest:.3g}, and the radius is {radius:.3g}"
        )


class DefenceSettings(Section):
    """Coefficients of the defence's objective; each is applied to a mean over label tokens.

    Defaults: Sheshadri et al. 2024, authors' code, for Llama-3, before they are divided by their
    sum.
    """

    toward: NonNegative = 0.5
    away: NonNegative = 0.5
    kl: NonNegative = 0.1
    sft: NonNegative = 0.0
    # reference: the authors' normalised reverse KL, at their positions. Our choice: nats a token
    kl_mode: Literal["token", "reference"] = "token"


class ReroutingSettings(Section):
    """Circuit breakers. Defaults: Zou et al. 2024 (arXiv 2406.04313), for Llama-3-8B."""

    # layers 10 and 20 of 32
    sites: SomeSites = (0.3125, 0.625)
    alpha: Positive = 10.0
    # weight of the retain loss beside its schedule. A distance grows with the stream's norm, which
    # the cosine does not see. 1 is the paper's objective
    retain: Positive = 1.0


# of TrainSettings: what changes nothing but checkpoints
WHEN = ("checkpoint_every", "checkpoint_minutes", "checkpoints_kept")


class TrainSettings(Section):
    """One loop for all methods. Defaults are our choice, for the organism, where none is named
    (docs/lab-log.md).
    """

    # what is minimised: a class of latlib.objectives
    objective: Literal["safety-training", "rerouting"] = "safety-training"
    steps: Count = 130
    attack_after: Natural = 0  # steps of plain safety training before the attack begins
    eps_ramp: Natural = 0  # steps over which the radius then grows to eps
    # of harmful rows trained without their perturbation, so that plain refusal stays
    clean_share: Share = 0.0
    batch: Width = 32
    benign_batch: Width = 32
    micro_batch: Width = 32  # rows at a time; every micro-batch is attacked
    # harmful and benign rows in one forward: for launch-bound GPUs; costs padding
    shared_forward: Flag = False
    # lengths are rounded up to a multiple of this, so that compiled code is reused
    pad_to: Count = 1
    # model updates for each attack. Sheshadri et al. 2024, authors' code: 4
    iterations: Count = 1
    lr: Positive = 2.0e-3
    lr_warmup: Natural = 10
    lr_decay_share: Share = 0.3
    weight_decay: NonNegative = 0.0
    # forget the optimiser's moments before every step, as the authors' code does. Our choice: no
    fresh_optimiser: Flag = False
    clip: Positive = 1.0  # Sheshadri et al. 2024, authors' code
    # steps in a row that may be skipped, their updates not being finite. Our choice
    skips: Natural = 3
    checkpoint_every: Count = 50  # steps
    checkpoint_minutes: Positive = 10.0  # and at least as often as this
    checkpoints_kept: Count = 2
    # steps between looks at held-out tuning prompts; 0: none. Our choice: eight looks
    evaluate_every: Natural | None = None
    evaluate_prompts: Count = 16  # of each kind
    keep: Literal["last", "best"] = "last"  # best: of the looks, see latlib.experiment.validation
    attack: AttackSettings = AttackSettings()
    defence: DefenceSettings = DefenceSettings()
    rerouting: ReroutingSettings = ReroutingSettings()

    @model_validator(mode="after")
    def _learns_something(self) -> TrainSettings:
        weights = self.defence.model_dump(exclude={"kl_mode"})
        if self.objective == "safety-training" and not any(weights.values()):
            raise ValueError(f"defence = {weights}: all are 0: nothing would be learned")
        attack = self.attack
        if attack.steps and attack.targeted and not (attack.toward or attack.away):
            raise ValueError(
                "attack.toward = attack.away = 0: the attack would seek nothing: give one a"
                " weight, or set attack.steps to 0"
            )
        return self

    @property
    def evaluation_steps(self) -> int:
        """`evaluate_every`, or what it is by default."""
        return -(-self.steps // 8) if self.evaluate_every is None else self.evaluate_every

    def plain_steps(self) -> dict[str, Any] | None:
        """All that the steps before the attack depend on, beside the seed: trainings that are equal
        in it have as many of them in common as each takes. None for one without any attack that has
        an away term: before their attack, the others have none.

        Left out is what changes no weight and no line of the log: when checkpoints are made, and
        which adapter is kept.
        """
        if self.defence.away and not self.attack.steps:
            return None
        no_matter = {"attack", "attack_after", "eps_ramp", "clean_share", "keep", *WHEN}
        if not self.evaluation_steps:
            no_matter.add("evaluate_prompts")
        tree = self.model_dump(mode="json", exclude=no_matter)
        del tree["defence"]["away"]
        return tree


class SuffixSearchSettings(Section):
    """Adversarial suffixes, sought on tuning prompts; see `latlib.redteam.gcg`.

    Defaults: Zou et al. 2023, algorithms 1 and 2, where nothing else is named.
    """

    steps: Natural = 500  # 0: no suffixes
    tokens: Count = 20
    candidates: Count = 512
    topk: Count = 256
    prompts: Count = 25  # behaviours attacked at once
    prompts_per_step: Natural = 0  # drawn of these for a step; 0: all
    batch: Width = 64  # rows at a time: our choice


class GraderSettings(Section):
    """What tells refused, complied and neither where the right answer is unknown; see
    `latlib.evaluation.graders`. Defaults are our choice where none is named.
    """

    # the smallest measured error without a model (docs/graders.md)
    name: Literal["rules", "phrases", "phrases-prefix", "harmbench", "strongreject", "guard"] = (
        "rules"
    )
    # folder or hub id of a grader that is a model; None: the published one
    source: Text | None = None
    base: Text | None = None  # under a grader that is an adapter
    template: Text | None = None  # text file with the grader's prompt
    device: Device = "auto"

    @model_validator(mode="after")
    def _is_read(self) -> GraderSettings:
        given = [name for name in ("source", "base", "template") if getattr(self, name)]
        if given and self.name.startswith(("rules", "phrases")):
            raise ValueError(
                f"name = {self.name!r} is no model and reads no {' or '.join(given)}: leave that"
                " out, or name 'harmbench', 'strongreject' or 'guard'"
            )
        return self


class EvaluationSettings(Section):
    """What is measured, on how many prompts. Defaults are our choice, for the organism, where none
    is named.
    """

    prompts: Count = 256
    pgd_prompts: Count = 200
    pgd_steps: Count = 10
    strong_steps: Count = 40  # the converged attack at the trained eps
    # where steps, restarts, rules and sites are varied, and transfer tried
    strong_eps: Radii = (0.05,)
    restarts: Count = 2  # random starts beside the zero start
    # beside the profile's own
    rules: Annotated[tuple[Literal["adamw", "sign", "l2"], ...], EachOnce] = ("sign", "adamw")
    shots: Count = 8  # answered requests in the chat before the harmful one
    suffix: SuffixSearchSettings = SuffixSearchSettings()
    # in the unit of train.attack.eps_mode
    eps: Annotated[Radii, Field(min_length=1)] = (0.05,)
    embedding_eps: Radii = (0.1, 0.2)  # for the attack at the embedding
    # audited with harmless requests too
    encodings: Encodings = ("plain", "leet", "rot13", "reverse")
    # harmful requests and their twins; 'request>reply' is possible
    further_encodings: Encodings = ()
    pairs: Count = 256  # harmful-harmless pairs for directions and SVD
    # same words, or any harmless prompt (see latlib.refusal.activations)
    pairing: Literal["matched", "random"] = "matched"
    # the rule `selected` drops prompts that the model does not treat rightly, harmful ones that it
    # answers and harmless ones that it refuses. Arditi et al. 2024, authors' code
    filter_prompts: Flag = True
    # whose directions are found, and removed from one another: methods, and 'base'. Empty: all
    sources: Annotated[tuple[Name, ...], EachOnce] = ()
    ablation_prompts: Count = 200  # of each kind, for every direction that is ablated or added
    random_directions: Count = 3
    batch: Width = 128
    split: Literal["tune", "test"] = "test"  # held-out pairs: 'tune' while recipes are being chosen
    # unused in the made-up world, whose answers are known
    grader: GraderSettings = GraderSettings()
    max_new_tokens: Count = 64  # of a reply that is written out and graded


class RolesSettings(Section):
    """What each method is for. The names of methods mean nothing to the code; their roles do. The
    defaults are our choice.

    A loaded profile holds the resolved names: what is left out here is filled in by `resolved`.
    """

    # trained to refuse by the same rows, without an attack; None: claims that need one are not
    # measured
    undefended: Text | None = None
    # the main method without its attack: same rows, same losses; None: the first that is
    control: Text | None = None
    # the main method under an attack with a radius of nothing; None: the first that is
    no_radius: Text | None = None
    # whose refusal direction the others are compared with; None: the undefended twin's
    reference: Text | None = None
    # the defence that claims are about: its attack is the threat model of every evaluation, and
    # sweeps vary it; None: the first method with an attack that is not the undefended twin
    main: Text | None = None
    # the defence that the main one competes with; None: one that is attacked at the embedding
    # and differs from the main method in sites and radius alone
    rival: Text | None = None
    # the two of Abbas et al. 2025, attacked without a target: in the stream, and at the embedding;
    # None: the first that is
    untargeted: Text | None = None
    untargeted_rival: Text | None = None
    # set side by side in claims and figures, and attacked in notebook 06; none: all methods
    compared: Annotated[tuple[Text, ...], EachOnce] = ()

    def resolved(self, attacked: Mapping[str, bool]) -> RolesSettings:
        """Every role that can be told with a name. attacked: method -> whether it trains under an
        attack.

        Raises ValueError for a role whose method does not exist.
        """
        for field, value in self:
            for name in (value,) if isinstance(value, str) else value or ():
                if name not in attacked:
                    hint = suggestion(name, attacked, f"choose one of {', '.join(attacked)}")
                    raise ValueError(
                        f"roles.{field} = {name!r} is no method of this profile: {hint}"
                    )
        defended = [name for name in attacked if name != self.undefended]
        under_attack = [name for name in defended if attacked[name]]
        changes = {
            "reference": self.reference or self.undefended,
            "main": self.main or [*under_attack, *defended, *attacked][0],
            "compared": self.compared or tuple(attacked),
        }
        return self.model_copy(update=changes)


class SweepSettings(Section):
    """Variants of the main method (`roles.main`): name -> field of `train` -> value. None by
    default: our choice.
    """

    variants: dict[Name, dict[str, Any]] = {}
    # which seeds they are trained on: our choice. A claim about them needs more than one
    seeds: Literal["first", "all"] = "first"
    # for latlib.experiment.sweep: field of `train` -> values, crossed, on every seed
    grid: dict[Text, tuple[Any, ...]] = {}


class ParallelSettings(Section):
    """Several processes that train one model, a GPU each. One by default: our choice."""

    processes: Count = 1
    # fsdp2: the weights are spread over the GPUs, for models too big for one
    mode: Literal["ddp", "fsdp2"] = "ddp"


class BudgetSettings(Section):
    """What a GPU costs, for the estimate of `--check`."""

    # our choice: a round figure for an H100 on a pod; put your provider's price here
    usd_per_hour: Positive = 3.0


class TrackingSettings(Section):
    """Metrics always go to a local JSONL; this is about Weights & Biases. Offline by default, so
    that nothing leaves the machine unasked: our choice.
    """

    wandb: Literal["disabled", "offline", "online"] = "offline"
    project: Text = "latlib"
    entity: Text | None = None
