"""docs/performance.md says what the committed measurements say."""

import sys

import pytest

from latlib.fused.llama import LEAN_LIMIT


@pytest.fixture
def document(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import document

    yield document
    sys.modules.pop("document")


def test_the_page_is_written_from_the_results(document):
    assert document.PAGE.read_text(encoding="utf-8") == document.page(), (
        "run: python benchmarks/document.py"
    )


def test_a_figure_of_the_page_follows_its_measurement(document, monkeypatch):
    read = document.read

    def slower(name):
        found = read(name)
        if name == "tiny-before":
            found["01_hooks"] = 12345.0
        return found

    monkeypatch.setattr(document, "read", slower)
    assert "| 01_hooks | 12345 |" in document.page()


def test_what_is_not_measured_is_said(document, monkeypatch, tmp_path):
    monkeypatch.setattr(document, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="lat_step-cpu.json: run the benchmark"):
        document.read("lat_step-cpu")
    assert "no scaling-cpu.json in" in document.part(document._growth, "scaling-cpu")


def test_the_lean_forward_is_taken_only_where_it_was_measured_to_be_faster(document):
    found = document.read("lean-cpu")["results"]
    faster = [record["parameters"] for record in found if record["stock_on_lean"] > 1]
    slower = [record["parameters"] for record in found if record["stock_on_lean"] <= 1]
    assert max(faster) <= LEAN_LIMIT < 1.01 * max(faster)
    assert all(size > LEAN_LIMIT for size in slower)
