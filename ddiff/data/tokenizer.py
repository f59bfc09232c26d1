"""Tokenizers: from text to token ids and back.

A tokenizer adds no special tokens: packing appends the end-of-document id. Each is saved as one
JSON file that names its kind, and restored by `load_tokenizer`.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import tempfile
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
# In characters. The time to learn byte pairs grows as the square of a word's length.
LONGEST_WORD = 1000
MOST_TOKENS = 2**24
# The pattern by which GPT-2 (and ByteLevel) splits text into words, with a limit on their length.
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

    num_tokens: V.
    eos_id: id of the end mark of a document; None if documents have no end mark.
    special_ids: ids that no text encodes to.
    fingerprint: hexadecimal digits that identify the tokenizer.
    unit: unit of metrics, "token", or "symbol" if documents are rows of one fixed length.
    """

    num_tokens: int
    eos_id: int | None
    special_ids: tuple[int, ...]
    fingerprint: str
    unit: Unit

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens; DataError for text without ids."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, special tokens spelled out.

        Raises ArgumentError for ids outside 0..V-1.
        """
        ...

    def tokens(self) -> list[str]:
        """Return the spellings of the V tokens, by id."""
        ...

    def save(self, path: str) -> None:
        """Write one JSON file at any fsspec path."""
        ...


class Unencodable(DataError):
    """Text that a tokenizer cannot encode: number `row` of the call.

    Subclasses give the reason."""

    row: int

    def at(self, row: int, name: str) -> Unencodable:
        """Return the same error for another row number and name, those in the corpus."""
        raise NotImplementedError


class UnknownSymbol(Unencodable):
    """Character outside the alphabet, in text number `row` of the call."""

    def __init__(self, symbol: str, row: int, name: str, symbols: Sequence[str]) -> None:
        self.symbol = symbol
        self.row = row
        self.name = name
        self.symbols = symbols
        super().__init__(
            f"{name} holds the character {symbol!r}, which is none of the alphabet's "
            f"{len(symbols)} symbols ({' '.join(symbols[:40])}). Fix the row, or add the symbol to "
            "the tokenizer's symbols."
        )

    # An exception is pickled with its message as the only argument, which does not fit __init__.
    def __reduce__(self) -> tuple[type[UnknownSymbol], tuple[str, int, str, Sequence[str]]]:
        return UnknownSymbol, (self.symbol, self.row, self.name, self.symbols)

    def at(self, row: int, name: str) -> UnknownSymbol:
        return UnknownSymbol(self.symbol, row, name, self.symbols)


class UnknownWord(Unencodable):
    """Piece of text number `row` of the call without ids; `reason` and `remedy` explain it."""

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

    It is lossless on any text and has one special token, `<|eos|>` with id 0.
    """

    unit: Unit = "token"

    def __init__(self, definition: str) -> None:
        """Build from `definition`, the JSON of the `tokenizers` library that `train` makes."""
        self._definition = definition
        self._tokenizer = TokenizersTokenizer.from_str(definition)
        # "<|eos|>" in a text is encoded as text: only packing ends documents.
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.num_tokens = len(vocabulary)
        if vocabulary.get(EOS) != 0 or sorted(vocabulary.values()) != list(range(self.num_tokens)):
            raise DataError(
                "BytePairTokenizer: the definition must number its tokens 0, 1, 2, ... without "
                f"holes, {EOS} first; it has {self.num_tokens} tokens, and {EOS} is "
                f"{vocabulary.get(EOS)}. Take it as ddiff saved it; one of another origin is read "
                'from its folder by [tokenizer] kind = "pretrained".'
            )
        self.eos_id: int | None = 0
        self.special_ids: tuple[int, ...] = (0,)
        self.fingerprint = fingerprint(["bytepair", json.loads(definition)])[:16]

    # Without it, the pickle of the library would lose encode_special_tokens.
    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[str]]:
        return BytePairTokenizer, (self._definition,)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BytePairTokenizer:
        """Learn at most `size` >= 257 tokens (the bytes and `<|eos|>`), deterministically.

        Words of more than LONGEST_WORD characters are learned in pieces of that length. If the
        texts hold such words, the tokenizer also cuts them when it encodes; otherwise its
        definition is that of plain byte-level pairs.
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
            # Equal on these texts; the plain definition keeps the fingerprint of older versions.
            tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        return cls(tokenizer.to_str())

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

    It is for DNA, amino acids and generated sources. Metrics are per symbol.
    """

    unit: Unit = "symbol"
    eos_id: int | None = None
    special_ids: tuple[int, ...] = ()

    def __init__(self, symbols: Sequence[str]) -> None:
        """Take distinct single characters in id order, as a string or list."""
        self._symbols = list(symbols)
        if not self._symbols or any(len(symbol) != 1 for symbol in self._symbols):
            raise ArgumentError(
                "AlphabetTokenizer: symbols must be one or more single characters; got "
                f'{self._symbols}. Write them as one string, for instance "ACGT".'
            )
        if len(set(self._symbols)) != len(self._symbols):
            twice = sorted({symbol for symbol in self._symbols if self._symbols.count(symbol) > 1})
            raise ArgumentError(
                f"AlphabetTokenizer: symbols must be distinct; {twice} come more than once."
            )
        self.num_tokens = len(self._symbols)
        self.fingerprint = fingerprint(["alphabet", self._symbols])[:16]
        codes = np.array([ord(symbol) for symbol in self._symbols])
        self._ids = np.full(codes.max() + 1, -1, dtype=np.int64)  # by code point; -1: no symbol
        self._ids[codes] = np.arange(self.num_tokens)

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> AlphabetTokenizer:
        """Build the alphabet of all characters in the texts, in code-point order."""
        return cls(sorted(set().union(*texts)))

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
        write_json(path, {"kind": "alphabet", "symbols": self._symbols})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> AlphabetTokenizer:
        return cls(saved["symbols"])

    def _encode(self, text: str, row: int) -> list[int]:
        # "surrogatepass": a lone surrogate is refused below, as any other unknown character.
        content = text.encode("utf-32-le", "surrogatepass")
        codes = np.frombuffer(content, dtype=np.uint32).astype(np.int64)
        # Code points beyond the table read its last entry, which `where` then replaces.
        last = len(self._ids) - 1
        found = self._ids[np.minimum(codes, last)]
        ids = np.where(codes <= last, found, -1)
        if (ids < 0).any():
            raise UnknownSymbol(text[int(np.argmax(ids < 0))], row, f"Row {row}", self._symbols)
        return ids.tolist()


@final
class PretrainedTokenizer:
    """Tokenizer of the `transformers` library.

    Its files are stored in the saved JSON, so that resuming a run needs no hub.
    """

    unit: Unit = "token"

    def __init__(self, tokenizer: Any, name: str = "the tokenizer") -> None:
        """Wrap a tokenizer of `transformers.AutoTokenizer.from_pretrained`.

        V is one more than the highest id, including added tokens. Some ids below V may be unused.
        `name` is for messages.
        """
        self._tokenizer = tokenizer
        self._backend = _fast_backend(tokenizer)
        self._spellings: dict[int, str] = {}
        for token, number in tokenizer.get_vocab().items():
            self._spellings[number] = token
        if not self._spellings:
            raise DataError(
                f"{name} has no tokens: its vocabulary is empty. Name the folder of a trained "
                "tokenizer."
            )
        self.num_tokens = max(self._spellings) + 1
        if self.num_tokens > MOST_TOKENS:
            raise DataError(
                f"{name} has {len(self._spellings)} tokens with ids up to {self.num_tokens - 1}, "
                f"and every id takes a row of the network: at most {MOST_TOKENS} are possible. "
                "Number its tokens 0, 1, 2, ..."
            )
        self.eos_id: int | None = tokenizer.eos_token_id
        unused = set(range(self.num_tokens)) - set(self._spellings)
        special = unused | set(tokenizer.all_special_ids)
        self.special_ids: tuple[int, ...] = tuple(sorted(special))
        self.fingerprint = fingerprint(["pretrained", self._definition()])[:16]
        self._find_dropped = _dropped_character_finder(self._backend)

    # Only the library's tokenizer is pickled: the function of `_find_dropped` cannot be.
    def __reduce__(self) -> tuple[type[PretrainedTokenizer], tuple[Any]]:
        return PretrainedTokenizer, (self._tokenizer,)

    @classmethod
    def from_pretrained(cls, source: str, name: str | None = None) -> PretrainedTokenizer:
        """Load from a local directory or by the name of a model on the hub.

        Raises DataError with the cause for a missing tokenizer, or one that is defined by Python
        code of its repository. `name` replaces the source in messages.
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
        return cls(tokenizer, f"The tokenizer of {shown!r}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not len(texts):
            return []
        if self._find_dropped is not None:
            for row, text in enumerate(texts):
                dropped = self._find_dropped(text)
                if dropped:
                    raise UnknownWord(dropped, row, f"Row {row}", _NO_TOKEN, _OTHER_TOKENIZER)
        return _encode_or_explain(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids; unused ids have no text."""
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

    def save(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self._tokenizer.save_pretrained(directory)
            files = {}
            for file in sorted(Path(directory).iterdir()):
                files[file.name] = base64.b64encode(file.read_bytes()).decode()
        write_json(path, {"kind": "pretrained", "files": files})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> PretrainedTokenizer:
        with tempfile.TemporaryDirectory() as directory:
            for file, content in saved["files"].items():
                # Only the last part of the name is used, so that it cannot leave the directory.
                place = Path(directory) / Path(file).name
                place.write_bytes(base64.b64decode(content, validate=True))
            return cls.from_pretrained(directory, name)

    def _definition(self) -> Any:
        """Return the JSON that determines the ids, or class and vocabulary of a slow tokenizer."""
        if self._backend is None:
            return [type(self._tokenizer).__name__, self._tokenizer.get_vocab()]
        definition = json.loads(self._backend.to_str())
        # Padding and truncation change with every call, and are not used here.
        definition.pop("padding", None)
        definition.pop("truncation", None)
        return definition


def _fast_backend(tokenizer: Any) -> Any:
    """Return the Rust tokenizer behind a fast tokenizer; None for one written in Python."""
    from transformers import PreTrainedTokenizerFast

    return tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None


_KINDS: dict[str, Any] = {
    "bytepair": BytePairTokenizer,
    "alphabet": AlphabetTokenizer,
    "pretrained": PretrainedTokenizer,
}


def load_tokenizer(path: str) -> Tokenizer:
    """Load a saved tokenizer; DataError if the file cannot be used."""
    saved = read_json(path, "load_tokenizer")
    if _is_huggingface(saved):
        raise DataError(
            f"load_tokenizer: {path} is a tokenizer.json of the tokenizers library (HuggingFace), "
            'not one that ddiff saved. Read it with [tokenizer] kind = "pretrained", path = '
            f'"{Path(path).parent}": the folder that it is in.'
        )
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DataError(
            f"load_tokenizer: {path} is not a saved tokenizer: kind {kind!r} is none of "
            f"{sorted(_KINDS)}."
        )
    try:
        return _KINDS[kind].restore(saved, path)
    except Exception as error:  # the tokenizers library raises plain Exception
        if isinstance(error, DataError) and kind == "pretrained":
            raise  # the message names the file and the cause already
        raise DataError(
            f"load_tokenizer: the {kind} tokenizer in {path} is damaged ({error}). Make it again."
        ) from error


def _representation(tokenizer: Tokenizer) -> str:
    """Return `BytePairTokenizer(512 tokens; 3f2a...)`, the fingerprint last."""
    size = f"{tokenizer.num_tokens} {tokenizer.unit}s"
    return f"{type(tokenizer).__name__}({size}; {tokenizer.fingerprint})"


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Warn if decoding does not restore the texts: metrics per byte count the original bytes."""
    short = [text[:200] for text in texts[:16]]
    for before, after in zip(short, tokenizer.decode(tokenizer.encode(short))):
        if before != after:
            _log.warning(
                "The tokenizer does not give every text back: %r comes back as %r. What it drops "
                "is not modelled, and bits per byte count the bytes of the text as it was.",
                *_around_difference(before, after),
            )
            return


def _around_difference(before: str, after: str) -> tuple[str, str]:
    """Return both texts from a few characters before the first difference."""
    shorter = min(len(before), len(after))
    same = 0
    while same < shorter and before[same] == after[same]:
        same += 1
    shown = slice(max(0, same - 10), same + 30)
    return before[shown], after[shown]


def _is_huggingface(saved: Any) -> bool:
    """Return whether JSON defines a tokenizer of the HuggingFace library."""
    return isinstance(saved, dict) and "kind" not in saved and isinstance(saved.get("model"), dict)


def _check_not_saved_by_ddiff(source: Path, shown: str) -> None:
    """Raise DataError for a tokenizer saved by ddiff and for a single file."""
    file = source / "tokenizer.json" if source.is_dir() else source
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        saved = None  # the error of the transformers library explains it
    if isinstance(saved, dict) and saved.get("kind") in list(_KINDS):
        raise DataError(
            f"No tokenizer from {shown!r}: {file} is one that ddiff saved. Read it with "
            f'[tokenizer] kind = "saved", path = "{file}".'
        )
    if file == source and _is_huggingface(saved):
        raise DataError(
            f"No tokenizer from {shown!r}: it is a tokenizer.json of the tokenizers library "
            "(HuggingFace), but its folder is expected, in which tokenizer_config.json says which "
            f'token ends a text. Set path = "{source.parent}".'
        )


_NO_TOKEN = "the tokenizer has no token for it, and no token for what is unknown"
_OTHER_TOKENIZER = (
    "Take a tokenizer that has an unknown token or knows all bytes, add the word to this one, or "
    "leave the text out."
)
_NO_UNICODE = "it has a lone surrogate, half of a character, which UTF-8 does not have"
_WRITE_AGAIN = "Write the text again as UTF-8."


def _encode_or_explain(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]
) -> list[list[int]]:
    """Return `encode(texts)`; UnknownWord with the first text and word without ids if it fails."""
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
    """Return the first lone surrogate, which UTF-8 cannot encode."""
    for character in text:
        if "\ud800" <= character <= "\udfff":
            return character
    return None


def _dropped_character_finder(backend: Any) -> Callable[[str], str] | None:
    """Return a function that finds a character that byte pairs silently drop.

    The function takes a text and returns "" if there is none. Byte pairs without an unknown token
    leave out characters for which they have no token. The result is None if nothing can be
    dropped: for other models, which raise an error, and if all bytes have tokens.
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
    """Texts for a trainer, checked as they are read.

    `has_long_words` is True afterwards if a word was cut.
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
    """Return whether the text has a word that training would cut."""
    # A quick test decides for most texts: a word is either blanks, or other characters after at
    # most one blank.
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
                f"{row.min()}..{row.max()}. Masks and other nodes are not tokens: decode only "
                "finished rows."
            )
    return [row.tolist() for row in rows]
