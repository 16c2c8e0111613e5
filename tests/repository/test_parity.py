"""Ours against the authors' code, where a checkout of it is at hand: LATLIB_AUTHORS=PATH."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import parity

ROOT = Path(__file__).resolve().parents[2]
HERE = os.environ.get("LATLIB_AUTHORS", "")


def test_another_folder_is_refused_by_name(tmp_path):
    with pytest.raises(SystemExit, match="no latent_at/lat_methods.py there") as error:
        parity.main(["--authors", str(tmp_path)])
    assert str(tmp_path) in str(error.value)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if not HERE:
        pytest.skip("set LATLIB_AUTHORS to a checkout of aengusl/latent-adversarial-training")
    path = tmp_path_factory.mktemp("parity") / "parity.json"
    return parity.main(["--authors", HERE, "--json", str(path)])


def test_attack_losses_and_training_equal_the_authors(found):
    for name, comparisons in found["agree"].items():
        for comparison in comparisons:
            assert comparison["difference"] < 1e-11, (name, comparison)
            assert comparison["ours"] > 0, name


def test_every_deviation_is_one(found):
    for name, comparisons in found["differ on purpose"].items():
        assert any(c["difference"] > 1e-9 for c in comparisons), name


def test_rows_in_the_authors_form_keep_every_token():
    rows = parity.rows(parity.UNEVEN, 3, 2)
    batch = parity.as_theirs(rows)
    for i, row in enumerate(rows):
        assert tuple(batch["prompt_mask"][i].nonzero().squeeze(1).tolist()) == tuple(
            range(len(row.prompt))
        )
        for name, completion in zip(("adv", "def"), row.completions, strict=True):
            marked = batch[f"{name}_tokens"][i][batch[f"{name}_labels_mask"][i]]
            assert tuple(marked.tolist()) == tuple(completion)


def test_the_page_is_made_from_the_results():
    results = json.loads((ROOT / "benchmarks/results/parity.json").read_text())
    assert (ROOT / "docs/parity.md").read_text() == parity.page(results)
