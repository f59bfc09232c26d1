"""Samples of a text run as token ids and as texts without special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ddiff.runs.run import Run


@dataclass(frozen=True)
class TokenSamples:
    """Samples as token ids, and as documents that end marks separate.

    Attributes:
        ids: token ids of each sample.
        documents: texts of the documents of each sample, without special tokens.
    """

    ids: list[list[int]]
    documents: list[list[str]]

    @classmethod
    def split(cls, ids: Sequence[Sequence[int]], run: Run) -> TokenSamples:
        """Split samples at the end marks of the tokenizer of a run.

        Other special tokens are removed from the texts. A sample that ends with an end mark has an
        empty last document, so that n end marks always separate n + 1 documents.
        """
        special = set(run.tokenizer.special_ids)
        documents: list[list[str]] = []
        for row in ids:
            parts: list[list[int]] = [[]]
            for token in row:
                if token == run.tokenizer.eos_id:
                    parts.append([])
                elif token not in special:
                    parts[-1].append(token)
            documents.append(run.tokenizer.decode(parts))
        return cls([list(row) for row in ids], documents)

    def texts(self) -> list[str]:
        return ["\n".join(parts) for parts in self.documents]
