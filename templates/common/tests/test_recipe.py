"""The recipe of the plugin trains, evaluates and samples, and its run can be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import ddiff

PACKAGE = Path(__file__).parents[1]
RECIPE = "plugin_name.toml"
SHORT = ("train.steps=2", "train.batch=4", "evaluate.draws=1", "sample.steps=4", "sample.count=2")


def test_recipe_trains_and_its_run_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the run and the cache are written into a copy of the package
    folder = tmp_path / "package"
    shutil.copytree(PACKAGE, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    trained = ddiff.run(RECIPE, settings=SHORT)
    assert trained.step == 2
    loaded = ddiff.load("runs/plugin_name")
    assert len(loaded.sample(3)) == 3
