"""Packing keeps every token exactly once, pads at the end, and numbers documents."""

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


def encode_with_end_mark(texts: list[str]) -> list[list[int]]:
    return [[*ids, 0] for ids in TOKENIZER.encode(texts)]


def valid_tokens(rows: PackedRows) -> tuple[list[int], list[int]]:
    """Return the ids and the documents of all valid positions of all rows."""
    batch = batch_rows(rows, np.arange(len(rows)))
    return batch.ids[batch.valid].tolist(), batch.document[batch.valid].tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text(alphabet="the cat\n", max_size=60), min_size=1, max_size=8),
    length=st.integers(1, 40),
    separate=st.booleans(),
)
def test_pack_puts_every_token_in_exactly_one_valid_position(
    texts: list[str], length: int, separate: bool
) -> None:
    rows = pack(documents_from_texts(texts), TOKENIZER, length, separate=separate)
    ids, document = valid_tokens(rows)
    assert ids == [number for row in encode_with_end_mark(texts) for number in row]
    assert document == [
        number for number, row in enumerate(encode_with_end_mark(texts)) for _ in row
    ]
    assert rows.tokens.num_tokens == len(ids)


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_pack_pads_only_the_last_row_if_documents_may_share_rows(length: int) -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, length)
    total = sum(map(len, encode_with_end_mark(TEXTS)))
    assert len(rows) == -(-total // length)
    num_valid = rows[:].num_valid
    assert (num_valid[:-1] == length).all()
    assert 1 <= num_valid[-1] <= length


def test_pack_with_separate_true_starts_each_document_in_a_new_row() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 16, separate=True)
    batch = batch_rows(rows, np.arange(len(rows)))
    assert (batch.document == batch.document[:, :1]).all()
    assert not batch.packed
    assert len(rows) == sum(-(-len(ids) // 16) for ids in encode_with_end_mark(TEXTS))


def test_pack_joins_documents_across_chunks() -> None:
    texts = [f"text {number}" for number in range(200)]
    ids, document = valid_tokens(pack(documents_from_texts(texts), TOKENIZER, 7))
    assert ids == [number for row in encode_with_end_mark(texts) for number in row]
    assert document[-1] == 199


def test_padding_of_packed_rows_has_end_mark_ids_and_is_not_scored() -> None:
    batch = batch_rows(pack(documents_from_texts(["the cat", "the mat"]), TOKENIZER, 50), [0])
    padding = ~batch.valid[0]
    assert padding.any()
    assert padding.tolist() == sorted(padding.tolist())  # padding is at the end
    assert (batch.ids[0, padding] == TOKENIZER.eos_id).all()
    assert (batch.document[0, padding] == 1).all()
    assert torch.equal(batch.scored, batch.valid)


def test_packed_end_mark_of_each_document_is_scored() -> None:
    batch = batch_rows(pack(documents_from_texts(["the cat", "the mat"]), TOKENIZER, 50), [0])
    ends = (batch.ids[0] == 0) & batch.scored[0]
    assert int(ends.sum()) == 2


def test_batch_is_packed_only_if_a_row_has_two_documents() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 16)
    documents = rows[:].document
    holds_two = (documents != documents[:, :1]).any(1)
    assert holds_two.any()
    assert not holds_two.all()
    for number in range(len(rows)):
        assert batch_rows(rows, [number]).packed == holds_two[number]


def test_batch_rows_keeps_the_order_of_its_indices() -> None:
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


def test_batch_to_device_moves_conditions() -> None:
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


def test_token_stream_of_packed_rows_contains_no_padding() -> None:
    rows = pack(documents_from_texts(TEXTS), TOKENIZER, 16, separate=True)
    ids, document = rows.stream()
    assert (ids.tolist(), document.tolist()) == valid_tokens(rows)


def test_pack_texts_puts_each_text_in_separate_rows() -> None:
    rows = pack_texts(["the cat", "the mat " * 20], TOKENIZER, 16)
    assert valid_tokens(rows)[0] == [
        number for row in encode_with_end_mark(["the cat", "the mat " * 20]) for number in row
    ]
    assert rows[[0]].document[0, 0] == 0
    assert rows[[1]].document[0, 0] == 1


def test_pack_texts_encodes_the_string_of_the_end_mark_as_text() -> None:
    ids, _ = valid_tokens(pack_texts([f"the {EOS} cat"], TOKENIZER, 64))
    assert ids.count(0) == 1


def test_pack_puts_each_document_of_symbols_in_one_row() -> None:
    tokenizer = AlphabetTokenizer("ACGT")
    for separate in (False, True):
        batch = batch_rows(
            pack(documents_from_texts(["ACGT", "TTTT"]), tokenizer, 4, separate=separate), [0, 1]
        )
        assert batch.ids.tolist() == [[0, 1, 2, 3], [3, 3, 3, 3]]
        assert batch.valid.all()
        assert not batch.packed


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["ACGT", "ACG"], "row 1 has 3 symbols"), (["ACGTA"], "row 0 has 5 symbols")],
)
def test_pack_refuses_symbol_rows_of_another_length(texts: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(documents_from_texts(texts), AlphabetTokenizer("ACGT"), 4)


def test_pack_raises_an_error_that_names_the_row_of_an_unknown_symbol() -> None:
    texts = ["ACGT"] * 100
    texts[90] = "ACNT"
    with pytest.raises(DataError, match=r"Row 90 \(text 90\).*'N'"):
        pack(documents_from_texts(texts), AlphabetTokenizer("ACGT"), 4)


def test_token_cache_depends_on_text_and_tokenizer_but_not_on_row_length(
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
            expected = pack(documents.validation, tokenizer, length, separate=True)
            assert held.fingerprint == expected.fingerprint
        assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_failed_tokenization_leaves_no_cache_entry(tmp_path: Path) -> None:
    documents = Documents(documents_from_texts(["ACGT", "ACNT"]), documents_from_texts(["ACGT"]))
    with pytest.raises(DataError, match=r"Row 1 \(text 1\)"):
        build_train_rows(documents, AlphabetTokenizer("ACGT"), 4, Cache(tmp_path))
    assert list((tmp_path / "tokens").iterdir()) == []


def test_fingerprint_of_packed_rows_depends_on_length_and_key_separate() -> None:
    made = [
        pack(documents_from_texts(TEXTS), TOKENIZER, length, separate=s)
        for length in (8, 16)
        for s in (False, True)
    ]
    assert len({rows.fingerprint for rows in made}) == 4


def test_pack_refuses_length_zero_and_empty_documents() -> None:
    with pytest.raises(ArgumentError, match="length"):
        pack(documents_from_texts(TEXTS), TOKENIZER, 0)
    with pytest.raises(DataError, match="none of which has a token"):
        pack_texts([], TOKENIZER, 8)


def test_pack_ids_gives_each_row_a_separate_document() -> None:
    ids = np.random.default_rng(0).integers(0, 70_000, (5, 7))
    rows = pack_ids(ids, 70_000)
    assert (rows[:].ids == ids).all()
    assert (rows[:].document == np.arange(5)[:, None]).all()
    assert (rows.token_counts() == np.bincount(ids.ravel(), minlength=70_000)).all()
