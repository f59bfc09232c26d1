"""Check and decode image files, and convert pixels to the values of a field.

An image is cropped to the wanted proportions around its centre, scaled, and converted to grey or
RGB. All formats that Pillow reads are supported, with at most 8 bits per channel.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, Protocol, final

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ddiff.data.cache import fingerprint
from ddiff.data.columns import ColumnShape
from ddiff.data.field_parts import Numbers, fingerprint_files
from ddiff.data.paths import explain_errors, open_file, printable
from ddiff.data.pictures import LevelPicture, PatchPicture, Pixels, grey_palette
from ddiff.errors import ArgumentError, DataError

DEEP_MODES = ("I", "F")  # first letter of the modes of Pillow with more than 8 bits per channel


@final
@dataclass(frozen=True)
class ImageFormat:
    """Format to which images are converted.

    Args:
        rows: rows of pixels.
        columns: columns of pixels.
        colour: "grey" (one channel) or "rgb" (three).
        values: "patches" (vectors of the pixels of square patches, scaled to [-1, 1]) or "levels"
            (one token per pixel, only grey).
        patch: rows and columns of a patch.
        levels: number of levels of grey, 2 to 256.
    """

    rows: int
    columns: int
    colour: Literal["grey", "rgb"] = "rgb"
    values: Literal["patches", "levels"] = "patches"
    patch: int = 1
    levels: int = 256

    def __post_init__(self) -> None:
        if self.values == "levels" and self.colour != "grey":
            raise ArgumentError(
                'ImageFormat: values = "levels" needs colour = "grey", because a level is one '
                'number; got colour = "rgb". Set colour = "grey", or values = "patches".'
            )
        if not 2 <= self.levels <= 256:
            raise ArgumentError(f"ImageFormat: levels must be 2 to 256; got {self.levels}.")
        # refuses a patch that does not divide the image
        _ = self.picture

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return 1 if self.colour == "grey" else 3

    @property
    def picture(self) -> LevelPicture | PatchPicture:
        """Conversion of the values of an image into pixels."""
        if self.values == "levels":
            return LevelPicture(self.rows, self.columns, grey_palette(self.levels))
        return PatchPicture(self.rows, self.columns, self.patch, self.channels)

    @property
    def shape(self) -> ColumnShape:
        """Description of the column of images."""
        picture = self.picture
        if isinstance(picture, LevelPicture):
            size = self.rows * self.columns
            return ColumnShape("tokens", size, self.levels, picture=picture)
        return ColumnShape("vectors", picture.positions, width=picture.width, picture=picture)

    def to_levels(self, pixels: Pixels) -> NDArray[np.uint8]:
        """Return the nearest levels [k, rows * columns] of grey pixels [k,rows,columns,1]."""
        scaled = pixels.reshape(len(pixels), -1) * ((self.levels - 1) / 255)
        return np.rint(scaled).astype(np.uint8)

    def to_patches(self, pixels: Pixels) -> NDArray[np.float64]:
        """Return patches [k,n,d] of pixels [k,rows,columns,channels]; 0 is -1, and 255 is 1."""
        picture = self.picture
        assert isinstance(picture, PatchPicture)
        return picture.to_patches(pixels / 127.5 - 1.0)


# ---------------------------------------------------------------------- decoding


def check_header(file: BinaryIO, name: str) -> None:
    """Read the header of an image. Raises DataError if it is not an image with 8-bit channels."""
    with _open_image(file, name):
        pass


def decode_image(file: BinaryIO, name: str, form: ImageFormat) -> Pixels:
    """Decode an image as pixels uint8 [rows,columns,channels].

    The orientation of photographs (EXIF) is applied, and transparent pixels become white. `name`:
    name of the image in messages. Raises DataError if the image cannot be decoded.
    """
    from PIL import Image, ImageOps

    mode = "L" if form.colour == "grey" else "RGB"
    with _open_image(file, name) as found:
        image = ImageOps.exif_transpose(found)
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(opaque, image.convert("RGBA"))
        # cropped before it is scaled: the filter would mix in pixels outside the area
        cropped = image.convert(mode).crop(_crop_box(image.size, form))
        # an image of the wanted size keeps its pixels
        scaled = cropped.resize((form.columns, form.rows), Image.Resampling.BICUBIC)
        return np.asarray(scaled).reshape(form.rows, form.columns, form.channels)


def _crop_box(size: tuple[int, int], form: ImageFormat) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the largest central area with the right proportions."""
    width, height = size
    across = min(width, max(1, round(height * form.columns / form.rows)))
    down = min(height, max(1, round(width * form.rows / form.columns)))
    left = (width - across) // 2
    top = (height - down) // 2
    return left, top, left + across, top + down


@contextmanager
def _open_image(file: BinaryIO, name: str) -> Iterator[Any]:
    """Open an image with Pillow. All errors in the `with` block become a DataError."""
    # imported here, because few commands read pictures
    from PIL import Image

    with explain_errors(name), Image.open(file) as image:
        if image.mode.startswith(DEEP_MODES):
            raise DataError(
                f"{printable(name)} has more than 8 bits per channel (mode {image.mode}), which is "
                "not supported. Convert the image to 8 bits."
            )
        yield image


# ---------------------------------------------------------------------- sources


class ImageSource(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def has(self, number: int) -> bool:
        """Return whether an image exists."""
        ...

    def name(self, number: int) -> str:
        """Return the name of an image in messages."""
        ...

    def open(self, number: int) -> BinaryIO:
        """Open an image to read bytes. Raises DataError if it cannot be opened."""
        ...

    def fingerprint(self) -> str:
        """Return an identifier of all images."""
        ...


@final
class ImageFiles:
    """Images in files.

    Args:
        paths: path of each image; None for a sample without image.
    """

    def __init__(self, paths: Sequence[str | None]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def has(self, number: int) -> bool:
        return self.paths[number] is not None

    def name(self, number: int) -> str:
        return self.paths[number] or f"image {number}"

    def open(self, number: int) -> BinaryIO:
        with open_file(self.name(number)) as file:
            return io.BytesIO(file.read())

    def fingerprint(self) -> str:
        marks = [path is not None for path in self.paths]
        return fingerprint_files([path for path in self.paths if path is not None], marks)


@final
class ImageRows:
    """Encoded images in the column "image" of a memory-mapped table.

    Args:
        table: table with the columns "image" (bytes, or null) and "place" (name in messages).
        numbers: rows of the samples.
        identity: identifier of the table.
    """

    def __init__(self, table: Dataset, numbers: Numbers, identity: str) -> None:
        self.table = table
        self.numbers = numbers
        self.identity = identity
        is_missing = np.asarray(table.data.column("image").is_null())
        self._is_missing = is_missing[numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def _read(self, number: int, column: str) -> Any:
        return self.table[int(self.numbers[number])][column]

    def has(self, number: int) -> bool:
        return not self._is_missing[number]

    def name(self, number: int) -> str:
        return str(self._read(number, "place"))

    def open(self, number: int) -> BinaryIO:
        return io.BytesIO(self._read(number, "image"))

    def fingerprint(self) -> str:
        return fingerprint([self.identity, self.numbers.tolist()])
