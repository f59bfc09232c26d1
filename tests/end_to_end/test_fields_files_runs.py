"""Runs of several fields trained on files: texts with vectors, and images with captions."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, is_refusal
from PIL import Image

COUNT = 30
# five words of two, so that the training texts contain all words
TEXTS = [" ".join(f"{number:05b}") for number in range(COUNT)]
MISSING = 3  # every third sample has no text

TAIL = """
[fields.text]
tokenizer = "words"
length = 6
process = "mdlm"
[fields.{name}]
process = "gaussian"
normalizer = "standard"
[denoiser]
kind = "mmdit"
width = 16
layers = 1
heads = 2
[objective.times]
kind = "mixture"
parts = [{{path = "shared"}}, {{path = "shared", clean = ["text"]}}]
[train]
steps = 2
batch = 4
[evaluate]
targets = ["joint", "{name} | text"]
[sample]
targets = ["joint", "{name} | text"]
count = 2
steps = 2
"""

VECTORS = """
name = "vectors"
plugins = ["dit", "mdlm", "gaussian"]
[data]
kind = "vector_shards"
path = "data"
held_out = 0.3
missing = "absent"
"""

IMAGES = """
name = "images"
plugins = ["dit", "mdlm", "gaussian"]
[data]
kind = "images"
path = "images"
size = [4, 4]
patch = 2
held_out = 0.3
"""


@pytest.fixture(autouse=True)
def _in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def write_vectors() -> None:
    Path("data/latent_shards").mkdir(parents=True)
    vectors = np.random.default_rng(0).normal(3.0, 2.0, (COUNT, 5)).astype(np.float32)
    np.save("data/latent_shards/shard_0000.npy", vectors)
    rows = []
    for number, text in enumerate(TEXTS):
        stored = None if number % MISSING == 0 else text
        rows.append(json.dumps({"text": stored, "shard": 0, "idx": number}))
    Path("data/train_data.jsonl").write_text("\n".join(rows))


def write_images() -> None:
    Path("images").mkdir()
    for number, text in enumerate(TEXTS):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"images/{number}.png")
        Path(f"images/{number}.txt").write_text(text)


def test_run_trains_on_texts_and_vectors_and_leaves_out_missing_texts(ddiff: Command) -> None:
    write_vectors()
    Path("vectors.toml").write_text(VECTORS + TAIL.format(name="latent"))
    result = ddiff("run", "vectors.toml")
    assert result.code == 0, result.err
    assert re.search(r"\d+ of \d+ training samples lack text", result.err)
    assert "lack latent" not in result.err
    assert "evaluating latent | text, shuffled" in result.err
    found = json.loads(Path("runs/vectors/evaluation.json").read_text())["targets"]
    lines = [json.loads(line) for line in Path("data/train_data.jsonl").read_text().splitlines()]
    assert sum(line["text"] is None for line in lines) == COUNT // MISSING
    for target in ("joint", "latent | text"):
        assert found[target]["samples"] > 0
        assert np.isfinite(found[target]["nats_per_sample"])
    # The vectors are computed from the texts: neither part of a bound is a likelihood.
    notes = {
        "text": "given its own latent: no likelihood of the text",
        "latent": "density of a function of text: no lower limit",
    }
    assert found["joint"]["notes"] == notes
    assert found["latent | text"]["notes"] == {"latent": notes["latent"]}
    assert f"per token, {notes['text']}" in result.out
    samples = Path("runs/vectors/samples.jsonl").read_text().splitlines()
    assert len(samples) == 4


def test_run_trains_on_images_with_captions_and_draws_pictures(ddiff: Command) -> None:
    write_images()
    Path("images.toml").write_text(IMAGES + TAIL.format(name="image"))
    assert ddiff("run", "images.toml", "--dry-run").code == 0
    result = ddiff("run", "images.toml")
    assert result.code == 0, result.err
    pictures = list(Path("runs/images").glob("*.png"))
    assert len(pictures) == 2
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()


def test_unreadable_image_is_refused_before_the_run_directory_is_written(ddiff: Command) -> None:
    write_images()
    Path("images/7.png").write_text("not an image")
    Path("images.toml").write_text(IMAGES + TAIL.format(name="image"))
    assert is_refusal(ddiff("run", "images.toml"), "[data]", "images/7.png cannot be read")
    assert not Path("runs").exists()


def test_missing_shard_is_refused_by_a_dry_run(ddiff: Command) -> None:
    write_vectors()
    Path("data/latent_shards/shard_0000.npy").unlink()
    Path("vectors.toml").write_text(VECTORS + TAIL.format(name="latent"))
    assert is_refusal(ddiff("run", "vectors.toml", "--dry-run"), "[data]", "shard_NNNN.npy")
