"""What each claim comes down to: a difference, positive when the claim holds, with the levels
behind it.

Every function takes the evidence of a run and returns (interval of the effect, note); the note's
numbers are computed. All raise MissingError where the run lacks what they need. `claims` says what
is tested and judges the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from latlib.report.evidence import Evidence, MissingError, contrast, rate, spike_steps
from latlib.report.stats import Interval, difference_interval, draws_interval
from latlib.report.understanding import GIVEN, counted

TRAINED = ("ssft", "at", "lat")
Effect = tuple[Interval, str]


def weakest(intervals: Sequence[Interval]) -> Interval:
    """The smallest estimate and bounds: above a bar only if every comparison is."""
    first = intervals[0]
    parts = (min(getattr(i, name) for i in intervals) for name in ("estimate", "low", "high"))
    return Interval(*parts, first.n, first.clusters, first.seeds)


def _percent(interval: Interval) -> str:
    return f"{100 * interval.estimate:.0f} %"


def attack_breaks_ssft(e: Evidence) -> Effect:
    """ASR on SSFT at the largest radius, PGD minus noise of the same norm."""
    eps = max(e.profile.evaluation.eps)
    attacked, noisy = (
        e.cell("ssft", attack, eps=eps, where="latent") for attack in ("pgd", "noise")
    )
    levels = (
        f"SSFT at eps {eps:g}: ASR {_percent(rate(attacked))} under PGD, {_percent(rate(noisy))}"
        " under noise"
    )
    return contrast(attacked, noisy), levels


def lat_lowers_asr(e: Evidence) -> Effect:
    """ASR at LAT's radius, SSFT minus LAT, the worse of two attacks per prompt."""
    attacks = ("pgd", "pgd-strong")
    ssft, lat = (e.cell(m, attacks, eps=e.lat_eps, where="latent") for m in ("ssft", "lat"))
    levels = f"eps {e.lat_eps:g}, worse of both attacks per prompt: ASR SSFT {_percent(rate(ssft))}"
    return contrast(ssft, lat), f"{levels}, LAT {_percent(rate(lat))}"


def prefill(e: Evidence) -> Effect:
    """ASR under prefilling, SSFT minus LAT."""
    ssft, lat = (e.cell(m, "prefill") for m in ("ssft", "lat"))
    return contrast(ssft, lat), f"ASR SSFT {_percent(rate(ssft))}, LAT {_percent(rate(lat))}"


def kl_keeps_utility(e: Evidence) -> Effect:
    """Exact harmless answers, LAT minus its variant without KL."""
    without = e.cell("lat[no-kl]", prompts="harmless")
    kept = e.cell("lat", prompts="harmless", seeds=sorted(set(without["seed"])))
    return (
        contrast(kept, without),
        f"harmless exact with {_percent(rate(kept))}, without {_percent(rate(without))}",
    )


def eps_too_large(e: Evidence) -> Effect:
    """Exact harmless answers in all encodings, LAT minus the variant with the largest radius."""
    label, eps = list(e.eps_variants().items())[-1]
    if eps <= e.lat_eps:
        raise MissingError("no sweep variant with a larger eps")
    sets = {"prompts": ("harmless", "scary"), "encoding": e.profile.evaluation.encodings}
    large = e.cell(label, **sets)
    lat = e.cell("lat", seeds=sorted(set(large["seed"])), **sets)
    refused = f"refused {_percent(rate(lat, 'refused'))} and {_percent(rate(large, 'refused'))}"
    levels = (
        f"harmless exact, plain and encoded: {_percent(rate(lat))} at eps {e.lat_eps:g},"
        f" {_percent(rate(large))}"
    )
    return contrast(lat, large, same=("encoding",)), f"{levels} at {eps:g}; {refused}"


def eps_too_small(e: Evidence) -> Effect:
    """ASR at LAT's radius, the variant with the smallest radius minus LAT."""
    label, eps = next(iter(e.eps_variants().items()))
    if eps >= e.lat_eps:
        raise MissingError("no sweep variant with a smaller eps")
    small = e.cell(label, "pgd", eps=e.lat_eps, where="latent")
    lat = e.cell("lat", "pgd", eps=e.lat_eps, where="latent", seeds=sorted(set(small["seed"])))
    levels = f"attacked at eps {e.lat_eps:g}: ASR {_percent(rate(small))} trained at {eps:g}"
    return contrast(small, lat), f"{levels}, {_percent(rate(lat))} trained at {e.lat_eps:g}"


def spikes_are_wins(e: Evidence) -> Effect:
    """Excess share of attacks won, spike steps of LAT's training minus the other attacked steps."""
    steps = spike_steps(e.metrics, ("lat",))
    if not steps["spike"].any():
        raise MissingError(f"no spike in {len(steps)} steps under full attack")
    blocks = steps["seed"].astype(str) + "/" + steps["block"].astype(str)
    interval = difference_interval(steps["won_excess"], steps["spike"], blocks, steps["seed"])
    part = steps.loc[steps["spike"], "attack_part"].median()
    rank = (
        spearmanr(steps["excess"], steps["won_excess"]).statistic
        if steps["won_excess"].any()
        else math.nan
    )
    note = (
        f"{int(steps['spike'].sum())} spikes in {len(steps)} steps; attacks won in"
        f" {steps['attack_won'].mean():.1%}"
    )
    return (
        interval,
        f"{note}; {part:.0%} of a spike is toward and away loss; rank correlation {rank:.2f}",
    )


def leet_gap(e: Evidence) -> Effect:
    """LAT's ASR in leetspeak minus direct, over the prompts whose harmless twin the base understood
    in leetspeak.
    """
    given = GIVEN[3]
    leet, direct, ssft = (
        counted(e, "lat", "leet", given),
        e.cell("lat"),
        counted(e, "ssft", "leet", given),
    )
    if leet.empty:
        raise MissingError("no leetspeak prompt whose harmless twin the base understood")
    own = counted(e, "lat", "leet", GIVEN[2])
    shows = (
        f"{_percent(rate(own))} of the {len(own)} that it shows to have understood"
        if len(own)
        else "none understood"
    )
    levels = (
        f"prompts understood by the base: leet ASR {_percent(rate(leet))} ({shows}), direct"
        f" {_percent(rate(direct))}"
    )
    return contrast(leet, direct), f"{levels}; SSFT leet {_percent(rate(ssft))}"


def concentration(e: Evidence) -> Effect:
    """Share of the first two components at the fixed site, LAT minus the larger of SSFT and AT."""
    seeds = [s for s in e.profile.seeds if all((m, s) in e.variance for m in TRAINED)]
    if not seeds:
        raise MissingError("no explained variance of SSFT, AT and LAT: run notebook 04")

    def share(method: str, seed: int, name: str = "uncentred") -> float:
        table = e.variance[method, seed]
        return sum(table[name][table["sites"].index(str(table["fixed_site"]))][:2])

    def lead(values: dict) -> np.ndarray:
        return values["lat"] - np.maximum(values["ssft"], values["at"])

    estimates = [float(lead({m: share(m, s) for m in TRAINED})) for s in seeds]
    draws = [
        lead({m: np.asarray(e.variance[m, s]["uncentred_draws"]) for m in TRAINED}) for s in seeds
    ]
    table = e.variance["lat", seeds[0]]
    means = {
        k: [np.mean([share(m, s, k) for s in seeds]) for m in TRAINED]
        for k in ("uncentred", "centred")
    }
    texts = {k: " / ".join(f"{100 * v:.0f}" for v in values) for k, values in means.items()}
    note = (
        f"first two components, SSFT / AT / LAT: {texts['uncentred']} % at site"
        f" {table['fixed_site']}"
    )
    return (
        draws_interval(estimates, draws, table["pairs"], table["clusters"]),
        f"{note}; centred {texts['centred']} %",
    )


def _by_vector(e: Evidence, source: str, target: str | Sequence[str]) -> pd.DataFrame:
    return e.cell(target, f"ablate:{source}@best")


def _asr_and_refused(rows: pd.DataFrame) -> str:
    return f"{_percent(rate(rows))} ({_percent(rate(rows, 'refused'))})"


def strongest_vector(e: Evidence) -> Effect:
    """ASR over all targets, under LAT's vector minus under SSFT's, and minus under AT's."""
    under = {source: _by_vector(e, source, TRAINED) for source in TRAINED}
    found = [contrast(under["lat"], under[other], same=("method",)) for other in ("ssft", "at")]
    levels = ", ".join(
        f"{source.upper()} {_asr_and_refused(rows)}" for source, rows in under.items()
    )
    return weakest(found), f"ASR (refused) over the three targets by vector: {levels}"


def resists_reference(e: Evidence) -> Effect:
    """ASR under SSFT's vector, SSFT minus LAT."""
    on_ssft, on_lat = (_by_vector(e, "ssft", target) for target in ("ssft", "lat"))
    levels = (
        f"ASR (refused) under SSFT's vector: SSFT {_asr_and_refused(on_ssft)}, LAT"
        f" {_asr_and_refused(on_lat)}"
    )
    return contrast(on_ssft, on_lat), levels


def weaker_to_own(e: Evidence) -> Effect:
    """ASR under the own vector, LAT minus SSFT, and minus AT."""
    own = {method: _by_vector(e, method, method) for method in TRAINED}
    found = [contrast(own["lat"], own[other]) for other in ("ssft", "at")]
    levels = ", ".join(f"{method.upper()} {_asr_and_refused(rows)}" for method, rows in own.items())
    return weakest(found), f"ASR (refused) under its own vector: {levels}"
