"""Bits per byte do not depend on tokens and rows, and are left out if the bytes are unknown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ddiff.core.elbo import Likelihood
from ddiff.core.times import FlatTimes
from ddiff.data.documents import documents_from_texts
from ddiff.data.packing import PackedRows, batch_rows, pack
from ddiff.data.tokenizer import BytePairTokenizer, Tokenizer, WordTokenizer
from ddiff.errors import DataError
from ddiff.evaluation.likelihood import Evaluation, Scored, evaluate
from ddiff.runs.text_bytes import count_changed_texts

TEXTS = [
    "the old cat sat on the hat",
    "a hat",
    "cats and dogs and cats and dogs and cats and dogs",
    "the dog sat on the old old old cat",
]
END = 3.0
"""Nats of the end of a document."""
NUM_BYTES = sum(len(text) for text in TEXTS)  # ASCII only


def nats_of(text: str) -> float:
    """Return the nats of the bytes of a text in a model of independent bytes."""
    return sum(1.0 + (byte % 7) / 4 for byte in text.encode())


class ByteModel(Scored):
    """Exact likelihood of tokens under a model of independent bytes.

    A token of `WordTokenizer` stands for a word and the space before it. The first word of a
    document has no such space, so the end mark costs fewer nats.
    """

    bound = "NLL"

    def __init__(self, tokenizer: Tokenizer) -> None:
        space = " " if isinstance(tokenizer, WordTokenizer) else ""
        ids = [[number] for number in range(tokenizer.num_tokens)]
        nats = [nats_of(space + text) for text in tokenizer.decode(ids)]
        assert tokenizer.eos_id is not None
        nats[tokenizer.eos_id] = END - nats_of(space)
        self.nats = torch.tensor(nats, dtype=torch.float64)

    def nll(self, batch: Any, *_: Any) -> Likelihood:
        return Likelihood({"nll": self.nats[batch.ids] * batch.scored}, {})


def evaluate_packed(rows: PackedRows, tokenizer: Tokenizer) -> Evaluation:
    return evaluate(
        ByteModel(tokenizer),
        lambda numbers: batch_rows(rows, numbers),
        rows.first_documents(),
        length=rows.length,
        times=FlatTimes(),
        num_bytes=rows.tokens.num_bytes,
        batch=3,
    )


def test_bits_per_byte_do_not_depend_on_row_length_packing_and_tokenizer() -> None:
    """The exact value is computed from the bytes. Sums in another order differ by 1e-13."""
    tokenizers = [
        BytePairTokenizer.train(TEXTS, 257),  # one token per byte
        BytePairTokenizer.train(TEXTS, 270),
        WordTokenizer.from_texts(TEXTS),
    ]
    nats = sum(nats_of(text) + END for text in TEXTS)
    exact = nats / math.log(2) / NUM_BYTES
    numbers_of_tokens = set()
    perplexities = set()
    for tokenizer in tokenizers:
        for length in (3, 8, 200):
            for separate in (False, True):
                rows = pack(documents_from_texts(TEXTS), tokenizer, length, separate=separate)
                assert count_changed_texts(TEXTS, rows, tokenizer) == 0
                found = evaluate_packed(rows, tokenizer)
                assert found.bits_per_byte == pytest.approx(exact, rel=1e-12)
                assert found.num_bytes == NUM_BYTES
                numbers_of_tokens.add(found.tokens)
                assert found.ppl is not None
                perplexities.add(round(found.ppl, 6))
    # the tokenizations differ: per token, the same likelihood has another value for each
    assert len(numbers_of_tokens) == len(perplexities) == 3


def test_bytes_that_tokens_claim_must_be_those_of_the_text() -> None:
    tokenizer = BytePairTokenizer.train(TEXTS, 270)
    rows = pack(documents_from_texts(TEXTS), tokenizer, 8, separate=True)
    claim = rf"claim {NUM_BYTES} bytes, but the text has"
    with pytest.raises(DataError, match=rf"{claim} {NUM_BYTES + 4} bytes"):
        count_changed_texts([*TEXTS, "more"], rows, tokenizer)
    with pytest.raises(DataError, match=rf"{claim} {NUM_BYTES - len(TEXTS[-1])} bytes"):
        count_changed_texts(TEXTS[:-1], rows, tokenizer)
    # the number of bytes agrees, but not the texts
    assert count_changed_texts([TEXTS[0].upper(), *TEXTS[1:]], rows, tokenizer) == 1


def test_texts_whose_spaces_the_tokenizer_drops_are_counted() -> None:
    texts = ["two  spaces", "one space"]
    tokenizer = WordTokenizer.from_texts(texts)
    rows = pack(documents_from_texts(texts), tokenizer, 8, separate=True)
    assert count_changed_texts(texts, rows, tokenizer) == 1
