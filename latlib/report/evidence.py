"""What a run measured, read from its results files: every figure, interval and claim starts here.

1. `Evidence.load(folder)` reads a results folder: a run's own, or the one committed with the
   repository.
2. `cell` picks rows of the outcome table; `rate` is a share of them, `contrast` the difference of
   two shares over the same prompts and seeds. A prompt that occurs more than once in a cell (two
   attacks) counts once, as a hit if any hit: the worst case per prompt, never the better of two
   averages.
3. `spikes` sets the jumps of the training loss beside the attack of the same step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from latlib.config.profile import Profile, load_profile
from latlib.evaluation.outcomes import COLUMNS, PLAIN, TRANSFER, Intervention, Rule
from latlib.experiment.tracking import read_metrics
from latlib.report.stats import Interval, cluster_interval, paired_interval, paired_p_value

PROMPT_KEYS = ("method", "seed", "prompts", "encoding", "prompt_id")
# steps of the running median; a spike is this many deviations above it
WINDOW, SPIKE_MADS = 21, 3.0
BLOCK = 7  # steps that are resampled together: neighbouring steps are alike


class MissingError(LookupError):
    """A results folder lacks what a claim is computed from; the message says what."""


@dataclass(frozen=True)
class Evidence:
    """profile: the run's settings. outcomes: the outcome table. metrics: (label, seed) -> training
    curve, a row a step. variance: (method, seed) -> `geometry.variance_table`. label: method, or
    'lat[variant]'."""

    profile: Profile
    outcomes: pd.DataFrame
    metrics: Mapping[tuple[str, int], pd.DataFrame] = field(default_factory=dict)
    variance: Mapping[tuple[str, int], dict] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | Path) -> Evidence:
        """Read `outcomes/*.parquet` and `refusal_svd.json` of a results folder; `metrics/*.jsonl`
        and `profile.yaml` are looked for in it and beside it. What was not measured is empty.
        Raises MissingError where there is no profile."""
        folder = Path(folder)
        # a whole run's folder
        folder = folder / "results" if (folder / "results" / "outcomes").is_dir() else folder
        tables = [pd.read_parquet(path) for path in sorted((folder / "outcomes").glob("*.parquet"))]
        settings = next(
            (p for p in (folder / "profile.yaml", folder.parent / "profile.yaml") if p.is_file()),
            None,
        )
        if settings is None:
            raise MissingError(f"{folder} has no profile.yaml: give the results folder of a run")
        profile = load_profile(settings)
        variants, metrics = {f"lat-{name}": f"lat[{name}]" for name in profile.sweep.variants}, {}
        for path in sorted(
            [*folder.glob("metrics/*.jsonl"), *folder.parent.glob("metrics/*.jsonl")]
        ):
            name, _, seed = path.stem.rpartition("-seed")
            if seed.isdigit() and (name in profile.methods or name in variants):
                # a resumed run logs some steps twice
                curve = read_metrics(path).drop_duplicates("step", keep="last")
                metrics[variants.get(name, name), int(seed)] = curve.sort_values(
                    "step", ignore_index=True
                )
        variance, path = {}, folder / "refusal_svd.json"
        if path.is_file():
            models = json.loads(path.read_text(encoding="utf-8")).get("models", {})
            variance = {
                (m, int(s)): table for m, seeds in models.items() for s, table in seeds.items()
            }
        outcomes = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
        return cls(profile, as_labels(outcomes), metrics, variance)

    @property
    def lat_eps(self) -> float:
        """The radius `lat` was trained at, in the profile's unit."""
        return self.profile.training("lat").attack.eps

    def eps_variants(self) -> dict[str, float]:
        """label -> radius of `lat` and of every sweep variant that changes the radius only,
        smallest first.
        """
        sweep = {
            f"lat[{n}]": v["attack.eps"]
            for n, v in self.profile.sweep.variants.items()
            if set(v) == {"attack.eps"}
        }
        return dict(sorted({"lat": self.lat_eps, **sweep}.items(), key=lambda item: item[1]))

    def cell(
        self,
        method: str | Sequence[str],
        attack: str | Sequence[str] = "none",
        encoding: str | Sequence[str] = "plain",
        prompts: str | Sequence[str] = "harmful",
        eps: float | None = None,
        where: str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> pd.DataFrame:
        """Rows of the outcome table. where: 'latent' (sites above the embedding) or 'embedding'.

        Raises MissingError when there is none, or when one of several methods or attacks has none.
        """
        rows, wanted = (
            self.outcomes,
            {"method": method, "attack": attack, "encoding": encoding, "prompts": prompts},
        )
        for column, values in wanted.items():
            rows = rows[rows[column].isin([values] if isinstance(values, str) else list(values))]
        if eps is not None:
            rows = rows[np.isclose(rows["eps"].astype(float), eps)]
        if where is not None:
            rows = rows[(rows["sites"] == "embedding") == (where == "embedding")]
        if seeds is not None:
            rows = rows[rows["seed"].isin(list(seeds))]
        for column in ("method", "attack"):
            values = [wanted[column]] if isinstance(wanted[column], str) else wanted[column]
            absent = sorted(set(values) - set(rows[column]))
            if absent:
                at = "" if eps is None else f" at eps {eps:g}"
                raise MissingError(f"no outcome with {column} {', '.join(absent)} ({wanted}{at})")
        return rows


def as_labels(outcomes: pd.DataFrame) -> pd.DataFrame:
    """The outcome table with the labels that figures use: 'lat[no-kl]' for a method's variant,
    'plain>leet' for an encoding, 'transfer:ssft' and 'ablate:ssft@best' for an attack."""
    if "intervention" not in outcomes or outcomes.empty:
        return outcomes
    table = outcomes.copy()
    is_variant = table["variant"] != ""
    table.loc[is_variant, "method"] += "[" + table.loc[is_variant, "variant"] + "]"
    asks = table["reply_encoding"] != PLAIN
    table.loc[asks, "encoding"] += ">" + table.loc[asks, "reply_encoding"]
    columns = ["attack", "intervention", "source", "rule", "site", "draw"]
    keys = table[columns].astype({"draw": object}).apply(tuple, axis=1)
    table["attack"] = keys.map({key: _attack_label(*key) for key in set(keys)})
    return table.rename(columns={"eps_unit": "eps_mode"})


def _attack_label(
    attack: str, intervention: str, source: str, rule: str, site: str, draw: object
) -> str:
    if attack == TRANSFER:
        return f"{attack}:{source}"
    if intervention == Intervention.NONE:
        return attack
    if rule == Rule.SITE_SWEEP:
        return f"{intervention}:{source}@site-{site}"
    if rule:
        return f"{intervention}:{source}@{rule}"
    return f"{intervention}:{source}" + ("" if pd.isna(draw) else str(draw))


def hits(rows: pd.DataFrame, outcome: str, keys: Sequence[str] = PROMPT_KEYS) -> pd.DataFrame:
    """One row a prompt: its keys, its cluster, and `hit`, whether any of its rows has the
    outcome.
    """
    marked = rows.assign(hit=rows["outcome"] == outcome)
    return marked.groupby(list(keys), as_index=False).agg(
        hit=("hit", "max"), cluster=("cluster", "first")
    )


def rate(rows: pd.DataFrame, outcome: str = "complied") -> Interval:
    """Share of prompts with an outcome ('complied', 'refused', 'neither'), worst case over the
    attacks in `rows`.
    """
    found = hits(rows, outcome)
    return cluster_interval(found["hit"], found["cluster"], found["seed"])


def contrast(
    a: pd.DataFrame, b: pd.DataFrame, outcome: str = "complied", same: Sequence[str] = ()
) -> Interval:
    """Share in `a` minus share in `b`, over the prompts and seeds that both have.

    same: further columns on which a row of `a` must meet its row of `b` ('encoding', 'prompts',
    'method'). Raises MissingError when they share no prompt.
    """
    return paired_interval(*_paired(a, b, outcome, same))


def p_value(
    a: pd.DataFrame, b: pd.DataFrame, outcome: str = "complied", same: Sequence[str] = ()
) -> float:
    """Two-sided p-value of the same difference (see `stats.paired_p_value`)."""
    return paired_p_value(*_paired(a, b, outcome, same))


def _paired(
    a: pd.DataFrame, b: pd.DataFrame, outcome: str, same: Sequence[str]
) -> tuple[pd.Series, ...]:
    """(hits of a, hits of b, clusters, seeds) of the prompts and seeds that both have."""
    keys = ["seed", "prompt_id", *same]
    both = hits(a, outcome, keys).merge(hits(b, outcome, keys), on=keys, suffixes=("", "_b"))
    if both.empty:
        raise MissingError("the two sides of a comparison share no prompt and seed")
    return both["hit"], both["hit_b"], both["cluster"], both["seed"]


def spikes(metrics: pd.DataFrame) -> pd.DataFrame:
    """The steps under full attack (eps_scale 1), with what exceeds the running median of WINDOW
    steps.

    Adds `excess` (total loss), `spike` (excess above SPIKE_MADS scaled median absolute deviations
    of the run), `won_excess` (share of attacks won), `attack_part` (share of the excess that is
    toward and away, not KL and SFT). Raises MissingError for a curve without such steps.
    """
    if "attack_won" not in metrics or "eps_scale" not in metrics:
        raise MissingError("the training curve has no attack")
    full = metrics[(metrics["eps_scale"] >= 1) & metrics["attack_won"].notna()].reset_index(
        drop=True
    )
    if len(full) < WINDOW:
        raise MissingError(f"{len(full)} steps under full attack: spikes need at least {WINDOW}")

    def above(column: pd.Series) -> pd.Series:
        return column - column.rolling(WINDOW, center=True, min_periods=WINDOW // 2).median()

    excess = above(full["total"])
    # 1.4826 MAD is the standard deviation of a normal
    spread = 1.4826 * (excess - excess.median()).abs().median()
    adversarial = above(full["toward"]) + (above(full["away"]) if "away" in full else 0.0)
    return full.assign(
        excess=excess,
        spike=excess > SPIKE_MADS * spread,
        won_excess=above(full["attack_won"]),
        attack_part=adversarial / excess.where(excess.abs() > 1e-12),
        block=full.index // BLOCK,
    )


def spike_steps(
    metrics: Mapping[tuple[str, int], pd.DataFrame], methods: Sequence[str]
) -> pd.DataFrame:
    """`spikes` of every run of `methods`, one below the other, with `label` and `seed`.

    Raises MissingError when none of them has steps under full attack.
    """
    tables, reason = [], "no training curve of " + ", ".join(methods)
    for (label, seed), curve in metrics.items():
        if label in methods:
            try:
                tables.append(spikes(curve).assign(label=label, seed=seed))
            except MissingError as error:
                reason = f"{label} seed {seed}: {error}"
    if not tables:
        raise MissingError(reason)
    return pd.concat(tables, ignore_index=True)
