"""Nested tables that know the place of each key (such as `mine.toml:14`) and can be merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KeyPath = tuple[str | int, ...]
"""Path of a value in nested tables and arrays; integers are array indices."""

InheritedKeys = Callable[
    [tuple[str, ...], Mapping[str, Any], Mapping[str, Any]], frozenset[str] | None
]
"""Function (path, base table, overriding table) -> inherited keys of the base; None: all keys."""


@dataclass(frozen=True)
class RecipeTree:
    """Nested tables with the file and line of each key.

    Args:
        values: the tables.
        source: name of the file or option that contains the tables.
        places: file and line of every key, such as "mine.toml:14".
    """

    values: dict[str, Any]
    source: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def locate(self, path: KeyPath) -> str:
        """Return the file and line of a key or of the innermost table around the key.

        Returns `self.source`, without a line, if no table around the key has a known line.
        """
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.source

    def read_table(self, path: tuple[str, ...]) -> dict[str, Any]:
        """Return the table at a path, or an empty table if there is none."""
        values = self.values
        for key in path:
            values = values.get(key, {})
        return values

    def merge_over(self, base: RecipeTree, inherited: InheritedKeys) -> RecipeTree:
        """Merge this tree with a base tree, table by table. Values of this tree take precedence.

        Args:
            base: the base tree, which is not changed.
            inherited: function that may limit the keys that a table inherits from the base table.
        """
        places = dict(base.places)
        values = _merge_tables(base.values, self.values, (), places, inherited)
        return RecipeTree(values, self.source, {**places, **self.places})


def _merge_tables(
    base: Mapping[str, Any],
    over: Mapping[str, Any],
    path: tuple[str, ...],
    places: dict[KeyPath, str],
    inherited: InheritedKeys,
) -> dict[str, Any]:
    """Merge a table over a base table, and delete the entries of replaced values in `places`.

    Args:
        base: the base table.
        over: table whose values take precedence.
        path: path of both tables.
        places: file and line of every key of the base tree; changed in place.
        inherited: function that may limit the keys that `over` inherits from `base`.
    """
    keys = inherited(path, base, over)
    kept = {key: value for key, value in base.items() if keys is None or key in keys}
    # copied, because settings and the shorthand change trees in place
    merged = copy.deepcopy(kept)
    for key, value in over.items():
        below = merged.get(key, {})
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merge_tables(below, value, (*path, key), places, inherited)
        else:
            merged[key] = copy.deepcopy(value)
            # these places are lines of the base, which do not contain the new value
            _delete_places(places, (*path, key))
    return merged


def _delete_places(places: dict[KeyPath, str], path: KeyPath) -> None:
    """Delete the places (file and line) of a value and of all values inside the value."""
    for known in list(places):
        if known[: len(path)] == path:
            del places[known]
