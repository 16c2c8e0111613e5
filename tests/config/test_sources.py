"""Every value of a shipped profile says where it is from, and what it names is in docs/sources.md."""

import ast
import re

import pytest
import yaml

from latlib.config.profile import find_share

PROFILES = sorted(find_share("profiles").glob("*.yaml"))
MARK = re.compile(r"\[(our choice|LAT|Casper|Abbas|Arditi|GCG|circuit breakers|replication)\]")
WITHOUT = ("name", "description")  # they name the profile


def unmarked(text: str) -> list[str]:
    """The dotted names of values without a mark on their line or on the line of a section around
    them.
    """
    lines = text.splitlines()
    found = []

    def marked(*nodes) -> bool:
        own = {node.start_mark.line for node in nodes}
        return any(MARK.search(lines[number].partition("#")[2]) for number in own)

    def walk(node, path) -> None:
        for key, value in node.value:
            name = (*path, key.value)
            if name[0] in WITHOUT or marked(key):
                continue
            if isinstance(value, yaml.MappingNode):
                walk(value, name)
            elif not marked(key, value):
                found.append(".".join(name))

    walk(yaml.compose(text), ())
    return found


@pytest.mark.parametrize(
    "text, names",
    [
        ("a: 1", ["a"]),
        ("a: 1  # [our choice]", []),
        ("name: x\ndescription: y", []),
        ("a: [1]  # our choice", ["a"]),
        ("a:  # [LAT]\n  b: 1\n  c: {d: 2}", []),
        ("a:\n  b: 1\n  c: {d: 2}  # [LAT]\n  e: 3  # [X1]", ["a.b", "a.e"]),
        ("a:\n  - 1\n  - 2\nb: 1  # [LAT]", ["a"]),
        ("# [our choice] all of it\na: 1", ["a"]),
    ],
)
def test_a_value_without_a_mark_is_seen(text, names):
    assert unmarked(text) == names


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_value_of_a_profile_says_where_it_is_from(path):
    assert not unmarked(path.read_text())


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_the_marks_of_a_profile_are_explained_at_its_top(path):
    text = path.read_text()
    legend = text[: re.search(r"\n(name|part_of):", text).start()]
    used = set(MARK.findall(text))
    assert used and used <= set(MARK.findall(legend))


def test_what_is_cited_is_there(root):
    """Anchors of docs/sources.md, wherever they are cited, are headings of it."""
    page = (root / "docs" / "sources.md").read_text()
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    files = [*PROFILES, *(root / "latlib").rglob("*.py"), *(root / "docs").glob("*.md")]
    cited = set(re.findall(r"\]\(#([\w-]+)\)", page))
    for file in files:
        cited |= set(re.findall(r"sources\.md#([\w-]+)", file.read_text(encoding="utf-8")))
    assert len(cited) > 5 and cited <= anchors


SOURCE = re.compile(r"our choice|et al\. \d{4}", re.IGNORECASE)


def without_source(source: str) -> list[str]:
    """Defaults of sections whose comment names no source, in classes whose docstring names none."""
    lines = source.splitlines()
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or SOURCE.search(ast.get_docstring(node) or ""):
            continue
        above = ""  # one comment may be about several lines, until a blank line or another comment
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or field.value is None:
                continue
            first = field.lineno - 1
            comment = [lines[i].partition("#")[2] for i in range(first, field.end_lineno)]
            while lines[first - 1].strip().startswith("#"):
                first -= 1
                comment.insert(0, lines[first])
            said = " ".join(part.strip(" #") for part in comment if part)
            above = said or above
            if not SOURCE.search(above) and not isinstance(field.value, ast.Call):
                found.append(f"{node.name}.{field.target.id}")
    return found


def test_a_default_without_a_source_is_seen():
    text = '''
class A(Section):
    """Settings."""

    a: int = 1  # our choice
    # of something. Zou et al. 2023
    b: int = 2
    c: int = 3  # steps
    d: Other = Other()


class B(Section):
    """All of it is our choice."""

    a: int = 1
'''
    assert without_source(text) == ["A.c"]


def test_every_default_of_a_section_says_where_it_is_from(root):
    assert not without_source((root / "latlib" / "config" / "sections.py").read_text())
