"""All snippets of the tutorial run, in the order of each page, with small settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tutorial_pages import TUTORIAL, TutorialPage, forget_modules_in

import ddiff

SMALL = [
    "train.steps=2",
    "train.batch=4",
    "train.warmup=1",
    "denoiser.width=16",
    "denoiser.heads=2",
    "denoiser.layers=1",
    "evaluate.draws=1",
    "evaluate.batch=1024",
    "sample.steps=2",
    "sample.count=2",
]
"""Settings with which a page takes seconds. A later `train.steps` of a page is overridden, too."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    yield tmp_path
    forget_modules_in(tmp_path)


def test_tutorial_has_the_tested_pages() -> None:
    pages = {path.stem for path in TUTORIAL.glob("*.md")}
    assert pages == {"run", "own_text", "own_hierarchy", "own_process"}


@pytest.mark.slow
def test_snippets_of_the_first_step_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = TutorialPage("run", SMALL, monkeypatch).execute()
    assert len(names["names"]) == 8
    assert names["run"].step == 2
    assert (folder / "names.html").stat().st_size > 10_000


@pytest.mark.slow
def test_snippets_of_own_text_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [*SMALL, 'data.files=["texts/a*.txt"]', "data.held_out=0.3", "tokenizer.size=300"]
    page = TutorialPage("own_text", small, monkeypatch)
    page.execute()
    assert page.commands == 6
    assert ddiff.load("runs/own_text").step == 2


@pytest.mark.slow
def test_snippets_of_own_hierarchy_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = TutorialPage("own_hierarchy", SMALL, monkeypatch).execute()
    assert names["vocabulary"].level_sizes == (27, 4, 2, 1)
    assert ddiff.load("runs/names_tree").vocabulary.level_sizes == (27, 3, 1)
    # the same rows without a tree, so that `ddiff compare` compares bounds of the same text
    assert ddiff.load("runs/names_small").vocabulary.level_sizes == (27, 1)


@pytest.mark.slow
def test_snippets_of_own_process_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = TutorialPage("own_process", SMALL, monkeypatch).execute()
    assert len(names["reports"]) > 20
    printed = capsys.readouterr().out
    assert "sums" in printed or "sum to 0" in printed  # the refused rate matrix
    assert (folder / "runs" / "sounds" / "evaluation.json").exists()
