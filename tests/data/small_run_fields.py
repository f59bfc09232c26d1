"""Data set of three fields as a component, and recipes that use it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ddiff import ComponentConfig
from ddiff.data.columns import (
    ColumnShape,
    FieldsDocuments,
    FieldsTable,
    TextColumn,
    TokenColumn,
    VectorColumn,
)
from ddiff.data.pictures import LevelPicture, PatchPicture, grey_palette
from ddiff.plugin.registry import UNPACKAGED, Component
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.recipe.resolve import read_recipe

WORDS = ("red", "green", "blue", "dark", "light")
LEVELS = 6
PATCHES = PatchPicture(2, 4, 2, low=0.0, high=9.0)

RECIPE = """
name = "small"
plugins = ["core", "dit", "mdlm", "gaussian", "encoders"]
data = "digits"
[fields.image]
process = "mdlm"
[fields.text]
tokenizer = "words"
length = 3
process = "mdlm"
[fields.latent]
process = "gaussian"
head = "vector"
loss = "output_mse"
sampler = "ddim"
normalizer = "standard"
[denoiser]
kind = "mmdit"
[objective]
times = "shared"
[train]
steps = 4
batch = 12
"""


def make_table(
    count: int, seed: int, *, is_whole: bool = False, values: tuple[float, ...] = ()
) -> FieldsTable:
    """Draw samples. Unless `is_whole`, every third sample lacks one of the fields.

    `values`: values of the numbers of vectors, of which the first has probability 0.97; by default
    the numbers are normal.
    """
    rng = np.random.default_rng(seed)
    texts: list[str | None] = []
    for number in range(count):
        size = 1 + number % 3
        texts.append(" ".join(rng.choice(WORDS, size)))
    present = np.ones((3, count), bool)
    if not is_whole:
        for field in range(3):
            present[field, field::9] = False
    texts = [text if mark else None for text, mark in zip(texts, present[1])]
    vectors = 5.0 + 1.5 * rng.normal(size=(count, 2, 4))
    if values:
        rare = rng.choice(values[1:], size=vectors.shape)
        vectors = np.where(rng.random(vectors.shape) < 0.97, values[0], rare)
    vectors[~present[2]] = np.nan
    levels = rng.integers(LEVELS, size=(count, 8))
    levels[:, 1::2] = levels[:, ::2] // 2  # neighbours depend on each other
    picture = LevelPicture(2, 4, grey_palette(LEVELS))
    return FieldsTable(
        {
            "latent": VectorColumn.from_array(vectors, PATCHES, present[2]),
            "image": TokenColumn(levels, LEVELS, picture, present[0]),
            "text": TextColumn(texts),
        }
    )


class SmallFields:
    """Data set of an image, a text and a vector. `without` names columns that are left out."""

    class Config(ComponentConfig):
        without: tuple[str, ...] = ()
        train: int = 40
        values: tuple[float, ...] = ()

    @staticmethod
    def build(config: Config, *, seed: int) -> FieldsDocuments:
        tables = []
        for count, number in ((config.train, 0), (18, 1)):
            columns = make_table(count, number, values=config.values).columns
            kept = {name: columns[name] for name in columns if name not in config.without}
            tables.append(FieldsTable(kept))
        return FieldsDocuments(*tables)

    @staticmethod
    def preview(config: Config) -> dict[str, ColumnShape]:
        shapes = make_table(9, 0).shapes
        return {name: shapes[name] for name in shapes if name not in config.without}


def read_small(folder: Path, *settings: str, text: str = RECIPE, **keys: Any) -> FieldsRecipe:
    """Read a recipe, and replace its data set by SmallFields with some keys."""
    path = folder / "recipe.toml"
    path.write_text(text)
    recipe = read_recipe(path, settings)
    assert isinstance(recipe, FieldsRecipe)
    component = Component("fields_dataset", "small", "small_run_fields:SmallFields", UNPACKAGED)
    spec = ComponentSpec(component, SmallFields.Config(**keys), "[data]")
    return dataclasses.replace(recipe, data=spec)
