"""Named protocols of likelihood on the test sets that papers use.

A protocol defines where the text of a data set is, how it becomes documents, and the rules that
undo the tokenization of the data set. All protocols are listed in `PROTOCOLS`.

The published evaluations differ from ours, and from each other. `PROGRAMS` lists them by paper, and
`PublishedTerms` computes their terms, so that a figure can be compared with that of a paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.elbo import Likelihood
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule
from ddiff.data.text import Split
from ddiff.errors import ArgumentError, suggest
from ddiff.evaluation import detokenization as rules
from ddiff.evaluation.detokenization import Rules, apply_rules
from ddiff.evaluation.likelihood import Scored

CONVERTED = "refs/convert/parquet"
"""Revision of a hub data set that replaces a loading script by data files."""

# A line such as " = Robert Boulter = ". Headings of sections have more "=" signs.
_ARTICLE_TITLE = re.compile(r"(?m)^ ?= (?!=)[^\n]*(?<!=) = ?$")


@dataclass(frozen=True)
class HubText:
    """Place of the text of a data set on the hub.

    Attributes:
        path: name of the data set.
        config: name of its configuration; None if there is only one.
        split: split that the published programs evaluate.
        column: column of the text.
        revision: branch, tag or commit; None: the newest.
    """

    path: str
    config: str | None
    split: str
    column: str = "text"
    revision: str | None = None


@dataclass(frozen=True)
class Protocol:
    """Protocol of a test set.

    The documents of a protocol are scored like those of [data]: each document starts a new row, is
    followed by the end mark, and is cut into adjacent rows of [data] length tokens. No row has a
    start mark. Every token and every end mark is scored once, without a window that slides. Bytes
    are those of the documents after the rules.

    Attributes:
        name: name of the protocol.
        title: name of the data set.
        hub: place of the text on the hub.
        split: unit in which files are read, "line" or "file". A line is a document.
        rules: rules that undo the tokenization of the data set.
        published_rules: rules of the published programs.
        has_articles: whether a file is divided into documents at the titles of articles. For the
            published programs, every line of such a file is a document, also an empty line.
    """

    name: str
    title: str
    hub: HubText
    split: Split = "line"
    rules: Rules = ()
    published_rules: Rules = ()
    has_articles: bool = False

    def detokenize(self, text: str) -> str:
        """Return the text without the tokenization of the data set and without outer spaces."""
        return apply_rules(text, self.rules).strip()

    def read_documents(self, parts: Sequence[str]) -> list[str]:
        """Return the documents, after the rules, that are not empty.

        `parts` are the lines or files of the data set, after `split`.
        """
        found = []
        for part in parts:
            pieces = _divide_at_titles(part) if self.has_articles else [part]
            for piece in pieces:
                if text := self.detokenize(piece):
                    found.append(text)
        return found

    def read_published_documents(self, parts: Sequence[str]) -> list[str]:
        """Return the documents of the published programs, after their rules.

        They may be empty: in files with articles, every empty line is a document.
        """
        lines = list(parts)
        if self.has_articles:
            lines = [line for part in parts for line in _lines_with_ends(part)]
        return [apply_rules(line, self.published_rules) for line in lines]

    def join_rows(self, rows: Sequence[str | None]) -> list[str]:
        """Return the parts of a data set from the rows of its column."""
        if self.has_articles:
            lines = [(row or "").removesuffix("\n") + "\n" for row in rows]
            return ["".join(lines)]
        return [row for row in rows if row is not None and row.strip()]


def _divide_at_titles(text: str) -> list[str]:
    """Divide a text before each line that is the title of an article."""
    starts = [match.start() for match in _ARTICLE_TITLE.finditer(text)]
    ends = [*starts, len(text)]
    pieces = [text[: ends[0]]]
    for start, stop in zip(starts, ends[1:]):
        pieces.append(text[start:stop])
    return pieces


def _lines_with_ends(text: str) -> list[str]:
    """Return the lines of a text. Blank lines are empty, and other lines keep their end."""
    lines = text.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _wikitext(name: str, title: str, config: str) -> Protocol:
    """Return the protocol of a size of WikiText; `config` is its configuration on the hub."""
    return Protocol(
        name,
        title,
        HubText("Salesforce/wikitext", config, "validation"),
        split="file",
        rules=rules.WIKITEXT,
        published_rules=rules.PUBLISHED_WIKITEXT,
        has_articles=True,
    )


_LISTED = (
    Protocol(
        "ptb",
        "Penn Treebank",
        HubText(
            "ptb-text-only/ptb_text_only", "penn_treebank", "validation", "sentence", CONVERTED
        ),
        rules=rules.PENN_TREEBANK,
        published_rules=rules.PUBLISHED_PENN_TREEBANK,
    ),
    _wikitext("wikitext2", "WikiText-2", "wikitext-2-raw-v1"),
    _wikitext("wikitext103", "WikiText-103", "wikitext-103-raw-v1"),
    Protocol(
        "lm1b",
        "One Billion Words",
        HubText("billion-word-benchmark/lm1b", "plain_text", "test", revision=CONVERTED),
        rules=rules.ONE_BILLION_WORDS,
        published_rules=rules.PUBLISHED_ONE_BILLION_WORDS,
    ),
    Protocol(
        "lambada",
        "LAMBADA",
        HubText("EleutherAI/lambada_openai", None, "test"),
        rules=rules.LAMBADA,
        published_rules=rules.PUBLISHED_LAMBADA,
    ),
    Protocol("ag_news", "AG News", HubText("fancyzhx/ag_news", None, "test"), rules=rules.AG_NEWS),
    Protocol(
        "pubmed",
        "PubMed articles",
        HubText("armanc/scientific_papers", "pubmed", "validation", "article", CONVERTED),
        rules=rules.ARTICLES,
        published_rules=rules.PUBLISHED_ARTICLES,
    ),
    Protocol(
        "arxiv",
        "arXiv articles",
        HubText("armanc/scientific_papers", "arxiv", "validation", "article", CONVERTED),
        rules=rules.ARTICLES,
        published_rules=rules.PUBLISHED_ARTICLES,
    ),
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


# ---------------------------------------------------------------------- published programs


@dataclass(frozen=True)
class PublishedProgram:
    """Evaluation of a published program, which is not a bound of the likelihood of the text.

    - The tokens of all documents are joined and cut into blocks of [data] length tokens.
      `documents_at_once` documents are joined at once, in each of `processes` parts of the data.
      The last incomplete block of every such group is left out. All tokens of a block count.
    - A time t is drawn from `window`. The value is the mean over the window of the integrand of the
      diffusion term at the information time (1 - clean_at_end) t. The decoding term and the prior
      term are left out.
    - For an exact likelihood, the first token of a block is only context.

    For masked diffusion, information time is the probability of a mask, and the value is that of
    the program, for any noise schedule.

    Attributes:
        paper: number of the paper on arXiv.
        has_end_marks: whether an end mark follows each document.
        has_block_marks: whether the first and the last token of a block are end marks.
        window: lower and upper limit of t.
        clean_at_end: probability that a token is still clean at t = 1.
        uncounted: number of tokens by which the denominator is too small, per block.
        documents_at_once: number of documents that are joined.
        processes: number of parts of the data; 1 if the program uses the number of processors of
            its machine.
    """

    paper: str
    has_end_marks: bool
    has_block_marks: bool
    window: tuple[float, float] = (1e-3, 1.0)
    clean_at_end: float = 1e-3
    uncounted: int = 0
    documents_at_once: int = 1000
    processes: int = 1

    @property
    def name(self) -> str:
        """Name of the program in records."""
        return f"published {self.paper}"

    @property
    def information_window(self) -> tuple[float, float]:
        """Lower and upper limit of the information time."""
        start, stop = self.window
        scale = 1.0 - self.clean_at_end
        return scale * start, scale * stop

    def make_blocks(
        self, documents: Sequence[Sequence[int]], length: int, mark: int
    ) -> NDArray[np.int64]:
        """Cut the tokens of documents into blocks [R,length].

        `mark` is the end mark. Raises ArgumentError if there are too few tokens for one block.
        """
        inner = length - 2 if self.has_block_marks else length
        found = [np.zeros((0, length), np.int64)]
        for group in self._group(documents):
            ids: list[int] = []
            for document in group:
                ids.extend(document)
                if self.has_end_marks:
                    ids.append(mark)
            count = len(ids) // inner if inner > 0 else 0
            blocks = np.full((count, length), mark, np.int64)
            start = 1 if self.has_block_marks else 0
            blocks[:, start : start + inner] = np.reshape(ids[: count * inner], (count, inner))
            found.append(blocks)
        whole = np.concatenate(found)
        if not len(whole):
            size = sum(map(len, documents))
            marks = " and two end marks" if self.has_block_marks else ""
            raise ArgumentError(
                f"--published: the text has {size} tokens, but one block of {length} tokens needs "
                f"{max(inner, 1)} tokens{marks}. Give more text."
            )
        return whole

    def _group(self, documents: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """Yield the documents that are joined, in order."""
        processes = max(1, min(self.processes, len(documents)))
        size, longer = divmod(len(documents), processes)
        # the first parts have one document more if the numbers do not divide
        limits = [part * size + min(part, longer) for part in range(processes + 1)]
        for first, last in pairwise(limits):
            for start in range(first, last, self.documents_at_once):
                yield documents[start : min(start + self.documents_at_once, last)]


_PROGRAMS = (
    PublishedProgram("2310.16834", has_end_marks=True, has_block_marks=False, processes=8),
    PublishedProgram("2406.07524", has_end_marks=True, has_block_marks=True),
    PublishedProgram("2503.09573", has_end_marks=False, has_block_marks=True),
    PublishedProgram("2506.10892", has_end_marks=False, has_block_marks=True),
    PublishedProgram(
        "2504.06416",
        has_end_marks=True,
        has_block_marks=False,
        clean_at_end=0.0,
        uncounted=1,
        processes=40,
    ),
)

PROGRAMS: Mapping[str, PublishedProgram] = {program.paper: program for program in _PROGRAMS}
"""Published programs by the number of their paper on arXiv."""

DEFAULT_PROGRAM = "2406.07524"


def find_program(paper: str | None) -> PublishedProgram:
    """Return the published program of a paper, by default that of `DEFAULT_PROGRAM`.

    Raises ArgumentError if there is none.
    """
    if paper is None:
        paper = DEFAULT_PROGRAM
    if paper not in PROGRAMS:
        raise ArgumentError(
            f"--program: expected the arXiv number of a paper, one of {', '.join(PROGRAMS)}; got "
            f"{paper}.{suggest(paper, PROGRAMS)}"
        )
    return PROGRAMS[paper]


class PublishedTerms(Scored):
    """Objective that computes the terms of a published program from those of `objective`.

    An exact likelihood has no times; its terms are unchanged.
    """

    bound = "PUBLISHED"

    def __init__(self, objective: Scored, program: PublishedProgram) -> None:
        self.objective = objective
        self.times = objective.times
        self.program = program

    def nll(
        self, batch: Any, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        found = self.objective.nll(batch, rng, slot, slots, times)
        if "diffusion" not in found.terms:
            return found
        start, stop = self.program.window
        length = batch.ids.shape[1]
        scale = length / (length - self.program.uncounted) / (stop - start)
        parts = {name: value * scale for name, value in found.parts.items()}
        terms = {"diffusion": found.terms["diffusion"] * scale}
        return Likelihood(terms, parts, found.time_bins)
