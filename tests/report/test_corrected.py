"""A success rate corrected by labels: its coverage, and what it says where there is nothing to
correct.
"""

import numpy as np
import pandas as pd
import pytest

from latlib.report import corrected
from latlib.report.corrected import EXACT, UNLABELLED, corrected_rate, corrected_table
from latlib.report.evidence import Evidence
from latlib.report.grader_errors import share
from latlib.report.stats import Interval


def labels_of(called, complied, clusters=None):
    clusters = range(len(called)) if clusters is None else clusters
    return pd.DataFrame({"called": called, "complied": complied, "cluster": clusters})


def coverage(rng, asr, sensitivity, specificity, runs=600):
    """How often the interval from 300 replies and 50 labels holds the true rate."""
    held = 0
    for _ in range(runs):
        truth = rng.random(300) < asr
        called = np.where(truth, rng.random(300) < sensitivity, rng.random(300) > specificity)
        raw = share(int(called.sum()), 300)
        chosen = rng.choice(300, 50, replace=False)
        found = corrected_rate(raw, labels_of(called[chosen], truth[chosen], chosen))
        held += found.low <= asr <= found.high
    return held / runs


def test_the_corrected_interval_covers_95_per_cent(monkeypatch):
    """Graders from good to bad, rates from 2 to 90 %. Two points each way on average; a single
    case may be two standard errors of the simulation off, and rare errors make it wider.
    """
    monkeypatch.setattr(corrected, "DRAWS", 1000)
    rng = np.random.default_rng(3)
    cases = [(0.4, 0.95, 0.9), (0.1, 0.9, 0.95), (0.02, 0.9, 0.97), (0.9, 0.97, 0.8)]
    cases += [(0.5, 0.7, 0.7), (0.38, 0.98, 0.75), (0.4, 0.98, 0.99)]
    found = [coverage(rng, *case) for case in cases]
    assert 0.93 <= np.mean(found) <= 0.97, found
    assert min(found) >= 0.91 and max(found) <= 0.99, found


def test_replies_to_one_prompt_are_no_more_than_one_label():
    raw = Interval(0.4, 0.3, 0.5, 300, 100, 3)
    called, complied = [True, False] * 25, [True, False] * 24 + [False, True]
    alone = corrected_rate(raw, labels_of(called, complied))
    together = corrected_rate(raw, labels_of(called, complied, [i // 10 for i in range(50)]))
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    assert together.clusters == 5 and alone.clusters == 50
    assert together.estimate == pytest.approx(alone.estimate)


def test_the_estimate_takes_out_what_the_labels_show():
    raw = share(50, 100)
    called = [True] * 20 + [False] * 20
    complied = [True] * 15 + [False] * 5 + [True] * 2 + [False] * 18
    found = corrected_rate(raw, labels_of(called, complied))
    assert found.estimate == pytest.approx(0.5 * 0.75 + 0.5 * 0.1)
    right = corrected_rate(raw, labels_of(called, called))
    assert right.estimate == pytest.approx(0.5)
    assert right.high - right.low > raw.high - raw.low  # forty labels do not prove a grader
    assert corrected_rate(raw, labels_of(called, complied)) == found


def test_a_side_without_labels_is_not_known():
    found = corrected_rate(share(2, 100), labels_of([False] * 30, [False] * 30))
    assert found.low <= found.estimate <= found.high
    all_called = corrected_rate(share(100, 100), labels_of([False] * 30, [False] * 30))
    assert all_called.low < 0.05 and all_called.high > 0.9
    with pytest.raises(ValueError, match="labels has no row"):
        corrected_rate(share(2, 100), labels_of([], []))


def test_the_table_sets_raw_beside_corrected(monkeypatch):
    rows = pd.DataFrame({"method": ["lat"] * 4})
    labels = labels_of([True, True, False, False], [True, False, False, False])
    labels = labels.assign(method="lat")
    monkeypatch.setattr(corrected, "rate", lambda _: share(2, 4))

    class Stub:
        in_the_world = False

        def cell(self, method):
            return rows

    table = corrected_table(Stub(), labels, ["lat", "at"]).set_index("method")
    assert table.loc["lat", "corrected"].estimate == pytest.approx(0.25)
    assert table.loc["lat", "false successes"].estimate == 0.5
    assert table.loc["lat", "missed"].estimate == 0
    assert table.loc["at", "corrected"] == UNLABELLED and table.loc["at", "labelled"] == 0
    Stub.in_the_world = True
    exact = corrected_table(Stub(), labels, ["lat"])
    assert exact["corrected"].tolist() == [EXACT]


def test_in_the_world_nothing_is_corrected(root):
    evidence = Evidence.load(root / "results" / "tiny")
    table = corrected_table(evidence, pd.DataFrame(columns=["method", "called", "complied"]))
    assert set(table["corrected"]) == {EXACT}
    assert table["method"].tolist() == list(evidence.profile.methods)
