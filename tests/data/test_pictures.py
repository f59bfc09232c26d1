"""Pixels of levels and patches, and grids of pictures as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddiff.data.pictures import LevelPicture, PatchPicture, grey_palette, write_grid
from ddiff.errors import ArgumentError


def test_level_picture_looks_up_each_level_row_by_row() -> None:
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    pixels = LevelPicture(2, 3, palette).pixels([0, 1, 2, 2, 1, 0])
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 1].tolist() == [255, 0, 0]
    assert pixels[1, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("values", [[0, 1], [0, 3, 0, 0], [0, -1, 0, 0], [0.0, 1.0, 0.0, 0.0]])
def test_level_picture_refuses_other_values(values: list[float]) -> None:
    with pytest.raises(ArgumentError, match=r"4 integers in 0\.\.2"):
        LevelPicture(2, 2, grey_palette(3)).pixels(values)


def test_level_picture_refuses_a_palette_that_is_not_rgb_bytes() -> None:
    with pytest.raises(ArgumentError, match="palette"):
        LevelPicture(2, 2, np.zeros((3, 3)))


def test_grey_palette_goes_from_black_to_white() -> None:
    palette = grey_palette(17)
    assert palette[0].tolist() == [0, 0, 0]
    assert palette[-1].tolist() == [255, 255, 255]
    assert (np.diff(palette[:, 0].astype(int)) > 0).all()


@pytest.mark.parametrize(("patch", "channels"), [(1, 1), (2, 1), (2, 3), (4, 3)])
def test_patches_and_images_convert_back_and_forth(patch: int, channels: int) -> None:
    picture = PatchPicture(8, 4, patch, channels)
    images = np.random.default_rng(0).normal(size=(3, 8, 4, channels))
    patches = picture.to_patches(images)
    assert patches.shape == (3, picture.positions, picture.width)
    assert np.array_equal(picture.to_images(patches), images)


def test_first_patch_holds_the_upper_left_square() -> None:
    picture = PatchPicture(4, 4, 2)
    image = np.arange(16.0).reshape(1, 4, 4, 1)
    assert picture.to_patches(image)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_patch_pixels_map_low_and_high_to_black_and_white() -> None:
    picture = PatchPicture(2, 2, 2, low=-1.0, high=1.0)
    pixels = picture.pixels([[-1.0, 1.0, -3.0, 3.0]])
    assert pixels[..., 0].tolist() == [[0, 255], [0, 255]]
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("patch", [0, 3])
def test_patch_picture_refuses_a_patch_that_does_not_divide_the_image(patch: int) -> None:
    with pytest.raises(ArgumentError, match=f"patch = {patch}"):
        PatchPicture(8, 8, patch)


def test_patch_picture_refuses_values_that_are_not_finite() -> None:
    with pytest.raises(ArgumentError, match="finite"):
        PatchPicture(1, 1, 1).pixels([[np.nan]])


def grid(folder: Path, captions: list[str], columns: int = 2) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    bright = np.full((8, 8, 3), 200, np.uint8)
    pictures = [bright + np.uint8(number) for number in range(len(captions))]
    write_grid(str(folder / "grid.png"), pictures, captions, columns=columns, scale=3)
    return np.asarray(image.open(folder / "grid.png"))


def test_grid_shows_every_picture_and_captions_below(tmp_path: Path) -> None:
    page = grid(tmp_path, ["one", "two", "three"])
    for number in range(3):
        assert (page == 200 + number).all(-1).sum() == 24 * 24
    first_row, last_row = np.nonzero((page == 200).all(-1))[0][[0, -1]]
    assert last_row - first_row == 23
    is_dark = (page < 100).all(-1)
    assert is_dark[last_row + 1 : last_row + 16, : page.shape[1] // 2].any()
    assert not is_dark[: last_row + 1].any()


def test_grid_is_as_wide_as_its_pictures_and_long_captions_take_more_lines(
    tmp_path: Path,
) -> None:
    short = grid(tmp_path, ["a"], columns=8)
    long = grid(tmp_path, ["red square left of blue disc unbreakablelongword"], columns=8)
    assert short.shape[1] == long.shape[1]
    assert long.shape[0] > short.shape[0] + 30


def test_equal_grids_are_equal_files(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        grid(folder, ["one", ""])
        contents.append((folder / "grid.png").read_bytes())
        assert [file.name for file in folder.iterdir()] == ["grid.png"]
    assert contents[0] == contents[1]


def test_grid_refuses_captions_that_do_not_match_the_pictures(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="1 pictures and 2 captions"):
        write_grid(str(tmp_path / "grid.png"), [np.zeros((2, 2, 3), np.uint8)], ["a", "b"])
    with pytest.raises(ArgumentError, match="uint8"):
        write_grid(str(tmp_path / "grid.png"), [np.zeros((2, 2, 3))], ["a"])  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())
