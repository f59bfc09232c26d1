"""Recipes of published models of text with vectors and images."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_paper_recipes import DIM, FIELDS, LENGTH, WORDS, write_vectors

import ddiff
from ddiff.core.path_coverage import situations
from ddiff.errors import ArgumentError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.model import diff_recipes
from ddiff.recipe.resolve import read_recipe
from ddiff.runs.fields.build import assemble_fields
from ddiff.runs.fields.data import preview_fields
from ddiff.runs.fields.measure import measure
from ddiff.runs.session import TrainingSession

SIDE = 16  # pixels of a small image
SMALL = [
    f"fields.text.tokenizer={{kind='bpe', size={WORDS}}}",
    f"fields.text.length={LENGTH}",
    "denoiser.width=32",
    "denoiser.layers=1",
    "denoiser.heads=2",
    "denoiser.head_width=8",
    "denoiser.condition_width=8",
    "backend={kind='single', device='cpu', processes=1, compile=false}",
    "train.steps=2",  # the learning rate of the last step of a cosine schedule is 0
    "train.batch=4",
]
VECTORS = ["data.path=vectors", f"data.dim={DIM}"]
IMAGES = [
    "data.path=images",
    f"data.size=[{SIDE}, {SIDE}]",
    "data.patch=8",
    "denoiser.streams.image.width=16",
]
SHRUNK = (
    "backend.*",
    "data.dim",
    "data.patch",
    "data.path",
    "data.size",
    "denoiser.condition_width",
    "denoiser.head_width",
    "denoiser.heads",
    "denoiser.layers",
    "denoiser.streams.image.width",
    "denoiser.width",
    "fields.text.length",
    "fields.text.tokenizer.*",
    "train.batch",
    "train.steps",
)


def read_small(name: str) -> FieldsRecipe:
    recipe = read_recipe(name, [*SMALL, *(IMAGES if "image" in name else VECTORS)])
    assert isinstance(recipe, FieldsRecipe)
    return recipe


def read_published(name: str) -> FieldsRecipe:
    recipe = read_recipe(name)
    assert isinstance(recipe, FieldsRecipe)
    return recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder with a few texts with vectors and a few images with captions."""
    folder = tmp_path_factory.mktemp("paper_fields")
    text = ddiff.load_bundled_novels().train["text"][0]
    write_vectors(folder / "vectors", text)
    write_images(folder / "images", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDIFF_CACHE", str(folder / "cache"))
        yield folder


def write_images(folder: Path, text: str) -> None:
    """Write ten images of noise, with pieces of the text as captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    samples = []
    for number in range(10):
        pixels = random.integers(256, size=(SIDE + 3, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        caption = text[400 * number : 400 * (number + 1)]
        samples.append({"image_path": f"{number}.png", "caption": caption, "image_id": number})
    (folder / "train_data.json").write_text(json.dumps(samples[:8]))
    (folder / "validation_data.json").write_text(json.dumps(samples[8:]))


@pytest.mark.parametrize("name", FIELDS)
def test_paper_fields_recipe_with_reduced_sizes_trains(name: str, place: Path) -> None:
    recipe = read_small(name)
    published = read_published(name)
    changed = {key for key, _, _ in diff_recipes(published.to_dict(), recipe.to_dict())}
    kept = [key for key in changed if not any(fnmatch.fnmatch(key, one) for one in SHRUNK)]
    assert not kept
    with TrainingSession.open(recipe) as session:
        session.initialize_weights()
        run = session.run
        run.check_stages()
        before = {key: value.clone() for key, value in run.denoiser.state_dict().items()}
        summary = session.fit()
        assert (summary.step, summary.skipped_steps) == (2, 0)
        line = json.loads((run.run_dir / "metrics.jsonl").read_text().splitlines()[0])
        assert 0 < line["train_loss"] < math.inf
        after = run.denoiser.state_dict()
        assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mmdit_latent_512", [{"text": "moves", "latent": "clean"}]),
        ("mmdit_latent_4096", [{"text": "moves", "latent": "clean"}]),
        ("image_continuous", [{"image": "moves", "text": "moves"}]),
        ("image_discrete", [{"image": "clean", "text": "moves"}]),
    ],
)
def test_paper_fields_recipe_noises_the_published_fields(
    name: str, expected: list[dict[str, str]]
) -> None:
    recipe = read_published(f"paper/{name}")
    path = recipe.times.build(names=list(recipe.fields))
    assert [dict(situation) for situation in situations(path)] == expected


@pytest.mark.parametrize("name", ["mmdit", "mmdit_1024d", "mmdit_preprocessed"])
def test_paper_mmdit_alternates_between_the_published_modes(name: str) -> None:
    recipe = read_published(f"paper/{name}")
    parts = recipe.times.to_dict()["parts"]
    assert [part["steps"] for part in parts] == [5000, 10000, 10000]
    assert [part.get("clean", ()) for part in parts] == [[], ["latent"], ["text"]]


def count_parameters(name: str) -> dict[str, int]:
    """Return the numbers of parameters of the backbone and of the heads."""
    recipe = read_published(name)
    shapes = preview_fields(recipe)
    assert shapes is not None
    denoiser = assemble_fields(recipe, shapes, torch.device("meta")).denoiser
    backbone = sum(parameter.numel() for parameter in denoiser.backbone.parameters())
    heads = sum(parameter.numel() for parameter in denoiser.heads.parameters())
    return {"backbone": backbone, "heads": heads}


@pytest.mark.parametrize(
    ("name", "width", "layers", "positions", "millions"),
    [
        ("mmdit_stable", 256, 4, 4096, 29.6),
        ("mmdit_1024d", 1024, 12, 1024, 491.0),
        ("mmdit", 1024, 24, 1024, 895.0),
        ("mmdit_preprocessed", 1024, 24, 4096, 895.0),
    ],
)
def test_paper_mmdit_has_the_published_parameters_besides_modulation_and_positions(
    name: str, width: int, layers: int, positions: int, millions: float
) -> None:
    """Each published block has a modulation for each of the two streams, and positions a table.

    The rest of the difference are two-layer embeddings and heads of vectors, and the weights that
    mix the residual streams: below 1 %.
    """
    ours = sum(count_parameters(f"paper/{name}").values())
    modulations = 2 * layers * 6 * width**2
    table = positions * width
    assert (ours + modulations + table) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", ["paper/image_discrete", "paper/mmdit_stable"])
def test_measure_uses_random_values_without_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = "fields.text.tokenizer={kind='pretrained', path='missing', size=300}"
    recipe = read_recipe(
        name, [*SMALL, tokenizer, *(IMAGES if "image" in name else VECTORS), "data.path=missing"]
    )
    assert isinstance(recipe, FieldsRecipe)
    measured = measure(recipe, 2)
    assert "missing" in measured.stand_in
    assert math.isfinite(measured.first_loss)
    assert not measured.is_off


def test_measure_refuses_samples_whose_backward_pass_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4096 tokens in 12 layers of width 768 save more than 4 x 12 x 4096 x 768 x 4 bytes."""
    recipe = read_recipe("paper/mmdit_latent_4096", ["train.batch=8"])
    assert isinstance(recipe, FieldsRecipe)
    parameters = sum(count_parameters("paper/mmdit_latent_4096").values())
    saved = 8 * 4 * 12 * 4096 * 768 * 4
    monkeypatch.setattr("ddiff.runs.measure.free_bytes", lambda device: 16.0 * parameters + saved)
    with pytest.raises(ArgumentError, match=r"saves about .* for 8 samples, next to"):
        measure(recipe, 2)
    monkeypatch.setattr("ddiff.runs.measure.free_bytes", lambda device: 15.0 * parameters)
    with pytest.raises(ArgumentError, match=r"218,.* parameters, which with gradients"):
        measure(recipe, 2)
