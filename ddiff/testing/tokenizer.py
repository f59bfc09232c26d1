"""Conformance checks of a tokenizer: ids, their texts, and saving."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ddiff.data.tokenizer import Tokenizer, load_tokenizer
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


class TokenizerCase(NamedTuple):
    """Tokenizer to check.

    Attributes:
        tokenizer: the tokenizer.
        texts: texts that it can encode.
        load: function that loads the file that `save` has written.
    """

    tokenizer: Tokenizer
    texts: Sequence[str]
    load: Callable[[str], Tokenizer] = load_tokenizer


def _compare_ids(got: list[list[int]], expected: list[list[int]], name: str) -> Iterator[Gap]:
    """Compare the ids of each text: first their number, then the ids."""
    yield compare(torch.tensor(len(got)), float(len(expected)), {"number of texts": name})
    for row, (ids, target) in enumerate(zip(got, expected)):
        labels = {name: f"text {row}"}
        yield compare(torch.tensor(len(ids)), float(len(target)), {"number of ids": "", **labels})
        if len(ids) == len(target):
            yield compare(torch.tensor(ids), torch.tensor(target, dtype=torch.float64), labels)


@law("tokenizer: ids lie in 0..V-1 and are not special", tolerance=0.0)
def ids_are_tokens(case: TokenizerCase) -> Iterator[Gap]:
    """Check that the ids of encoded text lie in 0..num_tokens-1 and are not special.

    `tokens()` must list num_tokens strings. The end of a document, `eos_id`, must be special.
    Tolerance 0: ids are integers.
    """
    tokenizer = case.tokenizer
    listed = tokenizer.tokens()
    yield compare(torch.tensor(len(listed)), float(tokenizer.num_tokens), {"length of": "tokens()"})
    special = set(tokenizer.special_ids)
    if tokenizer.eos_id is not None:
        is_special = torch.tensor(float(tokenizer.eos_id in special))
        yield compare(is_special, 1.0, {"eos_id is special": tokenizer.eos_id})
    for row, ids in enumerate(tokenizer.encode(case.texts)):
        found = torch.tensor(ids, dtype=torch.float64)
        yield compare(found, found.clamp(0, tokenizer.num_tokens - 1), {"text": row})
        count = sum(number in special for number in ids)
        yield compare(torch.tensor(count), 0.0, {"number of special ids in text": row})


@law("tokenizer: decoded ids encode to the same ids", tolerance=0.0)
def decoding_inverts_encoding(case: TokenizerCase) -> Iterator[Gap]:
    """Check that encoding the decoded text of a text gives the ids of the text.

    A tokenizer may normalize texts, for example to lower case, but only once. Tolerance 0: ids are
    integers.
    """
    ids = case.tokenizer.encode(case.texts)
    again = case.tokenizer.encode(case.tokenizer.decode(ids))
    yield from _compare_ids(again, ids, "ids of the decoded text")


@law("tokenizer: a text does not depend on its batch", tolerance=0.0)
def texts_are_independent(case: TokenizerCase) -> Iterator[Gap]:
    """Check that a text has the same ids if it is encoded without other texts.

    Tolerance 0: ids are integers.
    """
    together = case.tokenizer.encode(case.texts)
    single = [case.tokenizer.encode([text])[0] for text in case.texts]
    yield from _compare_ids(single, together, "text encoded by itself")


@law("tokenizer: saving and loading preserve it", tolerance=0.0)
def survives_saving(case: TokenizerCase) -> Iterator[Gap]:
    """Check that the loaded tokenizer has the same fingerprint, special ids and ids of texts.

    Tolerance 0: all values are exact.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "tokenizer.json")
        case.tokenizer.save(path)
        loaded = case.load(path)
    before = _describe(case.tokenizer)
    for fact, value in _describe(loaded).items():
        is_same = torch.tensor(float(value == before[fact]))
        yield compare(is_same, 1.0, {"after loading": fact})
    yield from _compare_ids(
        loaded.encode(case.texts), case.tokenizer.encode(case.texts), "loaded tokenizer"
    )


def _describe(tokenizer: Tokenizer) -> dict[str, object]:
    """Return the attributes that a loaded tokenizer must share with the saved one."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "num_tokens": tokenizer.num_tokens,
        "eos_id": tokenizer.eos_id,
        "special_ids": tuple(tokenizer.special_ids),
        "fill_id": tokenizer.fill_id,
        "unit": tokenizer.unit,
    }


TOKENIZER_LAWS: tuple[Law, ...] = (
    ids_are_tokens,
    decoding_inverts_encoding,
    texts_are_independent,
    survives_saving,
)


def check_tokenizer(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    load: Callable[[str], Tokenizer] = load_tokenizer,
) -> list[LawReport]:
    """Apply every conformance check of tokenizers.

    Args:
        tokenizer: the tokenizer.
        texts: texts that it can encode.
        load: function that loads the file that `save` has written; for the tokenizer of a plugin,
            the function `load` of its component with the settings.
    """
    return evaluate_laws(TokenizerCase(tokenizer, texts, load), TOKENIZER_LAWS)
