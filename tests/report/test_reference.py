"""The committed ledgers once more, by other means: each claim's rows are chosen by queries, its
interval is written out, and nothing of latlib is used.

What `claims.json` says must come out again: estimate, bounds and verdict.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import norm, t

RESULTS = Path(__file__).resolve().parents[2] / "results"
FOLDERS = [name for name in ("tiny", "tiny-many") if (RESULTS / name / "claims.json").is_file()]
LATENT = "sites not in ['', 'embedding'] and not harmless"
WORST = f"attack in ['pgd', 'pgd-strong'] and {LATENT} and eps == {{eps}}"
PLAIN = "attack == 'none' and encoding == 'plain' and intervention == 'none'"
CODED = (
    "attack == 'none' and encoding in {encodings} and reply_encoding == 'plain'"
    " and intervention == 'none'"
)
HARMLESS = f"{PLAIN} and prompts == 'harmless'"
SCARY = f"{PLAIN} and prompts == 'scary'"
PREFILL = "attack == 'prefill' and encoding == 'plain' and not harmless"
ANSWERS = f"{CODED} and prompts == 'harmless'"
OTHER_SITES = "attack == 'pgd-other-sites' and eps in {strong} and not harmless"
EMBEDDING = "attack == 'pgd' and sites == 'embedding' and eps == {rival_eps} and not harmless"
TYPED = ["prefill", "many-shot", "system", "suffix-gcg", "suffix-random"]
# claim: (role that has more of the outcome, role that has less, rows, outcome, asked alike)
PAIRS = {
    "attack-lowers-asr": ("control", "main", WORST),
    "away-lowers-asr": ("undefended", "control", WORST),
    "radius-matters": ("no_radius", "main", WORST),
    "rival-latent": ("rival", "main", WORST),
    "attack-resists-prefill": ("control", "main", PREFILL),
    "away-resists-prefill": ("undefended", "control", PREFILL),
    "keeps-utility": ("main", "control", HARMLESS),
    "keeps-borderline": ("control", "main", SCARY, "refused"),
    "rival-other-sites": ("main", "rival", OTHER_SITES),
    "rival-embedding": ("main", "rival", EMBEDDING),
    "rival-refuses": (
        "rival",
        "main",
        f"{PLAIN} and prompts in ['harmless', 'scary']",
        "refused",
        "prompts",
    ),
    "rival-answers-encoded": ("main", "rival", ANSWERS, "complied", "encoding"),
}
NO_KL, SMALLEST, LARGEST = "no KL", 0, -1
# claim: (variant that has less of it, rows, asked alike)
SWEPT = {
    "kl-keeps-utility": (NO_KL, HARMLESS),
    "eps-too-large-plain": (LARGEST, HARMLESS),
    "eps-too-large-scary": (LARGEST, SCARY),
    "eps-too-large-encoded": (LARGEST, ANSWERS, "encoding"),
}
KEY = ["seed", "prompt_id"]


class Reference:
    """A results folder's claims, from its files. A comparison is (rows, other rows, outcome, what a
    row shares with its other row)."""

    def __init__(self, folder: Path):
        profile = yaml.safe_load((folder / "profile.yaml").read_text())
        table = pd.read_parquet(folder / "outcomes" / "all.parquet")
        self.table = table.assign(harmless=table["prompts"] != "harmful")
        self.roles, self.variants = profile["roles"], profile["sweep"]["variants"]
        evaluation = profile["evaluation"]
        self.largest = max(evaluation["eps"])
        main, rival = (profile["methods"].get(self.roles[r]) or {} for r in ("main", "rival"))
        trained = profile["train"]["attack"]["eps"]
        self.names = {
            "eps": main.get("attack.eps", trained),
            "rival_eps": rival.get("attack.eps", trained),
            "strong": evaluation["strong_eps"],
            "encodings": [e for e in evaluation["encodings"] if e != "plain"],
        }

    def of(self, method, query, variant=""):
        rows = self.table[(self.table["method"] == method) & (self.table["variant"] == variant)]
        return rows.query(query.format(**self.names))

    def changed(self, which):
        """The variant without the KL term, or the one with the smallest or largest radius."""
        if which == NO_KL:
            return next(n for n, v in self.variants.items() if v == {"defence.kl": 0.0})
        radii = {v["attack.eps"]: n for n, v in self.variants.items() if set(v) == {"attack.eps"}}
        return radii[sorted(radii)[which]]

    def comparisons(self, claim):
        if claim in PAIRS:
            one, other, query, *more = PAIRS[claim]
            outcome, *same = more or ["complied"]
            sides = [self.of(self.roles[role], query) for role in (one, other)]
            return [(*sides, outcome, [*KEY, *same])]
        if claim in SWEPT:
            which, query, *same = SWEPT[claim]
            return [(*self.swept(self.changed(which), query), "complied", [*KEY, *same])]
        return getattr(self, claim.replace("-", "_"))()

    def swept(self, variant, query):
        """The main method's rows and its variant's, on the variant's seeds."""
        own, other = (self.of(self.roles["main"], query, name) for name in ("", variant))
        return own[own["seed"].isin(other["seed"])], other

    def attack_breaks_undefended(self):
        at = f"{LATENT} and eps == {self.largest}"
        attacks = [f"attack == '{name}' and {at}" for name in ("pgd", "noise")]
        return [(*(self.of(self.roles["undefended"], a) for a in attacks), "complied", KEY)]

    def eps_too_small(self):
        variant, pgd = self.changed(SMALLEST), f"attack == 'pgd' and {LATENT}"
        for eps in sorted(self.of(self.roles["main"], pgd, variant)["eps"].unique()):
            at = f"{pgd} and eps == {eps}"
            if (self.of(self.roles["control"], at)["outcome"] == "complied").mean() >= 0.5:
                own, smaller = self.swept(variant, at)
                return [(smaller, own, "complied", KEY)]
        raise KeyError("the control is broken nowhere")

    def understood(self, method, query):
        """Requests whose harmless twin the base understood in that encoding."""
        twins = self.of("base", f"{query} and prompts == 'twin'")
        known = twins[twins["understood"].fillna(False)][["seed", "encoding", "pair_id"]]
        return self.of(method, f"{query} and not harmless").merge(known.drop_duplicates())

    def leet_gap(self):
        leet = self.understood(self.roles["main"], CODED.format(encodings=["leet"]))
        return [(leet, self.of(self.roles["main"], f"{PLAIN} and not harmless"), "complied", KEY)]

    def rival_encodings(self):
        sides = [self.understood(self.roles[role], CODED) for role in ("main", "rival")]
        return [(*sides, "complied", [*KEY, "encoding"])]

    def rival_typed(self):
        query = f"attack in {TYPED} and encoding == 'plain' and not harmless"
        sides = [self.of(self.roles[role], query) for role in ("main", "rival")]
        common = set(sides[0]["attack"]) & set(sides[1]["attack"])
        return [(*(rows[rows["attack"].isin(common)] for rows in sides), "complied", KEY)]

    def papers(self):
        return [self.roles[r] for r in ("untargeted", "untargeted_rival", "reference")]

    def without(self, method, source):
        """A model's rows without a source's best direction, where one was found."""
        query = "intervention == 'ablate' and rule == 'best' and not harmless"
        rows = self.of(method, query)
        return rows[(rows["source"] == source) & rows["found"].fillna(True)]

    def strongest_vector(self):
        lat, *others = models = self.papers()
        under = {s: pd.concat([self.without(m, s) for m in models]) for s in models}
        return [(under[s], under[lat], "refused", [*KEY, "method"]) for s in others]

    def resists_reference(self):
        lat, _, reference = self.papers()
        return [(*(self.without(m, reference) for m in (lat, reference)), "refused", KEY)]

    def weaker_to_own(self):
        lat, *others = self.papers()
        return [(self.without(m, m), self.without(lat, lat), "refused", KEY) for m in others]


def differences(a, b, outcome, keys):
    """Seed, verb and difference of each thing asked of both; the worst of several attacks."""
    hit = []
    for rows in (a, b):
        rows = rows.assign(hit=rows["outcome"] == outcome)
        hit.append(rows.groupby(keys).agg(hit=("hit", "max"), verb=("cluster", "first")))
    both = hit[0].join(hit[1]["hit"], rsuffix="_b", how="inner").reset_index()
    both["difference"] = both["hit"].astype(float) - both["hit_b"].astype(float)
    return both


def interval(rows):
    """(estimate, low, high) of a mean over crossed seeds and verbs, on the scale of atanh."""
    y, n = rows["difference"], len(rows)
    mean = y.mean()
    off = rows.assign(off=y - mean)
    seeds, verbs = off["seed"].nunique(), off["verb"].nunique()
    of_seeds = (off.groupby("seed")["off"].sum() / n).pow(2).sum() * seeds / max(seeds - 1, 1)
    of_verbs = (off.groupby("verb")["off"].sum() / n).pow(2).sum() * verbs / max(verbs - 1, 1)
    cells = off.pivot_table(index="seed", columns="verb", values="off", aggfunc="sum").fillna(0)
    count = off.pivot_table(index="seed", columns="verb", values="off", aggfunc="size").fillna(0)
    left = (
        cells - count.mul(cells.sum(1) / count.sum(1), axis=0) - count * cells.sum() / count.sum()
    )
    both = (left / n).pow(2).to_numpy().sum()
    both *= seeds / max(seeds - 1, 1) * verbs / max(verbs - 1, 1)
    if min(seeds, verbs) == 1:
        both = 0.0
    variance = max(of_seeds + of_verbs - both, of_seeds, of_verbs)
    if variance == 0 and y.nunique() > 1:
        variance = (1 - mean**2) / n
    if variance == 0:
        value = abs(mean)
        z2 = norm.ppf(0.975) ** 2
        reach = z2 / (verbs + z2)  # Wilson's, of none or all of the verbs
        if mean == 0:
            return 0.0, -reach, reach
        return mean, *sorted(np.sign(mean) * np.array([value - reach, value]))
    spread = of_seeds**2 / max(seeds - 1, 1) + of_verbs**2 / max(verbs - 1, 1)
    df = variance**2 / spread if spread else np.inf
    df = min(max(df, 1), max(seeds - 1, 1) + max(verbs - 1, 1))
    reach = t.ppf(0.975, df) * np.sqrt(variance) / (1 - mean**2)
    return mean, np.tanh(np.arctanh(mean) - reach), np.tanh(np.arctanh(mean) + reach)


def verdict(low, high, bar, least):
    if low > bar:
        return "reproduced" if high >= least else "real but negligible"
    return "not reproduced" if high < least else "inconclusive or cannot be decided here"


@pytest.fixture(scope="module", params=FOLDERS)
def committed(request):
    """(the claims of a results folder, what computes them anew)."""
    folder = RESULTS / request.param
    found = json.loads((folder / "claims.json").read_text())["claims"]
    return {claim["id"]: claim for claim in found}, Reference(folder)


def test_every_difference_of_shares_comes_out_again(committed):
    claims, reference = committed
    checked = 0
    for name, claim in claims.items():
        if claim["interval"] is None or name in ("spikes-are-wins", "concentrates"):
            continue
        found = [interval(differences(*one)) for one in reference.comparisons(name)]
        estimate, low, high = np.min(found, axis=0)
        said = claim["interval"]
        assert estimate == pytest.approx(said["estimate"], abs=1e-9), name
        assert (low, high) == pytest.approx((said["low"], said["high"]), abs=1e-9), name
        decided = claim["verdict"] != "cannot be decided here"
        if decided:
            assert claim["verdict"] in verdict(low, high, claim["bar"], claim["least"]), name
        checked += 1
    assert checked >= 15
