"""Small base recipes for reproducing faults, which train in seconds on one core."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ddiff.cli import main

BASE = """
name = "t"
extends = "mdlm_small"
[data]
kind = "bundled"
length = 32
[tokenizer]
kind = "bpe"
size = 300
[denoiser]
kind = "dit"
width = 32
layers = 1
heads = 2
time = false
head = "tokens"
[train]
steps = 4
batch = 8
warmup = 1
optimizer = "adamw"
checkpoint_every = 2
[evaluate]
batch = 32
rows = 32
[sample]
steps = 4
count = 2
"""
LINES = 'data={kind="text", files=["corp/a.txt"], split="line", length=32}'
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "dog",
    "ran",
    "to",
    "old",
    "red",
    "house",
    "by",
    "sea",
    "hat",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corp").mkdir()
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for _ in range(400)]
    (tmp_path / "corp/a.txt").write_text("\n".join(lines))
    (tmp_path / "base.toml").write_text(BASE)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["--set", LINES]], ids=["base", "txt"])
def test_base_recipe_trains_evaluates_and_samples(folder: Path, settings: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "base.toml", *settings])
    evaluation = json.loads((folder / "runs/t/evaluation.json").read_text())
    assert 0 < evaluation["nelbo_nats_per_token"] < 8
    assert len((folder / "runs/t/samples.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("settings", [[], ["--set", LINES]], ids=["base", "txt"])
def test_dry_run_of_base_recipes_writes_no_file(folder: Path, settings: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["run", "base.toml", "--dry-run", *settings])
    assert sorted(path.name for path in folder.iterdir()) == ["base.toml", "corp"]
