"""The plugin of docs/fields.md with a new kind of field: one file, installed and trained."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

import ddiff
from ddiff.cli import main

ROOT = Path(__file__).parents[2]
SMALLER = {
    'data = "tones"': 'data = {kind = "tones", train = 40, validation = 8}',
    "width = 64": "width = 16",
    "steps = 500": "steps = 2",
    "batch = 32": "batch = 4",
    "count = 8": "count = 2",
    "steps = 32": "steps = 2",
}


def read_block(beginning: str) -> str:
    """Return the indented block of docs/fields.md that begins with `beginning`."""
    page = (ROOT / "docs" / "fields.md").read_text(encoding="utf-8")
    found = re.search(rf"^    {re.escape(beginning)}.*?(?=^\S)", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    return dedent(found[0])


@pytest.fixture
def _installed(distribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = read_block('"""ddiff_tones.py')
    project = tomllib.loads(read_block("[build-system]"))
    assert project["tool"]["setuptools"] == {"py-modules": ["ddiff_tones"]}
    entry = project["project"]["entry-points"]["ddiff"]
    assert entry == {"tones": "ddiff_tones"}
    distribution("tones-dist", "1.0", entry, {"ddiff_tones": code})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    recipe = read_block('name = "tones"\n    plugins')
    for large, small in SMALLER.items():
        assert large in recipe
        recipe = recipe.replace(large, small)
    Path("tones.toml").write_text(recipe)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


@pytest.mark.usefixtures("_installed")
def test_field_in_one_file_trains_evaluates_and_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("run", "tones.toml", "--dry-run") == 0, capsys.readouterr().err
    assert run("run", "tones.toml") == 0, capsys.readouterr().err
    found = json.loads(Path("runs/tones/evaluation.json").read_text())["targets"]
    assert found["sound | text"]["fields"].keys() == {"sound"}
    run_of_tones = ddiff.load("runs/tones")
    samples = run_of_tones.sample(2, "sound | text", given={"text": "low"})
    for sample in samples:
        assert sample["fields"]["text"]["text"] == "low"
        assert np.shape(sample["fields"]["sound"]["vectors"]) == (16, 8)
