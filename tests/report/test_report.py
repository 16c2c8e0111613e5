"""The report of runs whose outcomes were written down: all claims hold, none does, nothing was
measured, only some of it. Its notebook's cells are run here, without a kernel, and exported.
"""

import ast
import contextlib
import io
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from browser import barriers
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from ledger_evidence import PROFILE, ledger
from nbconvert.filters import markdown2html
from nbformat.v4 import new_output
from synthetic import attacked, evidence

from latlib.experiment.run import Run
from latlib.report import claims, diagram, plots, summary
from latlib.report.attack_checks import Status, panel
from latlib.report.evidence import Evidence
from latlib.report.html import to_html
from latlib.report.verdicts import Ground, Verdict, grounds

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
# what a sentence says that could turn out otherwise ...
ASSERTS = re.compile(
    r"\b(lower|rais|break|fall|ris|cost|defend|resist|leak|keep|beat|shift|work|fail|survive"
    r"|improve|reduce|increase|decrease|grow|shrink|double|quadruple|leave|protect|differ)"
    r"(s|es|e)?\b|\b(robust|safer|stronger|weaker|better|worse|fewer|(?<!no )more than|less than)\b"
    r"|\b(does|do) not\b",
    re.IGNORECASE,
)
# ... unless it says when, asks, says what must be, or whose words they are
OPEN = re.compile(
    r"\b(if|where|whether|when|whenever|would|must|may|can|only|how|the further|unless)\b|\?",
    re.IGNORECASE,
)
CLAIMED = (
    "Too small a radius leaves the attack its success.",
    "ASR falls with the training radius.",
    "A defence shifts the curve on the left to the right; it does not make it flat.",
    "The two differ in the attack.",
    "Doubling the noise quadruples the divergence.",
    "A larger radius costs harmless answers, encoded ones first.",
    "LAT is more robust than AT.",
)
UNCLAIMED = (
    "A cell that is bright on the left would be a model that is safe because it is useless.",
    "Where a perturbation from elsewhere beats the attack, the gradients mislead.",
    "ASR is the share of harmful requests complied with.",
)


def sentences_of(text: str) -> list[str]:
    """Its sentences, and what stands after a colon by itself."""
    return re.split(r"(?<=[.:;?])\s+", " ".join(text.split()))


def claims_in(texts) -> list[str]:
    return [text for text in texts if ASSERTS.search(text) and not OPEN.search(text)]


def write_run(evidence: Evidence, folder: Path) -> None:
    run = Run(evidence.profile, folder)
    (run.folder / "results" / "outcomes").mkdir(parents=True, exist_ok=True)
    if len(evidence.outcomes):
        evidence.outcomes.to_parquet(run.folder / "results" / "outcomes" / "all.parquet")
    for name, curve in evidence.metrics.items():
        curve.to_json(run.folder / "metrics" / f"{name}.jsonl", orient="records", lines=True)
    if evidence.variance:
        run.save_result("refusal_svd", {"models": evidence.variance})


def execute(notebook, parameters) -> None:
    """Run the cells of code in this process and keep what they show."""
    shown = []
    names = {}
    formatter = DisplayFormatter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_numbers", {})  # as in a kernel of its own
        patch.setattr("IPython.display.display", lambda *objects: shown.extend(objects))
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            tree = ast.parse(cell.source)
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(tree, "cell", "exec"), names)
                if last:
                    shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
            if "parameters" in cell.metadata.tags:
                names |= parameters
            cell.outputs = []
            if printed.getvalue():
                cell.outputs.append(new_output("stream", name="stdout", text=printed.getvalue()))
            for one in shown:
                if one is not None:
                    data, metadata = formatter.format(one)
                    cell.outputs.append(new_output("display_data", data, metadata=metadata))
            shown.clear()


def page_of(evidence: Evidence, folder: Path) -> BeautifulSoup:
    write_run(evidence, folder)
    notebook = nbformat.read(NOTEBOOKS / "99_report.ipynb", as_version=4)
    execute(notebook, {"profile": evidence.profile, "out": folder})
    html = to_html(notebook, "99_report")
    assert len(html) < 3_000_000
    return BeautifulSoup(html, "html.parser")


def half() -> Evidence:
    """Of a run whose notebook 06 is still to come: no attacks, no directions."""
    rows = ledger(True).outcomes
    quiet = (rows["attack"] == "none") & (rows["intervention"] == "none")
    return Evidence(PROFILE, rows[quiet].reset_index(drop=True))


RUNS = {
    "holds": lambda: ledger(True),
    "fails": lambda: ledger(False),
    "empty": lambda: Evidence(PROFILE, ledger(True).outcomes.iloc[:0]),
    "half": half,
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def pages(reports):
    return {name: page_of(make(), reports / name) for name, make in RUNS.items()}


@pytest.fixture(scope="module", params=RUNS)
def page(request, pages):
    return pages[request.param]


def sentences(page: BeautifulSoup) -> set[str]:
    """What a page says in prose and in the texts of figures; claims are quoted in tables."""
    texts = [part.get_text(" ", strip=True) for part in page.select("p, li, summary, h2")]
    texts += [image["alt"] for image in page.find_all("img")]
    found = set()
    for text in texts:
        found.update(sentences_of(text))
    return found


def first_screen(page: BeautifulSoup) -> str:
    """All before the first section, without the list of contents."""
    parts = []
    for part in page.h2.find_all_previous(["p", "li"]):
        if not part.find_parent("nav"):
            parts.append(part.get_text(" ", strip=True))
    return " ".join(parts)


@pytest.mark.parametrize("sentence", CLAIMED)
def test_a_claim_is_seen(sentence):
    assert claims_in(sentences_of(sentence))
    assert claims_in(sentences_of(f"How to read it: {sentence}"))


@pytest.mark.parametrize("sentence", UNCLAIMED)
def test_what_is_true_whatever_comes_out_is_left_alone(sentence):
    assert not claims_in(sentences_of(sentence))


@pytest.mark.slow
def test_no_sentence_claims_the_same_of_opposite_outcomes(pages):
    fixed = sentences(pages["holds"]) & sentences(pages["fails"])
    assert len(fixed) > 60
    assert claims_in(fixed) == []


def test_no_result_is_typed():
    cells = nbformat.read(NOTEBOOKS / "99_report.ipynb", as_version=4).cells
    prose = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert set(re.findall(r"\d[\d.]* ?(?:%|points|seeds|nats)", prose)) == {"95 %"}


@pytest.mark.slow
def test_the_answer_follows_the_outcome(pages):
    holds, fails = first_screen(pages["holds"]), first_screen(pages["fails"])
    tested = sum(claim.effect is not None for claim in claims.CLAIMS)
    assert f"● {tested} reproduced" in holds and "✖ 0 not reproduced" in holds
    assert "● 0 reproduced" in fails and "✖ 0 not reproduced" not in fails
    assert re.search(r"succeed in 0 \[\S+ \d+\] % on LAT", holds)
    assert re.search(r"succeed in 60 \[\S+ \d+\] % on LAT", fails)


def test_how_many_stand_behind_the_latent_attacks():
    """LAT was attacked at the largest radius on one seed only."""
    rows = ledger(True).outcomes
    of_one = (rows["method"] == "lat") & (rows["attack"] == "pgd") & (rows["seed"] == 0)
    largest = max(PROFILE.evaluation.eps)
    both = pd.concat([rows, rows[of_one].assign(eps=largest)], ignore_index=True)
    said = summary.in_short(Evidence(PROFILE, both), [], [])
    assert re.search(rf"% on LAT at eps {largest} \w+ \(worst case per prompt", said)
    assert re.search(r"n = \d+ to \d+, 1 to 3 seeds\)", said)


@pytest.mark.slow
def test_the_answer_stands_first(page):
    """Before the first section: the question, the tally, three sentences, no code, no fold but the
    contents; then the claims, then the figure."""
    assert page.h1.get_text().endswith("?")
    before = page.h2.find_all_previous("details")
    assert [fold.summary.get_text() for fold in before] == ["Contents"]
    assert len(page.h2.find_previous("ul").find_all("li")) == 3
    titles = [heading.get_text() for heading in page.find_all("h2")]
    assert titles[:2] == ["The claims", "In one figure"] and titles[-1] == "This run"
    assert "Code" not in {fold.get_text() for fold in page.find_all("summary")}
    for fold in page.find_all("details"):
        assert len(fold.get_text(strip=True)) > len(fold.summary.get_text(strip=True)) + 5


@pytest.mark.slow
def test_what_was_not_measured_is_said(pages):
    count = len(claims.CLAIMS)
    empty = pages["empty"]
    assert f"? {count} cannot be decided here" in first_screen(empty)
    assert "Latent attacks were not measured yet" in first_screen(empty)
    assert empty.get_text().count("Not measured yet") > 10
    assert "● 0 reproduced" in first_screen(empty) and len(empty.find_all("img")) == 1
    some = first_screen(pages["half"])
    assert "Latent attacks were not measured yet" in some and "● 0 reproduced" not in some
    assert "main_figure is not shown" in pages["half"].get_text()


@pytest.mark.slow
def test_every_figure_has_a_numbered_caption_that_says_of_how_many(page):
    figures = page.find_all("figure")
    assert len(figures) == len(page.find_all("img"))
    for number, figure in enumerate(figures, start=1):
        caption = figure.figcaption.get_text()
        assert caption.startswith(f"Figure {number}. ") and figure["id"] == f"figure-{number}"
        assert figure.find(class_="scroll")["aria-label"] == f"Figure {number}"
        if "where it attacks" not in caption:  # the diagram is of no prompts
            assert re.search(r" n = \d.* seeds?\.$| \d seeds?\.$", caption), caption


@pytest.mark.slow
def test_a_method_is_written_in_one_way(pages):
    """In prose, tables, captions and the texts of figures."""
    for name in ("holds", "fails", "half"):
        page = BeautifulSoup(str(pages[name]), "html.parser")
        for part in page.find_all(["pre", "code"]):  # settings, and claims' ids
            part.extract()
        said = [page.get_text(" "), *(image["alt"] for image in page.find_all("img"))]
        found = re.findall(r"\b(?:ssft|rt|lat|at-u|lat-u|LAT-U\w+|Lat)\b[^.]{0,40}", " ".join(said))
        assert not found


@pytest.mark.slow
def test_axe_finds_nothing_grave(page, chromium, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(str(page), encoding="utf-8")
    assert barriers(chromium, file) == {}


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_only_tables_and_figures_scroll_sideways(pages, chromium, tmp_path, width):
    file = tmp_path / "report.html"
    file.write_text(str(pages["holds"]), encoding="utf-8")
    view = chromium.new_page(viewport={"width": width, "height": 900})
    view.goto(file.as_uri())
    view.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    wider = "pre => pre.filter(one => one.scrollWidth > one.clientWidth).length"
    assert view.locator("pre").count() > 3 and view.locator("pre").evaluate_all(wider) == 0
    drawn = view.locator("img.figure").evaluate_all(
        "all => all.map(one => one.width / one.naturalWidth)"
    )
    assert min(drawn) > 0.39, "below 80 % of what it was drawn for it is not readable"
    view.close()


@pytest.mark.slow
def test_the_rules_of_the_verdicts_are_printed(pages, chromium, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(str(pages["holds"]), encoding="utf-8")
    view = chromium.new_page(viewport={"width": 700, "height": 900})
    view.goto(file.as_uri())
    view.emulate_media(media="print")
    rules = view.get_by_text("Verdict: reproduced if the 95 % interval is above")
    box = rules.first.bounding_box()
    assert box["height"] > 300 and box["width"] <= 700, "folded, or cut off at the right"
    view.close()


@pytest.mark.slow
def test_links_lead_somewhere(page):
    places = {tag["id"] for tag in page.find_all(id=True)}
    links = [link["href"] for link in page.find_all("a")]
    contents = [link["href"] for link in page.nav.find_all("a")]
    assert len(contents) == len(page.find_all("h2")) > 10
    made_by = set()
    for link in links:
        if link.startswith("#"):
            assert link[1:] in places
        elif link.startswith("notebooks/"):
            made_by.add(link)
            assert (NOTEBOOKS.parent / link).is_file()
        else:
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link)
    assert len(made_by) >= 5


def test_every_claim_has_one_section():
    placed = [name for names in summary.SECTIONS.values() for name in names]
    assert sorted(placed) == sorted(claim.id for claim in claims.CLAIMS)


def test_failed_checks_are_named_at_once():
    bad = Ground("latent", "lat", "PGD is too weak (LAT)", Status.FAIL)
    fine = Ground("latent", "lat", "touches its ball", Status.PASS)
    said = summary.in_short(ledger(True), claims.measure(ledger(True)), [bad, fine])
    assert "**Of 2 checks** that these numbers stand on, failed: 1 (PGD is too weak (LAT))" in said
    assert "touches" not in said


def test_a_claim_carries_the_mark_of_its_checks():
    broken = attacked({("ssft", "pgd", 0.05): 0.0, ("ssft", "pgd-strong", 0.05): 0.0})
    found = grounds(broken, panel(broken))
    measured = claims.measure(broken, ["attack-breaks-undefended"])
    assert re.search(r"✘ \d+ of \d+ failed", summary.claims_table(broken, measured, found))
    passed = [Ground(one.topic, one.method, one.text, Status.PASS) for one in found]
    assert f"✔ {len(passed)} passed" not in summary.claims_table(broken, measured, passed)
    assert "✔" in summary.claims_table(broken, measured, passed)
    others = [Ground("latent", "lat", "", Status.FAIL), Ground("encoded", "ssft", "", Status.FAIL)]
    table = summary.claims_table(broken, measured, [*others, *passed])
    assert "✔" in table and "✘" not in table, "the claim is not about these"
    unknown = [Ground("", "base", "the base knows", Status.NOT_MEASURED), *passed]
    assert "? 1 of" in summary.claims_table(broken, measured, unknown)


def test_an_undecided_claim_says_why_beside_its_interval():
    e = evidence(True)
    [claim] = claims.measure(e, ["eps-too-small"])
    assert claim.interval is not None and claim.why == "one seed says nothing of others"
    table = summary.claims_table(e, [claim], [])
    assert claim.shown in table and claim.why in table


def test_verdicts_differ_in_shape_and_can_be_read():
    assert set(summary.BADGES) == set(Verdict)
    assert len({shape for shape, _ in summary.BADGES.values()}) == len(Verdict)
    for _, colour in summary.BADGES.values():
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert 1.05 / (luminance + 0.05) >= 4.5


def test_every_reason_has_a_short_form():
    with pytest.raises(LookupError, match="REASONS"):
        summary._reason("something else")
    one_seed = ledger(True).of_seeds([0])
    reasons = {
        summary._reason(claim.why) for claim in summary.decided(claims.measure(one_seed), False)
    }
    assert "measured on one seed" in reasons and "that no run of this suite tests" in reasons


def test_methods_are_ranked_by_their_largest_asr():
    table = summary.ranking(ledger(True)).splitlines()
    order = [line.split(" | ")[0].strip("| ") for line in table[2:]]
    assert order.index("AT") < order.index("LAT") < order.index("SSFT")
    swapped = ledger(True).outcomes.replace({"method": {"at": "ssft", "ssft": "at"}})
    other = summary.ranking(Evidence(PROFILE, swapped))
    assert other.index("| SSFT |") < other.index("| LAT |") < other.index("| AT |")
    assert "worst of 2, n = 600, 3 seeds" in table[0]
    lat = dict(zip(table[0].split(" | "), table[2 + order.index("LAT")].split(" | ")))
    typed = next(cell for name, cell in lat.items() if name.startswith("ASR, typed"))
    assert typed.startswith("40 [")  # of prefilling and the system prompt the worse


def test_the_diagram_is_of_the_profile():
    figure, alt, caption = diagram.lat_diagram(ledger(True))
    sites = PROFILE.training("lat").attack.sites
    assert f"{len(sites)} sites" in alt and "eps 0.05" in alt and "3 of 5 tokens" in alt
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert drawn.count("+δ") == 3 * len(sites)


def test_published_results_have_a_front_page_with_the_same_answer(reports, pages):
    for name, page in pages.items():
        text = (reports / name / "results" / "README.md").read_text(encoding="utf-8")
        shown = BeautifulSoup(markdown2html(text), "html.parser")
        tally = [span.get_text() for span in page.h2.find_all_previous("span") if span.get("style")]
        assert len(tally) == len(Verdict)
        assert {span.get_text() for span in shown.select("span[style]")} >= set(tally)
        statements = {row.td.get_text() for row in shown.select("table")[-1].select("tbody tr")}
        assert len(statements) == len(claims.CLAIMS)
