"""The pages for people: what they name exists."""

import re
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).resolve().parents[2]
LATLIB = house.read_sources(ROOT / "latlib")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.exists()]

# Ours when they begin so; a page may name files of other people's repositories, too.
OURS = ("latlib/", "tests/", "docs/", "profiles/", "notebooks/", "benchmarks/", "results/")


def files_named(text: str) -> set[str]:
    """Files and folders of the repository that stand in code or behind a link."""
    quoted = re.findall(r"`([^`\s]+)`", text)
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    return {name for name in quoted if name.startswith(OURS) and "*" not in name} | set(linked)


def modules_named(text: str) -> set[str]:
    """Dotted names below latlib; a name of a thing in a module goes on behind the module's."""
    return set(re.findall(r"(?<![/\w])latlib(?:\.[A-Za-z_]\w*)+", text))


def names_imported(text: str) -> set[str]:
    """Dotted names that the Python blocks of a page import from latlib."""
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {name for block in blocks for name in house.names_imported(block)}


def test_what_is_looked_for_is_found():
    text = (
        "`latlib/attack.py`, `other/repo.py`, [here](docs/a.md#b), [there](https://a.b/c.md),"
        " `python -m latlib.report.claims`\n```python\nfrom latlib.hooks import LATHook, Nothing\n```\n"
    )
    assert files_named(text) == {"latlib/attack.py", "docs/a.md"}
    assert modules_named(text) == {"latlib.report.claims", "latlib.hooks"}
    assert names_imported(text) == {"latlib.hooks.LATHook", "latlib.hooks.Nothing"}
    assert house.exists(LATLIB, "latlib.report.claims") and house.exists(
        LATLIB, "latlib.hooks.LATHook"
    )
    assert not house.exists(LATLIB, "latlib.hooks.Nothing") and not house.exists(
        LATLIB, "latlib.nothing.more"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text("utf-8")
    folders = (ROOT, page.parent)
    named = set() if page.stem == "sources" else files_named(text)  # that page names others' files
    missing = {f for f in named if not any((folder / f).exists() for folder in folders)}
    assert not missing, sorted(missing)
    unknown = {
        name
        for name in modules_named(text) | names_imported(text)
        if not house.exists(LATLIB, name)
    }
    assert not unknown, sorted(unknown)


def test_every_package_has_a_line_in_the_readme():
    """The map of the house."""
    text = (ROOT / "README.md").read_text("utf-8")
    packages = {p.parent.name for p in (ROOT / "latlib").glob("*/__init__.py")}
    missing = {p for p in packages if not re.search(rf"^\| `{p}/`", text, re.MULTILINE)}
    assert packages and not missing, sorted(missing)
