"""Trees of token groups that a recipe lists by regular expressions."""

from __future__ import annotations

from typing import Any

import pytest
from ddiff_core.token_patterns import Patterns
from pydantic import ValidationError

from ddiff.core.vocabulary import HierarchicalVocabulary
from ddiff.data.tokenizer import AlphabetTokenizer, WordTokenizer
from ddiff.errors import ArgumentError

LEVELS = "0123456789abcdefg"


def build(groups: Any, tokenizer: Any = None) -> HierarchicalVocabulary:
    config = Patterns.Config(groups=groups)
    tokenizer = tokenizer or AlphabetTokenizer(LEVELS)
    return Patterns.build(config, tokenizer=tokenizer, rows=None, cache=None)


def test_patterns_tree_has_the_parents_written_by_hand() -> None:
    tree = build([["0"], ["[1-4]", "[5-8]", "[9a-c]", "[d-g]"]])
    below = [0, *[1] * 4, *[2] * 4, *[3] * 4, *[4] * 4]
    assert [level.tolist() for level in tree.parents] == [below, [0, 1, 1, 1, 1], [0, 0]]
    assert tree.level_sizes == (17, 5, 2, 1)
    assert tree.tokenizer_fingerprint == AlphabetTokenizer(LEVELS).fingerprint


def test_patterns_tree_equals_the_tree_from_labels() -> None:
    """`from_labels` numbers groups by their first token, as the order of these groups does."""
    tokenizer = AlphabetTokenizer("abxy01")
    labelled = HierarchicalVocabulary.from_labels(
        tokenizer.tokens(),
        lambda token: (
            ("vowel" if token in "ay" else "other", "letter")
            if token.isalpha()
            else ("digit", "digit")
        ),
    )
    tree = build([["[ay]", "[bx]"], ["[0-9]"]], tokenizer)
    assert tree.fingerprint == labelled.fingerprint


def test_patterns_of_one_list_make_one_level_of_groups() -> None:
    assert build(["0", "[1-9]", "[a-g]"]).level_sizes == (17, 3, 1)


def test_patterns_without_nesting_and_with_four_levels() -> None:
    tree = build([[["0"], ["1", "2"]], [["[3-9]"], ["[a-g]"]]])
    assert tree.level_sizes == (17, 5, 4, 2, 1)
    assert [level.tolist() for level in tree.parents[1:]] == [
        [0, 1, 1, 2, 3],
        [0, 0, 1, 1],
        [0, 0],
    ]


def test_patterns_give_a_token_to_the_first_expression_that_matches_all_of_it() -> None:
    tokenizer = WordTokenizer(["def", "define", "in", "x"])
    tree = build([r"<\|eos\|>", "def|in", "[a-z]+"], tokenizer)
    assert tree.parents[0].tolist() == [0, 1, 2, 1, 2]


def test_patterns_name_tokens_that_no_expression_matches() -> None:
    with pytest.raises(ArgumentError, match=r"matches 7 of 17 tokens, such as 'a', 'b'.*Add an"):
        build(["0", "[1-9]"])
    with pytest.raises(ArgumentError, match=r"matches 1 of 2 tokens, such as '<\|eos\|>'"):
        build(["a", "b"], WordTokenizer(["a"]))


def test_patterns_name_an_expression_without_tokens() -> None:
    with pytest.raises(ArgumentError, match=r"no token is left for the expression '5'"):
        build(["0", "[1-9a-g]", "5"])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["0"], "at least 2 items"),
        (["0", ["1", "2"]], r"nested equally deep.*got '0' next to '0'"),
        ([["0"], "1"], r"nested equally deep.*got '1' next to \['0'\]"),
        ([["0"], []], r"none may be empty.*got \[\]"),
        ([1, 2], r"innermost must hold regular expressions; got 1"),
        ([{"a": "b"}, {"c": "d"}], r"got \{'a': 'b'\}"),
        (["0", "[1-"], r"'\[1-' is not a regular expression: unterminated character set"),
        ("01", "valid tuple"),
    ],
)
def test_patterns_refuse_groups_that_are_no_tree_of_expressions(groups: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Patterns.Config(groups=groups)


def test_patterns_preview_has_the_shape_of_the_built_tree() -> None:
    config = Patterns.Config(groups=[["0"], ["[1-4]", "[5-9a-g]"]])
    preview = Patterns.preview(config, num_tokens=17)
    assert preview is not None
    assert preview.level_sizes == build(config.groups).level_sizes
    assert Patterns.preview(config, num_tokens=None) is None
    with pytest.raises(ArgumentError, match="lists 3 groups of tokens, but there are only 2"):
        Patterns.preview(config, num_tokens=2)
