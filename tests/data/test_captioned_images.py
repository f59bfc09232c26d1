"""Bundled digits and generated shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddiff.data.captioned_images import DIGIT_WORDS, ShapesSource, load_digits
from ddiff.errors import ArgumentError


def test_load_digits_returns_1797_images_in_two_parts() -> None:
    train, validation = load_digits()
    assert train.levels.shape == (1347, 64)
    assert validation.levels.shape == (450, 64)
    assert set(np.unique(train.levels)) == set(range(17))
    assert {caption for (caption,) in train.captions} == set(DIGIT_WORDS)
    # The counts of the published test set.
    both = [*train.captions, *validation.captions]
    counts = [both.count((word,)) for word in DIGIT_WORDS]
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_shapes_entropies_count_the_scenes() -> None:
    source = ShapesSource(colours=2)
    assert source.num_captions == 2 * (3 * 2) ** 2
    assert source.num_offsets == (2 * 8) ** 2
    assert source.joint_entropy == pytest.approx(math.log(source.num_captions * 256))
    small = ShapesSource(colours=2, side=8)
    assert small.num_offsets == (2 * 6) ** 2
    assert small.draw(3).levels.shape == (3, 64)


@pytest.mark.parametrize("side", [8, 12])
def test_image_and_caption_determine_the_scene(side: int) -> None:
    """The images of one caption are all different, so image and caption count as one scene."""
    source = ShapesSource(side=side)
    for index in range(6):
        images = source.images_of(source.scene(index).caption())
        assert len(images) == source.num_offsets


@pytest.mark.parametrize("side", [8, 12])
def test_shapes_draws_are_right_and_changed_images_or_captions_are_wrong(side: int) -> None:
    source = ShapesSource(seed=3, side=side)
    samples = source.draw(20)
    for levels, caption in zip(samples.levels, samples.captions, strict=True):
        assert source.is_right(levels, caption)
        changed = levels.copy()
        changed[0] = 7 if changed[0] != 7 else 0
        assert not source.is_right(changed, caption)
        assert not source.is_right(levels, caption[::-1])
        assert not source.is_right(levels, ("pink", "cow"))


def test_shapes_captions_are_drawn_uniformly() -> None:
    """A chi-squared statistic of 2,000 draws over 8 captions; the limit has probability 1e-4."""
    source = ShapesSource(colours=1)
    captions = source.draw(2000).captions
    counts = np.array([captions.count(caption) for caption in set(captions)])
    expected = 2000 / source.num_captions
    assert len(counts) == source.num_captions
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 46.0  # 17 degrees of freedom


def test_shapes_draws_depend_on_seed_and_number_only() -> None:
    whole = ShapesSource(seed=1).draw(10).levels
    assert np.array_equal(whole[4:], ShapesSource(seed=1).draw(6, first=4).levels)
    assert not np.array_equal(whole, ShapesSource(seed=2).draw(10).levels)


def test_shapes_source_refuses_unknown_captions_and_colours() -> None:
    with pytest.raises(ArgumentError, match="colours must be 1 to 7"):
        ShapesSource(colours=8)
    with pytest.raises(ArgumentError, match="side must be 8 or 12"):
        ShapesSource(side=10)
    with pytest.raises(ArgumentError, match="red square left of blue disc"):
        ShapesSource().images_of(["a", "red", "square"])


def test_shapes_captions_lists_every_caption_once() -> None:
    source = ShapesSource(colours=2)
    captions = list(source.captions())
    assert len(set(captions)) == len(captions) == source.num_captions
    assert source.scene(0).caption() in captions


def test_count_colours_finds_the_last_colour_that_is_named() -> None:
    assert ShapesSource.count_colours(["disc", "blue", "red"]) == 3
    assert ShapesSource.count_colours(["disc"]) == 1
