"""Bundled digits as rows of symbols."""

from __future__ import annotations

import pytest
from ddiff_core.data import DigitRows

from ddiff.data.captioned_images import load_digits
from ddiff.data.digit_rows import DIGIT_SYMBOLS, load_digit_rows
from ddiff.data.packing import pack
from ddiff.data.tokenizer import AlphabetTokenizer
from ddiff.errors import ArgumentError


def test_digit_rows_encode_the_levels_of_the_bundled_images() -> None:
    documents = load_digit_rows(length=64)
    tokenizer = AlphabetTokenizer(DIGIT_SYMBOLS)
    for part, images in zip((documents.train, documents.validation), load_digits(), strict=True):
        assert tokenizer.encode(part["text"][:]) == images.levels.tolist()
    assert (len(documents.train), len(documents.validation)) == (1347, 450)
    assert documents.train["name"][:2] == ["zero 0", "one 1"]


def test_digit_rows_are_packed_to_one_image_per_row() -> None:
    documents = load_digit_rows(length=64)
    rows = pack(documents.validation, AlphabetTokenizer(DIGIT_SYMBOLS), 64)
    assert len(rows) == 450
    assert rows[[7]].num_valid.tolist() == [64]


@pytest.mark.parametrize("component", [DigitRows.build, DigitRows.preview])
def test_digit_rows_refuse_a_length_other_than_the_number_of_pixels(component: object) -> None:
    others = {} if component is DigitRows.preview else {"seed": 0, "cache": None}
    with pytest.raises(ArgumentError, match=r"\[data\] length must be 64.*got 32"):
        component(DigitRows.Config(), length=32, **others)  # type: ignore[operator]
