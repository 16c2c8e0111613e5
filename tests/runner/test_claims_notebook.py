"""Notebook 09 of a run that was killed behind its first seed: it measures what is missing of the
others, and no attack again that notebook 06 has measured."""

import pandas as pd
import pytest

from latlib import Run
from latlib.runner import pipeline


@pytest.mark.slow
def test_it_goes_on_with_further_seeds_and_repeats_no_attack(tmp_path):
    command = ["--profile", "smoke", "--only", "09", "--out", str(tmp_path)]
    assert pipeline.main(command) == 0
    folder = tmp_path / "results" / "outcomes"
    files = sorted(folder.glob("*-seed1.parquet"))
    first = {file.name: pd.read_parquet(file) for file in files}
    for file in files:
        file.unlink()

    Run("smoke", tmp_path).measure([(("lat", 1), "robustness"), (("lat", 1), "attacks")])
    assert pipeline.main(command) == 0

    assert not (folder / "claimed-lat-seed1.parquet").exists()
    del first["claimed-lat-seed1.parquet"]
    assert {kind.split("-")[0] for kind in first} >= {"audit", "claimed", "ablation", "jailbreaks"}
    for name, table in first.items():
        pd.testing.assert_frame_equal(pd.read_parquet(folder / name), table)
