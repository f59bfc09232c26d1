"""Tokenizers, which convert text to token ids and token ids to text.

A tokenizer adds no special tokens: packing appends the end-of-document id. A tokenizer is saved as
one JSON file, which names the kind of tokenizer. `load_tokenizer` restores the tokenizer.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, final

import numpy as np
from tokenizers import Regex
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer

from ddiff.data.cache import fingerprint
from ddiff.data.files import read_json, write_json
from ddiff.data.pretrained import custom_code_error, load_pretrained
from ddiff.errors import ArgumentError, DataError
from ddiff.progress import show_activity

EOS = "<|eos|>"
# Limit in characters, because the time to learn byte pairs is quadratic in the length of a word.
LONGEST_WORD = 1000
MOST_TOKENS = 2**24
# Rows without a token: networks pad their number of rows to a multiple of up to 512 (Qwen2.5 has
# 399 such rows). A larger share of a small vocabulary is a sign of another tokenizer.
MOST_PADDING = 512
MOST_PADDED_SHARE = 1 / 64
# The pattern with which GPT-2 (and ByteLevel) splits text into words, with a limit on the length.
_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    rf"| ?\p{{L}}{{1,{LONGEST_WORD}}}"
    rf"| ?\p{{N}}{{1,{LONGEST_WORD}}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]{{1,{LONGEST_WORD}}}"
    rf"|\s{{1,{LONGEST_WORD}}}(?!\S)"
    rf"|\s{{1,{LONGEST_WORD}}}"
)
_CUT = Split(Regex(_WORDS), "isolated")
_LONG_GAP = re.compile(rf"\s{{{LONGEST_WORD + 1},}}")
_log = logging.getLogger(__name__)
Unit = Literal["token", "symbol"]


class Tokenizer(Protocol):
    """Tokenizer with V tokens and ids 0..V-1.

    num_tokens: the number V of tokens.
    eos_id: id of the end mark of a document; None if documents have no end mark.
    special_ids: ids that do not occur in encoded text.
    fill_id: id of the symbol that fills up rows of shorter texts; None if there is no such symbol.
    fingerprint: hexadecimal digits that identify the tokenizer.
    unit: "symbol" if all documents are rows of one fixed length, otherwise "token". Metrics are per
        unit.
    """

    num_tokens: int
    eos_id: int | None
    special_ids: tuple[int, ...]
    fill_id: int | None
    fingerprint: str
    unit: Unit

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens.

        Raises DataError for text that the tokenizer cannot encode.
        """
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, including the text of special tokens.

        Raises ArgumentError for ids outside 0..V-1.
        """
        ...

    def tokens(self) -> list[str]:
        """Return the V tokens as strings, in the order of their ids."""
        ...

    def save(self, path: str) -> None:
        """Save the tokenizer as one JSON file at any fsspec path."""
        ...


class Unencodable(DataError):
    """Base class of the errors for text that a tokenizer cannot encode.

    `row` is the index of the text in the argument of `encode`.
    """

    row: int

    def at(self, row: int, name: str) -> Unencodable:
        """Return a copy with the row index `row`, and with `name` as the source in the message."""
        raise NotImplementedError


class UnknownSymbol(Unencodable):
    """Error for a character outside the alphabet, in the text with index `row`."""

    def __init__(self, symbol: str, row: int, name: str, symbols: Sequence[str]) -> None:
        self.symbol = symbol
        self.row = row
        self.name = name
        self.symbols = symbols
        super().__init__(
            f"{name} holds the character {symbol!r}, which is not one of the {len(symbols)} "
            f"symbols of the alphabet ({' '.join(symbols[:40])}). Fix the row, or add the "
            "character to the symbols of the tokenizer."
        )

    # By default an exception is pickled with its message as the only argument of __init__. The
    # arguments here differ.
    def __reduce__(self) -> tuple[type[UnknownSymbol], tuple[str, int, str, Sequence[str]]]:
        return UnknownSymbol, (self.symbol, self.row, self.name, self.symbols)

    def at(self, row: int, name: str) -> UnknownSymbol:
        return UnknownSymbol(self.symbol, row, name, self.symbols)


class UnknownWord(Unencodable):
    """Error for `word`, a part of the text with index `row` that cannot be converted to ids.

    The message gives the `reason`, and a `remedy` for the user.
    """

    def __init__(self, word: str, row: int, name: str, reason: str, remedy: str) -> None:
        self.word = word
        self.row = row
        self.name = name
        self.reason = reason
        self.remedy = remedy
        shown = word if len(word) <= 60 else f"{word[:60]}..."
        super().__init__(f"{name} holds {shown!r}, which cannot be tokenized: {reason}. {remedy}")

    def __reduce__(self) -> tuple[type[UnknownWord], tuple[str, int, str, str, str]]:
        return UnknownWord, (self.word, self.row, self.name, self.reason, self.remedy)

    def at(self, row: int, name: str) -> UnknownWord:
        return UnknownWord(self.word, row, name, self.reason, self.remedy)


@final
class BytePairTokenizer:
    """Byte-level byte-pair encoding learned from a corpus.

    Decoding restores every text exactly. The only special token is `<|eos|>` with id 0.
    """

    unit: Unit = "token"
    fill_id: int | None = None

    def __init__(self, definition: str) -> None:
        """Build the tokenizer from `definition`, JSON of the `tokenizers` library."""
        self._definition = definition
        self._tokenizer = TokenizersTokenizer.from_str(definition)
        # "<|eos|>" in a text is encoded as text: only packing ends documents.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.num_tokens = len(vocabulary)
        if vocabulary.get(EOS) != 0 or sorted(vocabulary.values()) != list(range(self.num_tokens)):
            raise DataError(
                "BytePairTokenizer: the definition must number its tokens 0, 1, 2, ... without "
                f"gaps, and {EOS} must have the id 0; it has {self.num_tokens} tokens, and the id "
                f"of {EOS} is {vocabulary.get(EOS)}. Use a tokenizer that ddiff has saved, or "
                'read another tokenizer with [tokenizer] kind = "pretrained".'
            )
        self.eos_id: int | None = 0
        self.special_ids: tuple[int, ...] = (0,)
        self.fingerprint = fingerprint(["bytepair", json.loads(definition)])[:16]

    # The pickle of the tokenizers library loses encode_special_tokens.
    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[str]]:
        return BytePairTokenizer, (self._definition,)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BytePairTokenizer:
        """Learn a vocabulary of at most `size` tokens. Equal texts give equal vocabularies.

        `size` must be at least 257: one token for each of the 256 bytes, and `<|eos|>`. Words of
        more than LONGEST_WORD characters are cut into pieces of that length. If the texts have such
        words, the tokenizer cuts long words in encoding too. Otherwise the result is plain
        byte-level byte-pair encoding.
        """
        if size < 257:
            raise ArgumentError(
                f"BytePairTokenizer.train: size must be at least 257 (256 bytes and {EOS}); got "
                f"{size}."
            )
        tokenizer = TokenizersTokenizer(BPE())
        byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = PreTokenizers([_CUT, byte_level])
        tokenizer.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[EOS],
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        )
        checked = _CheckedTexts(texts)
        with show_activity(f"learning byte pairs (at most {size})"):
            tokenizer.train_from_iterator(checked, trainer)
        if not checked.has_long_words:
            # Both definitions encode these texts equally. The plain definition keeps the
            # fingerprint of older versions.
            tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        return cls(tokenizer.to_str())

    @property
    def definition(self) -> str:
        """JSON of the `tokenizers` library."""
        return self._definition

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_or_explain(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        checked = _check_ids(ids, self.num_tokens)
        return self._tokenizer.decode_batch(checked, skip_special_tokens=False)

    def tokens(self) -> list[str]:
        ids = self._tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    def __repr__(self) -> str:
        return _representation(self)

    def save(self, path: str) -> None:
        write_json(path, {"kind": "bytepair", "definition": json.loads(self._definition)})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> BytePairTokenizer:
        return cls(json.dumps(saved["definition"]))


@final
class AlphabetTokenizer:
    """Tokenizer with one id per character and no special token.

    Use this tokenizer for DNA, amino acids, names and generated sources. Metrics are per symbol.
    """

    unit: Unit = "symbol"
    eos_id: int | None = None
    special_ids: tuple[int, ...] = ()

    def __init__(self, symbols: Sequence[str], fill: str | None = None) -> None:
        """Build the tokenizer from a string or list of distinct characters, in the order of ids.

        `fill` is the symbol that fills up shorter rows, one of `symbols`, or None.
        """
        self._symbols = list(symbols)
        if not self._symbols or any(len(symbol) != 1 for symbol in self._symbols):
            raise ArgumentError(
                "AlphabetTokenizer: symbols must be one or more single characters; got "
                f'{self._symbols}. Give the symbols as one string, for instance "ACGT".'
            )
        if len(set(self._symbols)) != len(self._symbols):
            twice = sorted({symbol for symbol in self._symbols if self._symbols.count(symbol) > 1})
            raise ArgumentError(
                f"AlphabetTokenizer: symbols must be distinct; {twice} occur more than once. "
                "Remove the repetitions."
            )
        if fill is not None and fill not in self._symbols:
            raise ArgumentError(
                f"AlphabetTokenizer: fill must be one of the {len(self._symbols)} symbols; got "
                f"{fill!r}, which fills up shorter rows. Add this character to the symbols."
            )
        self.num_tokens = len(self._symbols)
        self._fill = fill
        self.fill_id = None if fill is None else self._symbols.index(fill)
        identity = ["alphabet", self._symbols, *([] if fill is None else [fill])]
        self.fingerprint = fingerprint(identity)[:16]
        codes = np.array([ord(symbol) for symbol in self._symbols])
        self._ids = np.full(codes.max() + 1, -1, dtype=np.int64)  # by code point; -1: no symbol
        self._ids[codes] = np.arange(self.num_tokens)

    @classmethod
    def from_texts(cls, texts: Iterable[str], fill: str | None = None) -> AlphabetTokenizer:
        """Build a tokenizer of all characters that occur in the texts, in code-point order.

        `fill` is the symbol that fills up shorter rows, or None.
        """
        found = set().union(*texts)
        return cls(sorted(found if fill is None else found | {fill}), fill)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text, row) for row, text in enumerate(texts)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [
            "".join(self._symbols[number] for number in row)
            for row in _check_ids(ids, self.num_tokens)
        ]

    def tokens(self) -> list[str]:
        return list(self._symbols)

    def __repr__(self) -> str:
        return _representation(self)

    def save(self, path: str) -> None:
        saved: dict[str, Any] = {"kind": "alphabet", "symbols": self._symbols}
        if self._fill is not None:
            saved["fill"] = self._fill
        write_json(path, saved)

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> AlphabetTokenizer:
        return cls(saved["symbols"], saved.get("fill"))

    def _encode(self, text: str, row: int) -> list[int]:
        # "surrogatepass": a lone surrogate is refused below like any other unknown character.
        content = text.encode("utf-32-le", "surrogatepass")
        codes = np.frombuffer(content, dtype=np.uint32).astype(np.int64)
        # A code point beyond the table reads the last entry, which `where` then replaces.
        last = len(self._ids) - 1
        found = self._ids[np.minimum(codes, last)]
        ids = np.where(codes <= last, found, -1)
        if (ids < 0).any():
            raise UnknownSymbol(text[int(np.argmax(ids < 0))], row, f"Row {row}", self._symbols)
        return ids.tolist()


LETTERS = " abcdefghijklmnopqrstuvwxyz"
"""Characters of `LettersTokenizer` in the order of their ids."""
_OTHER_CHARACTERS = re.compile("[^a-z]+")


def fold_letters(text: str) -> str:
    """Convert a text to the 27 characters of `LETTERS`.

    Letters become lower case and lose their accents (Unicode NFKD without combining marks). Every
    sequence of other characters becomes one space.
    """
    if not text.isascii():
        parts = unicodedata.normalize("NFKD", text)
        text = "".join(part for part in parts if not unicodedata.combining(part))
    return _OTHER_CHARACTERS.sub(" ", text.lower())


@final
class LettersTokenizer:
    """Tokenizer of free text with 27 characters: the letters a to z, and the space.

    Encoding applies `fold_letters`, as the data set text8 does for English. Case, accents, digits
    and punctuation are lost, so a text in general has no bits per byte. The tokenizer has no
    special tokens: nothing marks the end of a document.
    """

    unit: Unit = "token"
    eos_id: int | None = None
    special_ids: tuple[int, ...] = ()
    fill_id: int | None = None

    def __init__(self) -> None:
        self._alphabet = AlphabetTokenizer(LETTERS)
        self.num_tokens = len(LETTERS)
        self.fingerprint = fingerprint(["letters", LETTERS])[:16]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the folded characters of each text."""
        return self._alphabet.encode([fold_letters(text) for text in texts])

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return self._alphabet.decode(ids)

    def tokens(self) -> list[str]:
        return list(LETTERS)

    def __repr__(self) -> str:
        return _representation(self)

    def save(self, path: str) -> None:
        write_json(path, {"kind": "letters"})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> LettersTokenizer:
        return cls()


@final
class WordTokenizer:
    """Tokenizer with one id per word, for texts of few different words, such as captions.

    A word is a sequence of characters without white space. Decoding joins words by one space. The
    only special token is `<|eos|>` with id 0.
    """

    unit: Unit = "token"
    fill_id: int | None = None

    def __init__(self, words: Sequence[str]) -> None:
        """Build the tokenizer from a list of distinct words, in the order of their ids from 1."""
        self._words = list(words)
        invalid = [word for word in self._words if word == EOS or word.split() != [word]]
        if not self._words or invalid or len(set(self._words)) != len(self._words):
            raise ArgumentError(
                "WordTokenizer: words must be one or more distinct words without white space, and "
                f"not {EOS}; got {len(self._words)} words, such as {(invalid or self._words)[:3]}."
            )
        self.num_tokens = 1 + len(self._words)
        self.eos_id: int | None = 0
        self.special_ids: tuple[int, ...] = (0,)
        self.fingerprint = fingerprint(["words", self._words])[:16]
        self._ids = {word: number for number, word in enumerate(self._words, start=1)}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> WordTokenizer:
        """Build a tokenizer of all words that occur in the texts, in alphabetical order."""
        found: set[str] = set()
        for text in texts:
            found.update(text.split())
        return cls(sorted(found))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the words of each text. Raises UnknownWord for other words."""
        return [self._encode(text, row) for row, text in enumerate(texts)]

    def _encode(self, text: str, row: int) -> list[int]:
        ids = []
        for word in text.split():
            if word not in self._ids:
                known = " ".join(self._words[:40])
                raise UnknownWord(
                    word,
                    row,
                    f"Row {row}",
                    f"the word is not one of the {len(self._words)} words of the training texts "
                    f"({known})",
                    'Use one of these words, or a tokenizer for every text, such as "bpe".',
                )
            ids.append(self._ids[word])
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        tokens = self.tokens()
        checked = _check_ids(ids, self.num_tokens)
        return [" ".join(tokens[number] for number in row) for row in checked]

    def tokens(self) -> list[str]:
        return [EOS, *self._words]

    def __repr__(self) -> str:
        return _representation(self)

    def save(self, path: str) -> None:
        write_json(path, {"kind": "words", "words": self._words})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> WordTokenizer:
        return cls(saved["words"])


@final
class PretrainedTokenizer:
    """Tokenizer of the `transformers` library.

    `save` writes all files of the tokenizer into the JSON file, so that a resumed run needs no
    access to the hub.
    """

    unit: Unit = "token"
    fill_id: int | None = None

    def __init__(
        self, tokenizer: Any, name: str = "the tokenizer", num_tokens: int | None = None
    ) -> None:
        """Wrap a tokenizer of `transformers.AutoTokenizer.from_pretrained`.

        Args:
            tokenizer: the tokenizer of the library.
            name: name in error messages.
            num_tokens: number V of tokens of the model, if it differs from that of the tokenizer.
                Special and added tokens with the ids V, V + 1, ... are then left out, such as a
                mask that was added last. Missing ids below V are unused. None: the highest id of
                all tokens, including added tokens, plus 1.

        Unused ids count as special ids. Raises DataError if another token has the id V or above.
        """
        self._tokenizer = tokenizer
        self._size = num_tokens
        self._backend = _fast_backend(tokenizer)
        self._spellings: dict[int, str] = {}
        for token, number in tokenizer.get_vocab().items():
            self._spellings[number] = token
        # without the files of a tokenizer, the library builds one that has only special tokens
        if set(self._spellings) <= set(tokenizer.all_special_ids):
            raise DataError(
                f"{name} has an empty vocabulary, apart from special tokens. Name the folder of a "
                "trained tokenizer."
            )
        if num_tokens is not None:
            self._drop_added_tokens(num_tokens, name)
        self.num_tokens = num_tokens or max(self._spellings) + 1
        if self.num_tokens > MOST_TOKENS:
            raise DataError(
                f"{name} has {len(self._spellings)} tokens with ids up to {self.num_tokens - 1}, "
                f"but ids must be less than {MOST_TOKENS}, because the network has a row for every "
                "id. Number the tokens 0, 1, 2, ..."
            )
        self.eos_id: int | None = tokenizer.eos_token_id
        if self.eos_id not in self._spellings:
            self.eos_id = None
        unused = set(range(self.num_tokens)) - set(self._spellings)
        special = unused | (_find_special(tokenizer) & set(self._spellings))
        self.special_ids: tuple[int, ...] = tuple(sorted(special))
        identity = ["pretrained", self._definition(), *([] if num_tokens is None else [num_tokens])]
        self.fingerprint = fingerprint(identity)[:16]
        self._find_dropped = _dropped_character_finder(self._backend)

    def _drop_added_tokens(self, num_tokens: int, name: str) -> None:
        """Leave out the special and added tokens whose ids are not below `num_tokens`."""
        tokenizer = self._tokenizer
        added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        # The id of the unknown token may occur in encoded text.
        added.discard(tokenizer.unk_token_id)
        for number, token in list(self._spellings.items()):
            if number < num_tokens:
                continue
            if number not in added:
                raise DataError(
                    f"{name} has the token {token!r} with the id {number}, but num_tokens = "
                    f"{num_tokens}: only special and added tokens may have higher ids, apart from "
                    "the unknown token. Use the tokenizer of the model. If the network has a row "
                    "for a mask, the mask must be its last row."
                )
            del self._spellings[number]
        missing = num_tokens - max(self._spellings) - 1
        allowed = min(MOST_PADDING, int(num_tokens * MOST_PADDED_SHARE))
        if missing > allowed:
            raise DataError(
                f"{name} has {max(self._spellings) + 1} tokens, but num_tokens = {num_tokens}. At "
                f"most {allowed} ids may have no token. Use the tokenizer of the model."
            )

    # Only the tokenizer of the library is pickled: the function `_find_dropped` cannot be pickled.
    def __reduce__(self) -> tuple[type[PretrainedTokenizer], tuple[Any, str, int | None]]:
        return PretrainedTokenizer, (self._tokenizer, "the tokenizer", self._size)

    @classmethod
    def from_pretrained(
        cls, source: str, name: str | None = None, num_tokens: int | None = None
    ) -> PretrainedTokenizer:
        """Load a tokenizer from a local directory or by the name of a model on the hub.

        Error messages show `name`, if given, instead of `source`. `num_tokens` is the number of
        tokens of the model, if it differs from that of the tokenizer. Raises DataError if the
        tokenizer is missing, or needs Python code of its repository.
        """
        # Imported here, because it takes seconds and only this tokenizer needs it.
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        shown = name or source
        if source.strip():
            _check_not_saved_by_ddiff(Path(source), shown)
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer", name=name)
        is_known = isinstance(tokenizer, PreTrainedTokenizerBase)
        if is_known and tokenizer.init_kwargs.get("auto_map"):
            # The library has replaced the author's class by its own, which may give other ids.
            raise custom_code_error(shown, "tokenizer")
        return cls(tokenizer, f"The tokenizer of {shown!r}", num_tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not len(texts):
            return []
        if self._find_dropped is not None:
            for row, text in enumerate(texts):
                dropped = self._find_dropped(text)
                if dropped:
                    raise UnknownWord(dropped, row, f"Row {row}", _NO_TOKEN, _OTHER_TOKENIZER)
        encoded = _encode_or_explain(self._encode, texts)
        if self._size is not None:
            self._refuse_dropped_tokens(encoded)
        return encoded

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def _refuse_dropped_tokens(self, encoded: list[list[int]]) -> None:
        """Raise UnknownWord if a text has the spelling of an added token that was left out."""
        for row, ids in enumerate(encoded):
            highest = max(ids, default=0)
            if highest >= self.num_tokens:
                word = self._tokenizer.convert_ids_to_tokens(highest)
                raise UnknownWord(word, row, f"Row {row}", _NO_TOKEN, _OTHER_TOKENIZER)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids. Unused ids give no text."""
        checked = _check_ids(ids, self.num_tokens)
        spelled = [[number for number in row if number in self._spellings] for row in checked]
        return self._tokenizer.batch_decode(
            spelled, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def tokens(self) -> list[str]:
        return [
            self._spellings.get(number, f"<|no token {number}|>")
            for number in range(self.num_tokens)
        ]

    def __repr__(self) -> str:
        return _representation(self)

    @property
    def chat_template(self) -> str | None:
        """Jinja template of conversations; None if the tokenizer has none.

        Of several named templates, it is the one named "default".
        """
        found = self._tokenizer.chat_template
        return found.get("default") if isinstance(found, dict) else found

    @property
    def named_tokens(self) -> dict[str, str]:
        """Names of special tokens, such as "eos_token", with their spellings."""
        found = self._tokenizer.special_tokens_map
        return {name: token for name, token in found.items() if isinstance(token, str)}

    def save_pretrained(self, directory: str) -> None:
        """Write the files of the tokenizer in the format of the transformers library."""
        self._tokenizer.save_pretrained(directory)

    def save(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            files = {}
            # Further chat templates are in a folder.
            for file in sorted(Path(directory).rglob("*")):
                if file.is_file():
                    name = file.relative_to(directory).as_posix()
                    files[name] = base64.b64encode(file.read_bytes()).decode()
        saved: dict[str, Any] = {"kind": "pretrained", "files": files}
        if self._size is not None:
            saved["num_tokens"] = self._size
        write_json(path, saved)

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> PretrainedTokenizer:
        with tempfile.TemporaryDirectory() as directory:
            for file, content in saved["files"].items():
                place = Path(directory) / file
                if not place.resolve().is_relative_to(Path(directory).resolve()):
                    raise DataError(
                        f"load_tokenizer: {name} has a file outside of its folder, {file!r}. Save "
                        "the tokenizer again."
                    )
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(content, validate=True))
            return cls.from_pretrained(directory, name, saved.get("num_tokens"))

    def _definition(self) -> Any:
        """Return JSON values that identify the tokenizer.

        For a fast tokenizer this is its definition, for a slow tokenizer its class and vocabulary.
        """
        if self._backend is None:
            return [type(self._tokenizer).__name__, self._tokenizer.get_vocab()]
        definition = json.loads(self._backend.to_str())
        # Padding and truncation are left out, because they change with every call and are not used.
        definition.pop("padding", None)
        definition.pop("truncation", None)
        return definition


def _fast_backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer of a fast tokenizer, or None for a slow (Python) tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None


def _find_special(tokenizer: Any) -> set[int]:
    """Return the ids of all tokens that encoded text never contains.

    `all_special_ids` lacks the special tokens that only the file of the tokenizer declares, such as
    the marks <|start_header_id|> and <|eot_id|> of the turns of Llama 3.
    """
    added = tokenizer.added_tokens_decoder
    declared = {number for number, token in added.items() if token.special}
    return declared | set(tokenizer.all_special_ids)


_KINDS: dict[str, Any] = {
    "bytepair": BytePairTokenizer,
    "alphabet": AlphabetTokenizer,
    "letters": LettersTokenizer,
    "pretrained": PretrainedTokenizer,
    "words": WordTokenizer,
}


def load_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer that `save` has written.

    Raises DataError if the file is missing, damaged or not a tokenizer saved by ddiff.
    """
    saved = read_json(path, "load_tokenizer")
    if _is_huggingface(saved):
        raise DataError(
            f"load_tokenizer: {path} is a tokenizer.json of the tokenizers library (HuggingFace), "
            "but a tokenizer saved by ddiff is expected. Name its folder: "
            f'[tokenizer] kind = "pretrained", path = "{Path(path).parent}".'
        )
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DataError(
            f"load_tokenizer: {path} is not a tokenizer saved by ddiff: kind must be one of "
            f"{sorted(_KINDS)}; got {kind!r}."
        )
    try:
        return _KINDS[kind].restore(saved, path)
    except Exception as error:  # the tokenizers library raises plain Exception
        if isinstance(error, DataError) and kind == "pretrained":
            raise  # the message names the file and the cause already
        raise DataError(
            f"load_tokenizer: the {kind} tokenizer in {path} is damaged ({error}). Save the "
            "tokenizer again."
        ) from error


def _representation(tokenizer: Tokenizer) -> str:
    """Return the `repr` of a tokenizer, such as `BytePairTokenizer(512 tokens; 3f2a...)`."""
    size = f"{tokenizer.num_tokens} {tokenizer.unit}s"
    return f"{type(tokenizer).__name__}({size}; {tokenizer.fingerprint})"


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Warn if encoding and decoding does not restore the texts.

    The warning matters for bits per byte, which need tokens that determine all bytes of the text.
    """
    short = [text[:200] for text in texts[:16]]
    for before, after in zip(short, tokenizer.decode(tokenizer.encode(short))):
        if before != after:
            _log.warning(
                "The tokenizer loses text: %r is decoded as %r. The lost text is not modelled, and "
                "bits per byte are not reported for such texts.",
                *_around_difference(before, after),
            )
            return


def _around_difference(before: str, after: str) -> tuple[str, str]:
    """Return an excerpt of each of two texts, around their first difference."""
    shorter = min(len(before), len(after))
    same = 0
    while same < shorter and before[same] == after[same]:
        same += 1
    shown = slice(max(0, same - 10), same + 30)
    return before[shown], after[shown]


def _is_huggingface(saved: Any) -> bool:
    """Return whether `saved` is the tokenizer.json format of the HuggingFace tokenizers library."""
    return isinstance(saved, dict) and "kind" not in saved and isinstance(saved.get("model"), dict)


def _check_not_saved_by_ddiff(source: Path, shown: str) -> None:
    """Raise DataError for a file that the transformers library cannot load as a tokenizer.

    Such files are a tokenizer saved by ddiff, and a tokenizer.json that is given without its
    folder. `shown`: name of `source` in the message.
    """
    file = source / "tokenizer.json" if source.is_dir() else source
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        saved = None  # the error of the transformers library explains it
    if isinstance(saved, dict) and saved.get("kind") in list(_KINDS):
        raise DataError(
            f"No tokenizer from {shown!r}: {file} is a tokenizer saved by ddiff. Set "
            f'[tokenizer] kind = "saved", path = "{file}".'
        )
    if file == source and _is_huggingface(saved):
        raise DataError(
            f"No tokenizer from {shown!r}: this is a tokenizer.json of the tokenizers library "
            "(HuggingFace), but its folder is expected, because tokenizer_config.json defines the "
            f'end-of-text token. Set path = "{source.parent}".'
        )


_NO_TOKEN = "the tokenizer has no token for this text, and no unknown token"
_OTHER_TOKENIZER = (
    "Use a tokenizer that has an unknown token or a token for every byte, add the text to the "
    "vocabulary, or remove it from the corpus."
)
_NO_UNICODE = "this is a lone surrogate (half of a character), which UTF-8 cannot encode"
_WRITE_AGAIN = "Write the text again as UTF-8."


def _encode_or_explain(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]
) -> list[list[int]]:
    """Return `encode(texts)`, or raise UnknownWord if `encode` fails.

    The error names the first text that cannot be encoded, and the first word of this text that
    cannot be encoded.
    """
    try:
        return encode(texts)
    except Exception as error:  # the tokenizers library raises plain Exception
        for row, text in enumerate(texts):
            if not _fails(encode, text):
                continue
            surrogate = _find_surrogate(text)
            if surrogate is not None:
                raise UnknownWord(
                    surrogate, row, f"Row {row}", _NO_UNICODE, _WRITE_AGAIN
                ) from error
            word = next((word for word in text.split() if _fails(encode, word)), text)
            reason = _NO_TOKEN if "unk" in str(error).lower() else str(error)
            raise UnknownWord(word, row, f"Row {row}", reason, _OTHER_TOKENIZER) from error
        raise


def _fails(encode: Callable[[Sequence[str]], list[list[int]]], text: str) -> bool:
    try:
        encode([text])
    except Exception:
        return True
    return False


def _find_surrogate(text: str) -> str | None:
    """Return the first lone surrogate of a text (which UTF-8 cannot encode), or None."""
    for character in text:
        if "\ud800" <= character <= "\udfff":
            return character
    return None


def _dropped_character_finder(backend: Any) -> Callable[[str], str] | None:
    """Return a function that finds characters which the tokenizer silently drops.

    The returned function takes a text and returns one dropped character, or "" if none is dropped.
    The result is None for a tokenizer that never drops a character. Only byte-pair encoding without
    an unknown token drops characters, namely those without a token. If the byte pairs include a
    token for every byte, every text can be encoded. All other models raise an error instead of
    dropping.
    """
    if backend is None:
        return None
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE" or model.get("unk_token") is not None or model.get("byte_fallback"):
        return None
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    alphabet = {token.removeprefix(prefix).removesuffix(suffix) for token in backend.get_vocab()}
    is_byte_level = '"ByteLevel"' in json.dumps(definition["pre_tokenizer"])
    if is_byte_level and alphabet >= set(ByteLevel.alphabet()):
        return None
    # Added tokens are matched in a text before byte pairs, so their characters are not dropped.
    for added in definition["added_tokens"]:
        alphabet |= set(added["content"])
    return partial(_find_dropped_character, backend, alphabet)


def _find_dropped_character(backend: Any, alphabet: set[str], text: str) -> str:
    if backend.normalizer:
        text = backend.normalizer.normalize_str(text)
    pieces = [text]
    if backend.pre_tokenizer:
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    dropped = set().union(*pieces) - alphabet
    return min(dropped) if dropped else ""


class _CheckedTexts:
    """Texts for learning a tokenizer, checked for lone surrogates while they are read.

    After reading, `self.has_long_words` is true if a text has a word of more than LONGEST_WORD
    characters.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.has_long_words = False

    def __iter__(self) -> Iterator[str]:
        for row, text in enumerate(self._texts):
            surrogate = None if text.isascii() else _find_surrogate(text)
            if surrogate is not None:
                raise UnknownWord(surrogate, row, f"Row {row}", _NO_UNICODE, _WRITE_AGAIN)
            self.has_long_words = self.has_long_words or _has_long_word(text)
            yield text


def _has_long_word(text: str) -> bool:
    """Return whether the text has a word of more than LONGEST_WORD characters."""
    # A quick test is sufficient for most texts. A word consists of blanks only, or of other
    # characters after at most one blank.
    if max(map(len, text.split()), default=0) <= LONGEST_WORD and not _LONG_GAP.search(text):
        return False
    whole = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return len(whole) != len(_CUT.pre_tokenize_str(text))


def _check_ids(ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    rows = [np.asarray(row, dtype=np.int64) for row in ids]
    for number, row in enumerate(rows):
        if row.size and (row.min() < 0 or row.max() >= num_tokens):
            raise ArgumentError(
                f"decode: ids must lie in 0..{num_tokens - 1}; row {number} holds "
                f"{row.min()}..{row.max()}. Masks and inner nodes of a tree are not tokens: decode "
                "only finished samples."
            )
    return [row.tolist() for row in rows]
