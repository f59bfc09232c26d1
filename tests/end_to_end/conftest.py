"""Fixtures: a folder with a small recipe and its corpus, and a function that runs commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from commands import ddiff
from small import CORPUS, RECIPE

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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
