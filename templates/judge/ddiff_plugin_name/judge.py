"""Judge of texts: pairs of neighbouring characters that occur in the training texts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from ddiff import (
    TEXT_FIELD,
    ArgumentError,
    ComponentConfig,
    Documents,
    DrawnFields,
    Finding,
    share_right,
    variation_of_values,
)


class PluginName:
    """Measures how well samples agree with the pairs of characters in the data.

    There are two findings: the share of samples without a new pair of neighbouring characters, and
    the total variation between the distributions of pairs in the samples and in the held-out texts.
    """

    class Config(ComponentConfig):
        """Empty: this judge has no keys."""

    @classmethod
    def build(cls, config: Config, *, documents: object) -> PluginName:
        if not isinstance(documents, Documents):
            raise ArgumentError(
                "The judge plugin_name needs texts that fit in memory; got other data. Choose "
                "another data set, or remove the table [judge]."
            )
        return cls(documents.train["text"], documents.validation["text"])

    def __init__(self, train: Iterable[str], held_out: Iterable[str]) -> None:
        """Take the training and the held-out texts."""
        self._known = set(self.pairs(train))
        self._reference = self.pairs(held_out)

    @staticmethod
    def pairs(texts: Iterable[str]) -> list[int]:
        """Return the number of every pair of neighbouring characters."""
        # code points are below 2^21, so that different pairs have different numbers
        return [(ord(a) << 21) + ord(b) for text in texts for a, b in pairwise(text)]

    def judge(self, drawn: DrawnFields) -> list[Finding]:
        """Return the findings on the samples of one target; empty if it has no drawn texts."""
        if TEXT_FIELD not in drawn.drawn:
            return []
        texts = [str(text) for text in drawn.fields[TEXT_FIELD].values]
        is_known = [self._known.issuperset(self.pairs([text])) for text in texts]
        findings = [share_right("samples with known pairs only", is_known)]
        found = self.pairs(texts)
        if found and self._reference:
            name = "total variation of pairs from held-out texts"
            findings.append(variation_of_values(name, found, self._reference))
        return findings
