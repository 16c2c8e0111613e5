"""Whether everybody can read the committed notebooks as nbconvert renders them, and whether what is
looked for would be seen."""

from pathlib import Path

import nbformat
import pytest
from browser import barriers
from nbconvert.exporters import HTMLExporter

from latlib.report.html import to_html

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "tiny" / "notebooks"
NOTEBOOKS = sorted(PUBLISHED.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_axe_finds_nothing_grave_in_a_rendered_notebook(source, chromium, tmp_path):
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(source, as_version=4))
    page = tmp_path / "page.html"
    page.write_text(html, encoding="utf-8")
    assert barriers(chromium, page) == {}


def test_what_cannot_be_read_is_seen(chromium, tmp_path):
    page = tmp_path / "page.html"
    good = to_html(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Does it?")]), "x"
    )
    page.write_text(good, encoding="utf-8")
    assert barriers(chromium, page) == {}
    pale = '<p style="color:#999">pale</p>'
    wide = f'<details><div style="overflow-x:auto"><pre>{"wide " * 900}</pre></div></details>'
    wide = wide.replace("<pre>", '<pre style="white-space:pre">')
    page.write_text(good.replace("</main>", f"{pale}{wide}<img></main>"), encoding="utf-8")
    found = barriers(chromium, page)
    assert set(found) >= {"color-contrast", "scrollable-region-focusable", "image-alt"}
