"""Data sets of captioned images as recipe components."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from ddiff_core.fields_data import SHAPE_PALETTE, Digits, Shapes
from previews import build_previewed
from pydantic import ValidationError

from ddiff.data.captioned_images import COLOURS, ShapesSource, load_digits
from ddiff.data.columns import FieldsDocuments
from ddiff.data.pictures import PatchPicture


def digits(**keys: Any) -> FieldsDocuments:
    return Digits.build(Digits.Config(**keys), seed=0, cache=None)


def shapes(**keys: Any) -> FieldsDocuments:
    return Shapes.build(Shapes.Config(train=16, validation=8, **keys), seed=0, cache=None)


@pytest.mark.parametrize(
    ("component", "keys"),
    [
        (Digits, {}),
        (Digits, {"image": "patches"}),
        (Digits, {"image": "patches", "patch": 1}),
        (Digits, {"image": "patches", "patch": 4}),
        (Shapes, {"train": 3, "validation": 2}),
        (Shapes, {"train": 3, "validation": 2, "colours": 2}),
    ],
)
def test_preview_describes_the_columns_that_build_returns(
    component: Any, keys: dict[str, Any]
) -> None:
    build_previewed(component, keys)


def test_digit_levels_and_words_are_those_of_the_bundled_images() -> None:
    found = digits()
    train, validation = load_digits()
    assert (len(found.train), len(found.validation)) == (1347, 450)
    assert found.train.read("image", [3]).values.tolist() == [train.levels[3].tolist()]
    assert found.validation.read_texts("text", [5]).values == [validation.captions[5][0]]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_digit_patches_hold_the_pixels_between_minus_one_and_one(patch: int) -> None:
    found = digits(image="patches", patch=patch)
    train, _ = load_digits()
    picture = found.shapes["image"].picture
    assert isinstance(picture, PatchPicture)
    images = picture.to_images(found.train.read("image", np.arange(50)).values)
    levels = 8 * (images.reshape(50, 64) + 1)
    assert np.array_equal(levels, train.levels[:50])


def test_digit_patch_is_refused_for_levels() -> None:
    with pytest.raises(ValidationError, match="patches"):
        Digits.Config(patch=2)


def test_shapes_samples_are_scenes_and_parts_do_not_overlap() -> None:
    found = shapes(seed=4, colours=3)
    source = ShapesSource(4, 3)
    seen = set()
    for part in (found.train, found.validation):
        numbers = np.arange(len(part))
        images = part.read("image", numbers).values
        for levels, caption in zip(images, part.read_texts("text", numbers).values):
            assert source.is_right(levels, caption.split())
            seen.add((levels.tobytes(), caption))
    # 162 captions of 256 images each: two equal ones among 24 draws have probability 0.007
    assert len(seen) == 24


def test_shapes_entropies_are_those_of_the_source_and_add_up() -> None:
    entropies = shapes(colours=2).entropies
    source = ShapesSource(colours=2)
    assert entropies["text"] == source.caption_entropy
    both = entropies["text"] + entropies["image | text"]
    assert math.isclose(entropies["joint"], both)


def test_shapes_depend_on_their_own_seed_only() -> None:
    config = Shapes.Config(train=4, validation=2)
    first = Shapes.build(config, seed=0, cache=None).train.fingerprint
    assert Shapes.build(config, seed=1, cache=None).train.fingerprint == first
    other = Shapes.Config(train=4, validation=2, seed=1)
    assert Shapes.build(other, seed=0, cache=None).train.fingerprint != first


def test_shapes_palette_has_a_colour_for_each_word() -> None:
    assert len(SHAPE_PALETTE) == 1 + len(COLOURS)
    assert len(set(SHAPE_PALETTE)) == len(SHAPE_PALETTE)
