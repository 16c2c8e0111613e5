"""Turns an executed notebook into one self-contained HTML file.

1. nbconvert renders it with the template in `latlib/report/templates/report`: no script, no
   request, light and dark.
2. Tables get scopes and a scrollable frame, figures their captions, headings an id and a list of
   them, task lists readable boxes; links to notebooks lead to the executed ones beside the file.
3. The result is checked, and an `ExportError` lists every fault: an output that no block of the
   template rendered, an image without an alternative text that says something, a script, anything
   that would be loaded from elsewhere.

There is no LaTeX in the file (rendering it needs scripts): write formulas as text.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup, Tag
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
FEW_SECTIONS = 4  # a reader sees them without a list
_CAPTION = re.compile(r"Figure \d+(?=\.)")
_NOTEBOOK = re.compile(r"^\d\d_\w+\.ipynb$")
_SCRIPT = re.compile(r"on|href=(javascript|data):", re.IGNORECASE)
_LOADED = re.compile(r"@import|url\(\s*['\"]?(?!data:|#)", re.IGNORECASE)


class ExportError(ValueError):
    """The notebook cannot become a file that stands alone and can be read by everyone; the message
    lists why.
    """


def export_html(notebook_path: str | os.PathLike[str], html_path: str | os.PathLike[str]) -> None:
    """Render the executed notebook to `html_path`, written aside and moved into place.

    Code is left out, and so are cells of text tagged `remove-cell`; outputs of a cell whose
    metadata have `fold` are folded under these words. Raises ExportError, and leaves `html_path` as
    it was.
    """
    source, target = Path(notebook_path), Path(html_path)
    html = to_html(nbformat.read(source, as_version=4), source.stem)
    write_text(html, target)


def to_html(notebook: nbformat.NotebookNode, name: str) -> str:
    """The notebook as one HTML document. name: the title where there is no first-level heading."""
    templates = _nbconvert_templates()
    exporter = HTMLExporter(
        config=Config(NbConvertBase=Config(display_data_priority=MIME_TYPES)),
        embed_images=True,
        exclude_anchor_links=True,  # each would be read out as a link called pilcrow
        template_name="report",
        extra_template_basedirs=[str(Path(__file__).parent / "templates"), *templates],
        extra_template_paths=templates,
    )
    html, _ = exporter.from_notebook_node(notebook)
    soup = BeautifulSoup(html, "html.parser", multi_valued_attributes=None)
    _name_headings(soup, name)
    _list_contents(soup)
    for link in soup.find_all("a", href=_NOTEBOOK):
        link["href"] = f"notebooks/{link['href']}"
    _frame_wide(soup)
    for box in soup.select("input[type=checkbox]"):
        box.replace_with("\u2611 " if box.has_attr("checked") else "\u2610 ")
    faults = [*_unrendered(soup), *_images_without_words(soup), *_not_self_contained(soup)]
    if faults:
        raise ExportError("\n- ".join([f"{name} cannot be exported:", *faults]))
    return str(soup)


def _nbconvert_templates() -> list[str]:
    """Where nbconvert's own templates were installed; it looks for them only in this environment's
    prefix, and with --system-site-packages nbconvert may be in another."""
    files = importlib.metadata.files("nbconvert") or []
    return [
        str(Path(file.locate()).resolve().parents[1])
        for file in files
        if file.match("templates/base/null.j2")
    ]


def _name_headings(soup: BeautifulSoup, name: str) -> None:
    """The title from the first heading, and an id for every heading, as a link in the notebook
    would spell it.
    """
    first = soup.find("h1")
    assert soup.title is not None  # the template has one
    soup.title.string = first.get_text(" ", strip=True) if first else name
    for heading in soup.find_all(re.compile("^h[1-6]$")):
        heading["id"] = heading.get("id") or re.sub(r"\s+", "-", heading.get_text().strip())


def _list_contents(soup: BeautifulSoup) -> None:
    """Links to the sections, folded, under the first paragraph; none where they are few."""
    headings = soup.find_all("h2")
    if len(headings) < FEW_SECTIONS:
        return
    fold, words, nav, items = (soup.new_tag(tag) for tag in ("details", "summary", "nav", "ol"))
    words.string = "Contents"
    for heading in headings:
        item = soup.new_tag("li")
        item.append(soup.new_tag("a", href=f"#{heading['id']}", string=heading.get_text()))
        items.append(item)
    nav.append(items)
    fold.extend([words, nav])
    first = soup.find("p") or headings[0]
    first.insert_after(fold)


def _frame_wide(soup: BeautifulSoup) -> None:
    """Header cells say what they head; what is wide scrolls in its own frame, also by keyboard."""
    for number, table in enumerate(soup.find_all("table"), start=1):
        for cell in table.find_all("th"):
            if not cell.get_text(strip=True):
                cell.name = "td"
            elif not cell.has_attr("scope"):
                cell["scope"] = "col" if cell.find_parent("thead") else "row"
        caption = table.find("caption")
        _frame(soup, table, caption.get_text(" ", strip=True) if caption else f"Table {number}")
    for image in soup.select("img.figure"):
        _frame(soup, image, _caption(soup, image) or "Figure")


def _caption(soup: BeautifulSoup, image: Tag) -> str:
    """Its number, 'Figure 3', from the caption that the next output has, which becomes the figure's
    own; '' where there is none.
    """
    output = image.find_parent("div", class_="output")
    after = output.find_next_sibling() if output else None
    found = _CAPTION.match(after.get_text().strip()) if after else None
    if not (output and after and found):
        return ""
    output.name = "figure"
    output.attrs = {"id": found.group().lower().replace(" ", "-")}
    after.extract()
    caption = soup.new_tag("figcaption")
    caption.extend(after.p.contents[:] if after.p else [])
    output.append(caption)
    return found.group()


def _frame(soup: BeautifulSoup, wide: Tag, label: str) -> None:
    frame = {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": label}
    wide.wrap(soup.new_tag("div", attrs=frame))


def _unrendered(soup: BeautifulSoup) -> Iterator[str]:
    for number, output in enumerate(soup.select("div.output"), start=1):
        types = output.attrs.pop("data-types")
        if not (types == "stream" or output.get_text(strip=True) or output.find("img")):
            better = ", ".join(MIME_TYPES)
            yield f"output {number} ({types}) would be empty: give it one of {better}"


def _images_without_words(soup: BeautifulSoup) -> Iterator[str]:
    for number, image in enumerate(soup.find_all("img"), start=1):
        words = str(image.get("alt", "")).split()
        alt = " ".join(words)
        if len(words) < 3 or _EMPTY_ALT.fullmatch(alt.lower()):
            yield (
                f"image {number} has the alternative text {alt!r}: say what it shows, with"
                " display(figure, metadata={'image/png': {'alt': '...'}}) or ![what it"
                " shows](...)"
            )


def _not_self_contained(soup: BeautifulSoup) -> Iterator[str]:
    for tag in soup.find_all(True):
        start = str(tag)[:80]
        if tag.name in FORBIDDEN_TAGS:
            yield f"<{tag.name}> is not allowed: {start}"
        if tag.name == "style" and _LOADED.search(tag.get_text()):
            yield "a <style> loads something from elsewhere"
        for name, value in tag.attrs.items():
            fault = _attribute_fault(tag.name, name, str(value).strip())
            if fault:
                yield f"{fault} in <{tag.name}>: {start}"


def _attribute_fault(tag: str, name: str, text: str) -> str:
    """What is wrong with an attribute, '' if nothing is."""
    if _SCRIPT.match(f"{name}={text}"):
        return f"a script ({name})"
    inside = "data:" if name in LOADING_ATTRIBUTES else "#"
    loads = name in LOADING_ATTRIBUTES or (name == "href" and tag not in ("a", "area"))
    if loads and not text.startswith(inside):
        return f"{name}={text[:60]!r} is loaded from elsewhere"
    if name == "style" and _LOADED.search(text):
        return "a style that loads something from elsewhere"
    return ""
