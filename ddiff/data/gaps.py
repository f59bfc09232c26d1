"""Gaps in real sentences of held-out text, for a model to fill."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ddiff.data.sentences import find_sentences
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import hash_to_unit

SENTENCE_TOKENS = (12, 30)
"""Smallest and largest number of tokens of a sentence."""
GAP_TOKENS = (3, 6)
"""Smallest and largest number of tokens of a gap."""
CONTEXT_TOKENS = 3
"""Smallest number of given tokens on each side of a gap."""
MOST_CHARACTERS = 2**22
"""Number of characters of held-out text, from its beginning, whose sentences are candidates."""
MOST_TRAINING_CHARACTERS = 2**24
"""Number of characters of training text in which the sentences are searched."""

# Quotation marks and brackets often have their partner in another sentence, and "[MASK:8]" would
# be read as a gap.
_NOT_PLAIN = re.compile(r"[\"\u201c\u201d_()\[\]*]|(?<!\w)['\u2018]")
_WORD = re.compile(r"\s+\w+(?:['\u2019-]\w+)*")  # a word and the white space before it
_MOST_WORDS = GAP_TOKENS[1]  # a word has at least one token


@dataclass(frozen=True)
class Gap:
    """Sentence of a document, in which some whole words are hidden.

    Attributes:
        document: number of the document.
        position: number of characters of the document before the sentence.
        before, hidden, after: parts of the sentence. `hidden` begins with white space.
        ids: token ids of the sentence, which are those of the three parts, one after the other.
        start, stop: the hidden tokens are ids[start:stop].
    """

    document: int
    position: int
    before: str
    hidden: str
    after: str
    ids: Sequence[int]
    start: int
    stop: int

    @property
    def sentence(self) -> str:
        return self.before + self.hidden + self.after

    @property
    def infill(self) -> str:
        """The sentence as an infill text of `ddiff sample --infill`."""
        return f"{self.before} [MASK:{self.stop - self.start}]{self.after}"


@dataclass(frozen=True)
class _Sentence:
    document: int
    position: int
    text: str


def choose_gaps(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    count: int,
    *,
    length: int,
    seed: int = 0,
    training: Iterable[str] = (),
) -> list[Gap]:
    """Choose up to `count` sentences of documents, and a gap in each.

    The choice is a pure function of the arguments: sentences and gaps are ordered by a hash of
    `seed` and of the text. `SENTENCE_TOKENS`, `GAP_TOKENS` and `CONTEXT_TOKENS` limit the numbers
    of tokens. The result is shorter if there are fewer such sentences.

    Args:
        texts: held-out documents.
        tokenizer: tokenizer of the model.
        count: largest number of gaps.
        length: largest number of tokens of a sentence.
        seed: another seed chooses other sentences and gaps.
        training: training documents, of which no sentence is chosen.
    """

    def rank(sentence: _Sentence) -> tuple[bool, float]:
        # a sentence that begins in lower case is often the rest of another
        place = hash_to_unit(f"{seed} {sentence.text}".encode())
        return sentence.text[0].islower(), place

    ranked = sorted(_list_sentences(texts), key=rank)
    # more than needed, because sentences of the training text are removed
    pool = list(islice(_place_gaps(ranked, tokenizer, length, seed), 2 * count + 8))
    repeated = _find_repeated({_plain(gap.sentence) for gap in pool}, training)
    return [gap for gap in pool if _plain(gap.sentence) not in repeated][:count]


def _list_sentences(texts: Iterable[str]) -> list[_Sentence]:
    """Return the different sentences that end with a full stop and have no quotation marks."""
    found: dict[str, _Sentence] = {}
    for number, text in enumerate(_read_start(texts, MOST_CHARACTERS)):
        for start, stop in find_sentences(text):
            sentence = text[start:stop].lstrip()
            if sentence.endswith((".", "!", "?")) and not _NOT_PLAIN.search(sentence):
                position = stop - len(sentence)
                found.setdefault(sentence, _Sentence(number, position, sentence))
    return list(found.values())


def _read_start(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Iterate over texts until they have a number of characters; the last text is cut."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _place_gaps(
    sentences: Iterable[_Sentence], tokenizer: Tokenizer, length: int, seed: int
) -> Iterator[Gap]:
    """Iterate over the gaps of those sentences that have a fitting number of tokens."""
    fewest, most = SENTENCE_TOKENS
    for sentence in sentences:
        (ids,) = tokenizer.encode([sentence.text])
        if fewest <= len(ids) <= min(most, length):
            gap = _place_gap(sentence, ids, tokenizer, seed)
            if gap is not None:
                yield gap


def _place_gap(sentence: _Sentence, ids: list[int], tokenizer: Tokenizer, seed: int) -> Gap | None:
    """Return a sentence with a gap; None if no words of the sentence can be hidden."""
    text = sentence.text
    words = list(_WORD.finditer(text))
    spans = []
    for first, word in enumerate(words):
        for last in words[first : first + _MOST_WORDS]:
            spans.append((word.start(), last.end()))
    spans.sort(key=lambda span: hash_to_unit(f"{seed} {span} {text}".encode()))
    fewest, most = GAP_TOKENS
    for start, stop in spans:
        parts = (text[:start], text[start:stop], text[stop:])
        before, hidden, after = tokenizer.encode(parts)
        fits = fewest <= len(hidden) <= most
        has_context = min(len(before), len(after)) >= CONTEXT_TOKENS
        # Some tokenizers join characters across the ends of a gap, or add spaces to a part.
        if fits and has_context and before + hidden + after == ids:
            first_hidden = len(before)
            return Gap(
                sentence.document,
                sentence.position,
                *parts,
                ids=ids,
                start=first_hidden,
                stop=first_hidden + len(hidden),
            )
    return None


def _find_repeated(sentences: set[str], training: Iterable[str]) -> set[str]:
    """Return those sentences that occur in the training text, apart from white space."""
    repeated = set()
    for text in _read_start(training, MOST_TRAINING_CHARACTERS):
        for start, stop in find_sentences(text):
            sentence = _plain(text[start:stop])
            if sentence in sentences:
                repeated.add(sentence)
    return repeated


def _plain(text: str) -> str:
    return " ".join(text.split())
