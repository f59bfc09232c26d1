"""Bundled images of handwritten digits as rows of symbols, one symbol per pixel."""

from __future__ import annotations

from datasets import Dataset

from ddiff.data.captioned_images import DIGIT_SIDE, CaptionedImages, load_digits
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.errors import ArgumentError

DIGIT_SYMBOLS = "0123456789abcdefg"
"""Symbol of each of the 17 grey levels, from 0 (background) to 16."""
PIXELS = DIGIT_SIDE**2


def load_digit_rows(*, length: int = PIXELS) -> Documents:
    """Load the bundled digits as texts of 64 symbols, the grey levels of the pixels row by row.

    The training part has 1,347 images, the validation part 450. Raises ArgumentError if `length` is
    not 64.
    """
    check_digit_length(length)
    train, validation = load_digits()
    return Documents(_make_rows(train), _make_rows(validation))


def check_digit_length(length: int) -> None:
    """Raise ArgumentError if `length` is not the number of pixels of an image."""
    if length != PIXELS:
        raise ArgumentError(
            f"[data] length must be {PIXELS}, the number of pixels of a digit; got {length}. Set "
            f"length = {PIXELS}."
        )


def _make_rows(images: CaptionedImages) -> Dataset:
    texts = []
    names = []
    for number, levels in enumerate(images.levels.tolist()):
        texts.append("".join(DIGIT_SYMBOLS[level] for level in levels))
        names.append(f"{' '.join(images.captions[number])} {number}")
    return documents_from_texts(texts, names)
