"""The claims of two runs beside each other."""

from dataclasses import replace

import pytest

from latlib.report import side_by_side
from latlib.report.stats import Interval
from latlib.report.verdicts import Claim, Verdict

WHOLE = Claim("a", "a paper", "Water is wet.", "a test")


def of(verdict, estimate=0.2, **more):
    interval = Interval(estimate, estimate - 0.1, estimate + 0.1)
    return replace(WHOLE, verdict=verdict, interval=interval, **more)


def test_what_both_decide_otherwise_is_named():
    runs = {"here": [of(Verdict.REPRODUCED)], "there": [of(Verdict.NOT_REPRODUCED, -0.3)]}
    table, said = side_by_side.claims_beside(runs).split("\n\nDecided in both, and otherwise:\n\n")
    assert said == "* Water is wet.\n"
    assert "| Claim | here | there |" in table
    assert "+20.0 [+10.0, +30.0]<br>**reproduced**" in table
    assert "-30.0 [-40.0, -20.0]<br>**not reproduced**" in table


@pytest.mark.parametrize("other", [Verdict.REPRODUCED, *side_by_side.OPEN])
def test_what_is_open_in_one_run_is_decided_otherwise_in_none(other):
    table = side_by_side.claims_beside(
        {"a": [of(Verdict.REPRODUCED)], "b": [of(other, why="dark")]}
    )
    assert table.endswith("none is decided otherwise.") and "<br>dark" in table


def test_a_claim_that_one_run_did_not_measure_is_open_there():
    nothing = replace(WHOLE, verdict=Verdict.UNDECIDABLE, why="not measured: no model")
    table = side_by_side.claims_beside({"a": [of(Verdict.REPRODUCED)], "b": [nothing]})
    assert "**reproduced** | not measured |" in table and "no model" not in table


def test_a_claim_that_neither_measured_is_left_out():
    nothing = replace(WHOLE, verdict=Verdict.UNDECIDABLE, why="not measured: no model")
    measured = replace(of(Verdict.REPRODUCED), id="b", statement="Fire is hot.")
    runs = {"a": [nothing, measured], "b": [nothing, measured]}
    table = side_by_side.claims_beside(runs)
    assert "Fire" in table and "Water" not in table


def test_the_table_of_two_published_runs_stands_between_its_markers(root, tmp_path, capsys):
    folders = [root / "results" / name for name in ("tiny", "tiny-many")]
    side_by_side.main(list(map(str, folders)))
    printed = capsys.readouterr().out.strip()
    assert "results/tiny`, points" in printed and "results/tiny-many`, points" in printed
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- beside:begin -->\nold\n<!-- beside:end -->\nafter\n")
    side_by_side.main([*map(str, folders), "--readme", str(readme)])
    text = readme.read_text()
    assert printed in text and "old" not in text and text.endswith("after\n")
    readme.write_text("no markers")
    for bad in ([*map(str, folders), "--readme", str(readme)], [str(folders[0]), str(tmp_path)]):
        with pytest.raises(SystemExit, match="error: "):
            side_by_side.main(bad)
    assert readme.read_text() == "no markers"
