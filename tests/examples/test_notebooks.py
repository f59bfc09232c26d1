"""The notebooks run with a short training, and were committed with their outputs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from scripts import EXAMPLES

sys.path.insert(0, str(EXAMPLES.parent / "docs" / "site"))

from write_notebooks import drop_machine, execute_notebook, read_notebook

NOTEBOOKS = sorted((EXAMPLES.parent / "notebooks").glob("*.ipynb"))
LONG = "steps = 150\n"
LARGEST = 60_000
"""Largest size of a file in bytes, with its outputs."""


def list_outputs(notebook) -> list[list[str]]:
    """Return the types of the outputs of each code cell."""
    return [
        [output.output_type for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_there_are_three_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_run", "own_hierarchy", "two_samplers"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_has_a_picture(path: Path) -> None:
    notebook = read_notebook(path)
    assert path.stat().st_size < LARGEST
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    before = path.read_text(encoding="utf-8")
    drop_machine(notebook)
    assert "/tmp/" not in before
    assert [list_outputs(notebook)] == [list_outputs(read_notebook(path))]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_has_the_kinds_of_outputs_of_its_file(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = read_notebook(path)
    committed = list_outputs(notebook)
    changed = 0
    for cell in notebook.cells:
        changed += cell.source.count(LONG)
        cell.source = cell.source.replace(LONG, "steps = 2\n")
    assert changed == 1
    execute_notebook(notebook, tmp_path)
    drop_machine(notebook)
    assert list_outputs(notebook) == committed
