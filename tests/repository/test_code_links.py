"""Links from pages to lines of code: each goes to where the name that it shows is defined.

    [`pgd`](../latlib/attack.py#L65)
    [`ADAM_LR`](../latlib/threat.py#L24) = `1e-3`     # the value, too

python tests/repository/test_code_links.py    # write lines and values as they are now
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(
    r"\[`(?P<name>[A-Za-z_][\w.]*)`\]\((?P<path>[\w./]+\.py)#L(?P<line>\d+)\)"
    r"(?P<equals>\s+=\s+`(?P<value>[^`]+)`)?"
)
ANY_LINK = re.compile(r"\]\((?!https?:)[^)\s]*\.py#L")


@cache
def definitions(file: Path) -> dict[str, tuple[int, str | None]]:
    """Dotted name -> (its line, the text of its value if it has one), of functions, classes and
    assignments of a module and of its classes."""
    source = file.read_text("utf-8")
    found = {}

    def note(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[prefix + node.name] = (node.lineno, None)
            if isinstance(node, ast.ClassDef):
                note(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for name, value in assigned(target, node.value):
                        text = ast.get_source_segment(source, value)
                        found[prefix + name] = (target.lineno, text)

    note(ast.parse(source).body, "")
    return found


def assigned(target, value):
    """(name, value) pairs of an assignment, one by one where both sides are tuples."""
    if isinstance(target, ast.Name):
        return [(target.id, value)]
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=True)
        return [(name.id, own) for name, own in pairs if isinstance(name, ast.Name)]
    return []


def repaired(text: str, folder: Path) -> str:
    """The page with every link's line, and the value beside it, as the code has them now.

    Raises ValueError for a name that is not defined there."""

    def replacement(link):
        file = (folder / link["path"]).resolve()
        if not file.is_file():
            raise ValueError(f"{link[0]}: there is no {link['path']}")
        known = definitions(file)
        if link["name"] not in known:
            raise ValueError(f"{link[0]}: {link['path']} defines no {link['name']}")
        line, value = known[link["name"]]
        shown = f"[`{link['name']}`]({link['path']}#L{line})"
        if not link["equals"]:
            return shown
        if value is None:
            raise ValueError(f"{link[0]}: {link['name']} has no value")
        return shown + link["equals"].replace(f"`{link['value']}`", f"`{value}`")

    return LINK.sub(replacement, text)


def test_a_link_that_drifted_is_put_right(tmp_path):
    (tmp_path / "code.py").write_text(
        "A, B = 0.5, 14 / 32\n\n\nclass C:\n    d: int = 3\n\n    @property\n    def e(self): ...\n"
    )
    page = "[`B`](code.py#L9) = `7`, [`C.d`](code.py#L5) = `3`, [`C.e`](code.py#L1), [x](code.py)"
    right = repaired(page, tmp_path)
    assert right == (
        "[`B`](code.py#L1) = `14 / 32`, [`C.d`](code.py#L5) = `3`, [`C.e`](code.py#L8), [x](code.py)"
    )
    assert repaired(right, tmp_path) == right
    for broken in ("[`F`](code.py#L1)", "[`A`](gone.py#L1)", "[`C`](code.py#L4) = `1`"):
        with pytest.raises(ValueError, match=re.escape(broken)):
            repaired(broken, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_what_they_name(page):
    text = page.read_text("utf-8")
    assert len(ANY_LINK.findall(text)) == len(LINK.findall(text)), (
        "a link to a line of code shows the name that is defined there: [`pgd`](...#L65)"
    )
    assert text == repaired(text, page.parent), "python tests/repository/test_code_links.py"


def test_the_method_is_linked_to_its_code():
    text = (ROOT / "docs/method.md").read_text("utf-8")
    for core in ("attack", "losses", "objectives", "train", "hooks", "threat"):
        assert f"](../latlib/{core}.py#L" in text, core


def main() -> None:
    """Write lines and values of every page as they are now."""
    for page in PAGES:
        text = page.read_text("utf-8")
        right = repaired(text, page.parent)
        if right != text:
            page.write_text(right, "utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
