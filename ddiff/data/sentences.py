"""Short sentences of the bundled novels, divided into training and validation by chapter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from ddiff.data.documents import load_bundled_novels
from ddiff.data.tokenizer_workers import hash_to_unit
from ddiff.errors import ArgumentError

# A sentence ends at one of these marks, with the quotation marks after it, before white space.
_END = re.compile(r"(?<=[.!?])[\"')]*\s+")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Dr|St|Messrs|Esq|[A-Z])\.$")
_LONGEST_ABBREVIATION = len("Messrs.")
_QUOTES = re.compile(r"[\"_()]")


class Sentences(NamedTuple):
    """Training and validation sentences; no sentence is in both parts."""

    train: list[str]
    validation: list[str]


def find_sentences(text: str) -> Iterator[tuple[int, int]]:
    """Iterate over the sentences of an English text, as pairs of first and last character + 1.

    A paragraph ends a sentence. Abbreviations such as "Mr." do not. A sentence includes its full
    stop, but not the quotation marks after it.
    """
    start = 0
    for gap in _PARAGRAPH_END.finditer(text):
        yield from _find_in_paragraph(text, start, gap.start())
        start = gap.end()
    yield from _find_in_paragraph(text, start, len(text))


def _find_in_paragraph(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    for end in _END.finditer(text, start, stop):
        last = max(start, end.start() - _LONGEST_ABBREVIATION)
        if not _ABBREVIATION.search(text, last, end.start()):
            yield start, end.start()
            start = end.end()
    if start < stop:
        yield start, stop


def split_sentences(text: str) -> list[str]:
    """Split an English text into sentences, without quotation marks and with single spaces.

    `find_sentences` defines the sentences.
    """
    found = (text[start:stop] for start, stop in find_sentences(text))
    plain = (" ".join(_QUOTES.sub("", sentence).split()) for sentence in found)
    return [sentence for sentence in plain if sentence]


def load_sentences(shortest: int, longest: int, held_out: float) -> Sentences:
    """Load the different sentences of `shortest` to `longest` words of Jane Austen's six novels.

    A fraction `held_out` of the chapters, chosen by the hash of their text, gives the validation
    sentences. A sentence of both parts is only in the training part. Chapter headings are left out,
    and sentences with dashes too.

    Raises ArgumentError for impossible numbers of words.
    """
    if not 1 <= shortest <= longest:
        raise ArgumentError(
            "load_sentences: shortest must be at least 1 and at most longest; got shortest = "
            f"{shortest}, longest = {longest}."
        )
    # Dictionaries keep the first occurrence of a sentence, in the order of the novels.
    train: dict[str, None] = {}
    validation: dict[str, None] = {}
    documents = load_bundled_novels()
    for part in (documents.train, documents.validation):
        for text in part["text"]:
            is_held_out = hash_to_unit(text.encode()) < held_out
            chosen = validation if is_held_out else train
            for sentence in split_sentences(text):
                # A dash joins two words without white space, and its sentence is often broken off.
                is_plain = not sentence.isupper() and "--" not in sentence
                if is_plain and shortest <= len(sentence.split()) <= longest:
                    chosen.setdefault(sentence)
    return Sentences(list(train), [one for one in validation if one not in train])
