"""Token ids with captions from .npy files and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import message

from ddiff.data.columns import FieldsDocuments
from ddiff.data.token_grids import GridFiles, GridFormat, read_token_grids
from ddiff.errors import ArgumentError

COUNT = 30
FORM = GridFormat(2, 3, 50)
IDS = np.random.default_rng(0).integers(0, 50, (COUNT, 6))


def check_ids(documents: FieldsDocuments) -> None:
    found = []
    for table in (documents.train, documents.validation):
        numbers = np.arange(len(table))
        captions = table.read_texts("text", numbers).values
        for caption, ids in zip(captions, table.read("image", numbers).values):
            assert np.array_equal(ids, IDS[int(caption)])
        found += captions
    assert sorted(found, key=int) == [str(number) for number in range(COUNT)]
    assert documents.shapes["image"] == FORM.shape


def write_array(folder: Path, ids: np.ndarray = IDS, lines: int = COUNT) -> GridFiles:
    np.save(folder / "ids.npy", ids)
    (folder / "captions.txt").write_text("\n".join(map(str, range(lines))) + "\n")
    return GridFiles(str(folder / "ids.npy"), str(folder / "captions.txt"))


def make_rows() -> list[dict[str, Any]]:
    return [{"ids": IDS[number].tolist(), "caption": str(number)} for number in range(COUNT)]


def write_lines(folder: Path, rows: list[dict[str, Any]]) -> GridFiles:
    (folder / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return GridFiles(str(folder / "ids.jsonl"))


@pytest.mark.parametrize("shape", [(COUNT, 6), (COUNT, 2, 3)])
def test_array_of_ids_is_paired_with_the_lines_of_captions(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    files = write_array(tmp_path, IDS.reshape(shape).astype(np.int32))
    check_ids(read_token_grids(files, FORM, held_out=0.3))


def test_tables_give_the_same_samples_as_an_array(tmp_path: Path) -> None:
    expected = read_token_grids(write_array(tmp_path), FORM, held_out=0.3)
    lines = read_token_grids(write_lines(tmp_path, make_rows()), FORM, held_out=0.3)
    pq.write_table(pa.Table.from_pylist(make_rows()), tmp_path / "ids.parquet")
    table = read_token_grids(GridFiles(str(tmp_path / "ids.parquet")), FORM, held_out=0.3)
    for documents in (lines, table):
        check_ids(documents)
        assert documents.train.fingerprint == expected.train.fingerprint


def test_validation_ids_are_read_and_compared_with_the_training_ids(tmp_path: Path) -> None:
    for name, part in (("train", slice(20)), ("held", slice(20, None))):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name, make_rows()[part])
    train = GridFiles(str(tmp_path / "train" / "ids.jsonl"))
    held = GridFiles(str(tmp_path / "held" / "ids.jsonl"))
    documents = read_token_grids(train, FORM, validation=held)
    assert (len(documents.train), len(documents.validation)) == (20, 10)
    check_ids(documents)
    assert "memorization" in message(read_token_grids, train, FORM, validation=train)


def test_missing_ids_and_captions_are_refused_or_marked(tmp_path: Path) -> None:
    rows = make_rows()
    rows[3]["ids"] = None
    rows[4]["caption"] = ""
    files = write_lines(tmp_path, rows)
    assert "ids.jsonl line 4 has no ids" in message(read_token_grids, files, FORM)
    documents = read_token_grids(files, FORM, held_out=0.3, missing="absent")
    counts = [table.missing() for table in (documents.train, documents.validation)]
    assert sum(found["image"] for found in counts) == 1
    assert sum(found["text"] for found in counts) == 1
    rows[3]["caption"] = None
    files = write_lines(tmp_path, rows)
    assert "neither ids nor a caption" in message(read_token_grids, files, FORM, missing="absent")


@pytest.mark.parametrize(
    ("ids", "part"),
    [
        ([0, 1, 2], "must be a list of 6 integers"),
        ([0, 1, 2, 3, 4, 50], "must lie in 0..49"),
        ([0, 1, 2, 3, 4, -1], "must lie in 0..49"),
        ([0, 1, 2, 3, 4, 0.5], "must be a list of 6 integers"),
        ([[0, 1], [2]], "must be a list of 6 integers"),
    ],
)
def test_row_with_other_ids_is_named(tmp_path: Path, ids: Any, part: str) -> None:
    rows = make_rows()
    rows[7]["ids"] = ids
    text = message(read_token_grids, write_lines(tmp_path, rows), FORM)
    assert "ids.jsonl line 8" in text
    assert part in text


def test_array_of_another_form_is_refused(tmp_path: Path) -> None:
    assert "must hold integers [N,6]" in message(
        read_token_grids, write_array(tmp_path, IDS[:, :5]), FORM
    )
    assert "must hold integers [N,6]" in message(
        read_token_grids, write_array(tmp_path, IDS * 1.0), FORM
    )
    assert "it has 29" in message(read_token_grids, write_array(tmp_path, lines=29), FORM)
    text = message(read_token_grids, write_array(tmp_path, IDS + 1), FORM)
    assert "0..49" in text
    assert 'Column "image"' in text


def test_captions_belong_to_arrays_only(tmp_path: Path) -> None:
    array = write_array(tmp_path)
    assert "has no captions" in message(
        read_token_grids, GridFiles(array.ids), FORM, error=ArgumentError
    )
    table = write_lines(tmp_path, make_rows())
    both = GridFiles(table.ids, array.captions)
    assert "captions is only for ids in a .npy file" in message(
        read_token_grids, both, FORM, error=ArgumentError
    )
