"""Conversations as rows in which only the answers of the assistant are noised and scored.

A conversation gives one example or several (`ChatSettings.answers`). An example is a row of tokens
with a mark for each token:

    GIVEN     part of a prompt: never noised, never scored
    ANSWER    part of an answer, with its end mark: noised and scored
    FILLER    end mark after the first one (`ChatSettings.answer_length`): noised and scored, but
              not counted as a token of the answer

An example is never divided between two rows, so that every answer is next to its prompt.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, final

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from ddiff.data.cache import Cache, fingerprint
from ddiff.data.chat_template import ASSISTANT, ChatTemplate, Message, find_template
from ddiff.data.documents import Documents, fingerprint_texts
from ddiff.data.overlap import check_overlap, find_overlap
from ddiff.data.packing import ANSWER, FILLER, GIVEN, PackedRows, RowMarks
from ddiff.data.shards import stream_from_documents
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION, token_dtype
from ddiff.errors import ArgumentError, DataError
from ddiff.progress import show_progress

Answers = Literal["last", "each", "all"]
LongRule = Literal["cut", "drop", "error"]
_AT_ONCE = 64
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatSettings:
    """Rules by which conversations become examples.

    Attributes:
        template: text of a Jinja template; None: that of the tokenizer, or the default one.
        answers: "last": the last answer, given all messages before it. "each": one example per
            answer, given the messages before it. "all": one example with all answers, each of
            which is predicted from the prompts before and after it.
        answer_length: number of tokens of the last answer of every example: its tokens, its end
            mark, and end marks up to this number. None: the answer and its end mark.
        long: rule for an example of more tokens than a row. "cut": the beginning of the prompt is
            cut, and an example whose answer does not fit is left out. "drop": the example is left
            out. "error": DataError.
        pack: whether a training row may hold several examples. Attention never crosses them.
    """

    template: str | None = None
    answers: Answers = "last"
    answer_length: int | None = None
    long: LongRule = "cut"
    pack: bool = True


class Example(NamedTuple):
    """Token ids of an example, and the mark of each token."""

    ids: list[int]
    marks: list[int]


class Piece(NamedTuple):
    """Part of a rendered conversation: a text that is an answer or not."""

    text: str
    is_answer: bool


@final
class ChatEncoder:
    """Encoder of conversations with a template and a tokenizer.

    Special tokens in the template become their ids. A message with the spelling of a special token
    could end its own turn. `has_special` finds it, so that callers can leave it out.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.template = template
        spellings = tokenizer.tokens()
        self._special: dict[str, int] = {}
        for number in tokenizer.special_ids:
            self._special[spellings[number]] = number
        # the longest first, because one spelling may begin with another one
        longest_first = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def has_special(self, messages: Sequence[Message]) -> bool:
        """Return whether a message contains the spelling of a special token."""
        return any(self._pattern.search(message["content"]) for message in messages)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of messages, up to the place where the answer begins."""
        (ids,) = self.encode_texts([self.template.render(messages, opens_answer=True)])
        return ids

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of rendered texts, in which special tokens become their ids."""
        plain: list[str] = []
        special: list[list[str]] = []
        for text in texts:
            plain += self._pattern.split(text)
            special.append(self._pattern.findall(text))
        encoded = iter(self.tokenizer.encode(plain))
        rows = []
        for found in special:
            row = list(next(encoded))
            for spelling in found:
                row.append(self._special[spelling])
                row += next(encoded)
            rows.append(row)
        return rows

    def split(self, messages: Sequence[Message], answers: Answers) -> list[list[Piece]]:
        """Return the pieces of each example of a conversation."""
        places = [
            number
            for number, message in enumerate(messages)
            if number > 0 and message["role"] == ASSISTANT
        ]
        if answers == "each":
            return [self._split(messages, [place]) for place in places]
        return [self._split(messages, places[-1:] if answers == "last" else places)]

    def encode(self, pieces: Sequence[Piece], ids: Sequence[Sequence[int]]) -> Example:
        """Join the encoded pieces of an example, which ends with an end mark.

        The end mark is the special token that the template writes after an answer, or else that of
        the tokenizer.
        """
        row: list[int] = []
        marks: list[int] = []
        for piece, part in zip(pieces, ids, strict=True):
            row += part
            marks += [ANSWER if piece.is_answer else GIVEN] * len(part)
        end = self.tokenizer.eos_id
        has_end = bool(row) and marks[-1] == ANSWER and row[-1] in self._special.values()
        if end is not None and not has_end:
            row.append(end)
            marks.append(ANSWER)
        return Example(row, marks)

    def _split(self, messages: Sequence[Message], places: Sequence[int]) -> list[Piece]:
        """Return the pieces of the messages up to the answer at the last of `places`."""
        done = ""
        pieces = []
        for place in places:
            prompt = self.template.render(messages[:place], opens_answer=True)
            whole = self.template.render(messages[: place + 1])
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    f"{self.template.name} writes the messages before an answer differently with "
                    "and without the answer, so that the tokens of the answer cannot be found. Set "
                    '[data] answers = "last", or choose another template.'
                )
            answer = self._cut_after_end(whole[len(prompt) :])
            pieces += [Piece(prompt[len(done) :], False), Piece(answer, True)]
            done = prompt + answer
        return pieces

    def _cut_after_end(self, answer: str) -> str:
        """Cut the space that the template writes after the end mark of an answer."""
        for mark in self._pattern.finditer(answer):
            if not answer[mark.end() :].strip():
                return answer[: mark.end()]
        return answer


@final
@dataclass(frozen=True)
class ChatCorpus:
    """Conversations of a data set. Their rows have marks, unlike those of `Documents`.

    `documents` has a column "messages" (`ddiff.data.conversations`).
    """

    documents: Documents
    settings: ChatSettings = field(default_factory=ChatSettings)
    entropy_rate: float | None = field(default=None, init=False)

    @property
    def train(self) -> Dataset:
        return self.documents.train

    @property
    def validation(self) -> Dataset:
        return self.documents.validation

    def encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        """Return the encoder of the conversations, also for prompts."""
        return ChatEncoder(tokenizer, find_template(tokenizer, self.settings.template))

    def rows(self, part: str, tokenizer: Tokenizer, length: int, cache: Cache) -> PackedRows:
        """Pack the examples of "train" or "validation" into rows of `length` tokens.

        Every validation row has one example. Raises DataError if no example fits, or if an example
        is too long and `settings.long` is "error".
        """
        examples = self._load(part, tokenizer, length, cache)
        packs = self.settings.pack and part == TRAIN
        marks = RowMarks(
            marks=examples.marks,
            borders=_find_borders(examples.ends, length, packs),
            sources=examples.sources,
        )
        stream = stream_from_documents(examples.ids, examples.ends, tokenizer.num_tokens)
        filler = 0 if tokenizer.eos_id is None else tokenizer.eos_id
        return PackedRows(stream, length, filler=filler, marks=marks)

    def check_repetitions(self, tokenizer: Tokenizer, length: int, cache: Cache) -> None:
        """Raise DataError if the training examples contain all validation examples."""
        train = self.rows(TRAIN, tokenizer, length, cache).tokens
        validation = self.rows(VALIDATION, tokenizer, length, cache).tokens
        check_overlap(find_overlap(train, validation), "The conversations")

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> NoReturn:
        """Raise ArgumentError: token shards have no marks of the answers."""
        raise ArgumentError(
            "[data]: conversations have no token shards, since these do not record which tokens "
            "are answers. Leave out `ddiff data`: `ddiff run` tokenizes conversations at its start."
        )

    def _load(self, part: str, tokenizer: Tokenizer, length: int, cache: Cache) -> _Examples:
        check_answer_length(tokenizer, self.settings.answer_length)
        template = find_template(tokenizer, self.settings.template)
        documents = self.train if part == TRAIN else self.validation
        inputs = {
            "documents": fingerprint_texts(documents.select_columns("text")),
            "tokenizer": tokenizer.fingerprint,
            "special": fingerprint(list(tokenizer.special_ids)),
            "template": fingerprint([template.source, dict(template.tokens)]),
            "length": length,
            "settings": {**asdict(self.settings), "template": None, "pack": None},
        }

        def build(folder: Path) -> None:
            encoder = ChatEncoder(tokenizer, template)
            _Build(encoder, self.settings, length, part).run(documents).save(folder)

        examples = _Examples.load(cache.load_or_build("chat", inputs, build))
        examples.report(part, length, self.settings)
        return examples


@dataclass(frozen=True)
class _Examples:
    """Examples of one part of the data.

    Attributes:
        ids: [n] token ids of all examples.
        ends: [k] position after the last token of each example.
        marks: [n] mark of each token.
        sources: [k] number of the conversation of each example.
        counts: numbers of conversations, examples and what was left out, by name.
    """

    ids: NDArray[np.unsignedinteger]
    ends: NDArray[np.int64]
    marks: NDArray[np.uint8]
    sources: NDArray[np.int64]
    counts: Mapping[str, int]

    def save(self, folder: Path) -> None:
        arrays = {"ids": self.ids, "ends": self.ends, "marks": self.marks, "sources": self.sources}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        (folder / "counts.json").write_text(json.dumps(dict(self.counts)))

    @classmethod
    def load(cls, folder: Path) -> _Examples:
        ids = np.load(folder / "ids.npy", mmap_mode="r")
        marks = np.load(folder / "marks.npy", mmap_mode="r")
        ends = np.load(folder / "ends.npy")
        sources = np.load(folder / "sources.npy")
        return cls(ids, ends, marks, sources, json.loads((folder / "counts.json").read_text()))

    def report(self, part: str, length: int, settings: ChatSettings) -> None:
        """Log how many examples were cut or left out, and why."""
        counts = self.counts
        limits = f"[data] length = {length}"
        if settings.answer_length is not None:
            limits += f" and answer_length = {settings.answer_length}"
        remarks = {
            "cut": f"have more tokens than {limits} allow: the beginning of their prompts was cut",
            "long": f"have more tokens than {limits} allow, and were left out",
            "special": "contain the spelling of a special token in a message, and were left out",
        }
        for name, remark in remarks.items():
            if counts[name]:
                _log.warning(
                    "%s of the %s examples for %s %s.",
                    f"{counts[name]:,}",
                    f"{counts['examples']:,}",
                    part,
                    remark,
                )


class _Build:
    """Encoding of the conversations of one part."""

    def __init__(
        self, encoder: ChatEncoder, settings: ChatSettings, length: int, part: str
    ) -> None:
        self.encoder = encoder
        self.settings = settings
        self.length = length
        self.part = part
        self.counts = dict.fromkeys(("examples", "cut", "long", "special"), 0)
        self.shortest = 0  # tokens of the shortest answer that was left out
        self._rows: list[Example] = []
        self._sources: list[int] = []

    def run(self, documents: Dataset) -> _Examples:
        with show_progress(len(documents), "tokenizing") as bar:
            for first in range(0, len(documents), _AT_ONCE):
                batch = documents[first : first + _AT_ONCE]
                self._add_batch(first, batch["messages"], batch["name"])
                bar.advance(len(batch["name"]))
        if not self._rows:
            raise self._nothing_left()
        sizes = [len(row.ids) for row in self._rows]
        dtype = token_dtype(self.encoder.tokenizer.num_tokens)
        return _Examples(
            ids=np.concatenate([np.array(row.ids, dtype) for row in self._rows]),
            ends=np.cumsum(sizes, dtype=np.int64),
            marks=np.concatenate([np.array(row.marks, np.uint8) for row in self._rows]),
            sources=np.array(self._sources, np.int64),
            counts=self.counts,
        )

    def _add_batch(self, first: int, written: Sequence[str], names: Sequence[str]) -> None:
        found: list[tuple[int, list[Piece]]] = []
        for number, text in enumerate(written):
            for pieces in self._split(json.loads(text), names[number]):
                found.append((number, pieces))
        texts = [piece.text for _, pieces in found for piece in pieces]
        encoded = iter(self.encoder.encode_texts(texts))
        for number, pieces in found:
            ids = [next(encoded) for _ in pieces]
            example = self._fit(self.encoder.encode(pieces, ids), names[number])
            if example is not None:
                self._rows.append(example)
                self._sources.append(first + number)

    def _split(self, messages: list[dict[str, str]], name: str) -> Iterator[list[Piece]]:
        try:
            examples = self.encoder.split(messages, self.settings.answers)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        self.counts["examples"] += len(examples)
        if self.encoder.has_special(messages):
            self.counts["special"] += len(examples)
            return
        yield from examples

    def _fit(self, example: Example, name: str) -> Example | None:
        """Fill the last answer and cut a long prompt; None if the example is left out."""
        answer = len(example.marks)
        while answer > 0 and example.marks[answer - 1] == ANSWER:
            answer -= 1
        size = len(example.ids) - answer  # tokens of the last answer
        wanted = size if self.settings.answer_length is None else self.settings.answer_length
        missing = wanted - size
        total = len(example.ids) + max(0, missing)
        first = max(0, total - self.length)  # tokens of the prompt to cut
        is_short_answer = missing >= 0 and wanted <= self.length
        if not is_short_answer or (first and self.settings.long != "cut"):
            self._leave_out(name, total, size)
            return None
        self.counts["cut"] += first > 0
        ids = example.ids[first:]
        marks = _mark_rest_as_given(example.marks, first)
        if missing:
            end = self.encoder.tokenizer.eos_id
            assert end is not None, "see check_answer_length"
            ids = ids + [end] * missing
            marks = marks + [FILLER] * missing
        return Example(ids, marks)

    def _leave_out(self, name: str, total: int, answer: int) -> None:
        if self.settings.long == "error":
            limit = self.settings.answer_length
            if limit is not None and answer > limit:
                raise DataError(
                    f"{name}: the answer has {answer} tokens, but [data] answer_length = {limit}. "
                    'Increase answer_length, or set [data] long = "drop".'
                )
            raise DataError(
                f"{name} needs {total} tokens, {answer} of them for its answer, but [data] length "
                f'= {self.length}. Increase length, or set [data] long = "cut" or "drop".'
            )
        self.counts["long"] += 1
        self.shortest = min(self.shortest or answer, answer)

    def _nothing_left(self) -> DataError:
        return DataError(
            f"No conversation is left for {self.part}: of {self.counts['examples']:,} examples, "
            f"{self.counts['long']:,} do not fit into [data] length = {self.length} (the shortest "
            f"answer has {self.shortest} tokens, answer_length = {self.settings.answer_length}), "
            f"and {self.counts['special']:,} contain the spelling of a special token. Increase "
            "length or answer_length, or check the template."
        )


def read_answer(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of sampled tokens up to the first special token, the end mark of an answer.

    An answer contains no special token, since messages with special tokens are refused. So every
    special token ends it, also one that is not the end mark of the tokenizer, such as <|eot_id|>.
    """
    special = set(tokenizer.special_ids)
    answer = list(takewhile(lambda number: number not in special, ids))
    return tokenizer.decode([answer])[0].strip()


def _mark_rest_as_given(marks: list[int], first: int) -> list[int]:
    """Return the marks from `first`. The rest of an answer that begins before is not scored."""
    kept = marks[first:]
    if first == 0 or marks[first - 1] != ANSWER:
        return kept
    rest = 0
    while rest < len(kept) and kept[rest] == ANSWER:
        rest += 1
    return [GIVEN] * rest + kept[rest:]


def check_answer_length(tokenizer: Tokenizer, answer_length: int | None) -> None:
    """Raise ArgumentError if answers are filled up, and the tokenizer has no end mark."""
    if answer_length is not None and tokenizer.eos_id is None:
        raise ArgumentError(
            "[data] answer_length: answers are filled up with end marks, but the tokenizer has "
            'none. Leave answer_length out, or use a tokenizer with an end mark, such as "bpe".'
        )


def _find_borders(ends: NDArray[np.int64], length: int, packs: bool) -> NDArray[np.int64]:
    """Return the borders [R+1] of R rows in the token stream.

    With `packs`, a row gets the next examples as long as they fit; otherwise one example.
    """
    if not packs:
        return np.concatenate([[0], ends])
    borders = [0]
    end_before = 0
    for end in ends.tolist():
        if end - borders[-1] > length:
            borders.append(end_before)
        end_before = end
    borders.append(end_before)
    return np.array(borders, np.int64)
