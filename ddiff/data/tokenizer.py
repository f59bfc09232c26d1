"""From text to token ids and back.

A tokenizer adds nothing of its own: packing puts the end-of-document id where a document ends. Each is saved as one JSON
file that names its kind, and restored by `load_tokenizer`.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, final

import numpy as np
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from ddiff.data.cache import fingerprint
from ddiff.data.files import read_json, write_json
from ddiff.errors import ArgumentError, DataError

EOS = "<|eos|>"
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


class UnknownSymbol(DataError):
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
        """The same finding with the row's number in the corpus and its name."""
        return UnknownSymbol(self.symbol, row, name, self.symbols)


@final
class BytePairTokenizer:
    """Byte-level byte-pair encoding trained on a corpus: lossless on any text, one special token `<|eos|>` with id 0."""

    unit: Unit = "token"

    def __init__(self, definition: str) -> None:
        """`definition` is the JSON of the `tokenizers` library, as `train` or a saved file gives it."""
        self._definition = definition
        self._tokenizer = TokenizersTokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is text: only packing ends documents
        self.num_tokens = self._tokenizer.get_vocab_size()
        self.eos_id: int | None = 0
        self.special_ids: tuple[int, ...] = (0,)
        self.fingerprint = fingerprint(["bytepair", json.loads(definition)])[:16]

    def __reduce__(self) -> tuple[type[BytePairTokenizer], tuple[str]]:
        return BytePairTokenizer, (self._definition,)  # the library's own pickle forgets encode_special_tokens

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> BytePairTokenizer:
        """Learn at most `size` tokens (at least 257: the bytes and `<|eos|>`); the same texts give the same tokens."""
        if size < 257:
            raise ArgumentError(
                f"BytePairTokenizer.train: size must be at least 257 (256 bytes and {EOS}); got {size}."
            )
        tokenizer = TokenizersTokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=[EOS],
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

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
    def restore(cls, saved: dict[str, Any]) -> BytePairTokenizer:
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
            raise ArgumentError(f"AlphabetTokenizer: symbols must be distinct; {twice} come more than once.")
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
        return ["".join(self._symbols[number] for number in row) for row in _checked_ids(ids, self.num_tokens)]

    def tokens(self) -> list[str]:
        return list(self._symbols)

    def __repr__(self) -> str:
        return _described(self)

    def save(self, path: str) -> None:
        write_json(path, {"kind": "alphabet", "symbols": self._symbols})

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> AlphabetTokenizer:
        return cls(saved["symbols"])

    def _encode(self, text: str, row: int) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
        ids = np.where(codes < len(self._ids), self._ids[np.minimum(codes, len(self._ids) - 1)], -1)
        if (ids < 0).any():
            raise UnknownSymbol(text[int(np.argmax(ids < 0))], row, f"Row {row}", self._symbols)
        return ids.tolist()


@final
class PretrainedTokenizer:
    """A tokenizer of the `transformers` library; its files travel inside the saved JSON, so a run needs no hub later."""

    unit: Unit = "token"

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is what `transformers.AutoTokenizer.from_pretrained` gives."""
        self._tokenizer = tokenizer
        self.num_tokens = len(tokenizer)  # not vocab_size, which leaves out added tokens
        self.eos_id: int | None = tokenizer.eos_token_id
        self.special_ids: tuple[int, ...] = tuple(sorted(set(tokenizer.all_special_ids)))
        self.fingerprint = fingerprint(["pretrained", self._definition()])[:16]

    @classmethod
    def from_pretrained(cls, source: str) -> PretrainedTokenizer:
        """From a local directory or the name of a model on the hub; DataError when neither gives a tokenizer."""
        from transformers import AutoTokenizer  # seconds to import, and only this tokenizer needs it

        try:
            return cls(AutoTokenizer.from_pretrained(source))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            where = (
                "That directory holds no tokenizer."
                if Path(source).is_dir()
                else (
                    "It is no local directory, and the hub did not give it: without a connection, fetch the tokenizer on a "
                    "machine that has one and name the directory."
                )
            )
            raise DataError(f"No tokenizer from {source!r}. {where} ({str(error).splitlines()[0]})") from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not len(texts):
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        checked = _checked_ids(ids, self.num_tokens)
        return self._tokenizer.batch_decode(checked, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def tokens(self) -> list[str]:
        return self._tokenizer.convert_ids_to_tokens(list(range(self.num_tokens)))

    def __repr__(self) -> str:
        return _described(self)

    def save(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self._tokenizer.save_pretrained(directory)
            files = {
                file.name: base64.b64encode(file.read_bytes()).decode() for file in sorted(Path(directory).iterdir())
            }
        write_json(path, {"kind": "pretrained", "files": files})

    @classmethod
    def restore(cls, saved: dict[str, Any]) -> PretrainedTokenizer:
        with tempfile.TemporaryDirectory() as directory:
            for name, content in saved["files"].items():
                (Path(directory) / Path(name).name).write_bytes(base64.b64decode(content))
            return cls.from_pretrained(directory)

    def _definition(self) -> Any:
        """What decides the ids: the fast tokenizer's own JSON, less padding and cutting; else class and tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [type(self._tokenizer).__name__, self._tokenizer.get_vocab()]
        definition = json.loads(backend.to_str())
        return {key: value for key, value in definition.items() if key not in ("padding", "truncation")}


_KINDS: dict[str, Any] = {
    "bytepair": BytePairTokenizer,
    "alphabet": AlphabetTokenizer,
    "pretrained": PretrainedTokenizer,
}


def load_tokenizer(path: str) -> Tokenizer:
    """What `save` wrote at any fsspec path; DataError when the file is missing, damaged or of no known kind."""
    saved = read_json(path, "load_tokenizer")
    kind = saved.get("kind") if isinstance(saved, dict) else None
    if kind not in _KINDS:
        raise DataError(f"load_tokenizer: {path} is not a saved tokenizer: kind {kind!r} is none of {sorted(_KINDS)}.")
    try:
        return _KINDS[kind].restore(saved)
    except DataError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for a definition that it cannot read
        raise DataError(
            f"load_tokenizer: the {kind} tokenizer in {path} is damaged ({error}). Make it again."
        ) from error


def _described(tokenizer: Tokenizer) -> str:
    """`BytePairTokenizer(512 tokens; 3f2a...)`, the fingerprint last."""
    return f"{type(tokenizer).__name__}({tokenizer.num_tokens} {tokenizer.unit}s; {tokenizer.fingerprint})"


def _checked_ids(ids: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    rows = [np.asarray(row, dtype=np.int64) for row in ids]
    for number, row in enumerate(rows):
        if row.size and (row.min() < 0 or row.max() >= num_tokens):
            raise ArgumentError(
                f"decode: ids must lie in 0..{num_tokens - 1}; row {number} holds {row.min()}..{row.max()}. "
                "Masks and other nodes are no tokens: decode only finished rows."
            )
    return [row.tolist() for row in rows]
