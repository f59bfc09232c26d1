"""Conversion of the values of a field into pixels, and grids of captioned pictures as PNG files.

picture = LevelPicture(8, 8, grey_palette(17))
write_grid("digits.png", [picture.pixels(levels)], ["zero"], columns=8, scale=6)
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import IO, Any, NamedTuple, Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.atomic import write_atomic
from ddiff.errors import ArgumentError

Pixels = NDArray[np.uint8]

PNG = b"\x89PNG"
"""First bytes of a PNG file."""
SOFTWARE = "ddiff"  # written into every file, so that it is recognized

MARGIN = 4  # pixels around every picture of a grid
FONT_SIZE = 12
LINE_HEIGHT = 15
NARROWEST_CELL = 48  # pixels, so that a short caption fits under a small picture


class Picture(Protocol):
    """Conversion of the values of a sample into pixels."""

    @property
    def rows(self) -> int:
        """Number of rows of pixels."""
        ...

    @property
    def columns(self) -> int:
        """Number of columns of pixels."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the positions of the field, in reading order."""
        ...

    def pixels(self, values: ArrayLike) -> Pixels:
        """Return the pixels uint8 [rows,columns,3] of tokens [n], or of vectors [n,d]."""
        ...


@final
class LevelPicture:
    """Picture of one level per pixel, row by row.

    Args:
        rows: number of rows of pixels.
        columns: number of columns of pixels.
        palette: red, green and blue of each level, uint8 [num_levels,3].
    """

    def __init__(self, rows: int, columns: int, palette: ArrayLike) -> None:
        self.rows = rows
        self.columns = columns
        self.palette = np.asarray(palette)
        is_palette = self.palette.ndim == 2 and self.palette.shape[1:] == (3,)
        if not is_palette or self.palette.dtype != np.uint8:
            raise ArgumentError(
                "LevelPicture: palette must be uint8 [num_levels,3], red, green and blue of each "
                f"level; got {self.palette.dtype} {list(self.palette.shape)}."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the levels."""
        return self.rows, self.columns

    def pixels(self, values: ArrayLike) -> Pixels:
        """Return the pixels uint8 [rows,columns,3] of the levels [rows * columns]."""
        levels = np.asarray(values)
        highest = len(self.palette) - 1
        has_shape = levels.shape == (self.rows * self.columns,) and levels.dtype.kind in "iu"
        if not has_shape or levels.min() < 0 or levels.max() > highest:
            raise ArgumentError(
                f"LevelPicture.pixels: values must be {self.rows * self.columns} integers in "
                f"0..{highest}; got {levels.dtype} {list(levels.shape)}."
            )
        return self.palette[levels].reshape(self.rows, self.columns, 3)


@final
class PatchPicture:
    """Picture whose square patches are the vectors of a sample, row by row.

    A vector holds the pixels of a patch row by row, and the channels of each pixel.

    Args:
        rows: number of rows of pixels, a multiple of `patch`.
        columns: number of columns of pixels, a multiple of `patch`.
        patch: rows and columns of a patch.
        channels: 1 (grey) or 3 (red, green, blue).
        low: value of a black pixel.
        high: value of a fully bright pixel.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        patch: int,
        channels: int = 1,
        low: float = -1.0,
        high: float = 1.0,
    ) -> None:
        if patch < 1 or rows % patch or columns % patch:
            raise ArgumentError(
                f"PatchPicture: patch must divide rows and columns; got patch = {patch} for an "
                f"image of {rows} x {columns} pixels."
            )
        if channels not in (1, 3) or not low < high:
            raise ArgumentError(
                "PatchPicture: channels must be 1 or 3, and low must be less than high; got "
                f"channels = {channels}, low = {low} and high = {high}."
            )
        self.rows = rows
        self.columns = columns
        self.patch = patch
        self.channels = channels
        self.low = low
        self.high = high

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.rows // self.patch, self.columns // self.patch

    @property
    def positions(self) -> int:
        """Number n of patches."""
        down, across = self.grid
        return down * across

    @property
    def width(self) -> int:
        """Number d of numbers in a patch."""
        return self.patch**2 * self.channels

    def to_patches(self, images: NDArray[Any]) -> NDArray[Any]:
        """Cut images [N,rows,columns,channels] into vectors [N,n,d]."""
        expected = (self.rows, self.columns, self.channels)
        if images.shape[1:] != expected:
            raise ArgumentError(
                f"PatchPicture.to_patches: images must be [N, {self.rows}, {self.columns}, "
                f"{self.channels}]; got {list(images.shape)}."
            )
        patch = self.patch
        down, across = self.grid
        cut = images.reshape(len(images), down, patch, across, patch, self.channels)
        # Axes: image, row and column of the patch, row and column and channel of the pixel.
        ordered = cut.transpose(0, 1, 3, 2, 4, 5)
        return ordered.reshape(len(images), self.positions, self.width)

    def to_images(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Join vectors [N,n,d] to images [N,rows,columns,channels], the inverse of `to_patches`."""
        if vectors.shape[1:] != (self.positions, self.width):
            raise ArgumentError(
                f"PatchPicture: vectors must be [N, {self.positions}, {self.width}]; got "
                f"{list(vectors.shape)}."
            )
        patch = self.patch
        down, across = self.grid
        cut = vectors.reshape(len(vectors), down, across, patch, patch, self.channels)
        ordered = cut.transpose(0, 1, 3, 2, 4, 5)
        return ordered.reshape(len(vectors), self.rows, self.columns, self.channels)

    def pixels(self, values: ArrayLike) -> Pixels:
        """Return the pixels uint8 [rows,columns,3] of the vectors [n,d] of a sample.

        Values below `low` are black, and values above `high` fully bright.
        """
        image = self.to_images(np.asarray(values, np.float64)[None])[0]
        if not np.isfinite(image).all():
            raise ArgumentError(
                "PatchPicture.pixels: values must be finite; got NaN or infinity. Sample with a "
                "model whose training did not diverge."
            )
        brightness = (image - self.low) / (self.high - self.low)
        levels = np.rint(255 * np.clip(brightness, 0.0, 1.0)).astype(np.uint8)
        return np.broadcast_to(levels, (self.rows, self.columns, 3)).copy()


def grey_palette(num_levels: int) -> Pixels:
    """Return a palette uint8 [num_levels,3] from black to white."""
    levels = np.rint(np.linspace(0, 255, num_levels)).astype(np.uint8)
    return np.repeat(levels[:, None], 3, axis=1)


def code_palette(num_tokens: int) -> Pixels:
    """Return a palette uint8 [num_tokens,3] of fixed pseudo-random colours, to show token ids."""
    rng = np.random.default_rng(0)  # a fixed seed, so that equal ids have equal colours
    return rng.integers(0, 256, (num_tokens, 3)).astype(np.uint8)


# ---------------------------------------------------------------------- grids


class _Cell(NamedTuple):
    """Picture of a grid and the lines of its caption."""

    pixels: Pixels
    lines: list[str]


def write_grid(
    path: str,
    pictures: Sequence[Pixels],
    captions: Sequence[str],
    columns: int = 8,
    scale: int = 4,
) -> None:
    """Write pictures with their captions as a PNG file, atomically.

    Equal arguments give equal files. Captions are broken into lines at spaces.

    Args:
        path: file, local or of any fsspec protocol.
        pictures: pixels uint8 [rows,columns,3] of each picture.
        captions: text under each picture.
        columns: number of pictures in a row of the grid.
        scale: rows and columns of the file for one pixel of a picture.
    """
    if not len(pictures) or len(pictures) != len(captions):
        raise ArgumentError(
            "write_grid: pictures and captions must have the same number of entries, at least one; "
            f"got {len(pictures)} pictures and {len(captions)} captions."
        )
    if columns < 1 or scale < 1:
        raise ArgumentError(
            "write_grid: columns and scale must be at least 1; got columns = "
            f"{columns} and scale = {scale}."
        )
    for pixels in pictures:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
            raise ArgumentError(
                "write_grid: every picture must be uint8 [rows,columns,3]; got "
                f"{pixels.dtype} {list(pixels.shape)}."
            )
    write_atomic(path, _draw_grid(pictures, captions, columns, scale))


def is_grid(file: IO[bytes]) -> bool:
    """Return True if a file is a PNG file that `write_grid` wrote."""
    head = file.read(200)
    return head.startswith(PNG) and f"Software\0{SOFTWARE}".encode() in head


def encode_png(pixels: Pixels) -> bytes:
    """Return a PNG file of the pixels uint8 [rows,columns,3]. Equal pixels give equal bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _draw_grid(
    pictures: Sequence[Pixels], captions: Sequence[str], columns: int, scale: int
) -> bytes:
    """Return the content of a PNG file."""
    # imported here, because few commands write pictures
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    font = ImageFont.load_default(FONT_SIZE)
    width = max(NARROWEST_CELL, *(scale * pixels.shape[1] for pixels in pictures))
    cells = []
    for pixels, caption in zip(pictures, captions):
        large = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
        cells.append(_Cell(large, _break_lines(caption, width, font)))
    picture_height = max(len(cell.pixels) for cell in cells)
    num_lines = max(len(cell.lines) for cell in cells)
    cell_height = picture_height + num_lines * LINE_HEIGHT + 2 * MARGIN
    cell_width = width + 2 * MARGIN
    num_rows = -(-len(cells) // columns)  # rounded up
    size = (min(columns, len(cells)) * cell_width, num_rows * cell_height)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        left = column * cell_width + MARGIN
        top = row * cell_height + MARGIN
        page.paste(Image.fromarray(cell.pixels), (left, top))
        for line, text in enumerate(cell.lines):
            place = (left, top + picture_height + line * LINE_HEIGHT)
            draw.text(place, text, fill="black", font=font)
    file = io.BytesIO()
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    page.save(file, "PNG", pnginfo=mark)
    return file.getvalue()


def _break_lines(text: str, width: int, font: Any) -> list[str]:
    """Break a text into lines of at most `width` pixels, at spaces or within long words."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            size = _count_fitting(word, width, font)
            lines.append(word[:size])
            word = word[size:]
        line = word
    return [*lines, line] if line else lines


def _count_fitting(word: str, width: int, font: Any) -> int:
    """Return the number of characters of a word that fit into `width` pixels, at least one."""
    size = len(word)
    while size > 1 and font.getlength(word[:size]) > width:
        size -= 1
    return size
