"""The snippets of docs/finetuning.md run in the order of the page, with small settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tutorial_pages import TutorialPage

import ddiff

SMALL = ["train.steps=2", "train.batch=4", "train.warmup=1", "denoiser.width=16", "sample.count=1"]


@pytest.mark.slow
def test_snippets_of_the_page_on_fine_tuning_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    page = TutorialPage("finetuning", SMALL, monkeypatch)
    names = page.execute()
    assert page.commands == 3
    assert names["run"].step == 2
    assert '"message": "Which number is larger, 12 or 5?"' in capsys.readouterr().out
    assert ddiff.load("numbers_hf").step == 2
