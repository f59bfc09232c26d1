"""Data sets of fields from files as recipe components: keys, previews and parts of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ddiff_core.fields_files import (
    EncodedTexts,
    Images,
    ImageTables,
    TokenGrids,
    VectorFiles,
    VectorShards,
)
from hash_encoder import run_job
from PIL import Image
from previews import build_previewed
from pydantic import ValidationError

from ddiff.data.documents import read_text_files
from ddiff.recipe.resolve import parse_recipe
from ddiff.runs.fields.data import RunFields

COUNT = 30
TEXTS = [f"{first} {second}" for first in "abcdef" for second in "vwxyz"]
IMAGES = {"size": (4, 4), "colour": "grey", "patch": 2, "held_out": 0.3}

RECIPE = """
name = "paired"
plugins = ["core", "dit", "mdlm", "gaussian"]
[data]
kind = "vector_files"
path = "{path}"
held_out = 0.3
[fields.text]
tokenizer = "words"
length = 3
process = "mdlm"
[fields.latent]
process = "gaussian"
normalizer = "standard"
[denoiser]
kind = "mmdit"
[train]
steps = 2
batch = 8
"""


def write_vector_files(folder: Path) -> dict[str, Any]:
    (folder / "latents" / "train").mkdir(parents=True)
    rows = []
    for number, text in enumerate(TEXTS):
        path = f"latents/train/{number}.npy"
        np.save(folder / path, np.full((1, 5), number, np.float32))
        rows.append({"text": text, "latent_path": path})
    (folder / "train_data.json").write_text(json.dumps(rows))
    return {"path": str(folder), "held_out": 0.3}


def write_vector_shards(folder: Path) -> dict[str, Any]:
    (folder / "latent_shards").mkdir()
    np.save(folder / "latent_shards" / "shard_0000.npy", np.zeros((COUNT, 2, 5), np.float32))
    rows = [{"text": text, "shard": 0, "idx": number} for number, text in enumerate(TEXTS)]
    (folder / "train_data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(folder), "held_out": 0.3}


def write_encoded(folder: Path) -> dict[str, Any]:
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    files = [str(folder / "texts.txt")]
    documents = read_text_files(files, held_out=0.3, split="line")
    run_job(folder / "vectors", documents=documents)
    keys = {"files": files, "held_out": 0.3, "split": "line"}
    return {"vectors": str(folder / "vectors"), **keys}


def write_images(folder: Path) -> dict[str, Any]:
    for number, text in enumerate(TEXTS):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    return {"path": str(folder), **IMAGES}


def write_levels(folder: Path) -> dict[str, Any]:
    keys = write_images(folder)
    del keys["patch"]
    return {**keys, "values": "levels", "levels": 4}


def write_image_table(folder: Path) -> dict[str, Any]:
    write_images(folder)
    rows = []
    for number, text in enumerate(TEXTS):
        rows.append({"image": (folder / f"{number}.png").read_bytes(), "caption": text})
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    return {"files": [str(folder / "images.parquet")], **IMAGES}


def write_grids(folder: Path) -> dict[str, Any]:
    np.save(folder / "ids.npy", np.arange(COUNT * 4).reshape(COUNT, 4))
    (folder / "captions.txt").write_text("\n".join(TEXTS))
    paths = {"ids": str(folder / "ids.npy"), "captions": str(folder / "captions.txt")}
    return {**paths, "num_tokens": COUNT * 4, "size": (2, 2), "held_out": 0.3}


@pytest.mark.parametrize(
    ("component", "write"),
    [
        (VectorFiles, write_vector_files),
        (VectorShards, write_vector_shards),
        (EncodedTexts, write_encoded),
        (Images, write_images),
        (Images, write_levels),
        (ImageTables, write_image_table),
        (TokenGrids, write_grids),
    ],
)
def test_preview_describes_the_columns_that_build_returns(
    tmp_path: Path, component: Any, write: Any
) -> None:
    found = build_previewed(component, write(tmp_path))
    assert len(found.train) + len(found.validation) == COUNT


@pytest.mark.parametrize(
    ("component", "keys", "part"),
    [
        (Images, {"path": ".", "size": (4, 4)}, "needs the key patch"),
        (Images, {"path": ".", "size": (4, 4), "patch": 2, "levels": 4}, "not the key levels"),
        (Images, {"path": ".", "size": (4, 4), "values": "levels"}, "needs the key levels"),
        (
            Images,
            {"path": ".", "size": (4, 4), "patch": 2, "validation": "a.json"},
            "needs manifest",
        ),
        (EncodedTexts, {"vectors": "v"}, "needs files"),
        (EncodedTexts, {"vectors": "v", "source": "bundled", "files": ["a"]}, "has no files"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    component: Any, keys: dict[str, Any], part: str
) -> None:
    with pytest.raises(ValidationError, match=part):
        component.Config(**keys)


def test_run_reads_texts_and_vectors_from_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_vector_files(tmp_path / "data")
    recipe = parse_recipe(RECIPE.format(path=tmp_path / "data"))
    data = RunFields(recipe)
    batch = data.batch_at(0, 0)
    assert batch.fields["text"].values.shape == (8, 3)
    assert batch.fields["latent"].values.shape == (8, 1, 5)
    numbers = range(data.num_validation)
    decoded = data.fields["latent"].decode(data.validation_batch(numbers).fields["latent"].values)
    texts = data.documents.validation.read_texts("text", list(numbers)).values
    for vector, text in zip(decoded, texts):
        # the normalizer is inverted, up to rounding of float64
        expected = [5 * [float(TEXTS.index(text))]]
        np.testing.assert_allclose(vector["vectors"], expected, atol=1e-9)
