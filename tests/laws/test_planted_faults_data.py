"""Faults planted in tokenizers, data sets, normalizers, encoders and judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from faults import Fault, assert_detected
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.normalizer import MeanStdNormalizer, Normalizer
from ddiff.data.columns import ColumnShape, FieldsDocuments, FieldsTable, TokenColumn
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.tokenizer import AlphabetTokenizer, Tokenizer, load_tokenizer
from ddiff.errors import ArgumentError
from ddiff.evaluation.judges import TEXT_FIELD, DrawnField, DrawnFields, Finding
from ddiff.testing import assert_laws, dataset, encoder, judge, normalizer, tokenizer
from ddiff.testing.data_instances import example_vectors

TEXTS = ("abba", "cab", "bac")


# ---------------------------------------------------------------------- tokenizers


class Wrapped:
    """Tokenizer of the letters a, b and c; a subclass plants a fault."""

    def __init__(self) -> None:
        self.inner = AlphabetTokenizer("abc")
        self.num_tokens = self.inner.num_tokens
        self.eos_id = None
        self.special_ids: tuple[int, ...] = ()
        self.fill_id = None
        self.unit = "symbol"
        self.fingerprint = self.inner.fingerprint

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.inner.encode(texts)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self.inner.decode(ids)

    def tokens(self) -> list[str]:
        return self.inner.tokens()

    def save(self, path: str) -> None:
        self.inner.save(path)


class CountsFromOne(Wrapped):
    """Fault: the ids are 1..V instead of 0..V-1."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[number + 1 for number in row] for row in super().encode(texts)]


class DecodesBackwards(Wrapped):
    """Fault: `decode` returns the letters in reverse order."""

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [text[::-1] for text in super().decode(ids)]


class SortsBatch(Wrapped):
    """Fault: the ids are those of the sorted texts."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return super().encode(sorted(texts))


def load_other(path: str) -> Tokenizer:
    """Fault: loading ignores the file."""
    return AlphabetTokenizer("cba")


def tokenizer_case(cls: Any, load: Any = load_tokenizer) -> Any:
    return lambda: tokenizer.TokenizerCase(cls(), TEXTS, load)


# ---------------------------------------------------------------------- data sets

CALLS = count()


def make_texts(*train: str) -> Documents:
    return Documents(documents_from_texts(train or TEXTS), documents_from_texts(["b"]))


def make_fields(num_tokens: int = 4) -> FieldsDocuments:
    ids = np.arange(4).reshape(2, 2)
    table = FieldsTable({"image": TokenColumn(ids, num_tokens)})
    return FieldsDocuments(table, table)


def dataset_case(build: Any, shapes: Any = None) -> Any:
    return lambda: dataset.DatasetCase(build(), build(), shapes)


SHAPES: Mapping[str, ColumnShape] = {"image": ColumnShape("tokens", 2, 4)}


# ---------------------------------------------------------------------- normalizers


class Bent(Normalizer):
    """Fault: the map and its inverse are exact, but not linear."""

    data_width = 2
    width = 2
    log_volume = 0.0

    def encode(self, x: Tensor) -> Tensor:
        return x.pow(3)

    def decode(self, z: Tensor) -> Tensor:
        return z.sign() * z.abs().pow(1.0 / 3.0)

    def tensors(self) -> dict[str, Tensor]:
        return {}


class Changed(Normalizer):
    """Mean-and-deviation normalizer with replaced parts."""

    def __init__(self, volume: float = 1.0, shift: float = 0.0) -> None:
        self.inner = MeanStdNormalizer.fit([example_vectors(2)])
        self.data_width = 2
        self.width = 2
        self._volume = volume
        self._shift = shift

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z) + self._shift

    @property
    def log_volume(self) -> float:
        return self.inner.log_volume * self._volume

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors()


def load_normalizer(tensors: Mapping[str, Tensor], factor: float = 1.0) -> Normalizer:
    return MeanStdNormalizer(tensors["mean"], tensors["std"] * factor)


def normalizer_case(build: Any = Changed, load: Any = load_normalizer) -> Any:
    return lambda: normalizer.NormalizerCase(build(), example_vectors(2), load)


# ---------------------------------------------------------------------- encoders and judges


class LengthEncoder:
    """Encoder of the length of a text; `shared` adds the number of texts, `rows` drops a row."""

    dim = 2
    fingerprint = "1"

    def __init__(self, shared: float = 0.0, rows: int = 0) -> None:
        self.shared = shared
        self.rows = rows

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        values = [[len(text), self.shared * len(texts)] for text in texts[self.rows :]]
        return np.array(values, np.float32)


def encoder_case(**options: Any) -> Any:
    return lambda: encoder.EncoderCase(LengthEncoder(**options), TEXTS)


class FixedJudge:
    """Judge with one fixed finding; `drift` is added at every call."""

    def __init__(self, *names: str, value: float = 0.5, count: int = 3, drift: float = 0.0) -> None:
        self.names = names or ("share",)
        self.value = value
        self.count = count
        self.drift = drift

    def judge(self, drawn: DrawnFields) -> list[Finding]:
        self.value += self.drift
        return [Finding(name, self.value, (0.4, 0.6), self.count) for name in self.names]


def judge_case(*names: str, **options: Any) -> Any:
    drawn = DrawnFields(TEXT_FIELD, [TEXT_FIELD], [], {TEXT_FIELD: DrawnField(list(TEXTS))})
    return lambda: judge.JudgeCase(FixedJudge(*names, **options), drawn)


FAULTS = [
    Fault(
        "ids begin with 1",
        tokenizer.ids_are_tokens,
        tokenizer_case(Wrapped),
        tokenizer_case(CountsFromOne),
    ),
    Fault(
        "decode reverses the text",
        tokenizer.decoding_inverts_encoding,
        tokenizer_case(Wrapped),
        tokenizer_case(DecodesBackwards),
    ),
    Fault(
        "encode sorts its texts",
        tokenizer.texts_are_independent,
        tokenizer_case(Wrapped),
        tokenizer_case(SortsBatch),
    ),
    Fault(
        "loading gives another tokenizer",
        tokenizer.survives_saving,
        tokenizer_case(Wrapped),
        tokenizer_case(Wrapped, load_other),
    ),
    Fault(
        "texts depend on the number of calls",
        dataset.builds_are_equal,
        dataset_case(make_texts),
        dataset_case(lambda: make_texts(f"{next(CALLS)}")),
    ),
    Fault(
        "a text is empty",
        dataset.parts_have_texts,
        dataset_case(make_texts),
        dataset_case(lambda: make_texts("a", "")),
    ),
    Fault(
        "preview describes other columns",
        dataset.columns_are_as_described,
        dataset_case(make_fields, SHAPES),
        dataset_case(lambda: make_fields(5), SHAPES),
    ),
    Fault(
        "decode adds a shift",
        normalizer.encode_inverts_decode,
        normalizer_case(),
        normalizer_case(lambda: Changed(shift=0.1)),
    ),
    Fault(
        "the map is a cube",
        normalizer.maps_are_linear,
        normalizer_case(),
        normalizer_case(Bent, None),
    ),
    Fault(
        "log_volume has the wrong sign",
        normalizer.volume_is_the_determinant,
        normalizer_case(),
        normalizer_case(lambda: Changed(volume=-1.0)),
    ),
    Fault(
        "loading changes the scale",
        normalizer.survives_saving,
        normalizer_case(),
        normalizer_case(Changed, partial(load_normalizer, factor=2.0)),
    ),
    Fault(
        "a text has no vector",
        encoder.vectors_have_the_shape,
        encoder_case(),
        encoder_case(rows=1),
    ),
    Fault(
        "vectors depend on the number of texts",
        encoder.vectors_are_independent,
        encoder_case(),
        encoder_case(shared=1.0),
    ),
    Fault(
        "the value is outside its interval",
        judge.values_are_inside,
        judge_case(),
        judge_case(value=0.7),
    ),
    Fault("no sample is counted", judge.counts_are_samples, judge_case(), judge_case(count=0)),
    Fault(
        "two findings have the same name",
        judge.counts_are_samples,
        judge_case(),
        judge_case("share", "share"),
    ),
    Fault(
        "values change with every call",
        judge.judging_is_repeatable,
        judge_case(),
        judge_case(drift=0.01),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)


def test_checks_of_data_pass_on_the_healthy_objects() -> None:
    assert_laws(tokenizer.check_tokenizer(AlphabetTokenizer("abc"), TEXTS))
    assert_laws(dataset.check_dataset(make_fields, SHAPES))
    vectors = example_vectors(3)
    fitted = MeanStdNormalizer.fit([vectors])
    assert_laws(normalizer.check_normalizer(fitted, vectors, load_normalizer))
    assert_laws(encoder.check_encoder(LengthEncoder(), TEXTS))
    drawn = DrawnFields(TEXT_FIELD, [TEXT_FIELD], [], {TEXT_FIELD: DrawnField(list(TEXTS))})
    assert_laws(judge.check_judge(FixedJudge(), drawn))


def test_check_dataset_refuses_a_corpus_that_need_not_fit_in_memory() -> None:
    with pytest.raises(ArgumentError, match="must return Documents or FieldsDocuments"):
        dataset.check_dataset(lambda: torch.zeros(1))  # type: ignore[arg-type, return-value]
