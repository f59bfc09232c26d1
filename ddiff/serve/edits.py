"""Edits: positions of a sample whose state changed in a step, as JSON objects."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ddiff.runs.report.clusters import TokenTree, read_tree_of
from ddiff.runs.run import Run

MOST_CACHED = 2**16  # states whose descriptions are kept


class StateNames:
    """Texts of the states of a run.

    A token has an id and a text. A mask has neither. An inner node of a tree has the field `node`
    with typical tokens.
    """

    def __init__(self, run: Run) -> None:
        self._tokenizer = run.tokenizer
        self._num_tokens = run.vocabulary.num_tokens
        self._tree: TokenTree | None = None
        if len(run.vocabulary.level_sizes) > 2:  # levels between the tokens and the root
            self._tree = read_tree_of(run.run_dir)
        self.describe = lru_cache(MOST_CACHED)(self._describe)

    def _describe(self, state: int) -> dict[str, Any]:
        if state < self._num_tokens:
            return {"id": state, "text": self._tokenizer.decode([[state]])[0]}
        found: dict[str, Any] = {"id": None, "text": None}
        if self._tree is not None and self._tree.level_of(state) < len(self._tree.parents):
            found["node"] = self._tree.name_state(state)
        return found


class EditRecorder:
    """Record of the states of a sample that were sent.

    Args:
        names: texts of states.
        ids: token ids of the template; given: True at positions that are given.
        size: number of positions of the sample.
        start: state of positions without a token; None if the prior has several states.
    """

    def __init__(
        self,
        names: StateNames,
        ids: Sequence[int],
        given: Sequence[bool],
        size: int,
        start: int | None,
    ) -> None:
        self._names = names
        self._states: list[int | None] = [start] * size
        self._given = [position for position, is_given in enumerate(given) if is_given]
        for position in self._given:
            self._states[position] = ids[position]

    def begin(self) -> list[dict[str, Any]]:
        """Return the given tokens as edits."""
        return [self._edit(position, self._states[position]) for position in self._given]

    def update(self, states: Sequence[int]) -> list[dict[str, Any]]:
        """Return the edits from the recorded states to `states`, and record `states`."""
        edits = []
        for position, (before, after) in enumerate(zip(self._states, states)):
            if before != after:
                edits.append(self._edit(position, after))
                self._states[position] = after
        return edits

    def _edit(self, position: int, state: int | None) -> dict[str, Any]:
        described = {"id": None, "text": None} if state is None else self._names.describe(state)
        return {"position": position, **described}
