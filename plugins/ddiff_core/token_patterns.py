"""Tree of token groups that a recipe lists by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from ddiff import ArgumentError, ComponentConfig

if TYPE_CHECKING:
    from ddiff import Cache, HierarchicalVocabulary, Rows, Tokenizer

SHOWN = 8  # tokens without a group that an error message lists


class Patterns:
    """Tree of token groups that the recipe lists, one regular expression per group.

    A token belongs to the first group whose expression matches the whole token. Every token must
    belong to a group, also special tokens such as `<|eos|>`. Nested lists make coarser groups:
    `groups = [["0"], ["[1-4]", "[5-9]"]]` is a tree of three groups of digits under two coarser
    groups, and the mask. Byte-level tokenizers spell a space as "Ġ" and a line end as "Ċ".
    """

    class Config(ComponentConfig):
        groups: Annotated[tuple[Any, ...], Field(min_length=2)]
        """Expressions, in lists that are nested equally deep. The innermost lists hold
        expressions, and every list is one group of the level above."""

        @field_validator("groups")
        @classmethod
        def _check_groups(cls, groups: tuple[Any, ...]) -> tuple[Any, ...]:
            _check_depth(groups)
            for pattern in _list_patterns(groups):
                _check_pattern(pattern)
            return groups

    @staticmethod
    def build(
        config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> HierarchicalVocabulary:
        from ddiff import HierarchicalVocabulary

        patterns = _list_patterns(config.groups)
        groups = _assign_groups(tokenizer.tokens(), patterns)
        parents = [groups, *_list_parents(config.groups)]
        return HierarchicalVocabulary(parents, tokenizer_fingerprint=tokenizer.fingerprint)

    @staticmethod
    def preview(config: Config, *, num_tokens: int | None) -> HierarchicalVocabulary | None:
        """Return a tree with the listed groups and equally many tokens in each, for a dry run.

        A model on this tree has parameters of the same shapes as on the tree that `build` computes.
        Returns None if the number of tokens, `num_tokens`, is None.
        """
        from ddiff import HierarchicalVocabulary

        if not num_tokens:
            return None
        count = len(_list_patterns(config.groups))
        if num_tokens < count:
            raise ArgumentError(
                f"[vocabulary] groups lists {count} groups of tokens, but there are only "
                f"{num_tokens} tokens, and every group needs one. List fewer groups."
            )
        groups = [token * count // num_tokens for token in range(num_tokens)]
        return HierarchicalVocabulary([groups, *_list_parents(config.groups)])


def _check_depth(groups: Sequence[Any]) -> None:
    """Raise ValueError unless `groups` holds lists that are nested equally deep around texts."""
    level = list(groups)
    while not all(isinstance(item, str) for item in level):
        below: list[Any] = []
        for item in level:
            if not isinstance(item, (list, tuple)) or not item:
                raise ValueError(
                    "all lists must be nested equally deep, none may be empty, and the innermost "
                    f"must hold regular expressions; got {item!r} next to {level[0]!r}. To have a "
                    "group without subdivision, write it as a list of one expression"
                )
            below.extend(item)
        level = below


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}. Write a backslash before a special "
            r"character such as a bracket, in single quotes: '\['"
        ) from None


def _list_levels(groups: Sequence[Any]) -> list[list[Any]]:
    """Return the items of every level of nested lists, the coarsest level first."""
    levels = [list(groups)]
    while not isinstance(levels[-1][0], str):
        levels.append([item for group in levels[-1] for item in group])
    return levels


def _list_patterns(groups: Sequence[Any]) -> list[str]:
    """Return all expressions in their order."""
    return _list_levels(groups)[-1]


def _list_parents(groups: Sequence[Any]) -> list[list[int]]:
    """Return the parents of the groups of each level, the finest level first, without a root."""
    parents = []
    for level in _list_levels(groups)[:-1]:
        # Groups are numbered in their order, so the members of a group have consecutive numbers.
        parents.append([number for number, group in enumerate(level) for _ in group])
    return parents[::-1]


def _assign_groups(tokens: Sequence[str], patterns: Sequence[str]) -> list[int]:
    """Return for each token the number of the first expression that matches the whole token.

    Raises ArgumentError if a token matches no expression, or an expression gets no token.
    """
    compiled = [re.compile(pattern, re.DOTALL) for pattern in patterns]
    groups = []
    missing = []
    for token in tokens:
        found = [number for number, pattern in enumerate(compiled) if pattern.fullmatch(token)]
        if found:
            groups.append(found[0])
        else:
            missing.append(token)
    if missing:
        shown = ", ".join(repr(token) for token in missing[:SHOWN])
        raise ArgumentError(
            f"[vocabulary] groups: no expression matches {len(missing)} of {len(tokens)} tokens, "
            f'such as {shown}. Add an expression for these tokens, or the group ".*" at the end.'
        )
    for number in sorted(set(range(len(patterns))) - set(groups)):
        raise ArgumentError(
            f"[vocabulary] groups: no token is left for the expression {patterns[number]!r}. Each "
            "token belongs to the first expression that matches all of its characters. Remove the "
            "expression, or list it before the others that match the same tokens."
        )
    return groups
