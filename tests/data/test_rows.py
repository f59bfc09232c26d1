"""Packing covers every token exactly once, pads only last, and knows where documents meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddiff.data.cache import Cache
from ddiff.data.corpus import build_train_rows, build_validation_rows
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.packing import (
    PackedRows,
    batch_rows,
    pack,
    pack_ids,
    pack_texts,
)
from ddiff.data.tokenizer import EOS, AlphabetTokenizer, BytePairTokenizer
from ddiff.errors import ArgumentError, DataError

TEXTS = ["the cat sat on the mat. " * n for n in (1, 7, 2, 30, 1, 1, 5)]
TOKENIZER = BytePairTokenizer.train(TEXTS, 265)


def ended(texts: list[str]) -> list[list[int]]:
    return [[*ids, 0] for ids in TOKENIZER.encode(texts)]


def in_order(rows: PackedRows) -> tuple[list[int], list[int]]:
    """Ids and documents of all valid positions, read from batches alone."""
    batch = batch_rows(rows, np.arange(len(rows)))
    return batch.ids[batch.valid].tolist(), batch.document[batch.valid].tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(alphabet="the cat\n", max_size=60), min_size=1, max_size=8),
    length=st.integers(1, 40),
    separate=st.booleans(),
)
def test_every_token_stands_once_in_order(texts: list[str], length: int, separate: bool) -> None:
    rows = pack(documents_from_texts(texts), TOKENIZER, length, separate=separate)
    ids, document = in_order(rows)
    assert ids == [number for row in ended(texts) for number in row]
    assert document == [number for number, row in enumerate(ended(texts)) for _ in row]
    assert rows.tokens.num_tokens == len(ids)


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_joined_rows_are_full_but_for_the_last(length: int) -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, length)
    total = sum(map(len, ended(TEXTS)))
    assert len(rows) == -(-total // length)
    num_valid = rows[:].num_valid
    assert (num_valid[:-1] == length).all()
    assert 1 <= num_valid[-1] <= length


def test_separate_rows_hold_one_document_each() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 16, separate=True)
    batch = batch_rows(rows, np.arange(len(rows)))
    assert (batch.document == batch.document[:, :1]).all()
    assert not batch.packed
    assert len(rows) == sum(-(-len(ids) // 16) for ids in ended(TEXTS))


def test_documents_beyond_one_round_of_tokenizing_are_joined_on() -> None:
    texts = [f"text {number}" for number in range(200)]
    ids, document = in_order(pack(documents_from_texts(texts), TOKENIZER, 7))
    assert ids == [number for row in ended(texts) for number in row]
    assert document[-1] == 199


def test_padding_is_the_end_mark_unscored_and_keeps_the_last_document() -> None:
    batch = batch_rows(pack(documents_from_texts(["the cat", "the mat"]), TOKENIZER, 50), [0])
    padding = ~batch.valid[0]
    assert padding.any()
    assert padding.tolist() == sorted(padding.tolist())  # padding stands last
    assert (batch.ids[0, padding] == TOKENIZER.eos_id).all()
    assert (batch.document[0, padding] == 1).all()
    assert torch.equal(batch.scored, batch.valid)


def test_the_end_mark_closes_each_document_and_is_scored() -> None:
    batch = batch_rows(pack(documents_from_texts(["the cat", "the mat"]), TOKENIZER, 50), [0])
    ends = (batch.ids[0] == 0) & batch.scored[0]
    assert int(ends.sum()) == 2


def test_a_batch_says_whether_some_row_holds_two_documents() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 16)
    documents = rows[:].document
    holds_two = (documents != documents[:, :1]).any(1)
    assert holds_two.any()
    assert not holds_two.all()
    for number in range(len(rows)):
        assert batch_rows(rows, [number]).packed == holds_two[number]


def test_a_batch_is_the_asked_rows_in_the_asked_order() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 8)
    order = np.array([3, 0, 5, 3])
    batch = batch_rows(rows, order)
    assert torch.equal(batch.ids, torch.from_numpy(rows[:].ids[order]).long())
    assert batch.index.tolist() == order.tolist()
    assert batch_rows(rows, order, index=[8, 9, 10, 11]).index.tolist() == [8, 9, 10, 11]
    assert (batch.ids.dtype, batch.document.dtype, batch.valid.dtype) == (
        torch.long,
        torch.long,
        torch.bool,
    )


def test_a_batch_moves_with_its_conditions() -> None:
    batch = batch_rows(pack(documents_from_texts(TEXTS), TOKENIZER, 8), [0, 1])
    batch.conditions["label"] = torch.zeros(2)
    moved = batch.to("meta")
    assert {
        moved.ids.device.type,
        moved.index.device.type,
        moved.conditions["label"].device.type,
    } == {"meta"}
    assert batch.ids.device.type == "cpu"
    assert moved.packed == batch.packed


def test_the_stream_is_the_tokens_without_padding() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 16, separate=True)
    ids, document = rows.stream()
    assert (ids.tolist(), document.tolist()) == in_order(rows)


def test_texts_become_rows_of_their_own() -> None:
    rows = pack_texts(["the cat", "the mat " * 20], TOKENIZER, 16)
    assert in_order(rows)[0] == [
        number for row in ended(["the cat", "the mat " * 20]) for number in row
    ]
    assert rows[[0]].document[0, 0] == 0
    assert rows[[1]].document[0, 0] == 1


def test_an_end_mark_spelled_in_a_text_ends_no_document() -> None:
    ids, _ = in_order(pack_texts([f"the {EOS} cat"], TOKENIZER, 64))
    assert ids.count(0) == 1


def test_symbols_give_one_row_per_document() -> None:
    tokenizer = AlphabetTokenizer("ACGT")
    for separate in (False, True):
        batch = batch_rows(
            pack(documents_from_texts(["ACGT", "TTTT"]), tokenizer, 4, separate=separate), [0, 1]
        )
        assert batch.ids.tolist() == [[0, 1, 2, 3], [3, 3, 3, 3]]
        assert batch.valid.all()
        assert not batch.packed


@pytest.mark.parametrize(
    ("texts", "told"),
    [(["ACGT", "ACG"], "row 1 has 3 symbols"), (["ACGTA"], "row 0 has 5 symbols")],
)
def test_symbol_rows_of_another_length_are_refused(texts: list[str], told: str) -> None:
    with pytest.raises(DataError, match=told):
        pack(documents_from_texts(texts), AlphabetTokenizer("ACGT"), 4)


def test_an_unknown_symbol_is_named_with_its_row_in_the_corpus() -> None:
    texts = ["ACGT"] * 100
    texts[90] = "ACNT"
    with pytest.raises(DataError, match=r"Row 90 \(text 90\).*'N'"):
        pack(documents_from_texts(texts), AlphabetTokenizer("ACGT"), 4)


def test_the_cache_answers_for_the_same_text_and_tokenizer_only_and_for_any_length(
    tmp_path: Path,
) -> None:
    cache = Cache(tmp_path)
    other = BytePairTokenizer.train(TEXTS, 260)
    kinds = [
        (TEXTS, TOKENIZER, 16),
        (TEXTS, TOKENIZER, 17),
        (TEXTS, other, 16),
        (TEXTS[1:], TOKENIZER, 16),
    ]
    for _ in range(2):
        for texts, tokenizer, length in kinds:
            documents = Documents(documents_from_texts(texts), documents_from_texts(TEXTS[:2]))
            train = build_train_rows(documents, tokenizer, length, cache)
            held = build_validation_rows(documents, tokenizer, length, cache)
            assert train.fingerprint == pack(documents.train, tokenizer, length).fingerprint
            due = pack(documents.validation, tokenizer, length, separate=True)
            assert held.fingerprint == due.fingerprint
        assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_a_corpus_that_cannot_be_packed_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    documents = Documents(documents_from_texts(["ACGT", "ACNT"]), documents_from_texts(["ACGT"]))
    with pytest.raises(DataError, match=r"Row 1 \(text 1\)"):
        build_train_rows(documents, AlphabetTokenizer("ACGT"), 4, Cache(tmp_path))
    assert list((tmp_path / "tokens").iterdir()) == []


def test_fingerprints_tell_rows_apart() -> None:
    made = [
        pack(documents_from_texts(TEXTS), TOKENIZER, length, separate=s)
        for length in (8, 16)
        for s in (False, True)
    ]
    assert len({rows.fingerprint for rows in made}) == 4


def test_what_cannot_be_packed_is_explained() -> None:
    with pytest.raises(ArgumentError, match="length"):
        pack(documents_from_texts(TEXTS), TOKENIZER, 0)
    with pytest.raises(DataError, match="no token"):
        pack_texts([], TOKENIZER, 8)


def test_ids_at_hand_are_rows_of_their_own() -> None:
    ids = np.random.default_rng(0).integers(0, 70_000, (5, 7))
    rows = pack_ids(ids, 70_000)
    assert (rows[:].ids == ids).all()
    assert (rows[:].document == np.arange(5)[:, None]).all()
    assert (rows.token_counts() == np.bincount(ids.ravel(), minlength=70_000)).all()
