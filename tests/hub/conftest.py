"""Fixtures: saved models of several kinds of runs, and a command runner."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "end_to_end"))

from commands import ddiff
from saved_runs import RUNS, SHORT
from small import working_in

import ddiff as api

__all__ = ["ddiff"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run `runs/NAME` and its saved model `saved/NAME` for each name of RUNS."""
    folder = tmp_path_factory.mktemp("saved")
    with working_in(folder):
        for name, settings in RUNS.items():
            run = api.run("small.toml", settings=[*SHORT, *settings, f'name="{name}"'])
            run.save_pretrained(folder / "saved" / name)
    return folder


@pytest.fixture
def place(saved: Path) -> Iterator[Path]:
    """Change to the folder of `saved`."""
    with working_in(saved):
        yield saved


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
