"""examples/own_hierarchy.py trains a shipped recipe on a tree of tokens written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import EXAMPLES, run_python

TINY = (
    "data.kind=text",
    'data.files=["*.txt"]',
    "denoiser.width=32",
    "denoiser.heads=2",
    "denoiser.layers=1",
    "train.steps=6",
    "train.batch=8",
    "sample.steps=4",
    "sample.count=2",
)


@pytest.mark.slow
def test_example_own_hierarchy_trains_evaluates_and_samples(tmp_path: Path) -> None:
    names = [
        "Anne",
        "Catherine",
        "Eleanor",
        "Henry",
        "Isabella",
        "James",
        "John",
        "Maria",
        "Richard",
        "Sarah",
    ]
    for number, name in enumerate(names):
        sentences = [
            f"{name} walked to the village with {other}, and it rained."
            for other in names
            if other != name
        ]
        (tmp_path / f"{number}.txt").write_text(" ".join(sentences))
    settings = [*TINY, 'data.validation=["0.txt"]', 'data.files=["[1-9].txt"]']
    printed = run_python(str(EXAMPLES / "own_hierarchy.py"), *settings, folder=tmp_path)
    assert "nats per token of a sentence" in printed
    evaluation = json.loads((tmp_path / "runs/own_hierarchy/evaluation.json").read_text())
    levels = [name for name in evaluation["parts_nats_per_token"] if name.startswith("level")]
    assert levels == ["level1", "level2", "level3"]  # finer groups, coarser groups, the mask
    environment = json.loads((tmp_path / "runs/own_hierarchy/environment.json").read_text())
    assert environment["given"].keys() == {"vocabulary", "process"}
