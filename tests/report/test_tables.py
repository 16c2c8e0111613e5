"""Text in tables and Markdown."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbconvert.filters import markdown2html
from pandas import DataFrame

from latlib.report.tables import printed
from latlib.text.markdown import verbatim


def shown(text: str) -> tuple[str, set[str]]:
    """(what a reader sees of a text that is rendered as Markdown, the tags that it became)"""
    words, tags = [], set()
    parser = HTMLParser()
    parser.handle_data = words.append
    parser.handle_starttag = lambda tag, _: tags.add(tag)
    parser.feed(markdown2html(f"Prompt: *{verbatim(text)}*"))
    return "".join(words).strip(), tags


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert)",
        "![a](b) `c` **d** __e__ ~~f~~",
        "# a | b",
        "1. $x^2$ \\(y\\) https://a.b <b>c</b> &lt; &amp;",
        "a\n\n    b\n\n<script>c</script>",
    ],
)
def test_a_prompt_is_shown_as_it_is(text):
    words, tags = shown(text)
    assert words == "Prompt: " + " ".join(text.split())
    assert tags <= {"p", "em"}


@given(st.text(min_size=1, max_size=40, alphabet=st.characters(codec="ascii", min_codepoint=33)))
def test_no_text_becomes_a_tag(text):
    assert shown(f"a{text}a")[1] <= {"p", "em"}


def test_a_table_with_columns_of_two_levels_is_printed():
    table = DataFrame({("eps 0.1", "embedding"): [0.5], ("eps 0.1", "other sites"): [None]})
    shown = printed(table.set_axis(["lat"]).rename_axis("method"))
    assert shown.columns.tolist() == table.columns.tolist()
    assert shown.to_numpy().tolist() == [["0.5", "-"]] and shown.index.tolist() == ["LAT"]
