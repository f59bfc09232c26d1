"""Texts with vectors from files: manifests, shards of vectors and folders of `ddiff encode`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hash_encoder import DIM, HashEncoder, hash_vector, make_documents, run_job
from refusals import message

from ddiff.data.columns import FieldsDocuments, TextColumn
from ddiff.data.documents import documents_from_texts, split_documents
from ddiff.data.paired_vectors import (
    find_shard_shape,
    find_vector_shape,
    read_encoded_texts,
    read_vector_files,
    read_vector_shards,
)
from ddiff.errors import ArgumentError

TEXTS = [f"text number {number}" for number in range(40)]
WIDTH = 3


def vector_of(number: int) -> np.ndarray:
    return np.arange(WIDTH, dtype=np.float32) + number


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def check_pairs(documents: FieldsDocuments, texts: list[str] = TEXTS) -> None:
    """Assert that every text has the vector of its number, and that no text is lost."""
    found = []
    for table in (documents.train, documents.validation):
        numbers = np.arange(len(table))
        read = table.read_texts("text", numbers)
        vectors = table.read("latent", numbers)
        assert read.present.all()
        assert vectors.present.all()
        for text, vector in zip(read.values, vectors.values):
            assert np.array_equal(vector, vector_of(texts.index(text))[None])
        found += read.values
    assert sorted(found) == sorted(texts)


def held_out_texts(texts: list[str], held_out: float) -> list[str]:
    """Return the texts that a data set of texts holds out."""
    return split_documents(documents_from_texts(texts), held_out, "by line").validation["text"][:]


# ---------------------------------------------------------------------- one file per text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with 40 texts in the published layout, one vector [1,3] each."""
    (tmp_path / "texts" / "train").mkdir(parents=True)
    (tmp_path / "latents" / "train").mkdir(parents=True)
    manifest = []
    for number, text in enumerate(TEXTS):
        name = f"corpus_{number:08d}_abc"
        (tmp_path / "texts" / "train" / f"{name}.txt").write_text(text)
        np.save(tmp_path / "latents" / "train" / f"{name}.npy", vector_of(number)[None])
        manifest.append(
            {
                "text": text,
                "text_path": f"texts/train/{name}.txt",
                "latent_path": f"latents/train/{name}.npy",
                "dataset": "corpus",
                "id": number,
            }
        )
    write_json(tmp_path / "train_data.json", manifest)
    return tmp_path


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "train_data.json").read_text())


def change_manifest(folder: Path, number: int, **values: Any) -> None:
    manifest = read_manifest(folder)
    manifest[number].update(values)
    write_json(folder / "train_data.json", manifest)


def test_vector_files_pairs_every_text_with_its_vector(folder: Path) -> None:
    check_pairs(read_vector_files(str(folder), held_out=0.3))
    assert find_vector_shape(str(folder)) == (1, WIDTH)


def test_vector_files_hold_out_the_same_texts_as_a_data_set_of_texts(folder: Path) -> None:
    documents = read_vector_files(str(folder), held_out=0.3)
    numbers = np.arange(len(documents.validation))
    held = documents.validation.read_texts("text", numbers).values
    assert held == held_out_texts(TEXTS, 0.3)


def test_vector_files_without_manifest_pairs_files_of_equal_names(folder: Path) -> None:
    (folder / "train_data.json").unlink()
    check_pairs(read_vector_files(str(folder), held_out=0.3))


def test_vector_files_reads_text_path_if_the_manifest_has_no_text(folder: Path) -> None:
    manifest = read_manifest(folder)
    for sample in manifest:
        del sample["text"]
    write_json(folder / "train_data.json", manifest)
    check_pairs(read_vector_files(str(folder), held_out=0.3))


def test_vector_files_finds_files_of_a_folder_that_was_moved(folder: Path) -> None:
    manifest = read_manifest(folder)
    for sample in manifest:
        sample["latent_path"] = "/elsewhere/" + sample["latent_path"]
    write_json(folder / "train_data.json", manifest)
    check_pairs(read_vector_files(str(folder), held_out=0.3))


def test_vector_files_uses_the_validation_manifest(folder: Path) -> None:
    manifest = read_manifest(folder)
    write_json(folder / "train_data.json", manifest[:30])
    write_json(folder / "validation_data.json", manifest[30:])
    documents = read_vector_files(str(folder))
    assert (len(documents.train), len(documents.validation)) == (30, 10)
    check_pairs(documents)


def test_vector_files_refuses_the_training_manifest_for_validation(folder: Path) -> None:
    text = message(read_vector_files, str(folder), validation="train_data.json")
    assert "memorization" in text


def test_vector_files_warns_of_validation_texts_in_the_training_part(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = read_manifest(folder)
    write_json(folder / "train_data.json", manifest[:31])
    write_json(folder / "validation_data.json", manifest[30:])
    with caplog.at_level(logging.WARNING):
        read_vector_files(str(folder))
    assert "1 of the 10 documents" in caplog.text


def test_vector_files_of_another_dimension_are_refused_with_both_files(folder: Path) -> None:
    path = sorted((folder / "latents" / "train").iterdir())[7]
    np.save(path, np.zeros((1, WIDTH + 1), np.float32))
    text = message(read_vector_files, str(folder), held_out=0.3)
    assert path.name in text
    assert f"{WIDTH + 1} numbers" in text
    assert f"of {WIDTH}." in text


def test_missing_vector_file_is_an_error_that_names_sample_and_file(folder: Path) -> None:
    path = sorted((folder / "latents" / "train").iterdir())[7]
    path.unlink()
    text = message(read_vector_files, str(folder))
    assert "train_data.json object 8" in text
    assert path.name in text
    assert 'missing = "absent"' in text


def test_missing_vectors_and_texts_are_marked_and_counted_if_absent(folder: Path) -> None:
    change_manifest(folder, 3, latent_path=None)
    change_manifest(folder, 4, text=" ", text_path=None)
    documents = read_vector_files(str(folder), held_out=0.3, missing="absent")
    missing = {"text": 0, "latent": 0}
    for table in (documents.train, documents.validation):
        for name, count in table.missing().items():
            missing[name] += count
        read = table.read("latent", np.arange(len(table)))
        assert not read.values[~read.present].any()
    assert missing == {"text": 1, "latent": 1}


def test_sample_without_text_and_vectors_is_always_refused(folder: Path) -> None:
    change_manifest(folder, 3, latent_path=None, text=None, text_path=None)
    assert "neither a text nor vectors" in message(read_vector_files, str(folder), missing="absent")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (np.zeros((1, WIDTH), np.int64), "must hold one array of floats"),
        (np.zeros((2, 2, WIDTH), np.float32), "one vector [d] or several"),
        (None, "cannot be read"),
    ],
)
def test_vector_file_with_other_content_is_refused_with_its_name(
    folder: Path, content: np.ndarray | None, part: str
) -> None:
    path = sorted((folder / "latents" / "train").iterdir())[0]
    if content is None:
        path.write_bytes(path.read_bytes()[:-1])  # the last byte of the vectors is missing
    else:
        np.save(path, content)
    text = message(read_vector_files, str(folder), held_out=0.3)
    assert part in text
    assert path.name in text


def test_vector_files_that_are_damaged_later_raise_an_error_with_column_and_file(
    folder: Path,
) -> None:
    documents = read_vector_files(str(folder), held_out=0.3)
    for path in (folder / "latents" / "train").iterdir():
        path.write_bytes(b"damaged")
    text = message(documents.train.read, "latent", [0])
    assert 'Column "latent"' in text
    assert ".npy" in text


def test_fingerprint_of_vector_files_depends_on_their_contents(folder: Path) -> None:
    before = read_vector_files(str(folder), held_out=0.3).train.fingerprint
    assert read_vector_files(str(folder), held_out=0.3).train.fingerprint == before
    for path in (folder / "latents" / "train").iterdir():
        np.save(path, np.load(path) + 1)
    assert read_vector_files(str(folder), held_out=0.3).train.fingerprint != before


def test_vectors_of_published_files_are_marked_as_computed_from_the_text(folder: Path) -> None:
    column = read_vector_files(str(folder), held_out=0.3).train["latent"]
    assert column.shape.computed_from == "text"
    free = read_vector_files(str(folder), held_out=0.3, computed=False).train["latent"]
    assert free.shape.computed_from is None


def test_several_vectors_of_a_text_are_read_as_positions(folder: Path) -> None:
    for path in (folder / "latents" / "train").iterdir():
        np.save(path, np.repeat(np.load(path), 5, 0))
    documents = read_vector_files(str(folder), held_out=0.3)
    assert documents.train.read("latent", [0, 1]).values.shape == (2, 5, WIDTH)


# ---------------------------------------------------------------------- shards of vectors


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Folder with 40 lines and four shards of ten vectors."""
    (tmp_path / "latent_shards").mkdir()
    lines = []
    for number, text in enumerate(TEXTS):
        shard, row = divmod(number, 10)
        lines.append(json.dumps({"text": text, "shard": shard, "idx": row, "dataset": "corpus"}))
    (tmp_path / "train_data.jsonl").write_text("\n".join(lines) + "\n")
    for shard in range(4):
        vectors = np.stack([vector_of(10 * shard + row) for row in range(10)])
        np.save(tmp_path / "latent_shards" / f"shard_{shard:04d}.npy", vectors)
    return tmp_path


def change_line(folder: Path, number: int, line: str) -> None:
    path = folder / "train_data.jsonl"
    lines = path.read_text().splitlines()
    lines[number] = line
    path.write_text("\n".join(lines))


def test_vector_shards_pairs_every_text_with_its_vector(sharded: Path) -> None:
    documents = read_vector_shards(str(sharded), held_out=0.3)
    check_pairs(documents)
    numbers = np.arange(len(documents.validation))
    held = documents.validation.read_texts("text", numbers).values
    assert held == held_out_texts(TEXTS, 0.3)
    assert find_shard_shape(str(sharded)) == (1, WIDTH)


def test_vector_shards_uses_the_validation_file(sharded: Path) -> None:
    path = sharded / "train_data.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:30]))
    (sharded / "validation_data.jsonl").write_text("\n".join(lines[30:]))
    documents = read_vector_shards(str(sharded))
    assert (len(documents.train), len(documents.validation)) == (30, 10)
    check_pairs(documents)


def test_vector_shards_reads_texts_beyond_ascii_and_blank_lines(sharded: Path) -> None:
    texts = ["süß", *TEXTS[1:]]
    line = json.dumps({"text": "süß", "shard": 0, "idx": 0}, ensure_ascii=False)
    change_line(sharded, 0, f"\n\n{line}\r")
    check_pairs(read_vector_shards(str(sharded), held_out=0.3), texts)


def test_texts_of_vector_shards_are_a_sequence_with_slices_and_iteration(sharded: Path) -> None:
    column = read_vector_shards(str(sharded), held_out=0.3).train["text"]
    assert isinstance(column, TextColumn)
    every = list(column.texts)
    assert every == [column.texts[number] for number in range(len(column))]
    assert column.texts[2:7:2] == every[2:7:2]
    assert column.texts[-1] == every[-1]


def test_vector_shards_missing_file_is_named_with_the_line(sharded: Path) -> None:
    (sharded / "latent_shards" / "shard_0002.npy").unlink()
    text = message(read_vector_shards, str(sharded))
    assert "train_data.jsonl line 21 names the shard 2" in text
    assert "0, 1, 3" in text


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"text": "a", "shard": 1, "idx": 10}', "row 10 of the shard 1, which has 10 rows"),
        ('{"text": "a", "shard": -1, "idx": 0}', "shard must be an integer >= 0"),
        ('{"text": "a", "shard": 1, "idx": true}', "idx must be an integer >= 0"),
        ('{"text": "a", "shard": 1}', "must be an object with the keys text, shard and idx"),
        ('{"text": "a", "shard": 1, "idx": 0}{"text": "b"}', "joined two lines"),
        ('{"text": 3, "shard": 1, "idx": 0}', "is not text"),
        ('{"text": "a", "shard": null, "idx": 0}', "has no vectors"),
        ('{"text": "", "shard": 1, "idx": 0}', "has no text"),
    ],
)
def test_vector_shards_names_the_line_that_cannot_be_used(
    sharded: Path, line: str, part: str
) -> None:
    change_line(sharded, 5, line)
    text = message(read_vector_shards, str(sharded))
    assert part in text
    assert "train_data.jsonl line 6" in text


def test_vector_shards_of_another_dimension_are_refused(sharded: Path) -> None:
    np.save(sharded / "latent_shards" / "shard_0002.npy", np.zeros((10, WIDTH + 1), np.float32))
    text = message(read_vector_shards, str(sharded))
    assert "shard_0002.npy" in text
    assert str([10, WIDTH + 1]) in text


def test_vector_shards_marks_missing_values_if_absent(sharded: Path) -> None:
    change_line(sharded, 5, '{"text": "a", "shard": null, "idx": null}')
    change_line(sharded, 6, '{"text": null, "shard": 0, "idx": 6}')
    documents = read_vector_shards(str(sharded), held_out=0.3, missing="absent")
    missing = [table.missing() for table in (documents.train, documents.validation)]
    assert sum(found["latent"] for found in missing) == 1
    assert sum(found["text"] for found in missing) == 1


def test_held_out_outside_the_unit_interval_is_refused(sharded: Path) -> None:
    text = message(read_vector_shards, str(sharded), held_out=1.0, error=ArgumentError)
    assert "held_out must lie in (0, 1)" in text


# ---------------------------------------------------------------------- folders of ddiff encode


def test_encoded_texts_have_the_vectors_of_their_documents(tmp_path: Path) -> None:
    run_job(tmp_path / "vectors")
    made = read_encoded_texts(make_documents(), str(tmp_path / "vectors"), dim=DIM)
    for table in (made.train, made.validation):
        numbers = np.arange(len(table))
        texts = table.read_texts("text", numbers).values
        expected = np.stack([hash_vector(text) for text in texts])[:, None]
        assert np.array_equal(table.read("latent", numbers).values, expected)
        assert table["latent"].shape.computed_from == "text"


@pytest.mark.parametrize(
    ("documents", "options", "part"),
    [
        ((60, 9), {"dim": DIM + 1}, f"must have {DIM + 1} dimensions"),
        ((60, 9), {"encoder": "other"}, "must have the fingerprint other"),
        ((59, 9), {}, "the train documents must have the fingerprint"),
    ],
)
def test_encoded_texts_of_another_recipe_are_refused(
    tmp_path: Path, documents: tuple[int, int], options: dict[str, Any], part: str
) -> None:
    run_job(tmp_path / "vectors")
    texts = make_documents(*documents)
    assert part in message(read_encoded_texts, texts, str(tmp_path / "vectors"), **options)


class HalfEncoder(HashEncoder):
    """Encoder that has no vector for every second text."""

    def encode(self, texts: Any) -> np.ndarray:
        vectors = super().encode(texts)
        for row, text in enumerate(texts):
            if int(text[-1]) % 2:
                vectors[row] = np.nan
        return vectors


def test_documents_without_vector_are_marked_and_counted(tmp_path: Path) -> None:
    run_job(tmp_path / "vectors", encoder=HalfEncoder())
    made = read_encoded_texts(make_documents(), str(tmp_path / "vectors"))
    assert made.train.missing() == {"text": 0, "latent": 30}
    assert made.train.read("latent", [0, 1]).present.tolist() == [True, False]
