"""From text to token ids and back.

A tokenizer adds nothing of its own: packing puts the end-of-document id where a document ends. Each is saved as one JSON
file that names its kind, and restored by `load_tokenizer`.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from ddiff.data.pretrained import code_refused, load_pretrained
from ddiff.errors import ArgumentError, DataError
from ddiff.progress import under_way

EOS = "<|eos|>"
LONGEST_WORD = (
    1000  # characters; learning byte pairs takes time that grows as the square of a word's length
)
MOST_TOKENS = 2**24
_WORDS = (  # GPT-2's words, as ByteLevel cuts them, but none longer than that
    r"'s|'t|'re|'ve|'m|'ll|'d"
    rf"| ?\p{{L}}{{1,{LONGEST_WORD}}}| ?\p{{N}}{{1,{LONGEST_WORD}}}| ?[^\s\p{{L}}\p{{N}}]{{1,{LONGEST_WORD}}}"
    rf"|\s{{1,{LONGEST_WORD}}}(?!\S)|\s{{1,{LONGEST_WORD}}}"
)
_CUT = Split(Regex(_WORDS), "isolated")
_LONG_GAP = re.compile(rf"\s{{{LONGEST_WORD + 1},}}")
_log = logging.getLogger(__name__)
Unit = Literal["token", "symbol"]


class Tokenizer(Protocol):
    """V tokens with ids 0..V-1.

    `eos_id` ends a document (None: documents have no end mark), `special_ids` are the ids that no text encodes to,
    `fingerprint` tells tokenizers apart, and `unit` is what figures are per: "token", or "symbol" where documents are rows
    of one fixed length.
    """

    num_tokens: int
    eos_id: int | None
    special_ids: tuple[int, ...]
    fingerprint: str
    unit: Unit

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, no specials added; DataError for text that has no ids."""
        ...

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of ids, specials spelled out; ArgumentError for ids outside 0..V-1."""
        ...

    def tokens(self) -> list[str]:
        """The V tokens as the tokenizer spells them, by id."""
        ...

    def save(self, path: str) -> None:
        """Write one JSON file at any fsspec path."""
        ...


class Unencodable(DataError):
    """Text number `row` of the call has no ids. Subclasses say why, and `at` says it of a row of the corpus."""

    row: int

    def at(self, row: int, name: str) -> Unencodable:
        """The same finding with the row's number in the corpus and its name."""
        raise NotImplementedError


class UnknownSymbol(Unencodable):
    """A character outside the alphabet, in text number `row` of the call."""

    def __init__(self, symbol: str, row: int, name: str, symbols: Sequence[str]) -> None:
        self.symbol, self.row, self.name, self.symbols = symbol, row, name, symbols
        super().__init__(
            f"{name} holds the character {symbol!r}, which is none of the alphabet's {len(symbols)} symbols "
            f"({' '.join(symbols[:40])}). Mend the row, or add the symbol to the tokenizer's symbols."
        )

    def __reduce__(self) -> tuple[type[UnknownSymbol], tuple[str, int, str, Sequence[str]]]:
        return UnknownSymbol, (self.symbol, self.row, self.name, self.symbols)

    def at(self, row: int, name: str) -> UnknownSymbol:
        return UnknownSymbol(self.symbol, row, name, self.symbols)


class UnknownWord(Unencodable):
    """A piece of text number `row` of the call that a tokenizer has no ids for; `reason` says why, `remedy` what to do."""

    def __init__(self, word: str, row: int, name: str, reason: str, remedy: str) -> None:
        self.word, self.row, self.name, self.reason, self.remedy = word, row, name, reason, remedy
        shown = word if len(word) <= 60 else f"{word[:60]}..."
        super().__init__(f"{name} holds {shown!r}, which cannot be tokenised: {reason}. {remedy}")

    def __reduce__(self) -> tuple[type[UnknownWord], tuple[str, int, str, str, str]]:
        return UnknownWord, (self.word, self.row, self.name, self.reason, self.remedy)

    def at(self, row: int, name: str) -> UnknownWord:
        return UnknownWord(self.word, row, name, self.reason, self.remedy)


@final
class BytePairTokenizer:
    """Byte-level byte-pair encoding trained on a corpus: lossless on any text, one special token `<|eos|>` with id 0."""

    unit: Unit = "token"

    def __init__(self, definition: str) -> None:
        """`definition` is the JSON of the `tokenizers` library, as `train` or a saved file gives it."""
        self._definition = definition
        self._tokenizer = TokenizersTokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = (
            True  # "<|eos|>" in a text is text: only packing ends documents
        )
        vocabulary = self._tokenizer.get_vocab()
        self.num_tokens = len(vocabulary)
        if vocabulary.get(EOS) != 0 or sorted(vocabulary.values()) != list(range(self.num_tokens)):
            raise DataError(
                f"BytePairTokenizer: the definition must number its tokens 0, 1, 2, ... without holes, {EOS} first; it has "
                f"{self.num_tokens} tokens, and {EOS} is {vocabulary.get(EOS)}. Take it as ddiff saved it; one of another "
                'origin is read from its folder by [tokenizer] kind = "pretrained".'
            )
        self.eos_id: int | None = 0
        self.special_ids: tuple[int, ...] = (0,)
        self.fingerprint = fingerprint(["bytepair", json.loads(definition)])[:16]

    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[str]]:
        return BytePairTokenizer, (
            self._definition,
        )  # the library's own pickle forgets encode_special_tokens

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BytePairTokenizer:
        """Learn at most `size` tokens (at least 257: the bytes and `<|eos|>`); the same texts give the same tokens.

        Words of more than LONGEST_WORD characters are learned in pieces of that length. Where texts hold such words, the
        tokenizer cuts them likewise when it encodes; else its definition is that of plain byte-level pairs.
        """
        if size < 257:
            raise ArgumentError(
                f"BytePairTokenizer.train: size must be at least 257 (256 bytes and {EOS}); got {size}."
            )
        tokenizer = TokenizersTokenizer(BPE())
        tokenizer.pre_tokenizer = PreTokenizers(
            [_CUT, ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[EOS],
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        )
        checked = _CheckedTexts(texts)
        with under_way(f"learning byte pairs (at most {size})"):
            tokenizer.train_from_iterator(checked, trainer)
        if not checked.has_long_words:
            # The same words: texts without long ones keep the definition, and so the fingerprint, that they always had.
            tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        return cls(tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return _encode_explained(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        checked = _checked_ids(ids, self.num_tokens)
        return self._tokenizer.decode_batch(checked, skip_special_tokens=False)

    def tokens(self) -> list[str]:
        ids = self._tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    def __repr__(self) -> str:
        return _described(self)

    def save(self, path: str) -> None:
        write_json(path, {"kind": "bytepair", "definition": json.loads(self._definition)})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> BytePairTokenizer:
        return cls(json.dumps(saved["definition"]))


@final
class AlphabetTokenizer:
    """One id per character and no special token: DNA, amino acids, generated sources. Figures are per symbol."""

    unit: Unit = "symbol"
    eos_id: int | None = None
    special_ids: tuple[int, ...] = ()

    def __init__(self, symbols: Sequence[str]) -> None:
        """`symbols` are distinct single characters in id order, as a string or list."""
        self._symbols = list(symbols)
        if not self._symbols or any(len(symbol) != 1 for symbol in self._symbols):
            raise ArgumentError(
                f"AlphabetTokenizer: symbols must be one or more single characters; got {self._symbols}. "
                'Write them as one string, for instance "ACGT".'
            )
        if len(set(self._symbols)) != len(self._symbols):
            twice = sorted({symbol for symbol in self._symbols if self._symbols.count(symbol) > 1})
            raise ArgumentError(
                f"AlphabetTokenizer: symbols must be distinct; {twice} come more than once."
            )
        self.num_tokens = len(self._symbols)
        self.fingerprint = fingerprint(["alphabet", self._symbols])[:16]
        codes = np.array([ord(symbol) for symbol in self._symbols])
        self._ids = np.full(codes.max() + 1, -1, dtype=np.int64)
        self._ids[codes] = np.arange(self.num_tokens)

    @classmethod
    def of(cls, texts: Iterable[str]) -> AlphabetTokenizer:
        """The alphabet of the characters that occur, in code-point order."""
        return cls(sorted(set().union(*texts)))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text, row) for row, text in enumerate(texts)]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [
            "".join(self._symbols[number] for number in row)
            for row in _checked_ids(ids, self.num_tokens)
        ]

    def tokens(self) -> list[str]:
        return list(self._symbols)

    def __repr__(self) -> str:
        return _described(self)

    def save(self, path: str) -> None:
        write_json(path, {"kind": "alphabet", "symbols": self._symbols})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> AlphabetTokenizer:
        return cls(saved["symbols"])

    def _encode(self, text: str, row: int) -> list[int]:
        # a lone surrogate is a character as any other here: it is none of the alphabet's
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(
            np.int64
        )
        ids = np.where(codes < len(self._ids), self._ids[np.minimum(codes, len(self._ids) - 1)], -1)
        if (ids < 0).any():
            raise UnknownSymbol(text[int(np.argmax(ids < 0))], row, f"Row {row}", self._symbols)
        return ids.tolist()


@final
class PretrainedTokenizer:
    """Tokenizer of the `transformers` library; its files travel inside the saved JSON, so a run needs no hub later."""

    unit: Unit = "token"

    def __init__(self, tokenizer: Any, name: str = "the tokenizer") -> None:
        """`tokenizer` is what `transformers.AutoTokenizer.from_pretrained` gives; `name` is for messages.

        V is one more than the highest id, added tokens counted: ids may have holes, which no text encodes to.
        """
        self._tokenizer = tokenizer
        self._spellings: dict[int, str] = {
            number: token for token, number in tokenizer.get_vocab().items()
        }
        if not self._spellings:
            raise DataError(
                f"{name} has no tokens: its vocabulary is empty. Name the folder of a trained tokenizer."
            )
        self.num_tokens = max(self._spellings) + 1
        if self.num_tokens > MOST_TOKENS:
            raise DataError(
                f"{name} has {len(self._spellings)} tokens with ids up to {self.num_tokens - 1}, and every id takes a row "
                f"of the network: at most {MOST_TOKENS} are possible. Number its tokens 0, 1, 2, ..."
            )
        self.eos_id: int | None = tokenizer.eos_token_id
        holes = set(range(self.num_tokens)) - set(self._spellings)
        self.special_ids: tuple[int, ...] = tuple(sorted(holes | set(tokenizer.all_special_ids)))
        self.fingerprint = fingerprint(["pretrained", self._definition()])[:16]
        self._drops = _dropped_characters(getattr(tokenizer, "backend_tokenizer", None))

    def __reduce__(self) -> tuple[type[PretrainedTokenizer], tuple[Any]]:
        return PretrainedTokenizer, (
            self._tokenizer,
        )  # what is derived from it is derived again in another process

    @classmethod
    def from_pretrained(cls, source: str, name: str | None = None) -> PretrainedTokenizer:
        """From a local directory or the name of a model on the hub; DataError, with the cause, when neither gives a
        tokenizer, or one that is defined by Python code of its own. `name` takes the place of the source in messages."""
        from transformers import (
            AutoTokenizer,
        )  # seconds to import, and only this tokenizer needs it

        shown = name or source
        if source.strip():
            _check_not_ours(Path(source), shown)
        tokenizer = load_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer", name=name)
        if getattr(tokenizer, "init_kwargs", {}).get("auto_map"):
            # The library has put a class of its own in the place of the author's, whose ids may be others.
            raise code_refused(shown, "tokenizer")
        return cls(tokenizer, f"The tokenizer of {shown!r}")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not len(texts):
            return []
        if self._drops is not None:
            for row, text in enumerate(texts):
                if dropped := self._drops(text):
                    raise UnknownWord(dropped, row, f"Row {row}", _NO_TOKEN, _OTHER_TOKENIZER)
        return _encode_explained(self._encode, texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each list of ids; those that no token has (holes) have no text."""
        checked = _checked_ids(ids, self.num_tokens)
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
        return _described(self)

    def save(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self._tokenizer.save_pretrained(directory)
            files = {
                file.name: base64.b64encode(file.read_bytes()).decode()
                for file in sorted(Path(directory).iterdir())
            }
        write_json(path, {"kind": "pretrained", "files": files})

    @classmethod
    def restore(cls, saved: dict[str, Any], name: str) -> PretrainedTokenizer:
        with tempfile.TemporaryDirectory() as directory:
            for file, content in saved["files"].items():
                (Path(directory) / Path(file).name).write_bytes(
                    base64.b64decode(content, validate=True)
                )
            return cls.from_pretrained(directory, name)

    def _definition(self) -> Any:
        """What decides the ids: the fast tokenizer's own JSON, less padding and cutting; else class and tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [type(self._tokenizer).__name__, self._tokenizer.get_vocab()]
        definition = json.loads(backend.to_str())
        return {
            key: value for key, value in definition.items() if key not in ("padding", "truncation")
        }


_KINDS: dict[str, Any] = {
    "bytepair": BytePairTokenizer,
    "alphabet": AlphabetTokenizer,
    "pretrained": PretrainedTokenizer,
}


def load_tokenizer(path: str) -> Tokenizer:
    """Read what `save` wrote at any fsspec path; DataError when the file is missing, damaged or of no known kind."""
    saved = read_json(path, "load_tokenizer")
    if _is_huggingface(saved):
        raise DataError(
            f"load_tokenizer: {path} is a tokenizer.json of the tokenizers library (HuggingFace), not one that ddiff "
            f'saved. Read it with [tokenizer] kind = "pretrained", path = "{Path(path).parent}": the folder that it is in.'
        )
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DataError(
            f"load_tokenizer: {path} is not a saved tokenizer: kind {kind!r} is none of {sorted(_KINDS)}."
        )
    try:
        return _KINDS[kind].restore(saved, path)
    except Exception as error:  # the tokenizers library raises plain Exception for a definition that it cannot read
        if isinstance(error, DataError) and kind == "pretrained":
            raise  # it names the file, and what is wrong with what
        raise DataError(
            f"load_tokenizer: the {kind} tokenizer in {path} is damaged ({error}). Make it again."
        ) from error


def _described(tokenizer: Tokenizer) -> str:
    """`BytePairTokenizer(512 tokens; 3f2a...)`, the fingerprint last."""
    return f"{type(tokenizer).__name__}({tokenizer.num_tokens} {tokenizer.unit}s; {tokenizer.fingerprint})"


def check_round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Warn of a tokenizer that does not give the texts back as they were: figures per byte are of the texts before."""
    short = [text[:200] for text in texts[:16]]
    for before, after in zip(short, tokenizer.decode(tokenizer.encode(short))):
        if before != after:
            _log.warning(
                "The tokenizer does not give every text back: %r comes back as %r. What it drops is not modelled, and "
                "bits per byte count the bytes of the text as it was.",
                *_around_difference(before, after),
            )
            return


def _around_difference(before: str, after: str) -> tuple[str, str]:
    """Both texts from a few characters before the first that differs."""
    same = 0
    while same < min(len(before), len(after)) and before[same] == after[same]:
        same += 1
    shown = slice(max(0, same - 10), same + 30)
    return before[shown], after[shown]


def _is_huggingface(saved: Any) -> bool:
    """Whether JSON is the definition of a tokenizer of the tokenizers library."""
    return isinstance(saved, dict) and "kind" not in saved and isinstance(saved.get("model"), dict)


def _check_not_ours(source: Path, shown: str) -> None:
    """Raise DataError for what ddiff saved, and for a single file: each is read in another way."""
    file = source / "tokenizer.json" if source.is_dir() else source
    if not file.is_file():
        return
    try:
        saved = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        saved = None  # whoever reads it explains it
    if isinstance(saved, dict) and saved.get("kind") in list(_KINDS):
        raise DataError(
            f'No tokenizer from {shown!r}: {file} is one that ddiff saved. Read it with [tokenizer] kind = "saved", path = '
            f'"{file}".'
        )
    if file == source and _is_huggingface(saved):
        raise DataError(
            f"No tokenizer from {shown!r}: it is a tokenizer.json of the tokenizers library (HuggingFace), and the folder "
            f'that it is in is due, where tokenizer_config.json says which token ends a text. Set path = "{source.parent}".'
        )


# ------------------------------------------------------------------------------------------------ texts without ids

_NO_TOKEN = "the tokenizer has no token for it, and no token for what is unknown"
_OTHER_TOKENIZER = (
    "Take a tokenizer that has an unknown token or knows all bytes, add the word to this one, or "
    "leave the text out."
)
_NO_UNICODE = "it has a lone surrogate, half of a character, which UTF-8 does not have"
_WRITE_AGAIN = "Write the text again as UTF-8."


def _encode_explained(
    encode: Callable[[Sequence[str]], list[list[int]]], texts: Sequence[str]
) -> list[list[int]]:
    """`encode(texts)`; UnknownWord, with the first text and word that have no ids, where it fails."""
    try:
        return encode(texts)
    except Exception as error:  # the tokenizers library raises plain Exception
        for row, text in enumerate(texts):
            if not _fails(encode, text):
                continue
            if (word := _surrogate(text)) is not None:
                raise UnknownWord(word, row, f"Row {row}", _NO_UNICODE, _WRITE_AGAIN) from error
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


def _surrogate(text: str) -> str | None:
    """The first character that UTF-8 does not have."""
    return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def _dropped_characters(backend: Any) -> Callable[[str], str] | None:
    """A function from a text to a character of it that byte pairs would drop without a word, or "".

    Byte pairs without an unknown token leave out characters that they have no token for. None where nothing is dropped:
    for other models, which refuse them, and where all bytes have tokens.
    """
    if backend is None:
        return None
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] != "BPE" or model.get("unk_token") is not None or model.get("byte_fallback"):
        return None
    prefix, suffix = (
        model.get("continuing_subword_prefix") or "",
        model.get("end_of_word_suffix") or "",
    )
    alphabet = {token.removeprefix(prefix).removesuffix(suffix) for token in backend.get_vocab()}
    if '"ByteLevel"' in json.dumps(definition["pre_tokenizer"]) and alphabet >= set(
        ByteLevel.alphabet()
    ):
        return None
    for added in definition["added_tokens"]:
        alphabet |= set(added["content"])  # found in a text before byte pairs are

    def dropped(text: str) -> str:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        pieces = (
            backend.pre_tokenizer.pre_tokenize_str(text)
            if backend.pre_tokenizer
            else [(text, None)]
        )
        characters = set().union(*(piece for piece, _ in pieces))
        return next(iter(sorted(characters - alphabet)), "")

    return dropped


class _CheckedTexts:
    """Texts on their way to a trainer: `has_long_words` tells afterwards whether one holds a word that was cut."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.has_long_words = False

    def __iter__(self) -> Iterator[str]:
        for row, text in enumerate(self._texts):
            if (word := None if text.isascii() else _surrogate(text)) is not None:
                raise UnknownWord(word, row, f"Row {row}", _NO_UNICODE, _WRITE_AGAIN)
            self.has_long_words = self.has_long_words or _has_long_word(text)
            yield text


def _has_long_word(text: str) -> bool:
    """Whether a word of the text is so long that it is cut."""
    # A word is a stretch of blanks, or of other characters behind at most one blank; most texts are done with this.
    if max(map(len, text.split()), default=0) <= LONGEST_WORD and not _LONG_GAP.search(text):
        return False
    whole = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return len(whole) != len(_CUT.pre_tokenize_str(text))


def _checked_ids(ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    rows = [np.asarray(row, dtype=np.int64) for row in ids]
    for number, row in enumerate(rows):
        if row.size and (row.min() < 0 or row.max() >= num_tokens):
            raise ArgumentError(
                f"decode: ids must lie in 0..{num_tokens - 1}; row {number} holds {row.min()}..{row.max()}. "
                "Masks and other nodes are no tokens: decode only finished rows."
            )
    return [row.tolist() for row in rows]
