"""Fixtures: a folder with a small recipe, a folder with trained runs, and a command runner."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import labelled as labels
from commands import ddiff
from small import CORPUS, RECIPE, working_in

import ddiff as api
from ddiff.runs.run import Run

__all__ = ["ddiff"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder with the recipe, its corpus and a separate cache."""
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    Path("small.toml").write_text(RECIPE)
    Path("corpus.txt").write_text(CORPUS)
    return Path.cwd()


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three trained runs: `labelled` on labels, `styled` on vectors, and `small`.

    The runs serve all tests of samples and of edits. A test that trains another run in this folder
    gives the run another name.
    """
    folder = tmp_path_factory.mktemp("requests")
    with working_in(folder):
        Path("rows.jsonl").write_text(labels.rows(400))
        Path("labelled.toml").write_text(labels.RECIPE)
        api.run("labelled.toml")
        lines = [
            json.loads(line) | {"style": [0.5, float(number % 3)]}
            for number, line in enumerate(labels.rows(60).splitlines())
        ]
        Path("styled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        styled = labels.RECIPE.replace("rows.jsonl", "styled.jsonl")
        styled = styled.replace('"labelled"', '"styled"')
        styled = styled.replace('labels = ["kind"]', 'vectors = ["style"]')
        styled = styled.replace("kind = { classes = 2,", "style = { width = 2,")
        Path("styled.toml").write_text(styled)
        api.run("styled.toml", settings=["train.steps=2"])
        api.run("small.toml", settings=["train.steps=4", "data.length=24"])
    return folder


@pytest.fixture(scope="module")
def place(trained_runs: Path) -> Iterator[Path]:
    """Change to the folder of `trained_runs` while the tests of a module run."""
    with working_in(trained_runs):
        yield trained_runs


@pytest.fixture(scope="module")
def labelled(place: Path) -> Run:
    return api.load(place / "runs/labelled")


@pytest.fixture(scope="module")
def small(place: Path) -> Run:
    return api.load(place / "runs/small")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
