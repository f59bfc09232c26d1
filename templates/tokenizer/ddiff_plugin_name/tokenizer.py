"""Tokenizer of the bytes of a text in UTF-8."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import fsspec

from ddiff import ArgumentError, ComponentConfig, DataError

BYTES = 256


class ByteTokenizer:
    """Tokenizer with one token per byte, and one token for the end of a document.

    Decoding restores every text. Bytes that are not UTF-8, which a model may draw, are decoded as
    the character U+FFFD.
    """

    num_tokens = BYTES + 1
    eos_id: int | None = BYTES
    special_ids: tuple[int, ...] = (BYTES,)
    fill_id: int | None = None
    fingerprint = (
        "b17e50"  # digits that identify the tokenizer; another one for every change of ids
    )
    unit: Literal["token", "symbol"] = "token"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self._decode(row) for row in ids]

    def _decode(self, row: Sequence[int]) -> str:
        tokens = [int(number) for number in row]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.num_tokens:
            raise ArgumentError(
                f"plugin_name: ids must lie in 0..{self.num_tokens - 1}; got {min(tokens)} to "
                f"{max(tokens)}. Decode only ids of this tokenizer."
            )
        parts = [b"<|eos|>" if number == BYTES else bytes([number]) for number in tokens]
        return b"".join(parts).decode("utf-8", errors="replace")

    def tokens(self) -> list[str]:
        return [*(f"<{number:02x}>" for number in range(BYTES)), "<|eos|>"]

    def save(self, path: str) -> None:
        with fsspec.open(path, "w") as file:
            json.dump({"kind": "plugin_name"}, file)


class PluginName:
    """Tokenizer with one token per byte of a text, for any text."""

    class Config(ComponentConfig):
        """Empty: this tokenizer has no keys."""

    @staticmethod
    def build(config: Config) -> ByteTokenizer:  # may also take documents and cache
        return ByteTokenizer()

    @staticmethod
    def load(config: Config, *, path: str) -> ByteTokenizer:
        """Load the file that `save` has written. A run is loaded with this function."""
        with fsspec.open(path, "r") as file:
            saved = json.load(file)
        if saved != {"kind": "plugin_name"}:
            raise DataError(
                f"plugin_name: {path} must be a file that this tokenizer has saved; got {saved!r}. "
                "Restore the file, or train the run again."
            )
        return ByteTokenizer()

    @staticmethod
    def preview(config: Config) -> int:
        """Return the number of tokens, so that a dry run needs no data."""
        return ByteTokenizer.num_tokens
