"""Two runs side by side: what differs stands first, and nothing of anybody's is written over."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup
from hostile import NAME, TEXTS, acting
from ledger_evidence import PROFILE, ledger
from synthetic import cell

from latlib.config.profile import Profile
from latlib.io import manifest
from latlib.io.files import write_json
from latlib.report import claims
from latlib.report.compare import (
    EFFECT,
    ONE_SIDED,
    SAME,
    VERDICT,
    Comparison,
    Side,
    headline,
    main,
    page,
    points_apart,
    save_page,
    short_text,
)
from latlib.report.evidence import Evidence

TESTED = {claim.id for claim in claims.CLAIMS if claim.effect}
ALL = {claim.id for claim in claims.CLAIMS}
UNATTACKED = ("LAT-U", "AT-U")


def changed(e: Evidence, *tables, outcomes=None, **settings) -> Evidence:
    """The same run with other settings, other outcomes, and further rows."""
    rows = e.outcomes if outcomes is None else outcomes
    profile = Profile.model_validate(e.profile.model_dump(mode="json") | settings)
    return Evidence(profile, pd.concat([rows, *tables]), e.metrics, e.variance)


def side(letter, evidence, folder="runs/x"):
    return Side(letter, Path(folder), evidence)


def saved(e: Evidence, folder: Path) -> Path:
    """Published results of a run."""
    for name in ("outcomes", "metrics"):
        (folder / name).mkdir(parents=True)
    (folder / "profile.yaml").write_text(yaml.safe_dump(e.profile.model_dump(mode="json")))
    e.outcomes.to_parquet(folder / "outcomes" / "all.parquet")
    write_json({"models": e.variance}, folder / "refusal_svd.json")
    for name, curve in e.metrics.items():
        curve.to_json(folder / "metrics" / f"{name}.jsonl", orient="records", lines=True)
    write_json({"claims": []}, folder / "claims.json")
    return folder


def ids(found: Comparison) -> dict[str, list[str]]:
    return {change: [a.id for a, _ in pairs] for change, pairs in found.claims.items()}


def sections(html: str) -> dict[str, list]:
    """Heading -> the tables, figures and texts under it."""
    found = {}
    for heading in BeautifulSoup(html, "html.parser").find_all(["h2", "h3"]):
        under = found.setdefault(heading.get_text(), [])
        for tag in heading.find_all_next(["h2", "h3", "table", "img", "li", "p"]):
            if tag.name in ("h2", "h3"):
                break
            under.append(tag)
    return found


@pytest.fixture(scope="module")
def opposite():
    return Comparison(side("A", ledger(True), "results/good"), side("B", ledger(False), "runs/bad"))


@pytest.fixture(scope="module")
def opposite_page(opposite):
    return page(opposite)


def test_opposite_runs_differ_in_every_verdict_that_they_give(opposite):
    found = ids(opposite)
    assert set(found[VERDICT]) == TESTED and set(found[SAME]) == ALL - TESTED
    assert not found[ONE_SIDED] and not found[EFFECT]
    apart = []
    for a, b in opposite.claims[VERDICT]:
        apart.append(abs(a.interval.estimate - b.interval.estimate))
    assert apart == sorted(apart, reverse=True) and apart[0] > apart[-1]
    assert opposite.settings == [] and opposite.only_in_one == []


def test_the_page_has_what_differs_first(opposite, opposite_page):
    found = sections(opposite_page)
    assert list(found)[:5] == ["Claims", VERDICT, ONE_SIDED, EFFECT, SAME]
    (table,) = (tag for tag in found[VERDICT] if tag.name == "table")
    rows = table.find("tbody").find_all("tr")
    assert len(rows) == len(TESTED)
    for row, (a, b) in zip(rows, opposite.claims[VERDICT]):
        statement, of_a, of_b = (part.get_text(" ") for part in row.find_all("td"))
        coloured = [tag.get_text() for tag in row.select("td > span[style*=background]")]
        assert [text[2:] for text in coloured] == [a.verdict, b.verdict]
        assert a.statement in statement
        for claim, text in ((a, of_a), (b, of_b)):
            assert claim.shown in text
            assert f"n = {claim.interval.n}, {claim.interval.seeds} seeds" in text
    assert found[ONE_SIDED][0].get_text() == "None."
    assert headline(opposite) in BeautifulSoup(opposite_page, "html.parser").p.get_text()


def test_a_figure_for_each_method_with_a_curve_in_both(opposite, opposite_page):
    curves, missing = opposite.curves
    assert list(curves) == ["ssft", "lat", "at", "rt", "zero"]
    assert [points_apart(asr) for asr in curves.values()] == pytest.approx([80, 60, 40, 0, 0])
    assert missing == [f"{name} is not shown: no latent PGD of it in A." for name in UNATTACKED]
    under = sections(opposite_page)["Attack success over eps"]
    images = [tag["alt"] for tag in under if tag.name == "img"]
    assert [alt.split(" by eps")[0].split()[-1] for alt in images] == [m.upper() for m in curves]
    assert "A: 100 % at 0.05, 100 % at 0.2; B: 60 % at 0.05, 20 % at 0.2" in images[0]
    said = [tag.get_text() for tag in under if tag.name == "p"]
    assert said[-1] == "ZERO: at most 0 points apart at 1 radii." and missing[0] in said


def test_a_run_beside_itself_has_nothing_that_differs():
    run = ledger(True)
    found = Comparison(side("A", run), side("B", run))
    assert set(ids(found)[SAME]) == ALL
    assert found.settings == [] and found.only_in_one == []
    under = sections(page(found))
    assert [tag.get_text() for tag in under["What only one has"]] == ["Nothing."]
    assert len(short_text(found).splitlines()) == 3


@pytest.fixture(scope="module")
def unlike():
    """Another method, other seeds, radii and settings; what one attack measured is gone."""
    run = ledger(True)
    rows = run.outcomes[(run.outcomes["method"] != "zero") & (run.outcomes["attack"] != "system")]
    one = rows["encoding"].eq("leet") & rows["prompts"].eq("harmful") & rows["pair_id"].eq(119)
    rows = rows.assign(outcome=rows["outcome"].mask(one & rows["method"].eq("lat"), "refused"))
    methods = {name: of for name, of in run.profile.methods.items() if name != "zero"}
    roles = run.profile.roles.model_dump() | {"no_radius": None}
    del roles["compared"]  # all methods
    more = cell("late", 0.4, "pgd", eps=0.4, sites="1,3", seeds=(7, 10))
    b = changed(
        run,
        more,
        outcomes=rows,
        seeds=(0, 1, 2, 7, 10),
        methods=methods | {"late": {"attack.steps": 3}},
        roles=roles,
        evaluation=run.profile.evaluation.model_dump(mode="json") | {"eps": (0.05, 0.4)},
        description="in other words",
    )
    return Comparison(side("A", run), side("B", b))


def test_what_only_one_has_is_named(unlike):
    assert unlike.only_in_one == [
        "method only in A: zero",
        "method only in B: late",
        "seed only in B: 7, 10",
        "attack only in A: system",
        "eps only in B: 0.4 absolute",
    ]
    one_sided = {a.id: (a, b) for a, b in unlike.claims[ONE_SIDED]}
    assert set(one_sided) == {"radius-matters", "attack-breaks-undefended"}
    a, b = one_sided["radius-matters"]
    assert a.interval and "no roles.no_radius" in b.why
    assert set(ids(unlike)[EFFECT]) == {"leet-gap", "rival-encodings"}
    assert ids(unlike)[VERDICT] == ["rival-typed"]


def test_settings_that_differ_are_named_and_no_others(unlike):
    names = [line.split(": ")[0] for line in unlike.settings]
    assert names == [
        "evaluation.eps",
        "methods.late",
        "methods.zero",
        "roles.compared",
        "roles.no_radius",
        "seeds",
    ]
    assert "evaluation.eps: [0.05, 0.2] -> [0.05, 0.4]" in unlike.settings
    html = page(unlike)
    assert [tag.get_text() for tag in sections(html)["Settings, A -> B"]] == unlike.settings
    assert [tag.get_text() for tag in sections(html)["What only one has"]] == unlike.only_in_one
    assert unlike.settings[-1] in short_text(unlike)


def test_curves_are_of_the_radii_of_both(unlike):
    curves, _ = unlike.curves
    assert "late" not in curves and "zero" not in curves
    assert list(curves["ssft"].index) == [0.05, 0.2] and curves["ssft"]["B"].isna().tolist() == [
        False,
        True,
    ]


def test_radii_of_other_units_are_in_no_figure():
    run = ledger(True)
    train = run.profile.train.model_dump(mode="json")
    train["attack"]["eps_mode"] = "relative"
    rows = run.outcomes.assign(eps_unit=run.outcomes["eps_unit"].replace("absolute", "relative"))
    b = changed(run, outcomes=rows, train=train)
    found = Comparison(side("A", run), side("B", b))
    assert found.curves == ({}, ["Radii are absolute in A and relative in B."])
    assert "train.attack.eps_mode: 'absolute' -> 'relative'" in found.settings


def test_on_a_terminal_many_settings_are_few_lines(unlike):
    many = unlike.settings * 5
    found = Comparison(unlike.a, unlike.b)
    found.__dict__["settings"] = many
    lines = short_text(found).splitlines()
    assert f"  and {len(many) - 10} settings more, in the page" in lines
    assert sum(line.strip() in many for line in lines) == 10


def test_nobodys_text_acts_in_the_page():
    run = ledger(True)
    data = run.profile.data.model_dump(mode="json") | {"system_prompt": " ".join(TEXTS)}
    variant = f"train.rule={TEXTS[1]}"
    b = changed(run, cell("lat", 1.0, variant=variant), data=data)
    found = Comparison(side("A", run, NAME), side("B", b, f"runs/{TEXTS[0]}"))
    html = page(found)
    assert any("pwned" in line for line in found.settings)
    assert any("pwned" in line for line in found.only_in_one)
    assert "pwned" in html and not acting(html)
    assert "\x1b" not in html and "\x1b" not in "\n".join(found.settings)


# ---- the command


def test_a_page_is_written_and_written_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a = saved(ledger(True), tmp_path / "results" / "tiny")
    run = tmp_path / "runs" / "mine"  # a run's own folder
    b = saved(ledger(False), run / "results")
    (run / "results" / "profile.yaml").rename(run / "profile.yaml")
    (run / "results" / "metrics").rename(run / "metrics")
    assert main([str(a), str(run)]) == 0
    said = capsys.readouterr().out
    assert "page: compare-tiny-mine.html" in said and "Another verdict: 26;" in said
    first = (tmp_path / "compare-tiny-mine.html").read_text()
    assert "<h1" in first and main([str(a), str(b), "--out", "compare-tiny-mine.html"]) == 0
    second = (tmp_path / "compare-tiny-mine.html").read_text()
    assert second != first, "it names another folder"
    assert str(tmp_path) not in first + second, "a page that is shared names somebody's disk"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "compare-tiny-mine.html",
        "results",
        "runs",
    ]


def test_what_this_command_did_not_write_stays(tmp_path):
    file = tmp_path / "page.html"
    save_page("<p>one</p>", file)
    save_page("<p>two</p>", file)
    assert file.read_text().startswith("<p>two</p>")
    written = file.read_bytes()
    edited = written.replace(b"two", b"two, and my notes")
    for content in (b"my thesis", b"", edited, written + b"and a line", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(FileExistsError, match="page.html' is there .* give another file"):
            save_page("<p>three</p>", file)
        assert file.read_bytes() == content
    file.unlink()
    save_page("<p>one</p>", tmp_path / "elsewhere.html")
    file.symlink_to(tmp_path / "elsewhere.html")  # somebody's link, whatever it leads to
    with pytest.raises(FileExistsError):
        save_page("<p>three</p>", file)
    (tmp_path / "elsewhere.html").unlink()  # and now to nothing
    (tmp_path / "folder").mkdir()
    for target in (file, tmp_path / "folder"):
        with pytest.raises(FileExistsError):
            save_page("<p>three</p>", target)
    assert file.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == [
        "folder",
        "page.html",
    ]


def test_a_page_in_a_folder_of_results_is_none_of_them(tmp_path):
    (tmp_path / manifest.NAME).touch()
    save_page("<p>one</p>", tmp_path / "page.html")
    assert manifest.listed(tmp_path) == {}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "is no folder: give a run folder"),
        (lambda run: (run / "profile.yaml").unlink(), "is no run: .* has no profile.yaml"),
        (lambda run: (run / "profile.yaml").write_text("methods: 3"), "is no run: .*methods"),
        (lambda run: (run / "claims.json").unlink(), "has no claims yet: finish .* --out"),
        (
            lambda run: (run / manifest.NAME).write_text(f"{'0' * 64}  outcomes/all.parquet\n"),
            "is no run: .*checksum",
        ),
    ],
)
@pytest.mark.parametrize("letter", ["A", "B"])
def test_what_cannot_be_compared_is_named_with_the_fix(
    tmp_path, monkeypatch, capsys, letter, spoil, said
):
    monkeypatch.chdir(tmp_path)
    empty = Evidence(PROFILE, ledger(True).outcomes.iloc[:0])
    folders = [saved(empty, tmp_path / name) for name in ("good", "bad")]
    spoil(folders[1])
    order = folders if letter == "B" else folders[::-1]
    assert main([str(folder) for folder in order]) == 2
    printed = capsys.readouterr()
    assert re.search(f"^error: --compare: {letter} = '.*bad' {said}", printed.err)
    assert printed.out == "" and not list(tmp_path.glob("*.html"))


@pytest.mark.slow
def test_the_committed_results_beside_themselves_and_beside_a_changed_copy(
    root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tiny = Side.load("A", root / "results" / "tiny")
    same = Comparison(tiny, Side.load("B", root / "results" / "tiny"))
    assert set(ids(same)[SAME]) == ALL and same.settings == same.only_in_one == []
    assert len(same.curves[0]) == len(tiny.evidence.attacked)
    e = tiny.evidence
    train = e.profile.train.model_dump(mode="json") | {"steps": 7}
    rows = e.outcomes[e.outcomes["seed"] != 2]
    beaten = (rows["method"] == e.main) & (rows["attack"] != "none")
    rows = rows.assign(outcome=rows["outcome"].mask(beaten, "complied"))
    copy = saved(changed(e, outcomes=rows, train=train, seeds=(0, 1)), tmp_path / "copy")
    found = Comparison(tiny, Side.load("B", copy))
    assert found.settings[-1].startswith("train.steps: ") and found.only_in_one == [
        "seed only in A: 2"
    ]
    assert "rival-embedding" not in ids(found)[SAME]
    assert next(iter(found.curves[0])) == e.main
    assert len(page(found)) < 3_000_000
