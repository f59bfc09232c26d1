"""Figures of generated samples: entropy, repetition, diversity and perplexity under a judge.

`docs/evaluation.md` defines every figure and tells how it differs from those of papers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddiff.errors import ArgumentError
from ddiff.evaluation.intervals import mean95
from ddiff.evaluation.ngrams import (
    Pieces,
    distinct_ngrams,
    pooled_entropy,
    repetition,
    sample_entropies,
    self_bleu,
)
from ddiff.evaluation.ratio import RatioEstimate

Interval = tuple[float, float]
Floats = NDArray[np.float64]

GRAMS = (1, 2, 3, 4)
"""Lengths n of the counted n-grams."""
LARGEST = 300.0  # exp(300) and its square, of which variances are made, are finite floats
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")  # letters and digits, also with apostrophes inside


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class MeanFigure:
    """Mean of a number over samples.

    Attributes:
        value: mean over the samples that have the number.
        interval: 95 % confidence interval of the mean for independent samples; None for one sample,
            and for figures of a sample that depend on the other samples.
        count: number of these samples. Other samples are too short for the number.
    """

    value: float
    interval: Interval | None
    count: int

    @classmethod
    def of(cls, values: Floats) -> MeanFigure | None:
        """Return the mean of the numbers [N] that are not NaN; None if all are."""
        found = values[~np.isnan(values)]
        if len(found) == 0:
            return None
        return cls(float(found.mean()), mean95(found), len(found))


@dataclass(frozen=True)
class SampleFigures:
    """Figures of N samples that need no other model.

    A figure is None if all samples are too short for it. "Pieces" are words, or symbols if the
    texts consist of symbols.

    Attributes:
        count: number N of samples.
        lengths: smallest, mean and largest number of tokens of a sample.
        entropy: unigram entropy of the token ids of a sample in nats, averaged over samples. It is
            at most the logarithm of the length.
        pooled_entropy: unigram entropy in nats of the token ids of all samples together.
        distinct: n -> different n-grams of pieces in all samples / n-grams.
        repetition: n -> share of the n-grams of pieces of a sample that occur earlier in it.
        self_bleu: BLEU-4 of a sample against all others, without an interval; None for fewer than
            two samples.
        known_words: share of the words of a sample that occur in the reference texts; None without
            a reference.
    """

    count: int
    lengths: tuple[int, float, int]
    entropy: MeanFigure
    pooled_entropy: float
    distinct: Mapping[int, float]
    repetition: Mapping[int, MeanFigure]
    self_bleu: MeanFigure | None
    known_words: MeanFigure | None

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        ids: Sequence[Sequence[int]],
        reference: Iterable[str] | None = None,
        unit: Literal["token", "symbol"] = "token",
    ) -> SampleFigures:
        """Compute the figures of samples.

        Args:
            texts: texts of the samples, without special tokens.
            ids: token ids of the samples.
            reference: held-out texts, whose words are the known words.
            unit: "symbol" for texts of symbols without words, whose n-grams are those of the ids.

        Raises ArgumentError if there is no sample with a token.
        """
        if len(texts) != len(ids):
            raise ArgumentError(
                "SampleFigures.of: texts and ids must have one entry per sample; got "
                f"{len(texts)} texts and {len(ids)} lists of ids."
            )
        entropy = MeanFigure.of(sample_entropies(ids))
        if entropy is None:
            raise ArgumentError(
                "SampleFigures.of: ids must have at least one sample with a token; got "
                f"{len(ids)} samples without tokens."
            )
        words = [split_words(text) for text in texts]
        pieces: Sequence[Pieces] = words if unit == "token" else ids
        sizes = [len(row) for row in ids]
        known = None
        if reference is not None and unit == "token":
            known = measure_known_words(texts, reference)
        return cls(
            count=len(ids),
            lengths=(min(sizes), sum(sizes) / len(sizes), max(sizes)),
            entropy=entropy,
            pooled_entropy=pooled_entropy(ids),
            distinct=_measure_distinct(pieces),
            repetition=_measure_repetition(pieces),
            self_bleu=_measure_self_bleu(pieces),
            known_words=known,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures with their units in the keys."""
        found = asdict(self)
        found["entropy_nats"] = found.pop("entropy")
        found["pooled_entropy_nats"] = found.pop("pooled_entropy")
        for name in ("distinct", "repetition"):
            found[name] = {str(n): value for n, value in found[name].items()}
        return found


def _measure_distinct(pieces: Sequence[Pieces]) -> dict[int, float]:
    found = {n: distinct_ngrams(pieces, n) for n in GRAMS}
    return {n: share for n, share in found.items() if not math.isnan(share)}


def _measure_repetition(pieces: Sequence[Pieces]) -> dict[int, MeanFigure]:
    found: dict[int, MeanFigure] = {}
    for n in GRAMS:
        figure = MeanFigure.of(repetition(pieces, n))
        if figure is not None:
            found[n] = figure
    return found


def _measure_self_bleu(pieces: Sequence[Pieces]) -> MeanFigure | None:
    if len(pieces) < 2:
        return None
    figure = MeanFigure.of(self_bleu(pieces))
    # Every sample is a reference of every other sample. The scores depend on each other, and an
    # interval of independent scores would contain the truth in only 4 of 5 cases.
    return None if figure is None else replace(figure, interval=None)


def collect_words(texts: Iterable[str]) -> set[str]:
    """Return the different words of texts."""
    words: set[str] = set()
    for text in texts:
        words.update(split_words(text))
    return words


def measure_known_words(texts: Sequence[str], reference: Iterable[str]) -> MeanFigure | None:
    """Return the mean share of the words of a sample that occur in the reference texts.

    Returns None if no sample has a word.
    """
    words = [split_words(text) for text in texts]
    return MeanFigure.of(known_shares(words, collect_words(reference)))


def known_shares(samples: Sequence[Sequence[str]], known: set[str]) -> Floats:
    """Return the share of the words of each sample [N] that are in `known`.

    The share is NaN for a sample without words.
    """
    shares = np.full(len(samples), np.nan)
    for number, words in enumerate(samples):
        if words:
            shares[number] = sum(word in known for word in words) / len(words)
    return shares


@dataclass(frozen=True)
class GenerativePerplexity:
    """Perplexity of samples under a judge, together with the entropy of the samples.

    A judge also likes repeated text, so the perplexity has no meaning without the entropy. Values
    are at most exp(300).

    Attributes:
        corpus: exp(sum of nats / sum of scored tokens).
        corpus_interval: its 95 % confidence interval for independent samples; None for one sample.
        per_sample: mean over samples of exp(nats / scored tokens).
        entropy: unigram entropy of the samples in nats (see `SampleFigures`).
        tokens: number of scored tokens.
        unscored: number of samples without scored tokens.
    """

    corpus: float
    corpus_interval: Interval | None
    per_sample: MeanFigure
    entropy: MeanFigure
    tokens: int
    unscored: int

    def __post_init__(self) -> None:
        if not (isinstance(self.entropy, MeanFigure) and math.isfinite(self.entropy.value)):
            raise ArgumentError(
                "GenerativePerplexity: entropy must be the entropy of the samples, because a "
                "perplexity without entropy favours samples that repeat themselves; got "
                f"{self.entropy!r}. Pass SampleFigures.of(texts, ids).entropy."
            )

    @classmethod
    def of(
        cls, nats: Floats, tokens: NDArray[np.int64], entropy: MeanFigure
    ) -> GenerativePerplexity:
        """Compute the perplexities from the nats [N] and numbers of scored tokens [N] of samples.

        Raises ArgumentError if no token was scored, or if nats are not finite.
        """
        has_tokens = tokens > 0
        if not has_tokens.any() or not np.isfinite(nats).all():
            raise ArgumentError(
                "GenerativePerplexity.of: nats must be finite and some sample must have a scored "
                f"token; got {int(tokens.sum())} scored tokens, and "
                f"{int((~np.isfinite(nats)).sum())} samples with NaN or infinite nats. Check the "
                "weights and the tokenizer of the judge."
            )
        estimate = RatioEstimate.of(nats[:, None], tokens.astype(np.float64))
        interval = None
        if estimate.total is not None:
            low, high = estimate.total.around(estimate.mean)
            # with two samples, the width may be many times the mean
            interval = (math.exp(min(low, LARGEST)), math.exp(min(high, LARGEST)))
        each = np.full(len(nats), np.nan)
        means = nats[has_tokens] / tokens[has_tokens]
        each[has_tokens] = np.exp(np.minimum(means, LARGEST))
        per_sample = MeanFigure.of(each)
        assert per_sample is not None  # some sample has tokens
        return cls(
            corpus=math.exp(min(estimate.mean, LARGEST)),
            corpus_interval=interval,
            per_sample=per_sample,
            entropy=entropy,
            tokens=int(tokens.sum()),
            unscored=int((~has_tokens).sum()),
        )

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        found["entropy_nats"] = found.pop("entropy")
        return found
