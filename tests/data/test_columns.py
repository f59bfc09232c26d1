"""Columns and tables of several fields."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddiff.data.columns import (
    AT_ONCE,
    ColumnShape,
    FieldsDocuments,
    FieldsTable,
    TextColumn,
    TokenColumn,
    VectorColumn,
)
from ddiff.data.pictures import LevelPicture, grey_palette
from ddiff.errors import ArgumentError, DataError

IDS = np.arange(12).reshape(4, 3) % 5
VECTORS = np.arange(24.0).reshape(4, 3, 2)


def table(**columns: TextColumn | TokenColumn | VectorColumn) -> FieldsTable:
    return FieldsTable(columns)


def test_missing_values_are_read_as_empty_texts_and_zeros() -> None:
    marks = [True, False, True, True]
    holes = VECTORS.copy()
    holes[1] = np.nan
    found = table(
        text=TextColumn(["a", None, "", "b"]),
        image=TokenColumn(np.where(np.array(marks)[:, None], IDS, 99), 5, present=marks),
        latent=VectorColumn.from_array(holes, present=marks),
    )
    assert found.missing() == {"text": 1, "image": 1, "latent": 1}
    texts = found.read_texts("text", [1, 2])
    assert texts.values == ["", ""]
    assert texts.present.tolist() == [False, True]
    ids = found.read("image", [1, 3])
    assert ids.values.tolist() == [[0, 0, 0], IDS[3].tolist()]
    assert ids.present.tolist() == [False, True]
    vectors = found.read("latent", [3, 1])
    assert vectors.values.tolist() == [VECTORS[3].tolist(), np.zeros((3, 2)).tolist()]
    assert vectors.present.tolist() == [True, False]


def test_lacking_returns_the_combinations_that_occur() -> None:
    found = table(
        text=TextColumn(["a", None, None, "b"]),
        image=TokenColumn(IDS, 5, present=np.array([True, False, False, True])),
        latent=VectorColumn.from_array(VECTORS, present=np.array([True, True, True, False])),
    )
    assert found.lacking() == {frozenset({"text", "image"}), frozenset({"latent"})}
    assert table(text=TextColumn(["a", "b"])).lacking() == set()


def test_read_returns_the_samples_in_the_given_order() -> None:
    found = table(image=TokenColumn(IDS, 5)).read("image", [2, 0, 2])
    assert found.values.tolist() == IDS[[2, 0, 2]].tolist()
    assert found.values.dtype == np.int64


@pytest.mark.parametrize("numbers", [[4], [-1], [[0]]])
def test_read_refuses_sample_numbers_out_of_range(numbers: list[int]) -> None:
    with pytest.raises(ArgumentError, match=r"0\.\.3"):
        table(image=TokenColumn(IDS, 5)).read("image", numbers)


def test_table_refuses_columns_of_different_lengths() -> None:
    with pytest.raises(DataError, match='"image" has 4, "text" has 1'):
        table(image=TokenColumn(IDS, 5), text=TextColumn(["a"]))
    with pytest.raises(DataError, match="no column"):
        table()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (TokenColumn(IDS, 4), "0..3.*got 4 at position 1 of sample 1"),
        (TokenColumn(IDS - 1, 5), "got -1 at position 0 of sample 0"),
        (TokenColumn(IDS.astype(float), 5), "integers"),
        (TokenColumn(IDS[0], 5), "integers"),
        (TokenColumn(IDS, 5, present=[True] * 3), r"present must be bool \[4\]"),
        (TokenColumn(IDS, 5, present=[1, 1, 1, 1]), r"present must be bool \[4\]"),
        (TokenColumn(IDS, 5, names=["a"]), "one text per token"),
        (TextColumn(["a", 3]), "sample 1 is not text"),  # type: ignore[list-item]
        (TextColumn(["a\0"]), "NUL"),
    ],
)
def test_table_refuses_invalid_values_and_names_the_column(
    column: TextColumn | TokenColumn, message: str
) -> None:
    with pytest.raises(DataError, match=f'Column "field": .*{message}'):
        table(field=column)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_when_read(wrong: float) -> None:
    vectors = VECTORS.copy()
    vectors[2, 0, 1] = wrong
    found = table(latent=VectorColumn.from_array(vectors))
    assert len(found.read("latent", [0, 1, 3]).values) == 3
    with pytest.raises(DataError, match=r'Column "latent".*sample 2'):
        found.read("latent", [1, 2])
    with pytest.raises(DataError, match=r'Column "latent".*sample 2'):
        assert found.fingerprint


def test_vectors_of_another_shape_are_refused_when_read() -> None:
    column = VectorColumn(lambda numbers: (VECTORS[numbers], numbers >= 0), 4, 3, 5)
    with pytest.raises(DataError, match=r'Column "latent".*\(1, 3, 5\).*\(1, 3, 2\)'):
        table(latent=column).read("latent", [0])


def test_vectors_of_integers_are_refused() -> None:
    with pytest.raises(ArgumentError, match="floats"):
        VectorColumn.from_array(IDS)


def test_one_vector_per_sample_may_be_an_array_of_two_dimensions() -> None:
    column = VectorColumn.from_array(VECTORS[:, 0])
    assert column.shape == ColumnShape("vectors", 1, width=2)
    assert column.read([1]).values.tolist() == [[VECTORS[1, 0].tolist()]]


def test_fingerprint_depends_on_every_value_and_mark() -> None:
    marks = [True, True, True, False]
    other = IDS.copy()
    other[3, 2] = 0
    tables = [
        table(image=TokenColumn(IDS, 5)),
        table(image=TokenColumn(other, 5)),
        table(image=TokenColumn(IDS, 6)),
        table(image=TokenColumn(IDS, 5, present=marks)),
        table(other=TokenColumn(IDS, 5)),
        table(image=VectorColumn.from_array(VECTORS)),
        table(image=VectorColumn.from_array(VECTORS + 1e-9)),
        table(image=VectorColumn.from_array(VECTORS, present=marks)),
        table(image=TextColumn(["ab", "c"])),
        table(image=TextColumn(["a", "bc"])),
        table(image=TextColumn(["a", ""])),
        table(image=TextColumn(["a", None])),
    ]
    found = [one.fingerprint for one in tables]
    assert all(len(one) == 32 for one in found)
    assert len(set(found)) == len(found)


def test_fingerprint_ignores_values_of_missing_samples_and_types() -> None:
    marks = [True, True, True, False]
    other = IDS.copy()
    other[3] = 77
    first = table(image=TokenColumn(IDS, 5, present=marks)).fingerprint
    assert table(image=TokenColumn(other, 5, present=marks)).fingerprint == first
    small = IDS.astype(np.uint8)
    assert table(image=TokenColumn(small, 5, present=marks)).fingerprint == first


def test_fingerprint_reads_mapped_vectors_in_blocks(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npy"
    values = np.random.default_rng(0).normal(size=(AT_ONCE + 3, 2)).astype(np.float32)
    np.save(path, values)
    mapped = np.load(path, mmap_mode="r")
    sizes = []

    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sizes.append(len(numbers))
        return mapped[numbers][:, None], np.ones(len(numbers), bool)

    column = VectorColumn(read, len(values), 1, 2)
    assert column.fingerprint == VectorColumn.from_array(values).fingerprint
    assert sizes == [AT_ONCE, 3]


def test_known_fingerprint_reads_no_vectors() -> None:
    def read(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("vectors were read")

    assert VectorColumn(read, 4, 1, 2, fingerprint="ab").fingerprint == "ab"


def test_columns_tell_their_unit() -> None:
    picture = LevelPicture(1, 3, grey_palette(5))
    assert TextColumn(["a"]).unit == "token"
    assert TokenColumn(IDS, 5).unit == "token"
    assert TokenColumn(IDS, 5, picture).unit == "pixel"
    assert VectorColumn.from_array(VECTORS).unit == "number"


def test_documents_refuse_parts_with_different_columns() -> None:
    train = table(image=TokenColumn(IDS, 5), text=TextColumn(list("abcd")))
    assert list(FieldsDocuments(train, train).shapes) == ["image", "text"]
    with pytest.raises(DataError, match=r'train has "image" .*validation has "image"'):
        FieldsDocuments(train, table(image=TokenColumn(IDS, 5)))
    wider = table(image=TokenColumn(IDS, 6), text=TextColumn(list("abcd")))
    with pytest.raises(DataError, match=r"3 of 5 tokens.*3 of 6 tokens"):
        FieldsDocuments(train, wider)


def test_reading_texts_as_arrays_is_refused() -> None:
    found = table(text=TextColumn(["a"]))
    with pytest.raises(ArgumentError, match="read_texts"):
        found.read("text", [0])
    with pytest.raises(ArgumentError, match=r"3 of 5 tokens.*`read`"):
        table(image=TokenColumn(IDS, 5)).read_texts("image", [0])
