"""Turns an executed notebook into one self-contained HTML file.

1. nbconvert renders it with the template in `latlib/report/templates/report`: no script, no
   request, light and dark.
2. Tables get scopes and a scrollable frame, headings an id, task lists readable boxes.
3. The result is checked, and an `ExportError` lists every fault: an output that no block of the
   template rendered, an image without an alternative text that says something, a script, anything
   that would be loaded from elsewhere.

There is no LaTeX in the file (rendering it needs scripts): write formulas as text.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import re
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert.exporters import HTMLExporter
from traitlets.config import Config

from latlib.io.files import write_text

# What an output is shown as, best first. Scripts are not in it: an output that is nothing else is
# an error.
MIME_TYPES = [
    "text/html",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/markdown",
    "text/latex",
    "text/plain",
]
# nbconvert's and matplotlib's stand-ins, and file names: they pass a checker and tell a reader
# nothing.
_EMPTY_ALT = re.compile(
    r"no description has been provided.*|<figure"
    r" size.*|\S+\.(png|svg|jpe?g)|(image|figure|plot)\W*\d*"
)
FORBIDDEN_TAGS = ("script", "iframe", "object", "embed", "link", "base", "frame", "applet")
LOADING_ATTRIBUTES = ("src", "srcset", "poster", "data", "background", "xlink:href")
_LOADED = re.compile(r"@import|url\(\s*['\"]?(?!data:|#)", re.IGNORECASE)


class ExportError(ValueError):
    """The notebook cannot become a file that stands alone and can be read by everyone; the message
    lists why.
    """


def export_html(notebook_path: str | os.PathLike[str], html_path: str | os.PathLike[str]) -> None:
    """Render the executed notebook to `html_path`, written aside and moved into place.

    Code is folded; that of cells tagged `hide-input` is left out. Raises ExportError, and leaves
    `html_path` as it was.
    """
    source, target = Path(notebook_path), Path(html_path)
    html = to_html(nbformat.read(source, as_version=4), source.stem)
    write_text(html, target)


def to_html(notebook: nbformat.NotebookNode, name: str) -> str:
    """The notebook as one HTML document. name: the title where there is no first-level heading."""
    config = Config()
    config.HTMLExporter.embed_images = True
    # each would be read out as a link called pilcrow
    config.HTMLExporter.exclude_anchor_links = True
    config.NbConvertBase.display_data_priority = MIME_TYPES
    exporter = HTMLExporter(
        config=config,
        template_name="report",
        extra_template_basedirs=[str(Path(__file__).parent / "templates"), *_nbconvert_templates()],
        extra_template_paths=_nbconvert_templates(),
        filters={"svg_uri": _svg_uri},
    )
    html, _ = exporter.from_notebook_node(notebook)
    soup = BeautifulSoup(html, "html.parser")
    _name_headings(soup, name)
    _frame_tables(soup)
    for box in soup.select("input[type=checkbox]"):
        box.replace_with("\u2611 " if box.has_attr("checked") else "\u2610 ")
    faults = _unrendered(soup) + _images_without_words(soup) + _not_self_contained(soup)
    if faults:
        raise ExportError(
            f"{name} cannot be exported:\n" + "\n".join(f"- {fault}" for fault in faults)
        )
    return str(soup)


def _nbconvert_templates() -> list[str]:
    """Where nbconvert's own templates were installed; it looks for them only in this environment's
    prefix, and with --system-site-packages nbconvert may be in another."""
    files = importlib.metadata.files("nbconvert") or []
    return [
        str(Path(f.locate()).resolve().parents[1])
        for f in files
        if f.as_posix().endswith("/templates/base/null.j2")
    ]


def _svg_uri(svg: str) -> str:
    """An SVG as an image of its own: nothing in it can run, and its ids meet no others."""
    return "data:image/svg+xml;base64," + base64.b64encode("".join(svg).encode()).decode()


def _name_headings(soup: BeautifulSoup, name: str) -> None:
    """The title from the first heading, and an id for every heading, as a link in the notebook
    would spell it.
    """
    first = soup.find("h1")
    assert soup.title is not None  # the template has one
    soup.title.string = first.get_text(" ", strip=True) if first else name
    for heading in soup.find_all(re.compile("^h[1-6]$")):
        heading["id"] = heading.get("id") or re.sub(r"\s+", "-", heading.get_text().strip())


def _frame_tables(soup: BeautifulSoup) -> None:
    """Header cells say what they head; a wide table scrolls in its own frame, also by keyboard."""
    for number, table in enumerate(soup.find_all("table"), start=1):
        for cell in table.find_all("th"):
            if not cell.get_text(strip=True):
                cell.name = "td"
            elif not cell.has_attr("scope"):
                cell["scope"] = "col" if cell.find_parent("thead") else "row"
        caption = table.find("caption")
        label = caption.get_text(" ", strip=True) if caption else f"Table {number}"
        table.wrap(
            soup.new_tag(
                "div",
                attrs={"class": "scroll", "tabindex": "0", "role": "region", "aria-label": label},
            )
        )


def _unrendered(soup: BeautifulSoup) -> list[str]:
    faults = []
    for number, output in enumerate(soup.select("div.output"), start=1):
        types = output.attrs.pop("data-types")
        if not (types == "stream" or output.get_text(strip=True) or output.find("img")):
            better = ", ".join(MIME_TYPES)
            faults.append(f"output {number} ({types}) would be empty: give it one of {better}")
    return faults


def _images_without_words(soup: BeautifulSoup) -> list[str]:
    faults = []
    for number, image in enumerate(soup.find_all("img"), start=1):
        alt = " ".join(str(image.get("alt", "")).split())
        if len(alt.split()) < 3 or _EMPTY_ALT.fullmatch(alt.lower()):
            faults.append(
                f"image {number} has the alternative text {alt!r}: say what it shows, with"
                " display(figure, metadata={'image/png': {'alt': '...'}}) or ![what it"
                " shows](...)"
            )
    return faults


def _not_self_contained(soup: BeautifulSoup) -> list[str]:
    faults = []
    for tag in soup.find_all(True):
        start = str(tag)[:80]
        if tag.name in FORBIDDEN_TAGS:
            faults.append(f"<{tag.name}> is not allowed: {start}")
        for name, value in tag.attrs.items():
            text = " ".join(value) if isinstance(value, list) else str(value)
            fault = _attribute_fault(tag.name, name, text.strip())
            if fault:
                faults.append(f"{fault} in <{tag.name}>: {start}")
        if tag.name == "style" and _LOADED.search(tag.get_text()):
            faults.append("a <style> loads something from elsewhere")
    return faults


def _attribute_fault(tag: str, name: str, text: str) -> str:
    """What is wrong with an attribute, '' if nothing is."""
    is_href = name == "href"
    if name.startswith("on") or (is_href and text.lower().startswith(("javascript:", "data:"))):
        return f"a script ({name})"
    loads = name in LOADING_ATTRIBUTES and not text.startswith("data:")
    if loads or (is_href and tag not in ("a", "area") and not text.startswith("#")):
        return f"{name}={text[:60]!r} is loaded from elsewhere"
    if name == "style" and _LOADED.search(text):
        return "a style that loads something from elsewhere"
    return ""
