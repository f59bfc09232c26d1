"""Judge of drawn strings, such as names: rows of symbols that a fill symbol fills up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddiff import (
    TEXT_FIELD,
    ArgumentError,
    ComponentConfig,
    DrawnFields,
    Finding,
    share_right,
    variation_of_values,
)

if TYPE_CHECKING:
    from ddiff import Documents, FieldsDocuments

SEED = 0  # of the choice of held-out strings


class StringsJudge:
    """Compares drawn strings with the training strings and the held-out strings.

    A string is well-formed if it is not empty and if only fill symbols follow its first fill
    symbol. Only well-formed strings are searched in the data. The length of any string is the
    number of symbols before the fill symbols at its end.

    The distribution of lengths is compared with that of held-out strings, by total variation. As
    many other held-out strings as samples (at most half of them) give the value that a perfect
    model would have.
    """

    class Config(ComponentConfig):
        """Empty: this judge has no keys."""

    @classmethod
    def build(cls, config: Config, *, documents: Documents | FieldsDocuments) -> StringsJudge:
        from ddiff import Documents

        if not isinstance(documents, Documents) or documents.fill is None:
            raise ArgumentError(
                'The judge "strings" needs rows of symbols that a fill symbol fills up, such as '
                '[data] kind = "names", or kind = "symbols" with the key fill; got data without a '
                "fill symbol. Choose another data set, or remove the table [judge]."
            )
        train, held_out = documents.train["text"][:], documents.validation["text"][:]
        return cls(train, held_out, documents.fill)

    def __init__(self, train: Sequence[str], held_out: Sequence[str], fill: str) -> None:
        """Take filled rows of the training and the validation part, and their fill symbol."""
        self._fill = fill
        self._train = {self._strip(text) for text in train}
        rows = [self._strip(text) for text in held_out]
        self._held_out = set(rows)
        lengths = np.array([len(row) for row in rows])
        self._lengths = np.random.default_rng(SEED).permutation(lengths)

    def judge(self, drawn: DrawnFields) -> list[Finding]:
        if TEXT_FIELD not in drawn.drawn:
            return []
        texts = [self._strip(str(text)) for text in drawn.fields[TEXT_FIELD].values]
        is_well_formed = [text != "" and self._fill not in text for text in texts]
        findings = [share_right("well-formed strings", is_well_formed)]
        kept = [text for text, good in zip(texts, is_well_formed, strict=True) if good]
        if kept:
            is_new = [text not in self._train for text in kept]
            is_held_out = [text in self._held_out for text in kept]
            findings.append(share_right("well-formed strings not in the training data", is_new))
            findings.append(share_right("well-formed strings in the held-out data", is_held_out))
        return findings + self._judge_lengths([len(text) for text in texts])

    def _judge_lengths(self, lengths: Sequence[int]) -> list[Finding]:
        """Return the distances of the lengths of samples, and of as many held-out strings.

        Both are compared with the same other held-out strings.
        """
        size = min(len(lengths), len(self._lengths) // 2)
        if size == 0:
            return []
        baseline, reference = self._lengths[:size], self._lengths[size:]
        name = "total variation of lengths from held-out strings"
        return [
            variation_of_values(name, lengths, reference),
            variation_of_values(f"{name}: other held-out strings", baseline, reference),
        ]

    def _strip(self, text: str) -> str:
        return text.rstrip(self._fill)
