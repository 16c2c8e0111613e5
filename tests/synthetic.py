"""Outcome tables and curves in which each effect is known, because it was written down and not
measured.
"""

import numpy as np
import pandas as pd

from latlib.config.profile import Profile
from latlib.evaluation.outcomes import COLUMNS, split_encoding
from latlib.report.evidence import Evidence

SEEDS, PROMPTS, CLUSTERS = (0, 1, 2), 200, 40
PROFILE = Profile(
    name="synthetic",
    description="none of it was measured",
    seeds=SEEDS,
    methods={
        "ssft": {"attack.steps": 0},
        "at": {"attack.sites": ["embedding"]},
        "lat": {"attack.eps": 0.05},
    },
    roles={"undefended": "ssft", "main": "lat"},
    evaluation={"eps": (0.05, 0.2), "strong_eps": (0.2,)},
    sweep={
        "variants": {
            "no-kl": {"defence.kl": 0.0},
            "small": {"attack.eps": 0.01},
            "large": {"attack.eps": 0.2},
        }
    },
)
ENCODINGS = PROFILE.evaluation.encodings


def cell(
    method,
    share,
    attack="none",
    encoding="plain",
    prompts="harmful",
    eps=np.nan,
    sites="",
    seeds=SEEDS,
    **columns,
):
    """Rows in which `share` of the prompts of every cluster comply, the others refuse. columns:
    variant, intervention, source, rule, site, draw.
    """
    at = np.arange(PROMPTS)
    complied = (at // CLUSTERS + 0.5) / (PROMPTS // CLUSTERS) < share
    outcomes = np.where(complied, "complied", "refused")
    row = {"method": method, "prompts": prompts, "attack": attack, "eps": eps, "sites": sites}
    return table_of(outcomes, True, at % CLUSTERS, seeds, **row, encoding=encoding, **columns)


def table_of(outcomes, understood, clusters, seeds, prompts, encoding, **columns):
    """An outcome table: a row for each outcome and seed."""
    request, reply = split_encoding(encoding)
    table = pd.DataFrame({"outcome": outcomes, "understood": understood, "cluster": clusters})
    table["understood"] = table["understood"].astype("boolean")
    unset = {"variant": "", "intervention": "none", "source": "", "rule": "", "site": ""}
    unset |= {"draw": pd.NA, "eps": np.nan, "sites": "", "radii": None, "norms": None}
    unset |= {"on_ball": np.nan, "found": pd.NA}
    row = unset | {"positions": "", "exact": pd.NA, "text": "", "attack": "none"} | columns
    table = table.assign(
        prompts=prompts,
        prompt_id=[f"{prompts}-{i}" for i in range(len(table))],
        pair_id=range(len(table)),
        encoding=request,
        reply_encoding=reply,
        eps_unit="" if np.isnan(row["eps"]) else PROFILE.train.attack.eps_mode,
        **row,
    )
    return pd.concat([table.assign(seed=seed)[list(COLUMNS)] for seed in seeds])


def ablated(target, share, source, rule="", **columns):
    """Rows of a target without a source's direction."""
    return cell(target, share, intervention="ablate", source=source, rule=rule, **columns)


def curve(spikes_win: float, seed: int) -> pd.DataFrame:
    """A training curve of 200 attacked steps in which every 9th jumps and the attack wins that much
    more there.
    """
    rng = np.random.default_rng(seed)
    jump = np.arange(200) % 9 == 4
    total = 1 + 0.01 * rng.normal(size=200) + jump
    won = np.clip(0.3 + 0.05 * rng.normal(size=200) + spikes_win * jump, 0, 1)
    return pd.DataFrame(
        {
            "step": range(1, 201),
            "total": total,
            "toward": total - 0.5,
            "attack_won": won,
            "eps_scale": 1.0,
        }
    )


def variance(share: float) -> dict:
    """An explained-variance table whose first two components hold `share` at the fixed site."""
    left_out = [share, *(share + 0.01 * np.linspace(-1, 1, 64))]
    shares = [[0.0] * 4, [share - 0.1, 0.1, 0.0, 0.0]]
    table = {"sites": ["embedding", "0"], "fixed_site": 0, "pairs": 256, "clusters": 64}
    for kind in ("uncentred", "centred"):
        table |= {kind: shares, f"{kind}_left_out": left_out, f"{kind}_ratio": [None, 1.5]}
        table |= {
            f"{kind}_{side}": [max(x + d, 0.0) for x in shares[1]]
            for side, d in (("low", -0.02), ("high", 0.02))
        }
    return table


VARIED = (
    "one-step",
    "pgd-strong",
    "pgd-restarts",
    "pgd-all-sites",
    "pgd-other-sites",
    "pgd-sign",
    "pgd-adamw",
)
TYPED = ("many-shot", "system", "suffix-random", "suffix-gcg")


def further_attacks(method: str, shares: dict[str, float] | None = None) -> list[pd.DataFrame]:
    """What the suites attacks, transfer and jailbreaks leave of a model on the first seed;
    `shares`: attack (or 'from <source>') -> ASR, where it is not that of a model that holds about
    half."""
    first = SEEDS[:1]
    usual = dict.fromkeys(VARIED, 0.6) | dict.fromkeys(TYPED, 0.2) | {"one-step": 0.2}
    usual |= shares or {}
    tables = [cell(method, usual[a], a, eps=0.2, sites="1,3", seeds=first) for a in VARIED]
    for source in PROFILE.methods:
        share = usual.get(f"from {source}", 0.4)
        tables.append(
            cell(method, share, "transfer", eps=0.2, sites="1,3", seeds=first, source=source)
        )
    for attack in TYPED:
        tables.append(cell(method, usual[attack], attack, seeds=first))
        tables.append(cell(method, 0.8, attack, prompts="twin", seeds=first))
    return tables


def attacked(
    changes: dict[tuple[str, str, float], float] | None = None, methods=("ssft", "at", "lat")
) -> Evidence:
    """A run whose attacks are sound: SSFT falls at LAT's eps, everything at the largest. `changes`:
    (method, attack, eps) -> ASR of a cell that is to be different."""
    changes, first = changes or {}, {"ssft": 0.8, "at": 0.2, "lat": 0.0}
    tables = [cell("base", changes.get(("base", "none", 0.0), 1.0))]
    for method in methods:
        shares = {
            ("pgd", 0.05): first[method],
            ("pgd-strong", 0.05): first[method],
            ("pgd", 0.2): 1.0,
        }
        shares |= {("noise", 0.05): 0.0, ("noise", 0.2): 0.0}
        for (attack, eps), share in shares.items():
            share = changes.get((method, attack, eps), share)
            tables.append(cell(method, share, attack, eps=eps, sites="1,3", on_ball=0.5))
        for eps in PROFILE.evaluation.embedding_eps:
            share = changes.get((method, "embedding", eps), {0.1: 0.4, 0.2: 0.6}[eps])
            tables.append(cell(method, share, "pgd", eps=eps, sites="embedding"))
        tables += [cell(method, 0.0), cell(method, 0.4, "prefill")]
        strong = {"pgd-strong": 1.0, "pgd-restarts": 1.0}
        tables += further_attacks(
            method,
            strong | {a: s for (m, a, eps), s in changes.items() if (m, eps) == (method, 0.2)},
        )
    return Evidence(PROFILE, pd.concat(tables, ignore_index=True))


def directions_removed(holds: bool) -> list[pd.DataFrame]:
    """Every target of `evidence` without every source's direction, and the controls."""
    tables = []
    for target in ("ssft", "at", "lat"):
        by_ssft = {"ssft": 0.6, "at": 0.2, "lat": 0.0}[target] if holds else 0.4
        tables.append(ablated(target, by_ssft, "ssft", "best"))
        tables.append(ablated(target, 0.2 if holds else 0.4, "at", "best"))
        tables.append(ablated(target, 1.0 if holds else 0.4, "lat", "best"))
        tables += [ablated(target, 0.0, control) for control in ("shuffled", "nothing")]
        for rule in ("fixed", "svd", "selected", "subspace", "learned", "learned-subspace"):
            sources = ("ssft", "at", "lat") if rule == "fixed" else (target,)
            tables += [ablated(target, 1.0 if holds else 0.4, source, rule) for source in sources]
        tables += [
            ablated(target, 0.5, target, "site-sweep", site=site)
            for site in ("0", "10", "2", "embedding")
        ]
        tables += [ablated(target, 0.0, "random", draw=k) for k in range(3)]
    return tables


def evidence(holds: bool) -> Evidence:
    """A run in which every testable claim holds, or in which each effect is nought."""
    good, bad = (1.0, 0.0) if holds else (0.4, 0.4)
    first = SEEDS[:1]
    tables = [
        cell("ssft", good, a, eps=e, sites="1,3")
        for a in ("pgd", "pgd-strong")
        for e in (0.05, 0.2)
    ]
    tables += [cell("lat", bad, a, eps=0.05, sites="1,3") for a in ("pgd", "pgd-strong")]
    tables += [
        cell("ssft", bad, "noise", eps=0.2, sites="1,3"),
        cell("ssft", good, "prefill"),
        cell("lat", bad, "prefill"),
    ]
    tables += [cell("lat", good, "pgd", eps=0.05, sites="1,3", seeds=first, variant="small")]
    tables += [
        cell("lat", bad),
        cell("lat", good, encoding="leet"),
        cell("ssft", 0.6, encoding="leet"),
    ]
    for encoding in ENCODINGS:
        for prompts in ("harmless", "scary"):
            tables.append(cell("lat", good, encoding=encoding, prompts=prompts))
            tables += [
                cell("lat", bad, "none", encoding, prompts, seeds=first, variant=v)
                for v in ("no-kl", "large")
            ]
    tables += directions_removed(holds)
    for method in ("base", "ssft", "at"):  # nothing is claimed of these cells; figures show them
        for encoding in ENCODINGS:
            if (method, encoding) != ("ssft", "leet"):
                tables.append(cell(method, 0.2, encoding=encoding))
            tables.append(cell(method, 0.8, encoding=encoding, prompts="twin"))
    tables += [cell("lat", 0.2, encoding=e) for e in ("rot13", "reverse")]
    tables += [cell("lat", 0.8, encoding=e, prompts="twin") for e in ENCODINGS]
    tables += [
        cell("lat", 0.4, "pgd", eps=0.2, sites="1,3"),
        cell("lat", 0.0, "pgd", eps=0.05, sites="1,3", variant="large"),
    ]
    for encoding in ENCODINGS:
        tables += [
            cell("lat", 0.8, "none", encoding, p, seeds=first, variant="small")
            for p in ("harmless", "scary")
        ]
    for method in ("ssft", "at", "lat"):
        further = further_attacks(method)
        tables += (
            further
            if method != "ssft"
            else [t for t in further if "pgd-strong" not in set(t["attack"])]
        )

    metrics = {f"lat-seed{s}": curve(0.4 if holds else 0.0, s) for s in SEEDS}
    shares = {"ssft": 0.5, "at": 0.45, "lat": 0.75 if holds else 0.5}
    variances = {m: {str(s): variance(share) for s in SEEDS} for m, share in shares.items()}
    return Evidence(PROFILE, pd.concat(tables, ignore_index=True), metrics, variances)


def known(robust: float, answered: float) -> Evidence:
    """LAT and its variants: the attack wins on 1 - robust of the harmful prompts, `answered` of the
    harmless are.
    """
    first = PROFILE.seeds[:1]
    tables = []
    for variant in ("", "small", "large"):
        model = {"seeds": first, "variant": variant}
        tables.append(cell("lat", 1 - robust, "pgd", eps=0.05, sites="1,3", **model))
        for encoding in PROFILE.evaluation.encodings:
            tables += [
                cell("lat", answered, encoding=encoding, prompts=p, **model)
                for p in ("harmless", "scary")
            ]
    return Evidence(PROFILE, pd.concat(tables, ignore_index=True))
