"""Nodes of a saved vocabulary, with their tokens as texts.

The files are read without torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ddiff.errors import DdiffError
from ddiff.run_dir.files import TOKENIZER, VOCABULARY, damage_error
from ddiff.runs.report.run_files import ReportedRun

MOST_WORDS = 60  # words of a node on the page
TYPICAL_WORDS = 3  # words that stand for a node in a trajectory
SPACE = "␣"


@dataclass(frozen=True)
class TokenTree:
    """Tree over the tokens of a vocabulary.

    Attributes:
        parents: for each level below the root, the index of each node's parent in the next level.
        words: text of each token.
        counts: number of occurrences of each token in the samples of the run.
    """

    parents: Sequence[NDArray[np.int64]]
    words: Sequence[str]
    counts: Mapping[int, int]

    @cached_property
    def level_sizes(self) -> tuple[int, ...]:
        """Number of states of each level: tokens first, the root last."""
        upper = [int(level.max()) + 1 for level in self.parents]
        return (len(self.words), *upper)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Id of the first state of each level."""
        return (0, *np.cumsum(self.level_sizes[:-1]).tolist())

    @property
    def has_clusters(self) -> bool:
        """True if there are levels between the tokens and the root."""
        return len(self.parents) > 1

    def level_of(self, state: int) -> int:
        """Return the level of a state id."""
        return sum(state >= offset for offset in self.offsets) - 1

    def parent_of(self, state: int) -> int | None:
        """Return the id of the parent of a state, or None for the root."""
        level = self.level_of(state)
        if level >= len(self.parents):
            return None
        index = int(self.parents[level][state - self.offsets[level]])
        return self.offsets[level + 1] + index

    @cached_property
    def children(self) -> Mapping[int, Sequence[int]]:
        """Ids of the children of each node."""
        found: dict[int, list[int]] = {}
        for level, parents in enumerate(self.parents):
            for index, parent in enumerate(parents.tolist()):
                node = self.offsets[level + 1] + parent
                found.setdefault(node, []).append(self.offsets[level] + index)
        return found

    def tokens_below(self, node: int) -> list[int]:
        """Return the tokens below a node, the most typical first.

        Tokens with at least two letters come first. Among them, tokens that occur often in the
        samples come first, and others are in the order of their ids: a byte-pair tokenizer learns
        frequent tokens first.
        """
        if self.level_of(node) == 0:
            return [node]
        below: list[int] = []
        for child in self.children.get(node, ()):
            below += self.tokens_below(child)
        return sorted(below, key=self._rank)

    def _rank(self, token: int) -> tuple[bool, int, int]:
        # single letters, bytes and special tokens say little about a node
        letters = sum(map(str.isalpha, self.words[token]))
        return letters < 2, -self.counts.get(token, 0), token

    def name_state(self, state: int) -> str:
        """Return a short text for a state: the token, the words of a node, or "mask"."""
        level = self.level_of(state)
        if level == 0:
            return self.words[state]
        if level == len(self.parents):
            return "mask"
        typical = self.tokens_below(state)[:TYPICAL_WORDS]
        return " · ".join(show_token(self.words[token]).strip(SPACE) for token in typical)


def show_token(word: str) -> str:
    """Return the text of a token with visible spaces and line breaks."""
    return word.replace(" ", SPACE).replace("\n", "⏎").replace("\t", "⇥")


def read_tree(run: ReportedRun) -> TokenTree | None:
    """Read vocabulary and tokenizer of a text run.

    Returns None if the run has none, or if its tokenizer needs files that are not there.
    """
    return read_tree_of(run.directory, run.samples)


def read_tree_of(directory: Path, samples: Sequence[Mapping[str, Any]] = ()) -> TokenTree | None:
    """Read vocabulary and tokenizer from a directory. `samples` have token ids in `ids`."""
    path = directory / VOCABULARY
    if not path.is_file() or not (directory / TOKENIZER).is_file():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise damage_error(path, str(error)) from error
    parents: list[NDArray[np.int64]] = []
    while f"parents.{len(parents)}" in tensors:
        parents.append(tensors[f"parents.{len(parents)}"].astype(np.int64))
    words = _read_words(directory / TOKENIZER)
    if words is None:
        return None
    counts = Counter(token for sample in samples for token in sample.get("ids", ()))
    return TokenTree(parents, words, counts)


def _read_words(path: Path) -> list[str] | None:
    """Return the text of each token, or None if the tokenizer cannot be loaded."""
    from ddiff.data.tokenizer import load_tokenizer  # imports tokenizers

    try:
        tokenizer = load_tokenizer(str(path))
        return tokenizer.decode([[token] for token in range(tokenizer.num_tokens)])
    except DdiffError:
        # a tokenizer of a library may need packages that are not installed here
        return None
