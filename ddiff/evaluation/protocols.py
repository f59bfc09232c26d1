"""Named protocols of likelihood on the test sets that papers use.

A protocol defines how the text of a data set becomes documents: the unit of a document and the
rules that undo the tokenization of the data set. All protocols are listed in `PROTOCOLS`.

The published evaluation (arXiv 2310.16834, 2406.07524) differs from ours. `PublishedProtocol`
describes it, and `PublishedTerms` computes its terms, so that a figure can be compared with that of
a paper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.data.text import Split
from ddiff.errors import ArgumentError, suggest
from ddiff.evaluation.likelihood import Scored

Rule = tuple[str, str]
"""Regular expression, and the text that replaces its matches."""

CONTRACTIONS: tuple[Rule, ...] = (
    (r" (n't|'(?:s|S|re|ve|ll|d|m))\b", r"\1"),  # do n't -> don't
)
PUNCTUATION: tuple[Rule, ...] = (
    (r" +([.,:;!?%)\]}])", r"\1"),
    (r"([(\[{$£#]) +", r"\1"),
)
PENN_QUOTES: tuple[Rule, ...] = ((r"``\s?", '"'), (r"\s?''", '"'))
PAIRED_QUOTES: tuple[Rule, ...] = (
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r"(?<!\w)' ([^'\n]*?) '(?!\w)", r"'\1'"),
)


@dataclass(frozen=True)
class Protocol:
    """Protocol of a test set.

    The documents of a protocol are scored like those of [data]: each document starts a new row, is
    followed by the end mark, and is cut into adjacent rows of [data] length tokens. All tokens and
    end marks count. Bytes are those of the documents after the rules.

    Attributes:
        name: name of the protocol.
        title: name of the data set.
        split: unit of a document in the files: "line", "paragraph" or "file".
        rules: rules that undo the tokenization of the data set, applied in order.
    """

    name: str
    title: str
    split: Split
    rules: tuple[Rule, ...] = ()

    def detokenize(self, text: str) -> str:
        """Return the text without the tokenization of the data set and without outer spaces."""
        for pattern, replacement in self.rules:
            text = re.sub(pattern, replacement, text)
        return text.strip()


_WIKITEXT: tuple[Rule, ...] = (
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000
    *CONTRACTIONS,
    *PUNCTUATION,
    *PAIRED_QUOTES,
    (r"(?m)^ ?(=+) (.*?) \1 ?$", r"\1 \2 \1"),
    (r" ([°′″])", r"\1"),
)
_ARTICLES: tuple[Rule, ...] = (
    (r"\\n", "\n"),
    *PENN_QUOTES,
    *CONTRACTIONS,
    *PUNCTUATION,
)

_LISTED = (
    Protocol(
        "ptb",
        "Penn Treebank",
        "line",
        (*PENN_QUOTES, *CONTRACTIONS, (r"\$ N\b", "$N"), *PUNCTUATION),
    ),
    Protocol("wikitext2", "WikiText-2", "file", _WIKITEXT),
    Protocol("wikitext103", "WikiText-103", "file", _WIKITEXT),
    Protocol(
        "lm1b",
        "One Billion Words",
        "line",
        (
            (r"\bhttp : / / ", "http://"),
            (r"\bhttps : / / ", "https://"),
            *PENN_QUOTES,
            *CONTRACTIONS,
            *PUNCTUATION,
            *PAIRED_QUOTES,
        ),
    ),
    Protocol("lambada", "LAMBADA", "line", (("[“”]", '"'), ("[‘’]", "'"))),
    Protocol("ag_news", "AG News", "line", ((r"\\", " "), (r"#39;", "'"), (r" {2,}", " "))),
    Protocol("pubmed", "PubMed abstracts", "line", _ARTICLES),
    Protocol("arxiv", "arXiv articles", "line", _ARTICLES),
)

PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _LISTED}
"""All protocols by name."""


def find_protocol(name: str) -> Protocol:
    """Return the protocol of a name. Raises ArgumentError if there is none."""
    if name not in PROTOCOLS:
        raise ArgumentError(
            f"--protocol: expected one of {', '.join(PROTOCOLS)}; got {name}."
            f"{suggest(name, PROTOCOLS)}"
        )
    return PROTOCOLS[name]


@dataclass(frozen=True)
class PublishedProtocol:
    """Evaluation of the published code, which is not a bound of the likelihood of the text.

    - All documents are joined, separated by the end mark, and cut into blocks. A block has the end
      mark as its first and its last token. The last incomplete block is left out.
    - Times are drawn from `window`. The value is the mean over the window of the integrand of the
      diffusion term. The decoding term and the prior term are left out.

    Attributes:
        name: name of the protocol in records.
        window: lower and upper limit of the information time.
    """

    name: str = "published"
    window: tuple[float, float] = (1e-3, 1.0)

    def make_blocks(self, ids: Sequence[int], length: int, mark: int) -> NDArray[np.int64]:
        """Cut a stream of tokens into blocks [R,length], each between two marks.

        `ids` are the tokens of all documents, separated by the end mark `mark`. Raises
        ArgumentError if there are too few tokens for one block.
        """
        inner = length - 2
        count = len(ids) // inner if inner > 0 else 0
        if count == 0:
            raise ArgumentError(
                f"--published: the text has {len(ids)} tokens, but one block of {length} tokens "
                f"needs {max(inner, 1)} and two end marks. Give more text."
            )
        blocks = np.full((count, length), mark, np.int64)
        blocks[:, 1:-1] = np.asarray(ids[: count * inner]).reshape(count, inner)
        return blocks


PUBLISHED = PublishedProtocol()


class PublishedTerms(Scored):
    """Objective that computes the terms of the published evaluation from those of `objective`.

    An exact likelihood has no times; its terms are unchanged.
    """

    bound = "PUBLISHED"

    def __init__(self, objective: Scored, protocol: PublishedProtocol = PUBLISHED) -> None:
        self.objective = objective
        self.times = objective.times
        start, stop = protocol.window
        self._width = stop - start

    def nll(
        self, batch: Any, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        found = self.objective.nll(batch, rng, slot, slots, times)
        if "diffusion" not in found.terms:
            return found
        parts = {name: value / self._width for name, value in found.parts.items()}
        return Likelihood({"diffusion": found.terms["diffusion"] / self._width}, parts)
