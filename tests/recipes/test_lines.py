"""`key_lines` finds the line of every key of a TOML text."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.toml import key_lines, write_toml
from ddiff.recipe.tree import KeyPath

AWKWARD = r'''# a [comment] = "with = syntax"
name = "x # no comment [nor table]"   # 2
plugins = [                           # 3
    "a", # ] = , }
    'b]',                             # 5
]
"quo\"ted" . 'k' = """
[table] = 3
x = 9
"""
a.b.c = { x = 1, y = [ {z = 1}, {z = 2, w = "}"} ] }
[data]                                # 12
when = 1979-05-27T07:32:00Z
[[list]]
x = 1
[list.sub]                            # 16
q = -1e3
[[list]]
x = 2                                 # 19
[ "train" . optimizer ]
long = \'\'\'a'' ]
\'\'\'
empty = ""                            # 23
quoted = """"yes""""
none = []
nothing = {}                          # 26'''.replace("\\'", "'")

LINES = {
    ("name",): 2, ("plugins",): 3, ("plugins", 0): 4, ("plugins", 1): 5, ('quo"ted', "k"): 7,
    ("a", "b", "c"): 11, ("a", "b", "c", "y", 1, "w"): 11, ("data",): 12, ("data", "when"): 13,
    ("list", 0, "x"): 15, ("list", 0, "sub"): 16,
    ("list", 0, "sub", "q"): 17, ("list", 1): 18, ("list", 1, "x"): 19, ("train", "optimizer"): 20,
    ("train", "optimizer", "long"): 21, ("train", "optimizer", "empty"): 23,
    ("train", "optimizer", "quoted"): 24,
    ("train", "optimizer", "nothing"): 26,
}  # fmt: skip


def paths(value: object, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Iterate over the key paths of all values in nested tables and arrays, prefixed by `path`."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, below in items:
        yield (*path, key)
        yield from paths(below, (*path, key))


def test_key_lines_gives_the_line_of_quoted_dotted_and_array_keys():
    found = key_lines(AWKWARD)
    assert {path: found[path] for path in LINES} == LINES


@pytest.mark.parametrize(
    "text", [AWKWARD, *(path.read_text() for path in find_shipped_recipes().values())]
)
def test_key_lines_returns_the_same_keys_as_tomllib(text):
    lines = set(key_lines(text))
    # [train.optimizer] creates [train] without a line
    implied_by_dotted_headers = {path[:size] for path in lines for size in range(1, len(path))}
    assert set(paths(tomllib.loads(text))) - lines <= implied_by_dotted_headers
    assert set(key_lines(text)) <= set(paths(tomllib.loads(text)))


keys = st.text(min_size=1, max_size=6).filter(lambda text: text.isprintable())
scalars = (
    st.integers(-9, 9)
    | st.booleans()
    | st.text(max_size=8).filter(str.isprintable)
    | st.floats(-2, 2)
)
tables = st.recursive(
    scalars | st.lists(scalars, max_size=3),
    lambda inner: st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.dictionaries(keys, tables, max_size=4))
def test_key_lines_gives_a_line_for_every_value_of_a_toml_text(tree):
    text = write_toml(tree, "any tables")
    assert tomllib.loads(text) == tree
    found = key_lines(text)
    for path in paths(tree):
        if (
            path in found
            and isinstance(path[-1], str)
            and path[-1].isalnum()
            and path[-1].isascii()
        ):
            assert path[-1] in text.splitlines()[found[path] - 1]
        assert path in found or any(known[: len(path)] == path for known in found)
