"""The report is one file that loads nothing, shows every kind of output and can be read by
everyone.
"""

import base64
import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from latlib.report.html import ExportError, export_html, to_html

PIXEL = base64.b64encode(bytes.fromhex("89504e470d0a1a0a")).decode()
ALT = "attack success against eps, rising from 0 to 90 per cent"


def shown(kind, data, metadata=None):
    return new_output("display_data", {kind: data}, metadata=metadata or {})


def rendered(*outputs, markdown="# Does it hold?", tags=()):
    code = new_code_cell(
        "answer = 6 * 7  # code", outputs=list(outputs), metadata={"tags": list(tags)}
    )
    return to_html(new_notebook(cells=[new_markdown_cell(markdown), code]), "99_report")


KINDS = {
    "text/html": "<p>html 1</p>",
    "text/markdown": "**markdown 2**",
    "text/plain": "plain <3>",
    "text/latex": "$latex 4$",
}


@pytest.mark.parametrize("output_type", ["display_data", "execute_result"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_bundle_is_shown(kind, output_type):
    page = BeautifulSoup(
        rendered(new_output(output_type, {kind: KINDS[kind], "application/x": "no"})), "html.parser"
    )
    wanted = (
        BeautifulSoup(KINDS[kind], "html.parser").get_text()
        if kind == "text/html"
        else KINDS[kind].strip("*")
    )
    assert wanted in page.select_one("div.output").get_text()


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", "image/svg+xml"])
def test_every_image_bundle_is_shown_with_its_alt_text(kind):
    data = "<svg xmlns='http://www.w3.org/2000/svg'/>" if kind == "image/svg+xml" else PIXEL
    image = BeautifulSoup(rendered(shown(kind, data, {kind: {"alt": ALT}})), "html.parser").img
    assert image["alt"] == ALT and image["src"].startswith(f"data:{kind};base64,")


def test_streams_and_errors_are_shown_without_colour_codes():
    error = new_output(
        "error",
        ename="ValueError",
        evalue="eps <= 0",
        traceback=["\x1b[31mValueError\x1b[0m: eps <= 0"],
    )
    page = rendered(
        new_output("stream", name="stdout", text="\x1b[1mout\x1b[0m <1>"),
        new_output("stream", name="stderr", text="err"),
        error,
    )
    for text in ("<pre>out &lt;1&gt;</pre>", "<pre>err</pre>", "ValueError: eps &lt;= 0"):
        assert text in page
    assert "\x1b" not in page


def test_page_stands_alone_and_says_what_it_is():
    page = rendered(
        shown("text/html", "<p>a <a href='https://arxiv.org/abs/2407.15549'>link</a> is fine</p>")
    )
    soup = BeautifulSoup(page, "html.parser")
    assert (
        soup.html["lang"] == "en"
        and soup.title.string == "Does it hold?"
        and len(soup.select("main")) == 1
    )
    assert "<script" not in page and "default-src 'none'" in page
    assert not re.search(r"(src|@import|url\()\W*https?:", page) and not soup.find_all("link")
    assert "prefers-color-scheme: dark" in page and soup.h1["id"] == "Does-it-hold?"


def test_code_and_cells_for_the_notebook_alone_are_left_out():
    assert "answer" not in rendered()
    cell = new_markdown_cell("What the cells below use:", metadata={"tags": ["remove-cell"]})
    assert "cells below" not in to_html(new_notebook(cells=[cell]), "99_report")


def test_an_output_is_folded_under_the_words_of_its_cell():
    output = shown("text/plain", "a long table")
    cell = new_code_cell("x", outputs=[output], metadata={"fold": "Every check & more"})
    soup = BeautifulSoup(to_html(new_notebook(cells=[cell]), "99_report"), "html.parser")
    assert soup.details.summary.get_text() == "Every check & more"
    assert "a long table" in soup.details.get_text() and not soup.details.has_attr("open")
    assert not BeautifulSoup(rendered(output), "html.parser").details


def test_sections_are_listed_where_there_are_many():
    few = "# Does it hold?\n\nA question.\n\n## One\n\n## Two's & more\n\n## Three"
    assert not BeautifulSoup(rendered(markdown=few), "html.parser").nav
    soup = BeautifulSoup(rendered(markdown=few + "\n\n## Four"), "html.parser")
    links = soup.nav.find_all("a")
    assert [link.get_text() for link in links] == ["One", "Two's & more", "Three", "Four"]
    assert all(soup.find("h2", id=link["href"][1:]) for link in links)
    assert soup.nav.find_previous("p").get_text() == "A question."


def test_links_to_notebooks_lead_to_those_beside_the_report():
    soup = BeautifulSoup(
        rendered(markdown="[a](06_robustness.ipynb) [b](https://x.org/01_a.ipynb) [c](#d)"),
        "html.parser",
    )
    assert [link["href"] for link in soup.find_all("a")] == [
        "notebooks/06_robustness.ipynb",
        "https://x.org/01_a.ipynb",
        "#d",
    ]


def test_tables_have_scopes_and_scroll_by_keyboard():
    pandas_like = "<table><thead><tr><th></th><th>ASR</th></tr></thead><tbody><tr><th>lat</th><td>1</td></tr></tbody></table>"
    soup = BeautifulSoup(rendered(shown("text/html", pandas_like)), "html.parser")
    assert [(th.get_text(), th["scope"]) for th in soup.find_all("th")] == [
        ("ASR", "col"),
        ("lat", "row"),
    ]
    assert soup.table.parent["tabindex"] == "0" and soup.table.parent["aria-label"]


def test_figures_scroll_by_keyboard():
    figures = [shown("image/png", PIXEL, {"image/png": {"alt": f"ASR of model {n}"}}) for n in "ab"]
    soup = BeautifulSoup(rendered(*figures), "html.parser")
    frames = soup.select(".scroll[tabindex='0'] > img.figure")
    assert [image["alt"] for image in frames] == ["ASR of model a", "ASR of model b"]
    assert all(image.parent["aria-label"] == "Figure" for image in frames)


def test_the_caption_behind_a_figure_is_its_own():
    outputs = []
    for number in (1, 2):
        look = {"image/png": {"alt": f"ASR of model {number}", "width": 300 * number}}
        outputs.append(shown("image/png", PIXEL, look))
        outputs.append(shown("text/markdown", f"**Figure {number}.** Of *{number}* seeds."))
    outputs.append(shown("text/markdown", "Figures are numbered."))
    soup = BeautifulSoup(rendered(*outputs), "html.parser")
    figures = soup.find_all("figure")
    assert [one["id"] for one in figures] == ["figure-1", "figure-2"]
    captions = [one.figcaption.get_text() for one in figures]
    assert captions == ["Figure 1. Of 1 seeds.", "Figure 2. Of 2 seeds."]
    assert [one.div["aria-label"] for one in figures] == ["Figure 1", "Figure 2"]
    assert [one.img["style"] for one in figures] == ["--width: 300px", "--width: 600px"]
    assert (
        len(soup.select("div.output")) == 1 and "Figures are" in soup.select("div.output")[0].text
    )


@pytest.mark.filterwarnings("ignore:Your element with mimetype")
@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (shown("image/png", PIXEL), "image 1 has the alternative text ''"),
        (shown("image/png", PIXEL, {"image/png": {"alt": "figure 3"}}), "figure 3"),
        (
            shown("image/png", PIXEL, {"image/png": {"alt": "<Figure size 640x480 with 1 Axes>"}}),
            "Figure size",
        ),
        (shown("text/html", f"<img src='data:image/png;base64,{PIXEL}'>"), "No description"),
        (shown("text/html", "<p>x</p><script>1</script>"), "<script> is not allowed"),
        (shown("text/html", "<p onclick='x()'>x</p>"), "onclick"),
        (shown("text/html", "<a href='javascript:x()'>x</a>"), "a script"),
        (shown("text/html", f"<img src='https://example.org/a.png' alt='{ALT}'>"), "elsewhere"),
        (shown("text/html", "<p style='background: url(//example.org/a)'>x</p>"), "elsewhere"),
        (shown("text/html", "<style>@import 'x.css'</style>x"), "elsewhere"),
        (shown("application/javascript", "1"), "output 1 (application/javascript) would be empty"),
    ],
)
def test_what_cannot_be_shown_or_read_is_an_error_that_says_so(output, fault):
    with pytest.raises(ExportError, match="99_report") as caught:
        rendered(output)
    assert fault in str(caught.value)


def test_a_bad_notebook_leaves_the_report_of_before(tmp_path):
    notebook, report = tmp_path / "99_report.ipynb", tmp_path / "report.html"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Does it hold?")]), notebook)
    export_html(notebook, report)
    before = report.read_text(encoding="utf-8")
    assert "Does it hold?" in before
    nbformat.write(
        new_notebook(cells=[new_code_cell("x", outputs=[shown("image/png", PIXEL)])]), notebook
    )
    with pytest.raises(ExportError):
        export_html(notebook, report)
    assert report.read_text(encoding="utf-8") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["99_report.ipynb", "report.html"]
