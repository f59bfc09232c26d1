"""Streamed rows equal the repeated packed text, and any block can be read from a cursor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import TOKENIZER, chunks_of, json_file, parquet_files, sentences
from ddiff_core.data import Files

from ddiff.data.cache import Cache
from ddiff.data.corpus import StreamedCorpus, build_train_rows, build_validation_rows
from ddiff.data.documents import documents_from_texts, split_documents
from ddiff.data.packing import batch_rows, pack
from ddiff.data.streaming import StreamedRows
from ddiff.data.tokenizer_workers import Chunk
from ddiff.errors import ArgumentError, DataError

TEXTS = sentences(90)
LENGTH, BLOCK, HELD_OUT = 16, 8, 0.2
TRAIN = split_documents(documents_from_texts(TEXTS), HELD_OUT, "").train
PACKED = pack(TRAIN, TOKENIZER, LENGTH)


def streamed(chunks: Any = None, **settings: Any) -> StreamedRows:
    given = {"head": PACKED, "fingerprint": "", "block": BLOCK, "held_out": HELD_OUT} | settings
    return StreamedRows(chunks or chunks_of(TEXTS), TOKENIZER, LENGTH, **given)


def expected(num_rows: int) -> tuple[Any, Any]:
    """Return ids and document numbers of `num_rows` rows of the packed text, repeated."""
    ids, document = PACKED.stream()
    epochs = -(-num_rows * LENGTH // len(ids))
    numbers = np.concatenate([document + epoch * len(TRAIN) for epoch in range(epochs)])
    size = num_rows * LENGTH
    return np.tile(ids, epochs)[:size].reshape(-1, LENGTH), numbers[:size].reshape(-1, LENGTH)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("block", [1, 8, 300])
def test_streamed_rows_equal_the_packed_rows_of_the_repeated_text(block: int, workers: int) -> None:
    count = 3 * len(PACKED) + 5
    ids, document = expected(count)
    rows = streamed(block=block, workers=workers)
    for start in range(0, count, 7):
        numbers = np.arange(start, min(start + 7, count))
        found = rows[numbers]
        assert (found.ids == ids[numbers]).all()
        assert (found.document == document[numbers]).all()
        assert (found.num_valid == LENGTH).all()


def test_streamed_rows_do_not_depend_on_the_order_of_reading() -> None:
    ids, document = expected(200)
    rows = streamed()
    for numbers in np.random.default_rng(0).integers(0, 200, (30, 5)):
        found = rows[numbers]
        assert (found.ids == ids[numbers]).all()
        assert (found.document == document[numbers]).all()


def test_shuffled_stream_permutes_each_block_separately() -> None:
    rows = streamed(block=64)
    order = rows.order(3, np.arange(640)).reshape(10, 64)
    assert (np.sort(order, axis=1) == np.arange(640).reshape(10, 64)).all()
    within = order - 64 * np.arange(10)[:, None]
    assert len({tuple(row) for row in within.tolist()}) == 10
    assert (order != rows.order(4, np.arange(640)).reshape(10, 64)).any(1).all()
    assert (
        rows.order(3, np.array([[5, 700]])) == rows.order(3, [5, 700])
    ).all()  # for positions of any shape


class CountingSource:
    """Source that counts the texts it has yielded."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks
        self.texts = 0

    def __call__(self, cursor: Any) -> Iterator[Chunk]:
        for chunk in self.chunks(cursor):
            self.texts += len(chunk.texts)
            yield chunk


@pytest.mark.parametrize("place", ["list", "parquet", "json"])
def test_streamed_rows_resume_from_stored_cursors(tmp_path: Path, place: str) -> None:
    """Reading resumes at every block of two epochs.

    The file of cursors ends in an incomplete line, as after a kill; the line is ignored.
    """
    if place == "list":
        chunks: Any = chunks_of(TEXTS)
    else:
        file = (
            parquet_files(tmp_path / "p", TEXTS)
            if place == "parquet"
            else json_file(tmp_path / "a.jsonl", TEXTS)
        )
        config = Files.Config(files=(file,), held_out=HELD_OUT)
        chunks = Files.build(config, length=LENGTH, seed=0, cache=None).train_chunks
    count = 2 * len(PACKED)
    ids, document = expected(count + BLOCK)
    cursors = tmp_path / "cursors.jsonl"
    streamed(chunks, cursors=cursors)[np.arange(count)]
    with cursors.open("a") as file:
        file.write('\n{"block": 7, "sou')
    for block in range(count // BLOCK):
        counted = CountingSource(chunks)
        numbers = block * BLOCK + np.arange(BLOCK)
        found = streamed(counted, cursors=cursors)[numbers]
        assert (found.ids == ids[numbers]).all()
        assert (found.document == document[numbers]).all()
        if place == "list":
            # At most a few chunks are read, with at most one text per token.
            assert counted.texts <= 8 * 3 + BLOCK * LENGTH


def test_streamed_rows_resume_from_a_state_stored_as_json() -> None:
    rows, ids = streamed(), expected(100)[0]
    rows[np.arange(40)]
    counted = CountingSource(chunks_of(TEXTS))
    later = streamed(counted)
    later.restore(json.loads(json.dumps(rows.state())))
    assert (later[np.arange(40, 48)].ids == ids[40:48]).all()
    assert counted.texts < len(TEXTS) / 2


def test_streamed_rows_keep_at_most_three_blocks_in_memory() -> None:
    rows = streamed()
    rows[np.arange(200)]
    assert len(rows._blocks) <= 3


def test_streamed_rows_refuse_a_source_without_tokens() -> None:
    with pytest.raises(DataError, match="no token to train on"):
        streamed(chunks_of([]))[[0]]
    with pytest.raises(ArgumentError, match="block"):
        streamed(block=0)


def test_streamed_corpus_draws_validation_and_baselines_from_first_documents(
    tmp_path: Path,
) -> None:
    config = Files.Config(
        files=(parquet_files(tmp_path / "p", TEXTS),),
        held_out=HELD_OUT,
        streaming=True,
        head=50,
        block=BLOCK,
    )
    corpus = Files.build(config, length=LENGTH, seed=0, cache=None)
    assert isinstance(corpus, StreamedCorpus)
    head, cache = (
        split_documents(documents_from_texts(TEXTS[:50]), HELD_OUT, ""),
        Cache(tmp_path / "cache"),
    )
    rows, held = (
        build_train_rows(corpus, TOKENIZER, LENGTH, cache),
        build_validation_rows(corpus, TOKENIZER, LENGTH, cache),
    )
    assert held.fingerprint == pack(head.validation, TOKENIZER, LENGTH, separate=True).fingerprint
    assert (rows.token_counts() == pack(head.train, TOKENIZER, LENGTH).token_counts()).all()
    assert list(corpus.train["text"]) == head.train["text"][:]
    ids, document = expected(BLOCK * 20)
    batch = batch_rows(rows, np.arange(BLOCK * 20))
    assert (batch.ids.numpy() == ids).all()
    assert (batch.document.numpy() == document).all()
    assert batch.valid.all()
    assert len(list((tmp_path / "cache" / "streams").iterdir())) == 1


def test_streamed_corpus_stores_first_documents_of_both_sources(tmp_path: Path) -> None:
    train, other = (
        parquet_files(tmp_path / "t", TEXTS),
        parquet_files(tmp_path / "v", sentences(30, seed=1)),
    )
    config = Files.Config(files=(train,), validation=(other,), streaming=True, head=10)
    corpus = Files.build(config, length=LENGTH, seed=0, cache=None)
    assert list(corpus.train["text"]) == TEXTS[:10]
    assert list(corpus.validation["text"]) == sentences(30, seed=1)[:10]
    rows = build_train_rows(corpus, TOKENIZER, LENGTH, Cache(tmp_path / "cache"))
    assert (
        rows[[0, 1]].ids == pack(documents_from_texts(TEXTS), TOKENIZER, LENGTH)[[0, 1]].ids
    ).all()
