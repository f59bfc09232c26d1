"""Encoders of documents for `ddiff encode`: transformers models, and token co-occurrences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddiff import hookimpl

if TYPE_CHECKING:
    from ddiff import Registry


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("encoder", "cooccurrence", "ddiff_encoders.cooccurrence:CooccurrenceEncoder")
    registry.add("encoder", "transformers", "ddiff_encoders.pooling:PooledEncoder")
    registry.add("encoder", "sentence_transformers", "ddiff_encoders.sentence:SentenceEncoder")
