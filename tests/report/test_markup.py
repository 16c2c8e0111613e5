"""Every text that would act if it were markup, in every way a notebook shows a text of others: both
exports stay text. `tests/data/test_real_data.py` has a few of them in each place of a whole run."""

import pandas as pd
import pytest
from browser import opened
from hostile import NAME, TEXTS, acting
from nbconvert.exporters import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from latlib.report.html import to_html
from latlib.text.markdown import verbatim

EXPORTS = {
    "nbconvert": lambda notebook: HTMLExporter().from_notebook_node(notebook)[0],
    "ours": lambda notebook: to_html(notebook, "texts"),
}


@pytest.fixture(params=EXPORTS)
def page(request, tmp_path):
    """An export of a notebook with all texts in prose, in code, in a table and printed."""
    outputs = []
    with pd.option_context("display.html.use_mathjax", False, "display.max_colwidth", None):
        for text in (*TEXTS, NAME):
            prose = f"Prompt: *{verbatim(text)}*"
            table = pd.DataFrame({"asked": [text]}, index=[text])._repr_html_()
            outputs += [
                new_output("display_data", {"text/markdown": prose}),
                new_output("display_data", {"text/html": table}),
                new_output("stream", text=text),
            ]
    cells = [new_markdown_cell("# Texts"), new_code_cell(repr(TEXTS), outputs=outputs)]
    file = tmp_path / "page.html"
    file.write_text(EXPORTS[request.param](new_notebook(cells=cells)), encoding="utf-8")
    return file


def test_no_text_becomes_an_element(page):
    assert not acting(page.read_text(encoding="utf-8"))


def test_no_text_acts_and_all_are_shown(page, chromium):
    seen = opened(chromium, page)
    assert not seen.acts, seen
    shown = " ".join(seen.text.replace("\\n", "\n").split())  # pandas writes breaks so
    for text in (*TEXTS, NAME):
        # in prose, twice in the table, printed; of a terminal's codes only the letters are left
        assert "\x1b" in text or shown.count(" ".join(text.split())) >= 4, text
