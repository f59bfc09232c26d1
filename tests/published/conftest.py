"""Fixtures: an empty working folder, and a command runner."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

from commands import ddiff

__all__ = ["ddiff"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder with a separate cache."""
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return Path.cwd()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
