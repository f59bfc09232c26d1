"""Conditions (labels, vectors): from the fields of a file to the positions of packed rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from ddiff_core.data import JsonLines

from ddiff.data.cache import Cache
from ddiff.data.condition_forms import Label, Vector
from ddiff.data.conditions import read_conditions
from ddiff.data.documents import Documents
from ddiff.data.jsonl import read_json_lines
from ddiff.data.packing import batch_rows, pack
from ddiff.data.tokenizer import AlphabetTokenizer, BytePairTokenizer
from ddiff.errors import ArgumentError, DataError

LINES: list[dict[str, Any]] = [
    {"text": "the cat sat", "author": 2, "style": [0.5, -1]},
    {"text": "a hat", "author": None, "style": None},
    {"text": "the dog ran to the sea", "author": 0, "style": [2.0, 3.0]},
]


@pytest.fixture
def file(tmp_path: Path) -> str:
    return written(tmp_path, LINES)


def written(folder: Path, lines: list[Any], name: str = "some.jsonl") -> str:
    (folder / name).write_text(
        "".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8"
    )
    return str(folder / name)


def read(file: str, cache: Cache | None = None) -> Documents:
    other = written(Path(file).parent, [{"text": "held out"}], "held_out.jsonl")
    return read_json_lines(
        [file], labels=["author"], vectors=["style"], validation=[other], cache=cache
    )


def test_read_json_lines_reads_labels_vectors_and_missing_values(file: str, tmp_path: Path) -> None:
    documents = read(file)
    assert documents.train["text"][:] == [line["text"] for line in LINES]
    values = read_conditions(documents.train, ["author", "style"]).values
    assert values["author"].tolist() == [2, -1, 0]
    torch.testing.assert_close(
        values["style"],
        torch.tensor([[0.5, -1.0], [torch.nan] * 2, [2.0, 3.0]]),
        equal_nan=True,
        rtol=0,
        atol=0,
    )
    cached = read_conditions(read(file, Cache(tmp_path / "cache")).train, ["author", "style"])
    assert cached.fingerprint == read_conditions(documents.train, ["author", "style"]).fingerprint
    assert cached.fingerprint != read_conditions(documents.train, ["author"]).fingerprint


def test_packed_batch_has_one_condition_per_position(file: str) -> None:
    documents = read(file).train
    tokenizer = BytePairTokenizer.train(documents["text"], 260)
    rows, conditions = (
        pack(documents, tokenizer, 8),
        read_conditions(documents, ["author", "style"]),
    )
    batch = batch_rows(rows, np.arange(len(rows)), conditions=conditions)
    assert batch.packed
    assert batch.conditions["author"].shape == batch.ids.shape
    expected = torch.tensor([2, -1, 0])[batch.document]
    assert torch.equal(batch.conditions["author"], expected)
    # Rows with one document each would not test packing.
    assert len(expected[0].unique()) > 1 or len(expected[1].unique()) > 1
    assert batch.conditions["style"].shape == (*batch.ids.shape, 2)
    assert torch.equal(batch.conditions["style"].isnan().any(-1), expected == -1)


def test_unpacked_batch_has_one_condition_per_row() -> None:
    documents = Dataset.from_dict({"text": ["ACGT", "TTTT"], "kind": [1, 0]})
    rows = pack(documents, AlphabetTokenizer("ACGT"), 4)
    batch = batch_rows(rows, [1, 0, 1], conditions=read_conditions(documents, ["kind"]))
    assert batch.conditions["kind"].tolist() == [0, 1, 0]


def test_jsonl_component_reads_the_named_fields(file: str) -> None:
    other = written(Path(file).parent, [{"text": "held out"}], "held_out.jsonl")
    config = JsonLines.Config(files=(file,), validation=(other,), labels=("author",))
    assert JsonLines.build(config, length=8, seed=0, cache=None).train.column_names == [
        "text",
        "name",
        "author",
    ]
    assert JsonLines.reads(config) == (file, other)


BAD_LINES: dict[str, tuple[Any, str]] = {
    "no text": ({"author": 1}, 'line 3 has no field "text"'),
    "no object": ([1], "line 3 must be an object"),
    "a class by name": (
        {"text": "x", "author": "austen"},
        'line 3: the label "author" must be an integer in 0',
    ),
    "a negative label": ({"text": "x", "author": -1}, "line 3: the label"),
    "a vector of text": ({"text": "x", "style": ["a"]}, 'line 3: the vector "style"'),
    "a number for a vector": ({"text": "x", "style": 3}, 'line 3: the vector "style"'),
    "text that is none": ({"text": 3}, "line 3 is not text"),
}


@pytest.mark.parametrize("name", list(BAD_LINES))
def test_read_json_lines_raises_an_error_that_names_the_invalid_line(
    name: str, tmp_path: Path
) -> None:
    line, expected = BAD_LINES[name]
    with pytest.raises(DataError) as raised:
        read(written(tmp_path, [LINES[0], line]))  # each line is followed by a blank one
    assert expected in str(raised.value)


def test_read_json_lines_refuses_broken_json_and_a_field_listed_twice(
    tmp_path: Path, file: str
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": ')
    with pytest.raises(DataError, match=r"broken\.jsonl line 2 is not JSON"):
        read(str(tmp_path / "broken.jsonl"))
    with pytest.raises(ArgumentError, match="author"):
        read_json_lines([file], labels=["author"], vectors=["author"], validation=[file])


def test_read_conditions_raises_an_error_that_names_an_unusable_column() -> None:
    documents = Dataset.from_dict(
        {"text": ["a", "b"], "kind": ["x", "y"], "wide": [[1.0], [1.0, 2.0]], "none": [None] * 2}
    )
    with pytest.raises(DataError, match=r"\[denoiser\] conditions.*\['kind', 'wide', 'none'\]"):
        read_conditions(documents, ["author"])
    with pytest.raises(DataError, match="'x'"):
        read_conditions(documents, ["kind"])
    with pytest.raises(DataError, match=r"lengths \[1, 2\]"):
        read_conditions(documents, ["wide"])
    with pytest.raises(DataError, match="none"):
        read_conditions(documents, ["none"])
    with pytest.raises(DataError, match="-3"):
        read_conditions(Dataset.from_dict({"text": ["a"], "kind": [-3]}), ["kind"])


def test_read_conditions_accepts_a_column_without_values(tmp_path: Path) -> None:
    file, bare = written(tmp_path, LINES), written(tmp_path, [{"text": "x"}], "bare.jsonl")
    part = read_json_lines(
        [file], labels=["author"], vectors=["style"], validation=[bare]
    ).validation
    values = read_conditions(part, ["author", "style"], {"style": Vector(2)}).values
    assert values["author"].tolist() == [-1]
    assert values["style"].shape == (1, 2)
    assert bool(values["style"].isnan().all())


@pytest.mark.parametrize(
    "line", [{"text": "x", "auhtor": 1}, {"text": "x", "author": None, "auhtor": 2}]
)
def test_read_json_lines_refuses_a_label_field_without_values(
    line: dict[str, Any], tmp_path: Path
) -> None:
    cache, file, bare = (
        Cache(tmp_path / "cache"),
        written(tmp_path, LINES),
        written(tmp_path, [line], "bare.jsonl"),
    )
    # Put the documents of both files into the cache.
    read_json_lines([file], labels=["author"], validation=[bare], cache=cache)
    for labels, kept in ((["author"], None), (["author"], cache)):
        with pytest.raises(
            DataError, match=r'labels names the field "author".*bare\.jsonl.*Did you mean "auhtor"'
        ):
            read_json_lines([bare], labels=labels, validation=[file], cache=kept)
    with pytest.raises(DataError, match=r'vectors names the field "author".*none'):
        read_json_lines([written(tmp_path, [{"text": "x"}])], vectors=["author"], validation=[bare])


def test_read_conditions_refuses_a_column_of_the_wrong_type() -> None:
    documents = Dataset.from_dict({"text": ["a", "b"], "kind": [0, 4], "wide": [[1.0, 2.0], None]})
    for name, form in (
        ("kind", Label(5)),
        ("kind", Label()),
        ("wide", Vector(2)),
        ("wide", Vector()),
    ):
        assert (
            read_conditions(documents, [name], {name: form}).fingerprint
            == read_conditions(documents, [name]).fingerprint
        )
    for name, form, expected in (
        ("kind", Label(4), r'label 4 in "kind".*4 classes.*classes = 5'),
        ("kind", Vector(1), r'labels in "kind".*width 1'),
        ("wide", Vector(3), r'length 2 in "wide".*width 3.*width = 2'),
        ("wide", Label(3), r'length 2 in "wide".*3 classes'),
    ):
        with pytest.raises(DataError, match=expected):
            read_conditions(documents, [name], {name: form})
