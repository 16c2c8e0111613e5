"""The notebooks' sources: readable, runnable anywhere, and with something for nbval to compare.

python tests/repository/test_notebooks.py notebooks/01_hooks.ipynb           # run on `smoke`, store the compared cells anew
python tests/repository/test_notebooks.py --strip notebooks/01_hooks.ipynb   # take away what other cells hold
"""

import ast
import os
import re
import sys
from pathlib import Path

import house
import nbformat
import pytest
from nbval.plugin import find_metadata_tags

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
TAUGHT = ("01", "02", "03", "04", "05", "06")  # have exercises
EXERCISE = re.compile(r"^\*\*(\d)\. ", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
COMPARED = "nbval-check-output"  # as nbval spells it in tags; in comments it is another word
KEPT = "keep_output"  # nbstripout's word for the same cells
MOST_LINES = 15
# /home/..., C:\..., ~/...: a path that exists on one machine only
ABSOLUTE = re.compile(
    r"""(?:^|[\s"'(=])(?:/(?:home|root|tmp|work|mnt|usr|Users|data|content)/|[A-Z]:\\|~/)"""
)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_it_is_valid_and_names_the_common_kernel(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata.get("execution") for cell in notebook.cells), (
        "times of one execution"
    )
    assert "papermill" not in notebook.metadata


def test_it_opens_with_a_question(notebook):
    title = notebook.cells[0].source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")
    assert len(notebook.cells[0].source.splitlines()) > 2, "no word of what and why"


def test_one_cell_of_parameters_with_working_defaults(notebook, monkeypatch):
    (cell,) = [cell for cell in code_of(notebook) if "parameters" in tags(cell)]
    monkeypatch.delenv("LATLIB_PROFILE", raising=False)
    found = {}
    exec(cell.source, found)
    assert found["profile"] == "tiny" and found["out"] is None
    monkeypatch.setenv("LATLIB_PROFILE", "smoke")
    exec(cell.source, found)
    assert found["profile"] == "smoke"


def test_nbval_has_something_to_compare_and_nothing_else_is_stored(notebook):
    compared = [cell for cell in code_of(notebook) if COMPARED in tags(cell)]
    assert compared, "nbval would compare nothing"
    for cell in compared:
        options = dict(find_metadata_tags(cell.metadata))
        assert options == {"check": True}, "nbval passes over a tag that it does not know"
        assert KEPT in tags(cell), "nbstripout would take what nbval compares"
        assert cell.outputs and cell.execution_count, "nbval skips a cell without output or count"
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs)
    for cell in code_of(notebook):
        assert cell in compared or not (cell.outputs or cell.execution_count), cell.source


def test_cells_are_short_and_define_nothing(notebook):
    for cell in code_of(notebook):
        assert len(cell.source.splitlines()) <= MOST_LINES, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef), (
                cell.source
            )


def test_imports_are_folded(notebook):
    """In JupyterLab; the reader came for what follows."""
    for cell in code_of(notebook):
        body = ast.parse(cell.source).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        if 2 * len(imports) > len(body) and len(imports) > 1:
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), cell.source


def test_every_cell_of_code_stands_under_a_line_of_narrative(notebook):
    kinds = [cell.cell_type for cell in notebook.cells]
    for before, (cell, kind) in zip(kinds, list(zip(notebook.cells, kinds))[1:]):
        assert kind == "markdown" or before == "markdown", cell.source
    assert kinds[-1] == "markdown" or "hide-input" in tags(notebook.cells[-1]), (
        "the last cell says nothing to look for"
    )


def test_it_checks_something(notebook):
    asserts = [
        n
        for cell in code_of(notebook)
        for n in ast.walk(ast.parse(cell.source))
        if isinstance(n, ast.Assert)
    ]
    assert asserts, "a notebook without an assertion passes whatever it computes"


def test_it_runs_anywhere(notebook):
    for cell in notebook.cells:
        assert not ABSOLUTE.search(cell.source), cell.source
    for cell in code_of(notebook):
        assert "chdir" not in cell.source and not re.search(
            r"^\s*[!%]", cell.source, re.MULTILINE
        ), cell.source


def test_what_it_imports_stands_where_it_says(notebook):
    latlib = house.read_sources(NOTEBOOKS[0].parents[1] / "latlib")
    names = {name for cell in code_of(notebook) for name in house.names_imported(cell.source)}
    assert names and not {name for name in names if not house.exists(latlib, name)}


def test_links_lead_somewhere(notebook):
    for cell in notebook.cells:
        for link in LINK.findall(cell.source) if cell.cell_type == "markdown" else ():
            assert (NOTEBOOKS[0].parent / link).exists(), link


@pytest.mark.parametrize(
    "path", [p for p in NOTEBOOKS if p.stem[:2] in TAUGHT], ids=lambda p: p.stem
)
def test_exercises_have_code_and_a_folded_answer(path):
    latlib = house.read_sources(path.parents[1] / "latlib")
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"]
    assert sum("## Exercises" in source for source in cells) == 1
    exercises = [source for source in cells if EXERCISE.search(source)]
    assert [EXERCISE.search(source)[1] for source in exercises] == ["1", "2", "3"][: len(exercises)]
    assert len(exercises) >= 2, "a reader learns by trying"
    for source in exercises:
        (code,) = re.findall(r"```python\n(.*?)```", source, re.DOTALL)
        assert {n for n in house.names_imported(code) if not house.exists(latlib, n)} == set()
        answer = source.partition("```\n\n<details><summary>Answer</summary>\n\n")[2]
        assert answer.endswith("\n\n</details>"), "blank lines, or it is not read as Markdown"
    assert "Next: [" in cells[-1]


def test_every_figure_has_an_alternative_text(notebook):
    for cell in code_of(notebook):
        assert "plt.show" not in cell.source, "show(figure, alt) instead"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show":
                starred = any(isinstance(argument, ast.Starred) for argument in node.args)
                assert (
                    starred or len(node.args) == 2 or any(k.arg == "alt" for k in node.keywords)
                ), cell.source


def store(path: Path) -> None:
    """Run a notebook on `smoke` and keep the outputs of its compared cells, and of no other."""
    from nbclient import NotebookClient

    os.environ |= {"LATLIB_PROFILE": "smoke", "LATLIB_BATCH": "1"}
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    strip(notebook)
    nbformat.write(notebook, path)


def strip(notebook) -> None:
    """Take from every other cell what an execution left in it."""
    for cell in code_of(notebook):
        cell.metadata.pop("execution", None)
        if COMPARED not in tags(cell):
            cell.outputs = []
            cell.execution_count = None
    notebook.metadata.language_info = {"name": "python"}


def main(arguments: list[str]) -> None:
    """Store the named notebooks' compared cells anew, or with --strip only take away the rest."""
    for name in arguments:
        path = Path(name).resolve()
        if "--strip" not in arguments:
            store(path)
        elif name != "--strip":
            notebook = nbformat.read(path, as_version=4)
            before = nbformat.writes(notebook)
            strip(notebook)
            if nbformat.writes(notebook) != before:
                nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
