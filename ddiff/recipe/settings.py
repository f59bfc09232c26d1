"""Parse `key=value` texts of the options --set and --condition."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ddiff.errors import RecipeError, shorten
from ddiff.recipe.toml import DEEPEST, explain_parser_error, explain_toml_error, find_fault
from ddiff.recipe.tree import RecipeTree


@dataclass(frozen=True)
class _Option:
    """Message texts about a command-line option that takes `key=value` texts."""

    expected: str
    examples: str


# A number such as .5 or 5., which TOML does not accept. As a string it would never be meant.
_HALF_NUMBER = re.compile(r"[+-]?(\.\d+|\d+\.)(e[+-]?\d+)?", re.IGNORECASE)

_OPTIONS = {
    "--set": _Option(
        "key=value with a dotted key, as in --set train.steps=200",
        "a dotted key and a TOML value: "
        "train.steps=200, denoiser.head=tied, 'vocabulary.sizes=[64]'",
    ),
    "--condition": _Option(
        "NAME=VALUE, as in --condition author=2",
        "the name of a condition and a label or a vector: author=2, 'style=[0.5, 1.0]'",
    ),
}


def read_settings(settings: Iterable[str], source: str, option: str = "--set") -> RecipeTree:
    """Parse texts such as "train.steps=200" to a tree of tables.

    A value that is not valid TOML is read as a string, so that strings need no quotes.

    Args:
        settings: the texts.
        source: name of the returned tree, for messages about keys that no text sets.
        option: "--set" or "--condition", for messages about the texts.

    Raises RecipeError if a text has no `=`, more than one key, or an invalid key or value. Raises
    RecipeError also if one text sets a key such as `a.b` and another text sets `a` to a value that
    is not a table.
    """
    tree = RecipeTree({}, source)
    for setting in settings:
        place = f"{option} {shorten(setting)}"
        path, value = _parse_setting(setting, option, place)
        fault = find_fault(value)
        if fault:
            raise RecipeError(f"{place}: {fault}.")
        _insert(tree.values, path, value, place)
        # also for the tables around the key, which the recipe file may not contain
        for length in range(1, len(path) + 1):
            tree.places[path[:length]] = place
    return tree


def _parse_setting(setting: str, option: str, place: str) -> tuple[tuple[str, ...], Any]:
    """Return the key path and the value of one `key=value` text.

    `option` is the command-line option of the text, and `place` the beginning of error messages.
    """
    key, equals, value = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{place}: expected {_OPTIONS[option].expected}.")
    try:
        setting.encode()
    except UnicodeEncodeError as error:
        byte = setting[error.start : error.start + 1]
        raise RecipeError(
            f"{place}: the setting is not UTF-8 text (byte {byte!a} at {error.start})."
        ) from error
    examples = _OPTIONS[option].examples
    try:
        path = _parse_key(key)
        return path, _parse_value(path, key, value)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{place}: {explain_toml_error(error)}. Write {examples}.") from error
    except (RecursionError, ValueError) as error:
        raise RecipeError(f"{place}: {explain_parser_error(error)}. Write {examples}.") from error


def _parse_key(key: str) -> tuple[str, ...]:
    """Return the path of a dotted key. Raises TOMLDecodeError for an invalid key."""
    if "\n" in key or "\r" in key:
        raise tomllib.TOMLDecodeError("a key must be on one line")
    # checked before tomllib, which recurses once per dot
    if key.count(".") > DEEPEST:
        raise ValueError(f"the dotted key has more than {DEEPEST} parts, the limit for a recipe")
    path: tuple[str, ...] = ()
    tree: Any = tomllib.loads(f"{key} = 0")
    while isinstance(tree, dict):
        if len(tree) != 1:
            raise tomllib.TOMLDecodeError("expected one key")
        ((name, tree),) = tree.items()
        path = (*path, name)
    return path


def _parse_value(path: tuple[str, ...], key: str, value: str) -> Any:
    """Return the TOML value of the text `value`, or the text itself as a string.

    `key`: dotted key of the setting. `path`: its parts.
    """
    try:
        tree: Any = tomllib.loads(f"{key} = {value}")
    except tomllib.TOMLDecodeError:
        # an invalid list, table or quoted string is an error, not an unquoted string
        if value.strip()[:1] in tuple("[{\"'"):
            raise
        if _HALF_NUMBER.fullmatch(value.strip()):
            raise tomllib.TOMLDecodeError(
                f"a number needs digits on both sides of the point; got {value.strip()}"
            ) from None
        return value.strip()
    for name in path:
        if not isinstance(tree, dict) or list(tree) != [name]:
            raise tomllib.TOMLDecodeError(
                "a setting must have exactly one key; repeat the option for another key"
            )
        tree = tree[name]
    return tree


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any, place: str) -> None:
    """Insert the value of one `--set` text at a path of a tree.

    `place` describes this `--set` text in error messages. If one text sets a key to a string and
    another one sets it to a table, the string is a shorthand for the key `kind` of the table.
    """
    for depth, key in enumerate(path[:-1], start=1):
        below = tree.setdefault(key, {})
        if isinstance(below, str):  # an earlier setting used the shorthand for {kind = "..."}
            below = tree[key] = {"kind": below}
        if not isinstance(below, dict):
            raise RecipeError(
                f"{place}: another setting gives {'.'.join(path[:depth])} a value that is not a "
                "table."
            )
        tree = below
    # train.optimizer=muon after train.optimizer.lr=0.5 is the shorthand for the kind
    if isinstance(tree.get(path[-1]), dict) and isinstance(value, str):
        tree[path[-1]]["kind"] = value
    else:
        tree[path[-1]] = value
