"""Merge the sources of a recipe: its file, the recipes that it extends, and `--set` options.

Values of `--set` replace values of the recipe, and values of the recipe replace values of the
recipe that it extends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ddiff.errors import ArgumentError, RecipeError, shorten
from ddiff.recipe.files import RecipeFile, read_file
from ddiff.recipe.messages import format_value
from ddiff.recipe.schema import find_layout
from ddiff.recipe.settings import read_settings
from ddiff.recipe.toml import read_toml
from ddiff.recipe.tree import RecipeTree

LONGEST_CHAIN = 32  # recipes, each of which extends the next


def read_sources(
    file: RecipeFile, settings: Iterable[str] = (), default_name: str = ""
) -> RecipeTree:
    """Merge a recipe, the recipes that it extends, and settings into one tree of tables.

    Args:
        file: file of the recipe.
        settings: "key=value" texts.
        default_name: name of the run if the recipe extends another recipe and has no name; empty
            to inherit the name of the other recipe.
    """
    trees = _read_chain(file)
    if len(trees) > 1 and default_name:
        trees[0].values.setdefault("name", default_name)
    # a string would be iterated by characters, and a mapping by keys without values
    if isinstance(settings, str | Mapping):
        raise ArgumentError(
            'settings must be a list of "key=value" texts, such as ["train.steps=200"]; got '
            f"{settings!r}. Put each setting into a list as one text."
        )
    overrides = read_settings(settings, file.source)
    # each tree is merged over the trees that follow it
    trees = [overrides, *trees]
    # a tree may have fields of which another tree sets some keys only
    layout = find_layout({name: None for tree in trees for name in tree.values})
    for tree in trees:
        layout.expand_shorthand(tree.values)
    merged = trees.pop()
    for tree in reversed(trees):
        merged = tree.merge_over(merged, layout.find_inherited_keys)
    return merged


def _read_chain(file: RecipeFile) -> list[RecipeTree]:
    """Read a recipe, then the recipe that it extends, and so on to a recipe that extends none."""
    chain: list[RecipeFile] = []
    trees: list[RecipeTree] = []
    following: RecipeFile | None = file
    while following is not None:
        tree = read_toml(following.text, following.source)
        if trees:
            remark = f" (extended by {trees[-1].source})"
            places = {path: f"{place}{remark}" for path, place in tree.places.items()}
            tree = replace(tree, places=places)
        chain.append(following)
        trees.append(tree)
        following = _read_base(tree, chain)
    return trees


def _read_base(tree: RecipeTree, chain: list[RecipeFile]) -> RecipeFile | None:
    """Read the file of the recipe that `tree` extends, and delete the key `extends` of `tree`.

    Returns None if the key is missing. Raises RecipeError if the recipes form a cycle.

    Args:
        tree: tables of the last recipe of the chain.
        chain: files of recipes, each of which extends the next.
    """
    if "extends" not in tree.values:
        return None
    place = tree.locate(("extends",))
    # The key is deleted, so that in the merged tree it can only come from `--set`, and is refused.
    name = tree.values.pop("extends")
    if not isinstance(name, str):
        raise RecipeError(
            f"{place}: extends must be the path or name of one recipe, in quotes; got "
            f"{format_value(name)}."
        )
    sources = [file.source for file in chain]
    if len(chain) > LONGEST_CHAIN:
        raise RecipeError(
            f"{place}: a chain of extends has more than {LONGEST_CHAIN} recipes: {sources[0]} -> "
            f"{sources[1]} -> ... -> {shorten(name)}. Merge the tables of several recipes into one "
            "file."
        )
    base = read_file(name, tree.source, f"{place}: extends ")
    if base.identity in [file.identity for file in chain]:
        raise RecipeError(
            f"{place}: recipes extend each other in a cycle: "
            f"{' -> '.join((*sources, base.source))}. Remove the key extends from one of these "
            "files."
        )
    return base
