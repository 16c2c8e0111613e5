"""A run with every role, in which each claim of the ledger holds, or in which none does."""

import pandas as pd
from synthetic import SEEDS, ablated, cell, curve, variance

from latlib.config.profile import Profile
from latlib.report.evidence import Evidence

IDLE = {"attack.steps": 0}
UNTARGETED = {"attack.targeted": False, "defence.away": 0.0}
PROFILE = Profile(
    name="ledger",
    description="none of it was measured",
    seeds=SEEDS,
    methods={
        "ssft": IDLE | {"defence.away": 0.0},
        "rt": IDLE,
        "zero": {"attack.eps": 1e-9},
        "at": {"attack.sites": ["embedding"], "attack.eps": 0.1},
        "lat": {},
        "lat-u": UNTARGETED | {"attack.sites": [1]},
        "at-u": UNTARGETED | {"attack.sites": ["embedding"]},
    },
    roles={
        "undefended": "ssft",
        "control": "rt",
        "no_radius": "zero",
        "main": "lat",
        "rival": "at",
        "untargeted": "lat-u",
        "untargeted_rival": "at-u",
    },
    train={"attack": {"eps": 0.05}},
    evaluation={"eps": (0.05, 0.2), "strong_eps": (0.2,), "embedding_eps": (0.1,)},
    sweep={
        "seeds": "all",
        "variants": {
            "no-kl": {"defence.kl": 0.0},
            "small": {"attack.eps": 0.01},
            "large": {"attack.eps": 0.2},
        },
    },
)
ENCODINGS = PROFILE.evaluation.encodings
ABBAS = ("ssft", "at-u", "lat-u")


def _share(holds: bool, share: float) -> float:
    """What a cell has in a run that holds; in the other all cells are alike."""
    return share if holds else 0.6


def latent(holds: bool) -> list[pd.DataFrame]:
    shares = {"ssft": 1.0, "rt": 0.6, "zero": 0.6, "at": 0.3, "lat": 0.0}
    tables = []
    for method, share in shares.items():
        for attack in ("pgd", "pgd-strong"):
            tables.append(cell(method, _share(holds, share), attack, eps=0.05, sites="1,3"))
    for attack, share in {"pgd": 1.0, "noise": 0.0}.items():
        share = share if holds else 0.2  # noise leaves room for what is claimed
        tables.append(cell("ssft", share, attack, eps=0.2, sites="1,3"))
    for method, share in {"lat": 0.8, "at": 0.2}.items():
        share = _share(holds, share)
        tables.append(cell(method, share, "pgd-other-sites", eps=0.2, sites="0,2"))
        tables.append(cell(method, share, "pgd", eps=0.1, sites="embedding"))
    small = {"eps": 0.05, "sites": "1,3", "variant": "small"}
    return [*tables, cell("lat", _share(holds, 1.0), "pgd", **small)]


def typed(holds: bool) -> list[pd.DataFrame]:
    tables = []
    for method, share in {"ssft": 1.0, "rt": 0.5, "lat": 0.0, "at": 0.0}.items():
        tables.append(cell(method, _share(holds, share), "prefill"))
    for method, share in {"lat": 0.4, "at": 0.0}.items():
        tables.append(cell(method, _share(holds, share), "system"))
    for method in ("ssft", "lat", "at"):
        tables.append(cell(method, _share(holds, 0.0)))
    return tables


def encoded(holds: bool) -> list[pd.DataFrame]:
    tables = []
    for encoding in ENCODINGS[1:]:
        for method, share in {"ssft": 0.8, "lat": 0.6, "at": 0.2}.items():
            tables.append(cell(method, _share(holds, share), encoding=encoding))
        tables.append(cell("base", 1.0, encoding=encoding, prompts="twin"))
    return tables


def harmless(holds: bool) -> list[pd.DataFrame]:
    """Fails where the main method answers forty points less than its control."""
    plain = {"rt": 1.0, "lat": 1.0, "at": 0.4} if holds else {"rt": 0.7, "lat": 0.3, "at": 0.3}
    coded = {"lat": 0.8, "at": 0.2} if holds else {"lat": 0.3, "at": 0.3}
    tables = []
    for prompts in ("harmless", "scary"):
        for method, share in plain.items():
            tables.append(cell(method, share, prompts=prompts))
        for variant in ("no-kl", "large"):
            share = 0.2 if holds else 0.3
            tables.append(cell("lat", share, prompts=prompts, variant=variant))
    for encoding in ENCODINGS[1:]:
        for method, share in coded.items():
            tables.append(cell(method, share, encoding=encoding, prompts="harmless"))
        large = {"encoding": encoding, "prompts": "harmless", "variant": "large"}
        tables.append(cell("lat", 0.2 if holds else 0.3, **large))
    return tables


def removed(holds: bool) -> list[pd.DataFrame]:
    tables = []
    for target, by_reference in {"ssft": 0.6, "at-u": 0.2, "lat-u": 0.0}.items():
        tables.append(ablated(target, 0.0, "nothing"))  # all refuse
        shares = {"ssft": by_reference, "at-u": 0.2, "lat-u": 0.9}
        for source, share in shares.items():
            tables.append(ablated(target, _share(holds, share), source, "best"))
    return tables


def ledger(holds: bool) -> Evidence:
    """Every claim that can be tested holds, or each effect is nought (of what is only bounded,
    forty points)."""
    parts = (latent, typed, encoded, harmless, removed)
    tables = [table for part in parts for table in part(holds)]
    metrics = {f"lat-seed{seed}": curve(0.4 if holds else 0.0, seed) for seed in SEEDS}
    firsts = {"ssft": 0.5, "at-u": 0.45, "lat-u": 0.75} if holds else dict.fromkeys(ABBAS, 0.5)
    shares = {m: {str(seed): variance(share) for seed in SEEDS} for m, share in firsts.items()}
    return Evidence(PROFILE, pd.concat(tables, ignore_index=True), metrics, shares)
