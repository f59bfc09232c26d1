"""Judges of the demonstrations: digits with number words, shapes with captions, and vectors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddiff import (
    ArgumentError,
    ComponentConfig,
    DrawnField,
    DrawnFields,
    Finding,
    ShapesSource,
    group_means,
    mean_value,
    share_right,
)

if TYPE_CHECKING:
    from ddiff import FieldsDocuments, FieldsTable

IMAGE = "image"
TEXT = "text"


class DigitsJudge:
    """Count images that show the right digit and words that name it.

    A drawn image has the digit of the nearest image of the validation part, so no training image is
    used. The share of training images that this classifier recognizes is reported too. A word drawn
    for a validation image is compared with the true word.
    """

    class Config(ComponentConfig):
        """Empty: this judge has no keys."""

    @classmethod
    def build(cls, config: Config, *, documents: FieldsDocuments) -> DigitsJudge:
        _require_columns("digits", documents)
        return cls(documents)

    def __init__(self, documents: FieldsDocuments) -> None:
        self._column = documents.validation.columns[IMAGE]
        self._images = _read_images(documents.validation)
        self._words = np.array(_read_texts(documents.validation))
        train = _read_images(documents.train)
        is_known = self.classify(train) == np.array(_read_texts(documents.train))
        self._classifier = share_right("training images that the judge recognizes", is_known)
        counts = np.unique(self._words, return_counts=True)[1]
        self.chance = float(((counts / counts.sum()) ** 2).sum())
        """Probability that an image and an independent word agree."""

    def classify(self, images: NDArray[np.float64]) -> NDArray[np.str_]:
        """Return the word of the validation image that is nearest to each image [N].

        `images`: grey values [N,p].
        """
        squared = (self._images**2).sum(1) - 2.0 * images @ self._images.T
        return self._words[squared.argmin(1)]

    def judge(self, drawn: DrawnFields) -> list[Finding]:
        findings = []
        groups = drawn.numbers
        if TEXT in drawn.drawn:
            is_word = np.isin(np.array(_texts(drawn.fields[TEXT].values)), self._words)
            findings.append(share_right("texts that are a number word", is_word, groups=groups))
        if IMAGE not in drawn.fields or TEXT not in drawn.fields:
            return findings
        words = np.array(_texts(drawn.fields[TEXT].values))
        truth = drawn.fields[TEXT].truth
        if IMAGE in drawn.given and truth is not None:
            is_right = words == np.array(_texts(truth))
            name = "words that name the given image"
            findings.append(share_right(name, is_right, self.chance, groups))
            return findings
        seen = self.classify(_grey(self._column, drawn.fields[IMAGE].values))
        name = "images that show the given word"
        if TEXT in drawn.drawn:
            name = "images and words that agree"
        findings.append(share_right(name, seen == words, self.chance, groups))
        findings.append(self._classifier)
        return findings


class ShapesJudge:
    """Count images and captions of two shapes that fit together, by an exact rule.

    An image is right if the source can draw it for its caption. A caption is right if the source
    can draw its image for the caption; some images have two right captions. The chance is the
    probability that an independent pair of an image and a caption fits.

    Drawn images with wrong pixels are compared with all images of the source: the judge reports the
    number of pixels that differ from the nearest one, and whether its caption is that of the drawn
    image.
    """

    class Config(ComponentConfig):
        """Empty: this judge has no keys."""

    @classmethod
    def build(cls, config: Config, *, documents: FieldsDocuments) -> ShapesJudge:
        _require_columns("shapes", documents)
        words = {word for text in _read_texts(documents.train) for word in text.split()}
        side = math.isqrt(documents.train[IMAGE].shape.positions or 0)
        return cls(ShapesSource(colours=ShapesSource.count_colours(words), side=side))

    def __init__(self, source: ShapesSource) -> None:
        self._source = source

    @cached_property
    def _captions(self) -> dict[bytes, list[str]]:
        """Captions of every image of the source, by the bytes of its levels."""
        captions: dict[bytes, list[str]] = {}
        for caption in self._source.captions():
            for image in self._source.images_of(caption):
                captions.setdefault(image, []).append(" ".join(caption))
        return captions

    @cached_property
    def _marks(self) -> NDArray[np.float32]:
        """All images of the source, as marks [M,pixels * levels] of the level of each pixel."""
        images = np.frombuffer(b"".join(self._captions), np.uint8)
        return self._mark_levels(images.reshape(len(self._captions), -1))

    def _mark_levels(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return 1 at the level of each pixel of images [N,pixels], else 0, [N,pixels * levels]."""
        levels = np.arange(self._source.colours + 1)
        marks = images[:, :, None] == levels
        return marks.reshape(len(images), -1).astype(np.float32)

    def _judge_nearest(
        self, images: NDArray[np.uint8], texts: list[str], groups: NDArray[np.int64] | None
    ) -> list[Finding]:
        """Return the findings on the nearest images of the source; `texts` are the captions."""
        captions = list(self._captions.values())
        wrong = []
        shares = []
        for image, text in zip(images, texts, strict=True):
            same = self._marks @ self._mark_levels(image[None])[0]
            wrong.append(len(image) - same.max())
            nearest = np.flatnonzero(same == same.max())
            # Several images may be equally near. Each counts by its share.
            shares.append(np.mean([text in captions[number] for number in nearest]))
        label = "nearest images of the source that have the caption"
        return [
            mean_value("pixels that differ from the nearest image of the source", wrong, groups),
            mean_value(label, shares, groups, self.chance),
        ]

    @cached_property
    def chance(self) -> float:
        """Probability that an independent pair of an image and a caption fits."""
        # An image with k captions comes from k of the equally likely scenes.
        squares = sum(len(captions) ** 2 for captions in self._captions.values())
        scenes = self._source.num_captions * self._source.num_offsets
        return squares / scenes / self._source.num_captions

    def judge(self, drawn: DrawnFields) -> list[Finding]:
        findings = []
        groups = drawn.numbers
        known: list[Sequence[str]] = []
        if IMAGE in drawn.fields:
            images = np.asarray(drawn.fields[IMAGE].values).astype(np.uint8)
            known = [self._captions.get(image.tobytes(), []) for image in images]
        if IMAGE in drawn.drawn:
            is_valid = [bool(captions) for captions in known]
            findings.append(share_right("images of two shapes", is_valid, groups=groups))
        if TEXT in drawn.drawn:
            valid = {" ".join(caption) for caption in self._source.captions()}
            is_valid = [text in valid for text in _texts(drawn.fields[TEXT].values)]
            findings.append(share_right("texts that are captions", is_valid, groups=groups))
        if IMAGE in drawn.fields and TEXT in drawn.fields:
            texts = _texts(drawn.fields[TEXT].values)
            fits = [text in captions for text, captions in zip(texts, known, strict=True)]
            findings.append(share_right(_pair_name(drawn), fits, self.chance, groups))
            if IMAGE in drawn.drawn:
                findings += self._judge_nearest(images, texts, groups)
        return findings


class VectorsJudge:
    """Compares drawn vectors and texts with those of the validation samples.

    Vectors are compared in normalized units, where the mean of the training vectors is 0 for the
    normalizers `standard` and `pca`. If a validation sample has several draws, their mean is
    compared too. The chance is the value for the vectors or texts of other validation samples.
    """

    class Config(ComponentConfig):
        """Empty: this judge has no keys."""

    @classmethod
    def build(cls, config: Config, *, documents: FieldsDocuments) -> VectorsJudge:
        _require_fields("vectors", documents)
        return cls()

    def judge(self, drawn: DrawnFields) -> list[Finding]:
        findings: list[Finding] = []
        for name in drawn.drawn:
            field = drawn.fields[name]
            if field.normalize is not None:
                findings += _judge_vectors(name, field, drawn.numbers)
            elif not isinstance(field.values, np.ndarray) and field.truth is not None:
                findings.append(_judge_texts(name, field, drawn.numbers))
        return findings


# ---------------------------------------------------------------------- vectors and texts


def _judge_vectors(
    name: str, field: DrawnField, numbers: NDArray[np.int64] | None
) -> list[Finding]:
    """Return the findings on vectors [N,n,d]: finite values, squared errors and cosines."""
    vectors = np.asarray(field.values, np.float64)
    is_finite = np.isfinite(vectors).all((1, 2))
    findings = [share_right(f"finite vectors ({name})", is_finite, groups=numbers)]
    if field.truth is None or numbers is None:
        return findings
    truth = np.asarray(field.truth, np.float64)
    kept = is_finite & np.isfinite(truth).all((1, 2))
    if not kept.any():
        return findings
    drawn = _normalize(field, vectors[kept])
    pairs = _Pairs(drawn, _normalize(field, truth[kept]), numbers[kept])
    return findings + pairs.findings(name)


class _Pairs:
    """Drawn vectors [N,w] and the true vectors of their validation samples, in normalized units.

    The vectors of other samples are those half of all samples further on, so that neighbours in a
    document do not count as unrelated.
    """

    def __init__(
        self, drawn: NDArray[np.float64], truth: NDArray[np.float64], numbers: NDArray[np.int64]
    ) -> None:
        self.numbers = numbers
        self.drawn = drawn
        self.means = group_means(drawn, numbers)
        self.truth = group_means(truth, numbers)
        self.other = np.roll(self.truth, len(self.truth) // 2, axis=0)
        self.draws = len(drawn) / len(self.truth)

    def findings(self, name: str) -> list[Finding]:
        of_zero = _squared_error(np.zeros_like(self.truth), self.truth)
        found = [mean_value(f"squared error of the training mean ({name})", of_zero)]
        if self.draws > 1:
            found.append(self._finding_of_single_draws(name))
        return found + self._findings_of_means(name, of_zero)

    def _finding_of_single_draws(self, name: str) -> Finding:
        row = np.unique(self.numbers, return_inverse=True)[1]
        error = _squared_error(self.drawn, self.truth[row])
        unrelated = _squared_error(self.drawn, self.other[row])
        chance = float(group_means(unrelated, self.numbers).mean())
        return mean_value(f"squared error of one draw ({name})", error, self.numbers, chance)

    def _findings_of_means(self, name: str, of_zero: NDArray[np.float64]) -> list[Finding]:
        """Return the findings on the means over the draws of every sample."""
        drawn = f"the mean of {self.draws:g} draws" if self.draws > 1 else "one draw"
        error = _squared_error(self.means, self.truth)
        chance = float(_squared_error(self.means, self.other).mean())
        cosine = _cosines(self.means, self.truth)
        unrelated = float(_cosines(self.means, self.other).mean())
        return [
            mean_value(f"squared error of {drawn} ({name})", error, chance=chance),
            # The errors of one sample are compared, so the interval is that of their difference.
            mean_value(f"squared error of {drawn} minus training mean ({name})", error - of_zero),
            mean_value(f"cosine of {drawn} and the true vector ({name})", cosine, chance=unrelated),
        ]


def _normalize(field: DrawnField, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return vectors [N,n,d] in normalized units, with all numbers of a sample in one row."""
    assert field.normalize is not None
    count, _, width = vectors.shape
    return field.normalize(vectors.reshape(-1, width)).reshape(count, -1)


def _squared_error(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean squared difference [N] of rows."""
    return ((first - second) ** 2).mean(1)


def _cosines(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cosine [N] of rows, 0 for a row of zeros."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = (first * second).sum(1)
    return np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0.0)


def _judge_texts(name: str, field: DrawnField, numbers: NDArray[np.int64] | None) -> Finding:
    """Return the finding on the words that drawn texts share with the true ones."""
    texts = _texts(field.values)
    assert field.truth is not None
    truth = _texts(field.truth)
    if numbers is None:
        numbers = np.arange(len(texts))
    # One text of every validation sample, since draws of one sample have the same true text.
    _, first, row = np.unique(numbers, return_index=True, return_inverse=True)
    other = np.roll(first, len(first) // 2)[row]
    shared = [_words_shared(text, true) for text, true in zip(texts, truth)]
    unrelated = [_words_shared(text, truth[place]) for text, place in zip(texts, other)]
    label = f"words shared with the true text, F1 ({name})"
    chance = float(group_means(np.array(unrelated), numbers).mean())
    return mean_value(label, shared, numbers, chance)


def _words_shared(first: str, second: str) -> float:
    """Return the F1 score of the words of two texts, as bags: 1 if equal, 0 if disjoint."""
    left = Counter(first.lower().split())
    right = Counter(second.lower().split())
    total = left.total() + right.total()
    return 2.0 * (left & right).total() / total if total else 1.0


# ---------------------------------------------------------------------- columns


def _require_fields(judge: str, documents: FieldsDocuments) -> None:
    """Raise ArgumentError if the data are documents of one text, without fields."""
    from ddiff import FieldsDocuments

    if not isinstance(documents, FieldsDocuments):
        raise ArgumentError(
            f'The judge "{judge}" needs the data of a recipe with tables [fields.NAME]; got '
            "documents of one text. Choose another judge, or remove the table [judge]."
        )


def _require_columns(judge: str, documents: FieldsDocuments) -> None:
    """Raise ArgumentError if the data have no images and captions."""
    _require_fields(judge, documents)
    columns = documents.validation.columns
    if not {IMAGE, TEXT} <= set(columns):
        raise ArgumentError(
            f'The judge "{judge}" needs data with the columns "{IMAGE}" and "{TEXT}", such as '
            f"[data] kind = {judge!r}; got the columns {', '.join(columns)}. Choose another judge, "
            "or remove the table [judge]."
        )


def _read_images(table: FieldsTable) -> NDArray[np.float64]:
    """Return the grey values [N,pixels] of the images of a table."""
    return _grey(table[IMAGE], table.read(IMAGE, np.arange(len(table))).values)


def _read_texts(table: FieldsTable) -> list[str]:
    return table.read_texts(TEXT, np.arange(len(table))).values


def _grey(column: Any, values: Any) -> NDArray[np.float64]:
    """Return the grey values [N,pixels] in [0,1] of images, by the picture of their column."""
    pixels = [column.picture.pixels(value)[..., 0].reshape(-1) for value in np.asarray(values)]
    return np.stack(pixels) / 255.0


def _texts(values: Any) -> list[str]:
    """Return texts; a missing text is empty."""
    return ["" if text is None else text for text in values]


def _pair_name(drawn: DrawnFields) -> str:
    """Return the name of the finding that images and captions fit."""
    if TEXT in drawn.given:
        return "images that fit the given caption"
    if IMAGE in drawn.given:
        return "captions that fit the given image"
    return "images and captions that fit"
